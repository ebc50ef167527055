"""`mooncake config`: what holds and who said it; what is wrong with a file; the page of all settings."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from mooncake import cli, settings_page
from mooncake.core.options import SECTIONS
from mooncake.core.options_base import settings_of

runner = CliRunner()


def run(*args: str):
    return runner.invoke(cli.app, ["config", *args])


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "m.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return written


def test_it_imports_no_engine():
    code = (
        "import sys; from mooncake import cli; sys.argv = ['mooncake', 'config', 'show', '--json']\n"
        "try: cli.app()\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "vllm", "numpy", "transformers", "zmq"} & set(loaded.split())


@pytest.mark.parametrize("process", SECTIONS)
def test_every_process_shows_its_settings_though_some_have_to_be_said(process):
    result = run("show", process, "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.output)) == list(settings_of(SECTIONS[process]))


def test_values_are_shown_with_who_said_them_and_secrets_are_not(write, monkeypatch):
    monkeypatch.setenv("MOONCAKE_API_KEY", "s3cret")
    monkeypatch.setenv("MOONCAKE_PORT", "9000")
    path = write("conductor: {hold_s: 2, vllm_args: [--hf-token, s3cret]}")
    shown = run("show", "conductor", "--config", path)
    assert "s3cret" not in shown.output
    values = json.loads(run("show", "conductor", "--config", path, "--json").output)
    assert values["hold_s"] == {"value": "2", "origin": f"{path}:1", "reloads": True}
    assert values["port"] == {"value": "9000", "origin": "MOONCAKE_PORT", "reloads": False}
    assert values["api_key"]["value"] == "(set)"
    assert values["kv_memory" if "kv_memory" in values else "block_size"]["origin"] == "default"


def test_a_variable_with_a_slip_is_pointed_out_and_those_of_others_are_not(monkeypatch):
    monkeypatch.setenv("MOONCAKE_TTFT_SLO", "5")
    monkeypatch.setenv("MOONCAKE_SECRET_FILE", "/s")
    monkeypatch.setenv("MOONCAKE_MASTER", "upstream's")
    monkeypatch.setenv("MOONCAKE_GATEWAY_SERVICE_HOST", "Kubernetes'")
    monkeypatch.setenv("MOONCAKE_GATEWAY_SERVICE_PORT_HTTP", "Kubernetes'")
    result = run("show", "up", "--json")
    assert result.stderr.splitlines() == [
        "MOONCAKE_TTFT_SLO: no such setting; did you mean MOONCAKE_TTFT_SLO_S?"
    ]
    assert json.loads(result.stdout)["ttft_slo_s"]["value"] == "0"


def test_a_right_file_is_said_to_be_right(write, monkeypatch):
    monkeypatch.setenv("MOONCAKE_PORT", "wrong: another machine's business")
    tenants = write('[tenants.a]\nkeys_env = ["A_KEY"]\n[tenants.b]\nkeys_env = ["B_KEY"]\n', "t.toml")
    result = run(
        "check", write(f"common: {{metadata: tcp://10.0.0.1:7700}}\nconductor: {{tenants: {tenants}}}")
    )
    assert result.exit_code == 0, result.output
    assert "right, for common, conductor" in result.output


def test_all_that_is_wrong_anywhere_is_told_and_exit_code_2(write):
    tenants = write("[tenants.a]\nweight = -1\n", "t.toml")
    result = run("check", write(
        f"common: {{lock_level: x}}\nconductor: {{tenants: {tenants}}}\nstore: {{capacity: 1}}\n"
        "decode: {block_size: 33, max_num_batched_tokens: 8}\nup: {prefill: 0}\nother: {}\n"
    ))  # fmt: skip
    assert result.exit_code == 2
    lines = result.output.splitlines()
    for told in ("lock_level", "weight = -1", "capacity = '1'", "block_size = '33'", "--aggregated", "other"):
        assert sum(told in line for line in lines) == 1, (told, lines)


def test_a_file_without_sections_needs_a_name(write):
    path = write("port: 0")
    assert "--process" in run("check", path).output
    result = run("check", path, "--process", "up")
    assert (result.exit_code, "port = '0'" in result.output) == (2, True)
    assert run("check", write("port: 1"), "--process", "up").exit_code == 0
    assert run("show", "nobody").exit_code == 2


def test_the_page_has_all_settings_as_they_are():
    path = Path(__file__).parents[3] / "docs" / "configuration.md"
    advice = "run `python -m mooncake.settings_page docs/configuration.md`"
    assert settings_page.page(path.read_text()) == path.read_text(), advice


def test_the_file_on_the_page_is_right(write):
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    tenants = write("", "t.toml")
    result = run("check", write(example.replace("/etc/mooncake/tenants.toml", tenants)))
    assert result.exit_code == 0, result.output


def test_editors_get_a_schema_that_takes_what_is_right_and_nothing_else():
    made = json.loads(run("schema").output)
    validator = jsonschema.Draft202012Validator(made)
    validator.check_schema(made)
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    for text in (
        example,
        "store: {hugepages: off, node: 007, ssd: }",
        "up: {cores: 0, vllm_args: [a]}\nstore:",
        "{}",
    ):
        validator.validate(yaml.safe_load(text))
    for text in ("up: {prt: 1}", "up: {port: 0}", "other: {}", "up: {api_key: k}", "common: {policy: best}"):
        assert not validator.is_valid(yaml.safe_load(text)), text
