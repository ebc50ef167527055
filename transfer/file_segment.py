"""Memory of a file as a segment: /dev/shm, hugetlbfs, a device that can be mapped.

Whoever may write the file can cut it, and then an access ends the process. So this memory is mapped by its
owner alone, and peers reach it through the owner; a memfd (transfer.segment) is sealed and needs no trust.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct

from mooncake.core.errors import ConfigError
from transfer.segment import NAME_CHARS_MAX, PAGE_BYTES, Segment

_FLOCK = struct.Struct("hhqqi4x")
"""Linux' struct flock of 64-bit machines: type, whence, start, length, pid."""


class FileSegment(Segment):
    """A part of a file, mapped. Build it with `open`; peers cannot be given its descriptor."""

    _range = (0, 0)

    @classmethod
    def open(cls, name: str, path: str, size_bytes: int, offset: int = 0) -> "FileSegment":
        """Map whole pages of a file and lock them against other segments, until the end of this one.

        Args:
            name: of the segment, for messages.
            path: of the file; its bytes there are overwritten.
            size_bytes: a multiple of 4096, as `offset`.
            offset: in the file.

        Raises:
            ConfigError: no such file or range, not whole pages, or another segment has a part of it.
        """
        if not 0 < len(name) <= NAME_CHARS_MAX:
            raise ConfigError(f"segment name {name!r}: 1 to {NAME_CHARS_MAX} characters")
        if size_bytes <= 0 or size_bytes % PAGE_BYTES or offset < 0 or offset % PAGE_BYTES:
            raise ConfigError(f"{path}: {offset}+{size_bytes} must be whole pages of {PAGE_BYTES} bytes")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise ConfigError(f"memory of a file: {path!r}: {error}") from error
        try:
            _check_size(fd, path, offset + size_bytes)
            _lock(fd, path, size_bytes, offset)
            mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, offset=offset)
            segment = cls(name, fd, size_bytes, mapping)
            segment._range = (offset, size_bytes)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"memory of a file: {path}: {error}") from error
        except BaseException:
            os.close(fd)
            raise
        segment.touch()
        return segment

    def close(self) -> None:
        """See Segment; the range is free for another segment then, though views may still be held."""
        if self._fd is not None:  # the mapping has a descriptor of its own, which would keep the lock
            offset, size_bytes = self._range
            _set_lock(self._fd, fcntl.F_UNLCK, size_bytes, offset)
        super().close()


def _check_size(fd: int, path: str, end_bytes: int) -> None:
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_size < end_bytes:  # a device knows itself, see mmap
        raise ConfigError(f"{path} has {info.st_size} bytes: {end_bytes} are wanted")


def _lock(fd: int, path: str, size_bytes: int, offset: int) -> None:
    """Take the range; the kernel gives it back with the last descriptor, however the process ends."""
    try:
        _set_lock(fd, fcntl.F_WRLCK, size_bytes, offset)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"{path}: another segment has bytes of {offset}+{size_bytes}") from error
        raise


def _set_lock(fd: int, kind: int, size_bytes: int, offset: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, size_bytes, 0))
