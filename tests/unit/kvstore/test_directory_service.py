"""A directory process finds every registered store by itself, answers honestly, and can be replaced."""

import asyncio

import msgspec
import pytest

from kvstore.directory import service as directory_service
from kvstore.directory.directory import Directory, Mode
from kvstore.directory.messages import (
    DirectoryReply,
    DirectoryStatus,
    DirectoryStatusIs,
    Locate,
    Located,
    LocatePrefix,
)
from kvstore.directory.service import DirectoryListener, DirectoryService
from kvstore.limits import KEYS_PER_REQUEST_MAX
from kvstore.store import service as service_module
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core import wire
from mooncake.core.errors import ConfigError, ProtocolError, RequestError
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.rpc import RpcClient

SIZE = 4096


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


class Pool:
    """Stores that register themselves, directories, and a client of each."""

    def __init__(self, run_dir):
        self.metadata = MemoryMetadata()
        self.run_dir = str(run_dir)
        self.stores: dict[str, StoreService] = {}
        self.services: list[DirectoryService] = []
        self.clients: list[RpcClient] = []
        self.left: list[str] = []

    async def store(self, name: str) -> StoreService:
        made = StoreService(StoreConfig(node=name, capacity_bytes=64 * SIZE, run_dir=self.run_dir))
        record = await made.start()
        self.stores[name] = made
        await self.metadata.put(STORES_PREFIX + name, msgspec.json.encode(record))
        return made

    async def unregister(self, name: str) -> None:
        await self.stores.pop(name).close()
        await self.metadata.delete(STORES_PREFIX + name)

    async def directory(self) -> tuple[DirectoryService, RpcClient]:
        made = DirectoryService(self.metadata, on_leave=self.left.append)
        self.services.append(made)
        client = RpcClient(await made.start(), DirectoryReply)
        self.clients.append(client)
        return made, client

    def put(self, name: str, *numbers: int) -> None:
        service = self.stores[name]
        reserved = service.node.reserve(service._clock(), "w", keys(*numbers), SIZE)
        service.node.commit(service._clock(), reserved.tickets, [b"s" * 16] * len(numbers))
        service.requests.after_change()

    async def close(self) -> None:
        for closing in [*self.clients, *self.services, *self.stores.values(), self.metadata]:
            await closing.close()


