"""Quotas and shares of tenants at the dispatcher, over fake engines."""

import pytest
from conftest import make_request

from conductor.cost import CostModel
from conductor.gate import GateConfig
from conductor.tenants import Quotas, Tenant, Tenants
from conductor.terms import Terms
from conductor.vllm_seam import Unavailable

PROMPT = list(range(10, 23))
A, B = Terms(tenant="a"), Terms(tenant="b")
QUOTA = "the tenant's quota is used up"


async def pools(make_world, **kwargs):
    world = make_world(**kwargs)
    prefill = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    return world, prefill


async def test_what_a_tenant_may_do_at_once_is_given_back_when_a_request_ends(make_world) -> None:
    world, _ = await pools(make_world, quotas=Quotas(Tenants({"a": Tenant(concurrent=1)})))
    first = world.add(make_request(PROMPT), A)
    with pytest.raises(Unavailable, match="1 requests at once of tenant 'a'") as caught:
        world.add(make_request(PROMPT), A)
    assert caught.value.http_status == 429
    assert caught.value.retry_after_s >= 1
    other = world.add(make_request(PROMPT), B)
    await world.finish(first)
    await world.finish(other)
    await world.until(lambda: world.dispatcher.in_flight == 0)
    assert len(await world.finish(world.add(make_request(PROMPT), A))) == 8
    assert world.metric("mooncake_tenant_rejections_total", tenant="a", reason=QUOTA) == 1
    assert world.metric("mooncake_rejections_total", slo_class="default", reason=QUOTA) == 1
    assert world.metric("mooncake_tenant_tokens_total", tenant="a") == 2 * (len(PROMPT) + 8)
    assert world.metric("mooncake_tenant_tokens_total", tenant="other") == len(PROMPT) + 8


async def test_a_client_that_leaves_gives_its_place_back(make_world) -> None:
    world, prefill = await pools(make_world, quotas=Quotas(Tenants({"a": Tenant(concurrent=1)})))
    prefill.step_s = 3600.0
    gone = world.add(make_request(PROMPT), A)
    world.dispatcher.abort([gone])
    await world.until(lambda: world.dispatcher.in_flight == 0)
    world.add(make_request(PROMPT), A)


async def test_what_nobody_can_serve_takes_no_tokens_of_a_quota(make_world) -> None:
    quotas = Quotas(Tenants({"a": Tenant(tokens_per_s=1e-6, tokens_burst=len(PROMPT) + 8.0)}))
    world = make_world(quotas=quotas)
    for _ in range(2):
        with pytest.raises(Unavailable, match="no instance alive"):
            world.add(make_request(PROMPT), A)
    assert len(quotas) == 0


async def test_tenants_that_wait_share_by_weight(make_world) -> None:
    world, prefill = await pools(
        make_world,
        gate=GateConfig(hold_s=1e-6),
        cost=CostModel(prefill_prior=(10.0, 1e-9, 1e-12)),
        quotas=Quotas(Tenants({"a": Tenant(weight=3.0)})),
    )
    rids = [world.add(make_request([number, *PROMPT]), B) for number in range(5)]
    rids += [world.add(make_request([number, *PROMPT]), A) for number in range(100, 104)]
    for rid in rids:
        await world.finish(rid)
    order = ["a" if request.prompt_token_ids[0] >= 100 else "b" for request in prefill.received]
    assert order.count("a") == 4
    assert order[1:6].count("a") >= 3  # the first did not wait
