"""One file on an SSD: O_DIRECT reads and writes between its bytes and any memory of this process.

O_DIRECT wants file offset, length and address aligned. What is aligned goes straight between the disk
and the caller's memory. What is not goes a slower way, with the same result:

- reads over-read whole blocks into the thread's bounce buffer;
- writes put their whole blocks through O_DIRECT (by the bounce buffer if the memory is unaligned) and
  the edges, less than a block each, through the page cache. The kernel keeps the two coherent: direct
  reads flush dirty pages first. A block here is never smaller than a page, so no page is ever written
  by an edge and by a direct write of somebody else's bytes.

Where the file system refuses O_DIRECT, everything goes through the page cache (`DirectFile.direct` is
False). tmpfs accepts O_DIRECT since Linux 6.6, which means nothing there.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import struct
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import structlog

from mooncake.core.errors import CapacityError, ConfigError, IntegrityError, MooncakeError, RequestError
from transfer.copy import gather, scatter
from transfer.model import Opcode

BLOCK_BYTES = mmap.PAGESIZE
"""File offsets and lengths are aligned to this, or to the disk's logical block where that is larger.
Not to 512: an edge in the page cache dirties a whole page (see above)."""
BOUNCE_BYTES = 1 << 20
"""Per thread: one disk access of this size is as fast as any larger one."""
IOV_MAX = 1024
"""Ranges per system call, the kernel's limit."""

_ERRORS: dict[int, type[MooncakeError]] = {
    errno.ENOSPC: CapacityError,
    errno.EDQUOT: CapacityError,
    errno.EFBIG: CapacityError,
    errno.EMFILE: CapacityError,
    errno.ENFILE: CapacityError,
    errno.ENOMEM: CapacityError,
    errno.EIO: IntegrityError,
    errno.ENODATA: IntegrityError,  # how block devices report a lost sector
    errno.EILSEQ: IntegrityError,  # a block device's own protection information does not fit
    errno.EUCLEAN: IntegrityError,
    errno.EROFS: ConfigError,
    errno.ENOENT: RequestError,
    errno.EEXIST: RequestError,
    errno.EISDIR: RequestError,
    errno.ENOTDIR: RequestError,
    errno.ENXIO: RequestError,
    errno.EACCES: RequestError,
    errno.EPERM: RequestError,
    errno.ENAMETOOLONG: RequestError,
    errno.ELOOP: RequestError,
    errno.EFAULT: RequestError,
}
_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000

log = structlog.get_logger(__name__)


def disk_error(error: OSError, what: str) -> MooncakeError:
    """Return the error of our tree for `error`, which happened at `what`."""
    return _ERRORS.get(error.errno or 0, MooncakeError)(f"{what}: {error.strerror or error}")


class Bounce:
    """An aligned buffer for one thread's unaligned accesses, made when first needed."""

    def __init__(self) -> None:
        self._view: memoryview | None = None

    def view(self) -> memoryview:
        """Return the buffer."""
        if self._view is None:
            self._view = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
        return self._view


