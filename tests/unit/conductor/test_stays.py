"""Stays: how likely an answer is still there, from those that ended and those that have not."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.stays import MEMORY_ANSWERS, REFRESH_S, Stays

SECONDS = st.floats(0, 5000)


def known(ended: list[float], running: list[float] | None = None) -> Stays:
    stays = Stays(10.0)
    for age_s in ended:
        stays.ended(age_s)
    stays.refresh(0.0, running or [])
    return stays


def test_until_something_is_known_answers_end_at_a_constant_rate() -> None:
    stays = Stays(10.0)
    assert stays.mean_s == 10.0
    assert stays.chance(0.0, 10.0) == pytest.approx(0.37, abs=0.02)
    assert stays.chance(7.0, 10.0) == pytest.approx(0.37, abs=0.04)


def test_the_share_still_there_is_what_was_measured() -> None:
    random = Random(1)
    ended = [random.expovariate(1 / 30) for _ in range(900)]
    stays = known(ended)
    for ahead_s in (3.0, 30.0, 90.0):
        share = sum(one > ahead_s for one in ended) / len(ended)
        assert stays.chance(0.0, ahead_s) == pytest.approx(share, abs=0.03)


def test_an_answer_that_was_long_already_is_expected_to_stay_longer() -> None:
    stays = known([2.0] * 90 + [100.0] * 10)
    assert stays.chance(0.0, 5.0) == pytest.approx(0.1, abs=0.02)
    assert stays.chance(5.0, 5.0) > 0.95


def test_those_that_have_not_ended_count_as_long_as_they_are_there() -> None:
    ended = [2.0] * 50
    without, beside = known(ended), known(ended, [60.0] * 50)
    assert without.chance(0.0, 30.0) < 0.05
    assert beside.chance(0.0, 30.0) == pytest.approx(0.5, abs=0.05)


def test_a_mean_of_those_that_ended_only_would_call_the_others_gone() -> None:
    stays = known([2.0] * 50, [60.0] * 50)
    assert stays.mean_s < 3.0
    assert stays.chance(60.0, 5.0) > 0.5


def test_what_was_long_ago_is_forgotten() -> None:
    stays = known([100.0] * int(MEMORY_ANSWERS) + [1.0] * int(8 * MEMORY_ANSWERS))
    assert stays.mean_s < 2.0
    assert stays.chance(0.0, 10.0) < 0.02


def test_a_new_end_or_a_second_makes_the_table_old() -> None:
    stays = Stays(10.0)
    stays.refresh(5.0, [])
    assert not stays.is_old(5.0 + REFRESH_S / 2)
    assert stays.is_old(5.0 + REFRESH_S)
    stays.ended(1.0)
    assert stays.is_old(5.0)


@given(
    st.lists(SECONDS, max_size=60),
    st.lists(SECONDS, max_size=20),
    SECONDS,
    st.lists(SECONDS, min_size=2, max_size=8),
)
def test_a_chance_is_one_now_and_never_rises(
    ended: list[float], running: list[float], age_s: float, aheads_s: list[float]
) -> None:
    stays = known(ended, running)
    chances = [stays.chance(age_s, ahead_s) for ahead_s in sorted(aheads_s)]
    assert stays.chance(age_s, 0.0) == 1.0
    assert all(0 < one <= 1 for one in chances)
    assert all(left >= right - 1e-12 for left, right in pairwise(chances))
