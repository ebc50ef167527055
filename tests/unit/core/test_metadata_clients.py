"""Registration and follow: what survives when the store does not."""

import asyncio
import contextlib
import time

import pytest

from mooncake.core import metadata_follow, metadata_registration
from mooncake.core.errors import PeerGone
from mooncake.core.metadata_client import MetadataServer, RemoteMetadata
from mooncake.core.metadata_follow import Changed, Event, Removed, Up, View, follow
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.metadata_messages import MetaChange, MetaEntry
from mooncake.core.metadata_registration import Registration, RegistrationState


async def eventually(condition, within_s: float = 5.0) -> None:
    end_s = time.monotonic() + within_s
    while True:
        result = condition()
        if await result if asyncio.iscoroutine(result) else result:
            return
        assert time.monotonic() < end_s, f"not within {within_s} s"
        await asyncio.sleep(0.02)


def listed(server: MetadataServer) -> dict[str, bytes]:
    return {e.key: e.value for e in server.store._machine.get("/").entries}


@pytest.fixture
def quick_retries(monkeypatch) -> None:
    for module in (metadata_registration, metadata_follow):
        monkeypatch.setattr(module, "BACKOFF_S_MIN", 0.02)
        monkeypatch.setattr(module, "BACKOFF_S_MAX", 0.05)


def ipc(tmp_path) -> str:
    return f"ipc://{tmp_path}/meta"


# ---------------------------------------------------------------- registration


async def test_a_registration_waits_for_a_store_that_starts_later(tmp_path):
    client = RemoteMetadata(ipc(tmp_path))
    registration = Registration(client, "/me", lambda: b"1", ttl_s=0.6)
    registration.start()
    await asyncio.sleep(0.1)
    assert registration.state is not RegistrationState.REGISTERED
    server = MetadataServer(ipc(tmp_path))
    server.start()
    async with asyncio.timeout(5):
        await registration.wait_registered()
    assert listed(server) == {"/me": b"1"}
    await registration.close()
    assert listed(server) == {}
    await client.close()
    await server.close()


async def test_a_registration_comes_back_after_the_store_restarted_empty(tmp_path, quick_retries):
    server = MetadataServer(ipc(tmp_path))
    server.start()
    client = RemoteMetadata(server.endpoint, call_s=0.2)
    registration = Registration(client, "/me", lambda: b"1", ttl_s=0.6)
    registration.start()
    await registration.wait_registered()
    await server.close()
    await eventually(lambda: registration.state is RegistrationState.AWAY)
    server = MetadataServer(ipc(tmp_path))
    server.start()
    await eventually(lambda: listed(server) == {"/me": b"1"})
    await eventually(lambda: registration.registrations == 2)
    await registration.close()
    assert registration.state is RegistrationState.CLOSED
    await client.close()
    await server.close()


async def test_a_registration_whose_lease_was_taken_away_registers_again():
    store = MemoryMetadata()
    registration = Registration(store, "/me", lambda: b"1", ttl_s=0.3)
    registration.start()
    await registration.wait_registered()
    await store.revoke(registration._lease_id)
    await eventually(lambda: registration.registrations == 2)
    await registration.close()
    await store.close()


async def test_a_changed_value_is_written_at_once_on_refresh():
    store, value = MemoryMetadata(), b"1"
    registration = Registration(store, "/me", lambda: value, ttl_s=60)
    registration.start()
    await registration.wait_registered()
    value = b"2"
    registration.refresh()

    async def written() -> bool:
        return (await store.get("/me")).entries[0].value == b"2"

    await eventually(written)
    assert registration.registrations == 1
    await registration.close()
    await store.close()


async def test_a_faulty_store_or_value_never_reaches_the_owner():
    class Broken(MemoryMetadata):
        async def grant(self, ttl_s: float) -> int:
            raise PeerGone("no")

    def bad_value() -> bytes:
        raise ValueError("bug of the owner")

    for registration in (
        Registration(Broken(), "/me", lambda: b"1", ttl_s=0.3),
        Registration(MemoryMetadata(), "/me", bad_value, ttl_s=0.3),
    ):
        registration.start()
        await eventually(lambda r=registration: r.state is RegistrationState.AWAY)
        await registration.close()


async def test_close_is_bounded_when_the_store_hangs(monkeypatch):
    monkeypatch.setattr(metadata_registration, "CLOSE_S", 0.2)

    class Hanging(MemoryMetadata):
        async def revoke(self, lease_id: int) -> None:
            await asyncio.sleep(60)

    registration = Registration(Hanging(), "/me", lambda: b"1", ttl_s=0.3)
    registration.start()
    await registration.wait_registered()
    start_s = time.monotonic()
    await registration.close()
    assert time.monotonic() - start_s < 15.0


# ---------------------------------------------------------------- a stalled store


async def test_a_store_that_was_stopped_extends_leases_instead_of_ending_them():
    """SIGSTOP, suspend: nobody could send a keep-alive that this process would have heard."""
    now_s = 0.0
    store = MemoryMetadata(clock_s=lambda: now_s, tick_s=0.01)
    lease = await store.grant(3.0)
    await asyncio.sleep(0.03)
    now_s = 100.0
    await asyncio.sleep(0.05)
    assert await store.keep_alive(lease)
    now_s = 100.9  # a normal pause, then really silent
    await asyncio.sleep(0.05)
    for step in range(1, 5):
        now_s = 100.9 + step * 0.8
        await asyncio.sleep(0.05)
    assert not await store.keep_alive(lease)
    await store.close()


# ---------------------------------------------------------------- the pure view


def entry(key: str, value: bytes = b"") -> MetaEntry:
    return MetaEntry(key, value, 1)


