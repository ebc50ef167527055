"""The evaluator of the live page: Prometheus' numbers for what our boards ask, a clear no for the rest.

tests/live/test_against_prometheus.py compares it with a real Prometheus over the same samples.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import RequestError
from mooncake.live.boards import expressions, filled, load_boards, names_read
from mooncake.live.promql import evaluate, names_of
from mooncake.live.samples import NAME, Samples

NAN = math.nan


def labelled(name: str, **labels: str):
    return tuple(sorted({NAME: name, **labels}.items()))


def samples(rows: dict, step_s: float = 5.0) -> Samples:
    """Rows of (name, labels as one text "a=1,b=2") -> values."""
    labels = []
    for name, text in rows:
        pairs = dict(pair.split("=") for pair in text.split(",") if pair)
        labels.append(labelled(name, **pairs))
    values = np.array([list(values) for values in rows.values()], dtype=float)
    if not rows:
        values = values.reshape(0, 0)
    return Samples(step_s * np.arange(values.shape[1] if len(rows) else 0, dtype=float), labels, values)


def at(expression: str, found: Samples, *times_s: float) -> dict:
    """Labels as text -> values at these times (default: the last); None = none."""
    times = np.array(times_s or [found.times_s[-1]], dtype=float)
    answer = {}
    for series in evaluate(expression, found, times):
        text = ",".join(f"{name}={value}" for name, value in series.labels)
        shown = [v if t else None for v, t in zip(series.values.tolist(), series.there, strict=True)]
        answer[text] = shown if times_s else shown[0]
    return answer


COUNTERS = samples(
    {
        ("c", "p=a,role=x"): [0, 10, 20, 30, 40, 50, 60],
        ("c", "p=b,role=x"): [100, 105, 110, 0, 5, 10, 15],  # began again
        ("c", "p=c,role=y"): [NAN, NAN, NAN, NAN, 7, 7, 7],
    }
)


# ------------------------------------------------------------ counters


def test_rate_sees_through_a_restart_of_the_counter():
    assert at("rate(c[20s])", COUNTERS)["p=a,role=x"] == pytest.approx(2.0)
    # samples cover 25 s of the window's 30, and its rest is taken to be as busy
    assert at("increase(c[30s])", COUNTERS)["p=b,role=x"] == pytest.approx((5 + 0 + 5 + 5 + 5) * 30 / 25)


def test_one_sample_makes_no_rate_and_two_make_one():
    assert "p=c,role=y" not in {k for k, v in at("rate(c[20s])", COUNTERS, 20.0).items() if v[0] is not None}
    assert at("rate(c[20s])", COUNTERS, 25.0)["p=c,role=y"] == [0.0]


def test_a_counter_is_not_extrapolated_to_below_zero():
    began = samples({("c", ""): [NAN, NAN, NAN, 1, 11, 21]})
    # 20 in 10 s; at that pace it was 0 half a second before its first sample, not at the window's edge
    assert at("increase(c[15s])", began)[""] == pytest.approx(20 * (10 + 0.5) / 10)


def test_irate_takes_the_last_two_samples():
    assert at("irate(c[1m])", COUNTERS, 15.0)["p=b,role=x"] == [0.0]
    assert at("irate(c[1m])", COUNTERS)["p=b,role=x"] == 1.0


def test_a_hole_ends_a_series_and_its_return_goes_on_counting():
    holes = samples({("g", ""): [1, NAN, 3], ("c", ""): [0, NAN, 10]})
    assert at("g", holes, 0.0, 4.9, 5.0, 10.0) == {"__name__=g": [1.0, 1.0, None, 3.0]}
    assert at("increase(c[20s])", holes)[""] == pytest.approx(10)


def test_a_series_whose_process_is_asked_no_more_ends_after_five_minutes():
    assert at("c", COUNTERS, 30.0 + 299) != {}
    assert at("c", COUNTERS, 30.0 + 300) == {}


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=30),
    st.integers(1, 40),
    st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_increase_is_never_negative_and_adds_little_at_the_edges_of_the_window(steps, begin, range_s):
    counter = samples({("c", ""): begin + np.cumsum(steps)})
    for values in at(f"increase(c[{range_s}s])", counter, *counter.times_s).values():
        for value in values:
            assert value is None or -1e-9 <= value <= sum(steps) * 2.2 + 1e-9


# ------------------------------------------------------------ vectors


def test_aggregations_group_by_and_without():
    assert at("sum by (role) (c)", COUNTERS) == {"role=x": 75.0, "role=y": 7.0}
    assert at("sum without (p) (c)", COUNTERS) == {"role=x": 75.0, "role=y": 7.0}
    assert at("sum(c)", COUNTERS) == {"": 82.0}
    found = [at(f"{how} by (role) (c)", COUNTERS)["role=x"] for how in ("avg", "min", "max", "count")]
    assert found == [37.5, 15.0, 60.0, 2.0]


def test_matchers_choose_and_an_absent_label_is_empty():
    assert list(at('c{p="a"}', COUNTERS)) == ["__name__=c,p=a,role=x"]
    assert list(at('c{p!="a", role=~"x|z"}', COUNTERS)) == ["__name__=c,p=b,role=x"]
    assert len(at('c{p=~".*", nothing=~".*"}', COUNTERS)) == 3
    assert at('c{p=~"a.+"}', COUNTERS) == {}
    assert len(at('c{p!~"a|b"}', COUNTERS)) == len(at('c{nothing="", p="c"}', COUNTERS)) == 1


def test_arithmetic_matches_by_labels_and_drops_the_name():
    pair = samples({("a", "i=1"): [6], ("a", "i=2"): [8], ("b", "i=1"): [3], ("b", "i=3"): [1]})
    assert at("a / b", pair) == {"i=1": 2.0}
    assert at("a + on (i) b", pair) == {"i=1": 9.0}
    assert at("2 * a - 1", pair) == {"i=1": 11.0, "i=2": 15.0}
    assert at("-a", pair) == {"i=1": -6.0, "i=2": -8.0}
    assert at("1 + 2 * 3 ^ 2", pair) == {"": 19.0}


def test_a_comparison_keeps_what_holds_or_says_so():
    assert at("c > 10", COUNTERS) == {"__name__=c,p=a,role=x": 60.0, "__name__=c,p=b,role=x": 15.0}
    assert at("c > bool 20", COUNTERS) == {"p=a,role=x": 1.0, "p=b,role=x": 0.0, "p=c,role=y": 0.0}
    assert at("sum(c) / (sum(c) > 1000)", COUNTERS) == {}


def test_nothing_divided_by_nothing_is_a_value_that_is_no_number():
    (value,) = at("sum(c) * 0 / 0", COUNTERS).values()
    assert math.isnan(value)


def test_or_fills_and_unless_and_and_choose():
    two = samples({("a", "i=1"): [1, NAN], ("b", "i=1"): [5, 6], ("b", "i=2"): [7, 7]})
    assert at("a or b", two, 0.0, 5.0) == {
        "__name__=a,i=1": [1.0, None],
        "__name__=b,i=1": [None, 6.0],
        "__name__=b,i=2": [7.0, 7.0],
    }
    assert at("b unless a", two, 0.0) == {"__name__=b,i=2": [7.0]}
    assert at("b and a", two, 0.0) == {"__name__=b,i=1": [5.0]}
    assert at("sum(a) or vector(0)", two, 0.0, 5.0) == {"": [1.0, 0.0]}


def test_clamp_and_abs():
    assert at("clamp(c, 10, 50)", COUNTERS) == {"p=a,role=x": 50.0, "p=b,role=x": 15.0, "p=c,role=y": 10.0}
    assert at("clamp_min(sum(c), 100)", COUNTERS) == {"": 100.0}
    assert at("clamp_max(abs(0 - sum(c)), 80)", COUNTERS) == {"": 80.0}


def test_a_quantile_of_buckets_is_interpolated_and_the_open_one_tells_its_lower_limit():
    buckets = samples(
        {("h_bucket", "le=0.1"): [5], ("h_bucket", "le=1"): [10], ("h_bucket", "le=+Inf"): [10]}
    )
    assert at("histogram_quantile(0.5, h_bucket)", buckets)[""] == pytest.approx(0.1)
    assert at("histogram_quantile(0.75, h_bucket)", buckets)[""] == pytest.approx(0.55)
    beyond = samples({("h_bucket", "le=0.1"): [5], ("h_bucket", "le=1"): [5], ("h_bucket", "le=+Inf"): [10]})
    assert at("histogram_quantile(0.9, sum by (le) (h_bucket))", beyond)[""] == 1.0
    nobody = samples({("h_bucket", "le=0.1"): [0], ("h_bucket", "le=+Inf"): [0]})
    assert math.isnan(at("histogram_quantile(0.9, h_bucket)", nobody)[""])


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("sum(", "cannot parse"),
        ("predict_linear(c[1m], 5)", "predict_linear is not known"),
        ("max_over_time(rate(c[1m])[5m:1m])", "not known"),
        ("topk(3, c)", "topk is not known"),
        ("c @ 5", "not known"),
        ("a * on (i) group_left () b", "group_left"),
        ('c{p=~"(.{1000}){9}"}', "counts"),
        ("c{p=~`(?x)(.{ 1000}){ 9}`}", "counts"),
        (r'c{p=~"(.\x7b1000}){9}"}', "counts"),
        (r'c{p=~"(.\1731000})"}', "counts"),
        (r'c{p=~"(.\\\u007b1000})"}', "counts"),
        ('c{p=~"' + "a" * 4000 + '"}', "too large"),
        ('c{p=~"[a"}', "regex"),
        ("(" * 3000 + "c" + ")" * 3000, "levels"),
        ("+".join(["c"] * 1000), "operators"),
        ("-" * 500 + "c", "operators"),
        ('c #"\n' + "+" + "(" * 3000 + "c" + ")" * 3000 + ' #"', "comments"),
        ('c #"\n' + "+c" * 3000 + ' #"', "comments"),
        ("c" * 9000, "characters"),
        ('{p="a"}', "without the name"),
        ("c + on (role) c", "same time"),
    ],
)
def test_what_is_not_known_or_could_hang_is_refused_with_a_reason(expression, says):
    two = samples({("c", "p=a"): [1], ("c", "p=b"): [1], ("a", "i=1"): [1], ("b", "i=1"): [1]})
    with pytest.raises(RequestError, match=says):  # noqa: PT012 - either may refuse
        names_of(expression)
        evaluate(expression, two, np.zeros(1))


def test_what_looks_like_a_comment_or_a_count_in_a_name_is_none():
    odd = samples({("c", "p=#{9}"): [1], ("c", r"p=\0"): [2]})
    assert at(r'c{p=~"#\\{9\\}"}', odd) == {"__name__=c,p=#{9}": 1.0}
    assert at(r'c{p=~"\\\\0"}', odd) == {r"__name__=c,p=\0": 2.0}


def test_no_samples_at_all_are_no_error():
    nothing = samples({})
    for expression in ("c", "rate(c[1m])", "sum(c)", "c / c", "histogram_quantile(0.9, c)", "irate(c[1m])"):
        assert evaluate(expression, nothing, np.array([1.0, 2.0])) == []


# ------------------------------------------------------------ the boards


def test_every_query_of_every_board_can_be_evaluated():
    boards = load_boards()
    assert boards
    names = sorted(names_read(boards.values()))
    ones = samples({(name, "le=+Inf" if name.endswith("_bucket") else "i=1"): [1, 2, 3] for name in names})
    for uid, board in boards.items():
        for title, expression in expressions(board):
            try:
                evaluate(filled(expression), ones, np.array([0.0, 5.0, 10.0]))
            except RequestError as error:
                pytest.fail(f"{uid}, {title}: {expression}: {error}")
