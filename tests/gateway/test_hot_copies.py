"""The gateway tells the directory that leads what is hot; without one it goes on, and says so once."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import msgspec
import pytest
from conftest import BLOCK_SIZE, make_request
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from conductor import hot_copies
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.heat import ROUND_S, TTL_S, USES_MIN, Heat
from conductor.hot_copies import REPEAT_S, SAID_MAX, HotCopies, HotMetrics
from conductor.index import PrefixIndex
from conductor.plan import Decision, Plan, RequestFacts
from kvstore.directory.directory import Directory
from kvstore.directory.messages import LEADER_KEY, DirectoryRequest, KeepHot
from kvstore.leader import term as leader_term
from kvstore.leader.term import LeaderTerm
from mooncake.core.config import HOT_COPIES, HOT_COPIES_MAX
from mooncake.core.election import LeaderRecord
from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, NotLeader
from mooncake.core.keys import share_keys
from mooncake.core.messages import InstanceRecord, Ok, Pulled, StoreRecord, StoreStats, Term
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.options import GatewayOptions
from mooncake.core.rpc import RpcServer

BLOCK_BYTES = 4096
NODES = ("n0", "n1", "n2")
DEADLINE_S = 20.0


def chain(name: str, length: int = 8) -> list[bytes]:
    return [f"{name}{number}".encode().ljust(32, b".") for number in range(length)]


class Leader:
    """A directory that leads, as far as its rpc goes."""

    def __init__(self) -> None:
        self.heard: list[KeepHot] = []
        self.error: MooncakeError | None = None
        self.server = RpcServer("tcp://127.0.0.1:0", DirectoryRequest, self.handle)
        self.server.start()

    async def handle(self, request: KeepHot) -> Ok:
        if self.error is not None:
            raise self.error
        self.heard.append(request)
        return Ok()


class World:
    """A gateway's sender, on a view of three hosts with an engine and a store each."""

    def __init__(self, nodes: int = 3, copies_max: int = 8, transfer: str = "tcp://x") -> None:
        self.metadata = MemoryMetadata()
        self.view = ClusterView()
        self.index = PrefixIndex()
        self.registry = CollectorRegistry()
        self.heat = Heat(CostModel(remote_bytes_s=1e12), copies_max)
        self.hot = HotCopies(self.heat, self.view, self.index, self.metadata, HotMetrics(self.registry))
        self.leaders: list[Leader] = []
        self.begun_s = time.monotonic()
        for number in range(nodes):
            self.host(f"n{number}", transfer=transfer)

    def host(self, node: str, role: str = "prefill", transfer: str = "tcp://x", ranks: int = 1) -> None:
        record = InstanceRecord(
            instance_id=f"p-{node}", role=role, epoch="1", endpoint="", node=node, pid=1, model="m",
            context_root="00", block_size=32, max_model_len=4096, kv_blocks=100, max_num_seqs=8,
            max_num_batched_tokens=4096, block_bytes=BLOCK_BYTES, vllm_version="", ranks=ranks,
        )  # fmt: skip
        self.view.store_up(StoreRecord(node, "1", "", "", "", 400 * BLOCK_BYTES, 1, transfer=transfer))
        self.view.instance_up(0.0, record)
        self.view.link_up(0.0, record.instance_id)
        self.view.pulse(0.0, record.instance_id, 0.0)

    async def leader(self) -> Leader:
        leader = Leader()
        self.leaders.append(leader)
        await self.leads(leader.server.endpoint)
        return leader

    async def leads(self, endpoint: str) -> None:
        value = msgspec.json.encode(LeaderRecord("d", endpoint, 1))
        await self.metadata.put(LEADER_KEY, value)

    def ask(self, keys: list[bytes], times: int, hit: int | None = None) -> None:
        facts = RequestFacts(request_id="r", prompt_len=1, max_tokens=1, keys=keys, arrival_s=0.0)
        hit_blocks = len(keys) if hit is None else hit
        plan = Plan(
            request_id="r", prefill="p-n0", decode=None, decision=Decision.KVCACHE_CENTRIC,
            hit_blocks=hit_blocks,
        )  # fmt: skip
        for _ in range(times):
            self.hot.planned(facts, plan)

    async def round(self, after_s: float = 0.0) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.hot.round(self.begun_s + after_s)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def wishes(self, result: str) -> float:
        return self.metric("mooncake_hot_wishes_total", result=result)

    async def close(self) -> None:
        await self.hot.close()
        for leader in self.leaders:
            await leader.server.close()
        await self.metadata.close()


@pytest.fixture
async def make() -> AsyncIterator[type[World]]:
    worlds: list[World] = []

    def made(*args: object, **kwargs: object) -> World:
        worlds.append(World(*args, **kwargs))  # type: ignore[arg-type]
        return worlds[-1]

    yield made
    for world in worlds:
        await world.close()


# ---------------------------------------------------------------- with a directory


