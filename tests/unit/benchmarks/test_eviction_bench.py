"""The eviction benchmark's replay: what counts as a hit, what is compared, what is skipped."""

import json
import sys

import pytest

from benchmarks import eviction
from benchmarks.eviction import Prompt, replay

FIRST = Prompt(1_100, [1, 2, 3])  # the third block is partial: 76 tokens
AGAIN = Prompt(1_100, [1, 2, 3])
OTHER = Prompt(600, [1, 9])


@pytest.mark.parametrize("name", eviction.NAMES)
def test_with_room_for_all_every_repeated_token_is_a_hit(name):
    run = replay("made up", [FIRST, AGAIN, OTHER], name, eviction.UNLIMITED)
    assert run.hit_rate == pytest.approx((1_100 + 512) / 2_800)


@pytest.mark.parametrize("name", ["LRU", "LRU" + eviction.IN_NODE])
def test_a_block_after_a_gap_is_no_hit(name):
    # room for two: of the first prompt, used from its end, blocks 1 and 2 stay; then 9 pushes out 2
    run = replay("made up", [FIRST, OTHER, AGAIN], name, 2)
    assert run.hit_rate == pytest.approx((512 + 512) / 2_800)


@pytest.mark.parametrize("name", eviction.POLICIES)
def test_no_policy_holds_more_than_its_capacity(name):
    policy = eviction.POLICIES[name]()
    for start in range(0, 40, 3):
        eviction.use(policy, [bytes([n]) for n in range(start, start + 7)], 5)
        assert len(policy) == 5


def test_rates_are_compared_where_a_reference_is_known():
    assert replay("made up", [FIRST], "LRU", 10_000).reference is None
    assert replay("synthetic", [FIRST], "LRU", 123).reference is None
    run = replay("synthetic", [FIRST], "LFU", 10_000)
    assert (run.reference, run.difference, run.agrees) == (0.368, -0.368, False)


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["eviction", "--quick", *map(str, options)])
    return eviction.main()


def test_absent_traces_are_skipped_by_name(monkeypatch, tmp_path, capsys):
    assert main(monkeypatch, "--traces", tmp_path) == 0
    said = capsys.readouterr().err
    assert "no conversation_trace.jsonl" in said
    assert "no synthetic_trace.jsonl" in said


def test_a_rate_off_its_reference_fails_the_run_and_stands_in_the_json(monkeypatch, tmp_path, capsys):
    line = json.dumps({"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [0, 1]})
    (tmp_path / "conversation_trace.jsonl").write_text(f"{line}\n{line}\n")
    out = tmp_path / "out.json"
    assert main(monkeypatch, "--traces", tmp_path, "--json", out) == 1
    replays = json.loads(out.read_text())["replays"]
    assert {run["hit_rate"] for run in replays} == {0.5}
    assert replays[0]["difference"] == pytest.approx(0.5 - 0.332)
    assert "conversation trace" in capsys.readouterr().out
