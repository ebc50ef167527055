"""What a request leaves in the metrics: goodput, latencies by class, hits expected and real."""

import asyncio

import pytest
from conftest import make_request
from test_dispatch import PROMPT
from test_gate import slow

from conductor.gate import GateConfig
from conductor.http import FATE, HttpFate
from conductor.scheduler import Mode
from conductor.terms import CLASSES, Terms
from conductor.vllm_seam import EngineCoreOutputs, Unavailable

LONG = 400
WAITS = "mooncake_requests_waiting"


def results(world, slo_class: str = "default") -> dict[str, float]:
    names = ("met", "ttft", "tbt", "failed", "rejected")
    found = {n: world.metric("mooncake_slo_requests_total", slo_class=slo_class, result=n) for n in names}
    return {name: count for name, count in found.items() if count}


async def test_a_request_that_keeps_its_objectives_is_goodput_and_one_that_does_not_says_which(
    make_world,
) -> None:
    world = make_world()
    await world.engine("b0", "both", step_s=0.002)
    for ttft_slo_s, tbt_slo_s in ((60.0, 60.0), (60.0, 1e-9)):
        world.metrics.set_objectives(ttft_slo_s, tbt_slo_s)
        await world.finish(world.add(make_request(PROMPT)))
    assert results(world) == {"met": 1, "tbt": 1}
    assert world.metric("mooncake_e2e_seconds_count", slo_class="default") == 2
    assert world.metric("mooncake_tpot_seconds_count", slo_class="default") == 2
    assert world.metric("mooncake_tbt_seconds_count", slo_class="default") == 2 * 7


async def test_a_first_token_after_its_objective_is_late_whatever_comes_then(make_world) -> None:
    world = make_world()
    engine = await world.engine("b0", "both")
    engine.frozen.set()
    rid = world.add(make_request(PROMPT))
    world.metrics.set_objectives(1e-6, None)  # as a reload would; counts from the first token on
    engine.frozen.clear()
    await world.finish(rid)
    assert results(world) == {"ttft": 1}


async def test_who_leaves_is_judged_by_what_it_got_and_without_a_token_by_how_long_it_waited(
    make_world,
) -> None:
    world = make_world()
    engine = await world.engine("b0", "both", step_s=0.002)
    rid = world.add(make_request(PROMPT, max_tokens=LONG))
    await world.until(lambda: len(world.tokens(rid)) > 3)
    world.dispatcher.abort([rid])  # as vLLM does at a stop string
    assert results(world) == {"met": 1}
    engine.frozen.set()
    for ttft_slo_s in (None, 1e-9):
        world.metrics.set_objectives(ttft_slo_s, None)
        world.dispatcher.abort([world.add(make_request(PROMPT))])
    assert results(world) == {"met": 1, "ttft": 1}
    assert world.metric("mooncake_requests_total", outcome="aborted") == 3


async def test_a_request_that_fails_is_counted_once_with_a_word_for_why(make_world) -> None:
    world = make_world()
    engine = await world.engine("b0", "both")
    engine.fail_next = 100
    rid = world.add(make_request(PROMPT))
    await world.until(lambda: world.metric("mooncake_requests_total", outcome="failed") == 1)
    assert results(world) == {"failed": 1}
    assert world.metric("mooncake_failures_total", reason="engine_error") == 1
    assert world.metric("mooncake_tenant_requests_total", tenant="other", outcome="failed") == 1
    assert rid


OUTPUTS_MAX = 20


def nobody_reads(world) -> None:
    """vLLM's output handler stops; clients are told of failures all the same."""
    world.note_failures()
    world.collecting.cancel()


async def test_a_stream_that_we_cut_because_we_are_behind_is_a_failure_and_no_goodput(
    make_world, monkeypatch
) -> None:
    monkeypatch.setattr("conductor.dispatch.OUTPUTS_MAX", OUTPUTS_MAX)
    world = make_world()
    engine = await world.engine("b0", "both", step_s=0.005)
    rid = world.add(make_request(PROMPT, max_tokens=LONG))
    await world.until(lambda: len(world.tokens(rid)) > 3)
    nobody_reads(world)
    await world.finish(rid)
    assert "outputs wait unread" in str(world.failed[rid])
    assert world.failed[rid].http_status == 503
    assert results(world) == {"failed": 1}
    assert world.metric("mooncake_requests_total", outcome="failed") == 1
    assert world.metric("mooncake_failures_total", reason="backlog") == 1
    assert world.metric("mooncake_requests_total", outcome="aborted") == 0
    await world.until(lambda: not engine.jobs)
    assert world.view.charged == 0


