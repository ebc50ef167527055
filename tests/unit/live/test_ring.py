"""What the live page remembers: the last minutes of what the boards read, in bounded memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.live import ring as ring_module
from mooncake.live.promql import evaluate
from mooncake.live.ring import Part, Ring, part_of
from mooncake.live.samples import NAME

A, B = Part("gateway-0", "http://h:1/metrics", "h:1"), Part("store-n", "http://h:2/metrics", "h:2")
PAGE = """\
# HELP kept_total Of something.
# TYPE kept_total counter
kept_total{{role="x",text="a \\"b\\" {{c}} d"}} {value}
kept_total{{role="y"}} 2.5e+03
other_total 7
kept_bucket{{le="+Inf"}} {value}
"""


def series(ring: Ring, name: str) -> dict:
    found = ring.samples([name])
    return {tuple(dict(labels).items()): found.values[i].tolist() for i, labels in enumerate(found.labels)}


def test_it_keeps_what_it_was_told_to_with_the_labels_of_the_process():
    ring = Ring(["kept_total"])
    ring.add(10.0, {A: PAGE.format(value=1)})
    ring.add(15.0, {A: PAGE.format(value=3)})
    found = ring.samples(["kept_total", "other_total"])
    assert found.times_s.tolist() == [10.0, 15.0]
    own = {"job": "mooncake", "process": "gateway-0", "instance": "h:1", NAME: "kept_total"}
    assert [dict(labels) for labels in found.labels] == [
        {"role": "x", "text": 'a "b" {c} d', **own},
        {"role": "y", **own},
    ]
    assert found.values.tolist() == [[1.0, 3.0], [2500.0, 2500.0]]
    assert ring.status()["series"] == 3  # and `up`


def test_a_label_of_the_process_wins_and_the_series_own_is_kept_beside_it():
    ring = Ring(["kept"])
    ring.add(0.0, {A: 'kept{instance="prefill-0"} 1\n'})
    (labels,) = ring.samples(["kept"]).labels
    assert dict(labels)["instance"] == "h:1"
    assert dict(labels)["exported_instance"] == "prefill-0"


def test_who_does_not_answer_is_down_and_leaves_a_hole():
    ring = Ring(["up", "kept_total"])
    for at_s, page in ((0.0, PAGE.format(value=1)), (5.0, None), (10.0, PAGE.format(value=9))):
        ring.add(at_s, {A: page, B: ""})
    answer = evaluate('up{process="gateway-0"}', ring.samples(["up"]), np.array([0.0, 5.0, 10.0]))
    assert answer[0].values.tolist() == [1.0, 0.0, 1.0]
    (kept,) = evaluate('kept_total{role="x"}', ring.samples(["kept_total"]), np.array([0.0, 5.0, 10.0]))
    assert kept.there.tolist() == [True, False, True]


def test_the_oldest_rounds_go_and_series_that_ended_make_room():
    ring = Ring(["kept"], rounds=4, series_max=4)
    for i in range(12):
        ring.add(float(i), {A: f'kept{{i="{i // 4}"}} {i}\n'})
    found = ring.samples(["kept"])
    assert found.times_s.tolist() == [8.0, 9.0, 10.0, 11.0]
    (row,) = (i for i, labels in enumerate(found.labels) if dict(labels)["i"] == "2")
    assert found.values[row].tolist() == [8.0, 9.0, 10.0, 11.0]
    assert ring.status()["dropped"] == 0
    for i in range(12, 40):
        ring.add(float(i), {A: ""})
    assert ring.status()["series"] == 1  # up


def test_more_series_than_there_is_room_for_are_counted_and_not_kept():
    ring = Ring(["kept"], series_max=8)
    ring.add(0.0, {A: "".join(f'kept{{i="{i}"}} 1\n' for i in range(10))})
    assert ring.status() == {"series": 8, "dropped": 3, "span_s": 0.0}
    assert len(ring.samples(["kept"]).labels) == 7


def test_the_table_grows_to_its_bound(monkeypatch):
    monkeypatch.setattr(ring_module, "SERIES_FIRST", 2)
    ring = Ring(["kept"], rounds=3)
    ring.add(0.0, {A: "".join(f'kept{{i="{i}"}} {i}\n' for i in range(9))})
    assert sorted(ring.samples(["kept"]).values[:, 0].tolist()) == [float(i) for i in range(9)]


@pytest.mark.parametrize(
    "page", ["kept", "kept{", 'kept{a="b} 1', "kept nothing", "kept{a='b'} 1", "\x00", "kept{}}{ 1", "é 1"]
)
def test_a_line_that_is_none_is_left_out(page):
    ring = Ring(["kept", "é", "\x00"])
    ring.add(0.0, {A: f'{page}\nkept{{ok="1"}} 5\n'})
    assert [5.0] in ring.samples(["kept"]).values.tolist()


def test_a_series_with_endless_labels_is_left_out():
    ring = Ring(["kept"])
    ring.add(0.0, {A: f'kept{{a="{"x" * 5000}"}} 1\n'})
    assert ring.samples(["kept"]).labels == []


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_it_answers_as_a_list_of_the_last_rounds_would(rounds):
    ring = Ring(["kept"], rounds=5, series_max=100)
    for at, present in enumerate(rounds):
        ring.add(float(at), {A: "".join(f'kept{{i="{i}"}} {at}\n' for i in sorted(set(present)))})
    recent = list(enumerate(rounds))[-5:]
    found = ring.samples(["kept"])
    assert found.times_s.tolist() == [float(at) for at, _ in recent]
    known = {}
    for row, labels in enumerate(found.labels):
        values = [None if np.isnan(value) else int(value) for value in found.values[row]]
        if any(value is not None for value in values):
            known[int(dict(labels)["i"])] = values
    wanted = {i for _, present in recent for i in present}
    assert known == {i: [at if i in present else None for at, present in recent] for i in wanted}


def test_parts_are_named_as_prometheus_names_targets():
    assert part_of("p", "http://10.0.0.1:9/metrics") == Part("p", "http://10.0.0.1:9/metrics", "10.0.0.1:9")
