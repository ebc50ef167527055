"""The SSD tier on real files: what it serves is what was put, whatever happens to disk and process."""

import errno
import itertools
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from xxhash import xxh3_128_digest

from kvstore.header import HEADER_BYTES, ObjectHeader, Record, encode_record
from kvstore.ssd.disk import FULL_PAUSE_S, WRITE_ERRORS_MAX
from kvstore.ssd.file import CHUNK_SLOTS, FILE_NAME
from kvstore.ssd.layout import Geometry
from kvstore.ssd.tier import Put, SsdConfig, SsdTier
from mooncake.core.errors import CapacityError, ConfigError, IntegrityError, PeerTimeout, RequestError
from mooncake.core.keys import block_checksum
from transfer.file import FileIO
from transfer.file_disk import DirectFile
from transfer.model import Opcode

ROOT = Path(__file__).parents[3]
PAGE = HEADER_BYTES
SEGMENT = 16 * PAGE
GEOMETRY = Geometry(segments=4, segment_bytes=SEGMENT, slots=4)  # 12 pages of objects each


@pytest.fixture(scope="module")
def io():
    io = FileIO(threads=4)
    yield io
    io.close()


def config(path, **changes) -> SsdConfig:
    defaults = {
        "node": "n1",
        "path": str(path),
        "capacity_bytes": GEOMETRY.file_bytes,
        "segment_bytes": SEGMENT,
        "object_bytes": SEGMENT // GEOMETRY.slots,
    }
    return SsdConfig(**{**defaults, **changes})


@pytest.fixture
def open_tier(io, tmp_path):
    tiers = []

    def start(clock=time.monotonic, **changes) -> SsdTier:
        tiers.append(SsdTier.open(config(tmp_path, **changes), io, clock))
        return tiers[-1]

    yield start
    for tier in tiers:
        tier.close()


def key(n: int) -> bytes:
    return n.to_bytes(4, "little") * 8


def content(n: int, size: int = 2 * PAGE) -> bytes:
    return random.Random(n).randbytes(size)


def memory(data: bytes | int) -> memoryview:
    """Page-aligned memory with `data`, or of this size."""
    view = memoryview(mmap.mmap(-1, data if isinstance(data, int) else len(data)))
    if not isinstance(data, int):
        view[:] = data
    return view


def item(n: int, size: int = 2 * PAGE) -> Put:
    data = content(n, size)
    return Put(key(n), memory(data), block_checksum(key(n), data))


def put(tier: SsdTier, n: int, size: int = 2 * PAGE) -> None:
    error = tier.put_many([item(n, size)])[0]
    if error is not None:
        raise error


def served(tier: SsdTier, n: int, size: int = 2 * PAGE):
    """The Got of one read; what is a hit is also what was put."""
    view = memory(size)
    got = tier.get(key(n), view)
    assert not got.hit or bytes(view) == content(n, size), "served other bytes"
    return got


def place_of(path, n: int) -> tuple[int, int]:
    """(offset of the header, offset of the bytes) of object `n` in the file."""
    raw = Path(path, FILE_NAME).read_bytes()
    header = raw.index(b"MCKVHEAD", raw.index(key(n)) - 32)
    return header, struct.unpack_from("<Q", raw, header + 32 + 108)[0]


def overwrite(path, offset: int, data: bytes) -> None:
    with Path(path, FILE_NAME).open("r+b") as raw:
        raw.seek(offset)
        raw.write(data)


def flip(path, offset: int, difference: int = 0xFF) -> None:
    with Path(path, FILE_NAME).open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ difference]))


@contextmanager
def file_size_limit(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(monkeypatch, call: str, code: int) -> None:
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)


# ---------------------------------------------------------------- put, get, remove


@pytest.mark.parametrize("size", [1, 511, PAGE, PAGE + 1, 5 * PAGE - 3, GEOMETRY.object_bytes_max])
def test_what_was_put_is_served_with_its_size_and_checksum(open_tier, size):
    tier = open_tier()
    put(tier, 1, size)
    assert served(tier, 1, size).hit
    found = tier.find(key(1))
    assert (found.length_bytes, found.checksum) == (size, block_checksum(key(1), content(1, size)))


