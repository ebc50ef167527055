"""An index that follows a node ends up equal to it, whatever is lost, restarted or malformed on the way."""

import asyncio

import pytest
import zmq

from kvstore.directory import follower as follower_module
from kvstore.directory.follower import IndexListener, StoreFollower
from kvstore.node import events as events_module
from kvstore.node.changes import NodeEvents
from kvstore.node.events import Snapshots
from kvstore.store import service as service_module
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core import rpc, wire
from mooncake.core.errors import PeerTimeout, RequestError
from mooncake.core.messages import Snapshot, SnapshotPage, StoreEvents, StoreRecord

SIZE = 4096


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def blob(*numbers: int) -> bytes:
    return b"".join(key(n) for n in numbers)


def split(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 32], "big") for i in range(0, len(data), 32)]


class Mirror:
    """A listener that is an index: strict about what a correct stream can contain."""

    def __init__(self):
        self.held: set[int] = set()
        self.stale: list[str] = []
        self.snapshots = 0

    def on_snapshot(self, node, epoch, pages):
        self.held = {n for page in pages for n in split(page)}
        self.snapshots += 1

    def on_events(self, node, stored, removed):
        assert not set(split(stored)) & self.held, "stored twice"
        self.held |= set(split(stored))
        assert set(split(removed)) <= self.held, "removed what was not there"
        self.held -= set(split(removed))

    def on_stale(self, node, reason):
        self.stale.append(reason)


async def eventually(condition, limit_s=4.0):
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - a test looks from outside
            await asyncio.sleep(0.01)


