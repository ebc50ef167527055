"""Requests through the production dispatcher, links and policy, over fake engines."""

import asyncio
import copy
import time

import msgspec
import pytest
from conftest import make_request
from fake_engine import FakeEngine, token

from conductor.scheduler import Mode
from conductor.vllm_seam import FinishReason, Unavailable

PROMPT = list(range(10, 23))


def expected(prompt: list[int], count: int) -> list[int]:
    return [token(prompt, index) for index in range(count)]


async def two_instances(world):
    return await world.engine("p0", "prefill"), await world.engine("d0", "decode")


async def test_a_request_is_prefilled_on_one_engine_and_decoded_on_another(make_world) -> None:
    world = make_world()
    prefill, decode = await two_instances(world)
    tokens = await world.finish(world.add(make_request(PROMPT)))
    assert tokens == expected(PROMPT, 8)
    assert prefill.legs() == ["prefill"]
    assert decode.legs() == ["decode"]
    await world.until(lambda: world.metric("mooncake_requests_total", outcome="finished") == 1)
    assert world.metric("mooncake_handover_seconds_count") == 1
    assert world.view.charged == 0


async def test_usage_tells_what_leg_1_found_and_not_what_leg_2_loaded(make_world) -> None:
    world = make_world()
    await two_instances(world)
    rid = world.add(make_request(PROMPT))
    await world.finish(rid)
    first, *later = world.outputs[rid]
    assert first.prefill_stats.num_cached_tokens == 0
    assert first.prefill_stats.num_prompt_tokens == len(PROMPT)
    assert len(first.events) == 2
    assert all(output.prefill_stats is None or output is first for output in [first, *later])


async def test_first_token_mode_streams_leg_1s_token_and_goes_on_from_it(make_world) -> None:
    world = make_world(first_token=True)
    prefill, decode = await two_instances(world)
    tokens = await world.finish(world.add(make_request(PROMPT)))
    assert tokens == expected(PROMPT, 8)
    kv = decode.received[0].sampling_params.extra_args["kv_transfer_params"]["mooncake"]
    assert kv["emitted"] == expected(PROMPT, 1)
    assert prefill.received[0].sampling_params.temperature == 0.0


async def test_one_token_is_served_by_one_leg(make_world) -> None:
    world = make_world()
    prefill, decode = await two_instances(world)
    assert await world.finish(world.add(make_request(PROMPT, max_tokens=1))) == expected(PROMPT, 1)
    assert prefill.legs() == ["whole"]
    assert decode.legs() == []


async def test_children_of_n_share_one_prefill(make_world) -> None:
    world = make_world()
    prefill, decode = await two_instances(world)
    rids = [
        world.add(make_request(PROMPT, rid=f"{index}_chatcmpl-x-77", external="chatcmpl-x"))
        for index in range(3)
    ]
    for rid in rids:
        assert await world.finish(rid) == expected(PROMPT, 8)
        assert world.outputs[rid][0].prefill_stats.num_cached_tokens == 0
    assert prefill.legs() == ["prefill"]
    assert decode.legs() == ["decode"] * 3


