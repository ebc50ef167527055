"""The short way into the store of the own host: a unix socket, one call at a time per connection.

The store's ZMQ socket serves engines that overlap calls with their own work; a call there passes two
threads and a task on either side, 0.3 ms. Here a blocked caller is woken by the store's loop itself: the
request is decoded, decided and answered in one turn, 30 us. Frames: [u32 length][u32 wanted][message of
core.messages]; wanted 0 = no answer, for what may be lost (Release). The socket file lies in the store's
private directory; both ends are of the same user, as in transfer.fdpass.
"""

import asyncio
import contextlib
import math
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from mooncake.core import wire
from mooncake.core.errors import CapacityError, MooncakeError, PeerGone, PeerTimeout, ProtocolError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import Failure, StoreReply, StoreRequest, Used
from mooncake.core.rpc import failure_of, raise_failure
from transfer.fdpass import peer_uid

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 256
"""Callers of one host at once: threads that are inside a call of their pool."""
IDLE_MAX = 16
"""Connections one client keeps for its next calls; a thread pool's worth."""
BACKLOG = 64
RECV_BYTES = 64 << 10
"""One read of the socket: 2000 keys. From 128 KiB on malloc maps fresh pages for each: 20 us more."""
OUTPUT_BYTES_MAX = 4 * wire.MESSAGE_BYTES_MAX
"""Unread answers of one connection; a caller waits for each before it asks again."""
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

_HEADER = struct.Struct("<II")

Now = Callable[[Any], Any | None]
Later = Callable[[Any], Awaitable[Any]]


class Door:
    """Serves StoreRequests on the loop that starts it."""

    def __init__(self, path: str, now: Now, later: Later) -> None:
        """Bind; an old file is removed: FdServer has made sure that no living store has this name.

        Args:
            path: of the socket, in a private directory.
            now: returns the answer, or None if the request has to wait for something.
            later: answers what `now` did not.
        """
        self.path = Path(path)
        self._now, self._later = now, later
        self._connections: dict[int, _Connection] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path.unlink(missing_ok=True)
            self._socket.bind(str(self.path))
            self.path.chmod(0o600)
            self._socket.listen(BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._inode = self.path.stat().st_ino
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to serve on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)

    async def close(self) -> None:
        """Hang up on everybody, remove the socket file unless a successor has replaced it (idempotent)."""
        if self._loop:
            self._loop.remove_reader(self._socket)
            self._loop = None
        for connection in list(self._connections.values()):
            await connection.close()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _accept(self) -> None:
        try:
            caller, _ = self._socket.accept()
        except OSError:  # it has left already, or we are out of descriptors: it will see no answer
            return
        if peer_uid(caller) != os.getuid() or len(self._connections) >= CONNECTIONS_MAX:
            log.warning("door.refused", path=str(self.path), connections=len(self._connections))
            caller.close()
            return
        assert self._loop
        connection = _Connection(caller, self._loop, self._now, self._later, self._connections.pop)
        self._connections[caller.fileno()] = connection


class _Connection:
    """One caller. Reads nothing more while a call of it waits: order is kept, memory bounded."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        now: Now,
        later: Later,
        ended: Callable[[int], object],
    ) -> None:
        sock.setblocking(False)
        self._socket, self._loop, self._ended = sock, loop, ended
        self._now, self._later = now, later
        self._number = sock.fileno()
        self._input = bytearray()
        self._output = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._open = True
        loop.add_reader(sock, self._read)

    async def close(self) -> None:
        """Hang up."""
        task = self._task
        self._end()
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._ended(self._number)

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        if not self._input and len(data) > _HEADER.size:
            length, wanted = _HEADER.unpack_from(data)
            if len(data) == _HEADER.size + length:  # nearly always: one call, whole
                self._answer(data[_HEADER.size :], bool(wanted))
                return
        self._input += data
        self._serve()

    def _serve(self) -> None:
        """Answer whole frames until there is none, or one has to wait."""
        while self._open and self._task is None and len(self._input) >= _HEADER.size:
            length, wanted = _HEADER.unpack_from(self._input)
            end = _HEADER.size + length
            if length > wire.MESSAGE_BYTES_MAX:
                log.warning("door.too_long", length_bytes=length)
                self._end()
                return
            if len(self._input) < end:
                return
            body = bytes(self._input[_HEADER.size : end])
            del self._input[:end]
            self._answer(body, bool(wanted))

    def _answer(self, body: bytes, wanted: bool) -> None:
        reply = None
        try:
            request: Any = wire.decode(body, StoreRequest)  # type: ignore[arg-type]
            reply = self._now(request)
        except MooncakeError as error:
            reply = failure_of(error)
        except Exception as error:
            log.exception("door.handler_failed")
            reply = Failure("internal", f"{type(error).__name__}: {error}")
        if reply is None:
            self._loop.remove_reader(self._socket)
            self._task = asyncio.create_task(self._wait(request, wanted))
        elif wanted:
            self._send(reply)

    async def _wait(self, request: Any, wanted: bool) -> None:
        try:
            reply = await self._later(request)
        except MooncakeError as error:
            reply = failure_of(error)
        except Exception as error:
            log.exception("door.handler_failed")
            reply = Failure("internal", f"{type(error).__name__}: {error}")
        self._task = None
        if not self._open:
            return
        if wanted:
            self._send(reply)
        if self._open:
            self._loop.add_reader(self._socket, self._read)
            self._serve()

    def _send(self, reply: Any) -> None:
        body = wire.encode(reply)
        data = _HEADER.pack(len(body), 1) + body
        if not self._output:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._end()
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._socket, self._write)
        self._output += data
        if len(self._output) > OUTPUT_BYTES_MAX:
            log.warning("door.not_read", bytes=len(self._output))
            self._end()

    def _write(self) -> None:
        try:
            sent = self._socket.send(self._output)
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        del self._output[:sent]
        if not self._output:
            self._loop.remove_writer(self._socket)


def _drained(items: deque[bytes]) -> list[bytes]:
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(items.popleft())
    return taken


def _frame(request: Any, wanted: int) -> bytes:
    body = wire.encode(request)
    return _HEADER.pack(len(body), wanted) + body


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
        line = self._take(end_s)
        try:
            line.send(self._take_told() + _frame(request, 1), end_s)
            body = line.receive(end_s)
        except BaseException:
            line.close()  # a late answer would be taken for that of the next call
            raise
        self._give(line)
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
            line = self._take(end_s)
            try:
                line.send(_frame(Used(b""), 0), end_s)
            except BaseException:
                line.close()
                raise
            self._give(line)

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
            if not (frames := self._take_told()):
                return
            line = self._take(end_s)
            try:
                line.send(frames + _frame(Used(b""), 1), end_s)
                line.receive(end_s)
            except BaseException:
                line.close()
                raise
            self._give(line)

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
            if len(data) < _HEADER.size or len(data) < _HEADER.size + _HEADER.unpack_from(data)[0]:
                data = self._rest(bytearray(data), end_s)
        except TimeoutError:
            raise PeerTimeout(f"{self._path}: no answer in time") from None
        except OSError as error:
            raise PeerGone(f"{self._path}: {error}") from error
        if (more := len(data) - _HEADER.size - _HEADER.unpack_from(data)[0]) > 0:
            raise ProtocolError(f"{self._path}: {more} bytes behind the answer")
        return data[_HEADER.size :]

    def _rest(self, data: bytearray, end_s: float) -> bytes:
        while len(data) < _HEADER.size or len(data) < _HEADER.size + _HEADER.unpack_from(data)[0]:
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
