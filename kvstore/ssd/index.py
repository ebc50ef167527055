"""Which objects an SSD tier holds and where: a log of segments, each given up as a whole. Pure.

The file: a page that says whose it is, segments of equal size, the same page again. A segment:

    | header pages, one per object, in order of arrival | objects, in order of arrival ... |

Why a log of segments and not an allocator of slots:

- Recovery reads the header pages only. They lie together and nothing but headers is ever written there,
  so no object's own bytes can pass for a header, and one damaged header costs one object. Headers in
  front of each object would have to be found by walking from one to the next: a damaged one ends the walk.
- Space is never reused piece by piece. An allocator overwrites single dead objects while their headers
  may live on after a crash; here only a whole segment is reused, after its headers were cleared.
- Disks are written in long runs, without fragmentation, and eviction costs one decision per segment.

The price: what was removed keeps its room until its segment goes, and with a segment go its live objects.
The segment that nobody has touched for longest goes first, so these are cold; what is hot lives in DRAM,
and comes back here when it is demoted again.

    free --open--> open --does not fit--> sealed --clear--> clearing --cleared--> free

Between `begin_read`, `reserve`, `remove` and their ends an object *holds* its segment: a held segment
is not cleared. At least `free_segments` are kept free, so that a demotion need not wait for clearing.

What survives a crash (the shell does it, see kvstore.ssd.tier): an object's bytes are written before its
header, the headers of a segment are cleared, and synced before its bytes are overwritten. Within one
boot nothing torn is then ever seen. After a power cut any subset of the writes since the last sync may be
on the disk, pages torn: a torn header fails its own checksum, a torn object the checksum in its header,
when it is read at the latest. A header older than the newest in its segment is stale.

Admission to DRAM: the first hit within `promote_window_s` is served and forgotten, the second says
`promote`: a scan over cold conversations does not wash out the memory.
"""

import enum
from collections.abc import Sequence

import msgspec

from kvstore.header import HEADER_BYTES, ObjectHeader, Record
from kvstore.node.allocator import aligned
from kvstore.node.changes import NodeEvents
from kvstore.ssd.layout import Geometry
from mooncake.core.errors import ConfigError

PROMOTE_HITS = 2
PROMOTE_WINDOW_S = 600.0
"""Two hits within ten minutes: turns of one conversation, or a shared prompt."""
FREE_SEGMENTS = 1


class Refusal(enum.Enum):
    """Why nothing was reserved."""

    PRESENT = "the tier holds it, or it is being written"
    TOO_LARGE = "larger than a segment"
    FULL = "no free segment: all are in use or must be cleared first"


class Read(msgspec.Struct, frozen=True, gc=False):
    """A hit: holds the segment until `release`. `promote`: worth a place in DRAM."""

    record: Record
    promote: bool


class Clear(msgspec.Struct, frozen=True):
    """Overwrite the first `slots` header pages of `segment` with zeros, then call `cleared`."""

    segment: int
    slots: int


class Adopted(msgspec.Struct, frozen=True):
    """What recovery made of the headers of one segment."""

    kept: int
    stale: int
    misplaced: int


class _State(enum.Enum):
    FREE = "free"
    OPEN = "open"
    SEALED = "sealed"
    CLEARING = "clearing"


class _Entry(msgspec.Struct, gc=False):
    record: Record
    hits: int = 0
    window_start_s: float = 0.0


class _Segment(msgspec.Struct):
    number: int
    state: _State = _State.FREE
    generation: int = 0
    slots_used: int = 0
    fill_bytes: int = 0
    holds: int = 0
    used_s: float = 0.0
    keys: dict[bytes, None] = msgspec.field(default_factory=dict)  # live ones, an ordered set


