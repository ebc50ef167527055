"""What goes wrong with etcd, on real servers: nothing is lost, nobody waits without an end."""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.engine.client import PoolClient
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core import metadata_etcd, metadata_etcd_http, metadata_registration
from mooncake.core.election import Election
from mooncake.core.errors import ConfigError, PeerError, PeerGone, PeerTimeout
from mooncake.core.keys import block_checksum
from mooncake.core.messages import StoreRecord
from mooncake.core.metadata_etcd import ANSWER_S, CALL_S, EtcdMetadata
from mooncake.core.metadata_etcd_options import Endpoint, EtcdOptions, parse_etcd
from mooncake.core.metadata_follow import Follower, follow
from mooncake.core.metadata_messages import MetaChange, MetaChanges
from mooncake.core.metadata_registration import Registration, RegistrationState
from tests.integration.etcd_servers import LEASE_S_MIN, NEEDS_ETCD, POLL_S, EtcdServers, Tls, client, running
from tests.integration.etcd_tls import make_tls

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

WAIT_S = 15.0
OUTAGE_S = 10.0
ELECTION_S = 4.0
"""Longer than every lease, deadline and back-off step of an election."""
TTL_S = 2.0
BLOCK_BYTES = 64 << 10


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[EtcdServers]:
    with running(tmp_path) as servers:
        yield servers


@pytest.fixture
def three(tmp_path: Path) -> Iterator[EtcdServers]:
    with running(tmp_path, count=3) as servers:
        yield servers


@contextlib.asynccontextmanager
async def following(store: EtcdMetadata, prefix: str = "/") -> AsyncIterator[Follower]:
    """A follower whose `entries` are kept up to date."""
    follower = follow(store, prefix, grace_s=WAIT_S)

    async def run() -> None:
        async for _ in follower:
            pass

    task = asyncio.create_task(run())
    try:
        async with asyncio.timeout(WAIT_S):
            await follower.synced.wait()
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def drain(watching: AsyncIterator[MetaChanges]) -> None:
    async with asyncio.timeout(WAIT_S):
        async for _ in watching:
            pass


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.01)


async def written(store: EtcdMetadata, key: str, value: bytes) -> int:
    """Put, however often it takes; return how often it failed."""
    failures = 0
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await store.put(key, value)
                return failures
            except PeerError:
                failures += 1
                await asyncio.sleep(0.05)


async def changes_until(store: EtcdMetadata, revision: int, key: str) -> list[MetaChange]:
    """Watch on after every loss, from the last revision, until `key` has come."""
    seen: list[MetaChange] = []
    async with asyncio.timeout(WAIT_S):
        while True:
            watching = store.watch("/", revision)
            with contextlib.suppress(PeerError):
                async with contextlib.aclosing(watching):  # type: ignore[type-var]
                    async for batch in watching:
                        assert not batch.compacted
                        seen += batch.changes
                        revision = batch.revision
                        if any(change.key == key for change in seen):
                            return seen
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def store_node(run_dir: Path) -> AsyncIterator[StoreRecord]:
    service = StoreService(StoreConfig(node="n1", capacity_bytes=8 << 20, run_dir=str(run_dir)))
    stop = asyncio.Event()
    record = await service.start()
    running = asyncio.create_task(service.run_until(stop))
    try:
        yield record
    finally:
        stop.set()
        await running
        await service.close()


