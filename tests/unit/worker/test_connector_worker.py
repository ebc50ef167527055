"""Pages travel between engine and pool unchanged; what is not right is recomputed, never used."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import CapacityError, IntegrityError, PeerTimeout
from mooncake.core.messages import Block
from mooncake.worker.connector_meta import LoadJob, SaveJob, StepMeta
from mooncake.worker.connector_worker import WorkerHalf
from mooncake.worker.layout import PagedKv
from tests.unit.worker.fakes import FakePool, FakePulse

LAYERS = ["a", "b", "c"]
PAGES = [16, 8, 24]
BLOCKS = 8
PATIENT_S = 5.0


def key(n: int) -> bytes:
    return n.to_bytes(32, "little")


class Engine:
    """A worker half over numpy pages, driven as vLLM's model runner drives it."""

    def __init__(self, pool: FakePool | None = None, seed: int = 1) -> None:
        random = np.random.default_rng(seed)
        self.kv = PagedKv(LAYERS, [random.integers(0, 256, (BLOCKS, p), dtype=np.uint8) for p in PAGES])
        self.pool, self.pulse = pool or FakePool(block_bytes=sum(PAGES)), FakePulse()
        self.half = WorkerHalf(self.pool, self.pulse)
        self.half._kv = self.kv

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.half.close()
        assert not self.half._loader.is_alive()

    def step(self, *, layers: list[str] = LAYERS, end: bool = True, **jobs) -> tuple[set[str], set[int]]:
        """Run one step over `layers`; without `end` the forward pass breaks off."""
        self.half.begin_step(StepMeta(**jobs))
        self.half.start_loads()
        for layer in layers:
            self.half.load_layer(layer)
            self.half.save_layer(layer)
        if end:
            self.half.end_step()
        return self.half.outcome()

    def save(self, *pairs: tuple[int, int]) -> None:
        self.step(saves=[save(*pairs)])

    def load(self, mode: str, *jobs: LoadJob) -> tuple[set[str], set[int]]:
        """Load in one step, or by the loader thread; return (finished, invalid)."""
        if mode == "layerwise":
            return self.step(sync_loads=list(jobs))
        finished, invalid = self.step(async_loads=list(jobs), layers=[])
        end_s = time.monotonic() + PATIENT_S
        while len(finished) < len(jobs):
            assert time.monotonic() < end_s, "the load never ended"
            time.sleep(0.001)
            more, bad = self.half.outcome()
            finished, invalid = finished | more, invalid | bad
        return finished, invalid

    def block(self, block_id: int) -> bytes:
        return b"".join(page[block_id].tobytes() for page in self.kv.pages)

    def job(self, *pairs: tuple[int, int], request_id: str = "r") -> LoadJob:
        """Return a leased job: (key number, block id) pairs."""
        keys = [key(n) for n, _ in pairs]
        answer = self.pool.finish_acquired(self.pool.begin_acquire(keys, 1.0, 0.0), 0.0)
        assert len(answer.blocks) == len(pairs)
        return LoadJob(request_id, keys, answer.blocks, [b for _, b in pairs], answer.lease_id)


def save(*pairs: tuple[int, int]) -> SaveJob:
    return SaveJob([key(n) for n, _ in pairs], [b for _, b in pairs])


@pytest.fixture
def engine():
    with Engine() as engine:
        yield engine


@pytest.fixture
def reader(engine):
    """A second engine on the pool in which `engine` has saved its blocks 0, 1, 2 as keys 0, 1, 2."""
    engine.save((0, 0), (1, 1), (2, 2))
    with Engine(engine.pool, seed=2) as reader:
        yield reader


MODES = pytest.mark.parametrize("mode", ["async", "layerwise"])

# ---------------------------------------------------------------- good bytes


@MODES
def test_what_one_engine_saves_another_loads_byte_for_byte(mode, engine, reader):
    untouched = reader.block(3)
    finished, invalid = reader.load(mode, reader.job((0, 5), (1, 0), (2, 7)))
    assert invalid == set()
    assert finished == ({"r"} if mode == "async" else set())
    assert [reader.block(b) for b in (5, 0, 7)] == [engine.block(b) for b in (0, 1, 2)]
    assert reader.block(3) == untouched
    assert not reader.pool.leases
    assert (reader.pulse["load_blocks"], reader.pulse["load_bytes"]) == (3, 3 * sum(PAGES))
    assert (engine.pulse["save_blocks"], engine.pulse["save_bytes"]) == (3, 3 * sum(PAGES))


@settings(deadline=None, max_examples=25)
@given(data=st.data(), mode=st.sampled_from(["async", "layerwise"]))
def test_any_blocks_in_any_order_come_back_as_they_were(data, mode):
    sources = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1))
    targets = data.draw(st.permutations(range(BLOCKS)))[: len(sources)]
    with Engine() as writer, Engine(writer.pool, seed=2) as reader:
        writer.save(*((100 + b, b) for b in sources))
        assert (
            reader.load(mode, reader.job(*((100 + b, t) for b, t in zip(sources, targets, strict=True))))[1]
            == set()
        )
        assert [reader.block(t) for t in targets] == [writer.block(b) for b in sources]


