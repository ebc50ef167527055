"""The REST service answers as upstream's does, measured; and only those that may ask."""

import contextlib
import http.client
import json
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

import mooncake.mooncake_store_service as service_module
from mooncake.core.errors import ConfigError
from mooncake.dropin.client.rest import Rest
from mooncake.dropin.client.web import WebServer
from mooncake.mooncake_config import MooncakeConfig
from mooncake.mooncake_store_service import MooncakeStoreService, main, override
from mooncake.store import MooncakeDistributedStore

from .conftest import PATIENCE_S, MasterThread, client

STEP = 16 << 20
TOKEN = "a token of over 16"


@pytest.fixture(scope="module")
def store(master: MasterThread) -> Iterator[MooncakeDistributedStore]:
    store = client(master, 32 << 20)
    yield store
    store.close()


@pytest.fixture(scope="module")
def rest(store: MooncakeDistributedStore) -> Rest:
    return Rest(store)


@pytest.fixture
def ask(rest: Rest, store: MooncakeDistributedStore):
    """Sends a request to the endpoints themselves."""
    store.remove_all(force=True)

    def ask(method: str, path: str, body=b"") -> tuple[int, object]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = rest.answer(method, path, data)
        is_json = reply.content_type.startswith("application/json")
        return reply.status, json.loads(reply.body) if is_json else reply.body

    return ask


OK = (200, {"status": "success"})


def test_an_object_is_put_read_looked_for_and_removed(ask, store: MooncakeDistributedStore) -> None:
    assert ask("PUT", "/api/put", {"key": "k", "value": "hello"}) == OK
    assert ask("PUT", "/api/put", {"key": "k", "value": "other"}) == OK
    assert store.get("k") == b"hello"
    assert ask("GET", "/api/get/k") == (200, b"hello")
    assert ask("GET", "/api/exist/k") == (200, {"exists": True})
    assert ask("DELETE", "/api/remove/k") == (500, {"error": "Remove operation failed"})  # just read
    assert ask("PUT", "/api/put", {"key": "unread", "value": "x"}) == OK
    assert ask("DELETE", "/api/remove/unread") == OK
    assert ask("GET", "/api/exist/unread") == (200, {"exists": False})


def test_what_is_missing_is_said_to_be(ask) -> None:
    assert ask("GET", "/api/get/none") == (404, {"error": "Key not found"})
    assert ask("GET", "/api/exist/none") == (200, {"exists": False})
    assert ask("DELETE", "/api/remove/none") == (500, {"error": "Remove operation failed"})


def test_all_objects_are_removed_and_counted(ask) -> None:
    for name in "ab":
        assert ask("PUT", "/api/put", {"key": name, "value": "x"}) == OK
    assert ask("DELETE", "/api/remove_all") == (200, {"status": "success removed 2 keys"})


@pytest.mark.parametrize("key", ["a b/é", "?&=#", "100%"])
def test_a_key_is_one_percent_encoded_piece_of_the_path(ask, key: str) -> None:
    assert ask("PUT", "/api/put", {"key": key, "value": "x"}) == OK
    assert ask("GET", f"/api/get/{urllib.parse.quote(key, safe='')}") == (200, b"x")


@pytest.mark.parametrize(
    "body", [{"key": "", "value": "x"}, {"key": "k"}, {"value": "x"}, {"key": "k", "value": None}]
)
def test_a_put_without_key_or_value_is_refused(ask, body: dict) -> None:
    assert ask("PUT", "/api/put", body) == (400, {"error": "Missing key or value"})


@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[1]", b"\xff", {"key": 5, "value": "x"}, {"key": "k", "value": 5}]
)
def test_a_body_of_another_kind_is_the_callers_fault(ask, body) -> None:
    assert ask("PUT", "/api/put", body)[0] == 400


def test_an_empty_value_is_not_stored(ask) -> None:
    assert ask("PUT", "/api/put", {"key": "k", "value": ""}) == (500, {"error": "PUT operation failed"})


@pytest.mark.parametrize("path", ["/", "/api/get/", "/api/get/a/b", "/api/get", "/api/none/k", "/api/put/"])
def test_other_paths_are_not_there(ask, path: str) -> None:
    assert ask("GET", path) == (404, b"404: Not Found")


def test_other_methods_are_not_allowed(rest: Rest) -> None:
    for method, path, allowed in (
        ("POST", "/api/put", "PUT"),
        ("GET", "/api/remove/k", "DELETE"),
        ("DELETE", "/api/get/k", "GET"),
        ("GET", "/api/mount", "POST"),
        ("POST", "/api/remove_all", "DELETE"),
    ):
        reply = rest.answer(method, path, b"{}")
        assert (reply.status, reply.body, reply.allow) == (405, b"405: Method Not Allowed", allowed)


