"""A term: what was asked for is done in its name, kept for the next leader, and stops with it."""

import asyncio

import pytest

from kvstore.directory.directory import Directory
from kvstore.directory.messages import (
    CancelTask,
    CopyKeys,
    DrainNode,
    ForgetHot,
    KeepHot,
    MoveKeys,
    TaskProgress,
    UndrainNode,
)
from kvstore.leader import term as coordinator_term
from kvstore.leader.task_book import TaskBook
from kvstore.leader.task_types import State
from kvstore.leader.term import LeaderTerm
from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core.errors import CapacityError, NotLeader, PeerGone, RequestError
from mooncake.core.messages import DropKeys, KeysDropped, Pulled, StoreStats, Term
from mooncake.core.metadata_memory import MemoryMetadata

SIZE = 4096


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


class Metadata(MemoryMetadata):
    """`away`: it does not answer."""

    away = False

    async def get(self, prefix):
        if self.away:
            raise PeerGone("away")
        return await super().get(prefix)

    async def delete(self, key):
        if self.away:
            raise PeerGone("away")
        await super().delete(key)


class World:
    """Stores as sets of keys behind `ask`, and a directory that hears of every change at once."""

    def __init__(self, **held: tuple[int, ...]):
        self.held = {node: set(keys(*numbers)) for node, numbers in held.items()}
        self.directory = Directory()
        self.directory.members_known = False  # until somebody looks
        for node, blocks in self.held.items():
            self.directory.join(0.0, node, "e")
            self.directory.on_snapshot(0.0, node, "e", [b"".join(blocks)])
        self.metadata = Metadata()
        self.numbers: list[int] = []  # terms in whose name stores were asked
        self.stuck = False
        self.terms: list[tuple[LeaderTerm, asyncio.Task]] = []
        self.leads: dict[int, bool] = {}

    def look(self) -> None:
        self.directory.members_known = True

    @property
    def records(self):
        return self.held

    @property
    def stats(self):
        return {
            node: StoreStats(1000 * SIZE, len(blocks) * SIZE, len(blocks), *[0] * 7)
            for node, blocks in self.held.items()
        }

    async def ask(self, node, request, kind, deadline_s):
        if self.stuck:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.numbers.append(request.orders.number)
        if isinstance(request, DropKeys):
            there = self.held[node] & set(request.keys)
            self.held[node] -= there
            self.directory.on_events(0.0, node, b"", b"".join(there))
            return KeysDropped(len(there))
        found = [k in self.held.get(request.source, ()) for k in request.keys]
        new = [k for k, there in zip(request.keys, found, strict=True) if there]
        self.held[node].update(new)
        self.directory.on_events(0.0, node, b"".join(new), b"")
        return Pulled(found)

    def term(self, number: int = 1) -> LeaderTerm:
        """Begin a term."""
        self.leads[number] = True
        made = LeaderTerm(
            Term("life", number, f"d{number}"),
            lambda: self.leads[number],
            self.directory,
            self.look,
            self,
            self,
            self.metadata,
        )
        self.terms.append((made, asyncio.create_task(made.run())))
        return made

    async def end(self, number: int = 1) -> None:
        """The term is over, as a coordinator ends it."""
        self.leads[number] = False
        for made, task in self.terms:
            if made.term.number == number:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await made.close()

    def leave(self, node: str) -> None:
        del self.held[node]
        self.directory.leave(node)
        self.terms[-1][0].on_leave(node)

    def where(self, number: int) -> set[str]:
        return {node for node, blocks in self.held.items() if keys(number)[0] in blocks}

    async def booked(self):
        return [booked.task_id for booked in await TaskBook(self.metadata).entries()]

    async def close(self) -> None:
        for number in self.leads:
            await self.end(number)
        await self.metadata.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in [("TICK_S", 0.002), ("BOOK_S", 0.01), ("SETTLE_S", 30.0)]:
        monkeypatch.setattr(coordinator_term, name, seconds)
    monkeypatch.setattr("kvstore.leader.tasks.ROUND_S", 0.01)
    monkeypatch.setattr("kvstore.leader.tasks.RETRY_S", 0.01)


@pytest.fixture
async def make():
    worlds = []

    def made(**held) -> World:
        worlds.append(World(**held))
        return worlds[-1]

    yield made
    for world in worlds:
        await world.close()


