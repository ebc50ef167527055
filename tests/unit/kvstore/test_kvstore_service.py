"""The store's shell: wire contract, waiting readers, re-hashing, metrics, a clean start and end."""

import asyncio
import os
import threading

import msgspec
import pytest
import zmq
from prometheus_client import CollectorRegistry, generate_latest

from kvstore.limits import BAD_KEYS_MAX, CHECKS_WAITING_MAX, NodeLimits
from kvstore.store import requests
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core import wire
from mooncake.core.errors import CapacityError, ConfigError, ProtocolError, RequestError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import (
    Abandon,
    Acquire,
    Commit,
    Failure,
    Ok,
    Release,
    ReportBad,
    Reserve,
    Snapshot,
    Stats,
    StoreReply,
)
from mooncake.core.rpc import RpcClient
from transfer.fdpass import fetch_segment

SIZE = 8192


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


class Harness:
    """A started store with one client; `fill` writes real bytes with real checksums."""

    def __init__(self, service, record, client):
        self.service, self.record, self.client = service, record, client

    async def ask(self, request, deadline_s=2.0):
        return await self.client.call(request, deadline_s)

    async def fill(self, *numbers: int) -> None:
        reserved = await self.ask(Reserve("w", [key(n) for n in numbers], SIZE))
        views = [self.service._segment.view(offset, SIZE) for offset in reserved.offsets]
        for n, view in zip(numbers, views, strict=True):
            view[:] = bytes([n % 256]) * SIZE
        sums = [block_checksum(key(n), view) for n, view in zip(numbers, views, strict=True)]
        assert all((await self.ask(Commit(reserved.tickets, sums))).done)

    def corrupt(self, n: int) -> None:
        offset = self.service.node.block_of(key(n)).offset
        self.service._segment.view(offset, 1)[0] ^= 1


@pytest.fixture
async def harness(tmp_path):
    open_ones = []

    async def make(blocks=16, limits=None, **config):
        settings = {"node": "n1", "capacity_bytes": blocks * SIZE, "run_dir": str(tmp_path / "run"), **config}
        service = StoreService(StoreConfig(**settings), limits)
        record = await service.start()
        client = RpcClient(record.endpoint, StoreReply)
        open_ones.append((service, client))
        return Harness(service, record, client)

    yield make
    for service, client in open_ones:
        await client.close()
        await service.close()


# ---------------------------------------------------------------- life


async def test_the_record_says_how_to_reach_it(harness):
    store = await harness()
    record = store.record
    assert (record.node, record.capacity_bytes, record.pid) == ("n1", 16 * SIZE, os.getpid())
    assert record.endpoint.startswith("tcp://127.0.0.1:")
    assert record.events.startswith("tcp://127.0.0.1:")
    segment = await asyncio.to_thread(fetch_segment, record.fd_path, 2.0)
    assert segment.name == record.epoch
    assert wire.decode(segment.note, type(record)) == record
    segment.close()


async def test_run_until_ends_with_the_stop_event_and_close_leaves_no_file(harness):
    store = await harness()
    stop = asyncio.Event()
    running = asyncio.create_task(store.service.run_until(stop))
    await asyncio.sleep(0.05)
    assert not running.done()
    stop.set()
    await asyncio.wait_for(running, 1)
    await store.service.close()
    await store.service.close()
    assert os.listdir(os.path.dirname(store.record.fd_path)) == []


async def test_run_until_raises_when_a_task_of_the_service_dies(harness, monkeypatch):
    store = await harness()

    def broken(now_s):
        raise RuntimeError("the clock broke")

    monkeypatch.setattr(store.service.node, "tick", broken)
    with pytest.raises(RuntimeError, match="the clock broke"):
        await asyncio.wait_for(store.service.run_until(asyncio.Event()), 2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"node": "../etc"}, "node="),
        ({"node": ""}, "node="),
        ({"capacity_bytes": 100}, "capacity_bytes=100"),
        ({"evict_ratio": 1.5}, "evict_ratio=1.5"),
    ],
)
def test_a_bad_setting_names_itself_before_anything_is_opened(settings, text):
    good = {"node": "n", "capacity_bytes": SIZE, "run_dir": "/nowhere"}
    with pytest.raises(ConfigError, match=text):
        StoreConfig(**{**good, **settings})


