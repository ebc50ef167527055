"""`mooncake.mooncake_config` reads what upstream's reads (0.3.13.post1), with its defaults."""

import dataclasses
import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mooncake.core.errors import ConfigError
from mooncake.mooncake_config import ENV, MooncakeConfig

LEAST = {"local_hostname": "h", "metadata_server": "P2PHANDSHAKE", "master_server_address": "m:1"}
DEFAULTS = {
    "global_segment_size": 3355443200, "local_buffer_size": 1073741824, "protocol": "tcp", "device_name": "",
    "enable_ssd_offload": False, "ssd_offload_path": "", "tenant_id": "default",
    "enable_client_http_server": False, "client_http_port": 9300,
}  # fmt: skip
OTHERS = {
    "global_segment_size": ("16MB", 16 << 20), "local_buffer_size": ("1.5 gb", 3 << 29),
    "protocol": (" RDMA ", "rdma"), "device_name": ("mlx5_0", "mlx5_0"), "enable_ssd_offload": ("yes", True),
    "ssd_offload_path": ("/nvme", "/nvme"), "tenant_id": ("a", "a"),
    "enable_client_http_server": ("on", True), "client_http_port": ("9301", 9301),
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["MOONCAKE_CONFIG_PATH", *ENV.values()]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path: Path):
    def write(values: object) -> str:
        path = tmp_path / "config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


def test_fields_and_their_order_are_upstream_s() -> None:
    assert [field.name for field in dataclasses.fields(MooncakeConfig)] == [
        "local_hostname", "metadata_server", "global_segment_size", "local_buffer_size", "protocol",
        "device_name", "master_server_address", "enable_ssd_offload", "ssd_offload_path", "tenant_id",
        "enable_client_http_server", "client_http_port",
    ]  # fmt: skip
    config = MooncakeConfig("h", "P2PHANDSHAKE", 1, 2, "tcp", None, "m:1")
    assert dataclasses.asdict(config) == DEFAULTS | LEAST | {
        "global_segment_size": 1, "local_buffer_size": 2, "device_name": None,
    }  # fmt: skip


def test_a_file_with_the_least_gives_the_defaults(write) -> None:
    assert dataclasses.asdict(MooncakeConfig.from_file(write(LEAST))) == LEAST | DEFAULTS


def test_the_environment_with_the_least_gives_the_defaults(monkeypatch) -> None:
    monkeypatch.setenv("MOONCAKE_MASTER", "m:1")
    least = LEAST | {"local_hostname": "localhost"}
    assert dataclasses.asdict(MooncakeConfig.load_from_env()) == least | DEFAULTS


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_is_read_from_a_file_and_from_its_variable(write, monkeypatch, field: str) -> None:
    text, value = OTHERS[field]
    assert getattr(MooncakeConfig.from_file(write(LEAST | {field: text})), field) == value
    monkeypatch.setenv("MOONCAKE_MASTER", "m:1")
    monkeypatch.setenv(ENV[field], text)
    assert getattr(MooncakeConfig.load_from_env(), field) == value


def test_names_of_places_are_read_from_the_environment(monkeypatch) -> None:
    for name, value in LEAST.items():
        monkeypatch.setenv(ENV[name], f"{value}x")
    assert (
        dataclasses.asdict(MooncakeConfig.load_from_env()).items()
        >= {name: f"{value}x" for name, value in LEAST.items()}.items()
    )


def test_the_file_that_the_environment_names_goes_first(write, monkeypatch) -> None:
    monkeypatch.setenv("MOONCAKE_CONFIG_PATH", write(LEAST))
    monkeypatch.setenv("MOONCAKE_MASTER", "other:1")
    assert MooncakeConfig.load_from_env().master_server_address == "m:1"


def test_null_means_the_default_of_a_text(write) -> None:
    config = MooncakeConfig.from_file(write(LEAST | {"tenant_id": None, "ssd_offload_path": None}))
    assert (config.tenant_id, config.ssd_offload_path) == ("default", "")


@pytest.mark.parametrize("text", ["true", "1", "YES", "on", "enable", 1, True])
def test_a_switch_is_on(write, text) -> None:
    assert MooncakeConfig.from_file(write(LEAST | {"enable_ssd_offload": text})).enable_ssd_offload is True


@pytest.mark.parametrize("text", ["false", "0", "No", "off", "disable", "", 0, False, None])
def test_a_switch_is_off(write, text) -> None:
    assert MooncakeConfig.from_file(write(LEAST | {"enable_ssd_offload": text})).enable_ssd_offload is False


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enable_ssd_offload", "maybe"), ("global_segment_size", "50%"), ("global_segment_size", -1),
        ("local_buffer_size", ""), ("protocol", ""), ("protocol", 3), ("local_hostname", " "),
        ("metadata_server", None), ("master_server_address", ""), ("client_http_port", "x"),
        ("client_http_port", 70_000),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_file(write, field: str, value) -> None:
    path = write(LEAST | {field: value})
    with pytest.raises(ConfigError, match=field) as error:
        MooncakeConfig.from_file(path)
    assert path in str(error.value)


def test_a_bad_variable_is_named(monkeypatch) -> None:
    monkeypatch.setenv("MOONCAKE_MASTER", "m:1")
    monkeypatch.setenv("MOONCAKE_CLIENT_HTTP_PORT", "x")
    with pytest.raises(ConfigError, match=r"MOONCAKE_.*client_http_port = 'x'"):
        MooncakeConfig.load_from_env()


@pytest.mark.parametrize("name", LEAST)
def test_a_field_that_is_missing_is_named(write, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        MooncakeConfig.from_file(write({key: value for key, value in LEAST.items() if key != name}))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_file_that_is_no_object_is_refused(write, text: str) -> None:
    with pytest.raises(ConfigError, match="a JSON object is needed"):
        MooncakeConfig.from_file(write(text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        MooncakeConfig.from_file(str(tmp_path / "none.json"))


def test_an_empty_environment_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="MOONCAKE_CONFIG_PATH nor MOONCAKE_MASTER"):
        MooncakeConfig.load_from_env()


def test_fields_that_mean_nothing_are_named_without_their_values(write) -> None:
    with capture_logs() as logs:
        MooncakeConfig.from_file(write(LEAST | {"pasword": "secret"}))
    assert logs[0]["fields"] == ["pasword"]
    assert "secret" not in str(logs)
