"""`BufferPool` of `mooncake.store`: memory registered with a store, lent by lease.

Registering memory is slow and a process has few large buffers, so a pool registers regions once and lends
pieces of them. `max_bytes` bounds what is lent at any time; leases that do not fit wait for others to end.
Memory comes from regions of at least REGION_BYTES, at most twice the bound together, so that pieces of
unlike sizes find room; those nobody uses are given up when another is needed.

A lease ends by `release`, by its context or, when it and the last view of it are forgotten, by itself.
Thread-safe. What upstream does in each case is in tests/unit/dropin/test_store_buffers.py.
"""

import contextlib
import mmap
import operator
import threading
import time
import weakref
from collections import deque
from typing import Any, Protocol, Self

import numpy as np

from kvstore.node.allocator import ALIGN_BYTES, OffsetAllocator, aligned
from mooncake.core.errors import CapacityError, PeerTimeout, RequestError
from mooncake.dropin.store.types import INVALID_PARAMS, OK

LINE_BYTES = 64
"""Where leases begin, as upstream's: no two of them share a cache line."""
SCALE = ALIGN_BYTES // LINE_BYTES
"""The allocator counts in pages; it is told that a line is one."""
REGION_BYTES = 16 << 20
LOCAL_SHARE = 2
"""What upstream's pool may lend by default: the store's local buffer and as much again."""
REGION_SHARE = 2
WAIT_S = 600.0
"""For callers who give no timeout, where upstream waits for ever."""
LOOK_S = 0.5
"""How often a waiting caller looks for leases that were forgotten: those cannot always wake it."""
MIN_SIZE_CLASS = 64 << 10
ALIGNMENT = 8 << 20


