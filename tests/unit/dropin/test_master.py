"""`mooncake_master` takes upstream's flags and answers over HTTP as upstream's was measured to."""

import http.client
import json
import urllib.parse

import pytest

from mooncake.core.errors import ConfigError
from mooncake.dropin.master.command import MasterOptions, main, parse_flags


@pytest.fixture
def quiet(monkeypatch) -> None:
    """Logs stay as the test run has them."""
    monkeypatch.setattr("mooncake.core.log.setup", lambda *_: None)


def ask(master, path: str, method: str = "GET") -> tuple[int, str]:
    url = urllib.parse.urlsplit(master.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
    try:
        connection.request(
            method, path, b"{}" if method == "POST" else None, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask_json(master, path: str, method: str = "GET") -> tuple[int, dict]:
    status, text = ask(master, path, method)
    return status, json.loads(text)


def test_flags_are_written_in_any_of_gflags_ways() -> None:
    words = [
        "--rpc_port=1", "-metrics_port", "2", "--http_metadata_server_port", "3", "--default-kv-lease-ttl=5",
        "--enable_http_metadata_server",
    ]  # fmt: skip
    expected = MasterOptions(
        rpc_port=1, metrics_port=2, http_metadata_server_port=3, default_kv_lease_ttl=5,
        enable_http_metadata_server=True,
    )  # fmt: skip
    assert parse_flags(words) == (expected, [])
    assert parse_flags(["--port=1"]) == (MasterOptions(rpc_port=1), [])
    assert not parse_flags(["--noenable_http_metadata_server"])[0].enable_http_metadata_server
    assert parse_flags(["--enable_http_metadata_server=true"])[0].enable_http_metadata_server
    assert parse_flags([]) == (MasterOptions(), [])


def test_the_defaults_are_upstream_s_but_for_the_address() -> None:
    options = MasterOptions()
    assert (options.rpc_port, options.metrics_port, options.http_metadata_server_port) == (50051, 9003, 8080)
    assert options.rpc_address == options.http_metadata_server_host == "127.0.0.1"
    assert (options.settings.kv_lease_ttl_s, options.settings.soft_pin_ttl_s) == (10.0, 1800.0)


def test_flags_that_mean_nothing_here_are_named() -> None:
    words = ["--eviction_ratio=0.1", "--root_fs_dir", "/tmp/x", "--enable_ha", "--norpc_port", "--rpc_port=7"]
    options, unknown = parse_flags(words)
    assert unknown == ["--eviction_ratio=0.1", "--root_fs_dir", "--enable_ha", "--norpc_port"]
    assert options == MasterOptions(rpc_port=7)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rpc_port=x"], "rpc_port"),
        (["--rpc_port"], "rpc_port"),
        (["--metrics_port=65536"], "metrics_port"),
        (["--enable_http_metadata_server=maybe"], "enable_http"),
        (["--default_kv_lease_ttl=-1"], "lease_ttl"),
    ],
)
def test_bad_values_are_named(words, named, capsys, quiet) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_flags(words)
    assert main(words) == 2
    assert named in capsys.readouterr().err


def test_an_address_beyond_loopback_needs_a_secret(capsys, monkeypatch, quiet) -> None:
    monkeypatch.delenv("MOONCAKE_SECRET", raising=False)
    monkeypatch.delenv("MOONCAKE_SECRET_FILE", raising=False)
    assert main(["--rpc_address=0.0.0.0", "--rpc_port=0", "--metrics_port=0"]) == 2
    assert "secret" in capsys.readouterr().err.lower()


