"""What role an instance registers with, by the orders it was given."""

from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.messages import RoleOrder
from mooncake.worker.role import HeldRole


def test_without_orders_it_is_what_it_was_started_as():
    assert HeldRole("prefill").now(1e9) == "prefill"


def test_an_order_for_good_stays():
    role = HeldRole("prefill")
    role.order(1.0, RoleOrder("decode"))
    assert (role.now(1.0), role.now(1e9)) == ("decode", "decode")


def test_a_drain_that_nobody_ends_is_over_when_its_time_is():
    role = HeldRole("prefill")
    role.order(1.0, RoleOrder("draining", 45.0))
    assert (role.now(45.9), role.now(46.0)) == ("draining", "prefill")


def test_a_second_drain_does_not_forget_what_the_instance_was_before():
    role = HeldRole("prefill")
    role.order(1.0, RoleOrder("draining", 10.0))
    role.order(2.0, RoleOrder("draining", 10.0))
    assert (role.now(11.9), role.now(12.0)) == ("draining", "prefill")


orders = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.sampled_from(["prefill", "decode", "draining"]),
        st.sampled_from([0.0, 5.0, 30.0]),
    ),
    max_size=8,
)


@given(orders)
def test_in_the_end_it_has_the_last_role_that_was_given_for_good(given_orders):
    role, now_s, lasting = HeldRole("prefill"), 0.0, "prefill"
    for wait_s, name, hold_s in given_orders:
        now_s += wait_s
        role.order(now_s, RoleOrder(name, hold_s))
        assert role.now(now_s) == name
        if not hold_s:
            lasting = name
    assert role.now(now_s + 31.0) == lasting