async def test_aggregated_mode_runs_one_leg_on_one_instance(make_world) -> None:
    world = make_world(mode=Mode.AGGREGATED)
    both = await world.engine("b0", "both")
    assert await world.finish(world.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert both.legs() == ["whole"]


async def test_nobody_alive_is_unavailable_at_once_with_a_retry_hint(make_world) -> None:
    world = make_world()
    with pytest.raises(Unavailable, match="no instance alive") as caught:
        world.add(make_request(PROMPT))
    assert caught.value.http_status == 503
    assert caught.value.retry_after_s > 0
    assert world.dispatcher.in_flight == 0


@pytest.mark.parametrize("first_token", [False, True])
async def test_a_killed_decode_engine_costs_a_gap_and_no_token(make_world, first_token) -> None:
    world = make_world(first_token=first_token)
    await two_instances(world)
    spare = await world.engine("d1", "decode", step_s=0.001)
    decode = world.engines[1]
    decode.step_s = spare.step_s = 0.01
    rid = world.add(make_request(PROMPT, max_tokens=40))
    await world.until(lambda: len(world.tokens(rid)) >= 10)
    victim, other = (decode, spare) if "decode" in decode.legs() else (spare, decode)
    began_s = time.monotonic()
    victim.kill()
    await world.until(lambda: bool(other.received))
    assert time.monotonic() - began_s < 1.5
    assert await world.finish(rid) == expected(PROMPT, 40)
    assert sum(output.prefill_stats is not None for output in world.outputs[rid]) == 1
    assert sum(output.events is not None for output in world.outputs[rid]) == 1
    assert world.metric("mooncake_detect_seconds_count") == 1
    assert world.view.charged == 0


async def test_a_stopped_engine_is_noticed_and_its_late_tokens_are_dropped(make_world) -> None:
    world = make_world()
    await two_instances(world)
    await world.engine("d1", "decode")
    for engine in world.engines:
        engine.step_s = 0.01
    rid = world.add(make_request(PROMPT, max_tokens=60))
    await world.until(lambda: len(world.tokens(rid)) >= 5)
    victim = next(e for e in world.engines if "decode" in e.legs())
    other = next(e for e in world.engines if e.role == "decode" and e is not victim)
    began_s = time.monotonic()
    victim.freeze()
    await world.until(lambda: bool(other.received))
    assert time.monotonic() - began_s < 10.0
    victim.frozen.clear()
    assert await world.finish(rid) == expected(PROMPT, 60)
    await world.until(lambda: not victim.jobs)  # the abort waited for it in its queue


async def test_a_prefill_engine_that_dies_is_replaced_before_anyone_notices(make_world) -> None:
    world = make_world()
    slow = await world.engine("p0", "prefill", step_s=5.0)
    decode = await world.engine("d0", "decode")
    await world.finish(world.add(make_request(PROMPT, max_tokens=2)))  # starts the slow engine's step
    rid = world.add(make_request(PROMPT))
    await world.until(lambda: len(slow.received) == 2)
    spare = await world.engine("p1", "prefill")
    slow.kill()
    assert await world.finish(rid) == expected(PROMPT, 8)
    assert spare.legs() == ["prefill"]
    assert decode.legs()[-1] == "decode"
    assert world.metric("mooncake_retries_total") >= 1


async def test_an_engine_error_is_retried_elsewhere(make_world) -> None:
    world = make_world()
    _, decode = await two_instances(world)
    spare = await world.engine("d1", "decode")
    decode.fail_next = spare.fail_next = 1
    assert await world.finish(world.add(make_request(PROMPT))) == expected(PROMPT, 8)


async def test_without_any_instance_a_stream_fails_clearly_within_its_bound(make_world, monkeypatch) -> None:
    for name in ("REPLAN_DELAY_MIN_S", "REPLAN_DELAY_MAX_S"):
        monkeypatch.setattr(f"conductor.request.{name}", 0.01)  # its bound is a number of tries
    world = make_world()
    for engine in await two_instances(world):
        engine.step_s = 0.01
    rid = world.add(make_request(PROMPT, max_tokens=500))
    await world.until(lambda: len(world.tokens(rid)) >= 3)
    for engine in list(world.engines):
        engine.kill()
    await world.finish(rid, deadline_s=20.0)
    assert world.outputs[rid][-1].finish_reason is FinishReason.ERROR
    assert world.dispatcher.in_flight == 0
    assert world.view.charged == 0


async def test_a_stream_waits_for_an_instance_that_comes_back(make_world) -> None:
    world = make_world()
    await two_instances(world)
    for engine in world.engines:
        engine.step_s = 0.01
    rid = world.add(make_request(PROMPT, max_tokens=50))
    await world.until(lambda: len(world.tokens(rid)) >= 3)
    for engine in list(world.engines):
        engine.kill()
    await asyncio.sleep(0.3)
    reborn = await world.engine("d0", "both", epoch="e2")
    assert await world.finish(rid) == expected(PROMPT, 50)
    assert len(reborn.received) == 1


async def test_abort_reaches_the_leg_that_runs(make_world) -> None:
    world = make_world()
    await two_instances(world)
    decode = world.engines[1]
    decode.step_s = 0.01
    rid = world.add(make_request(PROMPT, max_tokens=500))
    await world.until(lambda: len(world.tokens(rid)) >= 3)
    world.dispatcher.abort([rid, "unknown"])
    await world.until(lambda: bool(decode.aborted) and not decode.jobs)
    assert world.dispatcher.in_flight == 0
    assert await world.dispatcher.idle(1.0)
    assert world.view.charged == 0


async def test_abort_during_leg_1_means_no_leg_2(make_world) -> None:
    world = make_world()
    prefill = await world.engine("p0", "prefill")
    decode = await world.engine("d0", "decode")
    prefill.freeze()
    rid = world.add(make_request(PROMPT))
    world.dispatcher.abort([rid])
    prefill.frozen.clear()
    await world.until(lambda: bool(prefill.aborted))
    assert decode.received == []


async def test_originals_stay_as_vllm_made_them(make_world) -> None:
    world = make_world(first_token=True)
    await two_instances(world)
    request = make_request(
        PROMPT,
        seed=5,
        temperature=0.7,
        stop=["x"],
        min_tokens=3,
        logprobs=2,
        extra_args={"mine": 1, "kv_transfer_params": {"theirs": 2}},
    )
    before = copy.deepcopy(request)
    await world.finish(world.add(request))
    assert request == before
    sent = world.engines[1].received[0].sampling_params
    assert sent.extra_args["mine"] == 1
    assert sent.extra_args["kv_transfer_params"]["theirs"] == 2
    assert (sent.seed, sent.max_tokens, sent.min_tokens) == (5, 8, 3)


async def test_a_gateway_that_stalled_itself_blames_nobody(make_world) -> None:
    world = make_world()
    await two_instances(world)
    time.sleep(2.0)  # noqa: ASYNC251 -- the stall
    await asyncio.sleep(0.6)
    assert world.metric("mooncake_detect_seconds_count") == 0
    assert await world.finish(world.add(make_request(PROMPT))) == expected(PROMPT, 8)


async def test_statistics_flow_under_a_slot_per_instance(make_world) -> None:
    world = make_world()
    await two_instances(world)
    await world.finish(world.add(make_request(PROMPT)))
    assert set(world.stats) == {world.members.engine_slot("p0"), world.members.engine_slot("d0")}


async def test_more_instances_than_slots_share_the_last_one(make_world) -> None:
    world = make_world()
    slots = [world.members.engine_slot(f"i{number}") for number in range(12)]
    assert slots == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7]


