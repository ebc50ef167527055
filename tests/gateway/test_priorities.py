"""Classes of service from header, body and key to engines: over vLLM's HTTP app, and over fake engines."""

from typing import Any

import openai
import pytest
import test_http
from conftest import make_request
from test_http import CHAT

from conductor.cost import CostModel
from conductor.gate import GateConfig
from conductor.tenants import Quotas, Tenant, Tenants
from conductor.terms import CLASSES, Terms
from conductor.vllm_seam import Unavailable
from mooncake.worker.engine import engine_arguments
from mooncake.worker.spec import EngineSpec

configured, site, sdk = test_http.configured, test_http.site, test_http.sdk  # fixtures
PROMPT = list(range(10, 23))
BATCH = Terms(slo_class=CLASSES["batch"])
COMPLETION = {"model": "tiny", "prompt": "x", "max_tokens": 4}


def own(site: Any, **fields: Any) -> None:
    """Let acme, whose key `sdk` shows, be what `fields` say."""
    keys = site.cluster.quotas.tenants._keys
    site.cluster.quotas.change(0.0, Tenants({"acme": Tenant(**fields)}, keys=keys))


def priorities(*engines: Any) -> list[int]:
    return [request.priority for engine in engines for request in engine.received]


# ---------------------------------------------------------------- HTTP


@pytest.mark.parametrize(
    ("tier", "slo_class", "told"),
    [("auto", "default", "default"), ("flex", "batch", "flex"), ("priority", "premium", "priority")],
)
async def test_a_service_tier_reaches_both_engines_as_priority_and_comes_back_in_the_answer(
    site,
    tier,
    slo_class,
    told,
) -> None:
    engines = await site.engine("p0", "prefill"), await site.engine("d0", "decode")
    answer = await site.client.post("/v1/chat/completions", json={**CHAT, "service_tier": tier})
    assert answer.status_code == 200, answer.text
    assert priorities(*engines) == [CLASSES[slo_class].priority] * 2
    assert answer.json()["service_tier"] == told
    assert answer.headers["x-slo-class"] == slo_class


async def test_what_a_tenant_may_not_have_is_lowered_told_and_counted(site, sdk) -> None:
    own(site, highest="interactive")
    engine = await site.engine("b0", "both")
    chat = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 4}
    first = await sdk.chat.completions.with_raw_response.create(**chat, service_tier="priority")
    assert first.headers["x-slo-class"] == "interactive"
    assert first.parse().service_tier == "priority"
    own(site, slo_class="batch", highest="batch")
    second = await sdk.responses.create(model="tiny", input="x", max_output_tokens=4, service_tier="priority")
    assert second.service_tier == "flex"
    third = await sdk.completions.with_raw_response.create(
        **COMPLETION, extra_headers={"x-slo-class": "premium"}
    )
    assert third.headers["x-slo-class"] == "batch"
    assert third.parse().choices[0].finish_reason == "length"
    classes = ["interactive", "batch", "batch"]
    assert priorities(engine) == [CLASSES[name].priority for name in classes]
    counted = {"tenant": "acme", "asked": "premium"}
    assert site.registry.get_sample_value("mooncake_class_lowered_total", counted) == 3


async def test_a_stream_tells_its_class_in_the_header(site) -> None:
    await site.engine("b0", "both")
    body = {**CHAT, "service_tier": "flex", "stream": True}
    answer = await site.client.post("/v1/chat/completions", json=body)
    assert answer.headers["x-slo-class"] == "batch"
    assert answer.text.rstrip().endswith("data: [DONE]")


async def test_text_that_looks_like_a_tier_is_not_taken_for_one(site) -> None:
    await site.engine("b0", "both")
    text = '"service_tier":null,"service_tier":"flex"'
    body = {**COMPLETION, "prompt": text, "echo": True, "service_tier": "flex"}
    answer = await site.client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"].startswith(text), answer.text