async def until(condition) -> None:
    async with asyncio.timeout(20.0):
        while True:
            value = condition()
            if await value if asyncio.iscoroutine(value) else value:
                return
            await asyncio.sleep(0.002)


async def state(term: LeaderTerm, task_id: int) -> State | None:
    found = (await term.handle(TaskProgress(task_id))).tasks
    return found[0].state if found else None


async def done(term: LeaderTerm, task_id: int) -> None:
    async def is_done():
        return await state(term, task_id) is State.DONE

    await until(is_done)


async def test_a_copy_is_done_in_the_leaders_name_and_crossed_out(make):
    world = make(a=(1, 2), b=())
    term = world.term(7)
    task_id = (await term.handle(CopyKeys(keys(1, 2), "b"))).task_id
    await done(term, task_id)
    assert (world.where(1), world.where(2)) == ({"a", "b"}, {"a", "b"})
    assert set(world.numbers) == {7}

    async def crossed_out():
        return await world.booked() == []

    await until(crossed_out)
    assert await state(term, task_id) is State.DONE


async def test_a_move_leaves_its_source(make):
    world = make(a=(1,), b=())
    term = world.term()
    await done(term, (await term.handle(MoveKeys(keys(1), "a", "b"))).task_id)
    assert world.where(1) == {"b"}


async def test_a_request_that_is_repeated_is_the_same_task(make):
    world = make(a=(1,), b=())
    world.stuck = True
    term = world.term()
    for request in [CopyKeys(keys(1), "b"), MoveKeys(keys(1), "a", "b"), DrainNode("a")]:
        first = await term.handle(request)
        assert await term.handle(request) == first


async def test_a_drained_node_is_empty_and_stays_so_under_the_next_leader(make):
    world = make(a=(1, 2, 3), b=(), c=())
    term = world.term()
    task_id = (await term.handle(DrainNode("a"))).task_id
    await done(term, task_id)
    assert not world.held["a"]
    assert await world.booked() == [task_id]
    await world.end()
    next_term = world.term(2)
    await done(next_term, task_id)
    await next_term.handle(KeepHot(keys(1), 2, SIZE))
    await until(lambda: world.where(1) == {"b", "c"})


async def test_what_is_open_when_a_leader_goes_is_finished_by_the_next_under_its_old_name(make):
    world = make(a=(1, 2), b=(), c=())
    world.stuck = True
    term = world.term(1)
    copy = (await term.handle(CopyKeys(keys(1), "b"))).task_id
    drain = (await term.handle(DrainNode("a"))).task_id
    await world.end(1)
    world.stuck = False
    next_term = world.term(2)

    async def known():
        return None not in [await state(next_term, task_id) for task_id in (copy, drain)]

    await until(known)
    await done(next_term, copy)
    await done(next_term, drain)
    assert not world.held["a"]
    assert world.where(1) >= {"b"}
    assert set(world.numbers) == {2}


async def test_a_new_leader_takes_tasks_up_when_its_directory_is_exact(make):
    world = make(a=(1,), b=())
    await world.term(1).handle(CopyKeys(keys(1), "b"))
    await world.end(1)
    world.held["b"].clear()
    world.directory.on_stale(0.0, "a", "loading")
    term = world.term(2)
    await asyncio.sleep(0.05)
    assert len((await term.handle(TaskProgress())).tasks) == 1  # the hot keys
    world.directory.on_snapshot(0.0, "a", "e", [b"".join(world.held["a"])])
    world.directory.on_snapshot(0.0, "b", "e", [b""])
    await until(lambda: world.where(1) == {"a", "b"})


async def test_a_node_that_never_comes_into_step_does_not_hold_tasks_up_for_ever(make, monkeypatch):
    monkeypatch.setattr(coordinator_term, "SETTLE_S", 0.05)
    world = make(a=(1,), b=(), ill=())
    await world.term(1).handle(CopyKeys(keys(1), "b"))
    await world.end(1)
    world.held["b"].clear()
    world.directory.on_snapshot(0.0, "b", "e", [b""])
    world.directory.on_stale(0.0, "ill", "silent")
    world.term(2)
    await until(lambda: world.where(1) == {"a", "b"})


async def test_a_term_that_is_over_asks_nothing_of_any_store(make):
    world = make(a=(1,), b=())
    term = world.term()
    world.leads[1] = False
    with pytest.raises(NotLeader):
        await term.handle(CopyKeys(keys(1), "b"))
    term.tasks.copy(keys(1), "b")
    await asyncio.sleep(0.05)
    assert world.numbers == []
    assert len(await world.booked()) == 1  # for the next leader