def test_what_was_never_put_is_a_miss(open_tier):
    tier = open_tier()
    got = served(tier, 1)
    assert (got.hit, got.error) == (False, None)
    assert tier.stats().misses == 1


def test_a_duplicate_put_keeps_the_first(open_tier):
    tier = open_tier()
    put(tier, 1)
    other = memory(b"x" * 2 * PAGE)
    tier.put(key(1), other, block_checksum(key(1), other))
    assert served(tier, 1).hit
    assert tier.stats().puts == 1


def test_each_key_of_a_batch_has_its_own_answer(open_tier):
    tier = open_tier()
    items = [item(1), item(2, GEOMETRY.object_bytes_max + 1), item(1), item(3)]
    results = tier.put_many(items)
    assert [type(error) for error in results] == [type(None), RequestError, type(None), type(None)]
    views = [
        (key(3), memory(2 * PAGE)),
        (key(9), memory(PAGE)),
        (key(1), memory(PAGE)),
        (key(1), memory(2 * PAGE)),
    ]
    got = tier.get_many(views)
    assert [g.hit for g in got] == [True, False, False, True]
    assert isinstance(got[2].error, RequestError), "a view of another size"
    assert bytes(views[0][1]) == content(3)
    assert tier.stats().objects == 2


def test_bytes_that_do_not_fit_the_checksum_of_their_put_are_never_served(open_tier):
    tier = open_tier()
    tier.put(key(1), memory(content(2)), block_checksum(key(1), content(1)))
    assert isinstance(served(tier, 1).error, IntegrityError)
    assert key(1) not in tier


def test_the_second_hit_says_promote(open_tier):
    tier = open_tier()
    put(tier, 1)
    assert [served(tier, 1).promote for _ in range(3)] == [False, True, True]


def test_events_tell_what_came_and_what_went(open_tier):
    tier = open_tier()
    for n in range(1, 17):
        put(tier, n)
    events = tier.drain_events()
    assert sorted(events.stored) == sorted(tier.keys())
    tier.remove([key(16)])
    assert tier.drain_events().removed == [key(16)]


def test_a_full_tier_gives_up_its_coldest_segment_and_goes_on(open_tier):
    tier = open_tier()
    for n in range(100):
        put(tier, n)
        assert served(tier, n).hit
    stats = tier.stats()
    assert stats.evictions + stats.objects == 100
    assert stats.objects >= 2 * GEOMETRY.slots
    assert all(served(tier, n).hit for n in range(92, 100)), "the newest are here"


def test_more_in_one_batch_than_the_tier_holds_is_refused_in_part_and_it_goes_on(open_tier):
    tier = open_tier()
    results = tier.put_many([item(n) for n in range(30)])
    assert sum(error is None for error in results) == GEOMETRY.segments * GEOMETRY.slots
    assert isinstance(results[-1], CapacityError)
    put(tier, 100)
    assert served(tier, 100).hit


def test_maintain_clears_ahead_of_need(open_tier):
    tier = open_tier()
    for n in range(13):
        put(tier, n)
    assert tier.stats().free_segments == 0
    tier.maintain()
    assert tier.stats().free_segments == 1


