"""Traces: what is refused, what a rescaled or generated one is like."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.sim.profile import DEFAULT, read_profile
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, read_trace, rescale, sessions_of, synthesize
from mooncake.core.errors import ConfigError

GOOD = {"timestamp": 27, "input_length": 513, "output_length": 2, "hash_ids": [0, 1]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_reads_lines_of_the_public_traces(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, GOOD | {"timestamp": 3000})
    assert read_trace(path) == [
        TraceRequest(0.027, 513, 2, (0, 1)),
        TraceRequest(3.0, 513, 2, (0, 1)),
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {"timestamp": -1},
        {"timestamp": 1 << 60},
        {"timestamp": 26},  # before the line above
        {"input_length": 0},
        {"input_length": 512},  # one block, two names
        {"output_length": 0},
        {"hash_ids": [0, -1]},
        {"hash_ids": None},
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, bad: dict[str, object]) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, GOOD | bad)
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 2"):
        read_trace(path)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no request"):
        read_trace(write(tmp_path / "t.jsonl"))
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        read_trace(tmp_path / "none.jsonl")


def test_rescaling_shifts_the_window_to_0_and_divides_by_the_speed() -> None:
    trace = [TraceRequest(float(at), 1, 1, (0,)) for at in range(10)]
    kept = rescale(trace, speed=2, start_s=4, length_s=3)
    assert [one.arrival_s for one in kept] == [0.0, 0.5, 1.0]


def test_sampling_and_spreading_keep_order_and_follow_the_seed() -> None:
    trace = [TraceRequest(3.0 * (at // 10), 1, 1, (at,)) for at in range(1000)]
    one, same, other = (rescale(trace, sample=0.5, spread_s=3, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert 400 < len(one) < 600
    assert [r.arrival_s for r in one] == sorted(r.arrival_s for r in one)
    assert all(r.arrival_s - 3 <= trace[r.hash_ids[0]].arrival_s <= r.arrival_s for r in one)


@pytest.mark.parametrize(
    "bad", [{"speed": 0}, {"sample": 0}, {"sample": 2}, {"start_s": -1}, {"start_s": 99}]
)
def test_rescaling_to_nonsense_or_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        rescale([TraceRequest(0.0, 1, 1, (0,))], **bad)


@given(count=st.integers(1, 60), seed=st.integers(0, 5))
def test_generated_blocks_commit_to_their_prefix(count: int, seed: int) -> None:
    requests = synthesize(count, 2.0, seed)
    assert requests == synthesize(count, 2.0, seed)
    before: dict[int, tuple[int, ...]] = {}
    for one in requests:
        assert len(one.hash_ids) == -(-one.input_tokens // BLOCK_TOKENS)
        for depth, block in enumerate(one.hash_ids):
            prefix = tuple(one.hash_ids[:depth])
            assert before.setdefault(block, prefix) == prefix


def test_generated_conversations_repeat_themselves() -> None:
    requests = synthesize(500, 2.0, 0)
    asked = [block for one in requests for block in one.hash_ids]
    assert 0.3 < 1 - len(set(asked)) / len(asked) < 0.9


# ---------------------------------------------------------------- profiles


def test_the_default_profile_reproduces_the_papers_prefill_times() -> None:
    """FAST'25, Figure 14: no cache."""
    profile = read_profile(DEFAULT)
    for tokens, seconds in ((8192, 0.96), (16384, 2.03), (32768, 4.44), (65536, 10.5), (131072, 27.45)):
        assert profile.prefill_s(tokens, 0) == pytest.approx(seconds, rel=0.025)
    for tokens, seconds in ((8192, 3.42), (131072, 3.91)):
        assert 128 * profile.step_s(1, tokens) == pytest.approx(seconds, rel=0.025)


def test_a_profile_file_of_ones_own_is_read_by_table(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    numbers = {k: v for k, v in _fields().items() if k != "about"}
    text = "\n".join(f"{key} = {value}" for key, value in numbers.items())
    path.write_text(f"[a]\n{text}\n[b]\n{text}\nabout = 'second'\n")
    assert read_profile(str(path)).about == ""
    assert read_profile(f"{path}:b").about == "second"
    with pytest.raises(ConfigError, match="'c'"):
        read_profile(f"{path}:c")


@pytest.mark.parametrize("line", ["speed = 1", "egress_bytes_s = 0", "decode_step_s = 'x'"])
def test_a_profile_with_a_wrong_value_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "own.toml"
    key = line.partition(" ")[0]
    numbers = {k: v for k, v in _fields().items() if k not in {"about", key}}
    path.write_text("[a]\n" + "\n".join(f"{k} = {v}" for k, v in numbers.items()) + f"\n{line}\n")
    with pytest.raises(ConfigError, match=key):
        read_profile(str(path))


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=DEFAULT):
        read_profile("nothing")


def _fields() -> dict[str, object]:
    profile = read_profile(DEFAULT)
    return {name: getattr(profile, name) for name in profile.__struct_fields__}


def test_sessions_of_a_trace_go_on_with_blocks_of_their_own() -> None:
    prompts = [[0, 1, 2], [0, 3], [0, 1, 2, 4, 5], [0, 6], [0, 1, 2, 4, 7], [0, 3, 8]]
    requests = [TraceRequest(float(n), 512 * len(ids), 1, ids) for n, ids in enumerate(prompts)]
    assert sessions_of(requests) == ["0", "1", "0", "3", "0", "1"]
