"""A bad setting stops the process and names the key, the value and what to do."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mooncake.core.errors import ConfigError
from mooncake.core.options import (
    SECTIONS,
    ConductorOptions,
    GatewayOptions,
    StoreOptions,
    UpOptions,
    WorkerOptions,
)
from mooncake.core.options_base import kind_of, masked, settings_of, shown

WORKER = WorkerOptions(
    role="prefill", model="m", metadata="tcp://127.0.0.1:1", run_dir="/r", instance_id="prefill-0"
)
GATEWAY = GatewayOptions(model="m", run_dir="/r")
UP = UpOptions(model="m", run_dir="/r")
STORE = StoreOptions(node="n", capacity_bytes=1 << 30, run_dir="/r", metadata="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        (WORKER, {"role": "cook"}, "role"),
        (WORKER, {"dtype": "int3"}, "dtype = 'int3': must be one of auto, bfloat16, float16, float32"),
        (WORKER, {"load_mode": "never"}, "load_mode"),
        (WORKER, {"block_size": 33}, "block_size = 33: must be a multiple of 32"),
        (WORKER, {"block_size": 0}, "block_size"),
        (WORKER, {"max_model_len": -1}, "max_model_len"),
        (WORKER, {"kv_memory_bytes": 1}, "kv_memory = 1: must be at least 16MiB"),
        (WORKER, {"instance_id": "../../etc"}, "name = '../../etc': use up to 64 letters"),
        (WORKER, {"metadata": "tcp://0.0.0.0:1"}, "endpoint"),
        (WORKER, {"max_num_seqs": 0}, "max_num_seqs = 0: must be 1..4096"),
        (WORKER, {"max_num_batched_tokens": 31}, "max_num_batched_tokens"),
        (GATEWAY, {"port": 0}, "port = 0: must be 1..65535"),
        (GATEWAY, {"port": 65536}, "port"),
        (GATEWAY, {"port": "x"}, "port = 'x': must be a whole number, 1..65535"),
        (GATEWAY, {"port": "tcp://10.0.0.1:8000"}, "enableServiceLinks"),
        (GATEWAY, {"ttft_slo_s": "soon"}, "ttft_slo_s = 'soon': must be a number, 0..3600"),
        (GATEWAY, {"tbt_slo_s": float("nan")}, "tbt_slo_s"),
        (GATEWAY, {"inline": "perhaps"}, "inline = 'perhaps': must be true or false"),
        (GATEWAY, {"vllm_args": "it's"}, "as in a shell"),
        (GATEWAY, {"admin_port": 9000, "admin_host": "0.0.0.0"}, "MOONCAKE_ADMIN_TOKEN"),
        (
            UP,
            {"admin_host": "0.0.0.0"},
            "admin_host = '0.0.0.0': others can reach it",
        ),  # its ports are chosen
        (ConductorOptions(model="m", run_dir="/r", gateways=2), {"admin_host": "::"}, "MOONCAKE_ADMIN_TOKEN"),
        (GATEWAY, {"otlp_endpoint": "here"}, "otlp_endpoint = 'here': must be http://HOST:PORT"),
        (STORE, {"capacity_bytes": 3}, "capacity"),
        (STORE, {"node": "a b"}, "node"),
        (STORE, {"address": "10.0.0.5"}, "MOONCAKE_SECRET_FILE"),
        (STORE, {"address": "no host"}, "address"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, changes, told, monkeypatch):
    for name in ("MOONCAKE_ADMIN_TOKEN", "MOONCAKE_ADMIN_TOKEN_FILE", "MOONCAKE_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    options.checked()
    with pytest.raises(ConfigError) as caught:
        options.replace(**changes).checked()
    assert told in str(caught.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        GATEWAY.replace(port=0, policy="best", typo=1)
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["policy", "port", "typo"]


def test_what_has_to_be_said_says_how():
    with pytest.raises(ConfigError, match="--metadata, MOONCAKE_METADATA"):
        StoreOptions()


def test_a_reachable_address_needs_an_api_key_that_cannot_be_guessed():
    GATEWAY.checked()
    with pytest.raises(ConfigError, match="MOONCAKE_API_KEY"):
        GATEWAY.replace(host="0.0.0.0").checked()
    with pytest.raises(ConfigError, match="16 characters"):
        GATEWAY.replace(host="0.0.0.0", api_key="short").checked()
    GATEWAY.replace(host="0.0.0.0", api_key="k" * 16).checked()


def test_secrets_never_show():
    options = GATEWAY.replace(
        api_key="s3cret", vllm_args=["--hf-token", "s3cret", "--api-key=s3cret", "--x=1"]
    )
    assert "s3cret" not in repr(options)
    assert "--x=1" in repr(options)
    assert "s3cret" not in repr(GATEWAY.replace(api_key="s3cret"))
    with pytest.raises(ConfigError) as caught:
        GATEWAY.replace(api_key=["s3cret"])
    assert "s3cret" not in str(caught.value)


def test_a_flag_that_follows_a_secret_one_is_no_secret():
    assert masked(["--api-key", "--port=1", "a", "--token", "b", "c"]) == [
        "--api-key", "--port=1", "a", "--token", "(set)", "c",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [WORKER, GATEWAY, STORE])
def test_options_travel_to_children_without_secrets(options):
    assert type(options).decoded(options.encoded()) == options
    keyed = GATEWAY.replace(api_key="s3cret")
    assert GatewayOptions.decoded(keyed.encoded()) == GATEWAY


@pytest.mark.parametrize("kind", SECTIONS.values())
def test_every_setting_has_a_meaning_and_a_default_that_means_itself(kind):
    for one in settings_of(kind).values():
        assert one.text.endswith("."), one
        info = kind.model_fields[one.field]
        if one.default and not one.secret:
            said = {"metadata": "tcp://127.0.0.1:1", "leader": "127.0.0.1:7710", one.key: one.default}
            read = kind(**{key: value for key, value in said.items() if key in settings_of(kind)})
            assert getattr(read, one.field) == info.default, one


def test_one_key_means_one_kind_of_thing_in_every_process():
    kinds = {}
    for kind in SECTIONS.values():
        for one in settings_of(kind).values():
            kinds.setdefault(one.key, set()).add(one.kind)
    assert {key: found for key, found in kinds.items() if len(found) > 1} == {
        "aggregated": {"flag", "whole number"}  # whether; and in `up` how many
    }


def test_processes_hand_on_what_they_share():
    up = UpOptions(model="m", block_size=64, ttft_slo_s=3, log_level="debug", admin_port=7)
    made = WorkerOptions(**{**up.shared(WorkerOptions), "metadata": "tcp://127.0.0.1:1"})
    assert (made.block_size, made.log_level, made.admin_port) == (64, "debug", 7)
    assert GatewayOptions(**{**up.shared(GatewayOptions), "aggregated": False}).ttft_slo_s == 3


@given(st.integers(1 << 24, 1 << 50))
def test_sizes_are_shown_as_they_can_be_written(size_bytes):
    text = shown("size", size_bytes)
    assert WORKER.replace(kv_memory_bytes=text).kv_memory_bytes == size_bytes
    assert kind_of(WorkerOptions.model_fields["kv_memory_bytes"]) == "size"


@given(st.lists(st.integers(0, 2000), unique=True).map(sorted))
def test_cores_are_shown_as_they_can_be_written(cores):
    assert WORKER.replace(cores=shown("cores", cores)).cores == cores
