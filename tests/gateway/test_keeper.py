"""What agents' answers leave behind is pinned in the store that has it; a silent store costs nobody."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import httpx
import msgspec
import pytest
from conftest import BLOCK_SIZE
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from conductor.agents import Agents
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.http import FATE, RejectionMiddleware
from conductor.keeper import Keeper, KeeperMetrics
from conductor.plan import Decision, Plan, RequestFacts
from conductor.terms import Terms
from conductor.vllm_seam import Unavailable
from mooncake.core.errors import CapacityError, MooncakeError
from mooncake.core.keys import share_keys
from mooncake.core.messages import InstanceRecord, Pin, Pinned, StoreRecord, StoreRequest
from mooncake.core.rpc import RpcServer

BLOCK_BYTES = 4096
KEYS = [bytes([number]) * 32 for number in range(8)]
PLAN = Plan(request_id="r", prefill="p-n0", decode="p-n1", decision=Decision.KVCACHE_CENTRIC)
FACTS = RequestFacts(request_id="r", prompt_len=8 * BLOCK_SIZE + 1, max_tokens=8, keys=KEYS, arrival_s=0.0)


class Store:
    """A store, as far as pins go."""

    def __init__(self) -> None:
        self.heard: list[Pin] = []
        self.error: MooncakeError | None = None
        self.server = RpcServer("tcp://127.0.0.1:0", StoreRequest, self.handle)
        self.server.start()

    async def handle(self, request: Pin) -> Pinned:
        if self.error is not None:
            raise self.error
        self.heard.append(request)
        return Pinned(len(request.keys))


class Site:
    def __init__(self) -> None:
        self.view = ClusterView()
        self.stores: dict[str, Store] = {}
        self.registry = CollectorRegistry()
        self.agents = Agents(CostModel(), self.view)
        self.keeper = Keeper(self.agents, self.view, KeeperMetrics(self.registry))
        self.calls = True  # the app's answer does
        self.error: Unavailable | None = None
        front = RejectionMiddleware(self.app, agents=self.agents)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=front), base_url="http://gateway")

    def open(self, node: str, ranks: int = 1) -> Store:
        store = self.stores[node] = Store()
        record = InstanceRecord(
            instance_id=f"p-{node}", role="prefill", epoch="1", endpoint="", node=node, pid=1, model="m",
            context_root="00", block_size=BLOCK_SIZE, max_model_len=4096, kv_blocks=100, max_num_seqs=8,
            max_num_batched_tokens=4096, block_bytes=BLOCK_BYTES, vllm_version="", ranks=ranks,
        )  # fmt: skip
        self.view.store_up(
            StoreRecord(node, "1", store.server.endpoint, "", "", 100 * BLOCK_BYTES, 1, transfer="tcp://x")
        )
        self.view.instance_up(0.0, record)
        return store

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Stand for vLLM and the dispatcher: read the body, plan, and answer with a stream."""
        await receive()
        fate = FATE.get()
        assert fate is not None
        if fate.turn is not None:
            fate.turn.planned(time.monotonic(), FACTS, PLAN)
        fate.error = self.error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        end = "tool_calls" if self.calls else "stop"
        for reason in (None, end):
            chunk = json.dumps({"choices": [{"finish_reason": reason}]}, separators=(",", ":"))
            body = f"data: {chunk}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": reason is None})

    async def ask(self, path: str = "/v1/chat/completions", **fields: object) -> None:
        await self.client.post(path, json={"program_id": "run", "tools": [{"type": "function"}], **fields})

    def turn(self, program: str, prefill: str) -> None:
        """Let one come, run on `prefill` and call a tool, without HTTP."""
        now_s = time.monotonic()
        one = self.agents.came(now_s, Terms(program=program, tools=True))
        assert one is not None
        one.planned(now_s, FACTS, msgspec.structs.replace(PLAN, prefill=prefill))
        one.calls_tools = True
        one.ended(now_s, served=True)

    async def close(self) -> None:
        await self.keeper.close()
        await self.client.aclose()
        for store in self.stores.values():
            await store.server.close()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    site.open("n0")
    yield site
    await site.close()


