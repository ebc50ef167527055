"""An engine of two ranks: each moves its own shares of blocks, and a block is there if both shares are."""

import time

import numpy as np
import pytest

from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core.keys import share_key, share_keys
from mooncake.worker.connector_meta import LoadJob, StepMeta
from mooncake.worker.connector_scheduler import SchedulerHalf
from mooncake.worker.connector_worker import WorkerHalf
from mooncake.worker.layout import PagedKv
from tests.unit.worker.fakes import BLOCK_SIZE, ROOT, FakePool, FakePulse, FakeRequest, step_output

RANKS = 2
LAYERS = ["a", "b"]
PAGES = [16, 24]
BLOCKS = 64
PATIENT_S = 5.0
PROMPT = list(range(4 * BLOCK_SIZE + 3))


class Rank:
    """A worker half over numpy pages."""

    def __init__(self, pool: FakePool, rank: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.kv = PagedKv(LAYERS, [random.integers(0, 256, (BLOCKS, p), dtype=np.uint8) for p in PAGES])
        self.pulse = FakePulse()
        self.half = WorkerHalf(pool, self.pulse, rank, RANKS)
        self.half._kv = self.kv

    def step(self, meta: StepMeta) -> tuple[set[str], set[int]]:
        self.half.begin_step(meta)
        self.half.start_loads()
        for layer in LAYERS:
            self.half.load_layer(layer)
            self.half.save_layer(layer)
        self.half.end_step()
        return self.half.outcome()

    def block(self, block_id: int) -> bytes:
        return b"".join(page[block_id].tobytes() for page in self.kv.pages)


class Engine:
    """Both halves, driven as vLLM drives them; outcomes of ranks are put together as its aggregator does."""

    def __init__(self, pool: FakePool, seed: int) -> None:
        self.pool, self.pulse = pool, FakePulse()
        self.half = SchedulerHalf(pool, ROOT, BLOCK_SIZE, "async", True, self.pulse, ranks=RANKS)
        self.half.bind_block_ids(lambda _: (list(range(BLOCKS)),))
        self.ranks = [Rank(pool, rank, seed + rank) for rank in range(RANKS)]

    def matched(self, request: FakeRequest) -> int | None:
        self.half.on_new_request(request)
        return self.half.matched(request, 0)[0]

    def compute(self, request: FakeRequest) -> None:
        """Compute the whole prompt in one step and save it."""
        self.half.on_new_request(request)
        meta = self.half.step(step_output({request.request_id: (0, len(request.prompt_token_ids))}))
        for rank in self.ranks:
            rank.step(meta)

    def begin_load(self, request: FakeRequest) -> StepMeta:
        extra = self.matched(request)
        assert extra
        self.half.allocated(request, list(range(BLOCKS)), extra)
        return self.half.step(step_output())

    def load(self, request: FakeRequest) -> set[int]:
        """Load what is there; return the ids of bad blocks."""
        meta = self.begin_load(request)
        missing, invalid = set(range(RANKS)), set()
        for rank in self.ranks:
            assert rank.step(meta)[1] <= set(range(BLOCKS))
        end_s = time.monotonic() + PATIENT_S
        while missing:
            assert time.monotonic() < end_s, "the load never ended"
            for number, rank in enumerate(self.ranks):
                finished, bad = rank.half.outcome()
                invalid |= bad
                missing -= {number} if finished else set()
                self.half.loaded([], bad)
            time.sleep(0.001)
        self.half.loaded([request.request_id], set())
        return invalid

    def close(self) -> None:
        for rank in self.ranks:
            rank.half.close()


@pytest.fixture
def engines():
    """Two engines on one pool; what the first has computed is for the second to load."""
    pool = FakePool(block_bytes=sum(PAGES))
    engines = Engine(pool, 1), Engine(pool, 10)
    yield engines
    for engine in engines:
        engine.close()


def prefill(request_id: str = "p") -> FakeRequest:
    return FakeRequest(PROMPT, leg="prefill", request_id=request_id)


def decode(request_id: str = "d") -> FakeRequest:
    return FakeRequest(PROMPT, leg="decode", request_id=request_id)


def test_every_rank_gets_back_what_the_same_rank_has_saved_tail_included(engines):
    first, second = engines
    first.compute(prefill())
    assert sorted(first.pool.committed) == sorted(share_keys([*prefill().full, prefill().tail], RANKS))
    assert second.load(decode()) == set()
    for mine, theirs in zip(second.ranks, first.ranks, strict=True):
        assert [mine.block(n) for n in range(5)] == [theirs.block(n) for n in range(5)]
    assert second.ranks[0].block(0) != second.ranks[1].block(0)
    assert second.pulse["hit_tokens"] == len(PROMPT)


def test_shares_are_looked_up_block_by_block(engines):
    _, engine = engines
    engine.matched(decode())
    ((keys, *_),) = engine.pool.lookups
    assert keys == share_keys([*decode().full, decode().tail], RANKS)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_block_without_one_of_its_shares_is_not_there_nor_is_what_follows(engines, rank):
    first, second = engines
    first.compute(prefill())
    del first.pool.held[share_key(prefill().full[2], rank)]
    assert second.matched(decode()) == 2 * BLOCK_SIZE


def test_a_single_share_is_nothing_and_leaves_no_lease(engines):
    first, second = engines
    first.compute(prefill())
    del first.pool.held[share_key(prefill().full[0], 1)]
    request = decode()
    assert second.matched(request) == 0
    second.half.allocated(request, list(range(BLOCKS)), 0)
    assert not second.pool.leases


def test_the_lease_is_held_until_the_last_rank_has_loaded(engines):
    first, second = engines
    first.compute(prefill())
    meta = second.begin_load(decode())
    second.ranks[0].step(meta)
    end_s = time.monotonic() + PATIENT_S
    while not second.ranks[0].half.outcome()[0]:
        assert time.monotonic() < end_s
    second.half.loaded([], set())  # as vLLM says it while a rank is missing
    assert second.pool.leases
    second.half.loaded(["d"], set())
    assert not second.pool.leases


def test_the_lease_of_a_load_outlives_a_request_that_is_aborted_meanwhile(engines):
    first, second = engines
    first.compute(prefill())
    second.begin_load(decode())
    second.half.finished("d")
    assert second.pool.leases, "ranks still read these bytes"
    second.half.loaded(["d"], set())
    assert not second.pool.leases


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_bad_share_makes_its_block_bad_alone_and_is_saved_anew(engines, rank):
    first, second = engines
    first.compute(prefill())
    bad = share_key(prefill().full[2], rank)
    first.pool.memory[first.pool.held[bad].offset + 5] ^= 1
    assert second.load(decode()) == {2}
    assert second.pool.bad == [bad]
    assert second.ranks[rank].pulse["bad_blocks"] == 1
    assert second.ranks[1 - rank].pulse["bad_blocks"] == 0
    assert second.pulse["failed_loads"] == 1
    del second.pool.committed[:]
    meta = second.half.step(step_output({"d": (2 * BLOCK_SIZE, len(PROMPT) - 2 * BLOCK_SIZE)}))
    for one in second.ranks:
        one.step(meta)
    assert second.pool.committed == [bad], "the share that was good is kept"


def test_a_load_that_two_ranks_report_as_failed_fails_once(engines):
    first, second = engines
    first.compute(prefill())
    for rank in range(RANKS):
        bad = share_key(prefill().full[1], rank)
        first.pool.memory[first.pool.held[bad].offset] ^= 1
    assert second.load(decode()) == {1}
    assert second.pulse["failed_loads"] == 1


def test_blocks_are_handed_over_with_the_shares_of_all_ranks(engines):
    first, second = engines
    request = prefill()
    request.sampling_params.extra_args["kv_transfer_params"]["mooncake"]["target"] = "there"
    first.compute(request)
    given = [key for keys, node in first.pool.handed_over for key in keys if node == "there"]
    assert sorted(given) == sorted(share_keys([*request.full, request.tail], RANKS))
    del first.pool.handed_over[:]
    request.request_id = "again"
    second.matched(request)  # found here: nothing is saved, all is handed over at once
    assert second.pool.handed_over == [(share_keys(request.full, RANKS), "there")]


def test_a_prompt_longer_than_one_look_up_may_ask_for_is_looked_up_from_its_start(engines):
    _, engine = engines
    blocks = KEYS_PER_REQUEST_MAX // RANKS + 5
    request = FakeRequest(list(range(blocks * BLOCK_SIZE + 1)), leg="decode")
    engine.matched(request)
    ((keys, *_),) = engine.pool.lookups
    assert len(keys) == KEYS_PER_REQUEST_MAX
    assert keys == share_keys(request.full[: blocks - 5], RANKS)


def test_each_rank_takes_its_part_of_a_step():
    keys = [bytes([n]) * 32 for n in range(3)]
    blocks: list = [f"{n}/{rank}" for n in range(3) for rank in range(RANKS)]
    meta = StepMeta(async_loads=[LoadJob("r", keys, blocks, [7, 8, 9], 0)])
    (job,) = meta.share(1, RANKS).async_loads
    assert job.blocks == ["0/1", "1/1", "2/1"]
    assert job.block_ids == [7, 8, 9]
    assert job.keys == [share_key(key, 1) for key in keys]
