"""The transfer benchmark's arithmetic, and the walk through its pools."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.transfer_peers.rounds import Bar, Cell, Sample, judge, median_of, ratio, rotation, table
from benchmarks.transfer_peers.worker import Contender, pool

CELL = Cell("READ", 4096)
OTHER = Cell("READ", 1 << 20)


def rates(contender: str, *values: float, cell: Cell = CELL) -> list[Sample]:
    """Return one sample per round; latency and CPU are the rate's inverse."""
    return [Sample(i, str(cell), contender, v, 1 / v, 1 / v) for i, v in enumerate(values)]


@given(st.lists(st.integers(), min_size=1, max_size=9, unique=True), st.integers(0, 100))
def test_every_turn_starts_with_the_next_contender_and_has_them_all(items: list[int], turn: int) -> None:
    order = rotation(items, turn)
    assert sorted(order) == sorted(items)
    assert rotation(items, turn + 1)[0] == order[1 % len(items)]


def test_over_as_many_turns_as_contenders_each_is_first_once() -> None:
    assert sorted(rotation("abc", turn)[0] for turn in range(3)) == ["a", "b", "c"]


def test_nobody_to_rotate_is_no_error() -> None:
    assert rotation([], 3) == []


def test_the_median_is_of_one_contender_in_one_cell() -> None:
    samples = [*rates("a", 1, 9, 2), *rates("b", 50), *rates("a", 70, cell=OTHER)]
    assert median_of(samples, "a", CELL, "gb_s") == 2
    assert median_of(samples, "c", CELL, "gb_s") is None


def test_ratios_are_taken_inside_a_round_not_between_medians() -> None:
    # rounds 1 and 2 were twice and ten times as fast for both: the ratio of medians would be 4
    samples = [*rates("a", 8, 4, 20), *rates("b", 2, 4, 1)]
    assert ratio(samples, "a", "b", CELL, "gb_s") == 4
    slow_round = [*rates("a", 1, 10, 100), *rates("b", 2, 10, 40)]
    assert ratio(slow_round, "a", "b", CELL, "gb_s") == 1


def test_a_ratio_above_one_is_better_for_time_too() -> None:
    samples = [*rates("fast", 4), *rates("slow", 1)]
    for figure in ("gb_s", "us", "cpu_s_gb"):
        assert ratio(samples, "fast", "slow", CELL, figure) == pytest.approx(4)


def test_a_round_that_one_of_them_missed_does_not_count() -> None:
    assert ratio([*rates("a", 1, 100), *rates("b", 1)], "a", "b", CELL, "gb_s") == 1
    assert ratio(rates("a", 1), "a", "b", CELL, "gb_s") is None


def test_a_bar_is_judged_by_its_worst_cell() -> None:
    bar = Bar("text", "a", "b", "gb_s", 2.0, (CELL, OTHER))
    samples = [*rates("a", 9), *rates("b", 1), *rates("a", 3, cell=OTHER), *rates("b", 2, cell=OTHER)]
    row = judge(samples, bar)
    assert (row["median"], row["worst"], row["where"], row["met"]) == (5.25, 1.5, str(OTHER), "NO")
    assert judge(samples, Bar("text", "a", "b", "gb_s", 1.5, (CELL, OTHER)))["met"] == "yes"


def test_a_bar_whose_peer_is_absent_is_neither_met_nor_missed() -> None:
    assert judge(rates("a", 1), Bar("text", "a", "b", "gb_s", 1.0, (CELL,)))["met"] == "not measured"


def test_the_table_compares_with_its_first_contender() -> None:
    samples = [*rates("a", 2), *rates("b", 1)]
    assert table(samples, ["a", "b", "c"], [CELL, OTHER], "ratio") == [
        {"": "R 4K", "a": "1", "b": "0.5", "c": "-"}
    ]


@given(st.sampled_from([4096, 65536, 1 << 20]), st.integers(1, 8))
def test_a_walk_meets_every_slot_of_both_pools_before_any_twice(size: int, pages: int) -> None:
    contender = Contender(8 << 20, Path())
    slots = contender.pool_bytes // size
    local: list[int] = []
    remote: list[int] = []
    while len(local) < slots:
        here, there = contender.offsets(size, pages)
        local += here
        remote += there
    whole = list(range(0, contender.pool_bytes, size))
    assert sorted(local[:slots]) == sorted(remote[:slots]) == whole


def test_pools_begin_on_a_page() -> None:
    memory = pool(10_000)
    assert memory.ctypes.data % 4096 == 0
    assert memory.size == 10_000