@pytest.mark.parametrize("first_token", [False, True])
async def test_an_answer_whose_last_output_finds_no_room_is_told_so_instead_of_hanging(
    make_world, monkeypatch, first_token
) -> None:
    monkeypatch.setattr("conductor.dispatch.OUTPUTS_MAX", OUTPUTS_MAX)
    world = make_world(first_token=first_token, mode=Mode.DISAGGREGATED)
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    nobody_reads(world)
    while world.dispatcher.outputs.qsize() < OUTPUTS_MAX:
        world.dispatcher.outputs.put_nowait(EngineCoreOutputs(outputs=[]))
    for max_tokens in (1, 8):
        rid = world.add(make_request(PROMPT, max_tokens=max_tokens))
        await world.finish(rid)
        assert "outputs wait unread" in str(world.failed[rid])
    assert results(world) == {"failed": 2}
    assert world.dispatcher.outputs.qsize() == OUTPUTS_MAX, "engines' statistics wait for room, too"
    assert world.dispatcher.in_flight == world.view.charged == 0


async def test_a_request_that_is_turned_away_counts_as_rejected_and_as_nothing_else(make_world) -> None:
    world = make_world(gate=GateConfig(hold_s=1e-9, waiting_max=1))
    engine = await world.engine("b0", "both")
    engine.frozen.set()
    premium = Terms(slo_class=CLASSES["premium"], ttft_slo_s=1e-6)
    world.add(make_request(PROMPT))
    with pytest.raises(Unavailable):
        world.add(make_request(PROMPT), premium)
    assert results(world, "premium") == {"rejected": 1}
    assert world.metric("mooncake_requests_total", outcome="rejected") == 1
    assert world.metric("mooncake_e2e_seconds_count", slo_class="premium") == 0


async def test_what_engines_found_is_counted_beside_what_plans_expected(make_world) -> None:
    world = make_world()
    engine = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    engine.cached = (20, 12)
    await world.finish(world.add(make_request(PROMPT * 10)))
    size = world.view.record("p0").block_size
    assert world.metric("mooncake_prompt_tokens_total") == len(PROMPT * 10)  # leg 2 counts nothing
    assert world.metric("mooncake_cached_tokens_total", source="engine") == 20
    assert world.metric("mooncake_cached_tokens_total", source="pool") == 12
    assert world.metric("mooncake_prefix_real_hit_blocks_total") == 32 // size
    error = "mooncake_prefix_hit_error_blocks_bucket"  # nothing was expected
    assert (world.metric(error, le="4.0"), world.metric(error, le="16.0")) == (0, 1)


async def test_each_plan_is_timed_and_the_work_that_it_gives_is_shown_by_instance(make_world) -> None:
    world = make_world()
    engine = await world.engine("b0", "both")
    engine.frozen.set()
    world.add(make_request(PROMPT))
    assert world.metric("mooncake_decision_seconds_count") == 1
    where = {"instance_id": "b0", "role": "both"}
    await world.until(lambda: world.metric("mooncake_instance_decode_requests", **where) == 1)
    assert world.metric("mooncake_instance_kv_tokens", **where) >= len(PROMPT)


async def test_the_operation_of_a_request_is_its_path_and_its_model_the_served_name(make_world) -> None:
    world = make_world()
    await world.engine("b0", "both")
    world.metrics.set_model("big")
    fate = HttpFate()
    fate.operation = "chat"
    request = make_request(PROMPT)
    world.finished[request.request_id] = asyncio.Event()
    token = FATE.set(fate)
    world.dispatcher.add(request)
    FATE.reset(token)
    await world.finish(request.request_id)
    labels = {
        "gen_ai_operation_name": "chat", "gen_ai_request_model": "big", "gen_ai_provider_name": "mooncake"
    }  # fmt: skip
    assert world.metric("gen_ai_server_time_to_first_token_seconds_count", **labels) == 1
    assert world.metric("gen_ai_server_request_duration_seconds_count", **labels, error_type="") == 1
    assert world.metric("gen_ai_client_token_usage_sum", **labels, gen_ai_token_type="output") == 8


async def test_who_waits_is_counted_by_class_until_it_is_served_or_leaves(make_world) -> None:
    world = make_world(gate=GateConfig(hold_s=1e-9), cost=slow())
    prefill = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")

    def waiting() -> list[float]:
        return [world.metric(WAITS, slo_class=name) for name in CLASSES]

    assert {f"{WAITS}{{{name}}}" for name in CLASSES} == {
        f"{WAITS}{{{sample.labels['slo_class']}}}"
        for family in world.registry.collect()
        for sample in family.samples
        if sample.name == WAITS
    }  # 0 is shown: "nobody waits" is not "nobody says"
    prefill.freeze()
    world.add(make_request(PROMPT))
    classes = [name for number, name in enumerate(CLASSES, 1) for _ in range(number)]
    rids = [world.add(make_request(PROMPT), Terms(slo_class=CLASSES[name])) for name in classes]
    assert waiting() == [1, 2, 3, 4]
    world.dispatcher.abort([rids[-1], rids[0], rids[0]])
    assert waiting() == [0, 2, 3, 3]
    prefill.frozen.clear()
    for rid in rids[1:-1]:
        await world.finish(rid)
    assert waiting() == [0, 0, 0, 0]
