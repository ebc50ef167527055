from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import ConfigError
from mooncake.core.secret import read_secret
from mooncake.dropin.engine.env import EngineEnv, read_env, read_log_level

NUMBERS = (
    "MC_TRANSFER_TIMEOUT", "MC_HANDSHAKE_CONNECT_TIMEOUT", "MC_HANDSHAKE_PORT", "MC_MIN_RPC_PORT",
    "MC_MAX_RPC_PORT", "MC_IB_PORT", "MC_GID_INDEX", "MC_SLICE_SIZE", "MC_MAX_EP_PER_CTX",
)  # fmt: skip
SECRET = "sixteen bytes or more"


def test_an_empty_environment_means_upstream_s_defaults() -> None:
    env = read_env({})
    assert env == EngineEnv()
    assert (env.transfer_s, env.connect_s, env.port_min, env.port_max) == (30.0, 5.0, 15_000, 17_000)


def test_every_variable_we_honour_arrives(tmp_path: Path) -> None:
    topology = tmp_path / "topology.json"
    topology.write_text("{}")
    env = {
        "MC_FORCE_TCP": "1", "MC_TRANSFER_TIMEOUT": "2.5", "MC_HANDSHAKE_CONNECT_TIMEOUT": "7",
        "MC_HANDSHAKE_PORT": "12001", "MC_MIN_RPC_PORT": "20000", "MC_MAX_RPC_PORT": "20010",
        "MC_TCP_BIND_ADDRESS": "127.0.0.2", "MC_TE_FILTERS": " mlx5_0, mlx5_1 ,", "MC_IB_PORT": "2",
        "MC_GID_INDEX": "3", "MC_CUSTOM_TOPO_JSON": str(topology), "MC_SLICE_SIZE": "65536",
        "MC_MAX_EP_PER_CTX": "256", "MOONCAKE_SECRET": SECRET,
    }  # fmt: skip
    assert read_env(env) == EngineEnv(
        secret=SECRET.encode(),
        force_tcp=True,
        transfer_s=2.5,
        connect_s=7.0,
        port=12_001,
        port_min=20_000,
        port_max=20_010,
        bind_host="127.0.0.2",
        nics=("mlx5_0", "mlx5_1"),
        nic_port=2,
        gid_index=3,
        topology=str(topology),
        slice_bytes=65_536,
        endpoints_max=256,
    )


def test_variables_we_do_not_know_are_ignored() -> None:
    assert read_env({"MC_NO_SUCH_THING": "nonsense", "MC_TCP_PROTO": "v2"}) == EngineEnv()


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["x", "-1", "nan", "1e99", "0x10", "9" * 400])
def test_a_bad_number_is_refused_with_its_name_and_value(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*write a number"):
        read_env({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("MC_FORCE_TCP", "maybe"), ("MC_CUSTOM_TOPO_JSON", "/no/such/file"), ("MC_MIN_RPC_PORT", "70000")],
)
def test_other_bad_values_are_refused_with_name_and_value(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*{value}"):
        read_env({key: value})


def test_a_range_of_ports_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match="MC_MAX_RPC_PORT"):
        read_env({"MC_MIN_RPC_PORT": "15001", "MC_MAX_RPC_PORT": "15000"})


def test_a_range_may_begin_above_upstream_s_end() -> None:
    env = read_env({"MC_MIN_RPC_PORT": "30000"})
    assert (env.port_min, env.port_max) == (30_000, 30_000)


@given(st.dictionaries(st.sampled_from(NUMBERS), st.text(max_size=20)))
def test_no_number_breaks_the_reader(env: dict[str, str]) -> None:
    try:
        read_env(env)
    except ConfigError:
        return


def test_log_levels_have_upstream_s_names() -> None:
    assert [read_log_level({"MC_LOG_LEVEL": level}) for level in ("trace", "ERROR")] == ["debug", "error"]
    assert read_log_level({}) == "info"
    with pytest.raises(ConfigError, match="MC_LOG_LEVEL"):
        read_log_level({"MC_LOG_LEVEL": "LOUD"})


def test_a_secret_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    assert read_secret({"MOONCAKE_SECRET": SECRET}) == SECRET.encode()
    assert read_secret({"MOONCAKE_SECRET_FILE": str(path)}) == SECRET.encode()
    assert read_secret({}) == b""


def test_a_secret_that_is_too_short_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("")
    for env in ({"MOONCAKE_SECRET": "hush"}, {"MOONCAKE_SECRET_FILE": str(path)}):
        with pytest.raises(ConfigError, match="a secret has 16 to") as caught:
            read_secret(env)
        assert "hush" not in str(caught.value)


def test_two_secrets_or_a_missing_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one"):
        read_secret({"MOONCAKE_SECRET": SECRET, "MOONCAKE_SECRET_FILE": "/x"})
    with pytest.raises(ConfigError, match="MOONCAKE_SECRET_FILE = '/no/such/file'"):
        read_secret({"MOONCAKE_SECRET_FILE": "/no/such/file"})