async def test_what_many_ask_for_is_told_with_the_hosts_that_prefill_holders_first(make):
    world = make()
    leader = await world.leader()
    world.host("n9", role="decode")
    world.index.apply("n2", b"".join(chain("a")), b"")
    world.ask(chain("a"), 30)
    await world.round()
    (wish,) = leader.heard
    assert (wish.keys, wish.copies, wish.size_bytes, wish.ttl_s) == (chain("a"), 3, BLOCK_BYTES, TTL_S)
    assert wish.nodes[0] == "n2"
    assert sorted(wish.nodes) == list(NODES)
    assert (world.metric("mooncake_hot_prefixes"), world.metric("mooncake_hot_copies_wanted")) == (1, 3)
    assert world.wishes("sent") == 1


async def test_what_ranks_share_is_wished_for_with_all_its_shares(make):
    world = make()
    leader = await world.leader()
    world.host("n0", ranks=2)
    world.ask(chain("a"), 30)
    await world.round()
    (wish,) = leader.heard
    assert (wish.keys, wish.size_bytes) == (share_keys(chain("a"), 2), BLOCK_BYTES // 2)


async def test_a_wish_is_said_again_now_and_then_and_at_once_when_it_changes(make):
    world = make()
    leader = await world.leader()
    world.ask(chain("a"), 3 * int(USES_MIN))
    for after_s in (0.0, ROUND_S, REPEAT_S - 1):
        await world.round(after_s)
    assert len(leader.heard) == 1
    await world.round(REPEAT_S + 1)
    assert len(leader.heard) == 2
    world.host("n3")
    await world.round(REPEAT_S + 2)
    assert len(leader.heard) == 3
    assert sorted(leader.heard[2].nodes) == [*NODES, "n3"]


async def test_what_has_cooled_down_is_not_said_any_more(make):
    world = make()
    leader = await world.leader()
    world.ask(chain("a"), 30)
    await world.round()
    for after_s in (3000.0, 3100.0):
        await world.round(after_s)
    assert len(leader.heard) == 1
    assert world.metric("mooncake_hot_prefixes") == 0


async def test_the_next_leader_hears_of_all_wishes(make):
    world = make()
    first = await world.leader()
    world.ask(chain("a"), 30)
    await world.round()
    first.error = NotLeader("d2 leads")
    second = await world.leader()
    await world.round(REPEAT_S)
    assert (len(first.heard), len(second.heard)) == (1, 1)


async def test_a_leader_that_is_no_more_costs_one_message_a_round_and_is_logged_once(make):
    world = make()
    leader = await world.leader()
    leader.error = NotLeader("another leads")
    for name in "abc":
        world.ask(chain(name), 30)
    with capture_logs() as logs:
        for after_s in (0.0, 2.0, 4.0):
            await world.round(after_s)
        assert world.wishes("failed") == 3
        leader.error = None
        await world.round(6.0)
    assert len(leader.heard) == 3
    assert [entry["event"] for entry in logs] == ["hot_copies.trouble", "hot_copies.trouble_over"]


async def test_a_wish_that_is_refused_holds_up_no_other_and_waits_for_its_turn(make):
    world = make()
    leader = await world.leader()
    leader.error = CapacityError("too many hot keys")
    for name in "ab":
        world.ask(chain(name), 30)
    for after_s in (0.0, 2.0):
        await world.round(after_s)
    assert (world.wishes("failed"), world.wishes("sent")) == (2, 0)
    leader.error = None
    await world.round(REPEAT_S)
    assert len(leader.heard) == 2


async def test_a_directory_that_does_not_answer_holds_up_a_round_no_longer_than_its_deadline(
    make, monkeypatch
):
    monkeypatch.setattr(hot_copies, "SAY_S", 0.05)
    world = make()
    await world.leads("tcp://127.0.0.1:9")
    world.ask(chain("a"), 30)
    await world.round()
    assert world.wishes("failed") == 1


async def test_one_round_says_a_bounded_number_of_wishes_and_the_next_one_goes_on(make):
    world = make()
    leader = await world.leader()
    for number in range(SAID_MAX + 5):
        world.ask(chain(f"{number}:", 1), 30)
    await world.round()
    assert len(leader.heard) == SAID_MAX
    await world.round(2.0)
    assert len({tuple(wish.keys) for wish in leader.heard}) == SAID_MAX + 5 == len(leader.heard)


async def test_hot_copies_take_at_most_a_quarter_of_a_host(make):
    world = make()
    leader = await world.leader()
    for number in range(30):
        world.ask(chain(f"{number}:", 8), 30 + number)
    await world.round()
    assert sum(len(wish.keys) for wish in leader.heard) == 100  # of 400 blocks


# ---------------------------------------------------------------- without one


async def test_without_a_directory_wishes_are_counted_and_it_is_said_once(make):
    world = make()
    world.ask(chain("a"), 30)
    with capture_logs() as logs:
        for after_s in (0.0, 2.0, 4.0):
            await world.round(after_s)
    assert world.wishes("no_directory") == 3
    assert [entry["event"] for entry in logs] == ["hot_copies.trouble"]
    assert "mooncake directory" in logs[0]["reason"]
    leader = await world.leader()
    await world.round(6.0)
    assert len(leader.heard) == 1


async def test_nonsense_in_the_place_of_a_leader_is_counted(make):
    world = make()
    await world.metadata.put(LEADER_KEY, b"no json")
    world.ask(chain("a"), 30)
    await world.round()
    assert world.wishes("failed") == 1


@pytest.mark.parametrize(
    "world", [{"nodes": 1}, {"transfer": ""}, {"copies_max": 0}], ids=["one host", "closed stores", "off"]
)
async def test_where_there_is_nothing_to_copy_nobody_is_asked(make, world):
    quiet = make(**world)

    async def asked(prefix: str) -> None:
        raise AssertionError(prefix)

    quiet.metadata.get = asked
    quiet.ask(chain("a"), 30)
    await quiet.round()
    assert sum(quiet.wishes(result) for result in ("sent", "failed", "no_directory")) == 0


# ---------------------------------------------------------------- with the real ends


class Stores:
    """Sets of keys behind `ask`; the directory hears of every change at once."""

    def __init__(self, **held: list[bytes]) -> None:
        self.held = {node: set(keys) for node, keys in held.items()}
        self.directory = Directory()
        for node, blocks in self.held.items():
            self.directory.join(0.0, node, "e")
            self.directory.on_snapshot(0.0, node, "e", [b"".join(sorted(blocks))])

    @property
    def stats(self) -> dict[str, StoreStats]:
        capacity = 400 * BLOCK_BYTES
        return {
            node: StoreStats(capacity, len(blocks) * BLOCK_BYTES, len(blocks), *[0] * 7)
            for node, blocks in self.held.items()
        }

    async def ask(self, node, request, kind, deadline_s):
        await asyncio.sleep(0)
        found = [key in self.held[request.source] for key in request.keys]
        new = [key for key, there in zip(request.keys, found, strict=True) if there]
        self.held[node].update(new)
        self.directory.on_events(0.0, node, b"".join(new), b"")
        return Pulled(found)


async def test_the_real_leader_makes_the_copies_whole_and_makes_them_again_for_a_host_that_came_back_empty(
    make, monkeypatch
):
    monkeypatch.setattr(leader_term, "TICK_S", 0.002)
    world = make()
    shared = chain("s", 41)
    stores = Stores(n0=shared, n1=[], n2=[], n7=[])
    world.index.apply("n0", b"".join(shared), b"")
    term = LeaderTerm(
        Term("life", 1, "d1"), lambda: True, stores.directory,
        lambda: setattr(stores.directory, "members_known", True),
        stores, SimpleNamespace(stats=stores.stats), world.metadata,
    )  # fmt: skip
    server = RpcServer("tcp://127.0.0.1:0", DirectoryRequest, term.handle)
    server.start()
    acting = asyncio.create_task(term.run())
    try:
        await world.leads(server.endpoint)
        world.ask(shared, 2 * int(USES_MIN) + 1)
        await world.round()

        async def copied() -> list[str]:
            async with asyncio.timeout(DEADLINE_S):
                while sum(len(held) == 41 for held in stores.held.values()) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            return sorted(node for node, held in stores.held.items() if held)

        first, second = await copied()
        assert (first, second) in {("n0", "n1"), ("n0", "n2")}  # whole, on one host that prefills
        stores.held[second].clear()
        stores.directory.on_snapshot(1.0, second, "e", [b""])
        assert await copied() == [first, second]
    finally:
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)
        await term.close()
        await server.close()


