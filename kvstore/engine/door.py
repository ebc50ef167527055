"""The short way into the store of the own host, as its callers use it: see kvstore.store.door.

What needs no answer travels with the next call, or a moment later by a thread that lives as long as it is
used. A call of another thread takes another connection; they are kept for the next calls.
"""

import contextlib
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.store.door import HEADER, RECV_BYTES
from mooncake.core import wire
from mooncake.core.errors import CapacityError, MooncakeError, PeerGone, PeerTimeout, ProtocolError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import StoreReply, Used
from mooncake.core.rpc import raise_failure
from transfer.fdpass import peer_uid

IDLE_MAX = 16
"""Connections one client keeps for its next calls; a thread pool's worth."""
WAIT_STEP_S = 0.1
"""Deadlines are rounded up to it, so that the socket's own is seldom set anew (a system call)."""
TELL_S = 0.05
"""How late what was told is sent when no call follows: a lease that lies idle so long harms nobody."""
TOLD_S = 0.5
"""How long a store may need to take it in; then it is dropped."""
TOLD_MAX = 64
USED_MAX = 2048
"""Reads by the table that are told of together: 64 KiB."""
IDLE_TELLS = 20
"""Looks for something to tell before its thread ends: a second."""


class DoorClient:
    """Calls from plain threads, each on a connection that no other thread has at the time. Thread-safe."""

    def __init__(self, path: str) -> None:
        """Connect with the first call."""
        self.path = path
        self.on_idle: Callable[[], None] = lambda: None
        """Called in a thread when nothing was told or used for a while."""
        self._idle: deque[_Wire] = deque()
        self._told: deque[bytes] = deque()
        self._used: deque[bytes] = deque()
        self._teller: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._telling = threading.Lock()

    def call(self, request: Any, deadline_s: float) -> Any:
        """Return the store's answer to `request`.

        Raises:
            PeerTimeout: none within `deadline_s`.
            PeerGone: the store closed, or nobody serves there.
            ProtocolError: it is no answer of a store.
            MooncakeError: whatever the store raised.
        """
        end_s = time.monotonic() + deadline_s
        if self._telling.locked() and self._telling.acquire(timeout=max(0.0, min(deadline_s, TOLD_S))):
            self._telling.release()
        body = self._talk(_frame(request, 1), end_s)
        return raise_failure(wire.decode(body, StoreReply), self.path)  # type: ignore[arg-type]

    def tell(self, request: Any) -> None:
        """Have the store do something whose answer nobody needs, before any call that follows.

        It travels with the next call, so that the store is not woken for it alone, or TELL_S later. What
        cannot be sent is dropped: the store ends leases and writes by their own terms.
        """
        self._told.append(_frame(request, 0))
        if len(self._told) >= TOLD_MAX:
            self._tell_now()
        elif self._teller is None:
            self._tell_soon()

    def used(self, keys: Sequence[bytes]) -> None:
        """Tell of keys that were read without a call, b"" for a miss; as `tell`."""
        self._used.extend(keys)
        if len(self._used) >= USED_MAX:
            self._tell_now()
        elif self._teller is None:
            self._tell_soon()

    def ring(self) -> None:
        """Wake the store: it looks for itself what there is to do."""
        end_s = time.monotonic() + TELL_S
        with contextlib.suppress(MooncakeError):
            self._talk(_frame(Used(b""), 0), end_s, answered=False)

    def _tell_soon(self) -> None:
        with self._lock:
            if self._teller is None and not self._closing.is_set():
                self._teller = threading.Thread(target=self._tell_late, name="pool-tell", daemon=True)
                self._teller.start()

    def _take_told(self) -> bytes:
        if not self._told and not self._used:
            return b""
        frames = _drained(self._told)
        used = _drained(self._used)
        for at in range(0, len(used), USED_MAX):
            keys = b"".join(some := used[at : at + USED_MAX])
            frames.append(_frame(Used(keys, len(some) - len(keys) // KEY_BYTES), 0))
        return b"".join(frames)

    def _tell_now(self) -> None:
        """Send it, and wait until the store has taken it in: no later call of ours may overtake it."""
        end_s = time.monotonic() + TOLD_S
        with contextlib.suppress(MooncakeError), self._telling:
            if frames := self._take_told():  # gone, also if the store is away: what is told is bounded
                self._talk(frames + _frame(Used(b""), 1), end_s)

    def _tell_late(self) -> None:
        """Send what no call has taken along; end after a while without any."""
        idle = 0
        while idle < IDLE_TELLS and not self._closing.wait(TELL_S):
            idle = 0 if self._told or self._used else idle + 1
            if not idle:
                self._tell_now()
        with self._lock:
            self._teller = None
        self.on_idle()
        if self._told or self._used:
            self._tell_now()

    def close(self) -> None:
        """Send what was told, close idle connections; others are closed when their call ends (idempotent)."""
        if (self._told or self._used) and not self._closing.is_set():
            self._tell_now()
        self._closing.set()
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()

    def _talk(self, frame: bytes, end_s: float, *, answered: bool = True) -> bytes:
        """Send `frame` and, if it is answered, what was told before it; return the answer."""
        line = self._take(end_s)
        try:
            # nothing that is told goes unanswered: a later call on another connection would overtake it
            line.send(self._take_told() + frame if answered else frame, end_s)
            body = line.receive(end_s) if answered else b""
        except BaseException:
            line.close()  # a late answer would be taken for that of the next call
            raise
        self._give(line)
        return body

    def _take(self, end_s: float) -> "_Wire":
        if self._closing.is_set():
            raise PeerGone(f"{self.path}: closed")
        try:
            return self._idle.pop()
        except IndexError:
            return _Wire(self.path, end_s)

    def _give(self, line: "_Wire") -> None:
        if self._closing.is_set() or len(self._idle) >= IDLE_MAX:
            line.close()
        else:
            self._idle.append(line)


class _Wire:
    """One connection of a client, used by one thread at a time. An answer's length is the store's word."""

    def __init__(self, path: str, end_s: float) -> None:
        self._path = path
        self._wait_s = 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._until(end_s)
            self._socket.connect(path)
            if (uid := peer_uid(self._socket)) != os.getuid():
                raise ProtocolError(f"{path} is served by user {uid}, not by us")
        except BlockingIOError as error:
            self._socket.close()
            raise CapacityError(f"{path}: too many callers at once") from error
        except TimeoutError:
            self._socket.close()
            raise PeerTimeout(f"{path}: not let in") from None
        except OSError as error:
            self._socket.close()
            raise PeerGone(f"{path}: {error}") from error
        except MooncakeError:
            self._socket.close()
            raise

    def send(self, frames: bytes, end_s: float) -> None:
        self._until(end_s)
        try:
            self._socket.sendall(frames)
        except TimeoutError:
            raise PeerTimeout(f"{self._path}: it takes no request") from None
        except OSError as error:
            raise PeerGone(f"{self._path}: {error}") from error

    def receive(self, end_s: float) -> bytes:
        try:
            data = self._recv()
            if len(data) < HEADER.size or len(data) < HEADER.size + HEADER.unpack_from(data)[0]:
                data = self._rest(bytearray(data), end_s)
        except TimeoutError:
            raise PeerTimeout(f"{self._path}: no answer in time") from None
        except OSError as error:
            raise PeerGone(f"{self._path}: {error}") from error
        if (more := len(data) - HEADER.size - HEADER.unpack_from(data)[0]) > 0:
            raise ProtocolError(f"{self._path}: {more} bytes behind the answer")
        return data[HEADER.size :]

    def _rest(self, data: bytearray, end_s: float) -> bytes:
        while len(data) < HEADER.size or len(data) < HEADER.size + HEADER.unpack_from(data)[0]:
            self._until(end_s)
            data += self._recv()
        return bytes(data)

    def _recv(self) -> bytes:
        data = self._socket.recv(RECV_BYTES)
        if not data:
            raise PeerGone(f"{self._path}: the store has closed")
        return data

    def _until(self, end_s: float) -> None:
        """Have the socket wait no longer than until `end_s`, rounded up."""
        wait_s = math.ceil(max(end_s - time.monotonic(), 1e-3) / WAIT_STEP_S) * WAIT_STEP_S
        if wait_s != self._wait_s:
            self._socket.settimeout(wait_s)
            self._wait_s = wait_s

    def close(self) -> None:
        self._socket.close()


def _drained(items: deque[bytes]) -> list[bytes]:
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(items.popleft())
    return taken


def _frame(request: Any, wanted: int) -> bytes:
    body = wire.encode(request)
    return HEADER.pack(len(body), wanted) + body