def test_readers_and_writers_of_many_threads_never_see_wrong_bytes(open_tier):
    tier = open_tier()
    problems = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(40):
            n = chance.randrange(24)
            error = tier.put_many([item(n)])[0] if chance.random() < 0.6 else None
            view = memory(2 * PAGE)
            got = tier.get(key(n), view)
            if chance.random() < 0.1:
                tier.remove([key(n)])
            if got.hit and bytes(view) != content(n):
                problems.append(f"{n}: wrong bytes")
            if got.error is not None or not isinstance(error, CapacityError | None):
                problems.append(f"{n}: {got.error} {error}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert tier.stats().corrupt == 0


# ---------------------------------------------------------------- restart


def test_everything_is_served_after_a_restart(open_tier):
    tier = open_tier()
    sizes = {n: 1 + n * 700 for n in range(1, 9)}
    for n, size in sizes.items():
        put(tier, n, size)
    tier.close()
    again = open_tier()
    assert again.recovered.objects == len(sizes)
    assert again.recovered.bytes == sum(sizes.values())
    assert all(served(again, n, size).hit for n, size in sizes.items())
    assert sorted(again.drain_events().stored) == sorted(map(key, sizes))


def test_what_was_evicted_or_removed_does_not_come_back(open_tier):
    tier = open_tier()
    for n in range(40):
        put(tier, n)
    assert tier.remove([key(39), key(38), key(1000)]) == 2
    held = set(tier.keys())
    tier.close()
    again = open_tier()
    assert set(again.keys()) == held
    assert msgspec.structs.astuple(again.recovered)[2:] == (0, 0, 0, 0, 0)


def test_a_restarted_tier_gives_up_its_oldest_segment_first(open_tier):
    tier = open_tier()
    for n in range(12):
        put(tier, n)
    tier.close()
    again = open_tier()
    for n in range(20, 25):
        put(again, n)
    assert [n for n in range(12) if key(n) in again] == list(range(4, 12))


def test_the_oldest_segment_is_known_by_its_generation_not_by_its_number(open_tier):
    tier = open_tier()
    for n in range(24):
        put(tier, n)  # the first segments hold the newest objects now
    assert not any(key(n) in tier for n in range(8))
    tier.close()
    again = open_tier()
    for n in range(30, 35):
        put(again, n)
    kept = [n for n in range(24) if key(n) in again]
    assert kept == list(range(24 - len(kept), 24))


def test_a_put_of_what_is_here_gives_nothing_up(open_tier):
    tier = open_tier()
    for n in range(16):
        put(tier, n)
    put(tier, 0)
    assert tier.stats().evictions == 0


def test_more_headers_than_one_read_takes_are_all_found(io, tmp_path):
    slots = 3 * CHUNK_SLOTS + 5
    many = config(
        tmp_path, segment_bytes=2 * slots * PAGE, object_bytes=2 * PAGE, capacity_bytes=7 * slots * PAGE
    )
    tier = SsdTier.open(many, io)
    count = slots + 3  # one segment full, three in the next
    results = tier.put_many([item(n, 100) for n in range(count)])
    assert results == [None] * count
    tier.close()
    again = SsdTier.open(many, io)
    assert again.recovered.objects == count
    assert served(again, count - 1, 100).hit
    again.close()


def test_a_process_killed_while_it_writes_loses_nothing_that_put_returned(io, tmp_path):
    script = """
import mmap, sys
from kvstore.ssd.tier import SsdConfig, SsdTier
from mooncake.core.keys import block_checksum
from transfer.file import FileIO
config = SsdConfig(node="n1", path=sys.argv[1], capacity_bytes=64 << 20, segment_bytes=8 << 20)
tier = SsdTier.open(config, FileIO())
view = memoryview(mmap.mmap(-1, 300_000))
for n in range(150):
    view[:4] = n.to_bytes(4, "little")
    key = n.to_bytes(4, "little") * 8
    tier.put(key, view, block_checksum(key, view))
    print(n, flush=True)
"""
    argv = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        done = [int(line) for line in itertools.islice((x for x in child.stdout if x.strip().isdigit()), 40)]
        child.send_signal(signal.SIGKILL)
    tier = SsdTier.open(
        config(tmp_path, capacity_bytes=64 << 20, segment_bytes=8 << 20, object_bytes=256 << 10), io
    )
    assert len(done) == 40
    for n in done:
        view = memory(300_000)
        assert tier.get(key(n), view).hit
        assert bytes(view[:8]) == n.to_bytes(4, "little") + bytes(4)
    assert msgspec.structs.astuple(tier.recovered)[2:] == (0, 0, 0, 0, 0)
    tier.close()


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def full_image(io, tmp_path_factory):
    """The file of a tier with twelve objects of 2 pages, in three segments, and their places."""
    path = tmp_path_factory.mktemp("image")
    tier = SsdTier.open(config(path), io)
    tier.put_many([item(n) for n in range(12)])
    tier.close()
    places = {n: place_of(path, n) for n in range(12)}
    return Path(path, FILE_NAME).read_bytes(), places


@contextmanager
def tier_of(io, image: bytes):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FILE_NAME).write_bytes(image)
        with capture_logs():
            tier = SsdTier.open(config(folder), io)
            try:
                yield tier
            finally:
                tier.close()


