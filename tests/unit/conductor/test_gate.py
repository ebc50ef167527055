"""The gate: open while engines have little to do; else classes, tenants and objectives decide."""

import pytest

from conductor.gate import PATIENCE, Gate, GateConfig
from conductor.idle import PACE_PRIOR
from conductor.plan import Decision, Needs, Plan, Reason, Rejection
from conductor.terms import CLASSES, DEFAULT_TERMS, Terms
from conductor.waiting import JOB_MARGIN
from tests.unit.conductor.make import cluster, record

HOLD_S = 2.0
WORK_S = 1.0
PREMIUM, BATCH = Terms(slo_class=CLASSES["premium"]), Terms(slo_class=CLASSES["batch"])


class World:
    """One prefill and one decode instance; every plan charges WORK_S to the first."""

    def __init__(self, **config) -> None:
        self.view = cluster(record("p", "prefill"), record("d", "decode"))
        self.gate = Gate(GateConfig(**{"hold_s": HOLD_S, **config}), self.view)
        self.tickets: list[int] = []
        self.answers: list[int] = []
        self.placed: list[str] = []
        self.now_s = 0.0
        self.answer_s = 0.0
        self.overloaded = False

    def offer(self, name: str, terms: Terms = DEFAULT_TERMS, prompt_len: int = 1000):
        def place(now_s: float) -> Plan | Rejection:
            if self.overloaded:
                return Rejection(request_id=name, reason=Reason.DECODE_LOAD, retry_after_s=1.0)
            self.placed.append(name)
            self.tickets.append(self.view.charge_prefill(now_s, "p", WORK_S, prompt_len))
            is_batch = terms.slo_class.sheddable
            self.answers.append(self.view.charge_decode("d", prompt_len, is_batch=is_batch))
            return Plan(request_id=name, prefill="p", decode="d", decision=Decision.LEAST_LOAD)

        needs = Needs(prompt_len * WORK_S / 1000, self.answer_s, prompt_len)
        return self.gate.offer(self.now_s, name, lambda: needs, terms, place)

    def prefilled(self):
        """The first prompt is done, one second later."""
        self.now_s += WORK_S
        self.view.release(self.now_s, self.tickets.pop(0))
        return self.gate.pump(self.now_s)

    def finish(self) -> None:
        """All answers are over."""
        while self.answers:
            self.view.release(self.now_s, self.answers.pop())

    def idle(self) -> None:
        """All prompts are done."""
        while self.tickets:
            self.view.release(self.now_s, self.tickets.pop(0))

    def fill(self) -> None:
        for n in range(int(HOLD_S / WORK_S)):
            assert isinstance(self.offer(f"first{n}")[0], Plan)
        self.placed.clear()


def test_requests_are_planned_at_once_while_engines_have_little_to_do():
    world = World()
    world.fill()
    assert len(world.gate) == 0


def test_without_a_hold_nobody_ever_waits():
    world = World(hold_s=0.0)
    for n in range(50):
        assert isinstance(world.offer(str(n))[0], Plan)


def test_beyond_it_they_wait_and_come_in_as_prompts_get_done():
    world = World()
    world.fill()
    assert world.offer("a") == (None, [])
    assert world.offer("b") == (None, [])
    assert [outcome.request_id for outcome in world.prefilled()] == ["a"]
    assert [outcome.request_id for outcome in world.prefilled()] == ["b"]
    assert world.placed == ["a", "b"]
    assert len(world.gate) == 0


def test_an_engine_whose_prompt_takes_longer_than_expected_is_not_taken_for_idle():
    world = World()
    world.fill()
    world.now_s = 60.0  # two seconds were expected
    assert world.offer("a") == (None, [])
    assert world.gate.pump(world.now_s) == []
    world.view.release(world.now_s, world.tickets.pop(0))
    assert [outcome.request_id for outcome in world.gate.pump(world.now_s)] == ["a"]


def test_a_premium_request_comes_in_before_those_that_waited_longer():
    world = World()
    world.fill()
    world.offer("batch", BATCH)
    world.offer("default")
    world.offer("premium", PREMIUM)
    for _ in range(4):
        world.prefilled()
    assert world.placed == ["premium", "default", "batch"]


