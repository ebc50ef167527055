"""The index of an SSD tier never gives a place away twice, and knows what it holds: against a model."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.header import HEADER_BYTES, ObjectHeader, Record
from kvstore.node.allocator import aligned
from kvstore.ssd.index import Refusal, SsdIndex
from kvstore.ssd.layout import Geometry
from mooncake.core.errors import ConfigError

PAGE = HEADER_BYTES
TIER = b"t" * 16
GEOMETRY = Geometry(segments=4, segment_bytes=10 * PAGE, slots=3)  # 7 pages of objects each
WINDOW_S = 10.0


def key(n: int) -> bytes:
    return bytes([n]) * 32


def item(n: int, size: int = PAGE) -> ObjectHeader:
    return ObjectHeader(key(n), size, b"c" * 16)


def make(**settings) -> SsdIndex:
    return SsdIndex(GEOMETRY, TIER, **settings)


def stored(index: SsdIndex, n: int, size: int = PAGE, now_s: float = 0.0) -> Record:
    record = index.reserve(now_s, item(n, size))
    assert isinstance(record, Record)
    index.commit(record)
    return record


def full_segment(index: SsdIndex, first: int, now_s: float = 0.0) -> list[Record]:
    """Three objects fill the header pages of a segment."""
    return [stored(index, first + i, now_s=now_s) for i in range(3)]


class Model(RuleBasedStateMachine):
    """`disk` is what the header pages hold; `held` those that somebody reads, writes or blanks."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.index = make()
        self.disk: dict[tuple[int, int], Record] = {}
        self.present: dict[bytes, Record] = {}
        self.writing: list[Record] = []
        self.held: list[Record] = []
        self.clearing = None
        self.hits: dict[bytes, list[float]] = {}  # since the window of the key began
        self.replayed: set[bytes] = set()
        self.opened: set[int] = set()

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 11.0]))
    def time_passes(self, seconds):
        self.now_s += seconds

    @rule(n=st.integers(0, 9), size=st.integers(1, 8 * PAGE))
    def reserve(self, n, size):
        free = self.index.free_segments
        found = self.index.reserve(self.now_s, item(n, size))
        busy = {record.object.key for record in self.writing}
        if found is Refusal.PRESENT:
            assert key(n) in self.present or key(n) in busy
        elif found is Refusal.TOO_LARGE:
            assert size > GEOMETRY.object_bytes_max
        elif found is Refusal.FULL:
            assert free == 0
        else:
            assert key(n) not in self.present
            assert key(n) not in busy
            place = (found.segment, found.slot)
            assert place not in self.disk, "a header page that was not cleared"
            assert self.clearing is None or self.clearing.segment != found.segment
            first = GEOMETRY.objects_offset(found.segment)
            end = found.offset + aligned(size)
            assert first <= found.offset
            assert end <= first + GEOMETRY.object_bytes_max
            assert found.slot < GEOMETRY.slots
            self.writing.append(found)

    @rule(data=st.data(), good=st.booleans())
    def end_write(self, data, good):
        if not self.writing:
            return
        record = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if good:
            self.disk[record.segment, record.slot] = record
            self.index.commit(record)
            self.present[record.object.key] = record
            self.hits.pop(record.object.key, None)
        else:
            self.index.abandon(record)

    @rule(n=st.integers(0, 9))
    def read(self, n):
        found = self.index.begin_read(self.now_s, key(n))
        if key(n) not in self.present:
            assert found is None
            return
        assert found.record == self.present[key(n)]
        window = self.hits.setdefault(key(n), [self.now_s])
        if self.now_s - window[0] > WINDOW_S * 60:
            window[:] = [self.now_s]
        window.append(self.now_s)
        assert found.promote == (len(window) > 2)
        self.held.append(found.record)

    @rule(n=st.integers(0, 9))
    def remove(self, n):
        removed = self.index.remove([key(n), key(n)])
        expected = self.present.pop(key(n), None)
        assert removed == ([expected] if expected else [])
        self.held += removed
        for record in removed:
            del self.disk[record.segment, record.slot]

    @rule(data=st.data(), bad=st.booleans())
    def release(self, data, bad):
        if not self.held:
            return
        record = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.index.release(record)
        if bad:
            current = self.present.get(record.object.key) == record
            assert self.index.drop(record) == current
            if current:
                del self.present[record.object.key]

    @rule()
    def begin_clear(self):
        if self.clearing is not None:
            return
        free = self.index.free_segments
        self.clearing = self.index.next_clear()
        if self.clearing is None:
            return
        assert free == 0, "gave objects up without need"
        number = self.clearing.segment
        assert all(record.segment != number for record in self.held + self.writing), "somebody uses it"
        self.present = {k: record for k, record in self.present.items() if record.segment != number}

    @rule(done=st.booleans())
    def end_clear(self, done):
        if self.clearing is None:
            return
        if done:
            number, slots = self.clearing.segment, self.clearing.slots
            self.disk = {p: r for p, r in self.disk.items() if p[0] != number or p[1] >= slots}
            assert all(segment != number for segment, _ in self.disk), "some header would have survived"
        self.index.cleared(self.clearing, done=done)
        self.clearing = None

    @rule()
    def restart(self):
        """The process dies: what the header pages say is all there is."""
        if self.clearing is not None:
            return
        before = self.index
        self.index = SsdIndex(GEOMETRY, TIER)
        self.writing, self.held, self.hits, self.replayed = [], [], {}, set()
        for number in range(GEOMETRY.segments):
            found = sorted((slot, r) for (segment, slot), r in self.disk.items() if segment == number)
            self.index.adopt(self.now_s, number, found, GEOMETRY.slots if found else 0)
        on_disk = {record.object.key: record for record in self.disk.values()}
        assert set(self.present) <= set(on_disk), "nothing that was committed is lost"
        # what was only forgotten as bad, and not blanked, comes back: its checksum still protects it
        recovered = self.index.keys()
        self.present = {k: self.index.begin_read(self.now_s, k).record for k in recovered}
        self.hits = {k: [self.now_s, self.now_s] for k in self.present}
        for record in self.present.values():
            self.index.release(record)
        assert set(before.keys()) <= set(self.present)
        # what was abandoned left no header: the model's disk has its free pages already

    @rule()
    def drain(self):
        events = self.index.drain_events()
        assert not set(events.stored) & self.replayed
        assert set(events.removed) <= self.replayed
        self.replayed = (self.replayed | set(events.stored)) - set(events.removed)
        assert self.replayed == set(self.index.keys())

    @invariant()
    def it_holds_what_the_model_holds(self):
        assert set(self.index.keys()) == set(self.present)
        assert len(self.index) == len(self.present)
        assert self.index.live_bytes == sum(r.object.stored_bytes for r in self.present.values())
        for name, record in self.present.items():
            assert self.index.find(name) == record.object

    @invariant()
    def no_two_places_in_use_overlap(self):
        using = {(r.offset, r.object.stored_bytes, r.slot, r.segment) for r in self.present.values()}
        using |= {(r.offset, r.object.stored_bytes, r.slot, r.segment) for r in self.writing + self.held}
        for (start, size, *_), (following, *_) in itertools.pairwise(sorted(using)):
            assert start + aligned(size) <= following
        assert len({(segment, slot) for *_, slot, segment in using}) == len(using)


