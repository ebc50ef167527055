"""HTTP of a client process: health, and what it has moved, as upstream's answers."""

import http.client
import json
import re
import urllib.parse
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import ConfigError
from mooncake.dropin.client.command import ClientOptions, RealClient
from mooncake.dropin.client.counted import CountedCalls
from mooncake.dropin.client.counters import BOUNDS_US, GET, Counters, Histogram
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.settings import Settings
from mooncake.store import MooncakeDistributedStore

from .conftest import PATIENCE_S, MasterThread, client
from .test_store_dummy import until

NAMES = (
    "read_bytes", "write_bytes", "get_latency", "put_latency", "batch_get_latency", "batch_put_latency",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(master: MasterThread) -> Iterator[MooncakeDistributedStore]:
    store = client(master, enable_client_http_server="true", client_http_port="0")
    yield store
    store.close()


def port_of(store: MooncakeDistributedStore) -> int:
    """Return the port that the system has chosen."""
    return urllib.parse.urlsplit(store._calls.http.url).port


def fetch(port: int, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Type"), answer.read().decode()


def sample(text: str, name: str, **labels: str) -> float:
    """Return the value of one sample."""
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if (
            match
            and match[1] == name
            and all(f'{key}="{value}"' in match[2] for key, value in labels.items())
        ):
            return float(match[3])
    return 0.0


def test_the_bytes_and_calls_of_a_client_are_counted(store: MooncakeDistributedStore) -> None:
    port = port_of(store)
    before = fetch(port, "/metrics")[2]
    assert store.put("one", b"x" * 1000) == 0
    assert store.put_batch(["two", "three"], [b"x" * 10, b"x" * 20]) == 0
    assert store.get("one") == b"x" * 1000
    assert store.get_batch(["two", "none"]) == [b"x" * 10, b""]
    assert store.batch_is_exist(["one", "none"]) == [1, 0]
    assert store.is_exist("one") == 1
    status, kind, after = fetch(port, "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4")

    def grown(name: str, **labels: str) -> float:
        return sample(after, name, **labels) - sample(before, name, **labels)

    assert grown("mooncake_transfer_write_bytes") == 1030
    assert grown("mooncake_transfer_read_bytes") == 1010
    for name in ("get", "put", "batch_get", "batch_put"):
        assert grown(f"mooncake_transfer_{name}_latency_count") == 1
    calls = {"PutStart": 1, "BatchPutStart": 1, "BatchExistKey": 1, "ExistKey": 1}
    for rpc, count in calls.items():
        assert grown("mooncake_client_rpc_count", rpc_name=rpc) == count
        assert grown("mooncake_client_rpc_latency_count", rpc_name=rpc) == count


def test_every_name_of_upstreams_is_there_before_anything_happens() -> None:
    text = Counters().metrics()
    for name in (*(f"mooncake_transfer_{one}" for one in NAMES), "mooncake_client_rpc_count"):
        assert f"# TYPE {name} " in text
    assert 'mooncake_transfer_read_bytes{client_mode="real"} 0' in text


def test_the_summary_says_it_to_a_reader(store: MooncakeDistributedStore) -> None:
    assert store.put("summary", b"x") == 0
    status, kind, text = fetch(port_of(store), "/metrics/summary")
    assert (status, kind) == (200, "text/plain")
    assert text.startswith("Client Metrics Summary\n=== Transfer Metrics Summary ===\nTotal Read: ")
    assert re.search(r"^Put: count=\d+, p95[<>]\d+μs, max[<>]\d+μs$", text, re.MULTILINE)


def test_health_is_that_of_the_master() -> None:
    master = MasterThread()
    store = client(master, enable_client_http_server=True, client_http_port=0)
    try:
        port = port_of(store)
        status, kind, text = fetch(port, "/health")
        assert (status, kind, json.loads(text)) == (200, "application/json", {"status": "healthy", "code": 0})
        master.stop()
        until(lambda: fetch(port, "/health")[0] == 503)
        assert json.loads(fetch(port, "/health")[2]) == {"status": "master_unreachable", "code": 2}
    finally:
        store.close()
        master.stop()
    with pytest.raises(ConnectionRefusedError):
        fetch(port, "/health")


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/none"), ("POST", "/health")])
def test_nothing_else_is_there(store: MooncakeDistributedStore, method: str, path: str) -> None:
    assert fetch(port_of(store), path, method) == (404, "text/plain", "404 Not Found")


def test_a_port_that_is_taken_is_no_reason_not_to_join(
    master: MasterThread, store: MooncakeDistributedStore
) -> None:
    second = client(master, enable_client_http_server=True, client_http_port=port_of(store))
    try:
        assert second.put("second", b"x") == 0
    finally:
        second.close()


def test_a_client_without_http_counts_nothing(master: MasterThread, store: MooncakeDistributedStore) -> None:
    plain = client(master, 0)
    try:
        assert type(plain._calls) is Calls
        assert type(store._calls) is CountedCalls
    finally:
        plain.close()


@pytest.mark.parametrize("settings", [{"client_http_port": 70_000}, {"enable_client_http_server": "perhaps"}])
def test_settings_that_are_none_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Settings.of({"local_hostname": "h", "metadata_server": "m", **settings})


def test_a_real_client_shows_what_its_dummies_move(master: MasterThread) -> None:
    flags = {"enable_http_server": True, "http_port": 0, "port": 0, "global_segment_size": "8MB"}
    real = RealClient(ClientOptions(master_server_address=master.address, **flags))
    real.start()
    try:
        real.relay.counters.note("RelayMove", 0.001, transfer=GET, size_bytes=100)
        text = fetch(urllib.parse.urlsplit(real.http.url).port, "/metrics")[2]
        assert sample(text, "mooncake_transfer_read_bytes") == 100
    finally:
        real.close()


@given(st.lists(st.floats(0, 3e7), max_size=50))
def test_a_histogram_loses_nothing_and_its_buckets_only_grow(durations: list[float]) -> None:
    histogram = Histogram()
    for us in durations:
        histogram.add(us)
    lines = list(histogram.lines("h", "a=b"))
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines if "_bucket" in line]
    assert counts == sorted(counts)
    assert counts[-1] == histogram.count == len(durations)
    for bound, count in zip(BOUNDS_US, counts, strict=False):
        assert count == sum(us <= bound for us in durations)
