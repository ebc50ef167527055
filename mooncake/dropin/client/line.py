"""What a dummy client and its real client say to each other, and the unix socket that carries it.

Frames: [u32 length][message]; a descriptor of shared memory travels with the length of its Share. Both ends
ask the kernel who the other is: only processes of the same user talk to each other.
"""

import contextlib
import os
import socket
import struct
import time
from typing import Any

import msgspec

from mooncake.core import wire
from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout, ProtocolError
from mooncake.core.messages import Failure, Ok, StoreRecord
from mooncake.core.rpc import raise_failure
from mooncake.dropin.store.settings import MasterSettings
from transfer.fdpass import peer_uid

RECV_BYTES = 64 << 10
WAIT_S_MIN = 1e-3
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First on every connection: of which dummy it is. Answered by Ok, or by a Welcome if it follows."""

    session: str  # random, the same on all connections of one dummy; who knows it, is that dummy
    follow: bool  # this connection only listens (Neighbours), and its end is the end of the session


class Share(msgspec.Struct, frozen=True, array_like=True, tag="share"):
    """Memory of the dummy, whose descriptor travels along, that transfers may name from now on."""

    address: int  # in the dummy
    size_bytes: int


class Withdraw(msgspec.Struct, frozen=True, array_like=True, tag="withdraw"):
    """End of a Share. Once it is answered, nothing touches that memory any more."""

    address: int


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """TransferEngine.ask."""

    name: str
    service: str
    body: bytes
    deadline_s: float


class Move(msgspec.Struct, frozen=True, array_like=True, tag="move"):
    """TransferEngine.transfer; `local` are addresses in the dummy's shared memory."""

    op: int
    name: str
    local: list[int]
    remote: list[int]
    sizes: list[int]
    deadline_s: float


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """What a dummy has to know of its real client."""

    tenant: str
    master: MasterSettings
    guarded: bool  # directories are reached with the cluster's secret


class Told(msgspec.Struct, frozen=True, array_like=True, tag="told"):
    """Answer to Ask."""

    body: bytes


class Neighbours(msgspec.Struct, frozen=True, array_like=True, tag="neighbours"):
    """Who is in the pool; sent to connections that follow, first at once and then at every change."""

    stores: list[StoreRecord]
    directories: dict[str, str]


Request = Hello | Share | Withdraw | Ask | Move
Answer = Welcome | Told | Ok | Failure | Neighbours


class Line:
    """One connection. Used by one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        """Own the socket from now on."""
        self._socket = connected
        self._data = bytearray()
        self._fds: list[int] = []

    @classmethod
    def open(cls, path: str, end_s: float) -> "Line":
        """Connect to the real client's socket.

        Raises:
            PeerGone, PeerTimeout: nobody serves it; ProtocolError: another user does.
        """
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            one.settimeout(max(end_s - time.monotonic(), WAIT_S_MIN))
            one.connect(path)
            if (uid := peer_uid(one)) != os.getuid():
                raise ProtocolError(f"{path} is served by user {uid}, not by us")
        except TimeoutError:
            one.close()
            raise PeerTimeout(f"{path}: not let in") from None
        except OSError as error:
            one.close()
            raise PeerGone(f"{path}: {error}") from error
        except MooncakeError:
            one.close()
            raise
        return cls(one)

    def send(self, message: Any, end_s: float, fd: int | None = None) -> None:
        """Send one message; raises PeerTimeout, PeerGone."""
        body = wire.encode(message)
        length = _LENGTH.pack(len(body))
        try:
            self._socket.settimeout(max(end_s - time.monotonic(), WAIT_S_MIN))
            if fd is not None:
                socket.send_fds(self._socket, [length], [fd])
                self._socket.sendall(body)
            else:
                self._socket.sendall(length + body)
        except TimeoutError:
            raise PeerTimeout("the other end takes no message") from None
        except OSError as error:
            raise PeerGone(f"the other end is gone: {error}") from error

    def receive(self, kind: Any, end_s: float | None = None) -> tuple[Any, int | None]:
        """Return the next message and the descriptor that came with it, which is the caller's to close.

        Args:
            kind: a union of message types.
            end_s: None = wait as long as the other end lives.

        Raises:
            PeerTimeout, PeerGone; ProtocolError: it is none of `kind`.
        """
        self._fill(_LENGTH.size, end_s)
        (length,) = _LENGTH.unpack_from(self._data)
        if length > wire.MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a message of {length} bytes")
        self._fill(_LENGTH.size + length, end_s)
        body = bytes(self._data[_LENGTH.size : _LENGTH.size + length])
        del self._data[: _LENGTH.size + length]
        if len(self._fds) > 1:
            raise ProtocolError(f"{len(self._fds)} descriptors with one message")
        return wire.decode(body, kind), self._fds.pop() if self._fds else None

    def _fill(self, size_bytes: int, end_s: float | None) -> None:
        while len(self._data) < size_bytes:
            wait_s = None if end_s is None else max(end_s - time.monotonic(), WAIT_S_MIN)
            try:
                self._socket.settimeout(wait_s)
                data, fds, _, _ = socket.recv_fds(self._socket, RECV_BYTES, 1)
            except TimeoutError:
                raise PeerTimeout("no answer in time") from None
            except OSError as error:
                raise PeerGone(f"the other end is gone: {error}") from error
            self._fds += fds
            if not data:
                raise PeerGone("the other end has closed")
            self._data += data

    def call(self, request: Any, kind: type[Any], end_s: float, fd: int | None = None) -> Any:
        """Send a request and return its answer, a `kind`; raises what the other end raised, and as above."""
        self.send(request, end_s, fd)
        answer, _ = self.receive(Answer, end_s)
        raise_failure(answer, "mooncake_client")
        if not isinstance(answer, kind):
            raise ProtocolError(f"{type(answer).__name__} instead of {kind.__name__}")
        return answer

    def close(self) -> None:
        """Hang up (idempotent); wakes a thread that waits in `receive`."""
        with contextlib.suppress(OSError):  # it is not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())
