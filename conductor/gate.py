"""Between clients and scheduler: who is planned at once, who waits, who is turned away (paper 7). Pure.

The gate is open while some instance that prefills has less than hold_s seconds of work. Then requests are
planned as they come; otherwise they wait here, where classes, tenants and objectives still count for
something: in an engine's queue they do not any more. Requests whose objective would have passed before the
gate could open for them are turned away at once, with the time after which it is worth asking again.
"""

from collections.abc import Callable

import msgspec

from conductor.cluster import ClusterView
from conductor.plan import Plan, Reason, Rejection
from conductor.scheduler import retry_after
from conductor.terms import Terms
from conductor.waiting import Left, Waiting, WaitingRoom, Why

SHARE_MIN = 0.1
"""Of its objective may be spent waiting, even if computing seems to take all of it: it may be cached."""

PATIENCE = 0.8
"""Of the time it may wait, a request lets shorter ones pass. With 0.5 of it mean TTFT gains half as much;
with all of it 0.2 to 0.4 % more requests miss their objective (simulator, conversation trace at 2.4x)."""

Place = Callable[[float], Plan | Rejection]
"""Plans one request now (and charges its load), or says why not."""
Work = Callable[[], float]
"""Predicts seconds of one prompt's work, with what is known of it somewhere; asked only if it is to wait."""


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """hold_s 0: always open. waiting_max, tenant_max: requests. wait_s: longest wait without an objective."""

    hold_s: float = 0.0
    waiting_max: int = 4096
    tenant_max: int = 2048
    wait_s: float = 60.0


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
    ) -> None:
        """`cluster` is the Conductor's view; `weight` is a tenant's, None: all have the same."""
        self._config = config
        self._cluster = cluster
        self._room = WaitingRoom(config.waiting_max, config.tenant_max, weight)
        self._places: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self._room)

    def offer(
        self, now_s: float, request_id: str, work: Work, terms: Terms, place: Place
    ) -> tuple[Plan | Rejection | None, list[Outcome]]:
        """Return the answer, None = it waits; and who had to go for it."""
        if not len(self._room) and self._is_open(now_s):
            return place(now_s), []
        work_s = work()
        limit_s = self._config.wait_s if terms.ttft_slo_s is None else terms.ttft_slo_s
        ahead_s = self._ahead_s(now_s, terms.slo_class.rank)
        if terms.ttft_slo_s is not None and ahead_s + work_s > limit_s:
            retry_after_s = retry_after(ahead_s + work_s - limit_s)
            detail = f"predicted {ahead_s + work_s:.1f} s in the queue, objective {limit_s:.1f} s"
            return _rejection(request_id, Reason.TTFT_SLO, detail, retry_after_s), []
        wait_s = max(limit_s - work_s, limit_s * SHARE_MIN)
        one = Waiting(
            request_id=request_id,
            tenant=terms.tenant,
            rank=terms.slo_class.rank,
            work=work_s,
            deadline_s=now_s + wait_s,
            patient_s=now_s + wait_s * PATIENCE,
            sheddable=terms.slo_class.sheddable,
            # half of its time may be spent waiting: the rest is for prefill, decode and mistakes
            promote_s=None if terms.job_s is None else now_s + terms.job_s / 2,
        )
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
            self._places[request_id] = place
        return own, others

    def pump(self, now_s: float) -> list[Outcome]:
        """Let those in for whom there is room now, and those go whose time is up."""
        outcomes = []
        for left in self._room.expire(now_s):
            del self._places[left.waiting.request_id]
            outcomes.append(Outcome(left.waiting.request_id, self._left(now_s, left)))
        while len(self._room) and self._is_open(now_s):
            one = self._room.take(now_s)
            assert one is not None
            outcomes.append(Outcome(one.request_id, self._places.pop(one.request_id)(now_s)))
        return outcomes

    def leave(self, request_id: str) -> None:
        """The client of a request left; unknown ones are fine."""
        if self._room.remove(request_id):
            del self._places[request_id]

    # ------------------------------------------------------------ inside

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


def _rejection(request_id: str, reason: Reason, detail: str, retry_after_s: float) -> Rejection:
    return Rejection(request_id=request_id, reason=reason, retry_after_s=retry_after_s, detail=detail)
