import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import (
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)
from mooncake.http_metadata_server import KVBootstrapServer
from transfer.naming import (
    KEY_PREFIX,
    PROOF_AGE_S_MAX,
    Directory,
    EtcdStore,
    HttpStore,
    PeerToPeer,
    Record,
    Store,
    naming_of,
    parse_address,
    prove,
    proves,
)

CALL_S = 5.0
SECRET = b"sixteen bytes or more"
FIRST = Record("127.0.0.1:15001", "a" * 32)
SECOND = Record("127.0.0.1:15002", "b" * 32)


class DictStore:
    """The fake that unit tests share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, key: str, deadline_s: float) -> bytes | None:
        return self.values.get(key)

    def put(self, key: str, value: bytes, deadline_s: float) -> None:
        self.values[key] = value

    def delete(self, key: str, value: bytes, deadline_s: float) -> None:
        if self.values.get(key) == value:
            del self.values[key]


class FakeEtcd(ThreadingHTTPServer):
    """What etcd's JSON gateway does with our three calls (the real one: tests/integration)."""

    daemon_threads = True

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.calls: list[str] = []
        super().__init__(("127.0.0.1", 0), _EtcdHandler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(path)
        if path == "/v3/kv/put":
            self.values[question["key"]] = question["value"]
            return {}
        if path == "/v3/kv/range":
            value = self.values.get(question["key"])
            return {} if value is None else {"kvs": [{"key": question["key"], "value": value}], "count": "1"}
        (compare,), (then,) = question["compare"], question["success"]
        matches = self.values.get(compare["key"]) == compare["value"]
        if matches:
            del self.values[then["request_delete_range"]["key"]]
        return {"succeeded": matches}


class _EtcdHandler(BaseHTTPRequestHandler):
    server: FakeEtcd

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(self.server.answer(self.path, question)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def etcd() -> Iterator[FakeEtcd]:
    server = FakeEtcd()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["dict", "http", "http with a secret", "etcd"])
def store(request: pytest.FixtureRequest, etcd: FakeEtcd) -> Iterator[Store]:
    if request.param == "dict":
        yield DictStore()
    elif request.param == "etcd":
        yield EtcdStore([("127.0.0.1", etcd.server_port)])
    else:
        secret = SECRET if "secret" in request.param else b""
        server = KVBootstrapServer(0, secret=secret)
        server.run()
        yield HttpStore(f"http://127.0.0.1:{server.port}/metadata", secret)
        server.close()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


# ---------------------------------------------------------------- every backend


def test_a_published_name_leads_to_its_address(store: Store) -> None:
    names = Directory(store)
    names.publish("10.0.0.5:17777", FIRST, CALL_S)
    assert names.resolve("10.0.0.5:17777", CALL_S) == FIRST.address


def test_a_name_that_nobody_published_is_an_error_that_says_so(store: Store) -> None:
    with pytest.raises(RequestError, match="no engine has published the name 'ghost'"):
        Directory(store).resolve("ghost", CALL_S)


def test_a_restarted_engine_replaces_its_record(store: Store) -> None:
    names = Directory(store)
    names.publish("node", FIRST, CALL_S)
    names.publish("node", SECOND, CALL_S)
    assert names.resolve("node", CALL_S) == SECOND.address


def test_the_previous_start_cannot_withdraw_the_record_of_the_new_one(store: Store) -> None:
    names = Directory(store)
    names.publish("node", SECOND, CALL_S)
    names.withdraw("node", FIRST, CALL_S)
    assert names.resolve("node", CALL_S) == SECOND.address


def test_a_withdrawn_name_is_gone_and_may_be_withdrawn_again(store: Store) -> None:
    names = Directory(store)
    names.publish("node", FIRST, CALL_S)
    names.withdraw("node", FIRST, CALL_S)
    names.withdraw("node", FIRST, CALL_S)
    with pytest.raises(RequestError):
        names.resolve("node", CALL_S)


@pytest.mark.parametrize("name", ["a b&c=d/ä?key=x#y", "%00", "x" * 256])
def test_any_printable_name_comes_back(store: Store, name: str) -> None:
    names = Directory(store)
    names.publish(name, FIRST, CALL_S)
    assert names.resolve(name, CALL_S) == FIRST.address


@pytest.mark.parametrize("name", ["", "x" * 257, "a\nb"])
def test_a_name_that_no_log_could_show_is_refused(store: Store, name: str) -> None:
    with pytest.raises(RequestError, match="no name"):
        Directory(store).publish(name, FIRST, CALL_S)


@pytest.mark.parametrize(
    "value", [b"", b"{", b'{"address": "x:1"}', b'{"address": "nowhere", "epoch": "e"}', b"[]"]
)
def test_a_damaged_record_is_an_error_that_names_it(store: Store, value: bytes) -> None:
    store.put(KEY_PREFIX + "node", value, CALL_S)
    with pytest.raises(ProtocolError, match="the record of 'node' is damaged"):
        Directory(store).resolve("node", CALL_S)


def test_nothing_but_the_address_and_the_start_is_published() -> None:
    store = DictStore()
    Directory(store).publish("node", FIRST, CALL_S)
    assert store.values == {
        KEY_PREFIX + "node": msgspec.json.encode({"address": FIRST.address, "epoch": "a" * 32})
    }


# ---------------------------------------------------------------- servers that fail


@pytest.mark.parametrize("scheme", ["http", "etcd"])
def test_a_server_that_is_not_there_is_named(scheme: str, closed_port: int) -> None:
    names = naming_of(f"{scheme}://127.0.0.1:{closed_port}")
    with pytest.raises(PeerGone, match=f"127.0.0.1:{closed_port} cannot be reached.*is it running"):
        names.resolve("node", CALL_S)


@pytest.mark.parametrize("scheme", ["http", "etcd"])
def test_a_server_that_does_not_answer_costs_the_deadline_only(scheme: str, silent_port: int) -> None:
    with pytest.raises(PeerTimeout, match="does not answer within"):
        naming_of(f"{scheme}://127.0.0.1:{silent_port}").resolve("node", 0.05)


def test_a_server_with_another_secret_says_what_to_do() -> None:
    server = KVBootstrapServer(0, secret=SECRET)
    server.run()
    try:
        names = naming_of(f"http://127.0.0.1:{server.port}/metadata", b"another secret, as long")
        with pytest.raises(ConfigError, match="the same secret"):
            names.publish("node", FIRST, CALL_S)
    finally:
        server.close()


def test_etcd_is_asked_at_the_next_endpoint_when_one_is_down(etcd: FakeEtcd, closed_port: int) -> None:
    names = naming_of(f"etcd://127.0.0.1:{closed_port},127.0.0.1:{etcd.server_port}")
    names.publish("node", FIRST, CALL_S)
    assert names.resolve("node", CALL_S) == FIRST.address


def test_an_http_server_that_is_no_etcd_is_told_apart() -> None:
    server = KVBootstrapServer(0)
    server.run()
    try:
        with pytest.raises(ProtocolError, match="answers 404"):
            naming_of(f"etcd://127.0.0.1:{server.port}").resolve("node", CALL_S)
    finally:
        server.close()


def test_an_etcd_value_that_is_no_base64_is_a_damaged_answer(etcd: FakeEtcd) -> None:
    etcd.values[base64.b64encode(b"key").decode()] = "!!"
    with pytest.raises(ProtocolError, match="damaged"):
        EtcdStore([("127.0.0.1", etcd.server_port)]).get("key", CALL_S)


# ---------------------------------------------------------------- which backend


def test_with_p2phandshake_the_name_is_the_address() -> None:
    names = naming_of("P2PHANDSHAKE")
    assert isinstance(names, PeerToPeer)
    assert names.resolve("10.0.0.5:15001", CALL_S) == "10.0.0.5:15001"


@pytest.mark.parametrize("name", ["nonsense", "", "host:", ":1", "host:99999", "host:\u00b2", "h\u00f6st:1"])
def test_with_p2phandshake_a_name_that_is_no_address_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="host:port"):
        naming_of("P2PHANDSHAKE").resolve(name, CALL_S)


