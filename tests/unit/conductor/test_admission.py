"""Admission: whose decode load counts, at which moment; tickets given back are all it hears."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.admission import DECODE_S_PRIOR, SHEDDABLE_ROOM, Admission, AdmissionMode
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Plan, Reason, Rejection
from conductor.scheduler import Scheduler, SchedulerConfig
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record

ROOMS = {"d": 500, "other": 500}


def admission(mode: AdmissionMode, decode_s: float | None = 10.0) -> Admission:
    """KV room alone counts: 100 tokens of 1000 are a load of 0.1."""
    return Admission(mode, None, decode_s, CostModel())


def load(
    one: Admission, ready_s: float, now_s: float = 0.0, instance_id: str = "d", kv_tokens: int = 100
) -> float:
    return round(one.load_on_arrival(now_s, ready_s, instance_id, kv_tokens, ROOMS), 6)


def decoding(
    one: Admission, tickets: range, started_s: float, kv_tokens: int, instance_id: str = "d"
) -> None:
    """Let requests with these decode tickets begin to be decoded."""
    for ticket in tickets:
        one.planned(-ticket, ticket, instance_id, started_s, kv_tokens)
        one.released(started_s, -ticket)


def learned(stay_s: float, answers: int = 200, **options: float) -> Admission:
    """Return one that predicts, and knows that answers stay so long."""
    one = Admission(AdmissionMode.PREDICTED, None, None, CostModel(), **options)
    for ticket in range(1_000, 1_000 + answers):
        decoding(one, range(ticket, ticket + 1), 0.0, 1)
        one.released(stay_s, ticket)
    return one


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
        decoding(one, range(1, 100), 1.0, 1)
        for ticket in range(1, 100):
            one.released(31.0, ticket)
    assert learning.decode_s == pytest.approx(30.0, rel=0.01)
    assert given_s.decode_s == 7.0


# ---------------------------------------------------------------- predicted, stays learned


def test_answers_that_are_known_to_end_make_room_for_prompts_that_take_longer() -> None:
    one = learned(10.0, margin=0.0)
    decoding(one, range(1, 5), 0.0, 100)
    assert load(one, ready_s=1.0, now_s=1.0) == 1.0
    assert 0.8 < load(one, ready_s=5.0, now_s=1.0) <= 1.0
    assert load(one, ready_s=30.0, now_s=1.0) < 0.3


def test_answers_older_than_most_are_not_taken_for_gone() -> None:
    paper, one = admission(AdmissionMode.PREDICTED, 10.0), learned(10.0, margin=0.0)
    for each in (paper, one):
        decoding(each, range(1, 5), 0.0, 100)
    assert load(paper, ready_s=60.0, now_s=60.0) == 0.1
    assert load(one, ready_s=60.0, now_s=60.0) == 1.0


def test_only_the_chosen_instance_counts() -> None:
    one = learned(10.0)
    decoding(one, range(1, 5), 0.0, 100, "other")
    assert load(one, ready_s=0.0) == 0.2
    assert load(one, ready_s=0.0, instance_id="other") == 1.0


def test_prompts_count_from_when_they_are_done() -> None:
    one = learned(1000.0)
    one.planned(1, 2, "d", 5.0, 200)
    assert load(one, ready_s=4.9) == 0.2
    assert load(one, ready_s=5.0) == pytest.approx(0.6, abs=0.01)
    assert load(one, ready_s=8.0, now_s=8.0) == pytest.approx(0.6, abs=0.01)  # it is late, and still to come


def test_the_margin_keeps_room_free_only_as_far_as_nobody_knows() -> None:
    bold, careful = learned(10.0, margin=0.0), learned(10.0, margin=2.0)
    for one in (bold, careful):
        decoding(one, range(1, 5), 0.0, 100)
    assert load(careful, ready_s=0.0) == load(bold, ready_s=0.0) == 1.0
    assert load(careful, ready_s=10.4) > load(bold, ready_s=10.4) + 0.1


@given(
    st.lists(st.tuples(st.floats(0, 60), st.integers(1, 400)), max_size=12),
    st.floats(60, 120),
    st.integers(1, 400),
)
def test_load_grows_with_every_request_there_and_with_the_new_one(
    there: list[tuple[float, int]], ready_s: float, kv_tokens: int
) -> None:
    one = learned(20.0, margin=0.0)
    loads = [load(one, ready_s, 60.0, kv_tokens=kv_tokens)]
    for ticket, (started_s, held) in enumerate(there, 1):
        decoding(one, range(ticket, ticket + 1), started_s, held)
        loads.append(load(one, ready_s, 60.0, kv_tokens=kv_tokens))
    assert loads == sorted(loads)
    assert load(one, ready_s, 60.0, kv_tokens=kv_tokens + 1) > loads[-1]


def test_the_same_events_give_the_same_loads() -> None:
    answers = []
    for _ in range(2):
        one = learned(7.0)
        decoding(one, range(1, 9), 0.0, 33)
        answers.append([one.load_on_arrival(2.0, 2.0 + at, "d", 50, ROOMS) for at in range(20)])
    assert answers[0] == answers[1]


def test_who_is_refused_when_the_prompt_is_done_teaches_nothing_of_answers() -> None:
    one = learned(10.0)
    before_s = one.decode_s
    decoding(one, range(1, 51), 0.0, 400)
    for ticket in range(2, 51):
        assert one.load_when_ready(ticket, 500) > 1
        one.released(0.0, ticket)
    assert one.decode_s == before_s


@pytest.mark.parametrize("mode", [AdmissionMode.EARLY, AdmissionMode.PREDICTED])
@pytest.mark.parametrize("decode_s", [None, 50.0])
def test_sheddable_classes_leave_room_for_the_others(mode: AdmissionMode, decode_s: float | None) -> None:
    one = admission(mode, decode_s)
    decoding(one, range(1, 3), 0.0, 100)
    usual = one.load_on_arrival(0.0, 0.0, "d", 100, ROOMS)
    batch = one.load_on_arrival(0.0, 0.0, "d", 100, ROOMS, sheddable=True)
    assert batch == pytest.approx(usual / SHEDDABLE_ROOM)


def scarce() -> Admission:
    """Return one that has just refused many for want of decode room; the mean prompt takes 1 s."""
    one = learned(10.0)
    decoding(one, range(1, 6), 0.0, 100)
    for _ in range(100):
        one.prompt_load(1.0, 0.0)
        assert load(one, ready_s=0.0) > 1
    return one


def test_where_decode_room_is_scarce_a_longer_queue_takes_only_cheaper_prompts() -> None:
    one = scarce()
    assert one.prompt_load(20.0, 0.0) == 0.0  # nobody waits: everything goes
    assert one.prompt_load(1.0, 3.0) < 1 < one.prompt_load(2.0, 3.0)
    assert one.prompt_load(0.1, 20.0) < 1 < one.prompt_load(1.0, 20.0)


def test_where_there_is_decode_room_no_prompt_is_too_dear() -> None:
    one = learned(10.0)
    for _ in range(100):
        assert one.prompt_load(1.0, 20.0) == 0.0
        assert load(one, ready_s=0.0) < 1
    assert one.prompt_load(50.0, 20.0) == 0.0


def test_room_that_is_scarce_no_more_is_forgotten() -> None:
    one = scarce()
    for ticket in range(1, 6):
        one.released(0.0, ticket)
    for _ in range(3000):
        one.prompt_load(1.0, 0.0)
        assert load(one, ready_s=0.0) < 1
    assert one.prompt_load(20.0, 5.0) < 1


def test_prompts_that_find_no_room_when_they_are_done_make_it_scarce_too() -> None:
    one = learned(10.0)
    for _ in range(10):
        one.prompt_load(1.0, 0.0)
    decoding(one, range(1, 11), 0.0, 100)
    assert one.prompt_load(20.0, 5.0) == 0.0
    assert [one.load_when_ready(ticket, 500) > 1 for ticket in range(1, 6)] == [True] * 5
    assert one.prompt_load(20.0, 5.0) > 1


@pytest.mark.parametrize("mode", list(AdmissionMode))
def test_prompts_are_priced_only_where_everything_is_learned(mode: AdmissionMode) -> None:
    assert admission(mode, None).prices_prompts == (mode is AdmissionMode.PREDICTED)
    assert not admission(mode, 10.0).prices_prompts


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
        one.load_on_arrival(at_s, at_s, "d", 10, ROOMS)
    for ticket in range(2, 30):
        one.released(100.0, ticket)
        one.released(100.0, ticket)
    assert len(one) == 0


# ---------------------------------------------------------------- in the Scheduler


def scheduler(mode: AdmissionMode, decode_s: float | None = 1e6, **config: object) -> Scheduler:
    records = [record("p", "prefill", node="p"), record("d", "decode", node="d", kv_blocks=4000 // BLOCK)]
    wanted = SchedulerConfig(admission=mode, decode_s=decode_s, **config)  # type: ignore[arg-type]
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


def test_while_prompts_queue_and_decode_is_full_a_dear_one_is_refused_and_told_when_to_come_back() -> None:
    one = scheduler(AdmissionMode.PREDICTED, None)
    full = one.on_request(0.0, facts("full", 3900, 16, keys=keys(121, "full")))
    assert isinstance(full, Plan)
    for number in range(8):
        no_room = one.on_request(0.0, facts(f"r{number}", 64, 1000, keys=keys(2, f"c{number}")))
        assert isinstance(no_room, Rejection)
        assert no_room.reason is Reason.DECODE_LOAD
    dear = one.on_request(0.0, facts("dear", 3000, 16, keys=keys(93, "dear")))
    assert isinstance(dear, Rejection)
    assert dear.reason is Reason.PREFILL_LOAD
    assert 1.0 <= dear.retry_after_s <= 30.0
    one.release(0.1, full.prefill_ticket)
    one.release(0.1, full.decode_ticket)
    assert isinstance(one.on_request(0.1, facts("dear", 3000, 16, keys=keys(93, "dear"))), Plan)


def test_batch_work_is_refused_first() -> None:
    one = scheduler(AdmissionMode.PREDICTED, None)
    first = one.on_request(0.0, facts("first", 2000, 16))
    assert isinstance(first, Plan)
    one.release(0.0, first.prefill_ticket)
    batch, usual = (facts(name, 1700, 16, slo_class=name) for name in ("batch", "default"))
    assert isinstance(one.on_request(0.0, batch), Rejection)
    assert isinstance(one.on_request(0.0, usual), Plan)