def skipped(tier: SsdTier) -> int:
    """Everything that was counted as not served, at the start or later."""
    found = tier.recovered
    return found.torn + found.foreign + found.misplaced + found.stale + found.corrupt + tier.stats().corrupt


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 11),
    in_header=st.booleans(),
    at=st.integers(0, 2 * PAGE - 1),
    length=st.sampled_from([1, 1, 16, 512, PAGE]),
    zeros=st.booleans(),
)
def test_damage_anywhere_costs_the_one_object_it_hits(io, full_image, n, in_header, at, length, zeros):
    image, places = full_image
    size = PAGE if in_header else 2 * PAGE
    start = places[n][0 if in_header else 1] + at % size
    end = min(start + length, places[n][0 if in_header else 1] + size)
    damaged = bytearray(image)
    damaged[start:end] = bytes(end - start) if zeros else bytes(b ^ 0x5A for b in image[start:end])
    with tier_of(io, bytes(damaged)) as tier:
        hits = [m for m in range(12) if served(tier, m).hit]
        if bytes(damaged) == image:  # zeros where zeros were
            assert hits == list(range(12))
            return
        assert hits == [m for m in range(12) if m != n]
        blank = not any(damaged[places[n][0] : places[n][0] + PAGE])
        assert skipped(tier) == (not blank)
        assert key(n) not in tier


@settings(deadline=None, max_examples=20)
@given(st.integers(PAGE, GEOMETRY.file_bytes))
def test_a_file_cut_anywhere_serves_what_lies_before_the_cut_and_is_whole_again(io, full_image, cut):
    image, places = full_image
    with tier_of(io, image[:cut]) as tier:
        for n, (header, start) in places.items():
            assert served(tier, n).hit == (start + 2 * PAGE <= cut and header + PAGE <= cut)
        assert Path(tier.config.path, FILE_NAME).stat().st_size == GEOMETRY.file_bytes
        put(tier, 50)
        assert served(tier, 50).hit


@settings(deadline=None, max_examples=20)
@given(st.integers())
def test_random_bytes_over_the_whole_file_are_never_served(io, full_image, seed):
    image, _ = full_image
    chance = random.Random(seed)
    damaged = bytearray(image)
    for _ in range(200):
        damaged[chance.randrange(PAGE, len(image) - PAGE)] ^= chance.randrange(1, 256)
    with tier_of(io, bytes(damaged)) as tier:
        hits = sum(served(tier, n).hit for n in range(12))
        assert hits + skipped(tier) >= 12, "one of them was neither served nor counted"


def test_a_header_of_another_tier_or_codec_is_skipped_and_counted(io, full_image):
    image, places = full_image
    damaged = bytearray(image)
    other = Record(
        ObjectHeader(key(0), PAGE, b"c" * 16), b"o" * 16, 1 << 60, 0, 0, GEOMETRY.objects_offset(0)
    )
    damaged[places[0][0] : places[0][0] + PAGE] = encode_record(other)
    page = damaged[places[1][0] : places[1][0] + PAGE]
    page[32 + 48], page[16:32] = 9, bytes(16)
    page[16:32] = xxh3_128_digest(page)
    damaged[places[1][0] : places[1][0] + PAGE] = page
    with tier_of(io, bytes(damaged)) as tier:
        assert (tier.recovered.misplaced, tier.recovered.foreign) == (1, 1)
        assert [served(tier, n).hit for n in range(4)] == [False, False, True, True]


def test_bytes_that_look_like_a_header_are_an_objects_own_affair(open_tier, tmp_path):
    """A user may store anything: a forged header inside an object must never become an object."""
    tier = open_tier()
    forged = Record(
        ObjectHeader(key(66), PAGE, block_checksum(key(66), content(6, PAGE))),
        tier._index.tier,
        1 << 60,
        0,
        1,
        GEOMETRY.objects_offset(0) + PAGE,
    )
    data = encode_record(forged) + content(6, PAGE)
    for n in range(4):
        tier.put(key(n), memory(data), block_checksum(key(n), data))
    tier.close()
    again = open_tier()
    assert again.recovered.objects == 4
    assert key(66) not in again


