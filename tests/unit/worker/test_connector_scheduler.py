"""What is looked up, loaded and saved, for every leg of a request; nothing here waits or sleeps."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import CapacityError, PeerTimeout, ProtocolError
from mooncake.core.fingerprint import AdapterNames
from mooncake.core.keys import chain, request_root
from mooncake.worker import connector_scheduler
from mooncake.worker.connector_meta import NOTHING
from mooncake.worker.connector_scheduler import HANDOVER_WAIT_S, LEASE_S, LOOKUP_WAIT_S, SchedulerHalf
from tests.unit.worker.fakes import BLOCK_SIZE, ROOT, FakePool, FakePulse, FakeRequest, step_output

MODES = pytest.mark.parametrize("mode", ["async", "layerwise"])


class Clock:
    """time.monotonic of the module under test."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Engine:
    """A scheduler half with its pool and the block ids that vLLM would give."""

    def __init__(self, mode: str = "async", *, save_decoded: bool = True, hold: list[bytes] = ()) -> None:
        self.pool, self.pulse, self.clock = FakePool(), FakePulse(), Clock()
        self.pool.hold(list(hold))
        self.half = SchedulerHalf(self.pool, ROOT, BLOCK_SIZE, mode, save_decoded, self.pulse)
        self.half.bind_block_ids(lambda _: ([100 + i for i in range(64)],))

    def arrive(self, request: FakeRequest, computed: int = 0) -> tuple[int | None, bool]:
        self.half.on_new_request(request)
        return self.half.matched(request, computed)

    def load(self, request: FakeRequest, computed: int = 0):
        """Arrive, match, allocate; return the job of the step, or None."""
        extra, _ = self.arrive(request, computed)
        return self.allocate(request, extra)

    def allocate(self, request: FakeRequest, extra: int):
        self.half.allocated(request, [100 + i for i in range(64)], extra)
        meta = self.half.step(step_output())
        jobs = meta.async_loads + meta.sync_loads
        assert len(jobs) <= 1
        return jobs[0] if jobs else None

    def saves(self, **scheduled: tuple[int, int]) -> list[tuple[bytes, int]]:
        """Run one step of requests id=(computed, scheduled); return the saved (key, block id)."""
        meta = self.half.step(step_output(scheduled))
        return [pair for job in meta.saves for pair in zip(job.keys, job.block_ids, strict=True)]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(connector_scheduler, "time", clock)
    return clock