class DirectFile:
    """An open file. All methods may be called from several threads at once.

    It counts its users (`hold`, `release`), so that its descriptors are closed only when nobody is in
    the middle of an access: a descriptor's number is given to the next file at once.
    """

    def __init__(self, path: str, fd: int, *, writable: bool, direct: bool) -> None:
        """Use `open`. Takes over `fd`, a buffered descriptor."""
        self.path = path
        self.writable = writable
        self.block_bytes = BLOCK_BYTES
        self.memory_align_bytes = BLOCK_BYTES
        self.direct = False
        """Whether accesses bypass the page cache; may turn False when the file system changes its mind."""
        self._fd = fd
        self._direct_fd = -1
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()
        if direct:
            self._open_direct()

    @classmethod
    def open(
        cls, path: str, *, write: bool = False, create: bool = False, size_bytes: int = 0, direct: bool = True
    ) -> "DirectFile":
        """Open a regular file.

        Args:
            path: of the file.
            write: for reading and writing; else for reading only.
            create: make a new file, which must not exist yet, durably (its directory is synced).
            size_bytes: with `create`: disk space taken now, so that no later write can lack it.
            direct: False = through the page cache, on purpose.

        Raises:
            RequestError: no such file, it exists already, no regular file, or no permission.
            ConfigError: the file system is read-only.
            CapacityError: no space for `size_bytes`, or no descriptor left.
        """
        if create and not write:
            raise RequestError(f"{path}: creating a file needs write=True")
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO would block
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        made = False
        fd = -1
        try:
            fd = os.open(path, flags, 0o600)
            made = create
            _check_regular(path, fd)
            if create:
                if size_bytes:
                    os.posix_fallocate(fd, 0, size_bytes)
                _sync_directory(path)
            return cls(path, fd, writable=write, direct=direct)
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            if made:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            if isinstance(error, OSError):
                raise disk_error(error, f"open {path}") from error
            raise

    def _open_direct(self) -> None:
        flags = (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_DIRECT
        try:
            self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", flags)  # the same file, renamed or not
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                raise
            self._give_up_direct(str(error.strerror))
            return
        self.direct = True
        memory, offset = _direct_alignment(self._fd)
        self.memory_align_bytes = memory or BLOCK_BYTES
        self.block_bytes = max(offset, BLOCK_BYTES)

    def _give_up_direct(self, reason: str) -> None:
        self.direct = False
        log.warning(
            "file.not_direct", path=self.path, reason=reason, advice="accesses go through the page cache"
        )

    @property
    def size_bytes(self) -> int:
        """The file's length now.

        Raises:
            RequestError: closed.
        """
        with self._used():
            return os.fstat(self._fd).st_size

    def sync(self) -> None:
        """Return when everything written so far is on the disk (fdatasync); blocks for milliseconds.

        Raises:
            RequestError: closed.
            MooncakeError: as `move`; what was written since the last sync may be lost.
        """
        with self._used():
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                raise disk_error(error, f"sync {self.path}") from error

    def move(self, op: Opcode, offset: int, memory: Sequence[memoryview], bounce: Bounce) -> None:
        """Read or write one contiguous range of the file, blocking. The caller holds the file.

        Args:
            op: READ = file -> memory, WRITE = memory -> file.
            offset: first byte in the file.
            memory: byte views, in the order of the file's bytes.
            bounce: this thread's.

        Raises:
            RequestError: the file ends inside the range.
            CapacityError: the disk is full.
            IntegrityError: the disk cannot read or write these bytes.
            MooncakeError: any other error of the operating system.
        """
        size = 0
        try:
            size = size_of(memory)
            if not self.direct:
                moved = _move(self._fd, op, offset, memory)
            elif self._fits(offset, memory):
                moved = self._move_direct(op, offset, memory)
            elif op is Opcode.READ:
                moved = self._read_bounced(offset, memory, size, bounce)
            else:
                moved = self._write_pieces(offset, memory, size, bounce)
        except OSError as error:
            raise disk_error(error, f"{op.name.lower()} {self.path} at {offset}+{size}") from error
        except ValueError as error:  # "operation forbidden on released memoryview object"
            raise RequestError(f"{op.name.lower()} {self.path} at {offset}+{size}: {error}") from error
        if moved < size and op is Opcode.WRITE:
            raise CapacityError(f"write {self.path} at {offset}+{size}: the disk took {moved} bytes")
        if moved < size:
            raise RequestError(f"range {offset}+{size} leaves {self.path}, which ends at {offset + moved}")

    def _fits(self, offset: int, memory: Sequence[memoryview]) -> bool:
        """Return whether O_DIRECT can serve this as it stands."""
        if offset % self.block_bytes:
            return False
        for view in memory:
            if view.nbytes % self.block_bytes or address_of(view) % self.memory_align_bytes:
                return False
        return True

    def _move_direct(self, op: Opcode, offset: int, memory: Sequence[memoryview]) -> int:
        try:
            return _move(self._direct_fd, op, offset, memory, self.block_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # all is aligned as the disk has told us, and yet: some network and stacked file systems
        self._give_up_direct(f"{op.name} at {offset}: invalid")
        return _move(self._fd, op, offset, memory)

    def _read_bounced(self, offset: int, memory: Sequence[memoryview], size: int, bounce: Bounce) -> int:
        block, room = self.block_bytes, bounce.view()
        moved = 0
        while moved < size:
            lead = (offset + moved) % block
            whole = min(room.nbytes, -(-(lead + size - moved) // block) * block)
            got = self._move_direct(Opcode.READ, offset + moved - lead, [room[:whole]])
            count = min(got - lead, size - moved)
            if count <= 0:
                break
            scatter(room[lead : lead + count], _arrays(_cut(memory, moved, moved + count)))
            moved += count
            if got < whole:  # the end of the file
                break
        return moved

    def _write_pieces(self, offset: int, memory: Sequence[memoryview], size: int, bounce: Bounce) -> int:
        block = self.block_bytes
        head = min(size, -offset % block)
        tail = max(head, size - (offset + size) % block)
        moved = 0
        if head:
            moved += _move(self._fd, Opcode.WRITE, offset, _cut(memory, 0, head))
        middle = _cut(memory, head, tail)
        if self._fits(offset + head, middle):
            moved += self._move_direct(Opcode.WRITE, offset + head, middle)
        else:
            room = bounce.view()
            for start in range(head, tail, room.nbytes):
                end = min(tail, start + room.nbytes)
                piece = room[: end - start]
                gather(_arrays(_cut(memory, start, end)), piece)
                moved += self._move_direct(Opcode.WRITE, offset + start, [piece])
        if tail < size:
            moved += _move(self._fd, Opcode.WRITE, offset + tail, _cut(memory, tail, size))
        return moved

    def hold(self, count: int = 1) -> None:
        """Keep the descriptors open for `count` accesses, until as many `release`.

        Raises:
            RequestError: closed.
        """
        with self._lock:
            if self._closed:
                raise RequestError(f"{self.path} is closed")
            self._users += count

    def release(self, count: int = 1) -> None:
        """End `count` accesses."""
        with self._lock:
            self._users -= count
            self._close_if_idle()

    def close(self) -> None:
        """Take no more accesses; the descriptors go with the last that is under way (idempotent)."""
        with self._lock:
            self._closed = True
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closed and not self._users:
            fds, self._fd, self._direct_fd = (self._fd, self._direct_fd), -1, -1
            for fd in fds:
                if fd >= 0:
                    os.close(fd)

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        self.hold()
        try:
            yield
        finally:
            self.release()


def size_of(memory: Sequence[memoryview]) -> int:
    """Return the bytes of all views."""
    return memory[0].nbytes if len(memory) == 1 else sum(view.nbytes for view in memory)


def address_of(view: memoryview) -> int:
    """Return the address of the first byte."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def _arrays(views: Sequence[memoryview]) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    return [np.frombuffer(view, np.uint8) for view in views]


def _cut(views: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """Return the views of bytes `start` to `end` of the concatenation of `views`."""
    found = []
    base = 0
    for view in views:
        low, high = max(start - base, 0), min(end - base, view.nbytes)
        if low < high:
            found.append(view[low:high])
        base += view.nbytes
    return found


def _move(fd: int, op: Opcode, offset: int, memory: Sequence[memoryview], block_bytes: int = 1) -> int:
    """Continue short reads and writes to the end; return the bytes moved: fewer only at the file's end.

    A direct read that ends inside a block of `block_bytes` has met the end of the file.
    """
    transfer = os.preadv if op is Opcode.READ else os.pwritev
    size, todo, moved = size_of(memory), memory, 0
    while moved < size:
        count = transfer(fd, todo[:IOV_MAX], offset + moved)
        moved += count
        if count == 0 or count % block_bytes:
            break
        if moved < size:
            todo = _cut(memory, moved, size)
    return moved


def _check_regular(path: str, fd: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise RequestError(f"{path}: not a regular file")


def _sync_directory(path: str) -> None:
    """Make the name durable: fdatasync of a file does not."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _direct_alignment(fd: int) -> tuple[int, int]:
    """Return (memory, offset) alignment for O_DIRECT in bytes by statx, (0, 0) where it is not known."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = ctypes.create_string_buffer(256)  # struct statx
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, result):
        return 0, 0
    mask = struct.unpack_from("I", result, 0)[0]
    if not mask & _STATX_DIOALIGN:
        return 0, 0
    memory, offset = struct.unpack_from("II", result, 0x98)
    return memory, offset
