"""Every answer is on record, a poorer policy is seen, and what is measured reaches the cost model."""

import pytest
from conftest import make_request
from structlog.testing import capture_logs

from conductor.cost import CostModel
from conductor.gate import GateConfig
from conductor.modes import IndexMode
from conductor.observe import Observer
from conductor.plan import Reason
from conductor.terms import CLASSES, Terms
from conductor.vllm_seam import Unavailable
from mooncake.core.messages import Pulse

PROMPT = list(range(10, 31))


async def two_pools(make_world, **kwargs):
    world = make_world(**kwargs)
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    return world


async def served(world, **params) -> str:
    rid = world.add(make_request(PROMPT, **params))
    await world.finish(rid)
    return rid


async def test_a_plan_is_on_record_with_its_terms_and_both_ids(make_world) -> None:
    world = await two_pools(make_world)
    request = make_request(PROMPT, external="chatcmpl-7")
    terms = Terms(tenant="acme", slo_class=CLASSES["premium"], ttft_slo_s=30.0)
    await world.finish(world.add(request, terms))
    (why,) = world.decider.decisions.last("chatcmpl-7")
    assert (why.request_id, why.kind) == (request.request_id, "kvcache_centric")
    assert (why.tenant, why.slo_class, why.ttft_slo_s) == ("acme", "premium", 30.0)
    assert (why.prompt_tokens, why.prompt_blocks) == (21, 5)
    assert (why.prefills[0].instance, why.decodes[0].instance) == ("p0", "d0")


async def test_rejections_are_on_record_whoever_rejects(make_world) -> None:
    slow = CostModel(prefill_prior=(10.0, 1e-9, 1e-12))
    world = await two_pools(make_world, gate=GateConfig(hold_s=1e-6), cost=slow)
    world.add(make_request(PROMPT))
    hurry = Terms(ttft_slo_s=0.5)
    with pytest.raises(Unavailable):  # the gate: it would wait too long
        world.add(make_request(PROMPT, external="late"), hurry)
    (why,) = world.decider.decisions.last("late")
    assert (why.kind, why.reason, why.prefills) == ("rejected", str(Reason.TTFT_SLO), [])
    assert "in the queue" in why.detail


async def test_a_leg_that_moves_is_on_record_again(make_world) -> None:
    world = await two_pools(make_world)
    world.engines[0].fail_next = 1
    rid = await served(world)
    first, again = world.decider.decisions.last(rid)[::-1]
    assert (first.kind, first.prefill) == ("kvcache_centric", "p0")
    assert (again.kind, again.prefill) == ("no_prefill_alive", None)  # the one there is has just failed


async def test_debug_logs_have_one_line_per_answer_and_no_prompt(make_world) -> None:
    world = await two_pools(make_world)
    with capture_logs() as lines:
        rid = await served(world)
    (line,) = [line for line in lines if line["event"] == "conductor.decision"]
    assert (line["log_level"], line["why"]["request_id"], line["why"]["prefill"]) == ("debug", rid, "p0")
    assert line["request_id"] == line["why"]["client_id"]  # what the HTTP front end does not name otherwise
    assert str(PROMPT) not in str(line)


# ---------------------------------------------------------------- fall-backs


async def test_without_a_store_the_index_is_seen_to_know_nothing_and_requests_are_counted(make_world) -> None:
    world = await two_pools(make_world)
    await served(world)
    assert world.metric("mooncake_index_mode", mode="fallback") == 1
    assert world.metric("mooncake_index_mode", mode="exact") == 0
    assert world.metric("mooncake_fallbacks_total", kind="index_empty") == 1
    (why,) = world.decider.decisions.last()
    assert why.index_mode == "fallback"


def tick_twice(observer, stores, serving=()):
    with capture_logs() as lines:
        observer.tick(stores, serving)
        observer.tick(stores, serving)
    return [(line["event"], line.get("kind"), line["log_level"]) for line in lines]


async def test_each_change_of_the_index_is_logged_once_and_shown(make_world) -> None:
    world = make_world()
    observer = Observer(world.cost, make_world().metrics)
    metrics = observer._metrics
    assert tick_twice(observer, {}) == [("conductor.fallback", "index_empty", "warning")]
    assert tick_twice(observer, {"a": True}) == [("conductor.fallback_over", "index_empty", "info")]
    assert metrics.index_mode.labels("exact")._value.get() == 1
    assert tick_twice(observer, {"a": True, "b": False}) == [("conductor.fallback", "index_stale", "warning")]
    assert [metrics.index_mode.labels(str(mode))._value.get() for mode in IndexMode] == [0, 1, 0]
    assert metrics.fallback.labels("index_stale")._value.get() == 1
    assert tick_twice(observer, {"a": True}) == [("conductor.fallback_over", "index_stale", "info")]
    assert tick_twice(observer, {"a": True}) == []


