"""Every registered store is reached, none is asked twice at a time, and those that leave are forgotten."""

import asyncio

import msgspec
import pytest

from kvstore.leader.store_clients import StatsPoll, StoreClients
from mooncake.core.errors import PeerGone, PeerTimeout, ProtocolError
from mooncake.core.messages import Snapshot, SnapshotPage, Stats, StoreStats
from tests.unit.kvstore.fake_stores import SIZE, FakeStore


@pytest.fixture
async def stores():
    made: dict[str, FakeStore] = {}
    yield made
    for store in list(made.values()):
        await store.close()


@pytest.fixture
async def clients():
    made = StoreClients()
    yield made
    await made.close()


async def until(condition) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - a look from outside
            await asyncio.sleep(0.005)


async def test_each_store_answers_under_its_name(stores, clients):
    for count, node in enumerate("ab"):
        clients.join(FakeStore(stores, node, *range(count)).start())
    for count, node in enumerate("ab"):
        assert (await clients.ask(node, Stats(), StoreStats, 5.0)).blocks == count


async def test_a_store_that_is_not_registered_is_gone(stores, clients):
    with pytest.raises(PeerGone, match="'a'"):
        await clients.ask("a", Stats(), StoreStats, 5.0)
    clients.join(FakeStore(stores, "a").start())
    await clients.ask("a", Stats(), StoreStats, 5.0)
    clients.leave("a")
    clients.leave("a")
    with pytest.raises(PeerGone):
        await clients.ask("a", Stats(), StoreStats, 5.0)


async def test_a_restarted_store_is_asked_at_its_new_address(stores, clients):
    clients.join(FakeStore(stores, "a", 1).start())
    await clients.ask("a", Stats(), StoreStats, 5.0)
    await stores["a"].close()
    clients.join(FakeStore(stores, "a").start())
    assert (await clients.ask("a", Stats(), StoreStats, 5.0)).blocks == 0


async def test_an_answer_of_another_kind_is_not_taken(stores, clients):
    clients.join(FakeStore(stores, "a").start())
    with pytest.raises(ProtocolError, match="SnapshotPage instead of StoreStats"):
        await clients.ask("a", Snapshot(), StoreStats, 5.0)
    assert await clients.ask("a", Snapshot(), SnapshotPage, 5.0)


async def test_a_store_that_does_not_answer_costs_its_deadline(stores, clients):
    record = FakeStore(stores, "a").start()
    nowhere = msgspec.structs.replace(record, endpoint="tcp://127.0.0.1:1")
    clients.join(nowhere)
    with pytest.raises(PeerTimeout):
        await clients.ask("a", Stats(), StoreStats, 0.05)


async def test_stores_are_asked_again_and_again_and_forgotten_when_they_leave(stores, clients):
    polls = StatsPoll(clients, every_s=0.01)
    task = asyncio.create_task(polls.run())
    clients.join(FakeStore(stores, "a", 1).start())
    await until(lambda: polls.stats)
    assert (polls.stats["a"].blocks, polls.stats["a"].used_bytes) == (1, SIZE)
    stores["a"].blocks.clear()
    await until(lambda: polls.stats["a"].blocks == 0)
    clients.leave("a")
    await until(lambda: not polls.stats)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_store_that_is_late_is_not_asked_again_before():
    asked = []

    class Clients:
        records = {"a": None, "b": None}  # noqa: RUF012

        async def ask(self, node, *_):
            asked.append(node)
            if node == "a":
                await asyncio.Event().wait()
            raise PeerTimeout("no answer")

    task = asyncio.create_task(StatsPoll(Clients(), every_s=0.001).run())
    await until(lambda: asked.count("b") > 5)
    assert asked.count("a") == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