def test_a_listing_yields_only_what_differs():
    view = View()
    assert view.on_list(0.0, "e", 1, [entry("/1", b"a"), entry("/2")]) == [Up("/1", b"a"), Up("/2", b"")]
    again = view.on_list(1.0, "e", 5, [entry("/1", b"b"), entry("/3")])
    assert again == [Removed("/2", b""), Changed("/1", b"b"), Up("/3", b"")]


def test_the_same_value_again_is_no_event():
    view = View()
    view.on_list(0.0, "e", 1, [entry("/1", b"a")])
    assert view.on_changes(2, [MetaChange("/1", b"a", 2)]) == []
    assert view.on_changes(4, [MetaChange("/1", None, 3), MetaChange("/1", b"a", 4)]) == [
        Removed("/1", b"a"),
        Up("/1", b"a"),
    ]


def test_after_a_restart_of_the_store_members_do_not_blink():
    view = View(grace_s=5.0)
    view.on_list(0.0, "e1", 9, [entry("/back", b"1"), entry("/dead", b"2")])
    assert view.on_list(10.0, "e2", 0, []) == []
    assert view.on_changes(1, [MetaChange("/back", b"1", 1)]) == []
    assert view.tick(14.9) == []
    assert view.tick(15.0) == [Removed("/dead", b"2")]
    assert view.tick(99.0) == []
    assert view.entries == {"/back": b"1"}


def test_a_listing_within_the_grace_does_not_cut_it_short_and_a_second_restart_not_prolong_it():
    view = View(grace_s=5.0)
    view.on_list(0.0, "e1", 9, [entry("/dead")])
    view.on_list(10.0, "e2", 0, [])
    assert view.on_list(11.0, "e2", 100, []) == []  # compaction
    assert view.on_list(12.0, "e3", 0, []) == []
    assert view.tick(15.0) == [Removed("/dead", b"")]


def test_a_removal_told_by_the_new_store_is_believed_at_once():
    view = View(grace_s=5.0)
    view.on_list(0.0, "e1", 9, [entry("/1")])
    view.on_list(1.0, "e2", 0, [])
    view.on_changes(1, [MetaChange("/1", b"", 1)])
    assert view.on_changes(2, [MetaChange("/1", None, 2)]) == [Removed("/1", b"")]


# ---------------------------------------------------------------- follow


async def apply(follower, into: dict[str, bytes], events: list[Event]) -> None:
    async for event in follower:
        events.append(event)
        if isinstance(event, Removed):
            assert into.pop(event.key) == event.value
        else:
            assert (event.key in into) == isinstance(event, Changed)
            into[event.key] = event.value


@contextlib.asynccontextmanager
async def following(store, **options):
    view: dict[str, bytes] = {}
    events: list[Event] = []
    follower = follow(store, "/m/", **options)
    task = asyncio.create_task(apply(follower, view, events))
    try:
        yield follower, view, events
    finally:
        assert not task.done(), task.exception()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_follow_holds_what_the_store_holds():
    store = MemoryMetadata()
    await store.put("/m/1", b"a")
    await store.put("/other", b"-")
    async with following(store) as (follower, view, events):
        await asyncio.wait_for(follower.synced.wait(), 2)
        await eventually(lambda: view == {"/m/1": b"a"})
        await store.put("/m/2", b"b")
        await store.put("/m/1", b"c")
        await store.delete("/m/2")
        await eventually(lambda: view == {"/m/1": b"c"})
        assert events == [Up("/m/1", b"a"), Up("/m/2", b"b"), Changed("/m/1", b"c"), Removed("/m/2", b"b")]
        assert follower.entries == view


async def test_follow_lists_again_after_compaction():
    store = MemoryMetadata(history_max=4)
    await store.put("/m/gone", b"")
    async with following(store) as (_, view, _):
        await eventually(lambda: "/m/gone" in view)
        await store.delete("/m/gone")
        for i in range(20):  # without a break: the watcher cannot keep up
            await store.put(f"/m/{i}", b"")
        await eventually(lambda: view == {f"/m/{i}": b"" for i in range(20)})


async def test_follow_survives_a_restart_of_the_server_without_losing_or_inventing_members(
    tmp_path, quick_retries
):
    server = MetadataServer(ipc(tmp_path))
    server.start()
    client, mine = (RemoteMetadata(server.endpoint, call_s=0.2, poll_s=0.2) for _ in range(2))
    registration = Registration(mine, "/m/alive", lambda: b"1", ttl_s=0.6)
    registration.start()
    await server.store.put("/m/dies", b"2")
    async with following(client, grace_s=1.0) as (follower, view, events):
        await eventually(lambda: len(view) == 2)
        await server.close()
        await eventually(lambda: not follower.connected)
        assert len(view) == 2  # the last known view stands while the store is away
        server = MetadataServer(ipc(tmp_path))
        server.start()
        await eventually(lambda: view == {"/m/alive": b"1"}, within_s=10)
        assert follower.connected
        assert [event for event in events if event.key == "/m/alive"] == [Up("/m/alive", b"1")]
    await registration.close()
    await client.close()
    await mine.close()
    await server.close()


@pytest.mark.parametrize("stopped_s", [0.3])
async def test_a_process_that_stops_beating_is_removed_within_its_time_to_live(stopped_s):
    store = MemoryMetadata()
    registration = Registration(store, "/m/1", lambda: b"", ttl_s=stopped_s)
    registration.start()
    async with following(store) as (_, view, _):
        await eventually(lambda: bool(view))
        registration._task.cancel()  # as a kill would
        await eventually(lambda: not view, within_s=1.0)
    await store.close()