class PowerCut:
    """Knows what is surely on the disk, and every write since the last sync: a cut keeps any part of them."""

    def __init__(self, monkeypatch, image: bytes) -> None:
        self.durable = bytearray(image)
        self.unsynced: list[tuple[int, bytes]] = []  # pages
        move = DirectFile.move

        def recorded(file, op, offset, views, bounce):
            move(file, op, offset, views, bounce)
            if op is Opcode.WRITE:
                self.wrote(offset, b"".join(views))

        monkeypatch.setattr(DirectFile, "move", recorded)
        monkeypatch.setattr(DirectFile, "sync", lambda file: self.sync())

    def wrote(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), PAGE):
            self.unsynced.append((offset + at, data[at : at + PAGE]))

    def sync(self) -> None:
        for offset, data in self.unsynced:
            self.durable[offset : offset + len(data)] = data
        self.unsynced.clear()

    def image(self, chance: random.Random) -> bytes:
        after = bytearray(self.durable)
        for offset, data in chance.sample(self.unsynced, len(self.unsynced)):  # in any order
            fate = chance.choice(["kept", "kept", "lost", "torn"])
            sectors = range(0, len(data), 512) if fate != "lost" else ()
            for at in sectors:
                if fate == "kept" or chance.random() < 0.5:
                    after[offset + at : offset + at + 512] = data[at : at + 512]
        return bytes(after)


def records(tier: SsdTier) -> dict[bytes, Record]:
    return {name: entry.record for name, entry in tier._index._entries.items()}


steps = st.lists(
    st.tuples(st.just("put"), st.integers(0, 15))
    | st.tuples(st.just("many"), st.integers(0, 15))
    | st.tuples(st.just("remove"), st.integers(0, 15))
    | st.tuples(st.sampled_from(["sync", "maintain"]), st.just(0)),
    min_size=5,
    max_size=40,
)


@settings(deadline=None, max_examples=40)
@given(steps, st.integers())
def test_a_power_cut_at_any_point_leaves_only_whole_objects_and_all_that_was_synced(io, plan, seed):
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        capture_logs(),
    ):
        tier = SsdTier.open(config(folder), io)
        cut = PowerCut(patch, Path(folder, FILE_NAME).read_bytes())
        synced: dict[bytes, Record] = {}
        for what, n in plan:
            if what == "put":
                put(tier, n)
            elif what == "many":
                tier.put_many([item(m % 16) for m in range(n, n + 3)])
            elif what == "remove":
                tier.remove([key(n)])
                synced.pop(key(n), None)
            elif what == "maintain":
                tier.maintain()
            else:
                tier.sync()
                synced = records(tier)
        now = records(tier)
        promised = {name for name, record in synced.items() if now.get(name) == record}  # not given up since
        image = cut.image(random.Random(seed))
        patch.undo()
        tier.close()
        with tier_of(io, image) as again:
            assert promised <= set(again.keys()), "a sync had promised it"
            for n in range(16):
                got = served(again, n)
                assert got.error is None, "recovery took over a torn object"


# ---------------------------------------------------------------- whose file it is


def test_two_processes_never_open_the_same_tier(open_tier, tmp_path):
    open_tier()
    script = """
import sys
from kvstore.ssd.tier import SsdConfig, SsdTier
from mooncake.core.errors import ConfigError
from transfer.file import FileIO
try:
    SsdTier.open(SsdConfig(node="n1", path=sys.argv[1], capacity_bytes=1 << 30), FileIO())
except ConfigError as error:
    print(error)
"""
    argv = [sys.executable, "-c", script, str(tmp_path)]
    said = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "another process has it open" in said


def test_a_tier_can_be_opened_again_once_it_was_closed_or_failed_to_open(open_tier):
    with pytest.raises(ConfigError):
        open_tier(free_segments=99)
    open_tier().close()
    open_tier()


def test_the_file_of_another_node_is_refused_by_name(open_tier):
    open_tier().close()
    with pytest.raises(ConfigError, match=r"belongs to node 'n1', this is 'n2'; remove .*objects"):
        open_tier(node="n2")


