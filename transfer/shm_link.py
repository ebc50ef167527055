"""Memory connections: a peer's buffers mapped here, ours mapped there, and how each is taken back.

The owner takes no part in a copy, so it cannot stop one either. Taking memory back is a question with an
answer: Revoke goes to everybody who mapped the buffer, and Revoked comes once no copy is under way; a
peer that ended has none. Memory made by `allocate` is never reused anyway: the next one is another memfd.
"""

import ctypes
import os
import socket
import struct
import threading
import time
from typing import Any

import structlog

from mooncake.core import wire
from mooncake.core.errors import (
    CapacityError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)
from mooncake.core.messages import Failure as Refusal
from mooncake.core.rpc import failure_of, raise_failure
from transfer.control import Listener, Session
from transfer.messages import AttachMemory, BufferInfo, MemoryGrant, Revoke, Revoked
from transfer.registry import Registry
from transfer.segment import Segment
from transfer.stream import hang_up, recv_into

log = structlog.get_logger(__name__)

ATTACH_S = 10.0
"""For the descriptor; mapping and touching take 0.1 s per GiB of it."""
MESSAGE_BYTES_MAX = 4096
MAPPINGS_MAX = 1024
"""Of one peer: a store has one segment, an engine some hundreds of layers."""

_LENGTH = struct.Struct("<I")


class Mapping:
    """A peer's buffer in our address space."""

    def __init__(self, segment: Segment, offset: int, info: BufferInfo) -> None:
        """Attached; `offset` is the buffer's first byte in the memfd."""
        self.segment = segment
        self.view = segment.view(offset, info.size_bytes)
        self.start = info.address
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self.view))
        self.copies = 0
        self.revoked = threading.Event()


class MemoryLink:
    """Our side of a peer's memory connection: asks for descriptors, obeys Revoke."""

    def __init__(self, sock: socket.socket, what: str) -> None:
        """Greeted unix socket; `what` names the peer."""
        self._sock = sock
        self._what = what
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._asking = threading.Lock()
        self._wanted: BufferInfo | None = None
        self._mappings: dict[int, Mapping] = {}
        self._refused: dict[int, MooncakeError] = {}
        self.gone = False
        wait_for_ever(sock)
        threading.Thread(target=self._listen, name="transfer-memory", daemon=True).start()

    def mapping(self, info: BufferInfo) -> Mapping:
        """Return the mapping of `info`, made at the first call.

        Raises:
            PeerGone: the owner is gone or has taken the buffer back; RequestError: it refuses;
            PeerTimeout: no descriptor in time; CapacityError: too many mappings.
        """
        return self._mappings.get(info.buffer_id) or self._attach(info)

    def take(self, mapping: Mapping) -> bool:
        """Begin a use, which `give` ends; False: the owner has taken the memory back, or is gone."""
        with self._lock:
            if mapping.revoked.is_set() or self.gone:
                return False
            mapping.copies += 1
        return True

    def give(self, mapping: Mapping) -> None:
        """End a use."""
        with self._lock:
            mapping.copies -= 1
            if mapping.revoked.is_set():
                self._changed.notify_all()

    def _attach(self, info: BufferInfo) -> Mapping:
        end_s = time.monotonic() + ATTACH_S
        with self._asking, self._changed:
            if info.buffer_id not in self._mappings and info.buffer_id not in self._refused:
                if len(self._mappings) >= MAPPINGS_MAX:
                    raise CapacityError(f"{self._what}: {MAPPINGS_MAX} of its buffers are mapped already")
                self._wanted = info
                send_frame(self._sock, AttachMemory(info.buffer_id, info.key), self._what)
            while True:
                if mapping := self._mappings.get(info.buffer_id):
                    return mapping
                if error := self._refused.get(info.buffer_id):
                    raise error
                if self.gone:
                    raise PeerGone(f"{self._what}: its memory connection ended")
                if not self._changed.wait(max(0.0, end_s - time.monotonic())):
                    raise PeerTimeout(f"{self._what}: no descriptor within {ATTACH_S:g} s")

    def _listen(self) -> None:
        try:
            while True:
                message, fds = recv_frame(self._sock, MemoryGrant | Revoke | Refusal)
                if isinstance(message, Revoke):
                    self._give_up(message.buffer_id)
                else:
                    self._granted(message, fds)
        except MooncakeError as error:
            log.debug("transfer.memory_link_ended", peer=self._what, reason=str(error))
        with self._changed:
            self.gone = True
            self._changed.notify_all()

    def _granted(self, answer: Any, fds: list[int]) -> None:
        """Map here, in the listener, so that a Revoke that follows finds the mapping."""
        info, self._wanted = self._wanted, None
        try:
            if info is None:
                raise ProtocolError(f"{self._what} sent memory that nobody asked for")
            grant = raise_failure(answer, self._what)
            if len(fds) != 1 or grant.buffer_id != info.buffer_id:
                raise ProtocolError(f"{self._what}: not a memory grant")
            segment = Segment.attach(fds.pop(), self._what)
            mapping = Mapping(segment, grant.offset, info)
        except MooncakeError as error:
            with self._changed:
                if info:
                    self._refused[info.buffer_id] = error
                self._changed.notify_all()
            return
        finally:
            for fd in fds:
                os.close(fd)
        with self._changed:
            self._mappings[info.buffer_id] = mapping
            self._changed.notify_all()

    def _give_up(self, buffer_id: int) -> None:
        """Let the copies that are under way end (each looks at the clock every PIECE), then say so."""
        with self._changed:
            self._refused[buffer_id] = PeerGone(f"{self._what} has taken the memory back")
            mapping = self._mappings.pop(buffer_id, None)
            if mapping:
                mapping.revoked.set()
                self._changed.wait_for(lambda: not mapping.copies)
        send_frame(self._sock, Revoked(buffer_id), self._what)

    def close(self) -> None:
        """End the connection; views that are out stay valid."""
        with self._changed:
            self.gone = True
            self._changed.notify_all()
        hang_up(self._sock)
        self._sock.close()


