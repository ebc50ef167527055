"""Commands become requests in the leader's name, answered one by one, and never after its term."""

import asyncio

import pytest

from kvstore.leader.executor import PULL_S, Executor
from kvstore.leader.task_types import Copy, Drop
from kvstore.leader.tasks import COMMAND_S
from mooncake.core.errors import PeerTimeout
from mooncake.core.messages import DropKeys, KeysDropped, Pull, Pulled, Term

ORDERS = Term("life", 7, "d1")


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


class World:
    """Records what is asked of stores; `answer` decides what they say."""

    def __init__(self):
        self.asked = []
        self.results = []
        self.observed = []
        self.orders = ORDERS
        self.held = True
        self.error = None
        self.stuck = False
        self.gate = None
        self.now_s = 0.0
        self.executor = Executor(
            self.ask,
            lambda: self.orders,
            self.results.extend,
            lambda *seen: self.observed.append(seen[:3]),
            lambda: self.now_s,
        )

    async def ask(self, node, request, kind, deadline_s):
        self.asked.append((node, request))
        if self.stuck:
            await asyncio.Event().wait()
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error
        if isinstance(request, DropKeys):
            return KeysDropped(len(request.keys))
        held = [self.held] * len(request.keys) if isinstance(self.held, bool) else self.held
        return Pulled(held)

    async def run(self, *commands):
        self.executor.run(commands)
        await self.settle()

    async def settle(self):
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def world():
    made = World()
    yield made
    await made.executor.close()


async def test_commands_of_the_same_stores_travel_together_in_the_leaders_name(world):
    await world.run(
        Copy(1, key(1), "a", "b"), Copy(2, key(2), "a", "b"), Copy(3, key(3), "c", "b"), Drop(4, key(4), "a")
    )
    assert [(node, request.keys, request.orders) for node, request in world.asked] == [
        ("b", [key(1), key(2)], ORDERS),
        ("b", [key(3)], ORDERS),
        ("a", [key(4)], ORDERS),
    ]
    assert [type(request) for _, request in world.asked] == [Pull, Pull, DropKeys]
    assert [request.source for _, request in world.asked[:2]] == ["a", "c"]
    assert sorted(world.results) == [(1, ""), (2, ""), (3, ""), (4, "")]


async def test_what_the_store_did_not_get_failed_and_the_rest_is_done(world):
    world.held = [True, False]
    await world.run(Copy(1, key(1), "a", "b"), Copy(2, key(2), "a", "b"))
    assert world.results == [(1, ""), (2, "b did not get it from a")]
    assert world.observed == [("copy", "ok", 1), ("copy", "failed", 1)]


async def test_an_answer_that_is_too_short_leaves_the_rest_undone(world):
    world.held = []
    await world.run(Copy(1, key(1), "a", "b"))
    assert world.results == [(1, "b did not get it from a")]


async def test_a_store_that_is_away_fails_all_of_its_commands(world):
    world.error = PeerTimeout("no answer")
    await world.run(Copy(1, key(1), "a", "b"), Drop(2, key(2), "a"))
    assert world.results == [(1, "no answer"), (2, "no answer")]
    assert world.observed == [("copy", "failed", 1), ("drop", "failed", 1)]


async def test_nothing_is_sent_once_the_term_is_over_even_if_it_was_commanded_before(world):
    world.executor.run([Copy(1, key(1), "a", "b"), Drop(2, key(2), "a")])
    world.orders = None
    await world.run(Copy(3, key(3), "a", "b"))
    assert (world.asked, world.results) == ([], [])


async def test_what_is_commanded_while_a_request_is_under_way_travels_together_in_the_next(world):
    world.gate = asyncio.Event()
    await world.run(Copy(1, key(1), "a", "b"))
    await world.run(Copy(2, key(2), "a", "b"), Drop(9, key(9), "a"))
    await world.run(Copy(3, key(3), "a", "b"))
    assert [request.keys for _, request in world.asked] == [[key(1)], [key(9)]]
    world.gate.set()
    await world.settle()
    assert [request.keys for _, request in world.asked] == [[key(1)], [key(9)], [key(2), key(3)]]
    assert sorted(world.results) == [(1, ""), (2, ""), (3, ""), (9, "")]
    await world.run(Copy(4, key(4), "a", "b"))
    assert world.results[-1] == (4, "")


async def test_what_waited_so_long_that_nobody_would_hear_of_its_end_is_not_begun(world):
    world.gate = asyncio.Event()
    await world.run(Copy(1, key(1), "a", "b"), Drop(2, key(2), "a"))
    await world.run(Copy(3, key(3), "a", "b"), Drop(4, key(4), "a"))
    world.now_s = COMMAND_S - PULL_S + 0.1
    await world.run(Copy(5, key(5), "a", "b"))
    world.gate.set()
    await world.settle()
    assert [request.keys for _, request in world.asked] == [[key(1)], [key(2)], [key(5)], [key(4)]]
    assert (3, "b is too slow") in world.results
    assert PULL_S < COMMAND_S / 2


async def test_close_ends_what_is_under_way_and_tells_nobody(world):
    world.stuck = True
    await world.run(Copy(1, key(1), "a", "b"))
    assert world.asked
    await world.executor.close()
    assert world.results == []
