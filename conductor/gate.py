"""Between clients and scheduler: who is planned at once, who waits, who is turned away (paper 7). Pure.

The gate is open while some instance that prefills has less than hold_s seconds of work. Then requests are
planned as they come; otherwise they wait here, where classes, tenants and objectives still count for
something: in an engine's queue they do not any more. Requests whose objective would have passed before the
gate could open for them are turned away at once, with the time after which it is worth asking again.

Batch work always waits here, until nobody better does and engines are idle enough (conductor.idle). A job
says until when it is worth something: one that cannot be done until then is turned away at once; when idle
capacity is too slow for those that wait, they take what is free at all; and who would be late even so goes
as an interactive request.
"""

from collections.abc import Callable
from math import inf

import msgspec

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.idle import Idle, Pace
from conductor.plan import Needs, Plan, Reason, Rejection
from conductor.scheduler import retry_after
from conductor.terms import Terms
from conductor.waiting import JOB_MARGIN, PROMOTED, Left, Waiting, WaitingRoom, Why

SHARE_MIN = 0.1
"""Of its objective may be spent waiting, even if computing seems to take all of it: it may be cached."""

PATIENCE = 0.8
"""Of the time it may wait, a request lets shorter ones pass. With 0.5 of it mean TTFT gains half as much;
with all of it 0.2 to 0.4 % more requests miss their objective (simulator, conversation trace at 2.4x)."""

URGENT_LOOK_S = 0.25
"""So often it is asked whether jobs would be late: four thousand of them take half a millisecond."""
LOOK_S = 0.5
"""Jobs are promoted so much earlier: somebody looks four times a second, more seldom on a busy machine."""
_LOAD = frozenset({Reason.QUEUE_FULL, Reason.TBT_SLO, Reason.PREFILL_LOAD, Reason.DECODE_LOAD})
"""Why the scheduler turns away what it would take later: batch work goes on waiting."""

Place = Callable[[float], Plan | Rejection]
"""Plans one request now (and charges its load), or says why not."""
Work = Callable[[], Needs]
"""Predicts what a request takes, with what is known of its prompt somewhere; asked only if it is to wait."""


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """hold_s 0: always open. waiting_max, tenant_max: requests. wait_s: longest wait without an objective.

    batch_wait_s: the same of batch work; OpenAI's client waits as long.
    """

    hold_s: float = 0.0
    waiting_max: int = 4096
    tenant_max: int = 2048
    wait_s: float = 60.0
    batch_wait_s: float = 600.0


class Outcome(msgspec.Struct, frozen=True):
    """What became of a request that waited, or of one that had to go for another."""

    request_id: str
    answer: Plan | Rejection


