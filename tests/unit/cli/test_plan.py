"""Which processes a wish means. Pure."""

import pytest

from mooncake.core.config import API_KEY_ENV
from mooncake.core.errors import ConfigError
from mooncake.up.plan import UpOptions, admin_names, base_env, make_plan, plan_conductor
from mooncake.up.run import tenant_keys

WISH = UpOptions(model="/m", served_name="m", run_dir="/run/x")
KEY = "k" * 20


def plan(cores=(0, 1), key="", **changes):
    return make_plan(WISH.replace(api_key=key, **changes), cores)


def test_the_store_comes_first_then_the_conductor_then_engines_in_turns():
    names = [process.name for process in plan(prefill=2, decode=1)]
    assert names == ["store", "conductor", "prefill-0", "decode-0", "prefill-1"]


def test_a_prefill_and_a_decode_engine_never_share_a_core_when_there_are_two():
    cores = {process.name: process.cores for process in plan(prefill=1, decode=1)}
    assert cores["prefill-0"] == [0]
    assert cores["decode-0"] == [1]
    engine = plan()[2]
    assert engine.env == {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    assert engine.options.cores == [0]


def test_aggregated_instances_do_both_behind_the_same_gateway():
    _, conductor, *engines = plan(aggregated=2)
    assert [(e.name, e.role, e.options.role) for e in engines] == [
        ("both-0", "prefill", "both"),
        ("both-1", "prefill", "both"),
    ]
    assert conductor.options.aggregated


def test_the_conductor_drains_first_and_the_store_leaves_last():
    ranks = {process.name: process.stop_rank for process in plan()}
    assert ranks["conductor"] < ranks["prefill-0"] == ranks["decode-0"] < ranks["store"]


def test_everyone_meets_at_the_same_metadata_store_and_sizes_agree():
    store, conductor, prefill, decode = plan(block_size=64, max_model_len=2048)
    assert {store.options.metadata, prefill.options.metadata, decode.options.metadata} == {
        conductor.options.metadata_endpoint
    }
    assert conductor.options.block_size == prefill.options.block_size == decode.options.block_size == 64
    assert store.options.node == prefill.options.node


def test_the_api_key_goes_to_the_conductors_environment_only():
    processes = plan(key=KEY, host="0.0.0.0")
    assert KEY.encode() not in b"".join(process.options.encoded() for process in processes)
    assert [process.name for process in processes if KEY in process.env.values()] == ["conductor"]
    assert API_KEY_ENV not in base_env({API_KEY_ENV: KEY}, True)


def test_keys_of_tenants_go_to_the_conductors_environment_only(tmp_path, monkeypatch):
    monkeypatch.setenv("ACME_KEY", KEY)
    file = tmp_path / "tenants.toml"
    file.write_text('[tenants.acme]\nkeys_env = ["ACME_KEY"]\n')
    keys = tenant_keys(str(file))
    assert keys == {"ACME_KEY": KEY}
    wish = UpOptions(model="m", served_name="m", run_dir="/r", tenants=str(file))
    processes = make_plan(wish, [0], keys)
    assert [process.name for process in processes if KEY in process.env.values()] == ["conductor"]
    assert KEY.encode() not in b"".join(process.options.encoded() for process in processes)
    assert base_env({"ACME_KEY": KEY, "HOME": "/h"}, False, keys).keys() & {"ACME_KEY", "HOME"} == {"HOME"}


def test_what_the_user_set_wins_over_our_environment():
    assert base_env({}, True)["OMP_WAIT_POLICY"] == "passive"
    assert base_env({"OMP_WAIT_POLICY": "active"}, True)["OMP_WAIT_POLICY"] == "active"
    assert "HF_HUB_OFFLINE" not in base_env({}, False)


def test_every_process_gets_its_own_admin_port():
    assert admin_names(WISH) == ["store", "conductor", "prefill-0", "decode-0"]
    ports = {"store": 8001, "conductor": 8002, "prefill-0": 8003, "decode-0": 8004}
    assert {one.name: one.options.admin_port for one in plan(admin_ports=ports)} == ports
    assert {one.options.admin_port for one in plan()} == {0}


@pytest.mark.parametrize("gateways", [None, 2])
def test_a_whole_cluster_s_admin_servers_listen_where_it_was_asked_for_if_there_is_a_token(
    gateways, monkeypatch
):
    ports = {"store": 8001, "conductor": 8002, "core": 8003, "gateway-0": 8004, "gateway-1": 8005}
    ports |= {"prefill-0": 8006, "decode-0": 8007}
    wish = {"admin_ports": ports, "admin_host": "0.0.0.0", "gateways": gateways}
    with pytest.raises(ConfigError, match="MOONCAKE_ADMIN_TOKEN"):
        plan(**wish)
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN", "t" * 16)
    assert {one.options.admin_host for one in plan(**wish)} == {"0.0.0.0"}
    assert {one.options.admin_host for one in plan(admin_ports=ports)} == {"127.0.0.1"}


def test_every_process_has_time_to_drain():
    assert all(one.stop_s > 7.0 for one in plan(drain_s=7.0, gateways=2) if one.role != "core")
    assert all(one.stop_s > 7.0 for one in plan(drain_s=7.0))


def test_gateways_and_their_core_are_processes_of_their_own():
    names = [process.name for process in plan(gateways=2)]
    assert names == ["store", "core", "gateway-0", "gateway-1", "prefill-0", "decode-0"]
    _, core, *fronts = plan(gateways=2, admin_ports={"core": 9001, "gateway-1": 9002}, tbt_slo_s=0.1)[:4]
    assert (core.role, core.heavy, core.options.share_port) == ("core", False, False), "it imports no vLLM"
    assert [(f.role, f.heavy, f.options.share_port) for f in fronts] == [("gateway", True, True)] * 2
    assert [f.options.name for f in (core, *fronts)] == ["core", "gateway-0", "gateway-1"]
    assert [f.options.admin_port for f in (core, *fronts)] == [9001, 0, 9002]
    assert {f.options.metadata_endpoint for f in (core, *fronts)} == {plan()[1].options.metadata_endpoint}
    assert {f.options.tbt_slo_s for f in (core, *fronts)} == {0.1}, (
        "policy of the core, and for when it is away"
    )
    assert admin_names(WISH.replace(gateways=2)) == [
        "store", "core", "gateway-0", "gateway-1", "prefill-0", "decode-0",
    ]  # fmt: skip


def test_gateways_drain_before_the_core_leaves_them():
    ranks = {process.name: process.stop_rank for process in plan(gateways=1)}
    assert ranks["gateway-0"] < ranks["core"] <= ranks["prefill-0"] < ranks["store"]


def test_the_core_gets_no_key_for_it_serves_no_clients():
    processes = plan(key=KEY, gateways=2)
    assert [p.name for p in processes if KEY in p.env.values()] == ["gateway-0", "gateway-1"]
    assert KEY.encode() not in b"".join(process.options.encoded() for process in processes)


def test_gateways_of_several_hosts_have_different_names():
    options = plan()[1].options.replace(name="host-12")
    assert [p.options.name for p in plan_conductor(options, 1, {})] == ["host-12-core", "host-12-gateway-0"]


def test_policy_and_objectives_reach_the_conductor():
    conductor = plan(policy="least_load", ttft_slo_s=2.0, tbt_slo_s=0.1)[1].options
    assert (conductor.policy, conductor.ttft_slo_s, conductor.tbt_slo_s) == ("least_load", 2.0, 0.1)


def test_the_eviction_policy_and_the_kind_of_pages_reach_the_store():
    store = plan(eviction="tail", hugepages="require")[0].options
    assert (store.eviction, store.hugepages) == ("tail", "require")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prefill": 0}, "--aggregated"),
        ({"decode": 0}, "--aggregated"),
        ({"prefill": -1}, "prefill"),
        ({"decode": 65}, "decode"),
        ({"host": "0.0.0.0"}, API_KEY_ENV),
        ({"pool_bytes": 5}, "pool_size"),
        ({"kv_memory_bytes": 5}, "kv_memory"),
        ({"block_size": 31}, "block_size"),
        ({"load_mode": "x"}, "load_mode"),
        ({"run_dir": "/" + "x" * 80}, "run_dir"),
        ({"port": 0}, "port"),
        ({"policy": "best"}, "policy"),
        ({"eviction": "best"}, "eviction"),
        ({"hugepages": "on"}, "hugepages"),
        ({"ttft_slo_s": -1.0}, "ttft_slo_s"),
        ({"tbt_slo_s": float("nan")}, "tbt_slo_s"),
        ({"admin_ports": {"store": 70_000}}, "admin_port"),
        ({"admin_ports": {"decode-0": 70_000}}, "admin_port"),
        ({"gateways": 1, "admin_ports": {"gateway-0": 70_000}}, "admin_port"),
        ({"gateways": 0}, "gateways = 0: must be 1..64"),
        ({"gateways": -1}, "gateways"),
        ({"gateways": 65}, "gateways"),
    ],
)
def test_a_wish_that_cannot_work_is_refused_before_anything_starts(changes, match):
    with pytest.raises(ConfigError, match=match):
        plan(**changes)
