"""A node's shared memory: a sealed memfd, mapped once, touched before it serves (DESIGN 7, shm).

The seals forbid resizing, so a peer that maps the segment can never be killed by SIGBUS because
somebody truncated it. Pages are touched up front: a page fault in the middle of a copy costs two
to four times the copy itself (reference/transport.md section 3).
"""

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mooncake.core.errors import CapacityError, ConfigError, ProtocolError, RequestError

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
"""The size that every x86-64 and most Arm kernels have; 1 GiB ones must be set aside at boot."""
TOUCH_CHUNK_BYTES = 64 << 20
"""Touched per madvise call: about 15 ms, so progress moves and other threads get the interpreter."""
NAME_CHARS_MAX = 200
"""memfd names are limited to 249 bytes by the kernel."""

_MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap module does not name them yet
_MADV_POPULATE_WRITE = 23
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Progress = Callable[[int, int], None]
"""Called with (touched_bytes, size_bytes) while a segment is being touched."""


class Pages(enum.StrEnum):
    """What kind of pages a segment is made of. All users see the same memory through any of them."""

    HUGETLB = "hugetlb"  # 2 MiB each, set aside by the operator (vm.nr_hugepages)
    TRANSPARENT = "transparent"  # the kernel may use 2 MiB where it finds them; never an error
    PLAIN = "plain"  # as the kernel likes


