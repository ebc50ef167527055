"""Changes of roles: drained, bounded, leased, and refused where they make no sense."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.planner import Member
from conductor.roles import Changes, Order, check_change
from mooncake.core.errors import RequestError
from mooncake.core.messages import DRAINING


def member(name: str, role: str) -> Member:
    return Member(
        instance_id=name, role=role, queue_s=0.0, prefill_requests=0, decode_requests=0, decode_kv_tokens=0,
        kv_tokens_max=1000, sequences_max=8,
    )  # fmt: skip


def test_an_instance_drains_and_takes_its_new_role_when_it_has_nothing_left():
    changes = Changes(drain_s=30.0)
    assert changes.begin(0.0, "a", "decode") == Order("a", DRAINING, 45.0)
    assert "a" in changes
    assert changes.step(1.0, lambda _: True) == []
    assert changes.step(2.0, lambda _: False) == [Order("a", "decode")]
    assert "a" not in changes
    assert changes.step(3.0, lambda _: False) == []


def test_an_answer_without_end_does_not_keep_it_from_its_new_role():
    changes = Changes(drain_s=30.0)
    changes.begin(0.0, "a", "decode")
    assert changes.step(29.9, lambda _: True) == []
    assert changes.step(30.0, lambda _: True) == [Order("a", "decode")]


def test_who_is_gone_gets_no_order():
    changes = Changes()
    changes.begin(0.0, "a", "decode")
    assert changes.step(1.0, lambda _: None) == []
    assert "a" not in changes


def test_a_change_can_be_turned_round():
    changes = Changes()
    changes.begin(0.0, "a", "decode")
    changes.begin(1.0, "a", "prefill")
    assert changes.step(2.0, lambda _: False) == [Order("a", "prefill")]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["prefill", "decode"]), st.booleans()), max_size=30
    ),
    st.floats(0.1, 50),
)
def test_every_change_ends_in_the_role_that_was_asked_for_last(steps, drain_s):
    changes, wanted, told, now_s = Changes(drain_s), {}, {}, 0.0
    for name, role, busy in steps:
        now_s += 1.0
        wanted[name] = role
        order = changes.begin(now_s, name, role)
        told[name] = order.role
        assert order.hold_s > drain_s  # the lease outlasts the drain
        for order in changes.step(now_s, lambda _, busy=busy: busy):
            told[order.instance_id] = order.role
    for order in changes.step(now_s + drain_s, lambda _: True):
        told[order.instance_id] = order.role
    assert told == wanted


PAIR = {"p0": member("p0", "prefill"), "p1": member("p1", "prefill"), "d0": member("d0", "decode")}


def test_what_somebody_asks_for_is_checked():
    check_change(PAIR, "p0", "decode")
    for name, role, why in (
        ("p0", "both", "must be prefill or decode"),
        ("x", "decode", "no instance 'x' is alive; there are p0, p1, d0"),
        ("p0", "prefill", "is prefill already"),
        ("d0", "prefill", "the last decode instance"),
    ):
        with pytest.raises(RequestError, match=why):
            check_change(PAIR, name, role)
    with pytest.raises(RequestError, match="b0 is both"):
        check_change(PAIR | {"b0": member("b0", "both")}, "b0", "decode")
