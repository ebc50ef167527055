"""Directory processes: all answer look-ups, one acts, and when it goes another goes on where it was."""

import asyncio
import http.client
import urllib.parse

import msgspec
import pytest

from kvstore.directory.messages import (
    DIRECTORIES_PREFIX,
    CopyKeys,
    DirectoryRecord,
    DirectoryReply,
    DrainNode,
    KeepHot,
    Locate,
    TaskProgress,
)
from kvstore.leader.coordinator import Coordinator, CoordinatorConfig
from kvstore.leader.executor import Executor
from kvstore.leader.task_types import Copy, State
from mooncake.core.errors import ConfigError, NotLeader, PeerGone
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.rpc import RpcClient
from tests.unit.kvstore.fake_stores import SIZE, FakeStore, keys

TTL_S = 0.6
WAIT_S = 30.0


class Line:
    """One process's way to the metadata store; `cut`: it is away for this process alone."""

    def __init__(self, store: MemoryMetadata):
        self._store = store
        self.cut = False

    def __getattr__(self, name):
        real = getattr(self._store, name)
        if name == "watch":
            return self._watch

        async def call(*args, **kwargs):
            if self.cut:
                raise PeerGone("cut off")
            return await real(*args, **kwargs)

        return call

    async def _watch(self, *args):
        async for batch in self._store.watch(*args):
            if self.cut:
                raise PeerGone("cut off")
            yield batch


class World:
    def __init__(self):
        self.metadata = MemoryMetadata()
        self.stores: dict[str, FakeStore] = {}
        self.coordinators: dict[str, Coordinator] = {}
        self.lines: dict[str, Line] = {}
        self.clients: dict[str, RpcClient] = {}
        self.records: dict[str, DirectoryRecord] = {}

    async def store(self, node: str, *numbers: int) -> FakeStore:
        made = FakeStore(self.stores, node, *numbers)
        await made.register(self.metadata)
        return made

    async def directory(self, name: str, **settings) -> Coordinator:
        self.lines[name] = Line(self.metadata)
        config = CoordinatorConfig(name=name, ttl_s=TTL_S, **settings)
        made = self.coordinators[name] = Coordinator(config, self.lines[name])
        self.records[name] = await made.start()
        self.clients[name] = RpcClient(self.records[name].endpoint, DirectoryReply)
        return made

    async def leader(self) -> str:
        await until(lambda: self.leaders())
        return self.leaders()[0]

    def leaders(self) -> list[str]:
        return [name for name, made in self.coordinators.items() if made.leading]

    async def ask(self, name: str, request):
        return await self.clients[name].call(request, 5.0)

    async def stop(self, name: str) -> None:
        await self.clients.pop(name).close()
        await self.coordinators.pop(name).close()

    def where(self, number: int) -> set[str]:
        return {node for node, store in self.stores.items() if keys(number)[0] in store.blocks}

    async def close(self) -> None:
        for name in list(self.coordinators):
            await self.stop(name)
        for store in list(self.stores.values()):
            await store.close()
        await self.metadata.close()


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr("kvstore.leader.tasks.ROUND_S", 0.1)
    made = World()
    yield made
    await made.close()


async def until(condition) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - a look from outside
            await asyncio.sleep(0.01)


async def exact(coordinator: Coordinator) -> None:
    def is_exact():
        coordinator.service.see_members()
        return coordinator.directory.mode() == "exact"

    await until(is_exact)


async def test_one_leads_the_other_names_it_and_both_answer_look_ups(world):
    await world.store("a", 1)
    await world.directory("d1")
    await world.directory("d2")
    leader = await world.leader()
    (other,) = {"d1", "d2"} - {leader}
    await until(lambda: world.coordinators[other].election.leader)
    with pytest.raises(NotLeader, match=world.records[leader].endpoint) as refused:
        await world.ask(other, DrainNode("a"))
    assert world.records[leader].admin_url in str(refused.value)
    for name in ("d1", "d2"):
        await exact(world.coordinators[name])
        assert (await world.ask(name, Locate(keys(1)))).nodes == ["a"]
    assert world.leaders() == [leader]


async def test_before_anybody_leads_the_answer_says_so(world):
    await world.directory("d1")
    if not world.leaders():
        with pytest.raises(NotLeader, match="d1 does not lead"):
            await world.coordinators["d1"].handle(TaskProgress())
    await world.leader()
    assert (await world.ask("d1", TaskProgress())).tasks[0].task_id == 0


async def test_directories_are_found_in_the_metadata_store_as_long_as_they_live(world):
    await world.directory("d1")
    async with asyncio.timeout(WAIT_S):
        while not (found := (await world.metadata.get(DIRECTORIES_PREFIX)).entries):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert msgspec.json.decode(found[0].value, type=DirectoryRecord) == world.records["d1"]
    await world.stop("d1")
    assert (await world.metadata.get(DIRECTORIES_PREFIX)).entries == []