async def test_what_an_answer_that_calls_a_tool_leaves_is_pinned_where_it_was_computed(site: Site) -> None:
    other = site.open("n1")
    await site.ask()
    await site.keeper.round(time.monotonic())
    (heard,) = site.stores["n0"].heard
    assert heard.keys == KEYS
    assert heard.ttl_s > 0
    assert other.heard == []
    assert site.metric("mooncake_keep_orders_total", result="sent") == 1
    assert site.metric("mooncake_kept_contexts") == 1
    assert site.metric("mooncake_kept_blocks") == len(KEYS)


async def test_what_ranks_share_is_pinned_with_all_its_shares(site: Site) -> None:
    store = site.open("n1", ranks=2)
    site.turn("run", "p-n1")
    await site.keeper.round(time.monotonic())
    heard = [order for order in store.heard if order.ttl_s]
    assert [order.keys for order in heard] == [share_keys(KEYS, 2)]
    assert site.metric("mooncake_kept_blocks") == len(KEYS)


async def test_an_answer_that_calls_none_or_a_request_turned_away_leaves_nothing(site: Site) -> None:
    site.calls = False
    await site.ask()
    site.calls, site.error = True, Unavailable("full", 1.0, HTTPStatus.SERVICE_UNAVAILABLE)
    await site.ask()
    site.error = None
    await site.ask(path="/v1/messages/count_tokens")
    await site.ask(tools=None)
    await site.keeper.round(time.monotonic())
    assert site.stores["n0"].heard == []


async def test_a_last_turn_unpins_what_it_went_on_with(site: Site) -> None:
    await site.ask()
    await site.keeper.round(time.monotonic())
    site.calls = False
    await site.ask()
    await site.keeper.round(time.monotonic())
    assert [bool(pin.ttl_s) for pin in site.stores["n0"].heard] == [True, True, False]


async def test_a_store_that_refuses_is_said_once_and_others_hear_all_the_same(site: Site) -> None:
    other = site.open("n1")
    site.stores["n0"].error = CapacityError("no")
    with capture_logs() as logs:
        for number in range(3):
            for prefill in ("p-n0", "p-n1"):
                site.turn(f"{prefill}-{number}", prefill)
            await site.keeper.round(time.monotonic())
        site.stores["n0"].error = None
        await site.ask()
        await site.keeper.round(time.monotonic())
    assert [entry["event"] for entry in logs] == ["keeper.trouble", "keeper.trouble_over"]
    assert len(other.heard) == 3
    assert site.metric("mooncake_keep_orders_total", result="failed") == 3


async def test_a_store_that_is_gone_is_no_reason_to_stop(site: Site) -> None:
    await site.ask()
    site.view.store_removed("n0")
    await site.keeper.round(time.monotonic())
    assert site.metric("mooncake_keep_orders_total", result="failed") == 1


async def test_it_runs_by_itself_and_ends(site: Site) -> None:
    site.keeper.start()
    await site.ask()
    async with asyncio.timeout(20):
        while not site.stores["n0"].heard:  # noqa: ASYNC110 -- another loop's
            await asyncio.sleep(0.01)
    await site.keeper.close()
    await site.keeper.close()


async def test_contexts_of_a_store_that_is_gone_or_has_started_anew_are_kept_no_more(site: Site) -> None:
    for leave in (lambda: site.view.store_removed("n0"), lambda: site.open("n0")):
        await site.ask()
        await site.keeper.round(time.monotonic())
        assert site.metric("mooncake_kept_contexts") == 1
        first = site.stores["n0"]
        leave()
        await site.keeper.round(time.monotonic())
        await site.keeper.round(time.monotonic())
        assert site.metric("mooncake_kept_contexts") == site.metric("mooncake_kept_blocks") == 0
        if site.stores["n0"] is first:
            site.open("n0")
        await first.server.close()
        await site.keeper.round(time.monotonic())
