"""Wishes for hot keys that name nodes and end by themselves, as the Conductor says them."""

import math
from types import SimpleNamespace

import pytest

from kvstore.directory.directory import Directory
from kvstore.directory.messages import ForgetHot, KeepHot
from kvstore.leader.placement import Placer, Room
from kvstore.leader.task_types import Copy
from kvstore.leader.tasks import HOT_NODES_MAX, Tasks
from kvstore.leader.term import LeaderTerm
from mooncake.core import wire
from mooncake.core.errors import RequestError
from mooncake.core.messages import Term
from mooncake.core.metadata_memory import MemoryMetadata

SIZE = 4096


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


class Pool:
    """Nodes as sets of keys; every copy succeeds at once."""

    def __init__(self, **held: tuple[int, ...]) -> None:
        self.held = {node: set(keys(*numbers)) for node, numbers in held.items()}
        self.placer = Placer()
        for node in self.held:
            self.placer.update(Room(node, 1000 * SIZE, 500 * SIZE))
        self.tasks = Tasks(self, self.placer)
        self.copies = 0

    def replicas(self, wanted, *, exact_only=False):
        return [tuple(node for node, held in self.held.items() if key in held) for key in wanted]

    def tick(self, now_s: float) -> None:
        commands = self.tasks.tick(now_s)
        while commands:
            command = commands.pop()
            assert isinstance(command, Copy)
            assert command.key in self.held[command.source]
            self.held[command.target].add(command.key)
            self.copies += 1
            commands += self.tasks.on_result(now_s, command.command_id)

    def where(self, number: int) -> str:
        return "".join(node for node, held in self.held.items() if keys(number)[0] in held)


def test_all_keys_of_a_wish_go_to_the_first_nodes_it_names():
    pool = Pool(a=(1, 2, 3), b=(), c=(), d=())
    pool.tasks.keep_hot(keys(1, 2, 3), 3, SIZE, ["a", "d", "b", "c"])
    pool.tick(0.0)
    assert [pool.where(n) for n in (1, 2, 3)] == ["abd"] * 3
    pool.tick(1.0)
    assert pool.copies == 6


def test_copies_on_nodes_that_a_wish_does_not_name_do_not_count():
    pool = Pool(a=(1,), b=(1,), c=(), d=())
    pool.tasks.keep_hot(keys(1), 2, SIZE, ["c", "d"])
    pool.tick(0.0)
    assert pool.where(1) == "abcd"


def test_a_named_node_that_is_gone_or_drains_is_passed_over_and_never_made_up_for_elsewhere():
    pool = Pool(a=(1,), b=(), c=(), d=())
    pool.placer.leave("b")
    pool.placer.drain("c")
    pool.tasks.keep_hot(keys(1), 3, SIZE, ["a", "b", "c"])
    pool.tick(0.0)
    assert pool.where(1) == "a"
    assert not pool.tasks.busy
    pool.placer.drain("c", on=False)
    pool.tick(1.0)
    assert pool.where(1) == "ac"


def test_a_wish_ends_at_its_time_unless_it_is_said_again():
    pool = Pool(a=(1, 2), b=())
    for now_s in (0.0, 50.0):
        pool.tasks.keep_hot(keys(1), 2, SIZE, ["a", "b"], now_s + 60.0)
    pool.tasks.keep_hot(keys(2), 2, SIZE, ["a", "b"], 60.0)
    pool.tick(0.0)
    assert (pool.where(1), pool.where(2)) == ("ab", "ab")
    pool.tick(70.0)
    pool.held["b"].clear()
    pool.tick(71.0)
    assert (pool.where(1), pool.where(2)) == ("ab", "a")
    assert pool.tasks.hot_keys == 1


def test_who_spoke_last_is_right():
    pool = Pool(a=(1,), b=(), c=(), d=())
    pool.tasks.keep_hot(keys(1), 4, SIZE, ["a", "b", "c", "d"])
    pool.tasks.keep_hot(keys(1), 2, SIZE, ["d", "a"])
    pool.tick(0.0)
    assert pool.where(1) == "ad"


def test_a_message_without_nodes_and_time_is_still_understood():
    old = wire.encode(KeepHot(keys(1), 2, 9))
    assert wire.decode(old, KeepHot | ForgetHot) == KeepHot(keys(1), 2, 9, [], 0.0)
    assert wire.decode(wire.encode(["hot", keys(1), 2, 9]), KeepHot) == KeepHot(keys(1), 2, 9)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (KeepHot(keys(1), 2, SIZE, ["n"] * (HOT_NODES_MAX + 1)), "at most"),
        (KeepHot(keys(1), 2, SIZE, [], -1.0), "ttl_s"),
        (KeepHot(keys(1), 2, SIZE, [], math.inf), "ttl_s"),
        (KeepHot(keys(1), 2, SIZE, [], math.nan), "ttl_s"),
    ],
)
async def test_what_makes_no_sense_is_refused_and_nothing_of_it_stays(wish, words):
    no_store = SimpleNamespace(ask=None, stats={})
    term = LeaderTerm(
        Term("life", 1, "d"), lambda: True, Directory(), lambda: None, no_store, no_store, MemoryMetadata()
    )
    with pytest.raises(RequestError, match=words):
        await term.handle(wish)
    assert term.tasks.hot_keys == 0
