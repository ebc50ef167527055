"""Shared memory transport: a peer's memfd is mapped once, then every transfer is a copy by the initiator."""

import ctypes
import threading
import time
from collections.abc import Sequence
from typing import Any

import structlog

from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, ProtocolError, RequestError
from transfer.control import Dialer
from transfer.messages import BufferInfo
from transfer.model import Buffer, Call, Failure, Opcode, Slice
from transfer.registry import Registry
from transfer.segment import Segment
from transfer.shm_link import MemoryLink, MemoryServer

log = structlog.get_logger(__name__)

PIECE_BYTES = 16 << 20
"""Copied between two looks at the deadline: about a millisecond."""
SMALL_BYTES = 32 << 10
"""Below, a copy that keeps the interpreter lock is cheaper than giving it up and getting it back."""
DIAL_S = 2.0

memmove = ctypes.memmove
memmove_locked = ctypes.PyDLL(None).memmove
memmove_locked.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
memmove_locked.restype = ctypes.c_void_p
"""The same function, called with the interpreter lock held."""


class ShmTransport:
    """model.Transport between processes of one user on one host."""

    name = "shm"
    judges_itself = False

    def __init__(
        self, epoch: str, host: str, registry: Registry, dialer: Dialer, server: MemoryServer
    ) -> None:
        """`epoch` and `host` are ours, as in our SegmentInfo."""
        self._epoch = epoch
        self._host = host
        self._registry = registry
        self._dialer = dialer
        self._server = server
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], MemoryLink | None] = {}

    def register(self, buffer: Buffer) -> None:
        """Share `buffer` if it lies in a Segment (its owner object)."""
        if isinstance(buffer.owner, Segment) and buffer.view is not None:
            base = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer.owner.view(0, 1)))
            buffer.handles[self.name] = (buffer.owner, buffer.address - base)

    def unregister(self, buffer: Buffer, deadline_s: float) -> None:
        """See model.Transport: every peer that mapped it has let go."""
        if self.name in buffer.handles:
            self._server.take_back(buffer.buffer_id, deadline_s)
            del buffer.handles[self.name]

    def describe(self, info: dict[str, Any]) -> None:
        """Nothing to add: BufferInfo.shm says which buffers."""

    def reaches(self, peer: Any, mine: Buffer, theirs: BufferInfo) -> bool:
        """Same host, the buffer is shared, and the peer lets us in."""
        if mine.view is None:
            return False
        if peer.info.epoch == self._epoch:
            return True
        if theirs.shm is None or not theirs.key or peer.info.host != self._host:
            return False
        return self._links.get((peer.name, peer.info.epoch), self) is not None

    def lanes(self, _peer: Any) -> int:
        """One: two threads copy no faster than one (benchmarks/LOG.md)."""
        return 1

    def run(self, peer: Any, op: Opcode, slices: Sequence[Slice], call: Call) -> list[Failure]:
        """See model.Transport."""
        if peer.info.epoch == self._epoch:
            return [failure for piece in slices for failure in self._copy_own(op, piece, call)]
        try:
            link = self._link(peer)
        except MooncakeError as error:
            return [Failure(piece, error) for piece in slices]
        failures: list[Failure] = []
        at = 0
        while at < len(slices):  # one use of the mapping for a run of slices of one buffer
            theirs = slices[at].theirs
            end = at + 1
            while end < len(slices) and slices[end].theirs is theirs:
                end += 1
            try:
                mapping = link.take(theirs)
            except MooncakeError as error:
                failures += [Failure(piece, error) for piece in slices[at:end]]
                at = end
                continue
            try:
                for piece in slices[at:end]:
                    copy(op, piece, mapping.address - mapping.start, call, mapping.revoked)
                    at += 1
            except MooncakeError as error:
                failures += [Failure(piece, error) for piece in slices[at:end]]
                at = end
            finally:
                link.give(mapping)
        return failures

    def view(self, peer: Any, theirs: BufferInfo, address: int, size_bytes: int) -> memoryview:
        """Return the peer's bytes read-only, without a copy, as long as the owner lets them be.

        Raises:
            PeerGone, RequestError: not reachable here; see MemoryLink.use.
        """
        link = self._link(peer)
        mapping = link.take(theirs)
        try:
            start = address - mapping.start
            return mapping.view[start : start + size_bytes].toreadonly()
        finally:
            link.give(mapping)

    def _copy_own(self, op: Opcode, piece: Slice, call: Call) -> list[Failure]:
        """Both ends are ours: the key is checked here, as an owner would."""
        theirs = self._registry.by_key(piece.theirs.key)
        if (
            theirs is None
            or theirs.view is None
            or not (theirs.address <= piece.remote and piece.remote + piece.size_bytes <= theirs.end)
        ):
            return [
                Failure(piece, RequestError(f"no buffer of ours at {piece.remote:#x}+{piece.size_bytes}"))
            ]
        try:
            copy(op, piece, 0, call, None)
        except MooncakeError as error:
            return [Failure(piece, error)]
        return []

    def _link(self, peer: Any) -> MemoryLink:
        key = (peer.name, peer.info.epoch)
        with self._lock:
            link = self._links.get(key)
            if link is not None and not link.gone:
                return link
            if key in self._links and link is None:
                raise PeerGone(f"{peer.name}: no shared memory with it")
            try:
                sock = self._dialer.dial(peer.info.unix_path, "memory", DIAL_S, 0, peer.info.epoch)
            except (ConfigError, ProtocolError, PeerGone) as error:
                # another user, another container: that does not change while both live
                log.info("transfer.no_shared_memory", peer=peer.name, reason=str(error))
                self._links[key] = None
                raise PeerGone(f"{peer.name}: no shared memory with it: {error}") from error
            link = self._links[key] = MemoryLink(sock, peer.name)
            return link

    def forget(self, peer: Any) -> None:
        """See model.Transport."""
        with self._lock:
            gone = [self._links.pop(key) for key in list(self._links) if key[0] == peer.name]
        for link in gone:
            if link:
                link.close()

    def close(self) -> None:
        """See model.Transport."""
        with self._lock:
            links, self._links = list(self._links.values()), {}
        for link in links:
            if link:
                link.close()


def copy(op: Opcode, piece: Slice, shift: int, call: Call, revoked: threading.Event | None) -> None:
    """Copy `piece`, whose remote address is mapped here `shift` bytes further on.

    Raises:
        PeerTimeout: the deadline passed before a PIECE of it; PeerGone: cancelled, or `revoked` is set.
    """
    size = piece.size_bytes
    theirs, mine = piece.remote + shift, piece.local
    target, source = (mine, theirs) if op is Opcode.READ else (theirs, mine)
    for start in range(0, size, PIECE_BYTES):
        if call.cancelled or time.monotonic() >= call.end_s:
            call.check("copy")
        if revoked is not None and revoked.is_set():
            raise PeerGone("the owner is taking the memory back")
        length = min(PIECE_BYTES, size - start)
        (memmove if length > SMALL_BYTES else memmove_locked)(target + start, source + start, length)
