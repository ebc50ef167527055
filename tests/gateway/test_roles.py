"""Changes of roles through the production keeper, links and dispatcher, over fake engines."""

import asyncio
import contextlib

import pytest
from conftest import make_request
from prometheus_client import generate_latest
from test_dispatch import PROMPT, expected

from conductor.core import telling
from conductor.planner import Planner, PlannerConfig, Switch
from conductor.role_keeper import RoleKeeper, RoleMetrics
from conductor.roles import Changes
from mooncake.core.errors import RequestError
from mooncake.core.messages import DRAINING, RoleOrder

LONG = 400


@contextlib.asynccontextmanager
async def keeping(world, planner=None, drain_s: float = 30.0, acts: bool = True):
    """A keeper, and what the workers would do: register with the role that they were told."""
    metrics = RoleMetrics(world.registry)
    keeper = RoleKeeper(world.view, world.members.order_role, metrics, planner, Changes(drain_s), acts=acts)

    async def obey() -> None:
        told: dict[str, int] = {}
        while True:
            for engine in world.engines:
                if told.get(engine.instance_id, 0) < len(engine.orders):
                    told[engine.instance_id] = len(engine.orders)
                    engine.role = engine.orders[-1].role
                    await world.register(engine)
            await asyncio.sleep(0.005)

    obeying = asyncio.create_task(obey())
    keeper.start()
    try:
        yield keeper
    finally:
        obeying.cancel()
        await keeper.close()


def role(world, name: str) -> str:
    return world.view.record(name).role


async def test_a_prefill_instance_becomes_one_that_decodes_and_serves_as_such(make_world) -> None:
    world = make_world()
    for name, kind in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
        await world.engine(name, kind)
    async with keeping(world) as keeper:
        keeper.change("p1", "decode")
        await world.until(lambda: role(world, "p1") == "decode")
        assert [order.role for order in world.engines[1].orders] == [DRAINING, "decode"]
        rids = [world.add(make_request(PROMPT)) for _ in range(4)]
        for rid in rids:
            assert await world.finish(rid) == expected(PROMPT, 8)
        assert set(world.engines[0].legs()) == {"prefill"}
        assert set(world.engines[1].legs()) == {"decode"}
        assert world.metric("mooncake_role_switches_total", role="decode") == 1


async def test_what_it_was_doing_ends_where_it_began_and_nothing_new_comes_meanwhile(make_world) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    d0 = await world.engine("d0", "decode", step_s=0.005)
    running = world.add(make_request(PROMPT, max_tokens=LONG))
    await world.until(lambda: len(world.tokens(running)) > 3)
    d1 = await world.engine("d1", "decode")
    async with keeping(world) as keeper:
        keeper.change("d0", "prefill")
        await world.until(lambda: role(world, "d0") == DRAINING)
        later = world.add(make_request(PROMPT))
        assert await world.finish(later) == expected(PROMPT, 8)
        assert d1.legs() == ["decode"]
        assert role(world, "d0") == DRAINING
        assert await world.finish(running) == expected(PROMPT, LONG)
        assert d0.legs() == ["decode"]
        await world.until(lambda: role(world, "d0") == "prefill")


async def test_an_answer_that_is_too_long_goes_on_beside_the_new_role(make_world) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    d0 = await world.engine("d0", "decode", step_s=0.005)
    running = world.add(make_request(PROMPT, max_tokens=LONG))
    await world.until(lambda: len(world.tokens(running)) > 3)
    await world.engine("d1", "decode")
    async with keeping(world, drain_s=0.0) as keeper:
        keeper.change("d0", "prefill")
        await world.until(lambda: role(world, "d0") == "prefill")
        assert not world.finished[running].is_set()
        assert await world.finish(running) == expected(PROMPT, LONG)
        assert d0.legs().count("decode") == 1