async def test_requests_through_the_dispatcher_are_counted_by_what_the_pool_had(make_world, make):
    world, hot = make_world(), make()
    world.decider.observer.listen(hot.hot.planned)
    await world.engine("p-n0", "prefill")
    await world.engine("d0", "decode")
    rid = world.add(make_request(list(range(4 * BLOCK_SIZE))))
    await world.finish(rid)
    assert hot.heat.counted == 0  # nobody had anything of it
    heard: list[tuple[RequestFacts, Plan]] = []
    world.decider.observer.listen(lambda facts, plan: heard.append((facts, plan)))
    await world.finish(world.add(make_request(list(range(4 * BLOCK_SIZE)))))
    ((facts, plan),) = heard
    assert (len(facts.keys), plan.prefill, plan.hit_blocks) == (4, "p-n0", 0)


async def test_it_runs_from_start_to_close_by_itself(make, monkeypatch):
    monkeypatch.setattr(hot_copies, "ROUND_S", 0.005)
    world = make()
    leader = await world.leader()
    world.ask(chain("a"), 30)
    world.hot.start()
    async with asyncio.timeout(DEADLINE_S):
        while not leader.heard:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await world.hot.close()
    await world.hot.close()


# ---------------------------------------------------------------- the option


def test_the_option_is_bounded_by_what_a_directory_makes():
    from kvstore.leader.placement import COPIES_MAX

    assert HOT_COPIES <= HOT_COPIES_MAX == COPIES_MAX
    options = GatewayOptions(model="m", run_dir="/r", metadata_endpoint="tcp://127.0.0.1:1")
    assert options.checked().hot_copies == HOT_COPIES
    with pytest.raises(ConfigError, match="hot_copies"):
        options.replace(hot_copies=HOT_COPIES_MAX + 1)
