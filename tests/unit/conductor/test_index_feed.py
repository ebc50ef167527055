"""The gateway's loop keeps turning while an index is filled, and the index ends up as the stores say."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor import index_feed
from conductor.index import PrefixIndex
from conductor.index_feed import SLICE_KEYS, TURN_S, IndexFeed
from tests.unit.conductor.make import keys

PAGE = b"".join(n.to_bytes(32, "little") for n in range(10 * SLICE_KEYS))


class CountingIndex(PrefixIndex):
    """Each thousand keys take a millisecond of its own clock; `by_turn` is what a turn applied."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.sizes: list[int] = []
        self.nodes: list[str] = []

    def apply(self, node: str, stored: bytes, removed: bytes) -> None:
        super().apply(node, stored, removed)
        self.nodes.append(node)
        self.sizes.append((len(stored) + len(removed)) // 32)
        self.now_s += self.sizes[-1] * 1e-6

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def index() -> CountingIndex:
    return CountingIndex()


@pytest.fixture
async def feed(index: CountingIndex) -> AsyncIterator[IndexFeed]:
    made = IndexFeed(index, index.clock)
    yield made
    await made.close()


async def turns_until(done: Callable[[], bool]) -> int:
    """Turn the loop until then; return how often."""
    for turns in range(100_000):
        if done():
            return turns
        await asyncio.sleep(0)
    raise AssertionError("never")


def idle(feed: IndexFeed) -> bool:
    return feed._task is None


async def test_the_loop_turns_while_a_large_snapshot_is_applied_and_no_turn_is_long(feed, index):
    spent_s = []
    feed.on_snapshot("a", "e", [PAGE, PAGE])
    assert not index.sizes  # nothing at once
    while not idle(feed):
        before_s = index.now_s
        await asyncio.sleep(0)
        spent_s.append(index.now_s - before_s)
    assert index.longest_prefix(keys_of(PAGE[:320])) == {"a": 10}
    assert sum(index.sizes) == 20 * SLICE_KEYS
    assert max(index.sizes) <= SLICE_KEYS
    assert max(spent_s) <= TURN_S + SLICE_KEYS * 1e-6
    assert len(spent_s) >= 20 * SLICE_KEYS * 1e-6 / (TURN_S + SLICE_KEYS * 1e-6)


async def test_a_large_event_is_cut_too_and_small_ones_go_straight_in(feed, index):
    feed.on_snapshot("a", "e", [])
    await turns_until(lambda: idle(feed))
    feed.on_events("a", PAGE[:64], b"")
    assert index.sizes == [2]
    feed.on_events("a", PAGE, b"")
    feed.on_events("a", b"", PAGE)
    await turns_until(lambda: idle(feed))
    assert max(index.sizes) <= SLICE_KEYS
    assert index.stats().blocks == 0


async def test_what_a_node_says_during_its_snapshot_is_applied_after_it(feed, index):
    feed.on_snapshot("a", "e", [PAGE])
    feed.on_events("a", b"", PAGE[:32])
    await turns_until(lambda: idle(feed))
    assert index.holders(PAGE[:32]) == ()
    assert index.holders(PAGE[32:64]) == ("a",)


async def test_nodes_take_turns(feed, index):
    feed.on_snapshot("a", "e", [PAGE])
    feed.on_snapshot("b", "e", [PAGE])
    await turns_until(lambda: idle(feed))
    first_b = index.nodes.index("b")
    assert first_b < len(index.nodes) - 1 - index.nodes[::-1].index("a")


@pytest.mark.parametrize("end", ["on_stale", "drop"])
async def test_a_node_that_is_lost_meanwhile_is_forgotten_with_all_that_waits(feed, index, end):
    feed.on_snapshot("a", "e", [PAGE])
    await asyncio.sleep(0)
    feed.drop("a") if end == "drop" else feed.on_stale("a", "gap")
    feed.on_events("a", PAGE[:32], b"")  # its follower's last word
    await turns_until(lambda: idle(feed))
    assert index.longest_prefix(keys_of(PAGE[:320])) == {}
    assert index.stats().nodes == 0


async def test_another_snapshot_replaces_the_one_that_is_being_applied(feed, index):
    feed.on_snapshot("a", "e", [PAGE])
    await asyncio.sleep(0)
    feed.on_snapshot("a", "f", [PAGE[-64:]])
    await turns_until(lambda: idle(feed))
    assert index.holders(PAGE[:32]) == ()
    assert index.holders(PAGE[-32:]) == ("a",)


async def test_dead_bits_are_swept_in_turns_without_further_events(feed, index):
    for _ in range(8):
        feed.on_snapshot("a", "e", [PAGE])
        await turns_until(lambda: idle(feed))
    feed.drop("a")
    await turns_until(lambda: idle(feed))
    assert index.stats().sweeps == 1
    assert index.stats().blocks == 0


async def test_too_much_that_waits_is_applied_at_once_and_nothing_is_left_out(feed, index, monkeypatch):
    monkeypatch.setattr(index_feed, "WAITING_MAX", 5)
    feed.on_snapshot("a", "e", [PAGE])
    for n in range(5):
        feed.on_events("a", b"", PAGE[32 * n : 32 * n + 32])
    assert index.holders(PAGE[:32]) == ()
    assert index.stats().blocks == 10 * SLICE_KEYS - 5


def keys_of(blob: bytes) -> list[bytes]:
    return [blob[at : at + 32] for at in range(0, len(blob), 32)]


KEYS = keys(12)
IDS = st.lists(st.integers(0, 11), max_size=12, unique=True)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["snapshot", "events", "stale", "drop", "turn"]), st.sampled_from("ab"), IDS, IDS
    ),
    max_size=30,
)
Model = dict[str, set[int] | None]


