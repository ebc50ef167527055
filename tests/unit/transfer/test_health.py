"""A path is left when it fails, tried again one attempt at a time, and trusted after a row of successes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.health import Health, Limits, PathState, rank

LIMITS = Limits()
PATH = "rdma/peer:1"


def quarantined(at_s: float = 0.0, limits: Limits = LIMITS) -> Health:
    health = Health(limits)
    assert health.failed(PATH, at_s, fatal=True)
    return health


def recover(health: Health, now_s: float) -> None:
    for _ in range(LIMITS.trials_needed):
        assert health.usable(PATH, now_s)
        health.succeeded(PATH, now_s)
    assert health.state(PATH, now_s) is PathState.USABLE


def test_a_path_nobody_heard_of_is_usable_by_everybody_at_once() -> None:
    health = Health()
    assert all(health.usable(PATH, 0.0) for _ in range(10))
    assert health.states(0.0) == {}


def test_three_errors_within_the_window_quarantine() -> None:
    health = Health()
    assert [health.failed(PATH, now_s) for now_s in (0.0, 5.0, 9.9)] == [False, False, True]
    assert health.state(PATH, 9.9) is PathState.QUARANTINED
    assert not health.usable(PATH, 9.9)


def test_errors_that_come_slowly_do_not() -> None:
    health = Health()
    assert not any(health.failed(PATH, 5.0 * n) for n in range(50))
    assert health.usable(PATH, 250.0)


def test_successes_between_the_errors_do_not_excuse_them() -> None:
    health = Health()
    for now_s in (0.0, 1.0):
        health.failed(PATH, now_s)
        health.succeeded(PATH, now_s + 0.5)
    assert health.failed(PATH, 2.0)


def test_one_fatal_error_quarantines_and_only_that_path() -> None:
    health = quarantined()
    assert not health.usable(PATH, 0.5)
    assert health.usable("rdma/peer:2", 0.5)


def test_after_the_cooldown_one_attempt_at_a_time_is_let_through() -> None:
    health = quarantined()
    assert not health.usable(PATH, 0.999)
    assert health.state(PATH, 1.0) is PathState.TRIAL
    assert health.usable(PATH, 1.0)
    assert not health.usable(PATH, 1.1)
    health.succeeded(PATH, 1.2)
    assert health.usable(PATH, 1.2)


def test_looking_ahead_takes_no_trial() -> None:
    health = quarantined()
    assert all(health.admits(PATH, 1.0) for _ in range(3))
    assert health.usable(PATH, 1.0)
    assert not health.admits(PATH, 1.0)


def test_it_takes_a_row_of_successes_to_be_trusted_again() -> None:
    health = quarantined()
    outcomes = []
    for _ in range(3):
        assert health.usable(PATH, 1.0)
        assert health.state(PATH, 1.0) is PathState.TRIAL
        outcomes.append(health.succeeded(PATH, 1.0))
    assert outcomes == [False, False, True]
    assert all(health.usable(PATH, 1.0) for _ in range(5))


def test_a_failed_trial_starts_the_row_anew() -> None:
    health = quarantined()
    for _ in range(2):
        assert health.usable(PATH, 1.0)
        health.succeeded(PATH, 1.0)
    assert health.usable(PATH, 1.0)
    assert health.failed(PATH, 1.0)
    for _ in range(2):
        assert health.usable(PATH, 3.0)
        assert not health.succeeded(PATH, 3.0)
    assert health.state(PATH, 3.0) is PathState.TRIAL


def test_the_cooldown_doubles_to_its_longest_and_resets_when_trusted_again() -> None:
    health, now_s, waits = quarantined(), 0.0, []
    for _ in range(9):
        wait_s = next(n for n in range(1, 100) if health.usable(PATH, now_s + n))
        waits.append(wait_s)
        now_s += wait_s
        health.failed(PATH, now_s)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    recover(health, now_s + 60)
    health.failed(PATH, now_s + 60, fatal=True)
    assert health.usable(PATH, now_s + 61)


def test_errors_from_before_the_quarantine_are_not_held_against_it_afterwards() -> None:
    health = Health()
    assert [health.failed(PATH, 0.0) for _ in range(3)][-1]
    recover(health, 1.0)
    assert not health.failed(PATH, 2.0)
    assert health.state(PATH, 2.0) is PathState.USABLE


def test_attempts_that_fail_together_lengthen_the_quarantine_once() -> None:
    health = quarantined()
    assert not any(health.failed(PATH, 0.5, fatal=True) for _ in range(20))
    assert health.usable(PATH, 1.0)


def test_a_quarantined_path_that_was_used_for_want_of_others_is_not_trusted_for_it() -> None:
    health = quarantined()
    for _ in range(5):
        health.succeeded(PATH, 0.5)
    assert health.state(PATH, 0.5) is PathState.QUARANTINED


def test_late_news_of_attempts_from_before_the_quarantine_counts_for_nothing() -> None:
    health = quarantined(at_s=10.0)
    assert health.usable(PATH, 11.0)
    assert not health.failed(PATH, 12.0, began_s=9.0)
    for _ in range(3):
        health.succeeded(PATH, 12.0, began_s=9.0)
    assert not health.usable(PATH, 12.0)  # the trial of 11.0 is still the one in flight
    health.succeeded(PATH, 13.0, began_s=11.0)
    assert health.usable(PATH, 13.0)


def test_a_trial_whose_outcome_is_never_told_is_forgotten() -> None:
    health = quarantined()
    assert health.usable(PATH, 1.0)
    assert not health.usable(PATH, 1.0 + LIMITS.trial_s - 0.1)
    assert health.usable(PATH, 1.0 + LIMITS.trial_s)


def test_memory_is_bounded_and_the_oldest_healthy_path_goes_first() -> None:
    health = Health(Limits(paths_max=3))
    health.failed("a", 0.0, fatal=True)
    for path in ("b", "c", "b", "d"):
        health.failed(path, 1.0)
    assert sorted(health.states(1.0)) == ["a", "b", "d"]
    for number in range(100):
        health.failed(f"x{number}", 2.0, fatal=True)
    assert sorted(health.states(2.0)) == ["x97", "x98", "x99"]


EVENTS = st.lists(
    st.tuples(st.sampled_from(["begin", "win", "lose", "fatal"]), st.floats(0.0, 20.0), st.integers(0, 9)),
    max_size=80,
)


class World:
    """Attempts come and go as the events say; every attempt tells its outcome once, or never."""

    def __init__(self) -> None:
        self.health = Health()
        self.now_s = 0.0
        self.flying: list[tuple[float, bool]] = []  # when it began, whether as a trial
        self.log: list[object] = []

    def step(self, event: str, wait_s: float, which: int) -> None:
        self.now_s += wait_s
        state = self.health.state(PATH, self.now_s)
        if event == "begin":
            admitted = self.health.usable(PATH, self.now_s)
            assert admitted or state is not PathState.USABLE
            assert not (admitted and state is PathState.QUARANTINED)
            if admitted:
                self.flying.append((self.now_s, state is PathState.TRIAL))
            self.log.append(admitted)
        elif self.flying:
            began_s, _ = self.flying.pop(which % len(self.flying))
            if event == "win":
                self.log.append(self.health.succeeded(PATH, self.now_s, began_s=began_s))
            else:
                self.log.append(self.health.failed(PATH, self.now_s, event == "fatal", began_s=began_s))


@given(EVENTS)
def test_never_two_trials_are_in_flight(events: list[tuple[str, float, int]]) -> None:
    world = World()
    for event in events:
        world.step(*event)
        if world.health.state(PATH, world.now_s) is PathState.TRIAL:
            fresh = [
                began_s for began_s, trial in world.flying if trial and world.now_s < began_s + LIMITS.trial_s
            ]
            assert len(fresh) <= 1


@given(EVENTS)
def test_time_alone_always_readmits(events: list[tuple[str, float, int]]) -> None:
    world = World()
    for event in events:
        world.step(*event)
    later_s = world.now_s + max(LIMITS.cooldown_max_s, LIMITS.trial_s)
    assert world.health.usable(PATH, later_s)
    for _ in range(LIMITS.trials_needed):
        world.health.succeeded(PATH, later_s)
        assert world.health.usable(PATH, later_s)
    assert world.health.state(PATH, later_s) is PathState.USABLE


@given(EVENTS)
def test_the_same_events_lead_to_the_same_answers(events: list[tuple[str, float, int]]) -> None:
    one, two = World(), World()
    for event in events:
        one.step(*event)
    for event in events:
        two.step(*event)
    assert one.log == two.log


def test_shared_memory_is_tried_before_rdma_before_tcp_before_the_rest() -> None:
    assert rank(["file", "tcp", "rdma", "shm"], Health(), 0.0) == ["shm", "rdma", "tcp", "file"]


def test_a_hint_goes_first_while_its_path_is_usable() -> None:
    paths = ["shm/p", "rdma/p", "tcp/p"]
    health = Health()
    assert rank(paths, health, 0.0, hint="tcp") == ["tcp/p", "shm/p", "rdma/p"]
    health.failed("tcp/p", 0.0, fatal=True)
    assert rank(paths, health, 0.0, hint="tcp") == ["shm/p", "rdma/p", "tcp/p"]


def test_quarantined_paths_come_last_but_are_never_left_out() -> None:
    health = Health()
    health.failed("shm/p", 0.0, fatal=True)
    assert rank(["shm/p", "tcp/p"], health, 0.5) == ["tcp/p", "shm/p"]
    health.failed("tcp/p", 0.0, fatal=True)
    assert rank(["tcp/p", "shm/p"], health, 0.5) == ["shm/p", "tcp/p"]


def test_a_path_whose_trial_is_free_gets_its_chance_before_slower_ones() -> None:
    health = Health()
    health.failed("rdma/p", 0.0, fatal=True)
    assert rank(["tcp/p", "rdma/p"], health, 1.0) == ["rdma/p", "tcp/p"]
    assert health.usable("rdma/p", 1.0)
    assert rank(["tcp/p", "rdma/p"], health, 1.0) == ["tcp/p", "rdma/p"]


@pytest.mark.parametrize("hint", ["", "tcp", "unknown"])
@given(
    paths=st.lists(st.sampled_from(["shm/a", "rdma/a", "rdma/b", "tcp/a", "file"]), unique=True),
    bad=st.lists(st.sampled_from(["shm/a", "rdma/a", "tcp/a"])),
)
def test_ranking_loses_and_invents_nothing(hint: str, paths: list[str], bad: list[str]) -> None:
    health = Health()
    for path in bad:
        health.failed(path, 0.0, fatal=True)
    ranked = rank(paths, health, 0.0, hint)
    assert sorted(ranked) == sorted(paths)
    admitted = [health.admits(path, 0.0) for path in ranked]
    assert admitted == sorted(admitted, reverse=True)