def test_the_file_of_another_version_is_refused(open_tier, tmp_path):
    open_tier().close()
    for offset in (0, GEOMETRY.file_bytes - PAGE):
        page = bytearray(Path(tmp_path, FILE_NAME).read_bytes()[offset : offset + PAGE])
        page[8], page[16:32] = 2, bytes(16)
        page[16:32] = xxh3_128_digest(page)
        overwrite(tmp_path, offset, page)
    with pytest.raises(ConfigError, match="another version; remove"):
        open_tier()


def test_other_sizes_than_the_files_are_refused_with_both(open_tier):
    open_tier().close()
    with pytest.raises(ConfigError, match=r"has 4 segments of 65536 .* ask for 5 of 65536"):
        open_tier(capacity_bytes=GEOMETRY.file_bytes + SEGMENT)


def test_one_damaged_file_header_is_repaired_from_the_other(open_tier, tmp_path):
    tier = open_tier()
    put(tier, 1)
    tier.close()
    for offset in (0, GEOMETRY.file_bytes - PAGE):
        flip(tmp_path, offset + 100)
        again = open_tier()
        assert served(again, 1).hit
        again.close()


def test_a_file_without_a_sound_header_is_refused_not_overwritten(open_tier, tmp_path):
    strange = b"somebody's own file"
    Path(tmp_path, FILE_NAME).write_bytes(strange)
    with pytest.raises(ConfigError, match="damaged, or it is no file of ours"):
        open_tier()
    assert Path(tmp_path, FILE_NAME).read_bytes() == strange


def test_a_start_that_was_killed_while_it_made_the_file_is_no_obstacle(open_tier, tmp_path):
    Path(tmp_path, FILE_NAME).with_suffix(".new").write_bytes(b"half")
    put(open_tier(), 1)
    assert os.listdir(tmp_path) == [FILE_NAME]


# ---------------------------------------------------------------- sick disks