class Gate:
    """Every request offered gets one answer: from `offer`, or in an Outcome of `offer`, `pump`; or leaves."""

    def __init__(
        self,
        config: GateConfig,
        cluster: ClusterView,
        weight: Callable[[str], float] | None = None,
        cost: CostModel | None = None,
    ) -> None:
        """`cluster` and `cost` are the Conductor's; `weight` is a tenant's, None: all have the same."""
        self._config = config
        self._cluster = cluster
        self._idle = Idle(cluster, CostModel() if cost is None else cost)
        self._pace = Pace()
        self._urgent_s = -URGENT_LOOK_S  # when it was asked last
        self._room = WaitingRoom(config.waiting_max, config.tenant_max, weight)
        self._places: dict[str, tuple[Place, Needs]] = {}

    def __len__(self) -> int:
        return len(self._room)

    def change(self, config: GateConfig) -> None:
        """Open by these from now on; who waits keeps its place and its deadline, and bounds stay."""
        bounds = {"waiting_max": self._config.waiting_max, "tenant_max": self._config.tenant_max}
        self._config = msgspec.structs.replace(config, **bounds)

    def offer(
        self, now_s: float, request_id: str, work: Work, terms: Terms, place: Place
    ) -> tuple[Plan | Rejection | None, list[Outcome]]:
        """Return the answer, None = it waits; and who had to go for it."""
        is_batch, best = terms.slo_class.sheddable, self._room.best_rank
        if not is_batch:
            self._idle.heard(now_s)
            if (best is None or best > terms.slo_class.rank) and self._is_open(now_s):
                return place(now_s), []
        needs = work()
        if rejection := self._too_late(now_s, request_id, terms, needs):
            return rejection, []
        if is_batch and best is None and self._idle.has_room(now_s, needs):
            answer = place(now_s)
            if not _may_wait(answer):
                return answer, []
        one = self._waiting(now_s, request_id, terms, needs)
        own: Rejection | None = None
        others: list[Outcome] = []
        for left in self._room.add(one):
            rejection = self._left(now_s, left)
            if left.waiting is one:
                own = rejection
            else:
                del self._places[left.waiting.request_id]
                others.append(Outcome(left.waiting.request_id, rejection))
        if own is None:
            self._places[request_id] = place, needs
        return own, others

    def pump(self, now_s: float) -> list[Outcome]:
        """Let those in for whom there is room now, and those go whose time is up."""
        outcomes = []
        for left in self._room.expire(now_s):
            del self._places[left.waiting.request_id]
            outcomes.append(Outcome(left.waiting.request_id, self._left(now_s, left)))
        while (one := self._room.next(now_s)) is not None:
            is_batch = one.sheddable and one.rank > PROMOTED
            if not is_batch and not self._is_open(now_s):
                break
            is_idle = is_batch and self._idle.has_room(now_s, self._places[one.request_id][1])
            if is_batch and not is_idle and (one := self._urgent(now_s)) is None:
                break
            place, _ = self._places[one.request_id]
            answer = place(now_s)
            if is_batch and _may_wait(answer):
                break
            self._room.serve(one)
            if is_idle:
                self._pace.began(now_s, one.work, more_waits=self._room.sheddable > 0)
            del self._places[one.request_id]
            if one.sheddable and not is_batch and isinstance(answer, Plan):
                answer = msgspec.structs.replace(answer, promoted=True)
            outcomes.append(Outcome(one.request_id, answer))
        self._pace.began(now_s, 0.0, more_waits=self._room.sheddable > 0)
        return outcomes

    def leave(self, request_id: str) -> None:
        """The client of a request left; unknown ones are fine."""
        if self._room.remove(request_id):
            del self._places[request_id]

    # ------------------------------------------------------------ inside

    def _too_late(self, now_s: float, request_id: str, terms: Terms, needs: Needs) -> Rejection | None:
        """Return why there is no use in waiting: the objective, or the job's time, would have passed."""
        if terms.job_s is not None and terms.slo_class.sheddable:
            # what is idle varies: jobs that cannot be done beside others would be done instead of them
            pace = self._pace.per_s(max(1, len(self._queues(now_s))))
            jobs_s = JOB_MARGIN * self._room.job_work(now_s + terms.job_s) / pace
            ahead_s = max(self._ahead_s(now_s, PROMOTED), jobs_s)
            took_s = ahead_s + needs.prefill_s + needs.answer_s
            if took_s <= terms.job_s:
                return None
            possible = needs.prefill_s + needs.answer_s <= terms.job_s
            detail = (
                f"predicted {took_s:.1f} s, of which {ahead_s:.1f} s others'; the job has {terms.job_s:.1f} s"
            )
            retry_after_s = retry_after(took_s - terms.job_s) if possible else 0.0
            return _rejection(request_id, Reason.JOB_TIME, detail, retry_after_s)
        if terms.ttft_slo_s is None:
            return None
        ahead_s = self._ahead_s(now_s, terms.slo_class.rank)
        if ahead_s + needs.prefill_s <= terms.ttft_slo_s:
            return None
        retry_after_s = retry_after(ahead_s + needs.prefill_s - terms.ttft_slo_s)
        detail = (
            f"predicted {ahead_s + needs.prefill_s:.1f} s in the queue, objective {terms.ttft_slo_s:.1f} s"
        )
        return _rejection(request_id, Reason.TTFT_SLO, detail, retry_after_s)

    def _waiting(self, now_s: float, request_id: str, terms: Terms, needs: Needs) -> Waiting:
        is_batch, work_s = terms.slo_class.sheddable, needs.prefill_s
        limit_s = self._config.batch_wait_s if is_batch else self._config.wait_s
        end_s, promote_s = inf, None
        if terms.ttft_slo_s is not None:
            limit_s = terms.ttft_slo_s
        elif is_batch and terms.job_s is not None:
            limit_s, end_s = terms.job_s - needs.answer_s, now_s + terms.job_s
            # it does not begin at once then either, and predictions are no promises
            needed_s = JOB_MARGIN * (work_s + needs.answer_s) + self._ahead_s(now_s, PROMOTED) + LOOK_S
            promote_s = end_s - needed_s
        wait_s = max(limit_s - work_s, limit_s * SHARE_MIN)
        return Waiting(
            request_id=request_id,
            tenant=terms.tenant,
            rank=terms.slo_class.rank,
            work=work_s,
            deadline_s=now_s + wait_s,
            patient_s=patient_until(now_s, wait_s, terms),
            sheddable=is_batch,
            priority=terms.priority,
            promote_s=promote_s,
            end_s=end_s,
            answer_s=needs.answer_s,
        )

    def _urgent(self, now_s: float) -> Waiting | None:
        """Return the first job, if jobs would be late with what is idle alone and there is room for it."""
        if now_s - self._urgent_s < URGENT_LOOK_S:
            return None
        urgent = self._room.urgent(now_s, max(1, len(self._queues(now_s))))
        if urgent is None:
            self._urgent_s = now_s
            return None
        return urgent if self._idle.has_room(now_s, self._places[urgent.request_id][1], urgent=True) else None

    def _is_open(self, now_s: float) -> bool:
        """An empty cluster is open too: the scheduler says best what is missing."""
        if not self._config.hold_s:
            return True
        queues = self._queues(now_s)
        return not queues or min(queues) < self._config.hold_s

    def _queues(self, now_s: float) -> list[float]:
        """Return seconds of work, by instance; what is overdue is taken to need as long again."""
        loads = [load for record, load in self._cluster.alive() if record.role != "decode"]
        return [load.queue_s(now_s) + load.overdue_s(now_s) for load in loads]

    def _ahead_s(self, now_s: float, rank: int | None = None) -> float:
        """Return when those who go before `rank` will have begun, if they share all instances."""
        queues = self._queues(now_s)
        return (self._room.work(rank) + sum(queues)) / len(queues) if queues else 0.0

    def _left(self, now_s: float, left: Left) -> Rejection:
        reason = Reason.QUEUE_FULL if left.why is not Why.EXPIRED else Reason.QUEUE_TIME
        retry_after_s = retry_after(self._ahead_s(now_s))
        detail = "" if left.why in {Why.EXPIRED, Why.FULL} else str(left.why)
        return _rejection(left.waiting.request_id, reason, detail, retry_after_s)


def _may_wait(answer: Plan | Rejection) -> bool:
    return isinstance(answer, Rejection) and answer.reason in _LOAD


def patient_until(now_s: float, wait_s: float, terms: Terms) -> float:
    """Return until when a request that may wait for `wait_s` lets shorter ones pass.

    A turn of an agent's program is as patient as if it had come with the first one (Continuum's first come,
    first served by program), but never goes before those that have waited longer than their patience.
    """
    since_s = now_s if terms.since_s is None else min(terms.since_s, now_s)
    return max(now_s, since_s + wait_s * PATIENCE)


def _rejection(request_id: str, reason: Reason, detail: str, retry_after_s: float) -> Rejection:
    return Rejection(request_id=request_id, reason=reason, retry_after_s=retry_after_s, detail=detail)