@pytest.fixture
async def service(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(service_module, "TICK_S", 0.02)
    made = StoreService(StoreConfig(node="n1", capacity_bytes=64 * SIZE, run_dir=str(tmp_path / "run")))
    made.record = await made.start()
    yield made
    await made.close()


@pytest.fixture
async def follow():
    followers = []

    async def make(record, listener, live=True, **options):
        follower = StoreFollower(record, listener, **options).start()
        followers.append(follower)
        if live:
            await follower.wait_live(4)
        return follower

    yield make
    for follower in followers:
        await follower.close()


def put(service, *numbers):
    node, now_s = service.node, service._clock()
    reserved = node.reserve(now_s, "w", [key(n) for n in numbers], SIZE)
    node.commit(now_s, reserved.tickets, [b"s" * 16] * len(numbers))
    service.requests.after_change()


def visible(service) -> set[int]:
    return {int.from_bytes(k, "big") for k in service.node.complete_keys()}


async def test_it_starts_with_what_is_there_and_follows_what_changes(service, follow):
    put(service, 1, 2, 3)
    mirror = Mirror()
    follower = await follow(service.record, mirror)
    assert mirror.held == {1, 2, 3}
    put(service, 4)
    service.node.drop(service._clock(), [key(1)])
    await eventually(lambda: mirror.held == {2, 3, 4})
    assert (follower.snapshots, follower.gaps, mirror.stale) == (1, 0, [])


async def test_under_constant_change_it_ends_equal_to_the_node(service, follow):
    mirror = Mirror()
    task = asyncio.create_task(follow(service.record, mirror))
    for n in range(300):  # a pool of 64 blocks: most of this is eviction
        put(service, n, n + 1000)
        if n % 10 == 0:
            await asyncio.sleep(0.005)
    follower = await task
    await eventually(lambda: mirror.held == visible(service))
    assert len(mirror.held) == 64
    assert follower.gaps == 0


async def test_a_snapshot_of_many_pages_arrives_whole(service, follow):
    service.requests.snapshots = Snapshots(service.epoch, page_keys=7)
    put(service, *range(1, 51))
    mirror = Mirror()
    await follow(service.record, mirror)
    assert mirror.held == set(range(1, 51))


async def test_a_lost_message_leads_to_a_new_snapshot_by_the_next_heartbeat(service, follow):
    mirror = Mirror()
    follower = await follow(service.record, mirror)
    service.requests.events.seq += 1  # as if a message had been dropped
    put(service, 5)
    await eventually(lambda: follower.snapshots == 2)
    assert mirror.held == {5}
    assert follower.gaps == 1
    assert len(mirror.stale) == 1


async def test_silence_makes_it_stale_once_and_a_sign_of_life_brings_it_back(service, follow):
    mirror = Mirror()
    follower = await follow(service.record, mirror, stale_s=0.5)
    service._beat.cancel()
    await eventually(lambda: mirror.stale)
    assert not follower.live
    await asyncio.sleep(0.6)
    assert mirror.stale == ["silent for 0.5 s"]
    service._beat = asyncio.create_task(service._keep_time())
    put(service, 9)
    await follower.wait_live(3)
    assert mirror.held == {9}


async def test_a_dead_store_is_never_live(follow):
    record = StoreRecord("n1", "e", "tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "/none", SIZE, 1)
    follower = await follow(record, Mirror(), live=False, stale_s=0.1)
    with pytest.raises(PeerTimeout, match="n1"):
        await follower.wait_live(0.3)


async def test_an_index_forgets_a_node_that_is_out_of_step(service, follow):
    class Index:
        def __init__(self):
            self.calls = []

        def apply(self, node, stored, removed):
            self.calls.append(("apply", split(stored), split(removed)))

        def reset(self, node):
            self.calls.append(("reset",))

    put(service, 1)
    index = Index()
    await follow(service.record, IndexListener(index), stale_s=0.5)
    put(service, 2)
    await eventually(lambda: len(index.calls) == 3)
    service._beat.cancel()
    await eventually(lambda: len(index.calls) == 4)
    assert index.calls == [("reset",), ("apply", [1], []), ("apply", [2], []), ("reset",)]


async def test_close_stops_all_callbacks(service, follow):
    mirror = Mirror()
    follower = await follow(service.record, mirror)
    await follower.close()
    put(service, 1)
    await asyncio.sleep(0.1)
    assert mirror.held == set()
    assert not follower.live
    await follower.close()


# ---------------------------------------------------------------- against a scripted store


class Scripted:
    """A store whose every word is written by the test."""

    def __init__(self):
        self.context = zmq.Context()
        self.pub = self.context.socket(zmq.PUB)
        self.pages = [SnapshotPage("e1", 5, blob(1), 0)]
        self.rpc = rpc.RpcServer("tcp://127.0.0.1:0", Snapshot, self.answer)
        self.rpc.start()
        self.record = StoreRecord(
            "n1", "e1", self.rpc.endpoint, rpc.bind(self.pub, "tcp://127.0.0.1:0"), "/none", SIZE, 1
        )

    async def answer(self, request):
        return self.pages[min(request.cursor, len(self.pages) - 1)]

    def say(self, seq, stored=b"", removed=b"", epoch="e1", node="n1"):
        self.pub.send(wire.encode(StoreEvents(node, epoch, seq, stored, removed)))

    async def until_live(self, follower, seq=5, epoch="e1"):
        while not follower.live:
            self.say(seq, epoch=epoch)
            await asyncio.sleep(0.02)

    async def close(self):
        self.context.destroy(linger=0)
        await self.rpc.close()


@pytest.fixture
async def scripted():
    store = Scripted()
    yield store
    await store.close()


async def test_events_that_are_in_the_snapshot_already_are_not_applied_again(scripted, follow):
    mirror = Mirror()
    follower = await follow(scripted.record, mirror, live=False)
    await scripted.until_live(follower)
    scripted.say(4, stored=blob(1))
    scripted.say(5, stored=blob(1))
    scripted.say(6, stored=blob(2), removed=blob(1))
    await eventually(lambda: mirror.held == {2})
    assert follower.gaps == 0


async def test_another_epoch_at_the_same_address_starts_afresh(scripted, follow):
    mirror = Mirror()
    follower = await follow(scripted.record, mirror, live=False)
    await scripted.until_live(follower)
    scripted.pages = [SnapshotPage("e2", 1, blob(8), 0)]
    scripted.say(1, epoch="e2")
    await eventually(lambda: mirror.stale)
    await scripted.until_live(follower, seq=1, epoch="e2")
    assert mirror.held == {8}


async def test_a_heartbeat_ahead_of_us_is_a_gap(scripted, follow):
    mirror = Mirror()
    follower = await follow(scripted.record, mirror, live=False)
    await scripted.until_live(follower)
    scripted.say(7)
    await eventually(lambda: follower.gaps == 1)
    assert mirror.stale == ["message 7 after 5"]


async def test_malformed_messages_lead_to_a_snapshot_and_other_nodes_are_ignored(scripted, follow):
    mirror = Mirror()
    follower = await follow(scripted.record, mirror, live=False)
    await scripted.until_live(follower)
    scripted.say(99, stored=blob(3), node="n2")
    scripted.say(6, stored=b"half a key")
    await eventually(lambda: mirror.stale)
    await scripted.until_live(follower)
    scripted.pub.send(b"garbage")
    await eventually(lambda: len(mirror.stale) == 2)
    assert mirror.held == {1}


@pytest.mark.parametrize(
    "pages",
    [
        [SnapshotPage("e1", 5, b"odd", 0)],
        [SnapshotPage("e1", 5, b"", 1)] * 2,
        [SnapshotPage("e1", 5, blob(1), 1), SnapshotPage("e2", 5, blob(2), 0)],  # it restarted in between
        [SnapshotPage("e1", 5, blob(1), 1), SnapshotPage("e1", 6, blob(2), 0)],
    ],
)
async def test_a_snapshot_that_makes_no_sense_is_never_live(scripted, follow, pages):
    scripted.pages = pages
    follower = await follow(scripted.record, Mirror(), live=False)
    for _ in range(10):
        scripted.say(5)
        await asyncio.sleep(0.02)
    assert not follower.live


async def test_a_snapshot_without_end_is_given_up(scripted, follow, monkeypatch):
    monkeypatch.setattr(follower_module, "SNAPSHOT_KEYS_MAX", 10)
    scripted.pages = [SnapshotPage("e1", 5, blob(1, 2, 3), 1)] * 2
    follower = await follow(scripted.record, Mirror(), live=False)
    for _ in range(10):
        scripted.say(5)
        await asyncio.sleep(0.02)
    assert not follower.live


# ---------------------------------------------------------------- snapshots and messages


def test_all_pages_of_a_snapshot_are_of_one_moment():
    snapshots, held = Snapshots("e", page_keys=2), [key(n) for n in range(5)]
    first = snapshots.page(0, 10, lambda: list(held))
    held.clear()
    second = snapshots.page(first.cursor, 11, list)
    third = snapshots.page(second.cursor, 12, list)
    assert [page.seq for page in (first, second, third)] == [10, 10, 10]
    assert split(first.keys + second.keys + third.keys) == [0, 1, 2, 3, 4]
    assert third.cursor == 0


def test_an_empty_or_exactly_full_snapshot_ends_properly():
    snapshots = Snapshots("e", page_keys=2)
    assert snapshots.page(0, 1, list).cursor == 0
    assert snapshots.page(0, 1, lambda: [key(1), key(2)]).cursor == 0


def test_snapshots_are_bounded_and_the_oldest_reader_starts_again():
    snapshots = Snapshots("e", page_keys=1)
    cursors = [snapshots.page(0, 1, lambda: [key(1), key(2)]).cursor for _ in range(6)]
    for cursor in cursors[:2]:
        with pytest.raises(RequestError, match="start again"):
            snapshots.page(cursor, 1, list)
    assert split(snapshots.page(cursors[-1], 1, list).keys) == [2]


def test_a_big_change_goes_out_in_several_messages(monkeypatch):
    monkeypatch.setattr(events_module, "EVENT_KEYS_MAX", 2)
    publisher = events_module.EventPublisher("tcp://127.0.0.1:0", "n", "e")
    sent = []
    monkeypatch.setattr(
        publisher, "_send", lambda stored, removed: sent.append((split(stored), split(removed)))
    )
    publisher.publish(NodeEvents([key(n) for n in (1, 2, 3)], [key(9)]))
    publisher.publish(NodeEvents([], []))
    publisher.close()
    assert sent == [([1, 2], [9]), ([3], [])]
    assert publisher.seq == 2
