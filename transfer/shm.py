"""Shared memory transport: a peer's memfd is mapped once, then every transfer is a copy by the initiator."""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import structlog

from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, ProtocolError, RequestError
from transfer.control import Dialer
from transfer.messages import BufferInfo
from transfer.model import Buffer, Call, Failure, Opcode, Slice
from transfer.registry import Registry
from transfer.segment import Segment
from transfer.shm_link import Mapping, MemoryLink, MemoryServer
from transfer.slicing import cut

log = structlog.get_logger(__name__)

PIECE_BYTES = 16 << 20
"""Copied between two looks at the deadline, about 2 ms."""
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
            return [failure for piece in slices for failure in self._copy_own(op, piece)]
        try:
            link = self._link(peer)
        except MooncakeError as error:
            return [Failure(piece, error) for piece in slices]
        slices = short(slices)
        failures: list[Failure] = []
        at = 0
        while at < len(slices):  # one use of the mapping for a run of slices of one buffer
            theirs = slices[at].theirs
            end = at + 1
            while end < len(slices) and slices[end].theirs is theirs:
                end += 1
            try:
                mapping = link.mapping(theirs)
                _take(link, mapping, peer.name)
            except MooncakeError as error:
                failures += [Failure(piece, error) for piece in slices[at:end]]
                at = end
                continue
            try:
                while at < end:
                    check(call, mapping.revoked)
                    at = copy(op, slices, at, end, mapping.address - mapping.start)
            except MooncakeError as error:
                failures += [Failure(piece, error) for piece in slices[at:end]]
                at = end
            finally:
                link.give(mapping)
        return failures

    def attach(self, peer: Any, theirs: BufferInfo) -> tuple[MemoryLink, Mapping]:
        """Return what `copy_one` needs; raises as MemoryLink.mapping, and if there is no link."""
        link = self._link(peer)
        return link, link.mapping(theirs)

    def view(self, peer: Any, theirs: BufferInfo, address: int, size_bytes: int) -> memoryview:
        """Return the peer's bytes read-only, without a copy, as long as the owner lets them be.

        Raises:
            PeerGone, RequestError: not reachable here; see MemoryLink.use.
        """
        link, mapping = self.attach(peer, theirs)
        _take(link, mapping, peer.name)
        try:
            start = address - mapping.start
            return mapping.view[start : start + size_bytes].toreadonly()
        finally:
            link.give(mapping)

    def _copy_own(self, op: Opcode, piece: Slice) -> list[Failure]:
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
        copy(op, [piece], 0, 1, 0)
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


def copy_one(
    op: Opcode, link: MemoryLink, mapping: Mapping, local: int, remote: int, size_bytes: int
) -> bool:
    """Copy one range of at most PIECE_BYTES; False: the memory is not to be had any more."""
    if not link.take(mapping):
        return False
    theirs = remote - mapping.start + mapping.address
    move = memmove if size_bytes > SMALL_BYTES else memmove_locked
    try:
        if op is Opcode.READ:
            move(local, theirs, size_bytes)
        else:
            move(theirs, local, size_bytes)
    finally:
        link.give(mapping)
    return True


def _take(link: MemoryLink, mapping: Mapping, what: str) -> None:
    if not link.take(mapping):
        raise PeerGone(f"{what} has taken the memory back, or is gone")


def check(call: Call, revoked: threading.Event) -> None:
    """Raise if the copying has to stop.

    Raises:
        PeerTimeout: the deadline has passed; PeerGone: cancelled, or `revoked` is set.
    """
    call.check("copy")
    if revoked.is_set():
        raise PeerGone("the owner is taking the memory back")


def short(slices: Sequence[Slice]) -> Sequence[Slice]:
    """Return `slices` with those of over PIECE_BYTES cut."""
    if all(piece.size_bytes <= PIECE_BYTES for piece in slices):
        return slices
    return [piece.part(at, size) for piece in slices for at, size in cut(piece.size_bytes, PIECE_BYTES)]


def copy(op: Opcode, slices: Sequence[Slice], at: int, end: int, shift: int) -> int:
    """Copy `slices[at:end]`, or at least one and then about PIECE_BYTES of them.

    Args:
        op: direction.
        slices: those between at and end lie in one remote buffer.
        at: first.
        end: behind the last.
        shift: remote addresses are mapped here so many bytes further on.

    Returns:
        The first that is left.
    """
    read = op is Opcode.READ
    room = PIECE_BYTES
    while at < end and room > 0:
        piece = slices[at]
        size, theirs = piece.size_bytes, piece.remote + shift
        move = memmove if size > SMALL_BYTES else memmove_locked
        if read:
            move(piece.local, theirs, size)
        else:
            move(theirs, piece.local, size)
        room -= size
        at += 1
    return at
