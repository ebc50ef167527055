"""CostModel: it learns what is true, ignores what cannot be, and never predicts nonsense."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.cost import ERROR_RATIO_MAX, CostModel

SHAPES = [(n, p) for n in (16, 200, 900, 4000, 12000) for p in (0, 1000, 8000)]


def true_prefill_s(new: int, prefix: int) -> float:
    return 0.02 + 2e-4 * new + 3e-8 * new * (prefix + new / 2)


def test_before_any_measurement_more_work_costs_more():
    cost = CostModel()
    assert 0 < cost.prefill_s(100, 0) < cost.prefill_s(1000, 0) < cost.prefill_s(1000, 1000)
    assert 0 < cost.tbt_s(1, 100) < cost.tbt_s(2, 100) < cost.tbt_s(2, 10_000)


def test_reusing_a_prefix_is_predicted_cheaper_than_computing_it():
    cost = CostModel()
    assert cost.prefill_s(1000, 7000) < cost.prefill_s(8000, 0)


def test_prefill_predictions_converge_to_measurements():
    cost = CostModel()
    for _ in range(20):
        for new, prefix in SHAPES:
            cost.observe_prefill(new, prefix, true_prefill_s(new, prefix))
    for new, prefix in [(500, 500), (2000, 6000), (10_000, 0)]:
        assert cost.prefill_s(new, prefix) == pytest.approx(true_prefill_s(new, prefix), rel=0.03)
    assert cost.errors().prefill_ratio < 0.03
    assert cost.errors().prefill_count == 20 * len(SHAPES)


def test_tbt_predictions_converge_and_follow_a_change_of_speed():
    cost = CostModel()
    for speed in (1.0, 3.0):
        for step in range(300):
            batch, kv = 1 + step % 17, 100 * (1 + step * 7 % 50)
            cost.observe_tbt(batch, kv, speed * (0.004 + 3e-4 * batch + 1e-7 * kv))
        assert cost.tbt_s(8, 2000) == pytest.approx(speed * (0.004 + 24e-4 + 2e-4), rel=0.05)


def test_one_stall_moves_the_prediction_less_than_its_size():
    cost = CostModel()
    for _ in range(50):
        for new, prefix in SHAPES:
            cost.observe_prefill(new, prefix, true_prefill_s(new, prefix))
    before_s = cost.prefill_s(900, 0)
    cost.observe_prefill(900, 0, 1000 * before_s)
    assert cost.prefill_s(900, 0) < ERROR_RATIO_MAX * before_s


def test_steps_that_seem_to_take_no_time_do_not_outweigh_all_others():
    cost = CostModel()
    for step in range(300):
        batch, kv = 1 + step % 8, 200 * (1 + step % 8)
        cost.observe_tbt(batch, kv, 1e-5 if step % 20 == 7 else 0.02 + 1e-3 * batch)
    for batch in (1, 8):
        assert cost.tbt_s(batch, 200 * batch) == pytest.approx(0.02 + 1e-3 * batch, rel=0.4)
    assert cost.tbt_s(2, 3000) < 0.05  # nor is what was never seen said to take for ever


def test_a_machine_many_times_slower_than_expected_is_known_after_a_few_measurements():
    cost = CostModel()
    slow = 40 * cost.prefill_s(1000, 0)
    for _ in range(5):
        cost.observe_prefill(1000, 0, slow)
    assert cost.prefill_s(1000, 0) == pytest.approx(slow, rel=0.2)
    for _ in range(5):
        cost.observe_tbt(8, 1000, 1.0)
    assert cost.tbt_s(8, 1000) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_impossible_measurements_are_counted_and_ignored(seconds):
    cost = CostModel()
    before = cost.prefill_s(100, 0), cost.tbt_s(1, 1), cost.transfer_s(100, remote=True)
    cost.observe_prefill(100, 0, seconds)
    cost.observe_tbt(1, 1, seconds)
    cost.observe_transfer(100, seconds, remote=True)
    assert (cost.prefill_s(100, 0), cost.tbt_s(1, 1), cost.transfer_s(100, remote=True)) == before
    assert cost.errors().rejected_count == 3


def test_transfer_learns_own_node_and_remote_bandwidth_apart():
    cost = CostModel()
    local_s = cost.transfer_s(1 << 30, remote=False)
    for _ in range(100):
        cost.observe_transfer(1 << 30, 10.0, remote=True)
    assert cost.transfer_s(1 << 30, remote=True) == pytest.approx(10.0, rel=0.01)
    assert cost.transfer_s(1 << 30, remote=False) == local_s
    assert cost.transfer_s(0, remote=True) == 0.0


def test_empty_transfers_say_nothing():
    cost = CostModel()
    before_s = cost.transfer_s(100, remote=True)
    cost.observe_transfer(0, 5.0, remote=True)
    assert cost.transfer_s(100, remote=True) == before_s


def test_expected_output_follows_what_requests_emit_and_respects_their_limit():
    cost = CostModel()
    for _ in range(100):
        cost.observe_output(40)
    assert cost.output_tokens(1000) == pytest.approx(40, abs=1)
    assert cost.output_tokens(8) == 8
    cost.observe_output(0)
    assert cost.output_tokens(1) == 1


OBSERVED = st.lists(
    st.tuples(st.integers(0, 200_000), st.integers(0, 200_000), st.floats(1e-6, 3600.0)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(OBSERVED)
def test_whatever_is_measured_predictions_stay_finite_positive_and_growing(observed):
    cost = CostModel()
    for new, prefix, seconds in observed:
        cost.observe_prefill(new, prefix, seconds)
        cost.observe_tbt(new, prefix, seconds)
        cost.observe_transfer(new, seconds, remote=True)
    assert min(*cost.prefill_coefficients(), *cost.tbt_coefficients()) >= 0
    small_s, large_s = cost.prefill_s(10, 10), cost.prefill_s(1000, 1000)
    assert 0 < small_s <= large_s < math.inf
    assert 0 < cost.tbt_s(1, 1) <= cost.tbt_s(100, 100_000) < math.inf
    assert 0 < cost.transfer_s(1, remote=True) < math.inf


def test_the_same_measurement_for_hours_does_not_blow_up():
    cost = CostModel()
    for _ in range(5000):
        cost.observe_prefill(512, 0, 0.1)
    assert cost.prefill_s(512, 0) == pytest.approx(0.1, rel=1e-3)
    cost.observe_prefill(4096, 0, 0.8)
    assert 0.1 < cost.prefill_s(4096, 0) < 10
    assert cost.prefill_s(512, 0) == pytest.approx(0.1, rel=0.5)