def test_shorter_prompts_go_first_until_a_long_one_has_waited_most_of_its_time():
    world = World(wait_s=20.0)
    world.fill()
    world.offer("long", prompt_len=4000)
    for n in range(30):
        world.offer(f"short{n}", prompt_len=500)
        world.prefilled()
        if "long" in world.placed:
            break
    assert world.placed[:-1] == [f"short{n}" for n in range(n)]
    assert world.now_s == pytest.approx(PATIENCE * (20.0 - 4 * WORK_S), abs=WORK_S)


def test_nobody_overtakes_by_coming_when_the_gate_is_open_again():
    world = World()
    world.fill()
    world.offer("waits")
    world.now_s += WORK_S
    world.view.release(world.now_s, world.tickets.pop(0))
    assert world.offer("comes later") == (None, [])
    world.gate.pump(world.now_s)
    assert world.placed == ["waits"]


def test_an_objective_that_cannot_be_kept_is_refused_at_once_with_when_to_come_again():
    world = World()
    world.fill()
    for n in range(10):
        world.offer(f"w{n}")
    answer, _ = world.offer("hurry", Terms(ttft_slo_s=5.0))
    assert isinstance(answer, Rejection)
    assert answer.reason is Reason.TTFT_SLO
    assert answer.retry_after_s == pytest.approx(8.0, abs=0.1)  # 12 s ahead and its own, of which 5 are fine
    assert len(world.gate) == 10


def test_an_objective_that_a_higher_class_can_keep_is_not_refused_for_those_it_passes():
    world = World()
    world.fill()
    for n in range(10):
        world.offer(f"w{n}", BATCH)
    answer, _ = world.offer("hurry", Terms(slo_class=CLASSES["premium"], ttft_slo_s=5.0))
    assert answer is None


def test_who_waits_beyond_the_deadline_is_told_so():
    world = World(wait_s=10.0)
    world.fill()
    world.offer("late")
    world.now_s = 10.0
    (outcome,) = world.gate.pump(world.now_s)
    assert outcome.request_id == "late"
    assert outcome.answer.reason is Reason.QUEUE_TIME
    assert outcome.answer.retry_after_s >= 1
    assert world.placed == []


def test_a_full_queue_sheds_batch_work_first():
    world = World(waiting_max=1)
    world.fill()
    world.offer("batch", BATCH)
    answer, others = world.offer("premium", PREMIUM)
    assert answer is None
    assert [(one.request_id, one.answer.reason) for one in others] == [("batch", Reason.QUEUE_FULL)]
    answer, others = world.offer("more", PREMIUM)
    assert answer.reason is Reason.QUEUE_FULL
    assert others == []


def test_a_client_that_left_is_not_let_in():
    world = World()
    world.fill()
    world.offer("gone")
    world.offer("stays")
    world.gate.leave("gone")
    world.gate.leave("unknown")
    world.prefilled()
    assert world.placed == ["stays"]


def test_with_nobody_alive_the_scheduler_answers_and_nobody_waits():
    world = World()
    world.view.link_down(0.0, "p")
    world.view.link_down(0.0, "d")
    gone = Rejection(request_id="r", reason=Reason.NO_INSTANCE_ALIVE, retry_after_s=1.0)
    for terms in (Terms(), BATCH):
        assert world.gate.offer(0.0, "r", lambda: Needs(1.0), terms, lambda _: gone) == (gone, [])


# ---------------------------------------------------------------- batch work


def job(seconds: float) -> Terms:
    return Terms(slo_class=CLASSES["batch"], job_s=seconds)


@pytest.mark.parametrize("hold_s", [0.0, HOLD_S])
def test_batch_work_begins_only_when_an_engine_does_nothing(hold_s):
    world = World(hold_s=hold_s)
    assert isinstance(world.offer("first", BATCH)[0], Plan)
    assert world.offer("second", BATCH) == (None, [])
    assert isinstance(world.offer("default")[0], Plan)  # who does not wait for batch work
    assert world.prefilled() == []
    world.finish()
    assert [one.request_id for one in world.prefilled()] == ["second"]