@pytest.mark.parametrize(("role", "kind"), [("prefill", "no_decode_alive"), ("decode", "no_prefill_alive")])
async def test_one_pool_doing_both_is_counted_logged_once_and_over_when_the_other_is_back(
    make_world, role, kind
) -> None:
    world = make_world()
    await world.engine("a", role)
    with capture_logs() as lines:
        await served(world)
        await served(world)
    assert [line["kind"] for line in lines if line["event"] == "conductor.fallback"].count(kind) == 1
    assert world.metric("mooncake_fallbacks_total", kind=kind) == 2
    assert world.metric("mooncake_fallback_active", kind=kind) == 1
    await world.engine("b", "decode" if role == "prefill" else "prefill")
    await served(world)
    assert world.metric("mooncake_fallback_active", kind=kind) == 0
    assert world.metric("mooncake_fallbacks_total", kind=kind) == 2


async def test_prompts_that_nobody_can_name_are_counted_and_their_cause_logged_once(make_world) -> None:
    from vllm.lora.request import LoRARequest

    world = await two_pools(make_world)
    with capture_logs() as lines:
        for _ in range(2):
            request = make_request(PROMPT)
            request.lora_request = LoRARequest("secret", 1, "/nowhere/at/all")
            await world.finish(world.add(request))
    assert world.metric("mooncake_fallbacks_total", kind="keys_unknown") == 2
    said = [line["reason"] for line in lines if line["event"] == "conductor.keys_unknown"]
    assert said == ["an adapter whose weights cannot be read here"]


# ---------------------------------------------------------------- measurements


def pulse(load_bytes=0.0, load_s=0.0, fetch_bytes=0.0, fetch_s=0.0, epoch="e1") -> Pulse:
    return Pulse(epoch, 0.0, load_bytes, load_s, fetch_bytes, fetch_s)


def test_what_engines_load_and_stores_fetch_teaches_both_bandwidths(make_world) -> None:
    from prometheus_client import CollectorRegistry

    from conductor.metrics import GatewayMetrics

    cost = CostModel()
    observer = Observer(cost, GatewayMetrics(CollectorRegistry()))
    for turn in range(80):
        observer.moved("p0", pulse(turn * 2e9, turn * 1.0, turn * 5e8, turn * 1.0))
    assert cost.transfer_s(10**9, remote=False) == pytest.approx(0.5, rel=0.01)
    assert cost.transfer_s(10**9, remote=True) == pytest.approx(2.0, rel=0.01)
    assert cost.errors().transfer_count == 2 * 79


def test_only_what_moves_while_we_listen_counts_and_seconds_wait_for_their_bytes() -> None:
    from prometheus_client import CollectorRegistry

    from conductor.metrics import GatewayMetrics

    cost = CostModel(local_bytes_s=1e9)
    observer = Observer(cost, GatewayMetrics(CollectorRegistry()))
    observer.moved("p0", pulse(7e12, 1.0))  # before us
    observer.moved("p0", pulse(7e12, 1.5))  # a load that is not yet verified
    observer.moved("p0", pulse(7e12 + 1e9, 2.0))
    assert cost.transfer_s(10**9, remote=False) == pytest.approx(1.0)  # 1 GB in 1 s, not in 0.5 s
    observer.moved("p0", pulse(0.0, 0.0, epoch="e2"))  # restarted
    observer.lost("p0")
    observer.moved("p0", pulse(5e9, 1.0, epoch="e2"))
    assert cost.errors().transfer_count == 1


async def test_an_engines_counters_come_with_its_pulse(make_world) -> None:
    world = make_world()
    engine = await world.engine("b0", "both")
    engine.moved = (3e9, 1.0, 0.0, 0.0)
    await world.until(lambda: world.cost.errors().transfer_count == 1)
    await world.until(lambda: world.metric("mooncake_predictions_measured", kind="transfer") == 1)
    assert world.metric("mooncake_prediction_error_ratio", kind="transfer") > 0


async def test_lengths_are_learned_by_tenant_and_class(make_world) -> None:
    world = await two_pools(make_world)
    for _ in range(33):
        await world.finish(world.add(make_request(PROMPT, max_tokens=3), Terms(tenant="short")))
    assert world.cost.output_tokens(4096, "short", "default") == 3
    assert world.cost.output_tokens(4096, "short", "premium") > 3
    assert world.cost.errors().output_count == 33