TestIndexAgainstModel = Model.TestCase
TestIndexAgainstModel.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_the_segment_that_nobody_touched_for_longest_goes_first():
    index = make()
    first, second, third = (full_segment(index, 10 * i, now_s=float(i)) for i in range(3))
    stored(index, 99, now_s=3.0)  # opens the last
    index.release(index.begin_read(4.0, first[0].object.key).record)
    assert index.next_clear().segment == second[0].segment
    assert key(10) not in index
    assert key(0) in index
    assert third[0].object.key in index


def test_a_demotion_of_what_is_here_counts_as_a_use():
    index = make()
    full_segment(index, 0, now_s=0.0)
    second = full_segment(index, 10, now_s=1.0)
    full_segment(index, 20, now_s=2.0)
    stored(index, 99, now_s=3.0)
    assert index.reserve(4.0, item(0)) is Refusal.PRESENT
    assert index.next_clear().segment == second[0].segment


def test_a_segment_without_objects_goes_before_any_other():
    index = make()
    full_segment(index, 0, now_s=0.0)
    second = full_segment(index, 10, now_s=1.0)
    full_segment(index, 20, now_s=2.0)
    stored(index, 99, now_s=3.0)
    for record in index.remove([r.object.key for r in second]):
        index.release(record)
    assert index.next_clear().segment == second[0].segment
    assert index.evictions == 0


def test_nothing_is_given_up_while_enough_is_free():
    index = make(free_segments=2)
    full_segment(index, 0)
    full_segment(index, 10)
    assert index.next_clear() is None
    stored(index, 20)
    assert index.next_clear() is not None


def test_a_held_segment_stays_until_it_is_released():
    index = make()
    for i in range(3):
        full_segment(index, 10 * i)
    stored(index, 99)
    reads = [index.begin_read(1.0, key(10 * i)).record for i in range(3)]
    assert index.next_clear() is None
    index.release(reads[1])
    assert index.next_clear().segment == reads[1].segment


def test_after_a_failed_clear_the_segment_is_cleared_again_before_it_is_used():
    index = make()
    for i in range(3):
        full_segment(index, 10 * i)
    stored(index, 99)
    clear = index.next_clear()
    index.cleared(clear, done=False)
    assert index.free_segments == 0
    assert index.next_clear() == clear


def test_the_second_hit_within_the_window_is_worth_a_promotion():
    index = make(promote_window_s=WINDOW_S)
    stored(index, 1)

    def promoted(now_s: float) -> bool:
        read = index.begin_read(now_s, key(1))
        index.release(read.record)
        return read.promote

    assert [promoted(t) for t in (0.0, 11.0, 20.0, 22.0, 33.0)] == [False, False, True, False, False]