async def test_a_gateway_shows_what_engines_have_of_others_and_nothing_of_one_gone(
    make_world,
) -> None:
    world = make_world()
    _, decode = await two_instances(world)
    slot = world.members.engine_slot("d0")
    decode.elsewhere = 5
    await world.until(lambda: world.running.get(slot) == 5)
    await world.metadata.delete("/mooncake/instances/d0")
    await world.until(lambda: world.running[slot] == 0)


async def test_a_removed_record_moves_its_requests(make_world) -> None:
    world = make_world()
    await two_instances(world)
    spare = await world.engine("d1", "decode")
    for engine in world.engines:
        engine.step_s = 0.01
    rid = world.add(make_request(PROMPT, max_tokens=30))
    await world.until(lambda: len(world.tokens(rid)) >= 3)
    victim = next(e for e in (world.engines[1], spare) if e.received)
    await world.metadata.delete(f"/mooncake/instances/{victim.instance_id}")
    assert await world.finish(rid) == expected(PROMPT, 30)


async def test_a_refusing_gateway_takes_nothing_new_and_finishes_the_rest(make_world) -> None:
    world = make_world()
    await two_instances(world)
    rid = world.add(make_request(PROMPT))
    world.dispatcher.refuse("shutting down")
    with pytest.raises(Unavailable, match="shutting down"):
        world.add(make_request(PROMPT))
    assert await world.finish(rid) == expected(PROMPT, 8)
    assert await world.dispatcher.idle(5.0)


async def test_measured_times_reach_the_cost_model(make_world) -> None:
    world = make_world()
    await two_instances(world)
    await world.finish(world.add(make_request(PROMPT, max_tokens=80)))
    errors = world.cost.errors()
    assert errors.prefill_count >= 1
    assert errors.tbt_count >= 1


async def test_many_at_once(make_world) -> None:
    world = make_world(first_token=True)
    await two_instances(world)
    await world.engine("d1", "decode")
    prompts = [[index, *PROMPT] for index in range(60)]
    rids = [world.add(make_request(prompt, max_tokens=12)) for prompt in prompts]
    for rid, prompt in zip(rids, prompts, strict=True):
        assert await world.finish(rid) == expected(prompt, 12)
    assert world.view.charged == 0
    assert isinstance(world.engines[0], FakeEngine)


async def test_a_retried_prompt_is_fetched_from_where_the_new_plan_says(make_world, monkeypatch) -> None:
    world = make_world()
    first, second, decode = [
        await world.engine(*one) for one in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"))
    ]
    scheduler, asked = world.decider.scheduler, []
    replan = scheduler.replan
    monkeypatch.setattr(
        scheduler, "replan", lambda *args: msgspec.structs.replace(replan(*args), fetch_node="n7")
    )
    monkeypatch.setattr(scheduler, "source", lambda facts, target, known: asked.append(known) or known)
    first.fail_next = 1
    assert await world.finish(world.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert (first.legs(), second.legs(), decode.legs()) == (["prefill"], ["prefill"], ["decode"])
    kv = second.received[0].sampling_params.extra_args["kv_transfer_params"]["mooncake"]
    assert kv["source"] == "n7"