async def test_an_unknown_tier_is_vllm_s_to_judge_and_asks_for_nothing(site, sdk) -> None:
    await site.engine("b0", "both")
    ask = {"model": "tiny", "service_tier": "gold"}
    with pytest.raises(openai.BadRequestError, match="service_tier"):
        await sdk.responses.create(**ask, input="x", max_output_tokens=4)
    answer = await sdk.chat.completions.create(**ask, messages=CHAT["messages"], max_tokens=4)
    assert answer.service_tier == "default"


async def test_who_asks_for_nothing_gets_vllm_s_answer_untouched(site) -> None:
    engine = await site.engine("b0", "both")
    answer = await site.client.post("/v1/chat/completions", json=CHAT)
    assert "x-slo-class" not in answer.headers
    assert answer.json()["service_tier"] is None
    assert priorities(engine) == [0]


@pytest.mark.parametrize("by_header", [False, True])
async def test_vllm_s_own_priority_orders_within_the_class_a_tenant_has(site, sdk, by_header) -> None:
    engine = await site.engine("b0", "both")
    bounds = (
        ("premium", -5, -5),
        ("premium", 10**9, 49),
        ("default", -5, 0),
        ("default", 5, 5),
        ("batch", -5, 100),
    )
    for highest, asked, counts in bounds:
        own(site, highest=highest)
        header = {"extra_headers": {"x-vllm-priority": str(asked)}}
        said = header if by_header else {"extra_body": {"priority": asked}}
        await sdk.completions.create(**COMPLETION, **said)
        assert priorities(engine)[-1] == counts, (highest, asked)


# ---------------------------------------------------------------- the dispatcher


async def test_each_leg_has_the_gateway_s_arrival_time_so_that_equals_keep_their_order(make_world) -> None:
    world = make_world()
    prefill = await world.engine("p0", "prefill")
    decode = await world.engine("d0", "decode")
    for arrival_time in (7.0, 3.0):
        await world.finish(world.add(make_request(PROMPT, arrival_time=arrival_time)))
    for engine in (prefill, decode):
        assert [request.arrival_time for request in engine.received] == [7.0, 3.0]
        assert priorities(engine) == [0, 0]


async def test_a_leg_that_is_placed_again_keeps_priority_and_arrival(make_world) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    decode = await world.engine("d0", "decode", step_s=0.05)
    premium = Terms(slo_class=CLASSES["premium"])
    rid = world.add(make_request(PROMPT, arrival_time=7.0, max_tokens=30), premium)
    await world.until(lambda: len(world.tokens(rid)) > 2)
    second = await world.engine("d1", "decode")
    decode.kill()
    assert len(await world.finish(rid)) == 30
    assert [(one.priority, one.arrival_time) for one in second.received] == [(-200, 7.0)]


async def test_time_to_first_token_and_time_in_the_queue_are_measured_by_class(make_world) -> None:
    world = make_world()
    await world.engine("b0", "both")
    for name in ("premium", "batch", "batch"):
        await world.finish(world.add(make_request(PROMPT), Terms(slo_class=CLASSES[name])))
    for metric in ("mooncake_ttft_seconds_count", "mooncake_wait_seconds_count"):
        counts = {name: world.metric(metric, slo_class=name) for name in CLASSES}
        assert counts == {"premium": 1, "batch": 2, "interactive": 0, "default": 0}


async def test_the_flood_of_one_tenant_is_lowered_to_what_it_may_have(make_world) -> None:
    tenants = Tenants({"flood": Tenant(highest="batch"), "calm": Tenant()})
    world = make_world(quotas=Quotas(tenants))
    engine = await world.engine("b0", "both")
    terms = [tenants.bound(Terms(tenant=name, slo_class=CLASSES["premium"])) for name in ("flood", "calm")]
    for one in terms:
        await world.finish(world.add(make_request(PROMPT), one))
    assert priorities(engine) == [100, -200]


def slow() -> CostModel:
    """Until a prompt was measured, one is expected to take ten seconds."""
    return CostModel(prefill_prior=(10.0, 1e-9, 1e-12))