def test_memory_is_given_in_whole_steps_and_taken_back(ask) -> None:
    status, mounted = ask("POST", "/api/mount", {"size": 10})
    assert (status, mounted["status"], mounted["allocated_size"]) == (200, "success", STEP)
    assert ask("POST", "/api/unmount", {"segment_ids": mounted["segment_ids"]}) == OK
    again = ask("POST", "/api/unmount", {"segment_ids": mounted["segment_ids"][0]})
    assert again == (500, {"error": "Unmount and free failed, ret=-1"})


@pytest.mark.parametrize("size", ["16MB", None, -1, 0, True, 1.5])
def test_a_size_that_is_none_is_refused(ask, size) -> None:
    refused = (400, {"error": "Invalid size, must be a positive integer"})
    assert ask("POST", "/api/mount", {"size": size}) == refused


@pytest.mark.parametrize("path", ["/api/unmount", "/api/unmount_shm"])
@pytest.mark.parametrize("body", [{}, {"segment_ids": []}, {"segment_ids": [5]}])
def test_unmounting_needs_segments(ask, path: str, body: dict) -> None:
    assert ask("POST", path, body) == (400, {"error": "Missing segment_ids"})


@contextlib.contextmanager
def shared_memory(name: str) -> Iterator[Path]:
    path = Path("/dev/shm") / f"mooncake-test-{os.getpid()}-{name}"
    with path.open("wb") as file:
        file.truncate(STEP)
    yield path
    path.unlink()


@pytest.fixture
def shared_file() -> Iterator[Path]:
    with shared_memory("one") as path:
        yield path


@pytest.fixture
def other_file() -> Iterator[Path]:
    with shared_memory("other") as path:
        yield path


def test_named_shared_memory_is_given_and_taken_back(ask, shared_file: Path) -> None:
    status, mounted = ask("POST", "/api/mount_shm", {"name": shared_file.name, "size": STEP})
    assert (status, len(mounted["segment_ids"])) == (200, 1)
    assert ask("POST", "/api/unmount_shm", {"segment_ids": mounted["segment_ids"]}) == OK
    gone = {"error": "Unmount failed for one or more segments", "failed_segment_ids": mounted["segment_ids"]}
    assert ask("POST", "/api/unmount_shm", {"segment_ids": mounted["segment_ids"]}) == (500, gone)
    failed = (500, {"error": "Mount failed, ret=-1"})
    assert ask("POST", "/api/mount_shm", {"name": shared_file.name, "size": 2 * STEP}) == failed
    assert ask("POST", "/api/mount_shm", {"name": "mooncake-none", "size": STEP}) == failed


@pytest.mark.parametrize(
    "body", [{}, {"name": "x"}, {"size": 1}, {"name": "../x", "size": 1}, {"name": "", "size": 1}]
)
def test_shared_memory_has_a_name_and_a_size(ask, body: dict) -> None:
    assert ask("POST", "/api/mount_shm", body) == (400, {"error": "Missing or invalid name or size"})


def test_the_mode_changes_what_is_given(ask, shared_file: Path, other_file: Path) -> None:
    decode = {"mode": "decode", "path": str(shared_file), "size": STEP}
    assert ask("POST", "/api/reconfigure", {"mode": "prefill"}) == (
        200,
        {"status": "success", "mode": "prefill"},
    )
    status, first = ask("POST", "/api/reconfigure", decode)
    assert (status, first["status"], first["mode"]) == (200, "success", "decode")
    assert ask("POST", "/api/reconfigure", decode) == (200, first)
    _, second = ask("POST", "/api/reconfigure", {**decode, "path": str(other_file)})
    assert ask("POST", "/api/unmount", {"segment_ids": first["segment_ids"]})[0] == 500  # taken back already
    kept = {"error": "Mount failed, ret=-1; keeping previous decode segments", "mode": "decode"}
    assert ask("POST", "/api/reconfigure", {**decode, "path": "/dev/shm/mooncake-none"}) == (500, kept)
    assert ask("POST", "/api/reconfigure", {"mode": "Prefill"})[0] == 200
    assert ask("POST", "/api/unmount", {"segment_ids": second["segment_ids"]})[0] == 500
    back = {"error": "Mount failed, ret=-1; rolled back to prefill", "mode": "prefill"}
    assert ask("POST", "/api/reconfigure", {**decode, "path": "/dev/shm/mooncake-none"}) == (500, back)


def test_a_mode_that_is_none_is_refused(ask) -> None:
    for body in ({}, {"mode": "x"}, {"mode": 5}):
        refused = (400, {"error": "Invalid mode. Use 'decode' or 'prefill'"})
        assert ask("POST", "/api/reconfigure", body) == refused
    missing = (400, {"error": "Missing path or size for decode mode"})
    assert ask("POST", "/api/reconfigure", {"mode": "decode"}) == missing


