"""A bad setting stops the process and names the key, the value and what to do."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from mooncake.core.config import (
    GatewayOptions,
    StoreOptions,
    WorkerOptions,
    format_size,
    is_loopback,
    parse_cores,
    parse_size_bytes,
)
from mooncake.core.errors import ConfigError

WORKER = WorkerOptions(
    role="prefill", model="m", metadata="tcp://127.0.0.1:1", run_dir="/r", instance_id="prefill-0"
)
GATEWAY = GatewayOptions(model="m", run_dir="/r")
STORE = StoreOptions(node="n", capacity_bytes=1 << 30, run_dir="/r", metadata="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4096", 4096), ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5 kb", 1500), ("1g", 10**9), ("7B", 7)],
)
def test_sizes_are_read_with_binary_and_decimal_units(text, size_bytes):
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "0", "1.5", "3ib", "1 PiB", "1e9", "nan", "\u0661MiB", "0.3GB5"]
)
def test_anything_else_is_refused_with_key_and_value(text):
    with pytest.raises(ConfigError, match="kv_memory") as caught:
        parse_size_bytes(text, "kv_memory")
    assert repr(text) in str(caught.value)


@given(st.integers(1, 1 << 50))
def test_a_number_of_bytes_means_itself(size_bytes):
    assert parse_size_bytes(str(size_bytes)) == size_bytes
    assert format_size(size_bytes).endswith("B")


@pytest.mark.parametrize(
    ("text", "cores"), [("", []), ("0", [0]), ("2,0", [0, 2]), ("0-3", [0, 1, 2, 3]), ("0-1,1", [0, 1])]
)
def test_cores_are_lists_or_ranges(text, cores):
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "0-", "1;2"])
def test_other_cores_are_refused(text):
    with pytest.raises(ConfigError, match="cores"):
        parse_cores(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_only_loopback_addresses_count_as_local(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"role": "cook"}, "role"),
        ({"dtype": "int3"}, "dtype"),
        ({"load_mode": "never"}, "load_mode"),
        ({"block_size": 33}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"kv_memory_bytes": 1}, "kv_memory"),
        ({"instance_id": "../../etc"}, "instance_id"),
        ({"instance_id": ""}, "instance_id"),
        ({"metadata": "tcp://0.0.0.0:1"}, "endpoint"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"model": ""}, "model"),
    ],
)
def test_a_worker_refuses_values_out_of_range_by_name(changes, key):
    WORKER.checked()
    with pytest.raises(ConfigError, match=key):
        msgspec.structs.replace(WORKER, **changes).checked()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (msgspec.structs.replace(GATEWAY, port=0), "port"),
        (msgspec.structs.replace(GATEWAY, port=65536), "port"),
        (msgspec.structs.replace(GATEWAY, block_size=7), "block_size"),
        (msgspec.structs.replace(STORE, capacity_bytes=3), "capacity"),
        (msgspec.structs.replace(STORE, node="a b"), "node"),
        (msgspec.structs.replace(STORE, address="10.0.0.5"), "MOONCAKE_SECRET_FILE"),
        (msgspec.structs.replace(STORE, address="no host"), "address"),
    ],
)
def test_gateway_and_store_refuse_values_out_of_range_by_name(options, key):
    with pytest.raises(ConfigError, match=key):
        options.checked()


def test_a_reachable_address_needs_an_api_key_that_cannot_be_guessed():
    GATEWAY.checked()
    with pytest.raises(ConfigError, match="MOONCAKE_API_KEY"):
        msgspec.structs.replace(GATEWAY, host="0.0.0.0").checked()
    with pytest.raises(ConfigError, match="16 characters"):
        msgspec.structs.replace(GATEWAY, host="0.0.0.0", api_key="short").checked()
    msgspec.structs.replace(GATEWAY, host="0.0.0.0", api_key="k" * 16).checked()


def test_the_api_key_never_shows_in_a_representation():
    assert "s3cret" not in repr(msgspec.structs.replace(GATEWAY, api_key="s3cret"))


@pytest.mark.parametrize("options", [WORKER, GATEWAY, STORE])
def test_options_travel_as_msgpack_and_unknown_keys_are_refused(options):
    data = msgspec.msgpack.encode(options)
    assert msgspec.msgpack.decode(data, type=type(options)) == options
    with pytest.raises(msgspec.ValidationError, match="typo"):
        msgspec.convert({**msgspec.to_builtins(options), "typo": 1}, type=type(options))
