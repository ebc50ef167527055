"""`SharedSegment` of `mooncake.engine`: memory that the ranks of one host share, mapped once in each.

Every rank calls `create` and gives its blob to all others (an all-gather); `complete` then maps the owner's
memory. The address of a rank is known from `create` on. The memory is a sealed memfd, opened through
/proc/PID/fd: ranks must see each other's processes and belong to one user.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence

import msgspec

from mooncake.core.errors import ConfigError, RequestError
from transfer.segment import PAGE_BYTES, Segment

RANKS_MAX = 4096
SIZE_BYTES_MAX = 1 << 44

_MAP_FIXED = 0x10  # Linux; Python's mmap module does not name these
_MAP_NORESERVE = 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_mmap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank tells the others."""

    name: str
    size_bytes: int
    world_size: int
    rank: int
    owner: int
    pid: int
    fd: int  # of the memfd in the owner's process, -1 elsewhere


class SharedSegment:
    """One rank's mapping. Made by `create`."""

    def __init__(self, blob: Blob, place: mmap.mmap, segment: Segment | None) -> None:
        """`place` is where the memory is, or will be once `complete` was called."""
        self._blob = blob
        self._place = place
        self._segment = segment
        self._base = ctypes.addressof(ctypes.c_ubyte.from_buffer(place))
        self._ready = False

    @staticmethod
    def supported(mmap: bool = True, host_register: bool = False) -> bool:
        """Return whether `create` takes these flags: memory of the host only."""
        return mmap and not host_register

    @staticmethod
    def create(
        name: str,
        size: int,
        world_size: int,
        rank_id: int,
        owner_rank: int = 0,
        device_id: int = 0,  # noqa: ARG004 - upstream's signature; the memory is the host's
        mmap: bool = True,
        host_register: bool = False,
    ) -> tuple["SharedSegment", bytes]:
        """Return this rank's segment and the blob for all other ranks.

        Args:
            name: for /proc; the same in every rank.
            size: bytes.
            world_size: number of ranks.
            rank_id: which one this is.
            owner_rank: which one allocates.
            device_id: ignored.
            mmap: must be True.
            host_register: must be False.

        Raises:
            RequestError: flags or numbers that make no sense here; ConfigError: not enough memory.
        """
        if not SharedSegment.supported(mmap, host_register):
            raise RequestError("SharedSegment: only mmap=True, host_register=False without vendor hardware")
        if not 0 < size <= SIZE_BYTES_MAX or not 0 < world_size <= RANKS_MAX:
            raise RequestError(f"SharedSegment of {size} bytes for {world_size} ranks")
        if not (0 <= rank_id < world_size and 0 <= owner_rank < world_size):
            raise RequestError(f"SharedSegment: rank {rank_id}, owner {owner_rank} of {world_size}")
        whole = size + -size % PAGE_BYTES
        owned = Segment.create(name, whole) if rank_id == owner_rank else None
        place = _reserve(whole)
        blob = Blob(name, size, world_size, rank_id, owner_rank, os.getpid(), owned.fd if owned else -1)
        made = SharedSegment(blob, place, owned)
        if owned:
            made._map(owned.fd)
        return made, msgspec.json.encode(blob)

    def complete(self, blobs: Sequence[str | bytes]) -> None:
        """Map the owner's memory, given the blobs of all ranks.

        Raises:
            RequestError: the ranks do not agree, or this one cannot see the owner's memory.
            ProtocolError: what is there is no segment.
        """
        if self._ready:
            return
        mine = self._blob
        try:
            told = {blob.rank: blob for blob in (msgspec.json.decode(each, type=Blob) for each in blobs)}
        except msgspec.DecodeError as error:
            raise RequestError(f"SharedSegment {mine.name}: not a blob: {error}") from error
        if sorted(told) != list(range(mine.world_size)) or len(blobs) != mine.world_size:
            raise RequestError(f"SharedSegment {mine.name}: blobs of ranks {sorted(told)}, not of all")
        for blob in told.values():
            if msgspec.structs.replace(blob, rank=mine.rank, pid=mine.pid, fd=mine.fd) != mine:
                raise RequestError(f"SharedSegment {mine.name}: rank {blob.rank} disagrees: {blob}")
        if self._segment is None:
            self._attach(told[mine.owner])
        self._ready = True

    def _attach(self, owner: Blob) -> None:
        path = f"/proc/{owner.pid}/fd/{owner.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RequestError(f"SharedSegment {owner.name}: {path} of its owner: {error}") from error
        segment = Segment.attach(fd, owner.name)  # refuses what is not sealed
        if segment.size_bytes != len(self._place):
            raise RequestError(f"SharedSegment {owner.name}: {segment.size_bytes} bytes at its owner")
        self._segment = segment
        self._map(segment.fd)

    def _map(self, fd: int) -> None:
        """Put the memory over the reserved addresses, which `place` gives back at its end."""
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        at = _mmap(self._base, len(self._place), rights, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
        if at in (None, _FAILED):
            raise ConfigError(f"SharedSegment {self._blob.name}: mmap: {os.strerror(ctypes.get_errno())}")

    def ready(self) -> bool:
        """Return whether `complete` was called."""
        return self._ready

    def base_addr(self) -> int:
        """Return the address of the first byte in this process."""
        return self._base

    def device_addr(self) -> int:
        """Return 0: no device sees this memory under an address of its own."""
        return 0

    def size(self) -> int:
        """Return the bytes."""
        return self._blob.size_bytes


def _reserve(size_bytes: int) -> mmap.mmap:
    """Return address space without memory."""
    try:
        return mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise ConfigError(f"SharedSegment of {size_bytes} bytes: {error}") from error