async def test_the_planners_decisions_are_carried_out_once_and_its_forecast_is_shown(make_world) -> None:
    class Decided(Planner):
        """Says the same until the role has changed, as the real one may at each interval."""

        def step(self, members):
            wanted = [one for one in members if one.instance_id == "p1" and one.role == "prefill"]
            return [Switch(one.instance_id, "decode") for one in wanted]

    world = make_world()
    planner = Decided(PlannerConfig(interval_s=0.01), world.cost)
    for name, kind in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
        await world.engine(name, kind)
    async with keeping(world, planner):
        await world.until(lambda: role(world, "p1") == "decode")
        await world.until(lambda: world.metric("mooncake_planner_desired_instances", role="prefill") == 1)
        assert [order.role for order in world.engines[1].orders] == [DRAINING, "decode"]
    page = generate_latest(world.registry).decode()
    assert "mooncake_planner_desired_instances{" not in page  # who plans no more says nothing


async def test_a_planner_that_is_only_asked_says_how_many_there_should_be_and_changes_nobody(
    make_world,
) -> None:
    class Decided(Planner):
        """Always wants another split."""

        def step(self, members):
            return [Switch(one.instance_id, "decode") for one in members if one.instance_id == "p1"]

    world = make_world()
    planner = Decided(PlannerConfig(interval_s=0.01), world.cost)
    for name, kind in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
        await world.engine(name, kind)
    async with keeping(world, planner, acts=False):
        await world.until(lambda: world.metric("mooncake_planner_desired_instances", role="prefill") == 1)
        assert [engine.orders for engine in world.engines] == [[], [], []]


async def test_the_planner_hears_of_every_request_and_answer(make_world) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    planner = Planner(PlannerConfig(interval_s=1.0), world.cost)
    world.decider.observer.listen(telling(planner, world.cost), planner.answered)
    rids = [world.add(make_request(PROMPT)) for _ in range(5)]
    for rid in rids:
        await world.finish(rid)
    await world.until(lambda: world.metric("mooncake_requests_total", outcome="finished") == 5)
    async with keeping(world, planner) as keeper:
        await world.until(lambda: world.metric("mooncake_planner_forecast_requests_per_second") == 5)
        assert keeper.planner is planner


async def test_a_wish_that_cannot_be_followed_orders_nothing(make_world) -> None:
    world = make_world()
    p0 = await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    async with keeping(world) as keeper:
        for name, wanted in (("p0", "decode"), ("p0", "king"), ("nobody", "decode")):
            with pytest.raises(RequestError):
                keeper.change(name, wanted)
    assert p0.orders == []


async def test_a_lost_instance_is_forgotten_on_its_way(make_world) -> None:
    world = make_world()
    for name, kind in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
        await world.engine(name, kind)
    async with keeping(world) as keeper:
        world.view.charge_prefill(0.0, "p1", 1e9, 1)  # busy for ever
        keeper.change("p1", "decode")
        await world.until(lambda: role(world, "p1") == DRAINING)
        assert world.engines[1].orders == [RoleOrder(DRAINING, 45.0)]
        await world.metadata.delete("/mooncake/instances/p1")
        await world.until(lambda: world.view.record("p1") is None)
        with pytest.raises(RequestError, match="no instance 'p1'"):
            keeper.change("p1", "decode")


async def test_who_only_counts_on_a_draining_instance_is_placed_anew(make_world) -> None:
    world = make_world()
    p0 = await world.engine("p0", "prefill")
    d0 = await world.engine("d0", "decode")
    p0.freeze()  # the prompt takes its time
    waiting = world.add(make_request(PROMPT))
    d1 = await world.engine("d1", "decode")
    async with keeping(world) as keeper:
        keeper.change("d0", "prefill")
        await world.until(lambda: role(world, "d0") == "prefill")  # nobody counts on it any more
        p0.frozen.clear()
        assert await world.finish(waiting) == expected(PROMPT, 8)
    assert (d0.legs(), d1.legs()) == ([], ["decode"])
    await world.until(lambda: world.view.charged == 0)