class Registrar(Protocol):
    """What a pool needs of a store."""

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Return 0, or why not."""

    def unregister_buffer(self, buffer_ptr: int) -> int:
        """Return 0, or why not."""


class Region:
    """Memory of one registration."""

    def __init__(self, capacity_bytes: int, touch: bool = False) -> None:
        """Map it, `touch` now rather than at its first use.

        Raises:
            CapacityError: the machine has not that much.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (mmap.MAP_POPULATE if touch else 0)
        try:
            self.array = np.frombuffer(mmap.mmap(-1, capacity_bytes, flags=flags), np.uint8)
        except (OSError, ValueError, OverflowError) as error:
            raise CapacityError(f"no memory for a region of {capacity_bytes} bytes: {error}") from error
        self.address = int(self.array.__array_interface__["data"][0])
        self.capacity_bytes = capacity_bytes
        self._room = OffsetAllocator(capacity_bytes * SCALE)

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a piece of it."""
        return not self._room.used_bytes

    def take(self, size_bytes: int) -> int | None:
        """Return the offset of a free piece, None if there is none."""
        offset = self._room.allocate(max(size_bytes, 1) * SCALE)
        return None if offset is None else offset // SCALE

    def give(self, offset: int, size_bytes: int) -> None:
        """Take a piece back."""
        self._room.free(offset * SCALE, max(size_bytes, 1) * SCALE)


class BufferLeaseView(np.ndarray[Any, np.dtype[np.uint8]]):
    """What the views of a lease are of: it lives as long as one of them does, and keeps the lease."""

    lease: "BufferLease | None" = None

    @property
    def buffer(self) -> memoryview:
        """The bytes of the lease."""
        return memoryview(self)  # type: ignore[arg-type]


class BufferLease:
    """A piece of a pool, by address and as a memoryview. Leaving its context releases it."""

    def __init__(self, pool: "BufferPool", region: Region, offset: int, size: int) -> None:
        """Made by BufferPool.acquire."""
        self._pool = pool
        self._region: Region | None = region
        self._offset = offset
        self._size = size
        self._view: weakref.ref[BufferLeaseView] | None = None

    @property
    def size(self) -> int:
        """Bytes that were asked for."""
        return self._size

    @property
    def ptr(self) -> int:
        """Where they begin, for put_from, get_into and their like; registered already.

        Raises:
            RequestError: it was released.
        """
        return self._live().address + self._offset

    @property
    def buffer(self) -> memoryview:
        """The bytes, writable; the lease cannot be released while a view, slice or array of it lives.

        Raises:
            RequestError: it was released.
        """
        with self._pool._changed:
            region = self._live()
            view = self._view() if self._view else None
            if view is None:
                view = region.array[self._offset : self._offset + self._size].view(BufferLeaseView)
                view.lease = self
                self._view = weakref.ref(view)
            return view.buffer

    def release(self) -> None:
        """Give the memory back (idempotent).

        Raises:
            RequestError: a view of it is still in use: what it shows would be another's.
        """
        with self._pool._changed:
            if self._has_views():
                raise RequestError("cannot release buffer while exported views exist")
            region, self._region = self._region, None
            if region is not None:
                self._pool._ended(region, self._offset, self._size)

    def _has_views(self) -> bool:
        return self._view is not None and self._view() is not None

    def _live(self) -> Region:
        if self._region is None:
            raise RequestError("buffer lease is closed")
        return self._region

    def __enter__(self) -> Self:
        self._live()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or not self._has_views():
            self.release()
        # else the views of the failed code are still there: the lease ends with the last of them

    def __del__(self) -> None:
        region = getattr(self, "_region", None)
        if region is not None:
            self._pool._ended(region, self._offset, self._size, wait=False)


class BufferPool:
    """Lends registered memory. Close it before the store; else its memory ends with the pool object."""

    def __init__(
        self,
        store: Registrar,
        max_bytes: int = 0,
        min_size_class: int = MIN_SIZE_CLASS,
        max_size_class: int | None = None,  # noqa: ARG002 - see Args
        alignment: int = ALIGNMENT,
        block_on_exhaustion: bool = True,
        default_timeout: float | None = None,
        max_regions: int | None = None,
        prewarm_size: int | None = None,
        prewarm_count: int = 0,
    ) -> None:
        """Register nothing yet, unless prewarmed.

        Args:
            store: a MooncakeDistributedStore that is set up.
            max_bytes: lent at any time; 0 = twice the store's local_buffer_size.
            min_size_class: checked and not used: pieces are cut to size.
            max_size_class: as min_size_class.
            alignment: checked and not used: leases begin at multiples of LINE_BYTES.
            block_on_exhaustion: wait for room where `acquire` does not say.
            default_timeout: seconds, where `acquire` does not say; None = WAIT_S.
            max_regions: leases at any time; None = any number.
            prewarm_size: see prewarm.
            prewarm_count: see prewarm.

        Raises:
            RequestError: one makes no sense, or the store is not set up.
        """
        if not (hasattr(store, "register_buffer") and hasattr(store, "unregister_buffer")):
            raise RequestError(f"BufferPool: {type(store).__name__} is no store: it cannot register memory")
        if min_size_class <= 0 or alignment <= 0:
            raise RequestError("min_size_class and alignment must be positive")
        if alignment < 8 or alignment & (alignment - 1):
            raise RequestError(f"alignment {alignment} must be a power of two and at least 8")
        for name, value in (("default_timeout", default_timeout), ("max_regions", max_regions)):
            if value is not None and value < 0:
                raise RequestError(f"{name} {value} must be non-negative")
        self.max_bytes = _count("max_bytes", max_bytes) or LOCAL_SHARE * _local_buffer_bytes(store)
        self._store = store
        self._blocks = block_on_exhaustion
        self._wait_s = WAIT_S if default_timeout is None else default_timeout
        self._leases_max = max_regions
        self._changed = threading.Condition()
        self._returned: deque[tuple[Region, int, int]] = deque()  # by leases that ended
        self._regions: list[Region] = []
        self._leased_bytes = 0
        self._leases = 0
        self._closed = False
        self._finalizer = weakref.finalize(self, _end_later, store, self._regions)
        self._finalizer.atexit = False  # the process's end takes the memory and the store with it
        if prewarm_size is not None and prewarm_count:
            self.prewarm(prewarm_size, prewarm_count)

    def acquire(self, size: int, block: bool | None = None, timeout: float | None = None) -> BufferLease:
        """Lend `size` bytes; their contents are what was there before.

        Args:
            size: bytes; 0 is a lease like any other.
            block: wait for room; None = as the pool was told.
            timeout: seconds to wait at most; None = as the pool was told.

        Raises:
            RequestError: more than the pool may ever lend, or it is closed.
            CapacityError: no room, now or within the timeout.
        """
        size = _count("size", size)
        if timeout is not None and timeout < 0:
            raise RequestError(f"timeout {timeout} must be non-negative")
        blocks = self._blocks if block is None else block
        end_s = time.monotonic() + (self._wait_s if timeout is None else timeout)
        with self._changed:
            while True:
                self._settle()
                if self._closed:
                    raise RequestError("buffer pool is closed")
                if size > self.max_bytes:
                    raise RequestError(f"requested buffer size {size} exceeds pool capacity {self.max_bytes}")
                place = self._place(size)
                if place is not None:
                    return BufferLease(self, *place, size)
                left_s = end_s - time.monotonic()
                if not blocks or left_s <= 0:
                    what = "timed out waiting for buffer" if blocks else "buffer pool is exhausted"
                    raise CapacityError(
                        f"{what}: {size} bytes, {self._leased_bytes} of {self.max_bytes} are lent"
                    )
                self._changed.wait(min(left_s, LOOK_S))

    def buffer(self, size: int, block: bool | None = None, timeout: float | None = None) -> BufferLease:
        """As acquire; upstream's name for `with pool.buffer(n) as lease`."""
        return self.acquire(size, block, timeout)

    def prewarm(self, size: int, count: int) -> None:
        """Map and register room for `count` leases of `size` bytes, as far as the bound allows."""
        lines = -(-max(_count("size", size), 1) // LINE_BYTES)
        wanted = min(lines * LINE_BYTES * _count("count", count), self.max_bytes)
        with self._changed:
            self._settle()
            wanted -= sum(region.capacity_bytes for region in self._regions)
            if not self._closed and wanted > 0:
                self._grow(wanted, touch=True)

    def close(self) -> None:
        """Unregister and give up the memory (idempotent); callers who wait for some get an error.

        Raises:
            RequestError: some of it is lent: the pool stays open.
            PeerTimeout: a peer still uses some: that stays where it is; close again.
        """
        with self._changed:
            self._settle()
            if self._leases:
                raise RequestError(f"cannot close buffer pool with active leases: {self._leases}")
            self._closed = True
            self._changed.notify_all()
            for region in list(self._regions):
                self._drop(region)

    # ------------------------------------------------------------ under the lock

    def _place(self, size: int) -> tuple[Region, int] | None:
        if self._leased_bytes + size > self.max_bytes:
            return None
        if self._leases_max is not None and self._leases >= self._leases_max:
            return None
        for region in self._regions:
            offset = region.take(size)
            if offset is not None:
                break
        else:
            grown = self._grow(size)
            offset = grown.take(size) if grown else None
            if grown is None or offset is None:
                return None
            region = grown
        self._leased_bytes += size
        self._leases += 1
        return region, offset

    def _grow(self, size: int, touch: bool = False) -> Region | None:
        """Return a new region with room for `size`, None if there may be none.

        Raises:
            RequestError: the store refuses it; CapacityError: the machine does.
        """
        limit = REGION_SHARE * aligned(self.max_bytes)
        capacity = aligned(max(size, 1))
        for region in [one for one in self._regions if one.is_idle]:
            if self._held_bytes() + capacity > limit:
                with contextlib.suppress(PeerTimeout):  # it stays then
                    self._drop(region)
        room = limit - self._held_bytes()
        if capacity > room:
            return None
        region = Region(max(capacity, min(room, REGION_BYTES, aligned(self.max_bytes))), touch)
        code = self._store.register_buffer(region.address, region.capacity_bytes)
        if code != OK:
            raise RequestError(f"the store refuses to register a region: {code}: is it set up?")
        self._regions.append(region)
        return region

    def _held_bytes(self) -> int:
        return sum(region.capacity_bytes for region in self._regions)

    def _drop(self, region: Region) -> None:
        _unregister(self._store, region)
        self._regions.remove(region)

    def _settle(self) -> None:
        """Take back what leases have left since."""
        while self._returned:
            region, offset, size = self._returned.popleft()
            region.give(offset, size)
            self._leased_bytes -= size
            self._leases -= 1

    # ------------------------------------------------------------ called by leases

    def _ended(self, region: Region, offset: int, size: int, wait: bool = True) -> None:
        """Note the end of a lease, maybe in a finalizer that has interrupted one of the methods above.

        That is why nothing but the note is made here, and why the lock is one that its holder may take again.
        `wait` is False where this thread may hold any lock: then who waits looks by itself, after LOOK_S.
        """
        self._returned.append((region, offset, size))
        if self._changed.acquire(blocking=wait):
            self._changed.notify_all()
            self._changed.release()


def _count(name: str, value: int) -> int:
    number = operator.index(value)
    if number < 0:
        raise RequestError(f"{name} {number} must be non-negative")
    return number


def _local_buffer_bytes(store: Any) -> int:
    """Return the local_buffer_size that the store was set up with."""
    size: int = store._need().started.settings.local_buffer_size
    if not size:
        raise RequestError("BufferPool: give max_bytes, or the store a local_buffer_size")
    return size


def _unregister(store: Registrar, region: Region) -> None:
    code = store.unregister_buffer(region.address)
    if code not in (OK, INVALID_PARAMS):  # the latter: the store was closed, and its registrations with it
        raise PeerTimeout(f"a region of the buffer pool is still in use by a peer: {code}")


def _end_later(store: Registrar, regions: list[Region]) -> None:
    """Unregister what a forgotten pool had, in a thread: a collector may run anywhere, under any lock."""
    if regions:
        threading.Thread(target=_end, args=(store, regions), name="mooncake-buffers", daemon=True).start()


def _end(store: Registrar, regions: list[Region]) -> None:
    for region in regions:
        try:
            _unregister(store, region)
        except PeerTimeout:
            _IN_USE.append(region)


_IN_USE: list[Region] = []
"""Memory that a peer would not let go of when its pool was forgotten: it stays mapped."""

RegisteredBufferPool = BufferPool
RegisteredBufferLease = BufferLease
RegisteredBufferLeaseView = BufferLeaseView
"""Upstream's older names."""