def test_a_new_object_in_a_segment_makes_its_older_headers_stale():
    index = make()
    old = Record(item(1), TIER, 5, 0, 0, GEOMETRY.objects_offset(0))
    new = Record(item(2), TIER, 6, 0, 1, GEOMETRY.objects_offset(0))
    adopted = index.adopt(0.0, 0, [(0, old), (1, new)], 2)
    assert (adopted.kept, adopted.stale, adopted.misplaced) == (1, 1, 0)
    assert index.keys() == [key(2)]


@pytest.mark.parametrize("newer_first", [True, False])
def test_of_two_records_of_one_key_the_newer_is_kept(newer_first):
    index = make()
    generations = (8, 7) if newer_first else (7, 8)
    for number, generation in enumerate(generations):
        record = Record(item(1, generation), TIER, generation, number, 0, GEOMETRY.objects_offset(number))
        index.adopt(0.0, number, [(0, record)], 1)
    assert index.find(key(1)).length_bytes == 8
    assert index.live_bytes == 8


@pytest.mark.parametrize(
    "record",
    [
        Record(item(1), b"o" * 16, 5, 0, 0, GEOMETRY.objects_offset(0)),
        Record(item(1), TIER, 5, 1, 0, GEOMETRY.objects_offset(1)),
        Record(item(1), TIER, 5, 0, 1, GEOMETRY.objects_offset(0)),
        Record(item(1), TIER, 5, 0, 0, GEOMETRY.objects_offset(1)),
        Record(item(1), TIER, 5, 0, 0, GEOMETRY.objects_offset(0) + 1),
        Record(item(1), TIER, 5, 0, 0, GEOMETRY.header_offset(0, 0)),
        Record(item(1, 2 * PAGE), TIER, 5, 0, 0, GEOMETRY.objects_offset(1) - PAGE),
        Record(item(1, 2**63), TIER, 5, 0, 0, GEOMETRY.objects_offset(0)),
    ],
    ids=["tier", "segment", "slot", "elsewhere", "unaligned", "headers", "leaves", "huge"],
)
def test_a_sound_header_that_cannot_be_true_is_skipped_and_counted(record):
    index = make()
    adopted = index.adopt(0.0, 0, [(0, record)], 1)
    assert (adopted.kept, adopted.misplaced) == (0, 1)
    assert index.keys() == []
    assert index.free_segments == GEOMETRY.segments - 1, "its page must be cleared before reuse"


def test_of_two_records_that_overlap_only_one_is_kept():
    index = make()
    start = GEOMETRY.objects_offset(0)
    first, second = (
        Record(item(1, 2 * PAGE), TIER, 5, 0, 0, start),
        Record(item(2), TIER, 5, 0, 1, start + PAGE),
    )
    adopted = index.adopt(0.0, 0, [(0, first), (1, second)], 2)
    assert (adopted.kept, adopted.misplaced) == (1, 1)


def test_generations_go_on_above_all_that_the_disk_has_seen():
    index = make(first_generation=3)
    index.adopt(0.0, 0, [(0, Record(item(1), TIER, 41, 0, 0, GEOMETRY.objects_offset(0)))], 1)
    assert stored(index, 2).generation == 42


def test_objects_larger_than_a_segment_are_refused():
    index = make()
    assert index.reserve(0.0, item(1, GEOMETRY.object_bytes_max + 1)) is Refusal.TOO_LARGE
    stored(index, 1, GEOMETRY.object_bytes_max)


@pytest.mark.parametrize(
    "settings",
    [{"free_segments": 0}, {"free_segments": 3}, {"promote_hits": 0}, {"promote_window_s": 0.0}],
    ids=str,
)
def test_bad_limits_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make(**settings)


@pytest.mark.parametrize(
    ("capacity", "segment", "size"),
    [
        (3 * 64 * PAGE, 64 * PAGE, PAGE * 4),
        (1 << 30, 64 * PAGE + 1, PAGE * 4),
        (1 << 30, PAGE, PAGE),
        (1 << 30, 0, PAGE),
    ],
    ids=["capacity", "unaligned", "no room", "zero"],
)
def test_a_file_that_cannot_be_divided_is_refused(capacity, segment, size):
    with pytest.raises(ConfigError):
        Geometry.of(capacity, segment, size)


def test_segments_tile_the_file_between_its_two_header_pages():
    geometry = Geometry.of((1 << 20) + 5000, 128 << 10, 16 << 10)
    assert geometry.segments == 7
    assert geometry.slots == 8
    assert geometry.header_offset(0, 0) == PAGE
    assert geometry.header_offset(1, 0) == geometry.objects_offset(0) + geometry.object_bytes_max
    assert geometry.objects_offset(6) + geometry.object_bytes_max + PAGE == geometry.file_bytes