def block(n: int) -> tuple[bytes, bytes]:
    """Return the key and the bytes of a block."""
    return n.to_bytes(32, "big"), n.to_bytes(8, "big") * (BLOCK_BYTES // 8)


def write_block(pool: PoolClient, n: int) -> None:
    key, content = block(n)
    (slot,) = pool.reserve([key], BLOCK_BYTES)
    assert slot is not None
    slot.view[:] = content
    assert pool.commit([slot.ticket], [block_checksum(key, slot.view)]) == [True]


def read_block(pool: PoolClient, n: int) -> bool:
    key, content = block(n)
    lease = pool.acquire([key], 5.0)
    try:
        return len(lease) == 1 and lease.verify(0) and bytes(lease.views[0]) == content
    finally:
        pool.release(lease.lease_id)


# ---------------------------------------------------------------- one server


async def test_a_killed_server_that_comes_back_has_everything_and_watches_miss_nothing(servers):
    async with client(servers.options()) as store, client(servers.options()) as other:
        await store.put("/w/0", b"before")
        start = await store.get("/")
        watching = asyncio.create_task(changes_until(store, start.revision, "/w/end"))
        await store.put("/w/1", b"1")
        servers.kill()
        with pytest.raises(PeerGone):
            await store.put("/w/lost", b"")
        await asyncio.to_thread(servers.start)
        await other.put("/w/2", b"2")  # perhaps before the watcher is back
        await other.delete("/w/0")
        await other.put("/w/end", b"")
        seen = [(change.key, change.value) for change in await watching]
        assert seen == [("/w/1", b"1"), ("/w/2", b"2"), ("/w/0", None), ("/w/end", b"")]
        after = await store.get("/")
        assert after.epoch == start.epoch
        assert [entry.key for entry in after.entries] == ["/w/1", "/w/2", "/w/end"]


async def test_a_server_that_lost_its_data_begins_another_life_though_its_cluster_has_the_same_id(servers):
    async with client(servers.options()) as store:
        await store.put("/old", b"")
        before = await store.get("/")
        cluster = before.epoch.partition("-")[0]
        servers.kill()
        servers.wipe()
        await asyncio.to_thread(servers.start)
        for i in range(10):  # its revisions overtake what was known of the old ones
            await store.put(f"/new/{i}", b"")
        batch = await anext(store.watch("/", before.revision, before.epoch))
        assert batch.compacted
        after = await store.get("/")
        assert after.revision > before.revision
        assert after.epoch.partition("-")[0] == cluster
        assert after.epoch != before.epoch


async def test_a_follower_lists_again_when_history_was_compacted_while_it_was_away(servers):
    async with (
        client(servers.options()) as store,
        client(servers.options()) as writer,
        following(store) as follower,
    ):
        await writer.put("/gone", b"")
        await writer.put("/stays", b"1")
        await until(lambda: follower.entries == {"/gone": b"", "/stays": b"1"})
        servers.kill()
        await until(lambda: not follower.connected)
        # the follower is kept away until the past is gone
        order, store._order = store._order, [Endpoint("127.0.0.1", 1)]
        store._idle[store._order[0]] = []
        await asyncio.to_thread(servers.start)
        await writer.delete("/gone")
        done = await writer.put("/stays", b"2")
        await asyncio.to_thread(servers.compact, done.revision)
        await writer.put("/new", b"")
        store._order = order
        await until(lambda: follower.entries == {"/stays": b"2", "/new": b""})


async def test_a_watcher_far_behind_gets_everything_in_pieces_or_is_told_to_list_again(servers, monkeypatch):
    """etcd would send a backlog as one message of any size."""
    monkeypatch.setattr(metadata_etcd_http, "BODY_BYTES_MAX", 4 << 20)
    async with client(servers.options()) as store:
        listing = await store.get("/")
        keys = [f"/{i:03}" for i in range(100)]
        for key in keys:
            await store.put(key, bytes(64 << 10))
        seen = await changes_until(store, listing.revision, keys[-1])
        assert [change.key for change in seen] == keys
        monkeypatch.setattr(metadata_etcd, "BATCH_BYTES_MAX", 4 << 20)
        async with asyncio.timeout(WAIT_S):
            batches = [batch async for batch in store.watch("/", listing.revision, listing.epoch)]
        assert not any(batch.changes for batch in batches)
        assert batches[-1].compacted


async def test_a_silent_server_is_lost_after_the_named_bounds_and_found_again(servers):
    """SIGSTOP: the kernel accepts connections, nobody ever answers."""
    options = servers.options()
    async with client(options) as store:
        revision = (await store.get("/")).revision
        watching = store.watch("/", revision)
        await anext(watching)
        servers.pause()
        began_s = time.monotonic()
        with pytest.raises(PeerTimeout, match="silent"):
            await anext(watching)
        with pytest.raises(PeerTimeout, match="does not answer"):
            await store.get("/")
        assert time.monotonic() - began_s < POLL_S + CALL_S + 1.0
        servers.resume()
        assert (await store.get("/")).revision == revision


async def test_the_lease_of_a_member_is_not_stretched_by_an_etcd_with_its_own_settings(tmp_path):
    """It would delay the news of every death: etcd's minimum is 1.5 times its election time-out."""
    defaults = ("--heartbeat-interval=100", "--election-timeout=1000")
    with running(tmp_path, flags=defaults) as servers:
        async with client(servers.options()) as store:
            lease_id = await store.grant(metadata_registration.TTL_S)
            granted = await asyncio.to_thread(servers.ask, "/v3/lease/timetolive", {"ID": str(lease_id)})
            assert float(granted["grantedTTL"]) == metadata_registration.TTL_S


async def test_a_registration_ends_with_its_process_and_comes_back_with_it(servers):
    async with (
        client(servers.options()) as ours,
        client(servers.options()) as theirs,
        following(ours) as seen,
    ):
        registration = Registration(theirs, "/node", lambda: b"here", ttl_s=LEASE_S_MIN)
        registration.start()
        await until(lambda: seen.entries == {"/node": b"here"})
        assert registration._task
        registration._task.cancel()  # kill -9: nobody revokes the lease
        await until(lambda: seen.entries == {})
        registration.start()
        await until(lambda: seen.entries == {"/node": b"here"})
        await registration.close()
        await until(lambda: seen.entries == {})


@pytest.mark.chaos
async def test_an_outage_of_10_s_takes_no_member_away_and_cached_data_is_read_and_written_all_the_while(
    servers, tmp_path
):
    async with (
        client(servers.options()) as ours,
        client(servers.options()) as theirs,
        following(ours) as seen,
        store_node(tmp_path / "run") as record,
    ):
        registration = Registration(theirs, "/n1", lambda: msgspec.json.encode(record), ttl_s=TTL_S)
        registration.start()
        await until(lambda: "/n1" in seen.entries)
        members = dict(seen.entries)
        pool = await asyncio.to_thread(PoolClient, record, "engine", deadline_s=WAIT_S)
        await asyncio.to_thread(write_block, pool, 0)
        servers.kill()
        await until(lambda: registration.state is RegistrationState.AWAY and not seen.connected)
        end_s = time.monotonic() + OUTAGE_S
        for n in itertools.count(1):
            await asyncio.to_thread(write_block, pool, n)
            assert await asyncio.to_thread(read_block, pool, n)
            assert await asyncio.to_thread(read_block, pool, 0)
            assert seen.entries == members
            if time.monotonic() > end_s:
                break
        await asyncio.to_thread(servers.start)
        await until(lambda: registration.state is RegistrationState.REGISTERED and seen.connected)
        await asyncio.sleep(TTL_S)  # were the lease not kept alive again, it would end here
        assert seen.entries == members
        await registration.close()
        await asyncio.to_thread(pool.close)


# ---------------------------------------------------------------- three servers


async def test_the_death_of_the_leader_of_three_loses_no_write_and_no_watch(three):
    async with client(three.options()) as store, client(three.options()) as watcher:
        start = (await store.get("/")).revision
        watching = asyncio.create_task(changes_until(watcher, start, "/end"))
        for i in range(5):
            await store.put(f"/{i}", b"before")
        three.kill(await asyncio.to_thread(three.leader))
        for i in range(5, 10):
            await written(store, f"/{i}", b"after")
        await written(store, "/end", b"")
        keys = [change.key for change in await watching]
        assert list(dict.fromkeys(keys)) == [*(f"/{i}" for i in range(10)), "/end"]
        assert len((await store.get("/")).entries) == 11


async def test_a_silent_server_of_three_costs_one_deadline_once(three):
    options = three.options()
    async with client(options) as store:
        await store.put("/a", b"1")
        leader = await asyncio.to_thread(three.leader)
        silent = (leader + 1) % 3
        first = [options.endpoints[silent], *(e for i, e in enumerate(options.endpoints) if i != silent)]
        three.pause(silent)
        async with client(EtcdOptions(endpoints=tuple(first))) as late:
            assert (await late.get("/a")).entries[0].value == b"1"
            began_s = time.monotonic()
            for _ in range(5):
                await late.get("/a")
            assert time.monotonic() - began_s < 3 * ANSWER_S  # five deadlines, were it asked first again
        three.resume(silent)


async def test_a_server_without_a_majority_neither_answers_nor_pretends_to_watch(three):
    leader = await asyncio.to_thread(three.leader)
    alone = EtcdOptions(endpoints=(three.options().endpoints[leader],))
    async with client(alone) as store:
        revision = (await store.get("/")).revision
        watching = store.watch("/", revision)
        await anext(watching)
        for index in range(3):
            if index != leader:
                three.kill(index)
        with pytest.raises(PeerError):
            await drain(watching)
        with pytest.raises(PeerError):
            await store.get("/")


async def test_candidates_elect_one_of_them_through_the_death_of_etcds_own_leader(three):
    async with client(three.options()) as one, client(three.options()) as two:
        elections = [
            Election(store, "/leader", name, ttl_s=TTL_S) for store, name in ((one, "a"), (two, "b"))
        ]
        for election in elections:
            election.start()
        await until(lambda: any(election.term for election in elections))
        three.kill(await asyncio.to_thread(three.leader))
        end_s = time.monotonic() + ELECTION_S
        while time.monotonic() < end_s:
            assert sum(election.term is not None for election in elections) <= 1
            await asyncio.sleep(0.02)
        await until(lambda: any(election.term for election in elections))
        for election in elections:
            await election.close()


# ---------------------------------------------------------------- names and certificates


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, tls: Tls) -> Iterator[EtcdServers]:
    with running(tmp_path_factory.mktemp("secure"), tls=tls) as servers:
        yield servers