def test_it_is_healthy_and_leads(master) -> None:
    assert ask_json(master, "/health") == (
        200,
        {
            "status": "ok", "role": "leader", "ha_state": "serving", "service_ready": True,
            "leader_address": None, "view_version": None,
        },
    )  # fmt: skip
    assert ask(master, "/role") == (200, "leader")
    assert ask(master, "/ha_status") == (200, "serving")
    assert ask_json(master, "/leader")[1] == {"present": False, "leader_address": None, "view_version": None}
    assert ask(master, "/nope")[0] == 404
    assert ask_json(master, "/api/v1/tenant_quotas") == (
        409,
        {"success": False, "error_code": -1011, "error_message": "UNAVAILABLE_IN_CURRENT_MODE"},
    )


def test_keys_are_listed_and_found(master, store) -> None:
    store.put_batch(["b", "a", "a/b c"], [b"x" * 5000, b"hello", b"1"])
    assert ask(master, "/get_all_keys") == (200, "a\na/b c\nb\n")
    status, answer = ask_json(master, "/query_key?key=a")
    assert (status, answer["success"]) == (200, True)
    (copy,) = answer["data"]
    (known,) = store.get_replica_desc("a")
    where = known.get_memory_descriptor().buffer_descriptor
    assert copy == {
        "size_": 5, "buffer_address_": where.buffer_address, "protocol_": "tcp",
        "transport_endpoint_": where.transport_endpoint,
    }  # fmt: skip
    missing = {"success": False, "error_code": -704, "error_message": "OBJECT_NOT_FOUND"}
    assert ask_json(master, "/query_key?key=zz") == (404, missing)
    assert ask_json(master, "/query_key") == (404, missing)
    none = {"disk_values": None, "local_disk_values": None, "nof_values": None}
    assert ask_json(master, "/batch_query_keys?keys=a,zz")[1] == {
        "success": True,
        "data": {
            "a": {"ok": True, "error": None, "values": [copy], **none},
            "zz": {"ok": False, "error": "OBJECT_NOT_FOUND", "values": None, **none},
        },
    }
    assert ask_json(master, "/batch_query_keys")[0] == 400


def test_segments_are_called_as_their_clients(master, store) -> None:
    name = store.get_hostname()
    assert name in ask(master, "/get_all_segments")[1].splitlines()
    store.put("a", b"x" * 5000)
    status, text = ask(master, f"/query_segment?segment={name}")
    assert status == 200
    assert text.splitlines() == [name, "Used(bytes): 8192", "Capacity(bytes) : 8388608"]
    assert ask(master, "/query_segment?segment=nobody") == (500, "Failed to query segment")
    detail = ask_json(master, "/get_segments_detail")[1]
    assert detail["total_segments"] == len(detail["segments"])
    (own,) = [one for one in detail["segments"] if one["segment_name"] == name]
    assert (own["size_bytes"], own["status"], own["allocator_used_bytes"]) == (8 << 20, "OK", 8192)
    assert ask_json(master, f"/api/v1/segments/status?segment={name}") == (
        200,
        {
            "success": True, "segment": name, "status": 1, "status_name": "OK", "error_code": 0,
            "error_message": "",
        },
    )  # fmt: skip
    assert ask_json(master, "/api/v1/segments/status")[0] == 400
    assert ask_json(master, "/api/v1/segments/status?segment=nobody")[0] == 404


def test_everything_is_removed_on_request(master, store) -> None:
    store.put_batch(["a", "b"], [b"1", b"2"])
    assert ask_json(master, "/api/v1/remove_all", "POST") == (200, {"success": True, "removed_count": 2})
    assert store.batch_is_exist(["a", "b"]) == [0, 0]
    assert ask(master, "/get_all_keys") == (200, "\n")


def test_metrics_say_how_full_the_pool_is(master, store) -> None:
    store.put("a", b"x" * 5000)
    status, text = ask(master, "/metrics")
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert status == 200
    assert int(values["master_key_count"]) >= 1
    assert int(values["master_allocated_bytes"]) >= 8192
    assert int(values["master_total_capacity_bytes"]) % (8 << 20) == 0
    assert ask(master, "/metrics/summary")[1].startswith("role=leader, state=serving, service_ready=true")