def blob(ids: list[int]) -> bytes:
    return b"".join(KEYS[i] for i in ids)


def say(feed: IndexFeed, model: Model, kind: str, node: str, some: list[int], others: list[int]) -> None:
    held = model[node]
    match kind:
        case "snapshot":
            feed.on_snapshot(node, "e", [blob(some), blob(others)])
            model[node] = {*some, *others}
        case "events":
            removed = [i for i in others if i not in some]
            feed.on_events(node, blob(some), blob(removed))
            model[node] = held if held is None else (held | set(some)) - set(removed)
        case "stale":
            feed.on_stale(node, "gap")
            model[node] = None
        case "drop":
            feed.drop(node)
            model[node] = None


@settings(deadline=None)
@given(STEPS)
def test_in_the_end_the_index_holds_what_the_stores_said_whatever_the_turns(steps):
    async def run() -> None:
        index = PrefixIndex(dead_bits_max=2)
        feed = IndexFeed(index, itertools.count().__next__)  # time is over whenever it looks: a slice a turn
        model: Model = {"a": None, "b": None}
        for step in steps:
            if step[0] == "turn":
                await asyncio.sleep(0)
            else:
                say(feed, model, *step)
        await turns_until(lambda: idle(feed))
        for i, key in enumerate(KEYS):
            assert set(index.holders(key)) == {node for node, held in model.items() if held and i in held}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_feed, "SLICE_KEYS", 2)
        asyncio.run(run())


async def test_a_node_is_in_step_once_its_whole_snapshot_is_applied_until_a_gap(feed, index):
    assert not feed.in_step("a")
    feed.on_snapshot("a", "e", [PAGE])
    feed.on_snapshot("empty", "e", [])
    assert (feed.in_step("a"), feed.in_step("empty")) == (False, True)
    await turns_until(lambda: idle(feed))
    assert feed.in_step("a")
    feed.on_events("a", PAGE, b"")  # large, so applied in slices; what is known stays known meanwhile
    assert feed.in_step("a")
    feed.on_stale("a", "gap")
    assert not feed.in_step("a")
    feed.on_snapshot("a", "e", [PAGE])
    feed.drop("a")
    assert not feed.in_step("a")