@pytest.fixture
async def pool(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(service_module, "TICK_S", 0.02)
    made = Pool(tmp_path / "run")
    yield made
    await made.close()


async def ask(client, request):
    return await client.call(request, 2.0)


def names(found: Located) -> list[list[str]]:
    return [[found.nodes[i] for i in row] for row in found.holders]


async def until(client, request, condition):
    """Ask until the answer fits."""
    async with asyncio.timeout(5.0):
        while not condition(answer := await ask(client, request)):  # noqa: ASYNC110 - a look from outside
            await asyncio.sleep(0.01)
    return answer


def exact(answer) -> bool:
    return answer.mode is Mode.EXACT


async def test_it_finds_the_stores_that_are_there_and_those_that_come(pool):
    await pool.store("a")
    pool.put("a", 1, 2)
    _, client = await pool.directory()
    await until(client, Locate(keys(1)), exact)
    await pool.store("b")
    pool.put("b", 2, 3)
    found = await until(client, Locate(keys(1, 2, 3, 4)), lambda a: exact(a) and len(a.nodes) == 2)
    assert names(found) == [["a"], ["a", "b"], ["b"], []]
    prefix = await ask(client, LocatePrefix(keys(1, 2, 3, 4)))
    assert (prefix.covered, prefix.by_node, prefix.lag_s) == (3, {"a": 2}, 0.0)


async def test_it_follows_every_change(pool):
    await pool.store("a")
    _, client = await pool.directory()
    await until(client, DirectoryStatus(), lambda a: exact(a) and a.nodes)
    pool.put("a", 5)
    await until(client, Locate(keys(5)), lambda a: names(a) == [["a"]])
    service = pool.stores["a"]
    service.node.drop(service._clock(), keys(5))
    service.requests.after_change()
    await until(client, Locate(keys(5)), lambda a: names(a) == [[]])


async def test_a_directory_without_stores_is_exact_and_empty(pool):
    _, client = await pool.directory()
    status = await until(client, DirectoryStatus(), exact)
    assert (status.blocks, status.nodes) == (0, [])


async def test_a_store_whose_lease_ends_is_dropped_and_told(pool):
    await pool.store("a")
    await pool.store("b")
    pool.put("a", 1)
    pool.put("b", 1)
    _, client = await pool.directory()
    await until(client, Locate(keys(1)), lambda a: len(names(a)[0]) == 2)
    await pool.unregister("a")
    await until(client, Locate(keys(1)), lambda a: exact(a) and names(a) == [["b"]])
    assert pool.left == ["a"]


async def test_a_restarted_store_starts_empty(pool):
    await pool.store("a")
    pool.put("a", 1)
    _, client = await pool.directory()
    await until(client, Locate(keys(1)), lambda a: a.nodes)
    await pool.stores["a"].close()
    await pool.store("a")
    pool.put("a", 2)
    found = await until(client, Locate(keys(1, 2)), lambda a: exact(a) and names(a)[1])
    assert names(found) == [[], ["a"]]


async def test_a_silent_store_is_a_hint_and_the_answer_says_degraded(pool):
    store = await pool.store("a")
    pool.put("a", 1)
    service, client = await pool.directory()
    await until(client, Locate(keys(1)), exact)
    (follower,) = service._stores.values()
    follower._stale_s = 0.3
    pool.put("a", 2)
    await until(client, Locate(keys(2)), lambda a: a.nodes)
    store._beat.cancel()
    found = await until(client, Locate(keys(1)), lambda a: not exact(a))
    assert names(found) == [["a"]]
    assert names(await ask(client, Locate(keys(1), exact_only=True))) == [[]]
    (status,) = (await ask(client, DirectoryStatus())).nodes
    assert "silent" in status.reason
    assert status.lag_s >= 0.0


async def test_a_killed_directory_is_full_again_and_another_went_on(pool):
    await pool.store("a")
    pool.put("a", *range(50))
    first, client = await pool.directory()
    _, other = await pool.directory()
    await until(client, Locate(keys(1)), exact)
    await first.close()
    pool.put("a", 60)
    await until(other, Locate(keys(60)), lambda a: names(a) == [["a"]])
    _, again = await pool.directory()
    found = await until(again, Locate(keys(*range(50), 60)), exact)
    assert names(found) == [["a"]] * 51


def pages_of(*numbers: int) -> list[bytes]:
    return keys(*numbers)  # one key each


@pytest.fixture
async def listening():
    directory = Directory()
    directory.members_known = True
    directory.join(0.0, "a", "e1")
    listener = DirectoryListener(directory)
    yield directory, listener
    await listener.close()


async def test_the_loop_turns_between_the_pages_of_a_snapshot(listening):
    directory, listener = listening
    listener.on_snapshot("a", "e1", pages_of(*range(50)))
    turns = 0
    while not directory.is_exact("a") and turns < 200:
        await asyncio.sleep(0)
        turns += 1
    assert 50 <= turns < 200
    assert len(directory) == 50


async def test_events_wait_for_the_end_of_their_nodes_snapshot(listening):
    directory, listener = listening
    listener.on_snapshot("a", "e1", pages_of(1, 2))
    listener.on_events("a", keys(3)[0], keys(2)[0])
    assert directory.replicas(keys(3)) == [()]
    for _ in range(10):
        await asyncio.sleep(0)
    assert directory.replicas(keys(1, 2, 3)) == [("a",), (), ("a",)]


async def test_too_many_waiting_events_end_the_loading_at_once(listening, monkeypatch):
    monkeypatch.setattr(directory_service, "EVENTS_WAITING_MAX", 2)
    directory, listener = listening
    listener.on_snapshot("a", "e1", pages_of(*range(50)))
    listener.on_events("a", keys(60)[0], b"")
    assert not directory.is_exact("a")
    listener.on_events("a", keys(61)[0], keys(60)[0])
    assert directory.is_exact("a")
    await asyncio.sleep(0)
    assert directory.replicas(keys(49, 60, 61)) == [("a",), (), ("a",)]


@pytest.mark.parametrize("overtaken", ["stale", "snapshot"])
async def test_a_snapshot_that_is_overtaken_is_not_finished(listening, overtaken):
    directory, listener = listening
    listener.on_snapshot("a", "e1", pages_of(1, 2, 3))
    await asyncio.sleep(0)
    if overtaken == "stale":
        listener.on_stale("a", "gap")
    else:
        listener.on_snapshot("a", "e1", pages_of(7))
    for _ in range(10):
        await asyncio.sleep(0)
    assert directory.is_exact("a") == (overtaken == "snapshot")
    assert directory.replicas(keys(3)) == [()]


@pytest.mark.parametrize("value", [b"not json", b"{}"])
async def test_a_record_that_makes_no_sense_is_skipped(pool, value):
    await pool.metadata.put(STORES_PREFIX + "odd", value)
    await pool.store("a")
    _, client = await pool.directory()
    status = await until(client, DirectoryStatus(), lambda a: exact(a) and a.nodes)
    assert [node.node for node in status.nodes] == ["a"]


async def test_a_record_under_another_nodes_name_is_skipped(pool):
    store = await pool.store("a")
    pool.put("a", 1)
    record = (await pool.metadata.get(STORES_PREFIX)).entries[0].value
    assert store
    await pool.metadata.put(STORES_PREFIX + "b", record)
    _, client = await pool.directory()
    found = await until(client, Locate(keys(1)), exact)
    assert names(found) == [["a"]]


async def test_wrong_questions_are_refused_with_a_reason(pool):
    _, client = await pool.directory()
    for request in [
        Locate([b"short"]),
        LocatePrefix([b"short"]),
        Locate(keys(1) * (KEYS_PER_REQUEST_MAX + 1)),
    ]:
        with pytest.raises(RequestError):
            await ask(client, request)
    with pytest.raises(ProtocolError):
        await ask(client, ["nonsense"])


async def test_run_until_ends_when_told_and_not_before_start(pool):
    service, _ = await pool.directory()
    stop = asyncio.Event()
    running = asyncio.create_task(service.run_until(stop))
    await asyncio.sleep(0)
    assert not running.done()
    stop.set()
    await running
    with pytest.raises(ConfigError):
        await DirectoryService(pool.metadata).run_until(stop)


def test_every_message_survives_the_wire():
    located = Located(["a", "b"], [[0], [], [1, 0]], Mode.DEGRADED, 1.5)
    for message in [located, Locate(keys(1), exact_only=True), DirectoryStatusIs(Mode.EXACT, 0.0, 3, [])]:
        assert wire.decode(wire.encode(message), type(message)) == message
