"""The SSD tier of a store node: the clock, the threads' locks, the order of writes; SsdIndex decides.

    io = FileIO()                                  # one for each disk
    tier = SsdTier.open(SsdConfig(node="n1", path="/ssd/kv", capacity_bytes=1 << 40), io)
    tier.put(key, view, checksum)                  # on demotion
    got = tier.get(key, view)                      # got.hit: verified; got.promote: keep it in DRAM

All calls block and may come from any thread; a service makes them in threads of its own.

**Nothing wrong is served.** Every read is checked against the checksum the object was put with, which is
seeded by its key; what differs is dropped, counted, and no hit.

**Sync policy.** `put` does not sync: KV is a cache, to lose the last second of it in a power cut costs a
recomputation. fdatasync is called once a second by the owner (`sync`, SYNC_S), at `close`, and by the tier
whenever a segment is begun: its cleared headers are then on the disk before its bytes are overwritten,
and only the two newest segments can be torn, which recovery verifies. A killed process loses nothing that
`put` has returned: the kernel has it. A removal is durable after the next sync.

**A sick disk** (DESIGN 6). Full, which a preallocated file meets on thin volumes only: CapacityError for
this put and those of the next FULL_PAUSE_S, the tier goes on. Read-only, or too many failed writes in a
row: `write_error` says why, puts are refused, reads go on. Hanging: reads miss and puts are refused until
what is inside the disk has ended; `unsettled` names its memory.
"""

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import msgspec
import structlog

from kvstore.header import HEADER_BYTES, NO_LAYOUT, ObjectHeader, Record, encode_record
from kvstore.node.changes import NodeEvents
from kvstore.ssd.disk import Disk, Errors
from kvstore.ssd.file import lock_directory, open_file, recover
from kvstore.ssd.index import Clear, Read, Refusal, SsdIndex
from kvstore.ssd.layout import Geometry
from kvstore.ssd.model import Got, Put, Recovered, SsdConfig, SsdStats
from mooncake.core.errors import CapacityError, IntegrityError, MooncakeError, RequestError
from mooncake.core.keys import block_checksum
from transfer.file import FileBatch, FileIO, Request

__all__ = ["SYNC_S", "Got", "Put", "Recovered", "SsdConfig", "SsdStats", "SsdTier"]

log = structlog.get_logger(__name__)

SYNC_S = 1.0
"""How much work a power cut may cost; fdatasync takes milliseconds."""
READ_WINDOW_BYTES = 64 << 20
"""In flight of one get_many: many times what the disk's threads can hold; the rest waits its turn."""
READ_GROUP_BYTES = 4 << 20
"""Verified together while the disk reads the next: one wake-up for 16 blocks of 256 KiB, not 16."""

MISS = Got()

_Placed: TypeAlias = tuple[int, Record]
"""(index in put_many's items, where it goes)."""


class _Group(msgspec.Struct):
    """Reads that are under way together."""

    places: list[int] = msgspec.field(default_factory=list)
    reads: list[Read] = msgspec.field(default_factory=list)
    views: list[memoryview] = msgspec.field(default_factory=list)
    bytes: int = 0

    def records(self) -> list[Record]:
        return [read.record for read in self.reads]


