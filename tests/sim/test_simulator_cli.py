"""`mooncake simulate`: what it prints and writes, and how it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.sim.trace import TraceRequest
from mooncake import cli

runner = CliRunner()
SMALL = ["simulate", "--requests", "60", "--prefill", "2", "--decode", "2"]


def test_policies_are_compared_in_a_table_a_file_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "r.json", tmp_path / "r.svg"]
    args = ["--policy", "kvcache,random", "--json", str(files[0]), "--plot", str(files[1])]
    got = runner.invoke(cli.app, [*SMALL, *args])
    assert got.exit_code == 0, got.output
    for words in ("kvcache", "random", "TTFT, s, p90", "goodput", "rejected", "120 requests in"):
        assert words in got.output
    written = json.loads(files[0].read_text())
    assert written["options"]["prefill"] == 2
    assert written["runs"]["kvcache"]["requests"] == 60
    assert written["runs"]["kvcache"]["ttft_s"]["p50"] <= written["runs"]["random"]["ttft_s"]["p99"]
    assert "<svg" in files[1].read_text()


def test_a_trace_file_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    trace.write_text("".join(json.dumps(row | {"timestamp": 100 * at}) + "\n" for at in range(20)))
    got = runner.invoke(cli.app, ["simulate", "--trace", str(trace), "--both", "1", "--chunk-tokens", "256"])
    assert got.exit_code == 0, got.output
    assert "t.jsonl, 1x: 1 both" in got.output
    assert "20 requests in" in got.output


def test_admission_turns_requests_away_by_reason() -> None:
    load = ["--requests", "150", "--rate", "10", "--prefill", "1", "--decode", "1", "--ttft-slo-s", "5"]
    got = runner.invoke(cli.app, ["simulate", *load, "--admission", "predicted", "--decode-s", "20"])
    assert got.exit_code == 0, got.output
    assert "predicted time to first token" in got.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--policy", "best"], "kvcache"),
        (["--profile", "best"], "a800-llama2-70b"),
        (["--prefill", "0", "--decode", "0"], "who is to serve"),
        (["--prefill", "100000"], "100000"),
        (["--speed", "0"], "speed"),
        (["--ttft-slo-s", "0"], "objectives"),
        (["--eviction", "best"], "lru"),
        (["--admission", "best"], "predicted"),
        (["--decode-s", "-1"], "decode_s"),
        (["--both", "2", "--plan-roles"], "no role to change"),
        (["--json", "/nowhere/r.json"], "/nowhere/r.json"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(args: list[str], words: str) -> None:
    got = runner.invoke(cli.app, [*SMALL, *args])
    assert got.exit_code == 2
    assert words in got.stderr.replace("\n", " ")
    assert "Traceback" not in got.stderr


def test_a_context_beyond_the_profiles_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [TraceRequest(0.0, 300_000, 1, tuple(range(586)))]
    monkeypatch.setattr("benchmarks.sim.run.synthesize", lambda *_: long)
    got = runner.invoke(cli.app, SMALL)
    assert got.exit_code == 2
    assert "300001" in got.stderr
