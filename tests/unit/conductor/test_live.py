"""The live page of a gateway or core: whom its ring asks, and from when on."""

import asyncio
import http.client
import json
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter

from conductor.live import cluster_parts, live_page
from mooncake.core.admin import AdminServer
from mooncake.core.errors import ConfigError, PeerGone
from mooncake.core.messages import CORES_PREFIX, GATEWAYS_PREFIX, FrontRecord
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.live.ring import Part, part_of

OWN = part_of("conductor", "http://127.0.0.1:1/metrics")
UNTIL_S = 60


@pytest.fixture
def admin():
    admin = AdminServer(CollectorRegistry(), 0)
    admin.start()
    yield admin
    admin.close()


def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("mooncake_tokens", "Tokens.", registry=registry).inc(5)
    Counter("not_on_a_board", "Nothing.", registry=registry).inc(5)
    return registry


def get(admin: AdminServer, path: str) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=10)
    try:
        connection.request("GET", f"/dashboard/api/{path}")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


async def processes(admin: AdminServer, *wanted: str) -> None:
    def until_told() -> None:
        deadline_s = time.monotonic() + UNTIL_S
        while (found := get(admin, "label/process/values")["data"]) != sorted(wanted):
            assert time.monotonic() < deadline_s, found
            time.sleep(0.02)

    await asyncio.to_thread(until_told)


async def nobody() -> list[Part]:
    return []


async def test_the_parts_are_all_processes_of_the_cluster():
    metadata = MemoryMetadata()
    for prefix, name in ((GATEWAYS_PREFIX, "gateway-0"), (CORES_PREFIX, "core")):
        record = FrontRecord(name, 1, "", f"http://10.0.0.1:1/{name}")
        await metadata.put(prefix + name, msgspec.json.encode(record))
    await metadata.put(GATEWAYS_PREFIX + "other", b"not of this version")
    engine = SimpleNamespace(instance_id="prefill-0", metrics_url="http://10.0.0.2:2/metrics")
    store = SimpleNamespace(node="n1", metrics_url="http://10.0.0.3:3/metrics")
    view = SimpleNamespace(instances=lambda: [(engine, None, None)], stores=lambda: [store])
    found = await cluster_parts(view, metadata)()
    assert [(part.process, part.instance) for part in found] == [
        ("prefill-0", "10.0.0.2:2"), ("store-n1", "10.0.0.3:3"),
        ("gateway-0", "10.0.0.1:1"), ("core", "10.0.0.1:1"),
    ]  # fmt: skip


async def test_who_decides_remembers_from_its_start_and_only_what_boards_read(admin):
    async with live_page(admin, OWN, registry(), nobody):
        await processes(admin, "conductor")
        assert (await asyncio.to_thread(get, admin, "label/process/values?match[]=mooncake_tokens_total"))[
            "data"
        ]
        none = await asyncio.to_thread(get, admin, "label/process/values?match[]=not_on_a_board_total")
        assert none["data"] == []
    assert [thread for thread in threading.enumerate() if thread.name == "live scraper"] == []


async def test_a_gateway_beside_a_core_begins_with_the_first_visit(admin):
    async with live_page(admin, OWN, registry(), nobody, always=False):
        assert [thread for thread in threading.enumerate() if thread.name == "live scraper"] == []
        await processes(admin, "conductor")  # asks, and so begins


async def test_it_goes_on_alone_while_nobody_knows_who_there_is(admin):
    asked = asyncio.Event()

    async def away() -> list[Part]:
        asked.set()
        raise PeerGone("the metadata store is away")

    async with live_page(admin, OWN, registry(), away):
        await asyncio.wait_for(asked.wait(), UNTIL_S)
        await processes(admin, "conductor")


async def test_without_an_admin_port_there_is_no_page():
    async with live_page(None, OWN, registry(), nobody):
        assert [thread for thread in threading.enumerate() if thread.name == "live scraper"] == []


async def test_a_prometheus_is_asked_instead_of_a_ring(admin):
    async with live_page(admin, OWN, registry(), nobody, prometheus_url="http://127.0.0.1:9"):
        assert (await asyncio.to_thread(get, admin, "status"))["source"] == "prometheus"
        assert [thread for thread in threading.enumerate() if thread.name == "live scraper"] == []


async def test_a_bad_address_of_a_prometheus_is_refused_with_what_to_write(admin):
    with pytest.raises(ConfigError, match="prometheus_url = 'prometheus:9090'"):
        async with live_page(admin, OWN, registry(), nobody, prometheus_url="prometheus:9090"):
            pass
