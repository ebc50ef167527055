"""OutputLengths: every group has its own lengths, new ones borrow, nothing grows without bound."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.cost import CostModel
from conductor.lengths import ENOUGH, GROUPS_MAX, MEMORY_ANSWERS, OutputLengths

N = int(ENOUGH)


def lengths(*groups: tuple[str, str, list[int]]) -> OutputLengths:
    known = OutputLengths()
    for tenant, slo_class, answers in groups:
        for tokens in answers:
            known.observe(tenant, slo_class, tokens)
    return known


def test_tenants_of_one_class_keep_their_own_lengths():
    known = lengths(("short", "default", [2] * N), ("long", "default", [3000] * N))
    assert known.mean("short", "default") == 2
    assert known.mean("long", "default") == 3000


def test_a_tenant_too_new_to_know_borrows_its_class_and_no_other():
    known = lengths(("a", "batch", [700] * N), ("b", "premium", [5] * N), ("new", "batch", [700] * (N - 1)))
    assert known.mean("new", "batch") == pytest.approx(700)
    assert known.mean("never seen", "batch") == pytest.approx(700)
    assert known.mean("new", "default") is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_quantile_is_right_within_one_step(share):
    random = Random(1)
    answers = [max(1, round(random.expovariate(1 / 300))) for _ in range(900)]
    known = lengths(("t", "default", answers))
    true = sorted(answers)[int(share * len(answers))]
    assert known.quantile("t", "default", share) == pytest.approx(true, rel=0.2)
    assert known.mean("t", "default") == pytest.approx(sum(answers) / len(answers))


def test_what_is_out_already_counts_only_longer_answers_are_left():
    known = lengths(("t", "default", [10] * 100 + [1000] * 100))
    assert known.mean("t", "default") == 505
    assert known.mean("t", "default", beyond=50) == 1000
    assert known.quantile("t", "default", 0.5) == 10
    assert known.quantile("t", "default", 0.5, beyond=50) == 1000
    assert known.mean("t", "default", beyond=5000) is None


def test_old_answers_are_forgotten():
    known = lengths(("t", "default", [4000] * 2000))
    for _ in range(int(MEMORY_ANSWERS) * 4):
        known.observe("t", "default", 10)
    assert known.quantile("t", "default", 0.9) == 10
    assert known.mean("t", "default") < 400


def test_groups_are_bounded_and_the_least_recent_goes():
    known = lengths(("first", "default", [9] * N), ("kept", "default", [9] * N))
    for number in range(GROUPS_MAX):
        known.observe(f"t{number}", "default", 100)
        known.observe("kept", "default", 9)
    assert len(known) == GROUPS_MAX
    assert known.mean("kept", "default") == 9
    assert known.mean("first", "default") > 9  # its class's now


@given(st.lists(st.integers(1, 1 << 22), min_size=N, max_size=3 * N), st.integers(0, 5000))
def test_predictions_lie_among_what_was_seen_and_beyond_what_is_out(answers, beyond):
    known = lengths(("t", "c", answers))
    for value in (known.mean("t", "c", beyond), known.quantile("t", "c", 0.9, beyond)):
        assert value is None or max(beyond, min(answers) - 1) < value <= max([*answers, beyond + 1])
    low, high = (known.quantile("t", "c", share) for share in (0.1, 0.9))
    assert low <= high


def test_the_cost_model_predicts_by_group_once_enough_was_seen_and_by_the_common_mean_before():
    cost = CostModel()
    common = cost.output_tokens(4096)
    assert (
        cost.output_tokens(4096, "chat", "default")
        == cost.output_tokens_high(4096, "chat", "default")
        == common
    )
    for number in range(4 * N):
        cost.observe_output(1, "judge", "default")
        cost.observe_output(100 if number % 4 else 2000, "chat", "default")
    assert cost.output_tokens(4096, "judge", "default") == 1
    assert cost.output_tokens(4096, "chat", "default") == 575
    assert cost.output_tokens_high(4096, "chat", "default") == 2000
    assert cost.output_tokens(64, "chat", "default") == cost.output_tokens_high(64, "chat", "default") == 64
    assert cost.output_tokens(4096, "chat", "default", 500) == 2000


def test_errors_of_predicted_lengths_fall_when_lengths_are_learned():
    cost = CostModel()
    cost.observe_output(1000)
    assert cost.errors().output_ratio == pytest.approx(0.744)
    for _ in range(3 * N):
        cost.observe_output(1000, "t", "default")
    assert cost.errors().output_ratio < 0.01
    assert cost.errors().output_count == 3 * N + 1