async def test_a_cancelled_task_is_over_and_not_taken_up_again(make):
    world = make(a=(1,), b=())
    world.stuck = True
    term = world.term()
    task_id = (await term.handle(CopyKeys(keys(1), "b"))).task_id
    await term.handle(CancelTask(task_id))
    assert await state(term, task_id) is State.CANCELLED
    assert await world.booked() == []
    await asyncio.sleep(0.05)
    assert await state(term, task_id) is State.CANCELLED
    with pytest.raises(RequestError, match="no open task"):
        await term.handle(CancelTask(task_id))


@pytest.mark.parametrize("how", ["undrain", "cancel"])
async def test_an_undrained_node_gets_blocks_again(make, how):
    world = make(a=(), b=(1,))
    term = world.term()
    task_id = (await term.handle(DrainNode("a"))).task_id
    await done(term, task_id)
    await term.handle(UndrainNode("a") if how == "undrain" else CancelTask(task_id))
    assert await world.booked() == []
    await term.handle(KeepHot(keys(1), 2, SIZE))
    await until(lambda: world.where(1) == {"a", "b"})


async def test_a_hot_block_whose_node_dies_is_copied_again(make):
    world = make(a=(1,), b=(), c=(), d=())
    term = world.term()
    await term.handle(KeepHot(keys(1), 3, SIZE))
    await until(lambda: len(world.where(1)) == 3)
    world.leave(min(world.where(1) - {"a"}))
    await until(lambda: len(world.where(1)) == 3)
    await term.handle(ForgetHot(keys(1)))
    world.leave(min(world.where(1) - {"a"}))
    await asyncio.sleep(0.05)
    assert len(world.where(1)) == 2


async def test_a_drain_chooses_by_the_average_size_of_the_nodes_blocks(make):
    world = make(a=(1, 2), b=())
    term = world.term()
    task_id = (await term.handle(DrainNode("a"))).task_id
    (booked,) = await TaskBook(world.metadata).entries()
    assert (booked.task_id, booked.entry.size_bytes) == (task_id, SIZE)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (CopyKeys(keys(1), "nowhere"), "no node 'nowhere'.*a, b"),
        (MoveKeys(keys(1), "a", "a"), "itself"),
        (MoveKeys(keys(1), "x", "a"), "no node 'x'"),
        (DrainNode("x"), "no node 'x'"),
        (CopyKeys([b"short"], "a"), "32 bytes"),
        (KeepHot([b"short"], 2, SIZE), "32 bytes"),
        (KeepHot(keys(1), 1, SIZE), "copies=1"),
        (ForgetHot(keys(1) * (KEYS_PER_REQUEST_MAX + 1)), "at most"),
    ],
)
async def test_what_makes_no_sense_is_refused_and_not_booked(make, request_, words):
    world = make(a=(1,), b=())
    with pytest.raises(RequestError, match=words):
        await world.term().handle(request_)
    assert await world.booked() == []


async def test_a_task_that_finds_no_room_is_not_booked(make, monkeypatch):
    monkeypatch.setattr("kvstore.leader.tasks.TASKS_MAX", 0)
    world = make(a=(1,), b=())
    with pytest.raises(CapacityError, match="tasks are open"):
        await world.term().handle(CopyKeys(keys(1), "b"))
    assert await world.booked() == []


async def test_a_metadata_store_that_is_away_refuses_new_tasks_and_stops_no_old_ones(make):
    world = make(a=(1, 2), b=())
    term = world.term()
    await asyncio.sleep(0.02)
    task_id = (await term.handle(CopyKeys(keys(1), "b"))).task_id
    world.metadata.away = True
    with pytest.raises(PeerGone):
        await term.handle(CopyKeys(keys(2), "b"))
    await done(term, task_id)
    world.metadata.away = False

    async def crossed_out():
        return await world.booked() == []

    await until(crossed_out)


async def test_nonsense_in_the_book_harms_nobody(make):
    world = make(a=(1,), b=())
    await world.metadata.put("/mooncake/tasks/copy/x", b"nonsense")
    term = world.term()
    await done(term, (await term.handle(CopyKeys(keys(1), "b"))).task_id)
    assert world.where(1) == {"a", "b"}