def test_the_disk_segment_is_left_within_a_grace(ask) -> None:
    assert ask("POST", "/api/unmount_local_disk", {}) == OK
    for grace in ("x", -1, 3601, True):
        status, said = ask("POST", "/api/unmount_local_disk", {"grace_period_seconds": grace})
        assert status == 400
        assert "no greater than 3600" in said["error"]
    assert ask("POST", "/api/unmount_local_disk") == (400, {"error": "Malformed JSON body"})
    assert ask("POST", "/api/unmount_local_disk", [1]) == (
        400,
        {"error": "Request body must be a JSON object"},
    )


# ---------------------------------------------------------------- the server


@pytest.fixture
def serve(rest: Rest) -> Iterator:
    servers = []

    def serve(token: str = "") -> tuple[str, int]:
        servers.append(WebServer(rest.answer, "127.0.0.1", 0, token, body_bytes_max=1000))
        servers[-1].start()
        return "127.0.0.1", servers[-1].port

    yield serve
    for server in servers:
        server.close()


def fetch(address: tuple[str, int], method: str, path: str, body: bytes = b"", **headers: str):
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Type"), answer.read()


def test_requests_and_answers_travel_as_http(serve) -> None:
    address = serve()
    body = json.dumps({"key": "h", "value": "x"}).encode()
    assert fetch(address, "PUT", "/api/put", body)[0] == 200
    assert fetch(address, "GET", "/api/get/h?ignored=1") == (200, "application/octet-stream", b"x")
    assert fetch(address, "HEAD", "/api/get/h") == (200, "application/octet-stream", b"")
    status, kind, said = fetch(address, "GET", "/api/get/none")
    assert (status, kind) == (404, "application/json; charset=utf-8")
    assert json.loads(said) == {"error": "Key not found"}
    assert fetch(address, "PUT", "/api/put", b"x" * 1001)[0] == 413


def test_no_web_page_and_no_other_name_is_answered_without_a_token(serve) -> None:
    address = serve()
    assert fetch(address, "POST", "/api/mount", b"{}", Origin="http://evil.example")[0] == 403
    assert fetch(address, "GET", "/api/exist/h", Host="evil.example")[0] == 403
    assert fetch(address, "GET", "/api/exist/h", Host="localhost:8080")[0] == 200


def test_with_a_token_it_has_to_be_shown(serve) -> None:
    address = serve(TOKEN)
    assert fetch(address, "GET", "/api/exist/h")[0] == 401
    assert fetch(address, "GET", "/api/exist/h", Authorization="Bearer wrong")[0] == 401
    assert fetch(address, "GET", "/api/exist/h", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_the_network_is_not_served_without_a_token(rest: Rest) -> None:
    with pytest.raises(ConfigError, match="MOONCAKE_ADMIN_TOKEN"):
        WebServer(rest.answer, "0.0.0.0", 0)


# ---------------------------------------------------------------- the service


@pytest.fixture
def config_file(master: MasterThread, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    fields = {"local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "global_segment_size": "8MB"}
    path.write_text(json.dumps({**fields, "master_server_address": master.address}))
    return path


async def test_the_service_joins_serves_and_leaves(config_file: Path) -> None:
    service = MooncakeStoreService(str(config_file), {"tenant_id": "t"})
    assert await service.start_store_service(PATIENCE_S)
    assert await service.start_http_service(0)
    port = urllib.parse.urlsplit(service.url).port
    body = json.dumps({"key": "k", "value": "x"}).encode()
    assert fetch(("127.0.0.1", port), "PUT", "/api/put", body)[0] == 200
    assert service.store.get("k") == b"x"
    await service.stop()
    with pytest.raises(ConnectionRefusedError):
        fetch(("127.0.0.1", port), "GET", "/api/exist/k")


async def test_the_token_of_the_service_may_be_in_a_file(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN_FILE", str(tmp_path / "token"))
    service = MooncakeStoreService(str(config_file))
    assert await service.start_store_service(PATIENCE_S)
    assert await service.start_http_service(0)
    address = ("127.0.0.1", urllib.parse.urlsplit(service.url).port)
    assert fetch(address, "GET", "/api/exist/k")[0] == 401
    assert fetch(address, "GET", "/api/exist/k", Authorization=f"Bearer {TOKEN}")[0] == 200
    await service.stop()


async def test_without_a_master_it_gives_up(config_file: Path) -> None:
    service = MooncakeStoreService(str(config_file), {"master_server_address": "127.0.0.1:1"})
    assert not await service.start_store_service(0.0)


def test_definitions_go_before_the_file(config_file: Path) -> None:
    config = MooncakeConfig.from_file(str(config_file))
    given = {
        "global_segment_size": "1gb",
        "client_http_port": "9301",
        "enable_client_http_server": "true",
        "x": "1",
    }
    changed = override(config, given)
    assert (changed.global_segment_size, changed.client_http_port) == (1 << 30, 9301)
    assert changed.enable_client_http_server
    with pytest.raises(ConfigError, match="client_http_port"):
        override(config, {"client_http_port": "x"})


def test_a_configuration_that_is_none_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module.logs, "setup", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(service_module.signal, "signal", lambda *_: None)
    assert main(["--config", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
