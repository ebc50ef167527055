"""Flags > environment > file > defaults; everything that is wrong is told at once, with who said it."""

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from mooncake.core.config_file import parse_config
from mooncake.core.errors import ConfigError
from mooncake.core.options import (
    SECTIONS,
    ConductorOptions,
    GatewayOptions,
    IndexerOptions,
    PrefillOptions,
    StoreOptions,
    UpOptions,
)
from mooncake.core.options_base import settings_of, values_of
from mooncake.core.settings import fill, load

WAYS = ("file", "environment", "flag")


@pytest.fixture
def write(tmp_path):
    def written(text: str) -> str:
        path = tmp_path / "m.yaml"
        path.write_text(text)
        return str(path)

    return written


def refused(kind, flags) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(kind, flags)
    return str(caught.value).splitlines()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["ttft_slo_s", "port", "policy", "kv_memory", "vllm_args", "inline"]),
        st.sets(st.sampled_from(WAYS)),
    ),
    st.randoms(use_true_random=False),
)
def test_of_all_that_is_said_the_nearest_to_the_process_wins(said, random):
    choices = {
        "ttft_slo_s": ["1", "2.5", "3"], "port": ["1", "2", "3"],
        "policy": ["random", "least_load", "round_robin"],
        "kv_memory": ["64MiB", "1GiB", "99999999"], "vllm_args": ["--a", "--b 'c d'", "e"],
        "inline": ["true", "no", "on"],
    }  # fmt: skip
    found = {way: {} for way in WAYS}
    for key, ways in said.items():
        for way, value in zip(WAYS, random.sample(choices[key], 3), strict=True):
            if way in ways:
                found[way][key] = value
    file = parse_config(yaml.safe_dump({"up": found["file"]}), "m.yaml")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in found["environment"].items():
            patch.setenv(f"MOONCAKE_{key.upper()}", value)
        made = fill(UpOptions, found["flag"], file)
    for key, ways in said.items():
        winner = next((way for way in reversed(WAYS) if way in ways), None)
        origin = made.origins.get(key, "default")
        field = settings_of(UpOptions)[key].field
        if winner is None:
            assert (getattr(made, field), origin) == (getattr(UpOptions(), field), "default")
            continue
        assert getattr(made, field) == getattr(UpOptions(**{key: found[winner][key]}), field)
        shown = {"flag": "--" + key.replace("_", "-"), "environment": f"MOONCAKE_{key.upper()}"}
        assert origin.startswith(shown.get(winner, "m.yaml:"))


def test_a_sections_own_keys_come_before_the_common_ones(write):
    path = write(
        "common:\n  log_level: debug\n  metadata: tcp://127.0.0.1:1\n  ssd: /x\n"
        "prefill:\n  log_level: error\n"
    )
    prefill = load(PrefillOptions, {"config": path})
    assert (prefill.log_level, prefill.metadata) == ("error", "tcp://127.0.0.1:1")
    assert prefill.origins["log_level"] == f"{path}:6"
    store = load(StoreOptions, {"config": path})
    assert (store.log_level, store.ssd_path, store.origins["ssd"]) == ("debug", "/x", f"{path}:4")


def test_the_metadata_of_all_is_the_conductors_too(write):
    path = write("common:\n  metadata: etcd://127.0.0.1:2379\n")
    assert load(ConductorOptions, {"config": path}).metadata_endpoint == "etcd://127.0.0.1:2379"


def test_its_other_spelling_is_understood_everywhere(write, monkeypatch):
    path = write("conductor:\n  metadata_endpoint: etcd://127.0.0.1:1\n")
    assert load(ConductorOptions, {"config": path}).metadata_endpoint == "etcd://127.0.0.1:1"
    monkeypatch.setenv("MOONCAKE_METADATA_ENDPOINT", "etcd://127.0.0.1:2")
    options = load(ConductorOptions, {"config": path})
    assert options.metadata_endpoint == "etcd://127.0.0.1:2"
    assert options.origins["metadata"] == "MOONCAKE_METADATA_ENDPOINT"


def test_a_file_without_sections_is_of_whoever_reads_it(write):
    path = write("prefill: 2\nport: 9000\n")  # also names of sections may be keys
    options = load(UpOptions, {"config": path})
    assert (options.prefill, options.port, options.config) == (2, 9000, path)


def test_the_environment_may_name_the_file(write, monkeypatch):
    monkeypatch.setenv("MOONCAKE_CONFIG", write("up: {port: 9001}"))
    assert load(UpOptions, {}).port == 9001
    assert load(UpOptions, {"config": write("up: {port: 9002}")}).port == 9002