async def test_a_leader_that_goes_is_replaced_and_its_drain_is_finished(world):
    await world.store("a", *range(100))
    store = await world.store("b")
    first = await world.directory("d1")
    await world.leader()
    await exact(first)
    await exact(await world.directory("d2"))
    store.slow_s = 0.1
    task_id = (await world.ask("d1", DrainNode("a"))).task_id
    await until(lambda: store.blocks)
    await world.stop("d1")
    assert world.stores["a"].blocks
    store.slow_s = 0.0
    await until(lambda: world.leaders() == ["d2"])
    await until(lambda: not world.stores["a"].blocks)
    assert len(store.blocks) == 100
    async with asyncio.timeout(WAIT_S):
        while (await world.ask("d2", TaskProgress(task_id))).tasks[0].state is State.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert store.orders == sorted(store.orders)
    assert len(set(store.orders)) == 2


async def test_a_leader_that_is_cut_off_stops_by_itself_before_another_begins(world):
    await world.store("a", *range(200))
    (await world.store("b")).slow_s = 0.02
    first = await world.directory("d1")
    await world.leader()
    await exact(first)
    await world.ask("d1", DrainNode("a"))
    await world.directory("d2")
    await until(lambda: world.stores["b"].blocks)
    world.lines["d1"].cut = True
    both = []

    def other_leads():
        both.append(len(world.leaders()))
        return world.coordinators["d2"].leading

    await until(other_leads)
    assert max(both) == 1
    with pytest.raises(NotLeader):
        await world.ask("d1", CopyKeys(keys(1), "b"))
    await until(lambda: not world.stores["a"].blocks)
    assert len(world.stores["b"].blocks) == 200
    for store in world.stores.values():
        assert store.orders == sorted(store.orders)  # nobody obeyed the old one after the new one
    assert (await world.ask("d1", Locate(keys(1)))).nodes == ["b"]  # it still answers look-ups


async def test_orders_of_an_earlier_term_are_refused_by_stores_that_know_the_next(world):
    """A leader that was stopped between its look at the clock and its deed."""
    await world.store("a", 1, 2)
    store = await world.store("b")
    first = await world.directory("d1")
    await world.leader()
    await exact(first)
    old = first.leading
    await world.stop("d1")
    second = await world.directory("d2")
    await world.leader()
    await exact(second)
    await world.ask("d2", CopyKeys(keys(1), "b"))
    await until(lambda: world.where(1) == {"a", "b"})
    results = []
    orders = old.term
    late = Executor(second.clients.ask, lambda: orders, results.extend)
    late.run([Copy(1, keys(2)[0], "a", "b")])
    await until(lambda: results)
    await late.close()
    assert store.refused == [old.term.number]
    assert world.where(2) == {"a"}


async def test_a_hot_block_is_copied_again_when_its_node_is_gone(world):
    for node in "abc":
        await world.store(node)
    world.stores["a"].blocks = dict.fromkeys(keys(1))
    made = await world.directory("d1")
    await world.leader()
    await exact(made)
    await until(lambda: len(made.polls.stats) == 3)
    await world.ask("d1", KeepHot(keys(1), 2, SIZE))
    await until(lambda: len(world.where(1)) == 2)
    gone = min(world.where(1) - {"a"})
    await world.stores[gone].close()
    await world.metadata.delete(STORES_PREFIX + gone)
    await until(lambda: len(world.where(1)) == 2)


async def test_the_admin_http_is_where_the_record_says(world):
    await world.store("a", 1)
    made = await world.directory("d1")
    await exact(made)

    def get(path: str) -> tuple[int, bytes]:
        address = urllib.parse.urlsplit(world.records["d1"].admin_url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    status, body = await asyncio.to_thread(get, "/health")
    assert (status, msgspec.json.decode(body)["entries"]) == (200, 1)
    await world.leader()
    status, body = await asyncio.to_thread(get, "/metrics")
    assert b"mooncake_directory_leader 1.0" in body


async def test_run_until_ends_when_told_and_raises_what_its_tasks_die_of(world):
    made = await world.directory("d1", admin_port=None)
    assert world.records["d1"].admin_url == ""
    stop = asyncio.Event()
    running = asyncio.create_task(made.run_until(stop))
    await asyncio.sleep(0)
    stop.set()
    await running

    async def fails() -> None:
        raise ZeroDivisionError

    made._tasks.append(asyncio.create_task(fails()))
    with pytest.raises(ZeroDivisionError):
        await made.run_until(asyncio.Event())


async def test_it_does_not_run_before_its_start(world):
    with pytest.raises(ConfigError, match="start"):
        await Coordinator(CoordinatorConfig(name="d"), world.metadata).run_until(asyncio.Event())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "d", "blocks_max": 0}, "blocks_max"),
        ({"name": "d", "admin_port": 70_000}, "admin_port"),
        ({"name": "d", "admin_host": "0.0.0.0"}, "MOONCAKE_ADMIN_TOKEN"),
        ({"name": "d", "admin_host": "0.0.0.0", "admin_token": "short"}, "16"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_showing_the_token(settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        CoordinatorConfig(**settings)
    assert "short" not in str(error.value)


def test_the_token_is_not_in_what_is_logged():
    assert "t" * 20 not in repr(CoordinatorConfig(name="d", admin_token="t" * 20))


async def test_a_port_that_is_taken_is_named_and_nothing_stays_open(world):
    await world.directory("d1")
    port = urllib.parse.urlsplit(world.records["d1"].admin_url).port
    with pytest.raises(ConfigError, match=str(port)):
        await world.directory("d2", admin_port=port)
    assert (await world.metadata.get(DIRECTORIES_PREFIX + "d2")).entries == []
    world.coordinators.pop("d2")
