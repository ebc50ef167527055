"""A metadata store that is away costs a process two lines of its log: one at its going, one at its return."""

import asyncio
import gc
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from structlog.testing import capture_logs

from mooncake.core import metadata_etcd_names
from mooncake.core.errors import CapacityError, ConfigError, PeerError, PeerGone, PeerTimeout, RequestError
from mooncake.core.metadata_client import MetadataServer, RemoteMetadata
from mooncake.core.metadata_etcd import EtcdMetadata
from mooncake.core.metadata_etcd_http import HttpConnection
from mooncake.core.metadata_etcd_names import Names
from mooncake.core.metadata_etcd_options import Endpoint, EtcdOptions, parse_etcd
from mooncake.core.metadata_follow import follow
from mooncake.core.metadata_outage import START_S, Outage
from mooncake.core.metadata_registration import Registration

NOWHERE = Endpoint("no-such-host.invalid", 2379)
WAIT_S = 15.0
AWAY = PeerTimeout("etcd server etcd:2379 does not answer within 1 s")


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def outage(clock: list[float]) -> Outage:
    return Outage("etcd://etcd:2379/mooncake", lambda: clock[0])


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.01)


def told(lines: list[Any]) -> list[str]:
    return [line["event"] for line in lines if line["log_level"] != "debug"]


# ---------------------------------------------------------------- the two lines


def test_an_outage_is_told_once_and_its_end_once(outage, clock):
    with capture_logs() as lines:
        for _ in range(2):
            outage.answered()
            clock[0] += 60.0
            for _ in range(50):
                outage.failed(AWAY)
            clock[0] += 30.0
            outage.answered()
            outage.answered()
    assert told(lines) == ["metadata.away", "metadata.back"] * 2
    away, back = lines[:2]
    assert (away["store"], away["error"]) == ("etcd://etcd:2379/mooncake", str(AWAY))
    assert away["since"] == "1970-01-01T00:16:40+00:00"  # the last answer, not the first failure
    assert "requests" in away["works"]
    assert "join" in away["does_not_work"]
    assert back["away_s"] == 90.0


def test_a_store_that_was_never_there_is_given_time_to_start_and_then_told_of(outage, clock):
    with capture_logs() as lines:
        outage.failed(AWAY)
        clock[0] += START_S / 2
        outage.failed(AWAY)
        assert told(lines) == []
        clock[0] += START_S / 2
        outage.failed(AWAY)
        outage.failed(AWAY)
        outage.answered()
    assert told(lines) == ["metadata.away", "metadata.back"]


def test_who_finds_the_store_on_its_way_up_says_nothing(outage):
    with capture_logs() as lines:
        outage.failed(AWAY)
        outage.answered()
    assert told(lines) == []


@pytest.mark.parametrize("error", [RequestError("no such lease"), CapacityError("quota")])
def test_a_store_that_refuses_is_there(outage, error):
    with capture_logs() as lines:
        outage.answered()
        outage.failed(error)
        outage.failed(AWAY)
        outage.failed(error)
    assert told(lines) == ["metadata.away", "metadata.back"]


def test_a_store_that_lets_nobody_in_any_more_is_told(outage):
    with capture_logs() as lines:
        outage.answered()
        outage.failed(ConfigError("certificate has expired"))
    assert lines[0]["error"] == "certificate has expired"


async def test_all_who_use_one_client_cost_one_line(tmp_path):
    endpoint = f"ipc://{tmp_path}/meta"
    server = MetadataServer(endpoint)
    server.start()
    store = RemoteMetadata(endpoint, call_s=0.05, poll_s=0.05)
    registrations = [Registration(store, f"/{n}", lambda: b"", ttl_s=0.3) for n in range(3)]
    followers = [follow(store, f"/{n}") for n in range(3)]
    tasks = [asyncio.create_task(_drain(follower)) for follower in followers]

    with capture_logs() as lines:
        for registration in registrations:
            registration.start()
            await registration.wait_registered()
        await until(lambda: all(follower.connected for follower in followers))
        await server.close()
        await until(lambda: not any(follower.connected for follower in followers))
        await asyncio.sleep(0.5)  # several tries of each
        server = MetadataServer(endpoint)
        server.start()
        await until(lambda: all(follower.connected for follower in followers))
    assert [event for event in told(lines) if event.startswith("metadata")] == [
        "metadata.away",
        "metadata.back",
    ]
    assert "registration.away" not in told(lines)
    for registration in registrations:
        await registration.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()
    await server.close()


async def _drain(follower: Any) -> None:
    async for _ in follower:
        pass


def test_the_address_in_the_log_says_where_and_no_more():
    options = parse_etcd("etcds://someone@a:1,b:2/mine?password_file=/etc/secret")
    assert str(options) == "etcds://a:1,b:2/mine"


# ---------------------------------------------------------------- names


def test_a_name_that_nobody_knows_leaves_nothing_behind_for_the_event_loop_to_report():
    """uvloop's own connecting does, as often as somebody stops waiting for it."""

    async def ask() -> list[str]:
        reports: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: reports.append(told["message"]))
        store = EtcdMetadata(EtcdOptions(endpoints=(NOWHERE,)), answer_s=0.0002)
        for _ in range(5):
            with pytest.raises(PeerError):
                await store.get("/")
        await until(lambda: not store._names._asking)
        await store.close()
        gc.collect()
        await asyncio.sleep(0)
        return reports

    assert uvloop.run(ask()) == []


async def test_an_unknown_name_is_said_with_the_server_it_belongs_to():
    with pytest.raises(PeerGone, match=r"no-such-host.invalid:2379: no address for this name"):
        await Names().addresses(NOWHERE)


async def test_a_silent_name_server_is_asked_once_at_a_time_and_close_ends_it(monkeypatch):
    asked = []
    silence = asyncio.Event()

    async def lookup(host: str, port: int) -> list[Any]:
        asked.append(host)
        await silence.wait()
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        return [address, address]

    monkeypatch.setattr(metadata_etcd_names, "address_infos", lookup)
    names = Names()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await names.addresses(NOWHERE)
    waiting = [asyncio.create_task(names.addresses(NOWHERE)) for _ in range(3)]
    await asyncio.sleep(0)
    assert asked == [NOWHERE.host]
    silence.set()
    assert await asyncio.gather(*waiting) == [["127.0.0.1"]] * 3
    silence.clear()
    last = asyncio.create_task(names.addresses(NOWHERE))
    await until(lambda: len(asked) == 2)  # anew: a server may have moved
    await names.close()
    with pytest.raises(PeerGone):
        await last


async def test_every_address_of_a_name_is_tried(monkeypatch):
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = EtcdOptions(endpoints=(Endpoint("etcd", port),))
    connection = await HttpConnection.open(options, options.endpoints[0], ["127.0.0.2", "127.0.0.1"])
    connection.abort()
    server.close()
    with pytest.raises(PeerGone, match=f"etcd:{port} cannot be reached"):
        await HttpConnection.open(options, options.endpoints[0], ["127.0.0.2", "127.0.0.1"])
