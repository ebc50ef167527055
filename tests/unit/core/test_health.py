"""The three answers of a process about itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.health import ALIVE_S, Health, Phase


def phases(health: Health) -> tuple[bool, bool]:
    return health.started_now().ok, health.ready_now().ok


def test_a_new_process_is_alive_and_neither_started_nor_ready():
    health = Health()
    assert health.alive_now(1e9).ok, "nothing has to turn yet"
    assert phases(health) == (False, False)
    assert health.ready_now().why == "starting"


def test_it_is_ready_only_after_it_has_started():
    health = Health()
    health.ready()
    assert phases(health) == (False, False)
    health.started()
    assert phases(health) == (True, False)
    health.ready()
    assert phases(health) == (True, True)


def test_ready_comes_and_goes_with_a_reason():
    health = Health()
    health.started()
    health.unready("no engine is known")
    assert health.ready_now().why == "not ready: no engine is known"
    health.ready()
    assert health.ready_now().ok
    assert health.started_now().ok


@given(st.lists(st.sampled_from(["started", "ready", "unready"]), max_size=5))
def test_draining_is_for_good(later):
    health = Health()
    health.started()
    health.ready()
    health.draining("SIGTERM")
    for name in later:
        getattr(health, name)(*(["x"] if name == "unready" else []))
    assert health.phase is Phase.DRAINING
    assert not health.ready_now().ok
    assert health.started_now().ok, "a process that drains is not started anew"
    assert health.alive_now(0.0).ok, "nor killed"


def test_one_that_drains_before_it_has_started_has_not_started():
    health = Health()
    health.draining("SIGTERM")
    assert not health.started_now().ok


def test_a_loop_that_stops_turning_is_named():
    health = Health()
    health.beat("the relay's loop", 100.0)
    health.beat("the event loop", 100.0)
    health.beat("the relay's loop", 100.0 + ALIVE_S)
    assert health.alive_now(100.0 + ALIVE_S).ok
    late = health.alive_now(100.5 + ALIVE_S)
    assert not late.ok
    assert late.why.startswith("the event loop has not turned")
    health.beat("the event loop", 101.0 + ALIVE_S)
    assert health.alive_now(101.0 + ALIVE_S).ok, "a machine that slept is well again"


def test_a_loop_that_ended_as_it_should_is_not_missed():
    health = Health()
    health.beat("the event loop", 0.0)
    health.forget("the event loop")
    health.forget("never seen")
    assert health.alive_now(1e6).ok


@pytest.mark.parametrize("bound_s", [0.5, 3.0])
def test_a_loop_may_have_a_bound_of_its_own(bound_s):
    health = Health()
    health.beat("x", 0.0, bound_s)
    assert health.alive_now(bound_s).ok
    assert not health.alive_now(bound_s + 0.1).ok
