"""Who prefills and who decodes, and how many of each there should be (after Arrow, arXiv 2505.11916). Pure.

Arrivals are counted as they are planned; from their rate, the work of a prompt and the length of an answer
follows, by Little's law, what a pool of n instances would feel. Answers that have grown longer end late, so
decode never feels less than what the answers make it feel that run now. A pool's *pressure* is 1 where it is
just enough:

    prefill   (work that arrives per second + what is queued beyond one interval, over QUEUE_S)
              / (n * BUSY_MAX)
    decode    the largest of step time / (objective * TBT_MAX), KV in contexts / (room * KV_MAX), and
              batch / sequences allowed

A pool of decode instances steps in a + (b + c * context) * batch seconds, and its batch is answers * step:
so the step is a / (1 - answers * (b + c * context)), without end where the denominator is not positive.

A switch needs a pool under pressure, a split that is better by GAIN_MIN, twice in a row, few others on their
way, who count as arrived, and REST since one the other way; so does nobody flap. Replica counts are what
either pool needs alone, with the same margins.
"""

from collections.abc import Sequence
from math import inf

import msgspec

from conductor.cluster import Load
from conductor.cost import OUTPUT_TOKENS_PRIOR, CostModel
from conductor.plan import BESIDE_ANSWERS, Plan
from mooncake.core.messages import InstanceRecord

BUSY_MAX = 0.85
"""Of an engine's time: beyond it, queues of prompts of so different lengths grow without much warning."""
TBT_MAX = 0.75
"""Of the objective: it is asked of the slowest tenth of an answer's tokens, not of their mean."""
KV_MAX = 0.9
"""Of the KV room: answers whose length nobody knows come on top."""
QUEUE_S = 30.0
"""A backlog should be gone after so long: an interval of the objective of most services."""
PRESSURE_MIN = 0.75
"""A pool that feels less needs no help; below it, being better balanced changes nothing for a user."""
GAIN_MIN = 0.1
"""Part of the pressure that a switch must take away: it costs a drain and a cold start."""
CONFIRMED = 2
"""Intervals in a row in which the same direction was right."""
REST = 12
"""Intervals after a switch before anybody goes the other way: what came of it has to show first."""
MEMORY = 0.2
"""Weight of the newest interval: half of the rate is the last 15 s at 5 s an interval."""
TREND_MEMORY = 0.1
ANSWER_MEMORY = 0.02
"""Weight of one answer: the mean of the last 50 or so. With 500, longer ones were followed minutes late."""
ANSWERS_PRIOR = 25
"""So many answers of the prior's length count as seen."""
AHEAD = 3
"""Intervals that the forecast looks ahead: about what a drain takes."""
TBT_SLO_S = 0.1
"""Where no objective is set."""
GROWTH_MAX = 4
"""Replicas asked for are at most so many times those there are: a spike is no forecast."""
OVERFULL = 4
"""Power of a decode pressure above 1: a backlog of prompts is no reason to go there."""
SHARE_MAX = 4
"""At most one of so many instances is under way at a time (but always one may be)."""


class Member(msgspec.Struct, frozen=True):
    """One instance as the planner sees it. role: prefill | decode, or anything else: on its way."""

    instance_id: str
    role: str
    queue_s: float
    prefill_requests: int
    decode_requests: int
    decode_kv_tokens: int
    kv_tokens_max: int
    sequences_max: int


def member_of(now_s: float, record: InstanceRecord, load: Load) -> Member:
    """Return an instance as the planner sees it."""
    return Member(
        instance_id=record.instance_id,
        role=record.role,
        queue_s=load.queue_s(now_s),
        prefill_requests=load.prefill_requests,
        decode_requests=load.decode_requests,
        decode_kv_tokens=load.decode_kv_tokens,
        kv_tokens_max=record.kv_blocks * record.block_size,
        sequences_max=record.max_num_seqs,
    )


class Switch(msgspec.Struct, frozen=True):
    """Let an instance finish what it has, then take the other role."""

    instance_id: str
    role: str


class Forecast(msgspec.Struct, frozen=True):
    """What the planner believes, for metrics and people. Pressures of the pools as they are."""

    requests_s: float
    prefill_work: float
    prefill_pressure: float
    decode_pressure: float
    prefill_wanted: int
    decode_wanted: int


class PlannerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """interval_s: between two calls of `step`; prefill_min, decode_min: floors of the roles."""

    interval_s: float = 5.0
    prefill_min: int = 1
    decode_min: int = 1
    tbt_slo_s: float | None = None


def _cost(prefill: float, decode: float) -> float:
    """What a split is worth: a late prompt is late, but decode beyond its room stops everybody's answers."""
    return max(prefill, decode if decode <= 1 else decode**OVERFULL)


class _Room(msgspec.Struct, frozen=True):
    """Of the mean decode instance."""

    kv_tokens: float
    sequences: float


class _Rate:
    """Level and trend of a quantity per second (Holt), from what was counted in each interval."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._level = 0.0
        self._trend = 0.0
        self._seen = 0

    def add(self, amount: float) -> None:
        self._counted += amount

    def close(self, interval_s: float) -> None:
        found, self._counted = self._counted / interval_s, 0.0
        self._seen += 1
        before = self._level
        # a true mean until the memory is full: the first interval is no forecast
        weight = max(MEMORY, 1 / self._seen)
        self._level += (found - before) * weight
        if self._seen > 1:
            self._trend += (self._level - before - self._trend) * TREND_MEMORY

    @property
    def ahead(self) -> float:
        """The larger of now and soon: a fall has to come true before anybody counts on it."""
        return max(self._level, self._level + AHEAD * self._trend)


class Planner:
    """Fed by every plan; `step` once per interval. The same calls give the same answers."""

    def __init__(self, config: PlannerConfig, cost: CostModel) -> None:
        """`cost` is the Conductor's."""
        self._config = config
        self._cost = cost
        self._requests, self._work_s, self._context = _Rate(), _Rate(), _Rate()
        # requests that may have an answer of the usual length; a part of one that may not
        self._whole = _Rate()
        self._tokens = OUTPUT_TOKENS_PRIOR
        self._answers = 0
        self._running, self._running_kv = 0, 0.0  # answers now, and KV tokens of their contexts
        self._direction = ""
        self._times = 0
        self._rested = REST  # intervals since the last switch, which was
        self._last = ""  # to this role
        self._ordered: dict[str, str] = {}  # who is on its way to which role
        self.forecast = Forecast(0.0, 0.0, 0.0, 0.0, config.prefill_min, config.decode_min)

    def change(self, config: PlannerConfig) -> None:
        """Plan by these from now on; what was measured stays."""
        self._config = config

    @property
    def interval_s(self) -> float:
        """Seconds between two calls of `step`."""
        return self._config.interval_s

    def answered(self, tokens: int) -> None:
        """An answer of so many tokens ended."""
        self._answers += 1
        # a true mean first: the moving mean of few answers is noise, and short ones end first
        self._tokens += (tokens - self._tokens) * max(ANSWER_MEMORY, 1 / (self._answers + ANSWERS_PRIOR))

    def planned(self, plan: Plan, prompt_tokens: int, answer_tokens: int, answer_tokens_max: int) -> None:
        """A request was taken, with so many tokens expected of its answer, and so many allowed."""
        self._requests.add(1)
        # what a client allows is known at once; that answers have grown shorter, when fifty have ended
        self._whole.add(min(1.0, answer_tokens_max / self._tokens))
        if plan.decision not in BESIDE_ANSWERS:  # that is no work of the prefill instances
            self._work_s.add(plan.predicted_prefill_s)
        self._context.add(prompt_tokens + answer_tokens / 2)  # on average, over its answer's time

    def step(self, members: Sequence[Member]) -> list[Switch]:
        """Close an interval; return who is to change its role now."""
        for rate in (self._requests, self._work_s, self._context, self._whole):
            rate.close(self._config.interval_s)
        prefills = [one for one in members if one.role == "prefill"]
        decodes = [one for one in members if one.role == "decode"]
        if not prefills or not decodes:
            return []
        going = {one.instance_id for one in members} - {one.instance_id for one in (*prefills, *decodes)}
        self._ordered = {name: role for name, role in self._ordered.items() if name in going}
        # a pool is what it will be when those on their way have come
        here = len(prefills) + sum(role == "prefill" for role in self._ordered.values())
        total = len(prefills) + len(decodes) + len(self._ordered)
        backlog_s = sum(max(0.0, one.queue_s - self._config.interval_s) for one in prefills)
        room = _Room(
            sum(one.kv_tokens_max for one in decodes) / len(decodes) * KV_MAX,
            sum(one.sequences_max for one in decodes) / len(decodes),
        )
        self._see_answers(members)
        pressures = {n: self._pressures(n, total - n, backlog_s, room) for n in range(1, total)}
        now = pressures[here]
        self.forecast = Forecast(
            self._requests.ahead, self._work_s.ahead, *now, *self._wanted(total, backlog_s, room)
        )
        low, high = self._config.prefill_min, total - self._config.decode_min
        allowed = {n: _cost(*both) for n, both in pressures.items() if low <= n <= high}
        best = min(allowed, key=lambda n: (allowed[n], abs(n - here)), default=here)
        if max(now) < PRESSURE_MIN or allowed.get(best, inf) > _cost(*now) * (1 - GAIN_MIN):
            best = here
        return self._confirmed(prefills, decodes, best - here, len(going))

    def _see_answers(self, members: Sequence[Member]) -> None:
        taken = sum(one.decode_requests for one in members)
        # a request is its decode instance's from the begin on
        self._running = max(0, taken - sum(one.prefill_requests for one in members))
        self._running_kv = self._running * sum(one.decode_kv_tokens for one in members) / max(1, taken)

    def _confirmed(
        self, prefills: list[Member], decodes: list[Member], moves: int, under_way: int
    ) -> list[Switch]:
        direction = "prefill" if moves > 0 else "decode" if moves < 0 else ""
        self._times = self._times + 1 if direction == self._direction else 1
        self._direction = direction
        self._rested += 1
        back = direction != self._last and self._rested <= REST
        if not direction or back or self._times < CONFIRMED:
            return []
        free = max(1, (len(prefills) + len(decodes) + under_way) // SHARE_MAX) - under_way
        # the least busy one is free first, and loses least
        if moves > 0:
            order = sorted(decodes, key=lambda one: (one.decode_requests, one.queue_s, one.instance_id))
        else:
            order = sorted(prefills, key=lambda one: (one.queue_s, one.decode_requests, one.instance_id))
        count = max(0, min(abs(moves), free, len(order) - 1))
        if count:
            self._rested, self._last = 0, direction
        self._ordered |= {one.instance_id: direction for one in order[:count]}
        return [Switch(one.instance_id, direction) for one in order[:count]]

    def _wanted(self, total: int, backlog_s: float, room: _Room) -> tuple[int, int]:
        """Return the fewest instances of each role that feel a pressure of at most 1."""
        limit = total * GROWTH_MAX
        prefill = next((n for n in range(1, limit) if self._pressures(n, 1, backlog_s, room)[0] <= 1), limit)
        decode = next((n for n in range(1, limit) if self._pressures(1, n, backlog_s, room)[1] <= 1), limit)
        return max(prefill, self._config.prefill_min), max(decode, self._config.decode_min)

    def _pressures(self, prefills: int, decodes: int, backlog_s: float, room: _Room) -> tuple[float, float]:
        prefill = (self._work_s.ahead + backlog_s / QUEUE_S) / (prefills * BUSY_MAX)
        batch, kv_tokens = self._running / decodes, self._running_kv / decodes
        tbt_s = self._cost.tbt_s(round(batch), round(kv_tokens))
        decode = self._pressure(batch, kv_tokens, tbt_s, room) if batch else 0.0
        requests_s = self._requests.ahead
        if requests_s > 0:
            context = self._context.ahead / requests_s
            decode = max(decode, self._expected(self._whole.ahead * self._tokens / decodes, context, room))
        return prefill, decode

    def _expected(self, tokens_s: float, context: float, room: _Room) -> float:
        """Return the pressure of a decode instance that gives so many tokens per second."""
        step_s, request_s, kv_s = self._cost.tbt_coefficients()
        left = 1 - tokens_s * (request_s + kv_s * context)
        if left <= 0:
            return inf
        tbt_s = step_s / left
        batch = tokens_s * tbt_s
        return self._pressure(batch, batch * context, tbt_s, room)

    def _pressure(self, batch: float, kv_tokens: float, tbt_s: float, room: _Room) -> float:
        slow = tbt_s / (TBT_MAX * (self._config.tbt_slo_s or TBT_SLO_S))
        return max(slow, kv_tokens / room.kv_tokens, batch / room.sequences)