def test_a_layerwise_load_writes_each_layer_before_its_attention_and_no_other(engine, reader):
    before = [page[4].copy() for page in reader.kv.pages]
    reader.half.begin_step(StepMeta(sync_loads=[reader.job((0, 4))]))
    reader.half.start_loads()
    for index, layer in enumerate(LAYERS):
        reader.half.load_layer(layer)
        for other, page in enumerate(reader.kv.pages):
            expected = engine.kv.pages[other][0] if other <= index else before[other]
            assert (page[4] == expected).all()
    assert reader.pool.leases, "the lease protects the source until it is verified"
    reader.half.end_step()
    assert not reader.pool.leases


def test_several_loads_of_one_step_are_concluded_one_by_one(reader):
    jobs = [reader.job((n, n), request_id=f"r{n}") for n in range(3)]
    assert reader.load("async", *jobs) == ({"r0", "r1", "r2"}, set())


def test_an_outcome_is_told_once(reader):
    assert reader.load("async", reader.job((0, 0)))[0] == {"r"}
    assert reader.half.outcome() == (set(), set())


def test_steps_without_jobs_touch_nothing(engine):
    assert engine.step() == (set(), set())
    assert not engine.pulse.counts


# ---------------------------------------------------------------- bad bytes


def corrupt(pool: FakePool) -> None:
    pool.memory[pool.held[key(1)].offset + 20] ^= 1


def swap(pool: FakePool) -> None:
    """Two index entries point at each other's bytes; checksums travel with the bytes."""
    pool.held[key(1)], pool.held[key(2)] = pool.held[key(2)], pool.held[key(1)]


def stale(pool: FakePool) -> None:
    """The slot was evicted and holds another block now, whole and with its own checksum."""
    other = bytes(sum(PAGES))
    offset = pool.held[key(1)].offset
    pool.put(key(77), other)
    pool.memory[offset : offset + len(other)] = other
    pool.held[key(1)] = Block(offset, len(other), pool.held[key(77)].checksum)


def truncated(pool: FakePool) -> None:
    block = pool.held[key(1)]
    pool.held[key(1)] = Block(block.offset, block.size_bytes - 30, block.checksum)


def one_byte(pool: FakePool) -> None:
    """A single byte would fill a whole page by numpy's broadcasting."""
    block = pool.held[key(1)]
    pool.held[key(1)] = Block(block.offset, 17, block.checksum)


def too_long(pool: FakePool) -> None:
    block = pool.held[key(1)]
    pool.held[key(1)] = Block(block.offset, block.size_bytes + 1, block.checksum)


def outside(pool: FakePool) -> None:
    block = pool.held[key(1)]
    pool.held[key(1)] = Block(len(pool.memory) - 1, block.size_bytes, block.checksum)


@MODES
@pytest.mark.parametrize(
    ("damage", "bad"),
    [
        (corrupt, {1}),
        (swap, {1, 2}),
        (stale, {1}),
        (truncated, {1}),
        (one_byte, {1}),
        (too_long, {1}),
        (outside, {1}),
    ],
)
def test_a_block_that_is_not_what_was_committed_is_reported_and_the_others_count(mode, damage, bad, reader):
    damage(reader.pool)
    job = reader.job((0, 5), (1, 6), (2, 7))
    finished, invalid = reader.load(mode, job)
    assert invalid == {5 + n for n in bad}
    assert finished == ({"r"} if mode == "async" else set())
    assert set(reader.pool.bad) == {key(n) for n in bad}
    assert not reader.pool.leases
    assert reader.pulse["bad_blocks"] == len(bad)
    assert reader.pulse["load_blocks"] == 3 - len(bad)


@MODES
@pytest.mark.parametrize(
    "error", [PeerTimeout("t"), IntegrityError("i"), ValueError("closed"), OSError("io")]
)
def test_a_source_that_cannot_be_read_is_a_bad_load_not_an_engine_failure(mode, error, reader):
    job = reader.job((0, 5), (1, 6))
    reader.pool.errors["view"] = error
    assert reader.load(mode, job)[1] == {5, 6}
    reader.pool.errors.clear()
    assert reader.load(mode, LoadJob("next", [], [], [], reader.job((2, 0)).lease_id))[1] == set()


@MODES
@pytest.mark.parametrize("method", ["release", "report_bad"])
def test_a_pool_that_does_not_answer_reports_does_not_disturb_the_outcome(mode, method, reader):
    corrupt(reader.pool)
    job = reader.job((0, 5), (1, 6))
    reader.pool.errors[method] = PeerTimeout("t")
    finished, invalid = reader.load(mode, job)
    assert invalid == {6}
    assert finished == ({"r"} if mode == "async" else set())
    assert reader.pulse["bad_blocks"] == 1


