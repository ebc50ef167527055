"""Requests that wait in the gateway, by class and objective, until engines have room; over fake engines."""

import pytest
from conftest import make_request

from conductor.admission import AdmissionMode
from conductor.cost import CostModel
from conductor.gate import GateConfig
from conductor.terms import CLASSES, Terms
from conductor.vllm_seam import Unavailable

PROMPT = list(range(10, 23))
HELD = GateConfig(hold_s=1e-6)
"""One prompt at a time and instance."""


def slow() -> CostModel:
    """Until a prompt was measured, one is expected to take ten seconds."""
    return CostModel(prefill_prior=(10.0, 1e-9, 1e-12))


PREMIUM, BATCH = Terms(slo_class=CLASSES["premium"]), Terms(slo_class=CLASSES["batch"])


def prompt(number: int) -> list[int]:
    return [number, *PROMPT]


async def test_prompts_wait_for_an_engine_with_room_and_all_are_served(make_world) -> None:
    world = make_world(gate=HELD, cost=slow())
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    rids = [world.add(make_request(prompt(n))) for n in range(6)]
    assert world.metric("mooncake_requests_waiting", slo_class="default") == 5
    for rid in rids:
        assert len(await world.finish(rid)) == 8
    await world.until(lambda: world.dispatcher.in_flight == 0)
    assert world.metric("mooncake_requests_waiting", slo_class="default") == 0
    assert world.view.charged == 0


async def test_a_premium_request_overtakes_those_that_wait_and_goes_first_in_engines_too(make_world) -> None:
    world = make_world(gate=HELD, cost=slow())
    prefill = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    rids = [world.add(make_request(prompt(n)), terms) for n, terms in enumerate([BATCH, BATCH, PREMIUM])]
    for rid in rids:
        await world.finish(rid)
    order = [request.prompt_token_ids[0] for request in prefill.received]
    assert order == [0, 2, 1]
    assert [request.priority for request in prefill.received] == [100, -200, 100]


async def test_a_client_that_leaves_while_it_waits_is_never_sent(make_world) -> None:
    world = make_world(gate=HELD, cost=slow())
    prefill = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    rids = [world.add(make_request(prompt(n))) for n in range(3)]
    world.dispatcher.abort([rids[1]])
    for rid in (rids[0], rids[2]):
        await world.finish(rid)
    assert [request.prompt_token_ids[0] for request in prefill.received] == [0, 2]
    await world.until(lambda: world.dispatcher.in_flight == 0)
    assert world.view.charged == 0


async def test_waiting_too_long_is_answered_503_with_when_to_come_again(make_world) -> None:
    world = make_world(gate=GateConfig(hold_s=1e-6, wait_s=0.3), cost=slow())
    world.note_failures()
    prefill = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    prefill.step_s = 3600.0
    rids = [world.add(make_request(prompt(n))) for n in range(3)]
    second = rids[2]  # the engine's first step is free, then it is busy with the next prompt for an hour
    await world.finish(second)
    assert world.tokens(second) == []
    error = world.failed[second]
    assert isinstance(error, Unavailable)
    assert error.http_status == 503
    assert error.retry_after_s >= 1
    assert list(world.failed) == [second]
    labels = {"reason": "waited in the queue until its deadline", "slo_class": "default"}
    assert world.metric("mooncake_rejections_total", **labels) == 1


async def test_a_full_queue_sheds_batch_work_for_a_premium_request(make_world) -> None:
    world = make_world(gate=GateConfig(hold_s=1e-6, waiting_max=1), cost=slow())
    world.note_failures()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    first, batch = world.add(make_request(prompt(0))), world.add(make_request(prompt(1)), BATCH)
    premium = world.add(make_request(prompt(2)), PREMIUM)
    with pytest.raises(Unavailable, match="queue full"):
        world.add(make_request(prompt(3)), PREMIUM)
    assert "shed" in str(world.failed[batch])
    assert len(await world.finish(first)) == 8
    assert len(await world.finish(premium)) == 8


async def test_a_request_s_own_objective_is_enforced_with_429(make_world) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    with pytest.raises(Unavailable, match="time to first token") as caught:
        world.add(make_request(PROMPT), Terms(ttft_slo_s=1e-9))
    assert caught.value.http_status == 429
    assert caught.value.retry_after_s >= 1
    with pytest.raises(Unavailable, match="time between tokens"):
        world.add(make_request(PROMPT), Terms(tbt_slo_s=1e-9))
    assert len(await world.finish(world.add(make_request(PROMPT), Terms(ttft_slo_s=60.0)))) == 8


async def test_decode_load_is_asked_for_again_when_the_prompt_is_done(make_world) -> None:
    world = make_world(admission=AdmissionMode.LATE, tbt_slo_s=1e-9)
    world.note_failures()
    prefill = await world.engine("p0", "prefill")
    decode = await world.engine("d0", "decode")
    rid = world.add(make_request(PROMPT))
    await world.finish(rid)
    error = world.failed[rid]
    assert isinstance(error, Unavailable)
    assert error.http_status == 429
    assert prefill.legs() == ["prefill"]
    assert decode.legs() == []
    await world.until(lambda: world.dispatcher.in_flight == 0)
    assert world.view.charged == 0
