"""What keeps an overloaded cluster within its objectives: usual lateness, and refusals before any thought."""

import pytest

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Plan, Reason, Rejection
from conductor.scheduler import Mode, Scheduler, SchedulerConfig
from conductor.terms import CLASSES, Terms
from tests.unit.conductor.make import cluster, facts, record

QUEUE_S = 4.0


def pair() -> ClusterView:
    return cluster(record("d0", "decode"), record("p0", "prefill"))


def scheduler(view: ClusterView, cost: CostModel, **config: object) -> Scheduler:
    return Scheduler(SchedulerConfig(**config), PrefixIndex(), cost, view)  # type: ignore[arg-type]


def test_first_tokens_that_usually_come_late_are_judged_so():
    view, cost = pair(), CostModel()
    view.charge_prefill(0.0, "p0", QUEUE_S, 1000)
    chooser = scheduler(view, cost, ttft_slo_s=QUEUE_S + 1)
    assert isinstance(chooser.on_request(0.0, facts("r0")), Plan)
    for _ in range(20):
        cost.observe_late(1.0)
    rejection = chooser.on_request(0.0, facts("r1"))
    assert isinstance(rejection, Rejection)
    assert rejection.reason is Reason.TTFT_SLO


def test_an_idle_instance_is_tried_however_late_the_last_ones_were():
    cost = CostModel()
    for _ in range(20):
        cost.observe_late(1000.0)
    assert isinstance(scheduler(pair(), cost, ttft_slo_s=5.0).on_request(0.0, facts()), Plan)


def test_lateness_is_forgotten_as_soon_as_tokens_are_in_time_again():
    cost = CostModel()
    for _ in range(20):
        cost.observe_late(3.0)
    assert cost.late_s >= 3.0 * 0.8
    for _ in range(60):
        cost.observe_late(-0.01)
    assert cost.late_s < 0.1


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e9, -1e9])
def test_lateness_that_cannot_be_is_ignored(seconds: float):
    cost = CostModel()
    cost.observe_late(seconds)
    assert cost.late_s == 0.0


def test_nobody_is_hopeless_while_some_instance_could_be_in_time():
    view = cluster(record("d0", "decode"), record("p0", "prefill"), record("p1", "prefill"))
    chooser = scheduler(view, CostModel(), ttft_slo_s=2.0)
    view.charge_prefill(0.0, "p0", QUEUE_S, 1000)
    assert chooser.hopeless(0.0, Terms()) is None
    view.charge_prefill(0.0, "p1", QUEUE_S, 1000)
    rejection = chooser.hopeless(0.0, Terms())
    assert rejection is not None
    assert rejection.reason is Reason.TTFT_SLO
    assert rejection.retry_after_s == pytest.approx(QUEUE_S - 2.0, abs=0.1)
    assert chooser.hopeless(QUEUE_S, Terms()) is None  # done by then
    assert view.charged == 2  # nothing was charged


def test_a_request_that_is_hopeless_would_be_refused_with_its_prompt_too():
    view = pair()
    view.charge_prefill(0.0, "p0", QUEUE_S, 1000)
    for slo_s in (0.5, 2.0, 3.9):
        chooser = scheduler(view, CostModel(), ttft_slo_s=slo_s)
        assert chooser.hopeless(0.0, Terms())
        assert isinstance(chooser.on_request(0.0, facts(prompt_len=1, max_tokens=4)), Rejection)


def test_without_an_objective_for_batch_work_and_where_others_may_prefill_prompts_are_looked_at():
    view = pair()
    view.charge_prefill(0.0, "p0", QUEUE_S, 1000)
    hurry = Terms(ttft_slo_s=1.0)
    assert scheduler(view, CostModel()).hopeless(0.0, hurry)
    assert scheduler(view, CostModel()).hopeless(0.0, Terms()) is None
    batch = Terms(ttft_slo_s=1.0, slo_class=CLASSES["batch"])
    assert scheduler(view, CostModel()).hopeless(0.0, batch) is None
    assert scheduler(view, CostModel(), inline=True).hopeless(0.0, hurry) is None
    assert scheduler(view, CostModel(), mode=Mode.AGGREGATED).hopeless(0.0, hurry) is None  # d0 is idle
    assert scheduler(ClusterView(), CostModel()).hopeless(0.0, hurry) is None  # why not, the plan says better
