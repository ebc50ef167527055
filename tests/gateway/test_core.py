"""Gateways that share one decision core, over real sockets and fake engines."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from conftest import DEADLINE_S, Front, make_request
from fake_engine import FakeEngine, encoded
from prometheus_client import CollectorRegistry
from test_dispatch import PROMPT, expected

from conductor import core_desk
from conductor.cluster import Health
from conductor.core import Core
from conductor.core_messages import CORE_KEY
from conductor.core_service import CoreService
from conductor.dispatch import Dispatcher
from conductor.metrics import DecisionMetrics, GatewayMetrics
from conductor.remote_core import RemoteCore
from conductor.terms import Terms
from mooncake.core.election import LeaderRecord
from mooncake.core.errors import RequestError
from mooncake.core.messages import DRAINING, INSTANCES_PREFIX
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.options import GatewayOptions
from tests.unit.conductor.make import store

TTL_S = 0.5
"""Shorter than in production: tests wait for leases to end."""


class Gateway(Front):
    """One stateless gateway."""

    def __init__(self, options: GatewayOptions, metadata: MemoryMetadata, name: str) -> None:
        registry = CollectorRegistry()
        metrics = GatewayMetrics(registry)
        self.core = RemoteCore(options, metadata, metrics, name)
        self.view = self.core.view
        super().__init__(Dispatcher(self.core.members, self.core, metrics, first_token=False), registry)
        self.core.start(self.dispatcher)

    @property
    def mode(self) -> str:
        return str(self.core.status()["mode"])

    async def close(self) -> None:
        self.collecting.cancel()
        await self.core.close()


class Site:
    """Fake engines, cores and gateways around one metadata store."""

    def __init__(self, folder: Path) -> None:
        self.metadata = MemoryMetadata(tick_s=0.02)
        self.folder = folder
        self.engines: list[FakeEngine] = []
        self.cores: list[CoreService] = []
        self.gateways: list[Gateway] = []
        self.options = GatewayOptions(model="m", run_dir=str(folder))

    def set(self, **changes: object) -> None:
        self.options = self.options.replace(**changes)

    async def engine(self, instance_id: str, role: str, **kwargs: object) -> FakeEngine:
        engine = FakeEngine(instance_id, role, **kwargs)
        self.engines.append(engine)
        await self.metadata.put(INSTANCES_PREFIX + instance_id, encoded(engine.record))
        return engine

    async def core(self) -> CoreService:
        number = len(self.cores)
        core = Core(self.options, self.metadata, DecisionMetrics(CollectorRegistry()))
        service = CoreService(core, self.metadata, "tcp://127.0.0.1:0", f"core-{number}", TTL_S)
        self.cores.append(service)
        await service.start()
        return service

    async def gateway(self) -> Gateway:
        gateway = Gateway(self.options, self.metadata, f"gw-{len(self.gateways)}")
        self.gateways.append(gateway)
        return gateway

    async def settled(self) -> None:
        """Everybody knows all engines, and every gateway has the core that leads."""
        views = [one.view for one in self.gateways] + [one.core.view for one in self.cores]
        names = [engine.instance_id for engine in self.engines]
        await self.until(lambda: all(view.health(name) is Health.ALIVE for view in views for name in names))
        if self.cores:
            await self.until(lambda: all(gateway.mode == "core" for gateway in self.gateways))

    async def until(self, condition, deadline_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 -- conditions look at other threads
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.close()
        for core in self.cores:
            await core.close()
        await self.metadata.close()
        for engine in self.engines:
            engine.frozen.clear()
            engine.kill()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    yield site
    await site.close()


async def pools(site: Site, gateways: int = 2, cores: int = 1) -> None:
    await site.engine("p0", "prefill")
    await site.engine("d0", "decode")
    for _ in range(cores):
        await site.core()
    for _ in range(gateways):
        await site.gateway()
    await site.settled()


async def test_requests_of_two_gateways_are_planned_by_one_core_and_all_load_is_given_back(site) -> None:
    await pools(site)
    rids = [(gateway, gateway.add(make_request([n, *PROMPT]))) for n in range(4) for gateway in site.gateways]
    for number, (gateway, rid) in enumerate(rids):
        assert await gateway.finish(rid) == expected([number // 2, *PROMPT], 8)
    await site.until(lambda: all(gateway.dispatcher.in_flight == 0 for gateway in site.gateways))
    view = site.cores[0].core.view
    await site.until(lambda: view.charged == 0)
    assert all(gateway.view.charged == 0 for gateway in site.gateways)
    assert len(site.cores[0].core.decider.decisions) == 8
    assert all(gateway.metric("mooncake_fallbacks_total", kind="core_away") == 0 for gateway in site.gateways)


async def kill(service: CoreService) -> None:
    """End it as SIGKILL does: it says nothing any more, and its lease runs out."""
    ending = [*service._tasks, service._election._task]
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
    service._socket.close()
    service._closed = True
    await service.core.close()


def leader(site: Site) -> CoreService:
    (found,) = [one for one in site.cores if one.leads]
    return found


async def test_load_that_one_gateway_causes_is_seen_in_the_plans_of_the_other(site) -> None:
    await pools(site)
    await site.engine("d1", "decode")
    await site.settled()
    decodes = site.engines[1:]
    for engine in decodes:
        engine.step_s = 3600.0  # after its first step, which is free
    first, second = site.gateways
    for number, gateway in enumerate((first, first, second, second)):
        gateway.add(make_request([number, *PROMPT], max_tokens=50))
        await site.until(lambda sent=number + 1: sum(len(e.received) for e in decodes) == sent)
    assert [len(engine.received) for engine in decodes] == [2, 2]
    loads = {one["instance_id"]: one["load"]["decode_requests"] for one in await second.core.instances()}
    assert loads == {"p0": 0, "d0": 2, "d1": 2}
    own = [second.view.load(name).decode_requests for name in ("d0", "d1")]
    assert own == [1, 1]  # for when it has to decide alone


async def test_without_a_core_a_gateway_decides_by_itself_which_is_counted_and_seen(site) -> None:
    await site.engine("p0", "prefill")
    await site.engine("d0", "decode")
    gateway = await site.gateway()
    await site.settled()
    assert gateway.core.status()["mode"] == "fallback"
    assert await gateway.finish(gateway.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert gateway.metric("mooncake_fallbacks_total", kind="core_away") == 1
    assert gateway.metric("mooncake_fallback_active", kind="core_away") == 1
    assert {one["instance_id"] for one in await gateway.core.instances()} == {"p0", "d0"}
    (why,) = await gateway.core.decisions("")
    assert why["kind"] == "cache_aware"
    await site.core()
    await site.settled()  # by itself
    assert gateway.metric("mooncake_fallback_active", kind="core_away") == 0
    assert await gateway.finish(gateway.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert gateway.metric("mooncake_fallbacks_total", kind="core_away") == 1
    assert len(await gateway.core.decisions("")) == 2


async def test_no_request_is_lost_with_the_core_whether_it_runs_waits_or_is_new(site) -> None:
    site.set(hold_s=1e-6)
    await pools(site)
    prefill, decode = site.engines
    decode.step_s = 0.02
    running = [(g, g.add(make_request(PROMPT, max_tokens=60))) for g in site.gateways]
    for gateway, rid in running:
        await site.until(lambda gateway=gateway, rid=rid: len(gateway.tokens(rid)) >= 2)
    prefill.freeze()
    held = [(g, g.add(make_request([n, *PROMPT]))) for n in range(3) for g in site.gateways]
    core = leader(site)
    await site.until(lambda: len(core.core.decider.gate) == 5)
    await kill(core)
    fresh = [(g, g.add(make_request([n, *PROMPT]))) for n in (8, 9) for g in site.gateways]
    prefill.frozen.clear()
    for gateway, rid in running:
        assert await gateway.finish(rid) == expected(PROMPT, 60)
    for gateway, rid in held + fresh:
        assert len(await gateway.finish(rid)) == 8
    assert all(g.metric("mooncake_fallbacks_total", kind="core_away") >= 2 for g in site.gateways)
    await site.until(lambda: all(g.dispatcher.in_flight == g.view.charged == 0 for g in site.gateways))
    assert not any(gateway.failed for gateway in site.gateways)


async def test_a_standby_takes_over_with_all_that_is_in_flight_and_gets_all_of_it_back(site) -> None:
    await pools(site, cores=2)
    core = leader(site)
    (standby,) = [one for one in site.cores if one is not core]
    site.engines[1].step_s = 0.02
    rids = [(g, g.add(make_request(PROMPT, max_tokens=100))) for g in site.gateways]
    await site.until(lambda: site.engines[1].legs().count("decode") == 2)
    await kill(core)
    await site.until(lambda: standby.leads and len(standby.gateways) == 2)
    load = standby.core.view.load("d0")
    assert (load.decode_requests, load.decode_kv_tokens) == (2, core.core.view.load("d0").decode_kv_tokens)
    await site.settled()
    later = site.gateways[0].add(make_request(PROMPT))  # planned by the successor
    assert await site.gateways[0].finish(later) == expected(PROMPT, 8)
    assert len(standby.core.decider.decisions) == 1
    for gateway, rid in rids:
        assert await gateway.finish(rid) == expected(PROMPT, 100)
    await site.until(lambda: standby.core.view.charged == 0)
    assert not load.is_busy
    assert all(g.view.charged == 0 for g in site.gateways)


async def test_a_leader_that_is_told_to_end_resigns_at_once(site) -> None:
    await pools(site, gateways=1, cores=2)
    core = leader(site)
    (standby,) = [one for one in site.cores if one is not core]
    await core.close()
    await site.until(lambda: standby.gateways == ["gw-0"], deadline_s=DEADLINE_S)
    assert not core.leads


async def test_a_core_that_does_not_lead_says_so_and_decides_nothing(site) -> None:
    await pools(site, gateways=1, cores=2)
    (standby,) = [one for one in site.cores if not one.leads]
    await site.metadata.put(CORE_KEY, msgspec.json.encode(LeaderRecord("wrong", standby.endpoint)))
    (gateway,) = site.gateways
    await site.until(lambda: gateway.core.status()["mode"] == "fallback")
    assert await gateway.finish(gateway.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert len(standby.core.decider.decisions) == 0
    assert standby.core.view.charged == 0


async def test_a_leader_that_wakes_up_after_its_successor_has_spoken_is_not_followed(site) -> None:
    await pools(site, gateways=1, cores=2)
    (gateway,) = site.gateways
    old = leader(site)
    (new,) = [one for one in site.cores if one is not old]
    term, close = old._election.term, old._election.close
    for asleep in (old._tasks[0], old._election._task):
        asleep.cancel()
    old._election = SimpleNamespace(term=term, close=close)  # its clock stands still: it believes in its term
    await site.until(lambda: gateway.core.status().get("leader") == new.name)
    await site.metadata.put(CORE_KEY, msgspec.json.encode(LeaderRecord("core-0", old.endpoint)))
    await site.until(lambda: gateway.metric("mooncake_core_refused_total") > 0)
    assert gateway.core.status()["mode"] == "fallback"
    assert await gateway.finish(gateway.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert len(old.core.decider.decisions) == 0


async def test_what_a_gateway_had_in_flight_is_given_back_when_it_is_gone(site, monkeypatch) -> None:
    monkeypatch.setattr(core_desk, "SILENT_S", 0.5)
    await pools(site)
    site.engines[1].step_s = 3600.0
    gone, other = site.gateways
    for gateway in (gone, other):
        gateway.add(make_request(PROMPT))
    view = site.cores[0].core.view
    await site.until(lambda: view.load("d0").decode_requests == 2)
    await gone.core._link.close()
    await site.until(lambda: view.load("d0").decode_requests == 1)
    assert site.cores[0].gateways == ["gw-1"]


async def test_a_tenants_quota_holds_over_all_gateways(site) -> None:
    file = site.folder / "tenants.toml"
    file.write_text("[tenants.a]\nconcurrent = 1\n")
    site.set(tenants=str(file))
    await pools(site)
    site.engines[1].step_s = 0.02
    first, second = site.gateways
    second.note_failures()
    a = Terms(tenant="a")
    rid = first.add(make_request(PROMPT, max_tokens=30), a)
    await site.until(lambda: len(first.tokens(rid)) > 0)
    refused = second.add(make_request(PROMPT), a)
    await second.finish(refused)
    assert "1 requests at once of tenant 'a'" in str(second.failed[refused])
    assert second.failed[refused].http_status == 429
    assert second.metric("mooncake_requests_total", outcome="rejected") == 1
    await first.finish(rid)
    await site.until(lambda: len(site.cores[0].core.quotas) == 0)
    assert len(await second.finish(second.add(make_request(PROMPT), a))) == 8


async def test_decode_load_is_asked_for_again_over_rpc_when_the_prompt_is_done(site) -> None:
    site.set(admission="late", tbt_slo_s=1e-9)
    await pools(site, gateways=1)
    (gateway,) = site.gateways
    gateway.note_failures()
    rid = gateway.add(make_request(PROMPT))
    await gateway.finish(rid)
    assert gateway.failed[rid].http_status == 429
    assert (site.engines[0].legs(), site.engines[1].legs()) == (["prefill"], [])
    await site.until(lambda: site.cores[0].core.view.charged == gateway.view.charged == 0)


async def test_a_leg_that_fails_is_placed_again_by_the_core(site) -> None:
    await pools(site, gateways=1)
    await site.engine("p1", "prefill")
    await site.settled()
    site.engines[0].fail_next = site.engines[2].fail_next = 1
    (gateway,) = site.gateways
    rid = gateway.add(make_request(PROMPT))
    assert await gateway.finish(rid) == expected(PROMPT, 8)
    kinds = [why["kind"] for why in await gateway.core.decisions(rid)]
    assert len(kinds) >= 2
    assert gateway.metric("mooncake_fallbacks_total", kind="core_away") == 0


async def test_a_client_that_leaves_before_the_answer_leaves_no_load(site) -> None:
    await pools(site, gateways=1)
    (gateway,) = site.gateways
    rid = gateway.add(make_request(PROMPT))
    gateway.dispatcher.abort([rid])  # before the loop has had a turn
    view = site.cores[0].core.view
    await site.until(lambda: len(site.cores[0].core.decider.decisions) == 1 and view.charged == 0)
    assert gateway.dispatcher.in_flight == gateway.view.charged == 0


async def test_roles_change_through_any_gateway_and_a_wrong_wish_is_told(site) -> None:
    await pools(site, gateways=1)
    (gateway,) = site.gateways
    with pytest.raises(RequestError, match="is the last prefill instance"):
        await gateway.core.change_role("p0", "decode")
    prefill = await site.engine("p1", "prefill")
    await site.settled()
    await gateway.core.change_role("p1", "decode")
    await site.until(lambda: bool(prefill.orders))
    order = prefill.orders[0]  # its term tells a relay whose orders are over
    assert (order.role, order.term.leader) == (DRAINING, site.cores[0].name)


async def test_gateways_know_the_stores_and_do_not_follow_their_blocks(site) -> None:
    gateway = await site.gateway()
    await site.metadata.put("/mooncake/stores/n1", msgspec.json.encode(store("n1")))
    await site.until(lambda: gateway.view.is_open("n1"))
    assert gateway.core.members.stores_in_step() == {}


async def test_who_waits_at_a_shared_core_is_counted_once_by_its_own_gateway(site) -> None:
    site.set(hold_s=1e-6)
    await pools(site)
    prefill, _ = site.engines
    prefill.freeze()
    for n in range(3):
        for gateway in site.gateways:
            gateway.add(make_request([n, *PROMPT]))
    core = leader(site)
    await site.until(lambda: len(core.core.decider.gate) == 5)
    assert (
        sum(gateway.metric("mooncake_requests_waiting", slo_class="default") for gateway in site.gateways)
        == 5
    )
    assert (
        core.core.metrics.registry.get_sample_value("mooncake_requests_waiting", {"slo_class": "default"})
        is None
    )
    prefill.frozen.clear()
