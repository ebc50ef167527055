"""What every metadata backend does. A new backend runs these tests with a `backend` fixture of its own,
as tests/integration/test_metadata_etcd.py does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from mooncake.core.errors import RequestError
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_client import MetadataServer, RemoteMetadata
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.metadata_messages import MetaChange, MetaChanges

HISTORY = 8
POLL_S = 0.1


@dataclass
class Backend:
    """A store that nobody else writes to, and what a test may do behind its back."""

    store: MetadataStore
    forget: Callable[[int], Awaitable[None]]
    """Drop history up to a revision, HISTORY changes ago."""
    lease_s: float
    """A short lease that it can give."""


async def forgets_by_itself(_revision: int) -> None:
    """The memory store keeps HISTORY changes."""


@pytest.fixture(params=["memory", "memory over rpc"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    memory = MemoryMetadata(history_max=HISTORY, poll_s=POLL_S, tick_s=0.02)
    if request.param == "memory":
        yield Backend(memory, forgets_by_itself, 0.4)
        await memory.close()
        return
    server = MetadataServer("tcp://127.0.0.1:*", memory)
    server.start()
    client = RemoteMetadata(server.endpoint, poll_s=POLL_S)
    yield Backend(client, forgets_by_itself, 0.4)
    await client.close()
    await server.close()


@pytest.fixture
def store(backend: Backend) -> MetadataStore:
    return backend.store


async def values(store: MetadataStore, prefix: str = "/") -> dict[str, bytes]:
    return {entry.key: entry.value for entry in (await store.get(prefix)).entries}


async def collect(store: MetadataStore, prefix: str, from_revision: int, count: int) -> list[MetaChange]:
    changes: list[MetaChange] = []
    watching = store.watch(prefix, from_revision)
    async with asyncio.timeout(5), contextlib.aclosing(watching):  # type: ignore[type-var]
        async for batch in watching:
            changes += batch.changes
            if len(changes) >= count:
                return changes
    raise AssertionError("the watch ended early")


async def first_news(store: MetadataStore, revision: int, epoch: str = "") -> MetaChanges:
    """Return the first batch that says something; etcd takes its time to look into the past."""
    watching = store.watch("/", revision, epoch)
    async with asyncio.timeout(5), contextlib.aclosing(watching):  # type: ignore[type-var]
        async for batch in watching:
            if batch.changes or batch.compacted:
                return batch
    raise AssertionError("the watch ended early")


async def revision_of(store: MetadataStore) -> int:
    return (await store.get("/")).revision


async def test_a_listing_holds_exactly_the_keys_under_its_prefix_sorted(store):
    for key in ("/b/2", "/a/1", "/b/1", "/b", "/b0"):
        last = await store.put(key, key.encode())
    listing = await store.get("/b/")
    assert [(entry.key, entry.value) for entry in listing.entries] == [("/b/1", b"/b/1"), ("/b/2", b"/b/2")]
    assert listing.revision >= last.revision
    assert (await store.get("/")).revision == listing.revision
    assert listing.epoch


async def test_revisions_grow_with_every_change_and_name_the_last_change_of_a_key(store):
    first = await store.put("/a", b"1")
    second = await store.put("/a", b"2")
    assert 0 < first.revision < second.revision
    (entry,) = (await store.get("/a")).entries
    assert (entry.value, entry.revision) == (b"2", second.revision)


async def test_put_if_absent_lets_exactly_one_of_many_writers_win(store):
    results = await asyncio.gather(*(store.put("/leader", b"%d" % i, if_revision=0) for i in range(8)))
    winners = [i for i, result in enumerate(results) if result.done]
    assert len(winners) == 1
    assert await values(store) == {"/leader": b"%d" % winners[0]}


async def test_a_failed_compare_returns_the_current_revision_and_changes_nothing(store):
    written = await store.put("/a", b"1")
    await store.put("/other", b"x")
    lost = await store.put("/a", b"2", if_revision=written.revision + 1)
    assert (lost.done, lost.revision) == (False, written.revision)
    won = await store.put("/a", b"2", if_revision=written.revision)
    assert won.done


async def test_delete_is_idempotent_and_a_deleted_key_is_absent_again(store):
    await store.put("/a", b"1")
    await store.delete("/a")
    await store.delete("/a")
    assert await values(store) == {}
    assert (await store.put("/a", b"2", if_revision=0)).done


async def test_keys_vanish_with_their_lease_and_others_stay(store, backend):
    lease = await store.grant(backend.lease_s)
    await store.put("/mine", b"1", lease)
    await store.put("/permanent", b"2")
    changes = await collect(store, "/mine", (await store.get("/")).revision, 1)
    assert (changes[0].key, changes[0].value) == ("/mine", None)
    assert await values(store) == {"/permanent": b"2"}
    assert not await store.keep_alive(lease)


async def test_a_lease_kept_alive_keeps_its_keys(store, backend):
    lease = await store.grant(backend.lease_s)
    await store.put("/mine", b"1", lease)
    for _ in range(6):
        await asyncio.sleep(backend.lease_s / 4)
        assert await store.keep_alive(lease)
    assert await values(store) == {"/mine": b"1"}


async def test_revoke_removes_the_keys_at_once_and_is_idempotent(store):
    lease = await store.grant(60)
    await store.put("/mine", b"1", lease)
    await store.revoke(lease)
    await store.revoke(lease)
    assert await values(store) == {}


async def test_a_key_put_under_another_lease_survives_the_end_of_the_first(store):
    """A restarted process takes over its name before its predecessor's lease has ended."""
    old, new = await store.grant(60), await store.grant(60)
    await store.put("/node", b"old", old)
    await store.put("/node", b"new", new)
    await store.revoke(old)
    assert await values(store) == {"/node": b"new"}