@pytest.mark.parametrize("setting", ["endpoint", "events"])
async def test_no_socket_is_bound_beyond_loopback_and_a_failed_start_leaves_nothing(tmp_path, setting):
    before = len(os.listdir("/proc/self/fd"))
    config = StoreConfig(
        node="n", capacity_bytes=SIZE, run_dir=str(tmp_path / "run"), **{setting: "tcp://0.0.0.0:0"}
    )
    with pytest.raises(ConfigError, match="MOONCAKE_SECRET_FILE"):
        await StoreService(config).start()
    assert list((tmp_path / "run").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # zmq's own


async def test_two_stores_of_one_name_do_not_share_a_run_dir(harness):
    await harness()
    with pytest.raises(ConfigError, match="living process"):
        await harness()


async def test_run_until_before_start_is_an_error_not_a_hang(tmp_path):
    service = StoreService(StoreConfig(node="n", capacity_bytes=SIZE, run_dir=str(tmp_path / "r")))
    with pytest.raises(ConfigError, match="start the store"):
        await service.run_until(asyncio.Event())


# ---------------------------------------------------------------- requests


async def test_a_block_goes_through_its_life_on_the_wire(harness):
    store = await harness()
    await store.fill(1, 2)
    got = await store.ask(Acquire([key(1), key(2), key(3)], 5.0))
    assert len(got.blocks) == 2
    assert await store.ask(Release(got.lease_id)) == Ok()
    assert await store.ask(Abandon("w", [])) == Ok()
    stats = await store.ask(Stats())
    assert (stats.blocks, stats.hits, stats.misses, stats.commits, stats.leases) == (2, 2, 1, 2, 0)
    assert stats.capacity_bytes == 16 * SIZE


@pytest.mark.parametrize(
    "request_",
    [
        Acquire([b"short"], 1.0),
        Acquire([b""], 1.0),
        Acquire([bytes(32)] * 20_000, 1.0),
        Acquire([bytes(32)], float("nan")),
        Acquire([bytes(32)], -1.0),
        Acquire([bytes(32)], 1.0, -1.0),
        Acquire([bytes(32)], 1.0, float("nan")),
        Reserve("w", [bytes(32)], 0),
        Reserve("w", [bytes(32)], -1),
        Reserve("w", [bytes(32)], 2**62),
        Reserve("", [bytes(32)], SIZE),
        Reserve("w" * 1000, [bytes(32)], SIZE),
        Commit([1, 2], [b"s" * 16]),
        Commit([1], [b"s"]),
        Abandon("", []),
        ReportBad([b"x"]),
        ReportBad([bytes(32)] * (BAD_KEYS_MAX + 1)),
        Snapshot(-1),
        Snapshot(12345),
        Snapshot(2**62),
    ],
)
async def test_malformed_requests_are_refused_and_change_nothing(harness, request_):
    store = await harness()
    await store.fill(1)
    before = await store.ask(Stats())
    with pytest.raises(RequestError):
        await store.ask(request_)
    assert await store.ask(Stats()) == before


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"garbage",
        wire.encode(["acq", "not a list", 1.0]),
        wire.encode(["rsv", "w", [b"k"], "size"]),
        wire.encode(["rsv", "w", [b"k"], 1.5]),
        wire.encode(["nope"]),
        wire.encode({"a": 1}),
    ],
)
async def test_bytes_that_are_not_our_protocol_get_an_answer_and_the_store_lives(harness, payload):
    store = await harness()
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(store.record.endpoint)
    await socket.send_multipart([b"12345678", payload])
    frames = await asyncio.wait_for(socket.recv_multipart(), 2)
    socket.close()
    assert wire.decode(frames[1], Failure).code == ProtocolError.code
    assert (await store.ask(Stats())).blocks == 0


async def test_a_reader_waits_for_a_block_in_writing_until_it_is_committed(harness):
    store = await harness()
    reserved = await store.ask(Reserve("w", [key(1), key(2)], SIZE))
    reader = asyncio.create_task(store.ask(Acquire([key(1), key(2)], 5.0, 1.0)))
    await store.ask(Commit(reserved.tickets[:1], [b"s" * 16]))
    await asyncio.sleep(0.05)
    assert not reader.done()  # the second is still being written
    await store.ask(Commit(reserved.tickets[1:], [b"s" * 16]))
    assert len((await asyncio.wait_for(reader, 0.5)).blocks) == 2
    stats = await store.ask(Stats())
    assert (stats.hits, stats.misses) == (2, 0)  # waiting counts once