async def test_a_tenant_is_served_next_whatever_flood_another_has_sent_before(make_world) -> None:
    world = make_world(gate=GateConfig(hold_s=1e-6), cost=slow(), quotas=Quotas(Tenants({"calm": Tenant()})))
    prefill = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    flood = [world.add(make_request([n, *PROMPT]), Terms(tenant="flood")) for n in range(60)]
    calm = [world.add(make_request([n, *PROMPT]), Terms(tenant="calm")) for n in range(100, 104)]
    for rid in (*calm, *flood):
        assert len(await world.finish(rid)) == 8
    order = [request.prompt_token_ids[0] for request in prefill.received]
    assert max(order.index(n) for n in range(100, 104)) < 12


async def test_batch_work_waits_in_the_gateway_for_idle_engines_and_is_passed_by_others(make_world) -> None:
    world = make_world(cost=slow())
    prefill = await world.engine("p0", "prefill", step_s=0.05)
    await world.engine("d0", "decode")
    batch = [world.add(make_request([n, *PROMPT]), BATCH) for n in range(6)]
    assert world.metric("mooncake_requests_waiting", slo_class="batch") == 5
    others = [world.add(make_request([n, *PROMPT])) for n in range(100, 103)]
    assert world.metric("mooncake_requests_waiting", slo_class="batch") == 5
    for rid in (*batch, *others):
        assert len(await world.finish(rid)) == 8
    order = [request.prompt_token_ids[0] for request in prefill.received]
    assert order[:4] == [0, 100, 101, 102]
    await world.until(lambda: world.dispatcher.in_flight == 0)
    assert world.view.charged == 0


async def test_a_job_that_would_be_late_reaches_engines_as_an_interactive_request(make_world) -> None:
    world = make_world(cost=CostModel(prefill_prior=(0.1, 1e-9, 1e-12)))
    prefill = await world.engine("p0", "prefill", step_s=3600.0)  # the first step is free, then it is busy
    await world.engine("d0", "decode")
    await world.finish(world.add(make_request(PROMPT)))
    world.add(make_request(PROMPT))
    soon = Terms(slo_class=CLASSES["batch"], job_s=3.0)
    world.add(make_request([7, *PROMPT], max_tokens=2), soon)
    assert world.metric("mooncake_requests_waiting", slo_class="batch") == 1
    await world.until(lambda: len(prefill.received) == 3)
    assert priorities(prefill) == [0, 0, CLASSES["interactive"].priority]


async def test_a_job_without_enough_time_is_refused_with_429_and_why(make_world) -> None:
    world = make_world(cost=slow())
    await world.engine("b0", "both")
    with pytest.raises(Unavailable, match="the job cannot be done in its time: predicted 10") as caught:
        world.add(make_request(PROMPT), Terms(slo_class=CLASSES["batch"], job_s=5.0))
    assert (caught.value.http_status, caught.value.retry_after_s) == (429, 0.0)
    reason = "the job cannot be done in its time"
    assert world.metric("mooncake_rejections_total", reason=reason, slo_class="batch") == 1


def test_an_engine_s_queue_is_one_of_priorities_and_among_equals_of_arrival() -> None:
    from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
    from vllm.v1.request import Request

    spec = EngineSpec(instance_id="i", role="both", epoch="e", run_dir="/r", model="m")
    (policy,) = (one for one in engine_arguments(spec) if one.startswith("--scheduling-policy="))
    queue = create_request_queue(SchedulingPolicy(policy.partition("=")[2]))
    sent = {
        "batch": (BATCH, 1.0),
        "second": (Terms(), 3.0),
        "first": (Terms(), 2.0),
        "low": (Terms(priority=1), 0.0),
    }
    for name, (terms, arrival_time) in sent.items():
        request = make_request(PROMPT, rid=name, arrival_time=arrival_time)
        request.priority = terms.engine_priority
        queue.add_request(Request.from_engine_core_request(request, None))
    assert [queue.pop_request().request_id for _ in sent] == ["first", "second", "low", "batch"]
