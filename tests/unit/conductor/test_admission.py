"""Admission: whose decode load counts, at which moment; tickets given back are all it hears."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.admission import DECODE_S_PRIOR, Admission, AdmissionMode, Room
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Plan, Reason, Rejection
from conductor.scheduler import Scheduler, SchedulerConfig
from tests.unit.conductor.make import BLOCK, cluster, facts, record

ROOM = Room(2, 1000)


def admission(mode: AdmissionMode, decode_s: float | None = 10.0) -> Admission:
    """KV room alone counts: 100 tokens of 1000 are a load of 0.1."""
    return Admission(mode, None, decode_s, CostModel())


def load(one: Admission, ready_s: float) -> float:
    return round(one.load_on_arrival(ready_s, 100, ROOM), 6)


def test_early_counts_only_what_is_decoded_now() -> None:
    early = admission(AdmissionMode.EARLY)
    early.planned(1, 2, "d", 1.0, 300)
    assert load(early, 100.0) == 0.1
    early.released(1.5, 1)
    assert load(early, 100.0) == 0.4
    early.released(9.0, 2)
    assert load(early, 100.0) == 0.1


def test_predicted_counts_what_will_be_decoded_when_the_prompt_is_done() -> None:
    predicted = admission(AdmissionMode.PREDICTED)
    predicted.planned(1, 2, "d", 5.0, 300)
    assert load(predicted, 4.9) == 0.1  # not there yet
    assert load(predicted, 5.0) == 0.4
    assert load(predicted, 14.9) == 0.4
    assert load(predicted, 15.1) == 0.1  # t_d over
    predicted.released(7.0, 1)  # later than predicted
    assert load(predicted, 16.9) == 0.4
    assert load(predicted, 17.1) == 0.1


@pytest.mark.parametrize("mode", [AdmissionMode.OBJECTIVES, AdmissionMode.LATE])
def test_the_others_do_not_ask_on_arrival(mode: AdmissionMode) -> None:
    one = admission(mode)
    one.planned(1, 2, "d", 0.0, 900)
    one.released(0.0, 1)
    assert load(one, 1.0) == 0.0


def test_the_second_question_is_about_the_own_instance_and_counts_the_request_once() -> None:
    late = admission(AdmissionMode.LATE)
    for ticket, instance in ((1, "d"), (3, "d"), (5, "other")):
        late.planned(ticket, ticket + 1, instance, 0.0, 400)
        late.released(1.0, ticket)
    assert late.load_when_ready(2, 1000) == pytest.approx(0.8)
    late.released(2.0, 4)
    assert late.load_when_ready(2, 1000) == pytest.approx(0.4)
    late.released(2.0, 2)
    assert late.load_when_ready(2, 1000) == 0.0
    assert admission(AdmissionMode.OBJECTIVES).load_when_ready(6, 1000) == 0.0


def test_the_length_of_answers_is_learned_unless_it_is_given() -> None:
    learning, given_s = admission(AdmissionMode.PREDICTED, None), admission(AdmissionMode.PREDICTED, 7.0)
    assert learning.decode_s == DECODE_S_PRIOR
    for one in (learning, given_s):
        for ticket in range(1, 200, 2):
            one.planned(ticket, ticket + 1, "d", 0.0, 1)
            one.released(1.0, ticket)
            one.released(31.0, ticket + 1)
    assert learning.decode_s == pytest.approx(30.0, rel=0.01)
    assert given_s.decode_s == 7.0


def test_a_request_that_ends_before_its_prompt_is_done_teaches_nothing() -> None:
    learning = admission(AdmissionMode.PREDICTED, None)
    learning.planned(1, 2, "d", 0.0, 1)
    learning.released(5.0, 2)
    learning.released(5.0, 1)
    assert learning.decode_s == DECODE_S_PRIOR
    assert len(learning) == 0


@given(
    mode=st.sampled_from(list(AdmissionMode)),
    events=st.lists(st.tuples(st.integers(1, 12), st.floats(0, 100)), max_size=60),
)
def test_nothing_is_kept_of_requests_that_are_over(
    mode: AdmissionMode, events: list[tuple[int, float]]
) -> None:
    one = admission(mode)
    for number, at_s in events:
        one.planned(2 * number, 2 * number + 1, "d", at_s, 10)
        one.load_on_arrival(at_s, 10, ROOM)
    for ticket in range(2, 30):
        one.released(100.0, ticket)
        one.released(100.0, ticket)
    assert len(one) == 0


# ---------------------------------------------------------------- in the Scheduler


def scheduler(mode: AdmissionMode, **config: object) -> Scheduler:
    records = [record("p", "prefill", node="p"), record("d", "decode", node="d", kv_blocks=4000 // BLOCK)]
    wanted = SchedulerConfig(admission=mode, decode_s=1e6, **config)  # type: ignore[arg-type]
    return Scheduler(wanted, PrefixIndex(), CostModel(), cluster(*records))


def test_early_lets_a_burst_in_that_predicted_refuses() -> None:
    answers = {}
    for mode in (AdmissionMode.EARLY, AdmissionMode.PREDICTED, AdmissionMode.LATE):
        one = scheduler(mode)
        answers[mode] = [one.on_request(0.0, facts(f"r{i}", 1500, 16)) for i in range(5)]
    assert all(isinstance(answer, Plan) for answer in answers[AdmissionMode.EARLY])
    assert all(isinstance(answer, Plan) for answer in answers[AdmissionMode.LATE])
    refused = [answer for answer in answers[AdmissionMode.PREDICTED] if isinstance(answer, Rejection)]
    assert len(refused) == 3
    assert {answer.reason for answer in refused} == {Reason.DECODE_LOAD}
    assert all(1.0 <= answer.retry_after_s <= 30.0 for answer in refused)


def test_late_refuses_when_the_prompt_is_done() -> None:
    one = scheduler(AdmissionMode.LATE)
    plans = [one.on_request(0.0, facts(f"r{i}", 1500, 16)) for i in range(3)]
    checked = []
    for plan in plans:
        assert isinstance(plan, Plan)
        one.release(1.0, plan.prefill_ticket)
        checked.append(one.second_check(plan))
    assert checked[:2] == [None, None]
    assert checked[2] is not None
    assert checked[2].reason is Reason.DECODE_LOAD


def test_time_to_first_token_is_judged_in_every_mode() -> None:
    for mode in AdmissionMode:
        answer = scheduler(mode, ttft_slo_s=1e-6).on_request(0.0, facts())
        assert isinstance(answer, Rejection)
        assert answer.reason is Reason.TTFT_SLO