def test_batch_work_waits_while_anybody_better_does():
    world = World(hold_s=1e-6)
    world.offer("runs")
    world.offer("batch", BATCH)
    world.offer("default")
    world.idle()
    assert [one.request_id for one in world.gate.pump(world.now_s)] == ["default"]


def test_batch_work_that_engines_have_no_room_for_yet_is_not_turned_away():
    world = World()
    world.overloaded = True
    assert world.offer("batch", BATCH) == (None, [])
    assert world.gate.pump(world.now_s) == []
    assert isinstance(world.offer("default")[0], Rejection)
    world.overloaded = False
    assert [one.request_id for one in world.gate.pump(world.now_s)] == ["batch"]
    assert len(world.gate) == 0


def test_batch_work_waits_longer_than_others_but_not_for_ever():
    world = World(wait_s=10.0, batch_wait_s=100.0)
    world.offer("runs")
    world.offer("batch", BATCH)
    world.now_s = 98.0
    assert world.gate.pump(world.now_s) == []
    world.now_s = 99.0
    (outcome,) = world.gate.pump(world.now_s)
    assert outcome.answer.reason is Reason.QUEUE_TIME


def test_a_job_that_cannot_be_done_in_its_time_is_refused_at_once_with_why():
    world = World()
    world.answer_s = 4.0
    world.fill()  # two seconds
    answer, _ = world.offer("soon", job(6.0))
    assert answer.reason is Reason.JOB_TIME
    assert "predicted 7.0 s, of which 2.0 s others'; the job has 6.0 s" in answer.detail
    assert answer.retry_after_s == 1.0
    assert world.offer("longer", job(60.0)) == (None, [])
    assert isinstance(World().offer("at once", job(0.5))[0], Rejection), "engines that do nothing are no help"
    answer, _ = world.offer("never", job(4.5))
    assert answer.retry_after_s == 0.0, "it is no use to ask again"
    assert world.offer("possible", job(7.5)) == (None, [])


def test_no_more_jobs_are_taken_than_idle_capacity_has_done_of_late():
    world = World(hold_s=0.0)
    world.offer("runs")
    taken = 0
    while world.offer(f"job{taken}", job(400.0)) == (None, []):
        taken += 1
    answer, _ = world.offer("one more", job(400.0))
    assert answer.reason is Reason.JOB_TIME
    assert answer.retry_after_s >= 1
    assert taken == pytest.approx(400.0 * PACE_PRIOR / JOB_MARGIN, abs=2)
    assert world.offer("has more time", job(4000.0)) == (None, [])
    assert world.offer("no job", BATCH) == (None, [])


def test_a_job_that_would_be_late_goes_as_an_interactive_request():
    world = World(hold_s=0.0)
    world.offer("runs", prompt_len=1)
    assert world.offer("job", job(30.0)) == (None, [])
    world.now_s = 26.0  # of 30: a second of work twice, one of others', and a look
    assert world.gate.pump(world.now_s) == []
    world.now_s = 28.0
    (outcome,) = world.gate.pump(world.now_s)
    assert outcome.answer.promoted


def test_jobs_that_idle_capacity_is_too_slow_for_take_what_better_classes_would_be_left():
    world = World(hold_s=0.0)
    for n in range(8):  # answers of others: what batch work may add to their steps is little
        world.offer(f"other{n}")
    world.idle()
    taken = 0
    while isinstance(world.offer(f"batch{taken}", BATCH)[0], Plan):
        world.idle()
        taken += 1
    for n in range(8):
        assert world.offer(f"job{n}", job(60.0 + n)) == (None, [])
    world.idle()
    world.now_s = 45.0
    assert world.gate.pump(world.now_s) == []
    world.now_s = 52.5  # eight seconds of work, twice, do not fit into what is left
    assert [one.request_id for one in world.gate.pump(world.now_s)] == ["job0"]
    assert [one.request_id for one in world.prefilled()] == ["job1"]


def test_a_request_s_own_priority_goes_first_within_its_tenant_and_class():
    world = World(hold_s=1e-6)
    world.offer("runs")
    for name, priority in (("later", 5), ("usual", 0), ("first", -5)):
        world.offer(name, Terms(priority=priority))
    for _ in range(3):
        world.prefilled()
    assert world.placed[1:] == ["first", "usual", "later"]
