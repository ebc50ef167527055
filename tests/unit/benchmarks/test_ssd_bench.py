"""The SSD benchmark compares with the loop that is best over all rounds, and inside each round."""

from benchmarks.ssd_tier import judge


def test_the_loop_with_the_best_median_counts_and_ratios_are_taken_round_by_round():
    gb_s = {"tier": [0.8, 1.6, 0.9], "x8": [1.0, 2.0, 1.0], "x16": [3.0, 0.5, 0.5]}
    row = judge("READ", 1 << 20, gb_s)
    assert (row["threads"], row["loop GB/s"], row["tier GB/s"]) == ("x8", 1.0, 0.9)
    assert (row["ratio"], row["least"], row["most"]) == (0.8, 0.8, 0.9)
    assert row["bar"] == "0.8 met"


def test_a_missed_bar_says_so_and_writes_have_none():
    gb_s = {"tier": [0.7], "x8": [1.0]}
    assert judge("READ", 1 << 20, gb_s)["bar"] == "0.8 MISSED"
    assert judge("WRITE", 1 << 20, gb_s)["bar"] == "-"
