"""The planner: roles follow the load, nobody flaps, floors hold."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.cost import CostModel
from conductor.plan import Decision, Plan
from conductor.planner import (
    BUSY_MAX,
    CONFIRMED,
    REST,
    SHARE_MAX,
    TBT_MAX,
    TBT_SLO_S,
    Member,
    Planner,
    PlannerConfig,
    Switch,
)

INTERVAL_S = 5.0
STEP = (0.0266, 1.5e-4, 3.1e-8)
"""Of a 70B model on eight GPUs: 27 ms a step and more with batch and context."""


def member(name: str, role: str, queue_s: float = 0.0, requests: int = 0, context: int = 1000) -> Member:
    return Member(name, role, queue_s, 0, requests, requests * context, 1_300_000, 512)


def members(prefill: int, decode: int, **kwargs) -> list[Member]:
    return [member(f"p{n:02}", "prefill", **kwargs) for n in range(prefill)] + [
        member(f"d{n:02}", "decode") for n in range(decode)
    ]


def make(**kwargs) -> Planner:
    return Planner(PlannerConfig(interval_s=INTERVAL_S, **kwargs), CostModel(tbt_prior=STEP))


def feed(
    planner: Planner,
    requests_s: float,
    work_s: float,
    prompt: int = 12_000,
    answer: int = 340,
    answer_max: int = 4096,
) -> None:
    """One interval of arrivals."""
    for _ in range(round(requests_s * INTERVAL_S)):
        plan = Plan(
            request_id="r", prefill="p", decode="d", decision=Decision.LEAST_LOAD, predicted_prefill_s=work_s
        )
        planner.planned(plan, prompt, answer, answer_max)
        planner.answered(answer)


class Pool:
    """Members whose switches take effect after `drain` intervals."""

    def __init__(self, planner: Planner, prefill: int, decode: int, drain: int = 2) -> None:
        self.planner = planner
        self.members = members(prefill, decode)
        self.drain = drain
        self.leaving: dict[str, tuple[int, str]] = {}
        self.switches: list[Switch] = []

    @property
    def split(self) -> tuple[int, int]:
        roles = [one.role for one in self.members]
        return roles.count("prefill"), roles.count("decode")

    def interval(self) -> None:
        for name, (left, role) in list(self.leaving.items()):
            self.leaving[name] = left - 1, role
            if left <= 0:
                del self.leaving[name]
                self._set(name, role)
        for switch in self.planner.step(self.members):
            self.switches.append(switch)
            self.leaving[switch.instance_id] = self.drain, switch.role
            self._set(switch.instance_id, "draining")

    def _set(self, name: str, role: str) -> None:
        self.members = [
            msgspec.structs.replace(one, role=role) if one.instance_id == name else one
            for one in self.members
        ]

    def run(self, intervals: int, requests_s: float, work_s: float, **kwargs) -> None:
        for _ in range(intervals):
            feed(self.planner, requests_s, work_s, **kwargs)
            self.interval()


def test_without_load_nobody_changes_role():
    pool = Pool(make(), 8, 8)
    pool.run(20, 0.0, 1.0)
    assert pool.switches == []


def test_a_pool_that_is_not_under_pressure_is_left_alone_however_unbalanced():
    pool = Pool(make(), 8, 8)
    pool.run(40, 2.0, 1.0)  # a third of the prefill pool, decode nearly idle
    assert pool.switches == []


def test_prompts_beyond_the_prefill_pool_turn_decode_instances_to_prefill():
    pool = Pool(make(), 8, 8)
    pool.run(60, 9.0, 1.1)  # ten instances' worth of prompts
    assert pool.split[0] in (12, 13)
    assert {switch.role for switch in pool.switches} == {"prefill"}


def test_answers_beyond_the_decode_pool_turn_prefill_instances_to_decode():
    pool = Pool(make(), 12, 4)
    pool.run(60, 8.0, 0.1, prompt=30_000, answer=900)
    assert pool.split[1] > 6
    assert {switch.role for switch in pool.switches} == {"decode"}


def test_one_interval_alone_moves_nobody():
    pool = Pool(make(), 8, 8)
    for _ in range(CONFIRMED - 1):
        feed(pool.planner, 9.0, 1.1)
        pool.interval()
    assert pool.switches == []


def test_few_are_on_their_way_at_a_time():
    pool = Pool(make(), 8, 8, drain=1000)
    pool.run(50, 9.0, 1.4)
    assert len(pool.switches) == len(pool.members) // SHARE_MAX


def test_a_backlog_of_prompts_never_takes_decode_beyond_its_room():
    planner = make()
    pool = Pool(planner, 8, 8)
    pool.members = members(8, 8, queue_s=300.0)
    for _ in range(60):
        feed(planner, 9.0, 1.1)
        pool.interval()
    assert planner.forecast.decode_pressure <= 1
    assert pool.split[1] >= 3


def test_answers_that_run_on_count_before_any_of_them_has_ended():
    planner = make()
    long = [member(f"d{n}", "decode", requests=250) for n in range(2)]
    crowd = [member(f"p{n}", "prefill") for n in range(6)]
    for _ in range(CONFIRMED):
        feed(planner, 2.0, 0.1, prompt=500, answer=10)  # by what ended, there is nothing to do
        switches = planner.step([*crowd, *long])
    assert {switch.role for switch in switches} == {"decode"}


def test_who_waits_for_its_prompt_is_not_decoded_yet():
    planner = make()
    queued = [msgspec.structs.replace(member(f"p{n}", "prefill"), prefill_requests=250) for n in range(2)]
    for _ in range(CONFIRMED):
        feed(planner, 2.0, 0.1, prompt=500, answer=10)
        switches = planner.step([*queued, *(member(f"d{n}", "decode", requests=250) for n in range(2))])
    assert switches == []


def test_answers_that_grow_longer_are_believed_within_a_hundred_of_them():
    planner = make()
    for _ in range(500):
        planner.answered(20)
    for _ in range(100):
        planner.answered(1000)
    feed(planner, 8.0, 0.01, prompt=500, answer=1000)
    planner.step(members(4, 1))
    assert planner.forecast.decode_pressure > 1


def test_those_on_their_way_count_as_arrived():
    pool = Pool(make(), 8, 8, drain=1000)
    pool.run(60, 9.0, 1.0)
    assert pool.split == (8, 4)
    assert pool.planner.forecast.prefill_pressure == pytest.approx(9.0 / (12 * BUSY_MAX), rel=0.01)


def test_nobody_goes_the_other_way_soon_after_a_switch():
    pool = Pool(make(), 8, 8)
    at: dict[str, list[int]] = {"prefill": [], "decode": []}
    for interval in range(200):
        prompts = interval // 8 % 2 == 0  # the load turns round every 40 s
        before = len(pool.switches)
        pool.run(1, 9.0, 1.3 if prompts else 0.1, answer=20 if prompts else 2000)
        for switch in pool.switches[before:]:
            at[switch.role].append(interval)
    assert at["prefill"]
    assert at["decode"]
    assert min(abs(up - down) for up in at["prefill"] for down in at["decode"]) > REST


def test_the_least_busy_instance_goes_first():
    planner = make()
    busy = [member(f"d{n}", "decode", requests=9 - n) for n in range(8)]
    crowd = [member(f"p{n}", "prefill") for n in range(8)]
    for _ in range(CONFIRMED + 3):
        feed(planner, 9.0, 1.1)
        switches = planner.step([*crowd, *busy])
        if switches:
            break
    assert [switch.instance_id for switch in switches] == ["d7", "d6", "d5", "d4"][: len(switches)]


def test_replica_counts_are_what_each_pool_needs_alone():
    pool = Pool(make(), 2, 2)
    pool.run(30, 9.0, 1.0)
    forecast = pool.planner.forecast
    assert forecast.prefill_wanted == 11  # 9 seconds of work per second, at 0.85
    assert 3 <= forecast.decode_wanted <= 5
    assert forecast.requests_s == pytest.approx(9.0, rel=0.05)


def test_a_pool_that_cannot_be_helped_by_switching_asks_for_replicas_only():
    pool = Pool(make(), 1, 1)
    pool.run(30, 9.0, 1.0)
    assert pool.switches == []
    assert pool.planner.forecast.prefill_wanted > 1


def test_steady_load_ends_in_steady_roles():
    pool = Pool(make(), 8, 8)
    pool.run(80, 9.0, 1.1)
    settled = len(pool.switches)
    pool.run(100, 9.0, 1.1)
    assert len(pool.switches) == settled


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.floats(0, 12), st.floats(0.001, 3.0)), min_size=1, max_size=25),
)
def test_floors_hold_and_the_same_calls_give_the_same_answers(prefill, decode, low, high, load):
    runs = []
    for _ in range(2):
        pool = Pool(make(prefill_min=low, decode_min=high), prefill, decode, drain=1)
        for requests_s, work_s in load:
            before = pool.split
            feed(pool.planner, requests_s, work_s)
            pool.interval()
            after = pool.split
            assert after[0] >= min(before[0], low)
            assert after[1] >= min(before[1], high)
        runs.append(pool.switches)
    assert runs[0] == runs[1]


def test_a_prompt_that_a_decode_instance_computes_asks_for_no_prefill_instance():
    plans = {
        decision: Plan(request_id="r", prefill=None, decode="d", decision=decision, predicted_prefill_s=0.5)
        for decision in (Decision.INLINED, Decision.APPENDED, Decision.SINGLE_TOKEN)
    }
    pressures = {}
    for decision, plan in plans.items():
        planner = make()
        for _ in range(20):
            planner.planned(plan, 500, 340, 4096)
        planner.step(members(2, 2))
        pressures[decision] = planner.forecast.prefill_pressure
    assert pressures[Decision.INLINED] == pressures[Decision.APPENDED] == 0.0
    assert pressures[Decision.SINGLE_TOKEN] > 0.0


def test_answers_that_clients_keep_short_ask_for_no_decode_instance_before_any_of_them_has_ended():
    pressures = []
    for answer_max in (4096, 8):
        planner = make()
        for _ in range(20):
            feed(planner, 4.0, 0.2, answer=400)
            planner.step(members(2, 2))
        for _ in range(10):
            for _ in range(20):
                plan = Plan(request_id="r", prefill="p", decode="d", decision=Decision.LEAST_LOAD)
                planner.planned(plan, 12_000, min(answer_max, 400), answer_max)
            planner.step(members(2, 2))
        pressures.append(planner.forecast.decode_pressure)
    idle = STEP[0] / (TBT_MAX * TBT_SLO_S)  # of a step with nobody in it
    long, short = (pressure - idle for pressure in pressures)
    assert 0 <= short < long / 5
