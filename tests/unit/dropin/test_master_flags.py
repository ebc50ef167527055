"""`mooncake_master` takes every flag of upstream's; docs/master.md says what each does."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from mooncake.core.errors import ConfigError
from mooncake.dropin.master import flags, metrics
from mooncake.dropin.master.command import USAGE, Master, main, read_flags
from mooncake.dropin.master.flags import FLAGS, Kind
from mooncake.dropin.master.options import MasterOptions
from mooncake.dropin.store.settings import MasterSettings
from mooncake.store import ReplicateConfig, SoftPinAction

from .conftest import MasterThread, client
from .master_http import PATIENCE_S, numbers, until

HERE = Path(__file__).parent
UPSTREAM_FLAGS = (HERE / "upstream_master_flags.txt").read_text().split()
UPSTREAM_METRICS = (HERE / "upstream_master_metrics.txt").read_text().split()
"""Of mooncake-transfer-engine 0.3.13.post1: the names in --help, and in /metrics of a fresh master."""
PAGE = HERE.parents[2] / "docs" / "master.md"
MB = 1 << 20


@pytest.fixture
def quiet(monkeypatch) -> None:
    """Logs stay as the test run has them."""
    monkeypatch.setattr("mooncake.core.log.setup", lambda *_: None)


# ---------------------------------------------------------------- words


def test_flags_are_written_in_any_of_gflags_ways() -> None:
    words = [
        "--rpc_port=1", "-metrics_port", "2", "--http_metadata_server_port", "3", "--default-kv-lease-ttl=5",
        "--enable_http_metadata_server", "--eviction_ratio", "0.2",
    ]  # fmt: skip
    expected = MasterOptions(
        rpc_port=1, metrics_port=2, http_metadata_server_port=3, default_kv_lease_ttl="5",
        enable_http_metadata_server=True, eviction_ratio=0.2,
    )  # fmt: skip
    assert read_flags(words) == (expected, [])
    assert read_flags(["--port=1"]) == (MasterOptions(rpc_port=1), [])
    assert not read_flags(["--noenable_http_metadata_server"])[0].enable_http_metadata_server
    assert read_flags(["--enable_http_metadata_server=true"])[0].enable_http_metadata_server
    assert read_flags([]) == (MasterOptions(), [])


def test_the_defaults_are_upstream_s_but_for_addresses_and_what_evicts_ahead() -> None:
    options = MasterOptions()
    assert (options.rpc_port, options.metrics_port, options.http_metadata_server_port) == (50051, 9003, 8080)
    assert options.rpc_address == options.http_metadata_server_host == "127.0.0.1"
    assert options.settings == MasterSettings(kv_lease_ttl_s=10.0, soft_pin_ttl_s=1800.0)
    assert options.settings.evict_above_ratio == 1.0


def test_what_clients_have_to_know_is_what_flags_say() -> None:
    words = [
        "--default_kv_lease_ttl=500ms", "--default_kv_soft_pin_ttl=2m", "--client_ttl=30",
        "--eviction_high_watermark_ratio=0.9", "--eviction_ratio=0.1",
        "--allow_evict_soft_pinned_objects=false", "--enable_offload", "--offload_on_evict",
        "--enable_multi_tenants", "--tenant_quota_connector_uri=/x", "--promotion_admission_threshold=3",
    ]  # fmt: skip
    assert read_flags(words)[0].settings == MasterSettings(
        kv_lease_ttl_s=0.5, soft_pin_ttl_s=120.0, client_ttl_s=30.0, evict_above_ratio=0.9, evict_ratio=0.1,
        evict_soft_pins=False, offload=True, offload_on_evict=True, ssd_reads=3, multi_tenants=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("250", 0.25), ("7s", 7), ("1h", 3600), ("24h", 86400)]
)
def test_times_are_milliseconds_or_say_their_unit(text, seconds) -> None:
    assert MasterOptions(default_kv_lease_ttl=text).settings.kv_lease_ttl_s == seconds


def test_flags_that_ask_for_what_is_not_here_are_named_without_their_values() -> None:
    words = [
        "--rpc_thread_num=64",
        "--root_fs_dir",
        "/secret",
        "--enable_ha",
        "--evict_ratio=1",
        "--rpc_port=7",
    ]
    options, said = read_flags(words)
    assert options == MasterOptions(rpc_port=7)
    assert [text.partition(":")[0] for text in said] == ["--root_fs_dir", "--enable_ha", "--evict_ratio"]
    assert "/secret" not in "".join(said)
    assert "no flag of upstream's" in said[2]


def test_what_is_only_switched_off_is_not_worth_a_word() -> None:
    assert read_flags(["--enable_ha=false", "--noenable_cxl", "--allocation_strategy=random"])[1] == []
    assert len(read_flags(["--allocation_strategy=local_first"])[1]) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rpc_port=x"], "rpc_port"),
        (["--rpc_port"], "rpc_port"),
        (["--metrics_port=65536"], "metrics_port"),
        (["--enable_http_metadata_server=maybe"], "enable_http"),
        (["--default_kv_lease_ttl=-1"], "lease_ttl"),
        (["--default_kv_lease_ttl=1w"], "lease_ttl"),
        (["--default_kv_soft_pin_ttl=25h"], "soft_pin_ttl"),
        (["--eviction_ratio=nan"], "eviction_ratio"),
        (["--eviction_high_watermark_ratio=90"], "watermark"),
        (["--client_ttl=0"], "client_ttl"),
        (["--promotion_admission_threshold=0"], "promotion_admission_threshold"),
        (["--rpc_interface=no-such-interface"], "rpc_interface"),
        (["--enable_multi_tenants"], "tenant_quota_connector_uri"),
        (["--tenant_quota_connector_type=etcd"], "tenant_quota_connector_type"),
        (["--config_path=/nowhere"], "config_path"),
    ],
)
def test_bad_values_are_named(words, named, capsys, quiet) -> None:
    with pytest.raises(ConfigError, match=named):
        read_flags(words)
    assert main(words) == 2
    assert named in capsys.readouterr().err


def test_the_address_may_be_an_interface_s() -> None:
    assert MasterOptions(rpc_interface="lo", rpc_address="10.0.0.1").address == "127.0.0.1"
    assert MasterOptions(rpc_address="10.0.0.1").address == "10.0.0.1"


def started(**options) -> None:
    """Start a master and end it."""

    async def run() -> None:
        master = Master(MasterOptions(**{"rpc_port": 0, "metrics_port": 0, **options}))
        try:
            await asyncio.wait_for(master.start(), PATIENCE_S)
        finally:
            await master.close()

    asyncio.run(run())


def test_an_address_of_the_network_needs_a_secret(monkeypatch) -> None:
    monkeypatch.delenv("MOONCAKE_SECRET", raising=False)
    monkeypatch.delenv("MOONCAKE_SECRET_FILE", raising=False)
    with pytest.raises(ConfigError, match=r"(?i)secret"):
        started(rpc_address="192.0.2.1")


def test_http_of_the_network_needs_a_token(monkeypatch) -> None:
    monkeypatch.delenv("MOONCAKE_ADMIN_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="MOONCAKE_ADMIN_TOKEN"):
        started(metrics_host="192.0.2.1")


def test_help_names_every_flag_that_acts(capsys) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == USAGE
    assert [name for name, flag in FLAGS.items() if flag.kind is Kind.ACTS and name not in USAGE] == [
        "help", "tenant_quota_connector_type",
    ]  # fmt: skip


# ---------------------------------------------------------------- the config file


def test_a_config_file_holds_flags_and_the_command_line_wins(tmp_path) -> None:
    values = {
        "rpc_port": 1,
        "metrics_port": 2,
        "enable_offload": True,
        "enable_ha": True,
        "eviction_ratio": 0.2,
    }
    (tmp_path / "json").write_text(json.dumps(values))
    (tmp_path / "yaml").write_text(
        "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())
    )
    for name in ("json", "yaml"):
        path = str(tmp_path / name)
        options, said = read_flags([f"--config_path={path}", "--rpc_port=9"])
        assert options == MasterOptions(
            rpc_port=9, metrics_port=2, enable_offload=True, eviction_ratio=0.2, config_path=path
        )
        assert len(said) == 1, "enable_ha"


@pytest.mark.parametrize("text", ["- a\n- b", "rpc_port: [1]", "a: {b: c}", "{", "\x00"])
def test_a_config_file_that_is_none_is_named(tmp_path, text) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match="config_path"):
        read_flags([f"--config_path={tmp_path / 'file'}"])


def test_without_a_yaml_reader_json_is_read_and_yaml_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "json").write_text('{"rpc_port": 1}')
    assert read_flags([f"--config_path={tmp_path / 'json'}"])[0].rpc_port == 1
    (tmp_path / "yaml").write_text("rpc_port: 1")
    with pytest.raises(ConfigError, match="pip install pyyaml"):
        read_flags([f"--config_path={tmp_path / 'yaml'}"])


# ---------------------------------------------------------------- what is written about them


def test_every_flag_of_upstream_s_is_known_and_no_other() -> None:
    assert sorted(FLAGS) == sorted(UPSTREAM_FLAGS)
    assert len(UPSTREAM_FLAGS) == 134


def test_a_flag_acts_if_and_only_if_it_is_an_option() -> None:
    acts = {name for name, flag in FLAGS.items() if flag.kind is Kind.ACTS}
    assert acts - {"help", "port"} == set(MasterOptions.__struct_fields__)


def test_every_metric_of_upstream_s_is_there_or_explained() -> None:
    assert set(metrics.METRICS) | set(metrics.SEGMENT_METRICS) <= set(UPSTREAM_METRICS)
    assert all(
        metrics.why_absent(name) or name in metrics.METRICS | metrics.SEGMENT_METRICS
        for name in UPSTREAM_METRICS
    )
    unused = [
        prefix for prefix in metrics.ABSENT_PREFIXES
        if not any(name.startswith(prefix) and metrics.why_absent(name) for name in UPSTREAM_METRICS)
    ]  # fmt: skip
    assert not unused


def test_the_page_has_both_tables() -> None:
    text = PAGE.read_text()
    assert flags.table() in text, "python -m tests.unit.dropin.master_tables"
    assert metrics.table(UPSTREAM_METRICS) in text, "python -m tests.unit.dropin.master_tables"


# ---------------------------------------------------------------- what they do


def test_above_the_watermark_a_segment_makes_room_without_a_put() -> None:
    master = MasterThread(eviction_high_watermark_ratio=0.5, eviction_ratio=0.25)
    store = client(master, 8 * MB)
    try:
        for n in range(6):
            assert store.put(f"k{n}", bytes([n]) * MB) == 0
        until(lambda: numbers(master)["master_allocated_bytes"] <= 4 * MB)
        there = [store.is_exist(f"k{n}") for n in range(6)]
        assert there == sorted(there), "the oldest go first"
        assert 2 <= sum(there) <= 4
        assert numbers(master)["master_evicted_key_count"] == 6 - sum(there)
    finally:
        store.close()
        master.stop()


def test_soft_pins_that_may_not_be_evicted_fill_a_segment() -> None:
    master = MasterThread(allow_evict_soft_pinned_objects=False)
    store = client(master, 4 * MB)
    config = ReplicateConfig()
    config.soft_pin_action = SoftPinAction.ENABLE
    try:
        assert [store.put(f"k{n}", bytes(MB), config) for n in range(5)] == [0, 0, 0, 0, -200]
        assert numbers(master)["master_soft_pin_key_count"] == 4
    finally:
        store.close()
        master.stop()


def test_a_client_joins_with_what_the_master_s_flags_say() -> None:
    master = MasterThread(client_ttl=7.0, default_kv_soft_pin_ttl="5m", offload_on_evict=True)
    store = client(master)
    try:
        assert store._calls.started.background.master_settings == MasterSettings(
            client_ttl_s=7.0, soft_pin_ttl_s=300.0, offload_on_evict=True
        )
    finally:
        store.close()
        master.stop()


def test_a_master_with_offload_has_every_client_use_the_place_that_it_knows(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES", str(48 * MB))
    monkeypatch.setenv("MOONCAKE_OFFLOAD_FILE_STORAGE_PATH", str(tmp_path))
    for offload in (False, True):
        master = MasterThread(enable_offload=offload)
        try:
            client(master).close()
            assert (tmp_path / "tier-0" / "objects").exists() is offload
        finally:
            master.stop()


def test_a_master_that_cannot_read_its_quotas_does_not_start(tmp_path) -> None:
    with pytest.raises(ConfigError, match="tenant_quota_connector_uri"):
        started(enable_multi_tenants=True, tenant_quota_connector_uri=str(tmp_path / "none"))
