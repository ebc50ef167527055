"""`mooncake_master` answers over HTTP as upstream's was measured to."""

from mooncake.core.messages import StoreStats
from mooncake.dropin.master.metrics import METRICS, PoolNumbers, render, summary
from mooncake.dropin.master.quotas import Usage

from .master_http import ask, ask_json, numbers, until


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


def test_metrics_count_what_stores_were_asked_to_do(master, store) -> None:
    before = numbers(master)
    assert store.put("a", b"x" * 5000) == 0
    assert store.put("a", b"again") == 0
    assert store.get("a") == b"x" * 5000
    assert store.remove("a", force=True) == 0
    assert store.put("b", b"y" * 5000) == 0
    until(lambda: numbers(master)["master_key_count"] == 1)

    def grown() -> dict[str, float]:
        now = numbers(master)
        return {name: now[name] - before[name] for name in expected}

    expected = {
        "master_put_start_requests_total": 3, "master_put_start_failures_total": 1,
        "master_put_end_requests_total": 2, "master_remove_requests_total": 1,
        "valid_get_nums_": 1, "master_allocated_bytes": 8192, "master_total_capacity_bytes": 0,
    }  # fmt: skip
    until(lambda: grown() == expected)  # a reader of this host tells of its reads a little later
    text = ask(master, "/metrics")[1]
    name = store.get_hostname()
    assert f'segment_total_capacity_bytes{{segment="{name}"}} {8 << 20}\n' in text
    assert "mooncake_directory_leader" in text


def test_metrics_are_typed_and_explained() -> None:
    lines = render(PoolNumbers({}, 0)).splitlines()
    for name, metric in METRICS.items():
        at = lines.index(f"# HELP {name} {metric.text}")
        assert lines[at + 1 : at + 3] == [f"# TYPE {name} {metric.kind}", f"{name} 0"]


def test_metrics_add_up_all_segments_and_name_tenants() -> None:
    one = StoreStats(100, 10, 1, 0, 0, 5, 2, 3, 0, 4, ssd_hits=2, ssd_read_bytes=70, soft_pins=1)
    pool = PoolNumbers({"a:1": one, "b:2": one}, 7, [Usage('t"', 100, 50, 60)])
    lines = render(pool).splitlines()
    for line in (
        "mem_cache_hit_nums_ 6",
        "file_cache_hit_nums_ 4",
        "valid_get_nums_ 10",
        "total_get_nums_ 14",
        "master_evicted_key_count 6",
        "master_soft_pin_key_count 2",
        'segment_allocated_bytes{segment="b:2"} 10',
        'mooncake_tenant_quota_charged_bytes{tenant_id="t\\""} 60',
        'mooncake_tenant_quota_over_quota{tenant_id="t\\""} 1',
    ):
        assert line in lines
    text = summary(pool)
    assert text.startswith(
        "role=leader, state=serving, service_ready=true, master={Mem Storage: 20 B / 200 B"
    )
    assert "Keys: 7 (soft-pinned: 2) | Clients: 2 | Get: Success/Total=10/14" in text


def test_the_summary_is_one_line(master, store) -> None:
    status, text = ask(master, "/metrics/summary")
    assert status == 200
    assert text.startswith("role=leader, state=serving, service_ready=true, master={Mem Storage: ")
    assert "\n" not in text