class Segment:
    """One mapped memfd. Build it with `create` (owner) or `attach` (everybody else)."""

    def __init__(self, name: str, fd: int, size_bytes: int, mapping: mmap.mmap) -> None:
        """Use `create` or `attach`."""
        self.name = name
        self.size_bytes = size_bytes
        self.note = b""  # what the owner says about it, when it was fetched from an FdServer
        self._fd: int | None = fd
        self._map: mmap.mmap | None = mapping

    @classmethod
    def create(
        cls,
        name: str,
        size_bytes: int,
        progress: Progress | None = None,
        *,
        pages: Pages = Pages.TRANSPARENT,
    ) -> "Segment":
        """Make, seal, map and touch a new segment of `size_bytes` (a multiple of 4096, or of 2 MiB).

        Blocks for about 0.2 s per GiB: call it from a thread when an event loop runs.

        Args:
            name: shown in /proc; at most NAME_CHARS_MAX characters.
            size_bytes: fixed for the life of the segment.
            progress: called after every touched chunk.
            pages: see Pages; transfer.hugepages chooses for a store.

        Raises:
            ConfigError: bad name or size, or the machine has not that much memory (of these pages).
        """
        if not 0 < len(name) <= NAME_CHARS_MAX or "\0" in name:
            raise ConfigError(f"segment name {name!r}: 1 to {NAME_CHARS_MAX} characters, no NUL")
        page_bytes = HUGE_PAGE_BYTES if pages is Pages.HUGETLB else PAGE_BYTES
        if size_bytes <= 0 or size_bytes % page_bytes:
            raise ConfigError(f"segment size {size_bytes}: must be a positive multiple of {page_bytes}")
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if pages is Pages.HUGETLB:
            flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
        fd = _memfd(name, flags)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)  # huge pages are promised here, or refused
            _touch(mapping, size_bytes, progress, fresh=True, advise=pages is Pages.TRANSPARENT)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"segment of {size_bytes} bytes: {error}; choose a smaller capacity") from error
        except BaseException:
            os.close(fd)
            raise
        return cls(name, fd, size_bytes, mapping)

    @classmethod
    def attach(
        cls, fd: int, name: str = "attached", *, touch: bool = True, progress: Progress | None = None
    ) -> "Segment":
        """Map the segment behind `fd`; takes ownership of `fd` in every case. Contents stay as they are.

        Args:
            fd: a memfd made by `create`, usually received by SCM_RIGHTS.
            name: for messages.
            touch: fill this process's page tables now instead of at the first access.
            progress: called after every touched chunk.

        Raises:
            ProtocolError: `fd` is not a segment: not sealed against shrinking, or an odd size.
            CapacityError: this process cannot map that much.
        """
        try:
            size_bytes = _check_sealed(fd)
            try:
                mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
            except OSError as error:
                raise CapacityError(f"cannot map {size_bytes} bytes of {name}: {error}") from error
            if touch:
                _touch(mapping, size_bytes, progress, fresh=False)
        except BaseException:
            os.close(fd)
            raise
        return cls(name, fd, size_bytes, mapping)

    @property
    def fd(self) -> int:
        """The memfd, for handing it to a peer; owned by the segment.

        Raises:
            RequestError: the segment is closed.
        """
        if self._fd is None:
            raise RequestError(f"segment {self.name} is closed")
        return self._fd

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """Return `size_bytes` bytes at `offset`, writable, without a copy.

        Raises:
            RequestError: the range leaves the segment, or the segment is closed.
        """
        self._check(offset, size_bytes)
        assert self._map is not None
        return memoryview(self._map)[offset : offset + size_bytes]

    def array(self, offset: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the same range as `view` as a 1-D uint8 array; raises as `view`."""
        self._check(offset, size_bytes)
        assert self._map is not None
        return np.frombuffer(self._map, dtype=np.uint8, count=size_bytes, offset=offset)

    def touch(self, progress: Progress | None = None) -> None:
        """Fill this process's page tables now (about 0.1 s per GiB); contents stay as they are.

        Raises:
            RequestError: the segment is closed.
        """
        self._check(0, self.size_bytes)
        assert self._map is not None
        _touch(self._map, self.size_bytes, progress, fresh=False)

    def close(self) -> None:
        """Give up the fd and our hold on the mapping (idempotent).

        Views that are still in use stay valid: the memory is unmapped with the last of them.
        """
        if self._fd is not None:
            os.close(self._fd)
        # dropping the reference is the unmapping: mmap.close() would refuse while views exist,
        # and a view over unmapped memory would be a crash instead of an error
        self._fd = self._map = None

    def __del__(self) -> None:
        """Memory lives as long as a descriptor of it is open: who drops a segment keeps none."""
        self.close()

    def _check(self, offset: int, size_bytes: int) -> None:
        if self._map is None:
            raise RequestError(f"segment {self.name} is closed")
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise RequestError(
                f"range {offset}+{size_bytes} leaves segment {self.name} of {self.size_bytes} bytes"
            )


def _check_sealed(fd: int) -> int:
    """Return the size of a proper segment's memfd."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise ProtocolError("the descriptor is not a memfd")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"the descriptor is not a memfd: {error}") from error
    if seals & _SEALS != _SEALS:
        raise ProtocolError("the memfd is not sealed: its owner could truncate it under our feet")
    if info.st_size <= 0 or info.st_size % PAGE_BYTES:
        raise ProtocolError(f"a segment of {info.st_size} bytes is not a multiple of {PAGE_BYTES}")
    return info.st_size


def _memfd(name: str, flags: int) -> int:
    try:
        return os.memfd_create(name, flags)
    except OSError as error:
        raise ConfigError(f"memfd of segment {name}: {error}") from error


def _touch(
    mapping: mmap.mmap, size_bytes: int, progress: Progress | None, *, fresh: bool, advise: bool = True
) -> None:
    """Fault in every page. Never changes contents: others may be writing."""
    if advise:
        with contextlib.suppress(OSError):  # fewer TLB misses where shmem_enabled=advise; else no effect
            mapping.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, size_bytes, TOUCH_CHUNK_BYTES):
        chunk = min(TOUCH_CHUNK_BYTES, size_bytes - start)
        _populate(mapping, start, chunk, fresh=fresh)
        if progress:
            progress(start + chunk, size_bytes)


def _populate(mapping: mmap.mmap, start: int, size_bytes: int, *, fresh: bool) -> None:
    for advice in (_MADV_POPULATE_WRITE, _MADV_POPULATE_READ):
        try:
            mapping.madvise(advice, start, size_bytes)
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel before 5.14; all else is out of memory
                raise
    pages = np.frombuffer(mapping, dtype=np.uint8, count=size_bytes, offset=start)[::PAGE_BYTES]
    if fresh:
        pages[:] = 0  # nobody else knows this memory yet
    else:
        pages.max()