def test_a_disk_without_room_for_the_file_is_named_and_nothing_is_left(open_tier, tmp_path):
    with (
        file_size_limit(GEOMETRY.file_bytes // 2),
        pytest.raises(CapacityError, match=r"ssd tier .* bytes wanted"),
    ):
        open_tier()
    assert os.listdir(tmp_path) == []
    open_tier()


def test_a_disk_that_fills_up_refuses_some_puts_and_goes_on(open_tier):
    now = [0.0]
    tier = open_tier(clock=lambda: now[0])
    put(tier, 1)
    # what lies behind the first segment cannot be written
    with file_size_limit(PAGE + SEGMENT), capture_logs():
        results = tier.put_many([item(n) for n in range(2, 8)])
        assert results[:3] == [None] * 3
        assert all(isinstance(error, CapacityError) for error in results[3:])
        assert served(tier, 1).hit
    with pytest.raises(CapacityError, match="full"):
        put(tier, 9)
    assert tier.stats().write_errors == 3, "a full disk is not asked again at once"
    now[0] += FULL_PAUSE_S
    put(tier, 9)
    assert all(served(tier, n).hit for n in (1, 2, 3, 4, 9))
    assert not served(tier, 7).hit


def test_a_read_only_disk_is_refused_at_the_start(open_tier, monkeypatch):
    failing(monkeypatch, "posix_fallocate", errno.EROFS)
    with pytest.raises(ConfigError, match=r"Read-only file system; .* start without the ssd tier"):
        open_tier()


def test_a_directory_that_cannot_be_made_is_refused(io, tmp_path):
    Path(tmp_path, "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        SsdTier.open(config(tmp_path / "file" / "tier"), io)


def test_a_disk_that_turns_read_only_ends_puts_at_once_with_the_reason_and_serves_on(open_tier, monkeypatch):
    tier = open_tier()
    put(tier, 1)
    with capture_logs() as logs, monkeypatch.context() as patch:
        failing(patch, "pwritev", errno.EROFS)
        with pytest.raises(ConfigError, match="Read-only file system"):
            put(tier, 2)
    with pytest.raises(ConfigError, match="nothing is written from now on, what is there is still served"):
        put(tier, 3)
    assert served(tier, 1).hit
    assert not served(tier, 2).hit
    assert [entry["event"] for entry in logs] == ["ssd.writes_disabled"]


def test_only_many_failed_writes_in_a_row_end_writing(open_tier, monkeypatch):
    tier = open_tier(capacity_bytes=GEOMETRY.file_bytes + 8 * SEGMENT)

    def fail(count: int) -> None:
        with capture_logs(), monkeypatch.context() as patch:
            failing(patch, "pwritev", errno.EIO)
            for n in range(count):
                with pytest.raises(IntegrityError):
                    put(tier, 100 + n)

    fail(WRITE_ERRORS_MAX - 1)
    put(tier, 1)
    fail(WRITE_ERRORS_MAX - 1)
    assert tier.write_error is None
    fail(1)
    assert isinstance(tier.write_error, IntegrityError)
    assert served(tier, 1).hit


def test_a_sector_that_cannot_be_read_costs_its_object(open_tier, monkeypatch):
    tier = open_tier()
    put(tier, 1)
    put(tier, 2)
    with capture_logs(), monkeypatch.context() as patch:
        failing(patch, "preadv", errno.EIO)
        assert isinstance(served(tier, 1).error, IntegrityError)
    assert not served(tier, 1).hit
    assert served(tier, 2).hit
    assert tier.stats().corrupt == 1


def test_headers_that_cannot_be_read_at_the_start_cost_their_segment_only(open_tier, monkeypatch):
    tier = open_tier()
    for n in range(8):
        put(tier, n)
    tier.close()
    real = os.preadv

    def read(fd, views, offset):
        if offset == GEOMETRY.header_offset(0, 0):
            raise OSError(errno.EIO, "gone")
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", read)
    again = open_tier()
    assert again.recovered.torn == GEOMETRY.slots
    assert sorted(again.keys()) == [key(n) for n in range(4, 8)]
    for n in range(20, 40):
        put(again, n)  # the segment is cleared and used again
        assert served(again, n).hit


def test_a_failed_sync_is_told_and_tried_again(open_tier, monkeypatch):
    tier = open_tier()
    put(tier, 1)
    with monkeypatch.context() as patch:
        failing(patch, "fdatasync", errno.EIO)
        assert not tier.sync()
    assert tier.sync()


def test_a_segment_that_could_not_be_cleared_is_not_reused(open_tier, monkeypatch):
    tier = open_tier()
    for n in range(13):
        put(tier, n)
    with capture_logs(), monkeypatch.context() as patch:
        failing(patch, "pwritev", errno.EIO)
        tier.maintain()
    assert tier.stats().free_segments == 0
    tier.maintain()
    assert tier.stats().free_segments == 1


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_hanging_disk_is_left_alone_until_it_lets_go_of_the_memory(open_tier, monkeypatch, call):
    tier = open_tier(deadline_s=0.05)
    put(tier, 1)
    go, real = threading.Event(), getattr(os, call)

    def hang(*args):
        assert go.wait(30)
        return real(*args)

    with capture_logs(), monkeypatch.context() as patch:
        patch.setattr(os, call, hang)
        view = memory(2 * PAGE)
        error = tier.get(key(1), view).error if call == "preadv" else tier.put_many([item(2)])[0]
        assert isinstance(error, PeerTimeout)
        assert [v.nbytes for v in tier.unsettled] == [2 * PAGE]
        assert served(tier, 1) == type(served(tier, 1))(), "a miss, at once"
        with pytest.raises(CapacityError, match="hangs"):
            put(tier, 3)
        go.set()
        while tier.unsettled:
            threading.Event().wait(0.001)
    put(tier, 2)
    assert served(tier, 1).hit
    assert served(tier, 2).hit
    for n in range(10, 60):
        put(tier, n)  # every segment can be cleared: nothing is held for ever


def test_a_closed_tier_misses_and_refuses(open_tier):
    tier = open_tier()
    put(tier, 1)
    tier.close()
    tier.close()
    assert served(tier, 1).error is None
    assert not served(tier, 1).hit
    assert tier.remove([key(1)]) == 0
    with pytest.raises(RequestError, match="closed"):
        put(tier, 2)