class SsdIndex:
    """The truth about one tier's file while it is open. Not thread-safe: the shell locks."""

    def __init__(
        self,
        geometry: Geometry,
        tier: bytes,
        *,
        first_generation: int = 1,
        free_segments: int = FREE_SEGMENTS,
        promote_hits: int = PROMOTE_HITS,
        promote_window_s: float = PROMOTE_WINDOW_S,
    ) -> None:
        """Start empty, with every segment free.

        Args:
            geometry: of the file.
            tier: the id in the file's header; records carry it.
            first_generation: at least this; higher than any on the disk even if its header was lost.
            free_segments: keep so many free.
            promote_hits: within `promote_window_s`, until a hit says `promote`.
            promote_window_s: see `promote_hits`.

        Raises:
            ConfigError: a bad limit.
        """
        if not 0 < free_segments <= geometry.segments - 2:
            raise ConfigError(f"free_segments={free_segments}: 1 to {geometry.segments - 2}")
        if promote_hits < 1 or not promote_window_s > 0:
            raise ConfigError(
                f"promote_hits={promote_hits}, promote_window_s={promote_window_s}: not positive"
            )
        self.geometry = geometry
        self.tier = tier
        self._free_min = free_segments
        self._promote_hits = promote_hits
        self._promote_window_s = promote_window_s
        self._generation = first_generation
        self._entries: dict[bytes, _Entry] = {}
        self._writing: dict[bytes, Record] = {}
        self._segments = [_Segment(number) for number in range(geometry.segments)]
        self._open: _Segment | None = None
        self._pending: dict[bytes, bool] = {}  # net change per key: stored or removed
        self.live_bytes = 0
        self.hits = self.misses = self.evictions = self.commits = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[bytes]:
        """Return every readable key, oldest first."""
        return list(self._entries)

    def names(self) -> list[tuple[bytes, bytes]]:
        """Return (key, name) of every object that has a name, oldest first."""
        headers = ((key, entry.record.object) for key, entry in self._entries.items())
        return [(key, header.name) for key, header in headers if header.name]

    def find(self, key: bytes) -> ObjectHeader | None:
        """Return what `key` is, without counting a hit."""
        entry = self._entries.get(key)
        return entry.record.object if entry else None

    @property
    def free_segments(self) -> int:
        """Segments that can be opened at once."""
        return sum(segment.state is _State.FREE for segment in self._segments)

    # ------------------------------------------------------------ readers

    def begin_read(self, now_s: float, key: bytes) -> Read | None:
        """Return where `key` lies and hold it in place until `release`; None is a miss."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        if not entry.hits or now_s - entry.window_start_s > self._promote_window_s:
            entry.hits, entry.window_start_s = 0, now_s
        entry.hits += 1
        segment = self._hold(entry.record)
        segment.used_s = max(segment.used_s, now_s)
        return Read(entry.record, entry.hits >= self._promote_hits)

    def release(self, record: Record) -> None:
        """End one hold."""
        segment = self._segments[record.segment]
        assert segment.holds > 0
        segment.holds -= 1

    def drop(self, record: Record) -> bool:
        """Forget this very record (its bytes were wrong); False when it is not the current one."""
        entry = self._entries.get(record.object.key)
        if entry is None or entry.record != record:
            return False
        self._forget(entry)
        return True

    # ------------------------------------------------------------ writers

    def reserve(self, now_s: float, item: ObjectHeader) -> Record | Refusal:
        """Return where to write `item`: its bytes first, then its header; then `commit` or `abandon`."""
        size = aligned(item.stored_bytes)
        held = self._entries.get(item.key)
        if held is not None:
            segment = self._segments[held.record.segment]
            segment.used_s = max(segment.used_s, now_s)  # wanted again: it was in DRAM until now
            return Refusal.PRESENT
        if item.key in self._writing:
            return Refusal.PRESENT
        if not 0 < size <= self.geometry.object_bytes_max:
            return Refusal.TOO_LARGE
        segment_open = self._open
        if segment_open is None or not self._fits(segment_open, size):
            segment_open = self._open_next(now_s)
            if segment_open is None:
                return Refusal.FULL
        number = segment_open.number
        offset = self.geometry.objects_offset(number) + segment_open.fill_bytes
        record = Record(item, self.tier, segment_open.generation, number, segment_open.slots_used, offset)
        segment_open.slots_used += 1
        segment_open.fill_bytes += size
        segment_open.used_s = max(segment_open.used_s, now_s)
        self._hold(record)
        self._writing[item.key] = record
        return record

    def commit(self, record: Record) -> None:
        """Bytes and header are written: `record` can be read from now on. Ends its hold."""
        del self._writing[record.object.key]
        self._enter(record)
        self.commits += 1
        self.release(record)

    def abandon(self, record: Record) -> None:
        """It was not written; its room is lost until the segment is cleared. Ends its hold."""
        del self._writing[record.object.key]
        self.release(record)

    def remove(self, keys: Sequence[bytes]) -> list[Record]:
        """Forget `keys`; the caller blanks the headers of the returned records, then releases each."""
        entries = [entry for key in dict.fromkeys(keys) if (entry := self._entries.get(key))]
        for entry in entries:
            self._forget(entry)
            self._hold(entry.record)
        return [entry.record for entry in entries]

    # ------------------------------------------------------------ space

    def next_clear(self) -> Clear | None:
        """Give up a segment if too few are free; its objects are gone from now on. None = nothing to do."""
        if self.free_segments >= self._free_min:
            return None
        sealed = [s for s in self._segments if s.state is _State.SEALED and not s.holds]
        if not sealed:
            return None
        # the empty first, then the one nobody has touched for longest; after a start, the oldest
        segment = min(sealed, key=lambda s: (bool(s.keys), s.used_s, s.generation))
        self.evictions += len(segment.keys)
        for key in list(segment.keys):
            self._forget(self._entries[key])
        segment.state = _State.CLEARING
        return Clear(segment.number, segment.slots_used)

    def cleared(self, clear: Clear, *, done: bool = True) -> None:
        """The headers are cleared; with `done` False the disk would not: try again later."""
        segment = self._segments[clear.segment]
        assert segment.state is _State.CLEARING
        if not done:
            segment.state = _State.SEALED
            return
        segment.state = _State.FREE
        segment.generation = segment.slots_used = segment.fill_bytes = 0

    # ------------------------------------------------------------ recovery

    def adopt(
        self, now_s: float, segment_number: int, found: Sequence[tuple[int, Record]], slots_used: int
    ) -> Adopted:
        """Take over what the disk holds in one segment, which is still free.

        Args:
            now_s: counts as the last use.
            segment_number: which.
            found: (slot, sound header), ascending.
            slots_used: how many header pages from the first must be cleared before reuse.
        """
        segment = self._segments[segment_number]
        assert segment.state is _State.FREE
        if not slots_used:
            return Adopted(0, 0, 0)
        placed = [r for slot, r in found if self._is_placed(r, segment_number, slot)]
        newest = max((record.generation for record in placed), default=0)
        current = [record for record in placed if record.generation == newest]
        segment.state = _State.SEALED
        segment.generation, segment.slots_used, segment.used_s = newest, slots_used, now_s
        self._generation = max(self._generation, newest + 1)
        end = self.geometry.objects_offset(segment_number)
        kept = overlapping = superseded = 0
        for record in sorted(current, key=lambda r: r.offset):
            if record.offset < end:
                overlapping += 1
                continue
            end = record.offset + aligned(record.object.stored_bytes)
            other = self._entries.get(record.object.key)
            if other is not None and other.record.generation > newest:
                superseded += 1
                continue
            if other is not None:
                superseded += 1
                kept -= other.record.segment == segment_number
                self._forget(other)
            self._enter(record)
            kept += 1
        segment.fill_bytes = end - self.geometry.objects_offset(segment_number)
        stale = len(placed) - len(current) + superseded
        return Adopted(kept, stale, len(found) - len(placed) + overlapping)

    def newest(self, generations: int) -> list[Record]:
        """Return the records of the newest `generations`: those that a power cut may have torn."""
        held = sorted((s.generation for s in self._segments if s.generation), reverse=True)[:generations]
        return [entry.record for entry in self._entries.values() if entry.record.generation in held]

    # ------------------------------------------------------------ events

    @property
    def has_events(self) -> bool:
        """Whether `drain_events` would return anything."""
        return bool(self._pending)

    def drain_events(self) -> NodeEvents:
        """Return the net changes of what is readable since the last drain, and forget them."""
        pending, self._pending = self._pending, {}
        stored = [key for key, now_stored in pending.items() if now_stored]
        return NodeEvents(stored, [key for key, now_stored in pending.items() if not now_stored])

    # ------------------------------------------------------------ inside

    def _is_placed(self, record: Record, segment: int, slot: int) -> bool:
        first = self.geometry.objects_offset(segment)
        last = first + self.geometry.object_bytes_max - aligned(record.object.stored_bytes)
        here = (record.tier, record.segment, record.slot) == (self.tier, segment, slot)
        return here and first <= record.offset <= last and record.offset % HEADER_BYTES == 0

    def _fits(self, segment: _Segment, size: int) -> bool:
        room = self.geometry.object_bytes_max - segment.fill_bytes
        return segment.slots_used < self.geometry.slots and size <= room

    def _open_next(self, now_s: float) -> _Segment | None:
        free = next((s for s in self._segments if s.state is _State.FREE), None)
        if free is None:
            return None
        if self._open is not None:
            self._open.state = _State.SEALED
        self._open = free
        free.state, free.used_s = _State.OPEN, now_s
        free.generation, self._generation = self._generation, self._generation + 1
        return free

    def _hold(self, record: Record) -> _Segment:
        segment = self._segments[record.segment]
        segment.holds += 1
        return segment

    def _enter(self, record: Record) -> None:
        key = record.object.key
        self._entries[key] = _Entry(record)
        self._segments[record.segment].keys[key] = None
        self.live_bytes += record.object.stored_bytes
        self._note(key, stored=True)

    def _forget(self, entry: _Entry) -> None:
        key = entry.record.object.key
        del self._entries[key]
        del self._segments[entry.record.segment].keys[key]
        self.live_bytes -= entry.record.object.stored_bytes
        self._note(key, stored=False)

    def _note(self, key: bytes, *, stored: bool) -> None:
        # a key that came and went (or went and came) since the last drain has no net change
        if key in self._pending:
            del self._pending[key]
        else:
            self._pending[key] = stored
