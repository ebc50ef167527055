"""What a process asks of its metadata store is counted, whatever the store is and however it answers."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from mooncake.core.errors import PeerGone
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
