"""What a process asks of its metadata store is counted, whatever the store is and however it answers."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from mooncake.core.election import Election
from mooncake.core.errors import PeerGone, RequestError
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.metadata_messages import MetaChanges
from mooncake.core.metadata_metrics import MetadataCollector, MetadataMeter, MeteredMetadata
from mooncake.core.metadata_registration import Registration


class World:
    def __init__(self, store=None) -> None:
        self.now_s = 100.0
        self.meter = MetadataMeter()
        self.store = MeteredMetadata(MemoryMetadata() if store is None else store, self.meter)
        self.registry = CollectorRegistry()
        self.registry.register(MetadataCollector(self.meter, lambda: self.now_s))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"mooncake_metadata_{name}", labels)


class Away(MemoryMetadata):
    async def get(self, prefix):
        raise PeerGone("away")

    async def watch(self, prefix, from_revision, epoch=""):
        yield MetaChanges(1, [], compacted=True)
        raise PeerGone("away")


async def test_every_question_is_counted_by_what_came_of_it():
    world = World()
    assert world.value("connected") == 0
    await world.store.put("/a", b"1")
    await world.store.delete("/a")
    assert (await world.store.get("/")).entries == []
    for op in ("put", "delete", "get"):
        assert world.value("requests_total", op=op, result="ok") == 1
        assert world.value("request_seconds_count", op=op) == 1
    assert world.value("connected") == 1
    away = World(Away())
    with pytest.raises(PeerGone):
        await away.store.get("/")
    assert away.value("requests_total", op="get", result="error") == 1
    assert away.value("connected") == 0


async def test_a_watch_that_has_to_list_anew_is_a_gap_and_one_that_breaks_an_error():
    world = World(Away())
    watched = world.store.watch("/", 0)
    await anext(watched)
    assert world.value("connected") == 1
    with pytest.raises(PeerGone):
        await anext(watched)
    assert world.value("connected") == 0
    assert world.value("watch_gaps_total") == 1
    assert world.value("requests_total", op="watch", result="ok") == 1
    assert world.value("requests_total", op="watch", result="error") == 1


async def test_the_age_of_a_lease_is_that_of_the_one_that_waited_longest_and_none_without():
    world = World()
    assert world.value("lease_age_seconds") is None
    world.meter.confirmed(1, 60.0, new=True)
    world.meter.confirmed(2, 90.0, new=True)
    assert (world.value("lease_age_seconds"), world.value("leases_total")) == (40.0, 2)
    world.meter.confirmed(1, 95.0, new=False)
    assert (world.value("lease_age_seconds"), world.value("leases_total")) == (10.0, 2)
    world.meter.ended(2)
    world.meter.ended(1)
    assert world.value("lease_age_seconds") is None


async def test_a_registration_keeps_its_lease_young_and_takes_it_along():
    world = World()
    registration = Registration(world.store, "/one", lambda: b"1", ttl_s=1.0)
    registration.start()
    async with asyncio.timeout(10):
        await registration.wait_registered()
    assert world.value("lease_age_seconds") is not None
    assert world.value("leases_total") == 1
    await registration.close()
    assert world.value("lease_age_seconds") is None
    await world.store.close()


async def test_a_lease_that_ended_before_its_key_was_put_does_not_age_for_ever():
    world, inner = World(), MemoryMetadata()
    world.store = MeteredMetadata(inner, world.meter)
    lease_id = await world.store.grant(2.0)
    await inner.revoke(lease_id)
    with pytest.raises(RequestError):
        await world.store.put("/a", b"1", lease_id)
    assert world.value("lease_age_seconds") is None


class Contested(MemoryMetadata):
    """A store in which `on_put` happens right before a key is put."""

    on_put = staticmethod(lambda: None)

    async def put(self, key, value, lease_id=0, if_revision=None):
        self.on_put()
        return await super().put(key, value, lease_id, if_revision)


async def steps(election: Election, count: int) -> None:
    for _ in range(count):
        await election._perform(election._candidate.next(election._clock_s()))


async def test_a_candidate_that_loses_gives_its_lease_back():
    inner = Contested()
    world = World(inner)
    election = Election(world.store, "/leader", "me", ttl_s=60.0)
    await steps(election, 2)
    assert world.value("lease_age_seconds") is not None
    inner.on_put = lambda: inner._machine.put("/leader", b"another's")
    await steps(election, 2)
    assert election.leader is not None
    assert world.value("lease_age_seconds") is None, "a standby in good health has none"
    assert world.value("requests_total", op="revoke", result="ok") == 1


async def test_a_candidate_whose_claim_was_not_heard_gives_its_first_lease_back_when_it_gets_another():
    now_s = 0.0
    inner = Contested()
    world = World(inner)
    election = Election(world.store, "/leader", "me", ttl_s=60.0, clock_s=lambda: now_s)
    await steps(election, 2)
    first = election._candidate.lease_id

    def away() -> None:
        raise PeerGone("away")

    inner.on_put = away
    with pytest.raises(PeerGone):
        await steps(election, 1)
    election._candidate.on_change()
    now_s = 100.0
    await steps(election, 2)
    assert election._candidate.lease_id not in (0, first)
    assert not await inner.keep_alive(first)
    assert await inner.keep_alive(election._candidate.lease_id)
    await world.store.revoke(election._candidate.lease_id)
    assert world.value("lease_age_seconds") is None