def prompt(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


# ---------------------------------------------------------------- hits


def test_what_the_store_fetched_for_a_look_up_is_counted_with_its_time():
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    engine.pool.fetched = (4096, 0.25)
    engine.arrive(request)
    assert (engine.pulse["fetch_bytes"], engine.pulse["fetch_seconds"]) == (4096, 0.25)


@MODES
def test_a_miss_loads_nothing_and_leaves_no_lease(mode):
    engine = Engine(mode)
    assert engine.arrive(FakeRequest(prompt(10))) == (0, False)
    assert not engine.pool.leases


@MODES
def test_a_partial_hit_loads_its_blocks_into_the_blocks_that_vllm_gave(mode):
    request = FakeRequest(prompt(14))
    engine = Engine(mode, hold=request.full[:2])
    assert engine.arrive(request) == (8, mode == "async")
    job = engine.allocate(request, 8)
    assert (job.keys, job.block_ids) == (request.full[:2], [100, 101])
    assert job.blocks == [engine.pool.held[key] for key in job.keys]
    assert job.lease_id in engine.pool.leases  # until the worker half has loaded
    assert engine.pulse["hit_tokens"] == 8


def test_an_async_load_may_cover_every_token():
    request = FakeRequest(prompt(8))
    assert Engine("async", hold=request.full).arrive(request) == (8, True)


def test_a_layerwise_load_leaves_one_token_to_compute_but_loads_its_block():
    request = FakeRequest(prompt(8))
    engine = Engine("layerwise", hold=request.full)
    assert engine.arrive(request) == (7, False)
    assert engine.allocate(request, 7).keys == request.full


@MODES
def test_blocks_that_the_engine_has_are_not_loaded_again(mode):
    request = FakeRequest(prompt(14))
    engine = Engine(mode, hold=request.full)
    assert engine.arrive(request, 4) == (8, mode == "async")
    job = engine.allocate(request, 8)
    assert (job.keys, job.block_ids) == (request.full[1:3], [101, 102])


@MODES
@pytest.mark.parametrize("computed", [8, 12])
def test_a_local_hit_as_long_as_the_pools_needs_no_load_and_gives_the_lease_back(mode, computed):
    request = FakeRequest(prompt(14))
    engine = Engine(mode, hold=request.full[:2])
    assert engine.arrive(request, computed) == (0, False)
    assert engine.allocate(request, 0) is None
    assert not engine.pool.leases
    assert len(engine.pool.released) == 1


def test_blocks_behind_a_gap_are_not_a_hit():
    request = FakeRequest(prompt(14))
    assert Engine(hold=[request.full[0], request.full[2]]).arrive(request) == (4, True)


def test_a_prompt_shorter_than_a_block_asks_the_pool_nothing():
    engine = Engine()
    assert engine.arrive(FakeRequest(prompt(3))) == (0, False)
    assert not engine.pool.lookups


@MODES
def test_a_prompt_of_one_token_never_loads(mode):
    """VLLM computes the last token in any case, so it would ask, load and ask again for ever."""
    request = FakeRequest(prompt(1), leg="decode")
    engine = Engine(mode, hold=[request.tail])
    assert engine.arrive(request) == (0, False)
    assert not engine.pool.leases


@pytest.mark.parametrize(("mode", "extra"), [("async", 10), ("layerwise", 9)])
def test_a_decode_leg_loads_the_tail_too(mode, extra):
    request = FakeRequest(prompt(10), leg="decode")
    engine = Engine(mode, hold=[*request.full, request.tail])
    job_extra, _ = engine.arrive(request)
    assert job_extra == extra
    job = engine.allocate(request, extra)
    assert (job.keys, job.block_ids) == ([*request.full, request.tail], [100, 101, 102])


def test_a_decode_leg_of_a_prompt_within_one_block_loads_just_the_tail():
    request = FakeRequest(prompt(3), leg="decode")
    assert Engine(hold=[request.tail]).load(request).keys == [request.tail]


def test_a_decode_leg_without_the_tail_in_the_pool_loads_the_full_blocks():
    request = FakeRequest(prompt(10), leg="decode")
    assert Engine(hold=request.full).arrive(request) == (8, True)


def test_a_tail_whose_full_blocks_are_gone_is_no_hit():
    request = FakeRequest(prompt(10), leg="decode")
    assert Engine(hold=[request.full[0], request.tail]).arrive(request) == (4, True)


@pytest.mark.parametrize("leg", ["prefill", "whole"])
def test_prefill_and_whole_legs_never_load_a_tail(leg):
    request = FakeRequest(prompt(10), leg=leg)
    engine = Engine(hold=[*request.full, request.tail])
    assert engine.arrive(request) == (8, True)
    assert request.tail not in engine.pool.lookups[0][0]


def test_only_a_decode_leg_lets_the_pool_wait_for_blocks_being_written():
    for leg, wait_s in [("decode", HANDOVER_WAIT_S), ("prefill", 0.0), ("whole", 0.0)]:
        engine = Engine()
        engine.arrive(FakeRequest(prompt(10), leg=leg))
        assert engine.pool.lookups[0][1:] == (LEASE_S, wait_s)


# ---------------------------------------------------------------- who is left alone


@pytest.mark.parametrize(
    "changes",
    [{"prompt_token_ids": None}, {"mm_features": ["picture"]}, {"sampling_params": None}],
    ids=["embeddings", "pictures", "pooling"],
)
def test_a_request_whose_tokens_do_not_name_its_bytes_is_left_alone(changes):
    engine = Engine()
    request = FakeRequest(prompt(10))
    for name, value in changes.items():
        setattr(request, name, value)
    assert engine.arrive(request) == (0, False)
    assert engine.allocate(request, 0) is None
    assert engine.saves(r=(0, 10)) == []
    assert not engine.pool.lookups


def test_a_request_that_may_not_read_caches_loads_nothing_but_is_saved():
    request = FakeRequest(prompt(8), skip_reading_prefix_cache=True)
    engine = Engine(hold=request.full[:1])
    assert engine.arrive(request) == (0, False)
    assert not engine.pool.lookups
    assert [key for key, _ in engine.saves(r=(0, 8))] == request.full


def lora_request(folder, weights: bytes) -> SimpleNamespace:
    """vLLM's LoRARequest for an adapter in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return SimpleNamespace(
        lora_name="a", lora_int_id=1, lora_path=str(folder), load_inplace=False, is_3d_lora_weight=False
    )


def test_tenants_and_adapters_never_share_blocks(tmp_path):
    plain = FakeRequest(prompt(8))
    engine = Engine(hold=plain.full)
    adapter = lora_request(tmp_path / "adapter", b"weights")
    root = request_root(ROOT, None, AdapterNames().name_of(adapter))
    assert engine.arrive(FakeRequest(prompt(8), request_id="s", cache_salt="t")) == (0, False)
    assert engine.arrive(FakeRequest(prompt(8), request_id="l", lora_request=adapter)) == (0, False)
    assert [key for key, _ in engine.saves(s=(0, 8))] == chain(request_root(ROOT, "t", None), prompt(8), 4)
    assert [key for key, _ in engine.saves(l=(0, 8))] == chain(root, prompt(8), 4)


def test_an_adapter_that_changed_under_the_engine_uses_no_pool(tmp_path):
    engine = Engine()
    adapter = lora_request(tmp_path / "adapter", b"weights")
    engine.arrive(FakeRequest(prompt(8), request_id="before", lora_request=adapter))
    assert len(engine.saves(before=(0, 8))) == 2
    lora_request(tmp_path / "adapter", b"retrained")
    assert engine.arrive(FakeRequest(prompt(8), request_id="after", lora_request=adapter)) == (0, False)
    assert engine.saves(after=(0, 8)) == []


# ---------------------------------------------------------------- answers that are late or errors


def test_a_pending_answer_means_ask_again_then_the_answer():
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    engine.pool.answering = False
    assert engine.arrive(request) == (None, False)
    assert engine.half.matched(request, 0) == (None, False)
    engine.pool.answering = True
    assert engine.half.matched(request, 0) == (8, True)
    assert len(engine.pool.lookups) == 1


@pytest.mark.parametrize(
    ("leg", "limit_s"), [("whole", LOOKUP_WAIT_S), ("decode", LOOKUP_WAIT_S + HANDOVER_WAIT_S)]
)
def test_an_answer_that_is_too_late_is_a_miss_and_is_never_asked_for_again(clock, leg, limit_s):
    request = FakeRequest(prompt(8), leg=leg)
    engine = Engine(hold=request.full)
    engine.pool.answering = False
    engine.arrive(request)
    clock.now_s += limit_s - 0.01
    assert engine.half.matched(request, 0) == (None, False)
    clock.now_s += 0.02
    assert engine.half.matched(request, 0) == (0, False)
    assert engine.pulse["lookup_timeouts"] == 1
    assert not engine.pool.calls
    engine.pool.answering = True
    assert engine.half.matched(request, 0) == (0, False)
    assert len(engine.pool.lookups) == 1


@pytest.mark.parametrize("error", [PeerTimeout("t"), CapacityError("c"), ProtocolError("p")])
@pytest.mark.parametrize("method", ["begin_acquire", "poll", "finish_acquired"])
def test_a_pool_error_is_a_miss_and_never_raises_into_the_engine(method, error):
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    engine.pool.errors[method] = error
    assert engine.arrive(request) == (0, False)
    assert engine.pulse["pool_errors"] == 1
    engine.pool.errors.clear()
    assert engine.half.matched(request, 0) == (0, False)
    assert [key for key, _ in engine.saves(r=(0, 8))] == request.full


def test_an_error_of_release_never_raises_into_the_engine():
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    engine.arrive(request)
    engine.pool.errors["release"] = PeerTimeout("t")
    engine.half.finished("r")


def test_a_lease_that_is_too_old_is_given_back_and_the_blocks_are_looked_up_again(clock):
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    assert engine.arrive(request) == (8, True)
    clock.now_s += LEASE_S / 2 + 1
    assert engine.half.matched(request, 0) == (None, False)
    assert not engine.pool.leases
    del engine.pool.held[request.full[1]]  # evicted meanwhile
    assert engine.half.matched(request, 0) == (4, True)
    assert len(engine.pool.leases) == 1
    assert len(engine.pool.lookups) == 2


# ---------------------------------------------------------------- loads and their outcome


def test_the_second_allocation_of_an_async_load_keeps_its_job_and_its_lease():
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    extra, _ = engine.arrive(request)
    ids = [100, 101]
    engine.half.allocated(request, ids, extra)
    engine.half.allocated(request, ids, 0)
    (job,) = engine.half.step(step_output()).async_loads
    assert job.lease_id in engine.pool.leases
    assert engine.half.step(step_output()) is NOTHING


@MODES
def test_a_job_is_handed_out_in_one_step_only_and_in_the_right_list(mode):
    request = FakeRequest(prompt(9))
    engine = Engine(mode, hold=request.full)
    extra, _ = engine.arrive(request)
    engine.half.allocated(request, [100, 101, 102], extra)
    meta = engine.half.step(step_output())
    assert (len(meta.async_loads), len(meta.sync_loads)) == ((1, 0) if mode == "async" else (0, 1))
    assert engine.half.step(step_output()) is NOTHING
    assert type(NOTHING)() == NOTHING


@MODES
def test_after_a_failed_load_the_request_never_loads_again_and_its_blocks_are_saved_again(mode):
    """vLLM asks again with 0 computed tokens: loading again would fail again, for ever."""
    request = FakeRequest(prompt(9))
    engine = Engine(mode, hold=request.full)
    engine.load(request)
    engine.half.loaded(["r"], {100})
    assert engine.pulse["failed_loads"] == 1
    for _ in range(3):
        assert engine.half.matched(request, 0) == (0, False)
        assert engine.allocate(request, 0) is None
    assert engine.saves(r=(0, 9)) == [(request.full[0], 100), (request.full[1], 101)]


def test_a_bad_block_of_another_request_does_not_matter():
    one, two = FakeRequest(prompt(8)), FakeRequest(prompt(8, 50), request_id="two")
    engine = Engine(hold=[*one.full, *two.full])
    engine.load(one)
    extra, _ = engine.arrive(two)
    engine.half.allocated(two, [7, 8], extra)
    engine.half.loaded([], {7})
    assert engine.half._requests["two"].no_load
    assert not engine.half._requests["r"].no_load


def test_after_a_finished_load_its_block_ids_mean_nothing_any_more():
    request = FakeRequest(prompt(8))
    engine = Engine(hold=request.full)
    engine.load(request)
    engine.half.loaded({"r"}, set())
    engine.half.loaded([], {100})
    assert engine.pulse["failed_loads"] == 0


def test_outcomes_of_unknown_requests_are_ignored():
    Engine().half.loaded(["gone"], {1, 2})


# ---------------------------------------------------------------- saves


def test_full_blocks_are_saved_when_they_fill_under_chunked_prefill():
    request = FakeRequest(prompt(14))
    engine = Engine()
    engine.load(request)
    assert engine.saves(r=(0, 3)) == []
    assert engine.saves(r=(3, 6)) == [(request.full[0], 100), (request.full[1], 101)]
    assert engine.saves(r=(9, 2)) == []
    assert engine.saves(r=(11, 3)) == [(request.full[2], 102)]


def test_a_save_says_where_in_its_prompt_it_begins():
    engine = Engine()
    engine.load(FakeRequest(prompt(14)))
    steps = [step_output({"r": scheduled}) for scheduled in ((0, 5), (5, 9))]
    assert [job.depth for step in steps for job in engine.half.step(step).saves] == [0, 1]


@settings(deadline=None)
@given(
    length=st.integers(1, 40),
    chunks=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    leg=st.sampled_from(["prefill", "whole", "decode"]),
    held=st.integers(0, 10),
    output=st.integers(0, 12),
)
def test_whatever_the_chunks_each_block_is_saved_once_in_its_place(length, chunks, leg, held, output):
    """Blocks in the pool are not saved; the prompt's tail once, by a prefill leg only."""
    request = FakeRequest(prompt(length), leg=leg)
    held = min(held, length // BLOCK_SIZE)
    engine = Engine("layerwise", hold=request.full[:held])
    loaded = engine.arrive(request)[0]
    job = engine.allocate(request, loaded)
    computed, saved, sizes = loaded, [], iter(chunks)
    while computed < length:
        chunk = min(next(sizes), length - computed)
        saved += engine.saves(r=(computed, chunk))
        computed += chunk
    for token in range(output):
        request.output.append(1000 + token)
        saved += engine.saves(r=(computed, 1))
        computed += 1
    expected = [(key, 100 + i) for i, key in enumerate(request.full[: computed // BLOCK_SIZE])][held:]
    if leg == "prefill" and length % BLOCK_SIZE:
        expected.append((request.tail, 100 + length // BLOCK_SIZE))
    assert sorted(saved) == sorted(expected)
    assert engine.pool.leases == ({job.lease_id} if job else set())


def test_blocks_of_the_local_cache_that_the_pool_does_not_hold_are_saved_too():
    request = FakeRequest(prompt(14))
    engine = Engine(hold=request.full[:1])
    assert engine.load(request, computed=8) is None
    assert engine.saves(r=(8, 6)) == [(request.full[1], 101), (request.full[2], 102)]


def test_the_tail_is_saved_with_the_last_chunk_of_a_prefill_leg():
    request = FakeRequest(prompt(6), leg="prefill")
    engine = Engine()
    engine.load(request)
    assert engine.saves(r=(0, 5)) == [(request.full[0], 100)]
    assert engine.saves(r=(5, 1)) == [(request.tail, 101)]
    request.output.append(7)
    assert engine.saves(r=(6, 1)) == []


def test_a_prompt_of_whole_blocks_has_no_tail_to_save():
    request = FakeRequest(prompt(8), leg="prefill")
    engine = Engine()
    engine.load(request)
    assert [key for key, _ in engine.saves(r=(0, 8))] == request.full


def test_decoded_blocks_get_the_keys_of_the_next_turns_prompt():
    request = FakeRequest(prompt(6), leg="decode", output=[70, 71, 72, 73, 74, 75])
    engine = Engine()
    engine.load(request)
    saved = engine.saves(r=(0, 12))
    next_turn = FakeRequest([*prompt(6), 70, 71, 72, 73, 74, 75, 1, 2], request_id="next")
    assert [key for key, _ in saved] == next_turn.full
    engine.pool.hold([key for key, _ in saved])
    assert engine.arrive(next_turn) == (12, True)


def test_decoded_blocks_are_not_saved_by_a_decode_leg_that_shall_not():
    request = FakeRequest(prompt(6), leg="decode", output=[70, 71])
    engine = Engine(save_decoded=False)
    engine.load(request)
    assert engine.saves(r=(0, 8)) == []


def test_a_block_is_named_only_once_its_tokens_are_known():
    """With speculation more tokens may be scheduled than exist."""
    request = FakeRequest(prompt(6), output=[70])
    engine = Engine()
    engine.load(request)
    assert [key for key, _ in engine.saves(r=(0, 9))] == request.full
    request.output += [71, 72]
    assert [key for key, _ in engine.saves(r=(8, 1))] == request.full[1:2]


def test_a_resumed_request_loads_its_prompt_and_saves_over_the_emitted_tokens():
    request = FakeRequest(prompt(10), leg="decode", output=[70, 71, 72])
    engine = Engine(hold=[*request.full[:2], request.tail])
    job = engine.load(request)
    assert job.keys == [*request.full[:2], request.tail]
    assert engine.pulse["hit_tokens"] == 10
    assert engine.saves(r=(10, 3)) == [(request.full[2], 102)]


def test_the_saves_of_two_requests_in_one_step_are_two_jobs():
    one, two = FakeRequest(prompt(4)), FakeRequest(prompt(4, 9), request_id="two")
    engine = Engine()
    engine.load(one)
    engine.load(two)
    assert len(engine.half.step(step_output({"r": (0, 4)}, {"two": (0, 4)})).saves) == 2


# ---------------------------------------------------------------- preemption


@MODES
def test_a_preempted_request_looks_up_again_and_never_reads_without_a_lease(mode):
    request = FakeRequest(prompt(9))
    engine = Engine(mode, hold=request.full)
    first = engine.load(request)
    engine.half.loaded({"r"}, set())
    engine.pool.release(first.lease_id)  # as the worker half does
    del engine.pool.held[request.full[1]]
    answer = engine.half.matched(request, 0)
    if answer[0] is None:
        answer = engine.half.matched(request, 0)
    assert answer == (4, mode == "async")
    job = engine.allocate(request, 4)
    assert job.lease_id in engine.pool.leases
    assert job.keys == request.full[:1]


def test_a_preempted_request_that_needs_no_load_gives_its_new_lease_back():
    request = FakeRequest(prompt(9))
    engine = Engine(hold=request.full)
    engine.pool.release(engine.load(request).lease_id)
    engine.half.loaded({"r"}, set())
    while (answer := engine.half.matched(request, 8))[0] is None:
        pass
    assert answer == (0, False)
    engine.allocate(request, 0)
    assert not engine.pool.leases


def test_a_preempted_request_that_missed_at_first_finds_what_it_has_saved_itself():
    request = FakeRequest(prompt(6), output=[70, 71])
    engine = Engine()
    assert engine.load(request) is None
    engine.pool.hold([key for key, _ in engine.saves(r=(0, 8))])
    request.output.append(72)
    while (answer := engine.half.matched(request, 0))[0] is None:
        pass
    assert answer == (8, True)


def test_a_preempted_decode_leg_never_takes_its_tail_for_a_full_block():
    """The tail object holds the prompt's tokens only: what was decoded behind them is not in it."""
    request = FakeRequest(prompt(6), leg="decode")
    engine = Engine(hold=[*request.full, request.tail])
    engine.pool.release(engine.load(request).lease_id)
    engine.half.loaded({"r"}, set())
    request.output = [70, 71, 72, 73]
    engine.saves(r=(6, 4))
    while (answer := engine.half.matched(request, 0))[0] is None:
        pass
    assert answer == (6, True)
    job = engine.allocate(request, 6)
    assert job.keys == [request.full[0], request.tail]


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("stage", ["looking up", "leased", "loading", "running", "unknown"])
def test_a_request_that_leaves_leaves_nothing_behind(stage):
    request = FakeRequest(prompt(9), leg="prefill")
    engine = Engine(hold=request.full)
    if stage == "looking up":
        engine.pool.answering = False
        engine.arrive(request)
    elif stage == "leased":
        engine.arrive(request)
    elif stage in ("loading", "running"):
        job = engine.load(request)
        if stage == "running":
            engine.half.loaded({"r"}, set())
            engine.saves(r=(8, 1))
        engine.pool.release(job.lease_id)
    engine.half.finished("r")
    engine.half.finished("r")
    assert not engine.half._requests
    assert not engine.pool.leases
    assert not engine.pool.calls
    assert engine.half.matched(request, 0) == (0, False)
    assert engine.saves(r=(0, 9)) == []


def test_a_step_without_work_costs_one_shared_object():
    assert Engine().half.step(step_output({"unknown": (0, 5)})) is NOTHING