class SsdTier:
    """One open tier. Made by `open`."""

    def __init__(
        self, config: SsdConfig, disk: Disk, index: SsdIndex, lock_fd: int, clock: Callable[[], float]
    ) -> None:
        """Use `open`."""
        self.config = config
        self.recovered = Recovered()
        self._disk = disk
        self._index = index
        self._lock_fd = lock_fd
        self._clock = clock
        self._lock = threading.Lock()  # of the index and the counters; never held during IO
        self._placing = threading.Lock()  # of writers: segments are cleared and begun one at a time
        self._zeros = memoryview(mmap.mmap(-1, index.geometry.slots * HEADER_BYTES))
        self._generation = 0
        self._closed = False
        self._puts = self._put_bytes = self._read_bytes = self._corrupt = 0

    @classmethod
    def open(
        cls,
        config: SsdConfig,
        io: FileIO,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> "SsdTier":
        """Open the tier at `config.path` and index what it holds, or make it.

        Args:
            config: see SsdConfig.
            io: of this disk; stays the caller's.
            clock: for the order of use.
            wall_clock: keeps generations rising even if the newest headers were lost.

        Raises:
            ConfigError: bad settings, a read-only disk, another process has the tier, or its file is of
                another node, version or size, or damaged: the text says what to do.
            CapacityError: no room on the disk for `capacity_bytes`.
            PeerTimeout: the disk hangs.
        """
        geometry = Geometry.of(config.capacity_bytes, config.segment_bytes, config.object_bytes)
        lock_fd = lock_directory(config.path)
        disk: Disk | None = None
        try:
            file, tier_id = open_file(config.path, config.node, geometry, io)
            disk = Disk(file, io, config.deadline_s, clock)
            index = SsdIndex(
                geometry,
                tier_id,
                first_generation=max(1, int(wall_clock() * 1e6)),
                free_segments=config.free_segments,
                promote_hits=config.promote_hits,
                promote_window_s=config.promote_window_s,
            )
            tier = cls(config, disk, index, lock_fd, clock)
            tier.recovered = recover(file, index, io, clock())
        except BaseException:
            if disk is not None:
                disk.close()
            os.close(lock_fd)
            raise
        log.info("ssd.opened", path=config.path, direct=file.direct, **msgspec.structs.asdict(tier.recovered))
        return tier

    # ------------------------------------------------------------ reads

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._index

    def find(self, key: bytes) -> ObjectHeader | None:
        """Return size, checksum and layout of an object; None = not here. Counts neither hit nor miss."""
        with self._lock:
            return self._index.find(key)

    def keys(self) -> list[bytes]:
        """Return every readable key."""
        with self._lock:
            return self._index.keys()

    def names(self) -> list[tuple[bytes, bytes]]:
        """Return (key, name) of every object that has a name."""
        with self._lock:
            return self._index.names()

    def get(self, key: bytes, view: memoryview) -> Got:
        """Read one object into `view`, which has its size."""
        return self.get_many([(key, view)])[0]

    def get_many(self, wanted: Sequence[tuple[bytes, memoryview]]) -> list[Got]:
        """Read objects into memory; what has come is verified while the disk reads on.

        A view whose Got is no hit holds anything. Page-aligned memory is fastest.
        """
        results = [MISS] * len(wanted)
        if self._disk.is_stalled():
            return results
        flying: deque[tuple[_Group, FileBatch]] = deque()
        try:
            for group in self._groups(wanted, results):
                while flying and sum(g.bytes for g, _ in flying) + group.bytes > READ_WINDOW_BYTES:
                    self._land(*flying.popleft(), results)
                try:
                    ranges = [(r.offset, v) for r, v in zip(group.records(), group.views, strict=True)]
                    flying.append((group, self._disk.read(ranges)))
                except MooncakeError as error:
                    self._release(group.records())
                    for place in group.places:
                        results[place] = Got(error=error)
            while flying:
                self._land(*flying.popleft(), results)
        finally:
            for group, batch in flying:  # after an interrupt only
                batch.cancel()
                self._disk.park(batch, partial(self._release, group.records()))
        return results

    def _groups(self, wanted: Sequence[tuple[bytes, memoryview]], results: list[Got]) -> Iterator[_Group]:
        """Yield what is here in groups to read, each held in place; answers what is not."""
        group = _Group()
        for place, (key, view) in enumerate(wanted):
            with self._lock:
                read = None if self._closed else self._index.begin_read(self._clock(), key)
            if read is None:
                continue
            size = read.record.object.stored_bytes
            if view.nbytes != size:
                self._release([read.record])
                error = RequestError(f"object {key.hex()[:16]} has {size} bytes, not {view.nbytes}")
                results[place] = Got(error=error)
                continue
            if group.reads and group.bytes + size > READ_GROUP_BYTES:
                yield group
                group = _Group()
            group.places.append(place)
            group.reads.append(read)
            group.views.append(view)
            group.bytes += size
        if group.reads:
            yield group

    def _land(self, group: _Group, batch: FileBatch, results: list[Got]) -> None:
        errors = self._disk.land(batch, partial(self._release, group.records()))
        for number, (place, read, view) in enumerate(
            zip(group.places, group.reads, group.views, strict=True)
        ):
            results[place] = self._judge(read, view, errors.get(number))

    def _judge(self, read: Read, view: memoryview, error: MooncakeError | None) -> Got:
        item = read.record.object
        if error is None and block_checksum(item.key, view) != item.checksum:
            error = IntegrityError("bytes are not those that were put")
        if error is None:
            with self._lock:
                self._read_bytes += item.stored_bytes
            return Got(True, read.promote)
        if isinstance(error, IntegrityError | RequestError):  # RequestError: the file was cut
            error = IntegrityError(f"ssd tier: object {item.key.hex()[:16]}: {error}")
            with self._lock:
                self._corrupt += self._index.drop(read.record)
        log.warning("ssd.read_failed", path=self.config.path, offset=read.record.offset, error=str(error))
        return Got(error=error)

    # ------------------------------------------------------------ writes

    def put(self, key: bytes, view: memoryview, checksum: bytes, layout: int = NO_LAYOUT) -> None:
        """Store one object; what is there already stays as it is.

        Raises:
            MooncakeError: see put_many.
        """
        error = self.put_many([Put(key, view, checksum, layout)])[0]
        if error is not None:
            raise error

    def put_many(self, items: Sequence[Put]) -> list[MooncakeError | None]:
        """Store objects; returns for each the reason why it is not stored, or None.

        RequestError: larger than a segment, or the tier is closed. CapacityError: no segment or no disk
        space is free now, or the disk hangs. PeerTimeout: as before, and views in `unsettled` are still
        being read. ConfigError, IntegrityError, MooncakeError: this write has failed, or `write_error`.
        """
        refusal = self._refusal()
        if refusal is not None:
            return [refusal] * len(items)
        results: list[MooncakeError | None] = [None] * len(items)
        placed: list[_Placed] = []
        with self._placing:
            for place, item in enumerate(items):
                found = self._place(item)
                if isinstance(found, Record):
                    placed.append((place, found))
                else:
                    results[place] = found
        requests: list[Request] = [(record.offset, items[place].view) for place, record in placed]
        placed = self._write([[pair] for pair in placed], requests, results)
        # only now the headers, see kvstore.ssd.index: a header tells of bytes that are there
        runs = _runs(placed)
        placed = self._write(runs, [self._headers([r for _, r in run]) for run in runs], results)
        with self._lock:
            for _, record in placed:
                self._index.commit(record)
                self._put_bytes += record.object.stored_bytes
            self._puts += len(placed)
        return results

    def _place(self, item: Put) -> Record | MooncakeError | None:
        """Return where to write `item`; None = it is there."""
        header = ObjectHeader(item.key, item.view.nbytes, item.checksum, item.layout, name=item.name)
        with self._lock:
            found = self._index.reserve(self._clock(), header)
        if found is Refusal.FULL:
            self._make_room()
            with self._lock:
                found = self._index.reserve(self._clock(), header)
        if isinstance(found, Record):
            if found.generation != self._generation:  # a segment was begun: see the sync policy
                self._generation = found.generation
                self._disk.sync()
            return found
        if found is Refusal.PRESENT:
            return None
        if found is Refusal.TOO_LARGE:
            return RequestError(f"ssd tier {self.config.path}: {item.view.nbytes} bytes: {found.value}")
        return CapacityError(f"ssd tier {self.config.path}: {found.value}")

    def _headers(self, records: list[Record]) -> Request:
        """Return the write of neighbouring header pages."""
        offset = self._index.geometry.header_offset(records[0].segment, records[0].slot)
        return offset, [memoryview(encode_record(record)) for record in records]

    def _write(
        self, groups: list[list[_Placed]], requests: list[Request], results: list[MooncakeError | None]
    ) -> list[_Placed]:
        """Write one request for each group; returns what is written, gives the others up."""

        def settle(errors: Errors) -> None:
            with self._lock:
                for number in errors:
                    for _, record in groups[number]:
                        self._index.abandon(record)

        errors = self._disk.write(requests, settle) if groups else {}
        for number, error in errors.items():
            for place, _ in groups[number]:
                results[place] = error
        return [pair for number, group in enumerate(groups) if number not in errors for pair in group]

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget objects, also for the next start; returns how many there were."""
        return self.erase(self.forget(keys))

    def forget(self, keys: Sequence[bytes]) -> list[Record]:
        """Serve these objects no more; what is returned has to be given to `erase`. Does not block."""
        with self._lock:
            return [] if self._closed else self._index.remove(keys)

    def forget_others(self, checksums: Mapping[bytes, bytes]) -> list[Record]:
        """As `forget`, for those of these keys whose bytes here have another checksum."""
        with self._lock:
            found = ((key, self._index.find(key)) for key in checksums)
            stale = [key for key, header in found if header and header.checksum != checksums[key]]
            return self._index.remove(stale) if stale and not self._closed else []

    def erase(self, records: list[Record]) -> int:
        """Make sure that the next start does not find what was forgotten; returns how many these are."""
        blank = self._zeros[:HEADER_BYTES]
        if records:
            offsets = [self._index.geometry.header_offset(r.segment, r.slot) for r in records]
            self._disk.write([(offset, blank) for offset in offsets], lambda _: self._release(records))
        return len(records)

    def maintain(self) -> None:
        """Clear segments ahead of need. Call it after a round of demotions: the next will not wait."""
        if self._refusal() is None:
            with self._placing:
                self._make_room()

    def _make_room(self) -> None:
        while True:
            with self._lock:
                clear = self._index.next_clear()
            if clear is None or not self._clear(clear):
                return

    def _clear(self, clear: Clear) -> bool:
        def settle(errors: Errors) -> None:
            with self._lock:
                self._index.cleared(clear, done=not errors)

        offset = self._index.geometry.header_offset(clear.segment, 0)
        return not self._disk.write([(offset, self._zeros[: clear.slots * HEADER_BYTES])], settle)

    def _release(self, records: list[Record]) -> None:
        with self._lock:
            for record in records:
                self._index.release(record)

    def _refusal(self) -> MooncakeError | None:
        if self._closed:
            return RequestError(f"ssd tier {self.config.path} is closed")
        return self._disk.refusal()

    # ------------------------------------------------------------ life

    def sync(self) -> bool:
        """Make everything put so far durable; returns False (and counts it) if the disk refuses."""
        return self._closed or self._disk.sync()

    def close(self) -> None:
        """Sync and close (idempotent). If the disk hangs, the tier stays locked until the process ends."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._disk.close()
        if not self._disk.is_stalled():
            os.close(self._lock_fd)

    @property
    def write_error(self) -> MooncakeError | None:
        """Why nothing is written any more; None = all is well."""
        return self._disk.write_error

    @property
    def unsettled(self) -> list[memoryview]:
        """Memory that a hanging disk may still read or write."""
        return self._disk.unsettled

    def drain_events(self) -> NodeEvents:
        """Return which keys became readable or were lost since the last drain; first, all recovered ones."""
        with self._lock:
            return self._index.drain_events()

    def stats(self) -> SsdStats:
        """Return counters since start and gauges now."""
        with self._lock:
            index = self._index
            return SsdStats(
                capacity_bytes=index.geometry.segments * index.geometry.object_bytes_max,
                live_bytes=index.live_bytes,
                objects=len(index),
                free_segments=index.free_segments,
                hits=index.hits,
                misses=index.misses,
                evictions=index.evictions,
                puts=self._puts,
                put_bytes=self._put_bytes,
                read_bytes=self._read_bytes,
                corrupt=self._corrupt,
                write_errors=self._disk.write_errors,
                recovered=self.recovered,
            )


def _runs(placed: list[_Placed]) -> list[list[_Placed]]:
    """Return `placed` in runs whose header pages are neighbours."""
    runs: list[list[_Placed]] = []
    for pair in placed:
        before = runs[-1][-1][1] if runs else None
        if before and (before.segment, before.slot + 1) == (pair[1].segment, pair[1].slot):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs
