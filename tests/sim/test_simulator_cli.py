"""`mooncake simulate`: what it prints and writes, and how it refuses."""

import base64
import json
import re
import shlex
import sys
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


BROKEN = [
    "--mtbf-s",
    "60",
    "--repair-s",
    "5",
    "--rate",
    "12",
    "--admission",
    "objectives",
    "--ttft-slo-s",
    "3",
]


def test_a_report_is_one_page_with_its_pictures_inside_and_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.sim.page.DPI", 20)  # quicker
    folder = tmp_path / "r"
    got = runner.invoke(cli.app, [*SMALL, *BROKEN, "--seed", "2", "--report", str(folder)])
    assert got.exit_code == 0, got.output
    names = ["cache", "latency", "load", "refused", "roles"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "cache.png", "index.html", "latency.png", "load.png", "refused.png", "results.json", "roles.png"
    ]  # fmt: skip
    page = (folder / "index.html").read_text()
    for name in names:
        picture = (folder / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert base64.b64encode(picture).decode() in page
    assert page.count("<img") == len(names)
    assert "http" not in page.replace("http-equiv", "")
    digest = json.loads((folder / "results.json").read_text())["runs"]["kvcache"]["digest"]
    assert f"digest: kvcache {digest}" in got.output
    assert f"<td>{digest}</td>" in page
    (command,) = re.findall("<code>(.*)</code>", page)
    again = runner.invoke(cli.app, shlex.split(command)[1:])
    assert f"digest: kvcache {digest}" in again.output
    assert list(tmp_path.iterdir()) == [folder]


def test_a_report_takes_the_place_of_the_one_before_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.sim.page._picture", lambda *_: b"a picture")
    folder, figures = tmp_path / "r", tmp_path / "r.json"
    args = [*SMALL, "--report", str(folder), "--json", str(figures)]
    assert runner.invoke(cli.app, args).exit_code == 0
    before = {path: path.read_bytes() for path in [*folder.iterdir(), figures]}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for where in ("benchmarks.sim.run.run_one", "benchmarks.sim.page.page", "pathlib.Path.rename"):
        with monkeypatch.context() as patched:
            patched.setattr(where, stop)
            assert runner.invoke(cli.app, [*args, "--seed", "5"]).exit_code == 130
        assert {path: path.read_bytes() for path in folder.iterdir()} == {
            path: content for path, content in before.items() if path != figures
        }
        assert sorted(tmp_path.iterdir()) == [folder, figures]
    assert runner.invoke(cli.app, [*args, "--seed", "5"]).exit_code == 0
    assert all(path.read_bytes() != before[path] for path in (folder / "index.html", figures))


def test_a_folder_that_is_no_report_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "thesis.txt").write_text("mine")
    got = runner.invoke(cli.app, [*SMALL, "--report", str(tmp_path)])
    assert got.exit_code == 2
    assert "is no report" in got.stderr.replace("\n", " ")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_without_matplotlib_it_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("benchmarks.sim.run.run_one", lambda *_: pytest.fail("it ran"))
    got = runner.invoke(cli.app, [*SMALL, option, str(tmp_path / "r.svg")])
    assert got.exit_code == 2
    assert f"{option} needs matplotlib: pip install 'mooncake-serving[bench]'" in got.stderr.replace(
        "\n", " "
    )


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
        (["--report", "/nowhere/r"], "/nowhere"),
        (["--kill", "prefill-009@5"], "prefill-009"),
        (["--mtbf-s", "-1"], "mtbf_s"),
        (["--event-loss", "1"], "event_loss"),
        (["--event-delay-s", "-1"], "event_delay_s"),
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
    monkeypatch.setattr("benchmarks.sim.trace.synthesize", lambda *_: long)
    got = runner.invoke(cli.app, SMALL)
    assert got.exit_code == 2
    assert "300001" in got.stderr