@pytest.mark.parametrize("method", ["view", "release"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("another"), MemoryError()])
def test_the_loader_survives_whatever_one_job_throws_at_it(method, error, reader):
    """Else every later load would hang for ever."""
    jobs = [reader.job((0, 5), request_id="one"), reader.job((1, 6), request_id="two")]
    reader.pool.errors[method] = error
    finished, invalid = reader.load("async", jobs[0])
    assert finished == {"one"}
    assert invalid == ({5} if method == "view" else set())
    reader.pool.errors.clear()
    assert reader.load("async", jobs[1]) == ({"two"}, set())


def test_what_was_computed_from_a_bad_block_in_the_same_step_is_not_saved(reader):
    """A layerwise load is verified after attention has read it: blocks behind it are poisoned."""
    corrupt(reader.pool)
    _, invalid = reader.step(sync_loads=[reader.job((0, 5), (1, 6))], saves=[save((10, 7))])
    assert invalid == {6}
    assert key(10) not in reader.pool.held
    assert not reader.pool.tickets
    assert reader.pulse["save_blocks"] == 0


def test_after_a_good_load_the_blocks_of_the_same_step_are_saved(reader):
    reader.step(sync_loads=[reader.job((0, 5))], saves=[save((10, 7))])
    assert key(10) in reader.pool.held


# ---------------------------------------------------------------- saves


def test_blocks_that_the_pool_has_or_cannot_take_are_skipped(engine):
    engine.save((0, 0), (1, 1))
    engine.save((1, 3), (2, 2), (2, 4))
    assert engine.pool.committed == [key(0), key(1), key(2)]
    assert engine.pool.memory[engine.pool.held[key(2)].offset :][: sum(PAGES)] == engine.block(2)


@pytest.mark.parametrize("method", ["begin_reserve", "finish_reserve", "commit"])
def test_a_pool_error_costs_the_save_and_never_raises_into_the_engine(method, engine):
    engine.pool.errors[method] = CapacityError("full")
    engine.save((0, 0))
    assert engine.pool.committed == []
    assert engine.pulse["pool_errors"] == 1
    engine.pool.errors.clear()
    engine.pool.tickets.clear()  # the node's deadline gives them up
    engine.save((1, 1))
    assert engine.pool.committed == [key(1)]


def test_a_pool_that_is_away_is_said_once_until_it_is_back(engine, capsys):
    for _ in range(2):
        engine.pool.errors["begin_reserve"] = PeerTimeout("away")
        for n in range(5):
            engine.save((n, n))
        told = capsys.readouterr()
        assert (told.out + told.err).count("reserve_failed") == 1
        engine.pool.errors.clear()
        engine.save((1, 1))
    assert engine.pulse["pool_errors"] == 10


def test_a_step_that_outlasts_its_reservation_is_counted_and_said(engine, capsys):
    engine.pool.late = True
    engine.save((0, 0), (1, 1))
    assert engine.pool.committed == []
    assert (engine.pulse["late_saves"], engine.pulse["save_blocks"]) == (2, 0)
    told = capsys.readouterr()  # where logs go depends on who configured them first
    assert "saved_too_late" in told.out + told.err


@pytest.mark.parametrize("layers", [[], LAYERS[:1], LAYERS[:2]])
def test_a_forward_pass_that_broke_off_abandons_its_blocks(layers, engine):
    engine.step(saves=[save((0, 0), (1, 1))], layers=layers)
    assert engine.pool.committed == []
    assert len(engine.pool.abandoned) == 2
    assert not engine.pool.tickets


def test_an_error_of_abandon_never_raises_into_the_engine(engine):
    engine.pool.errors["abandon"] = PeerTimeout("t")
    engine.step(saves=[save((0, 0))], layers=[])
    assert engine.pool.committed == []


@pytest.mark.parametrize("layers", [LAYERS[:1], LAYERS])
def test_blocks_of_a_step_that_never_ended_are_not_committed_by_the_next(layers, engine):
    """Their pages may hold another request's tokens by then."""
    engine.step(saves=[save((0, 0))], layers=layers, end=False)
    engine.kv.pages[0][0] ^= 255
    engine.save((1, 1))
    assert engine.pool.committed == [key(1)]
    assert not engine.pool.tickets


def test_the_order_of_layers_does_not_matter_to_what_is_saved(engine):
    engine.step(saves=[save((0, 3))], layers=LAYERS[::-1])
    assert engine.pool.memory[engine.pool.held[key(0)].offset :][: sum(PAGES)] == engine.block(3)


def test_the_store_learns_where_in_its_prompt_a_lone_save_stands(engine):
    engine.step(saves=[SaveJob([key(0), key(1)], [0, 1], depth=7)])
    engine.step(saves=[SaveJob([key(2)], [2], depth=3), SaveJob([key(3)], [3], depth=4)])
    assert engine.pool.depths == [7, -1]


def test_what_is_saved_is_handed_over_to_the_node_that_decodes_it(engine):
    here, there = save((0, 0)), SaveJob([key(1), key(2)], [1, 2], "n9")
    engine.step(saves=[here, there])
    assert engine.pool.handed_over == [([key(1), key(2)], "n9")]
    engine.pool.late = True
    engine.step(saves=[SaveJob([key(3)], [3], "n9")])
    assert engine.pool.handed_over[1:] == []