def test_scalars_mean_what_they_say_whatever_yaml_makes_of_them(write):
    path = write("metadata: tcp://127.0.0.1:1\nhugepages: off\nnode: 007\ncapacity: 1_073_741_824\nssd: ~\n")
    with pytest.raises(ConfigError, match="capacity = '1_073_741_824'"):
        load(StoreOptions, {"config": path})
    path = write("metadata: tcp://127.0.0.1:1\nhugepages: off\nnode: 007\ncapacity: 2GiB\nssd: ~\n")
    store = load(StoreOptions, {"config": path})
    assert (store.hugepages, store.node, store.capacity_bytes, store.ssd_path) == ("off", "007", 2 << 30, "")


def test_lists_are_lists_or_words(write):
    path = write("up:\n  vllm_args: [--a, --b=c d]\n  cores: 0-2\n")
    assert load(UpOptions, {"config": path}).vllm_args == ["--a", "--b=c d"]
    assert load(UpOptions, {"config": path}).cores == [0, 1, 2]


def test_all_mistakes_are_told_with_who_made_them(write, monkeypatch):
    monkeypatch.setenv("MOONCAKE_PORT", "x")
    path = write(
        "common:\n  lok_level: x\n"
        "up:\n  pool_size: lots\n  prefil: 2\n  decode: {a: 1}\n  port: 1\n  port: 2\n"
    )
    lines = refused(UpOptions, {"config": path, "hold_s": "-1"})
    assert sorted(lines) == [
        f"decode ({path}:6): takes a value or a list of values, no more",
        "hold_s = '-1' (--hold-s): must be 0..3600",
        f"lok_level ({path}:2): no such setting; did you mean log_level?",
        f"pool_size = 'lots' ({path}:4): write a size like 512MiB, 2GiB or a number of bytes",
        f"port ({path}:8): is said twice: leave one out",
        "port = 'x' (MOONCAKE_PORT): must be a whole number, 1..65535",
        f"prefil ({path}:5): no such setting; did you mean prefill?",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("up: [", "no YAML"),
        ("- a", "key: value"),
        ("stor: {a: 1}", "no section; there are common, up"),
        ("up: {port: 1}\nport: 2", "no section"),
        ("up: {port: 1}\nstore: 2", "a section here"),
        ("up: {config: x}", "files name no other files"),
        ("? [a]\n: b", "keys are words"),
        ("!!python/object/apply:os.system [x]", "key: value"),
        ("up: !!python/object:os.x {port: 1, api_key: k}", "api_key_file"),
        ("#" * (1 << 20) + "#", "at most"),
    ],
)
def test_a_file_of_another_form_is_refused(write, text, told):
    assert any(told in line for line in refused(UpOptions, {"config": write(text)}))


def test_secrets_come_from_the_environment_or_from_files_only(write, tmp_path, monkeypatch):
    (line,) = refused(ConductorOptions, {"config": write("conductor: {api_key: s3cret}")})
    assert "MOONCAKE_API_KEY" in line
    assert "s3cret" not in line
    key = tmp_path / "key"
    key.write_text("from the file\n")
    options = load(ConductorOptions, {"api_key_file": str(key)})
    assert options.api_key == "from the file"
    assert "from the file" not in str(values_of(options)) + repr(options) + str(options.encoded())
    monkeypatch.setenv("MOONCAKE_API_KEY", "s3cret")
    assert load(IndexerOptions, {}).api_key == "s3cret"
    (line,) = refused(ConductorOptions, {"api_key_file": str(key)})
    assert "said twice" in line
    assert "s3cret" not in line


@pytest.mark.parametrize("content", [None, "", "\xff"])
def test_a_file_with_a_key_that_says_none_is_refused(tmp_path, content):
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content.encode("latin-1"))
    (line,) = refused(ConductorOptions, {"api_key_file": str(key)})
    assert str(key) in line


def test_only_settings_can_be_said(monkeypatch):
    for name in ("ROLE", "SHARE_PORT", "SERVED_NAME", "ORIGINS", "SOURCE"):
        monkeypatch.setenv(f"MOONCAKE_{name}", "x")
    assert load(ConductorOptions, {}) == ConductorOptions()


def test_an_empty_variable_says_nothing(write, monkeypatch):
    monkeypatch.setenv("MOONCAKE_PORT", "")
    assert load(UpOptions, {"config": write("up: {port: 9003}")}).port == 9003


def test_who_said_it_is_told_where_values_do_not_go_together_too(write, monkeypatch):
    monkeypatch.delenv("MOONCAKE_API_KEY", raising=False)
    path = write("gateway:\n  metadata: tcp://127.0.0.1:1\n  host: 0.0.0.0\n")
    with pytest.raises(ConfigError, match=f"host = '0.0.0.0' \\({path}:3\\): others can reach it"):
        load(SECTIONS["gateway"], {"config": path}).checked()


def test_children_know_who_said_what(write):
    options = load(ConductorOptions, {"config": write("conductor: {hold_s: 1}")})
    child = GatewayOptions.decoded(GatewayOptions(**options.shared(GatewayOptions)).encoded())
    assert child.origins == options.origins
