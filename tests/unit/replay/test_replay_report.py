"""What a replay reports of outcomes made by hand, and `mooncake bench` as a command."""

import json
import sys
from array import array

import pytest
from typer.testing import CliRunner

from benchmarks.replay.client import Outcome
from benchmarks.replay.report import plot, rows, summarize, tail_s, warnings
from benchmarks.replay.run import targets_of
from mooncake.cli import app
from mooncake.core.errors import ConfigError


def answered(number: int, ttft_s: float = 1.0, gaps=(0.01,) * 20, **more) -> Outcome:
    fields = {"late_s": 0.0, "status": 200, "answered_s": 0.1, "end_s": number + 5.0, "input_tokens": 100}
    fields |= {"cached_tokens": 25, "output_tokens": 21, **more}
    return Outcome(number=number, due_s=float(number), ttft_s=ttft_s, gaps_s=array("d", gaps), **fields)


def refused(number: int, retry_after_s: float = 2.0) -> Outcome:
    return Outcome(
        number=number, due_s=float(number), late_s=0.0, status=429, error="full", answered_s=0.02,
        retry_after_s=retry_after_s, end_s=number + 0.02,
    )  # fmt: skip


def test_the_longest_tenth_decides():
    assert tail_s(answered(0, gaps=[0.01] * 18 + [0.3, 0.5])) == pytest.approx(0.4)
    assert tail_s(answered(0, gaps=[])) == 0


def test_goodput_counts_only_what_was_answered_within_both_objectives():
    slow_start, slow_tokens = answered(1, ttft_s=31.0), answered(2, gaps=[0.2] * 20)
    broken = answered(3, error="the stream broke off")
    outcomes = [answered(0), slow_start, slow_tokens, broken, refused(4), answered(10)]
    got = summarize(outcomes, 30.0, 0.1)
    assert got.attainment == pytest.approx(2 / 6)
    assert got.goodput == pytest.approx(2 / 15)  # until the last end
    assert (got.served, got.rejected, got.failed) == (4, {"429": 1}, {"the stream broke off": 1})
    assert got.hit_rate == 0.25
    assert got.output_tokens == 4 * 21
    assert got.rejection_s.p99 == 0.02


def test_in_flight_counts_from_sent_to_end():
    assert summarize([answered(0), answered(1), answered(20)], 30.0, 0.1).in_flight_max == 2


def test_a_reader_is_warned_of_what_spoils_the_figures():
    late = summarize([answered(0, late_s=0.5)], 30.0, 0.1)
    silent = summarize([refused(0, -1.0)], 30.0, 0.1)
    found = warnings({"late": late, "silent": silent, "good": summarize([answered(0)], 30.0, 0.1)})
    assert [
        "sent 0.50 s late" in found[0],
        "without Retry-After" in found[1],
        "nothing was answered" in found[2],
    ]
    assert len(found) == 3


def test_a_table_has_a_column_for_every_run_and_a_line_for_every_kind_of_end():
    runs = {
        "a": summarize([answered(0), refused(1)], 30.0, 0.1),
        "b": summarize([answered(0, error="ReadError: gone")], 30.0, 0.1),
    }
    lines = dict(rows(runs))
    assert lines["rejected, 429"] == ["1", "0"]
    assert lines["failed: ReadError"] == ["0", "1"]
    assert lines["answered of sent"] == ["1 of 2", "0 of 1"]


def test_a_picture_is_drawn_also_of_a_run_in_which_all_failed(tmp_path):
    pytest.importorskip("matplotlib")
    plot(str(tmp_path / "p.svg"), {"a": [answered(0)], "b": [refused(0)]}, "title", (30.0, 0.1))
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()
    with pytest.raises(ConfigError, match="plot"):
        plot(str(tmp_path / "none" / "p.svg"), {"a": [answered(0)]}, "title", (30.0, 0.1))


OPTIONS = {
    "model": "",
    "api_key": "",
    "chat": False,
    "ignore_eos": True,
    "timeout_s": 1.0,
    "in_flight_max": 1,
}


def test_endpoints_may_have_names():
    found = targets_of(["ours=http://h:1/v1/", "http://h:2"], **OPTIONS)
    assert {name: one.url for name, one in found.items()} == {
        "ours": "http://h:1",
        "http://h:2": "http://h:2",
    }


@pytest.mark.parametrize("urls", [["h:1"], ["a=http://h:1", "a=http://h:2"], ["x=ftp://h"]])
def test_what_is_no_endpoint_is_refused(urls):
    with pytest.raises(ConfigError, match="url"):
        targets_of(urls, **OPTIONS)


def bench(*options: str):
    return CliRunner().invoke(app, ["bench", *options])


def test_the_command_replays_reports_and_keeps_the_key_to_itself(endpoint, tmp_path):
    found = tmp_path / "found.json"
    endpoint.plan = {2: "refuse"}
    got = bench(
        "--url", f"one={endpoint.url}", "--requests", "8", "--rate", "200", "--scale", "0.01",
        "--api-key", "secret", "--json", str(found),
    )  # fmt: skip
    assert got.exit_code == 0, got.output
    assert "goodput" in got.output
    run = json.loads(found.read_text())["runs"]["one"]
    assert (run["requests"], run["served"], run["rejected"]) == (8, 7, {"429": 1})
    assert "secret" not in got.output + found.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trace", "/none"], "/none"),
        (["--url", "nothing"], "url"),
        (["--ttft-slo-s", "0"], "objectives"),
        (["--in-flight-max", "0"], "in_flight_max"),
        (["--speed", "-1"], "speed"),
        (["--scale", "99"], "scale"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_an_exit_code(options, said):
    got = bench(*options)
    assert got.exit_code != 0
    assert said in got.output
    assert "Traceback" not in got.output


def test_a_picture_that_nobody_can_draw_is_refused_before_anything_is_sent(endpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    got = bench("--url", endpoint.url, "--requests", "2", "--plot", str(tmp_path / "p.svg"))
    assert got.exit_code == 2
    assert "--plot needs matplotlib" in got.output
    assert not endpoint.bodies
