"""Sessions: a preference that decides between equals, and is bounded."""

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Plan, Rejection
from conductor.scheduler import Scheduler, SchedulerConfig
from conductor.sessions import NOBODY, Served, Sessions
from tests.unit.conductor.make import cluster, facts, record

BONUS_S = 0.05


def pd_cluster() -> ClusterView:
    return cluster(
        *(record(f"d{i}", "decode", node=f"d{i}") for i in range(3)),
        *(record(f"p{i}", "prefill", node=f"p{i}") for i in range(3)),
    )


def scheduler(view: ClusterView, bonus_s: float = BONUS_S) -> Scheduler:
    return Scheduler(SchedulerConfig(session_bonus_s=bonus_s), PrefixIndex(), CostModel(), view)


def turn(chooser: Scheduler, session: str, now_s: float = 0.0, *, over: bool = True) -> tuple[str, str]:
    plan: Plan | Rejection = chooser.on_request(now_s, facts(prompt_len=200, session=session))
    assert isinstance(plan, Plan)
    if over:
        chooser.release(now_s, plan.prefill_ticket)
        chooser.release(now_s, plan.decode_ticket)
    return plan.prefill or "", plan.decode or ""


def second_pair(chooser: Scheduler, session: str) -> None:
    """Let a session be served by p1 and d1."""
    held = chooser.on_request(0.0, facts("other", prompt_len=200))
    assert isinstance(held, Plan)
    assert turn(chooser, session) == ("p1", "d1")
    chooser.release(0.0, held.prefill_ticket)
    chooser.release(0.0, held.decode_ticket)


def test_a_session_goes_back_to_who_served_it_last_among_equals():
    chooser = scheduler(pd_cluster())
    second_pair(chooser, "s")
    assert turn(chooser, "s") == ("p1", "d1")
    assert turn(chooser, "another") == ("p0", "d0")
    assert turn(chooser, "") == ("p0", "d0")


def test_without_a_bonus_nobody_is_preferred():
    chooser = scheduler(pd_cluster(), bonus_s=0.0)
    second_pair(chooser, "s")
    assert turn(chooser, "s") == ("p0", "d0")


def test_a_plan_that_is_better_by_more_than_the_bonus_wins():
    view = pd_cluster()
    chooser = scheduler(view)
    second_pair(chooser, "s")
    ticket = view.charge_prefill(0.0, "p1", BONUS_S * 2, 100)
    assert turn(chooser, "s")[0] == "p0"
    view.release(0.0, ticket)
    second_pair(chooser, "t")
    view.charge_prefill(0.0, "p1", BONUS_S / 2, 100)
    assert turn(chooser, "t")[0] == "p1"


def test_an_instance_that_is_gone_is_not_waited_for():
    view = pd_cluster()
    chooser = scheduler(view)
    second_pair(chooser, "s")
    view.link_down(0.0, "p1")
    view.link_down(0.0, "d1")
    assert turn(chooser, "s") == ("p0", "d0")


def test_the_session_used_least_lately_is_forgotten_first():
    sessions = Sessions(2)
    sessions.served("a", "p0", "d0")
    sessions.served("b", "p1", "d1")
    sessions.served("a", "p2", "d2")
    sessions.served("c", "p0", "d0")
    assert sessions.last("a") == Served("p2", "d2")
    assert sessions.last("b") is NOBODY


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "a", "b", "c", "d", "e"])), st.integers(1, 4))
def test_memory_is_bounded_and_no_session_is_remembered_as_none(names, sessions_max):
    sessions = Sessions(sessions_max)
    for name in names:
        sessions.served(name, "p", "d")
        assert len(sessions) <= sessions_max
        assert (sessions.last(name) is NOBODY) == (not name)