async def test_a_reader_stops_waiting_when_the_writer_gives_up(harness):
    store = await harness()
    await store.ask(Reserve("w", [key(1)], SIZE))
    reader = asyncio.create_task(store.ask(Acquire([key(1)], 5.0, 1.0)))
    await asyncio.sleep(0.02)
    await store.ask(Abandon("w", []))
    assert (await asyncio.wait_for(reader, 0.3)).blocks == []


async def test_a_wait_is_bounded_by_the_node_and_skipped_for_unknown_keys(harness, monkeypatch):
    monkeypatch.setattr(requests, "WAIT_S_MAX", 0.1)
    store = await harness()
    await store.ask(Reserve("w", [key(1)], SIZE))
    async with asyncio.timeout(0.6):
        assert (await store.ask(Acquire([key(1)], 5.0, 1e9))).lease_id == 0
    async with asyncio.timeout(0.09):
        assert (await store.ask(Acquire([key(2)], 5.0, 1e9))).lease_id == 0


async def test_writes_without_commit_expire_without_anybody_asking(harness):
    store = await harness(blocks=1, limits=NodeLimits(write_s=0.05, quarantine_s=0.2))
    await store.ask(Reserve("w", [key(1)], SIZE))
    await asyncio.sleep(0.2)
    assert len(store.service.node.writing) == 0
    assert store.service.node.writing.quarantined_bytes == SIZE
    await asyncio.sleep(0.4)
    assert store.service.node.writing.quarantined_bytes == 0


# ---------------------------------------------------------------- bad blocks


async def test_a_bad_block_is_dropped_only_after_the_store_has_looked(harness):
    store = await harness()
    await store.fill(1, 2)
    await store.ask(ReportBad([key(1), key(2), key(3)]))
    assert (await store.ask(Stats())).checksum_failures == 0
    store.corrupt(2)
    await store.ask(ReportBad([key(1), key(2)]))
    stats = await store.ask(Stats())
    assert (stats.checksum_failures, stats.blocks, stats.leases) == (1, 1, 0)


async def test_hashing_never_stops_the_loop_and_is_bounded(harness, monkeypatch):
    store = await harness()
    await store.fill(1)
    release, entered = threading.Event(), threading.Event()

    def slow(key_, block):
        entered.set()
        release.wait(60)
        return True

    monkeypatch.setattr(store.service._recheck, "_is_sound", slow)
    reports = [asyncio.create_task(store.ask(ReportBad([key(1)]), 60.0))]
    assert await asyncio.to_thread(entered.wait, 20)
    await store.ask(ReportBad([key(1)]))  # in hand already
    assert (await store.ask(Stats())).leases == 1
    store.service._recheck._reports = CHECKS_WAITING_MAX
    with pytest.raises(CapacityError, match="being checked"):
        await store.ask(ReportBad([key(1)]))
    release.set()
    await asyncio.gather(*reports)


# ---------------------------------------------------------------- metrics


async def test_metrics_show_the_nodes_numbers(harness):
    store = await harness(metrics_url="http://127.0.0.1:9/metrics")
    await store.fill(1, 2)
    await store.ask(Acquire([key(1), key(2), key(3)], 5.0))
    await store.ask(Reserve("w", [key(4)], SIZE))
    await store.ask(Abandon("w", []))
    assert store.record.metrics_url == "http://127.0.0.1:9/metrics", "who runs it says where"
    registry = CollectorRegistry()
    store.service.register(registry)
    text = generate_latest(registry).decode()
    for line in (
        'mooncake_store_capacity_bytes{node="n1"} 131072.0',
        'mooncake_store_used_bytes{node="n1"} 24576.0',
        'mooncake_store_quarantined_bytes{node="n1"} 8192.0',
        'mooncake_store_blocks{node="n1"} 2.0',
        'mooncake_store_leases{node="n1"} 1.0',
        'mooncake_store_hits_total{node="n1"} 2.0',
        'mooncake_store_misses_total{node="n1"} 1.0',
        'mooncake_store_commits_total{node="n1"} 2.0',
        'mooncake_store_evictions_total{node="n1"} 0.0',
        'mooncake_store_checksum_failures_total{node="n1"} 0.0',
    ):
        assert line in text


def test_a_record_survives_json():
    config = StoreConfig(node="n", capacity_bytes=SIZE, run_dir="/r")
    assert msgspec.json.decode(msgspec.json.encode(config), type=StoreConfig) == config