async def test_everything_works_over_mutual_tls_and_a_dns_name(secure, tls):
    text = (
        f"etcds://localhost:{secure.ports[0]}/secure?ca={tls.ca}&cert={tls.client_cert}&key={tls.client_key}"
    )
    async with client(parse_etcd(text)) as store, following(store, "/x/") as seen:
        lease = await store.grant(LEASE_S_MIN)
        await store.put("/x/1", b"1", lease)
        await until(lambda: seen.entries == {"/x/1": b"1"})
        assert await store.keep_alive(lease)
        await store.revoke(lease)
        await until(lambda: seen.entries == {})


async def test_a_server_of_another_authority_is_refused_and_the_message_says_so(secure, tls, tmp_path):
    other = make_tls(tmp_path)
    files = {"ca": str(other.ca), "cert": str(tls.client_cert), "key": str(tls.client_key)}
    async with client(secure.options(**files)) as store:
        with pytest.raises(ConfigError, match=f"certificate is refused.*{other.ca}.*must have signed"):
            await store.get("/")


async def test_a_certificate_for_another_name_is_refused(secure, tls):
    files = {"ca": str(tls.ca), "cert": str(tls.client_cert), "key": str(tls.client_key)}
    async with client(secure.options("127.0.0.2", **files)) as store:
        with pytest.raises(ConfigError, match=r"127\.0\.0\.2.*for this name"):
            await store.get("/")


async def test_a_client_without_a_certificate_or_without_tls_is_refused(secure, tls):
    async with client(secure.options(ca=str(tls.ca))) as store:
        with pytest.raises(ConfigError, match="cert"):
            await store.get("/")
    async with client(EtcdOptions(endpoints=secure.options().endpoints)) as store:
        with pytest.raises(PeerError):
            await store.get("/")


async def test_tls_to_a_server_without_it_says_so(servers, tls):
    plain = EtcdOptions(endpoints=servers.options().endpoints, secure=True, ca=str(tls.ca))
    async with client(plain) as store:
        with pytest.raises(PeerGone, match="does it speak TLS"):
            await store.get("/")


async def test_a_name_that_nobody_has_and_a_port_that_is_closed_leave_the_other_server(servers):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    endpoints = (Endpoint("no-such-host.invalid", 2379), Endpoint("127.0.0.1", closed))
    async with client(EtcdOptions(endpoints=endpoints + servers.options().endpoints)) as store:
        assert (await store.put("/a", b"")).done  # never sent twice, but it may look for who is there
    async with client(EtcdOptions(endpoints=endpoints)) as store:
        with pytest.raises(PeerError):
            await store.get("/")