async def test_a_put_under_a_lease_that_is_gone_is_refused(store):
    lease = await store.grant(60)
    await store.revoke(lease)
    with pytest.raises(RequestError, match="gone"):
        await store.put("/mine", b"1", lease)
    assert await values(store) == {}


@pytest.mark.parametrize("key", ["", "k" * 513])
async def test_keys_have_a_bounded_length(store, key):
    with pytest.raises(RequestError, match="characters"):
        await store.put(key, b"")


async def test_values_are_bounded(store):
    with pytest.raises(RequestError, match="bytes"):
        await store.put("/a", bytes(65537))


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 1e9, float("nan")])
async def test_leases_have_a_bounded_time_to_live(store, ttl_s):
    with pytest.raises(RequestError, match="lease"):
        await store.grant(ttl_s)


async def test_a_watch_replays_the_past_then_follows_the_present_without_gap_or_repeat(store):
    await store.put("/w/1", b"a")
    start = (await store.get("/w/")).revision
    await store.put("/w/2", b"b")
    await store.put("/elsewhere", b"-")
    watching = asyncio.create_task(collect(store, "/w/", start, 4))
    await asyncio.sleep(0.05)
    await store.put("/w/1", b"c")
    await store.delete("/w/2")
    await store.put("/w/3", b"d")
    changes = await watching
    seen = [(change.key, change.value) for change in changes]
    assert seen == [("/w/2", b"b"), ("/w/1", b"c"), ("/w/2", None), ("/w/3", b"d")]
    revisions = [change.revision for change in changes]
    assert revisions == sorted(set(revisions))


async def test_an_idle_watch_yields_empty_batches_so_that_its_owner_can_act_on_time(store):
    watching = store.watch("/", await revision_of(store))
    async with asyncio.timeout(5), contextlib.aclosing(watching):  # type: ignore[type-var]
        batch = await anext(watching)
    assert (batch.changes, batch.compacted) == ([], False)


async def test_a_watch_from_before_the_kept_history_is_told_to_list_again(store, backend):
    start = await revision_of(store)
    written = [(await store.put("/a", b"%d" % i)).revision for i in range(HISTORY + 2)]
    await backend.forget(written[1])
    assert (await first_news(store, start)).compacted
    kept = await first_news(store, written[1])
    assert not kept.compacted
    assert kept.changes[0].revision == written[2]


async def test_a_deletion_that_history_no_longer_holds_is_never_missed(store, backend):
    """A watcher that saw all up to just before it must not believe that nothing happened."""
    await store.put("/a", b"1")
    start = await revision_of(store)
    await store.delete("/a")
    gone = await revision_of(store)
    for i in range(HISTORY):
        await store.put("/b", b"%d" % i)
    await backend.forget(gone)
    assert (await first_news(store, start)).compacted


async def test_a_watch_that_knows_another_life_of_the_store_is_told_to_list_again(store):
    start = await revision_of(store)
    await store.put("/a", b"1")
    assert (await first_news(store, start, epoch="another")).compacted
    assert (await first_news(store, start + 99)).compacted  # revisions of the future
    epoch = (await store.get("/")).epoch
    assert not (await first_news(store, start, epoch)).compacted


async def test_many_watchers_see_the_same_changes(store):
    start = await revision_of(store)
    watching = [asyncio.create_task(collect(store, "/", start, 3)) for _ in range(5)]
    await asyncio.sleep(0.05)
    for i in range(3):
        await store.put(f"/{i}", b"")
    results = await asyncio.gather(*watching)
    assert [change.key for change in results[0]] == ["/0", "/1", "/2"]
    assert all(result == results[0] for result in results)


async def test_a_put_under_a_lease_that_loses_its_compare_leaves_the_key_to_its_owner(store):
    mine, other = await store.grant(60), await store.grant(60)
    await store.put("/leader", b"mine", mine, if_revision=0)
    assert not (await store.put("/leader", b"other", other, if_revision=0)).done
    await store.revoke(other)
    assert await values(store) == {"/leader": b"mine"}


async def test_keys_and_values_are_any_text_and_bytes(store):
    key, value = '/\u00e4 \u4e2d\U0001f319"\\/', bytes(range(256))
    await store.put(key, value)
    await store.put("/empty", b"")
    assert await values(store) == {key: value, "/empty": b""}
    await store.put("/big", bytes(65536))
    assert len((await values(store))["/big"]) == 65536