class MemoryServer:
    """The owner's side: hands out memfds, remembers to whom, takes them back."""

    def __init__(self, registry: Registry) -> None:
        """`registry` decides what a key opens; handles["shm"] of a buffer is (segment, offset)."""
        self._registry = registry
        self._changed = threading.Condition()
        self._holders: dict[int, set[Session]] = {}

    def serve(self, listener: Listener, session: Session) -> None:
        """Serve one connection to its end.

        Raises:
            PeerGone: the end; ProtocolError: nonsense.
        """
        if session.sock.family != socket.AF_UNIX:
            raise ProtocolError("descriptors travel over unix sockets only")
        session.on_close(lambda: self._forget(session))
        listener.welcome(session)
        wait_for_ever(session.sock)
        while True:
            message, fds = recv_frame(session.sock, AttachMemory | Revoked)
            for fd in fds:
                os.close(fd)
            if isinstance(message, Revoked):
                self._let_go(session, message.buffer_id)
                continue
            try:
                self._grant(session, message)
            except RequestError as error:
                send_frame(session.sock, failure_of(error), session.name)

    def _grant(self, session: Session, message: AttachMemory) -> None:
        buffer = self._registry.by_key(message.key)
        if buffer is None or buffer.buffer_id != message.buffer_id or "shm" not in buffer.handles:
            raise RequestError("that key opens no shared memory")
        segment, offset = buffer.handles["shm"]
        with self._changed:
            self._holders.setdefault(buffer.buffer_id, set()).add(session)
        grant = MemoryGrant(buffer.buffer_id, segment.size_bytes, offset)
        send_frame(session.sock, grant, session.name, [segment.fd])

    def take_back(self, buffer_id: int, deadline_s: float) -> None:
        """Have every peer stop touching the buffer, which must be hidden in the registry already.

        Raises:
            PeerTimeout: one has neither confirmed nor ended after `deadline_s`; ask again.
        """
        with self._changed:
            holders = list(self._holders.get(buffer_id, ()))
        for session in holders:
            try:
                send_frame(session.sock, Revoke(buffer_id), session.name)
            except PeerGone:
                self._let_go(session, buffer_id)
        end_s = time.monotonic() + deadline_s
        with self._changed:
            while left := self._holders.get(buffer_id):
                if not self._changed.wait(max(0.0, end_s - time.monotonic())):
                    names = ", ".join(session.name for session in left)
                    raise PeerTimeout(
                        f"{names}: may still write into buffer {buffer_id} (has not let go of it)"
                    )

    def _let_go(self, session: Session, buffer_id: int) -> None:
        with self._changed:
            holders = self._holders.get(buffer_id, set())
            holders.discard(session)
            if not holders:
                self._holders.pop(buffer_id, None)
            self._changed.notify_all()

    def _forget(self, session: Session) -> None:
        with self._changed:
            held = [buffer_id for buffer_id, holders in self._holders.items() if session in holders]
        for buffer_id in held:
            self._let_go(session, buffer_id)


def wait_for_ever(sock: socket.socket) -> None:
    """Take the tick off: this connection is silent for hours and ends with its peer or its owner."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))


def send_frame(sock: socket.socket, message: Any, what: str, fds: list[int] | None = None) -> None:
    """Send one small message, with descriptors.

    Raises:
        PeerGone: the connection ended, or the peer does not read.
    """
    data = wire.encode(message)
    try:
        if socket.send_fds(sock, [_LENGTH.pack(len(data)) + data], fds or []) != _LENGTH.size + len(data):
            raise PeerGone(f"{what} does not read its memory connection")
    except OSError as error:
        raise PeerGone(f"{what}: {error}") from error


def recv_frame(sock: socket.socket, kind: Any) -> tuple[Any, list[int]]:
    """Receive one message and the descriptors that came with it, which are the caller's to close.

    Raises:
        PeerGone: the connection ended; ProtocolError: not such a message.
    """
    try:
        head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 1)
    except OSError as error:
        raise PeerGone(f"memory connection lost: {error}") from error
    try:
        if len(head) != _LENGTH.size:
            raise PeerGone("memory connection closed by the peer")
        (size,) = _LENGTH.unpack(head)
        if size > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a message of {size} bytes exceeds {MESSAGE_BYTES_MAX}")
        data = bytearray(size)
        recv_into(sock, memoryview(data), lambda: None)
        return wire.decode(bytes(data), kind), fds
    except MooncakeError:
        for fd in fds:
            os.close(fd)
        raise