def test_a_bare_host_and_port_is_etcd_as_upstream_has_it(etcd: FakeEtcd) -> None:
    names = naming_of(f"127.0.0.1:{etcd.server_port}")
    names.publish("node", FIRST, CALL_S)
    assert etcd.calls == ["/v3/kv/put"]


@pytest.mark.parametrize(
    "metadata", ["redis://127.0.0.1:6379", "ftp://x", "http://", "http://h:port", "", "etcd://"]
)
def test_a_metadata_server_we_cannot_use_is_refused_with_its_name(metadata: str) -> None:
    with pytest.raises(ConfigError, match="metadata server"):
        naming_of(metadata)


@given(st.text(max_size=300))
def test_no_text_breaks_the_parser_of_addresses(text: str) -> None:
    try:
        host, port = parse_address(text)
    except MooncakeError:
        return
    assert host
    assert 0 <= port < 65536


# ---------------------------------------------------------------- proofs


def test_a_proof_holds_for_its_own_request_only() -> None:
    proof = prove(SECRET, "PUT", "key", b"value", 1000.0)
    assert proves(proof, SECRET, "PUT", "key", b"value", 1000.0)
    assert not proves(proof, b"another secret, as long", "PUT", "key", b"value", 1000.0)
    assert not proves(proof, SECRET, "DELETE", "key", b"value", 1000.0)
    assert not proves(proof, SECRET, "PUT", "other", b"value", 1000.0)
    assert not proves(proof, SECRET, "PUT", "key", b"other", 1000.0)


def test_an_old_proof_no_longer_holds() -> None:
    proof = prove(SECRET, "GET", "key", b"", 1000.0)
    assert proves(proof, SECRET, "GET", "key", b"", 1000.0 + PROOF_AGE_S_MAX)
    assert not proves(proof, SECRET, "GET", "key", b"", 1001.0 + PROOF_AGE_S_MAX)


@given(st.text(max_size=100))
def test_no_header_breaks_the_check(header: str) -> None:
    assert not proves(header, SECRET, "GET", "key", b"", 1000.0)
