"""Who is next when engines have enough to do: classes, tenants with weights, deadlines. Pure.

    class     a lower rank goes first, always; a request with `promote_s` takes the rank PROMOTED from then
              on (batch work that would miss its job's objective otherwise); see also `urgent`
    tenant    within a rank, the one with the least work taken by weight (VTC, arXiv 2401.00588): a counter
              that grows by the work of what is taken; who comes back from idleness starts at the least
              busy tenant's counter, so nobody saves up
    request   within a tenant that of the lowest priority, then the one with the least work, and the first of
              those; but who has waited until its `patient_s` goes first (benchmarks/LOG.md: half the mean
              TTFT of first come, first served)

The room is bounded, in all and per tenant. A full one gives up what is sheddable and ranks below the
newcomer, the lowest rank and the latest first; otherwise the newcomer is refused. Work per request is linear
in tenants, and that of sorted lists in a tenant's requests.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import inf

import msgspec

PROMOTED = 1
"""Rank of what would be late: after premium, with the interactive ones."""
JOB_MARGIN = 2.0
"""Times predicted work that jobs are given: the other half of the instances' time is other requests'."""
SPARE_MAX = 1024
"""Entries of heaps whose requests have left, beyond as many as wait."""
TENANTS_MAX = 4096
"""Counters of idle tenants that are remembered; the least busy are forgotten first."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """One request that waits. `work` is what it costs, in tokens or seconds: the same for all.

    promote_s, patient_s: times, see the module. priority: the request's own. end_s, answer_s: of a job, when
    it is worth nothing any more, and what its answer takes after its work.
    """

    request_id: str
    tenant: str = ""
    rank: int = 2
    work: float = 1.0
    deadline_s: float
    sheddable: bool = False
    promote_s: float | None = None
    patient_s: float = inf
    priority: int = 0
    end_s: float = inf
    answer_s: float = 0.0


class Why(StrEnum):
    """Why somebody left without being served: a metric label."""

    FULL = "queue full"
    TENANT_FULL = "the tenant's queue is full"
    SHED = "shed for a request of a higher class"
    EXPIRED = "waited until its deadline"


class Left(msgspec.Struct, frozen=True):
    """Somebody left without being served."""

    waiting: Waiting
    why: Why


class _Line:
    """Those of one tenant and rank; the numbers say who came first."""

    __slots__ = ("_by_patience", "_by_work")

    def __init__(self) -> None:
        self._by_work: list[tuple[int, float, int, Waiting]] = []
        self._by_patience: list[tuple[float, int, Waiting]] = []

    def __len__(self) -> int:
        return len(self._by_work)

    def add(self, number: int, one: Waiting) -> None:
        insort(self._by_work, (one.priority, one.work, number, one))  # numbers differ: nobody compares ones
        insort(self._by_patience, (one.patient_s, number, one))

    def remove(self, number: int, one: Waiting) -> None:
        del self._by_work[bisect_left(self._by_work, (one.priority, one.work, number))]
        del self._by_patience[bisect_left(self._by_patience, (one.patient_s, number))]

    def next(self, now_s: float) -> Waiting:
        patient_s, _, one = self._by_patience[0]
        return one if patient_s <= now_s else self._by_work[0][3]

    def latest_sheddable(self) -> tuple[int, Waiting] | None:
        there = [(number, one) for _, _, number, one in self._by_work if one.sheddable]
        return max(there, default=None, key=lambda pair: pair[0])


class WaitingRoom:
    """See the module. Every request added leaves once: taken, removed, or in an answer as Left."""

    def __init__(
        self, waiting_max: int, tenant_max: int, weight: Callable[[str], float] | None = None
    ) -> None:
        """`weight` of a tenant, 1 where nothing is said; bounds are numbers of requests."""
        assert waiting_max > 0
        assert tenant_max > 0
        self._waiting_max = waiting_max
        self._tenant_max = tenant_max
        self._weight = weight
        self._lines: dict[int, dict[str, _Line]] = {}  # by rank, then by tenant
        self._there: dict[str, tuple[int, Waiting]] = {}
        self._came = 0
        self._sheddable = 0
        self._of_tenant: dict[str, int] = {}
        self._taken: dict[str, float] = {}  # work by weight, per tenant
        self._deadlines: list[tuple[float, int, str]] = []  # heaps; those that left are dropped in passing
        self._promotions: list[tuple[float, int, str]] = []
        self._jobs: list[tuple[float, int]] = []  # when they are worth nothing, number
        self._numbers: dict[int, str] = {}  # of jobs
        self._work: dict[int, float] = {}  # by rank

    def __len__(self) -> int:
        return len(self._there)

    def waiting(self, tenant: str) -> int:
        """Return how many of a tenant wait."""
        return self._of_tenant.get(tenant, 0)

    def work(self, rank: int | None = None) -> float:
        """Return the work of those whose rank is as good as `rank` or better; None: of all."""
        return sum(work for found, work in self._work.items() if rank is None or found <= rank)

    @property
    def sheddable(self) -> int:
        """How many may be given up for others."""
        return self._sheddable

    def job_work(self, end_s: float) -> float:
        """Return the work of jobs that end by then; linear in them."""
        last = bisect_left(self._jobs, (end_s, self._came + 1))
        return sum(self._there[self._numbers[number]][1].work for _, number in self._jobs[:last])

    @property
    def best_rank(self) -> int | None:
        """The best rank that waits; None: nobody does."""
        return min(self._lines, default=None)

    # ------------------------------------------------------------ in

    def add(self, one: Waiting) -> list[Left]:
        """Let a request wait; return who had to go for it, which may be itself."""
        assert one.request_id not in self._there
        if self.waiting(one.tenant) >= self._tenant_max:
            return [Left(one, Why.TENANT_FULL)]
        gone: list[Left] = []
        if len(self._there) >= self._waiting_max:
            victim = self._victim(one.rank)
            if victim is None:
                return [Left(one, Why.FULL)]
            self._remove(victim)
            gone.append(Left(victim, Why.SHED))
        if not self.waiting(one.tenant):
            self._arrives(one.tenant)
        self._came += 1
        self._put(self._came, one)
        if len(self._deadlines) > 2 * len(self._there) + SPARE_MAX:
            self._deadlines = [entry for entry in self._deadlines if self._waits(entry)]
            self._promotions = [entry for entry in self._promotions if self._waits(entry)]
            heapify(self._deadlines)
            heapify(self._promotions)
        heappush(self._deadlines, (one.deadline_s, self._came, one.request_id))
        if one.promote_s is not None and one.rank > PROMOTED:
            heappush(self._promotions, (one.promote_s, self._came, one.request_id))
        return gone

    def _arrives(self, tenant: str) -> None:
        active = [self._taken.get(name, 0.0) for name, count in self._of_tenant.items() if count]
        floor = min(active, default=0.0)
        if not active:
            self._taken.clear()  # an empty room has no history: nobody is ahead of anybody
        self._taken[tenant] = max(self._taken.get(tenant, 0.0), floor)
        if len(self._taken) > TENANTS_MAX:
            idle = [name for name in self._taken if not self.waiting(name) and name != tenant]
            for name in sorted(idle, key=lambda name: (self._taken[name], name))[: TENANTS_MAX // 2]:
                del self._taken[name]

    def _victim(self, rank: int) -> Waiting | None:
        for lower in sorted((found for found in self._lines if found > rank), reverse=True):
            latest = [pair for line in self._lines[lower].values() if (pair := line.latest_sheddable())]
            if latest:
                return max(latest, key=lambda pair: pair[0])[1]
        return None

    # ------------------------------------------------------------ out

    def next(self, now_s: float) -> Waiting | None:
        """Return the next request to be served, which goes on waiting. Call `expire` before."""
        self._promote(now_s)
        if not self._lines:
            return None
        tenants = self._lines[min(self._lines)]
        return tenants[min(tenants, key=lambda name: (self._taken.get(name, 0.0), name))].next(now_s)

    def serve(self, one: Waiting) -> None:
        """A request that waits is served: it does not wait any more, and its tenant has had its work."""
        weight = 1.0 if self._weight is None else self._weight(one.tenant)
        self._taken[one.tenant] = self._taken.get(one.tenant, 0.0) + one.work / weight
        self._remove(one)

    def take(self, now_s: float) -> Waiting | None:
        """Return the next request, served."""
        one = self.next(now_s)
        if one is not None:
            self.serve(one)
        return one

    def urgent(self, now_s: float, servers: int) -> Waiting | None:
        """Return the job that ends first, if waiting for idle capacity is too slow for any; linear in jobs.

        It is if the work of those that end as soon, done by `servers` beside as much of others', and its own
        answer would take longer than there is.
        """
        ahead = 0.0
        for end_s, number in self._jobs:
            one = self._there[self._numbers[number]][1]
            ahead += one.work
            if now_s + JOB_MARGIN * (ahead / servers + one.answer_s) > end_s:
                return self._there[self._numbers[self._jobs[0][1]]][1]
        return None

    def remove(self, request_id: str) -> bool:
        """Forget a request whose client left; return whether it waited."""
        if request_id not in self._there:
            return False
        self._remove(self._there[request_id][1])
        return True

    def expire(self, now_s: float) -> list[Left]:
        """Return who has waited until its deadline."""
        late = self._due(self._deadlines, now_s)
        for _, one in late:
            self._remove(one)
        return [Left(one, Why.EXPIRED) for _, one in late]

    # ------------------------------------------------------------ inside

    def _due(self, heap: list[tuple[float, int, str]], now_s: float) -> list[tuple[int, Waiting]]:
        """Take who is due from a heap, and waits still; with its number."""
        due = []
        while heap and heap[0][0] <= now_s:
            entry = heappop(heap)
            if self._waits(entry):
                due.append(self._there[entry[2]])
        return due

    def _waits(self, entry: tuple[float, int, str]) -> bool:
        """Whether who is meant still waits, not another one under its id."""
        found = self._there.get(entry[2])
        return found is not None and found[0] == entry[1]

    def _promote(self, now_s: float) -> None:
        for number, one in self._due(self._promotions, now_s):
            self._remove(one)
            self._put(number, msgspec.structs.replace(one, rank=PROMOTED, promote_s=None))

    def _put(self, number: int, one: Waiting) -> None:
        self._there[one.request_id] = number, one
        self._sheddable += one.sheddable
        self._work[one.rank] = self._work.get(one.rank, 0.0) + one.work
        self._of_tenant[one.tenant] = self.waiting(one.tenant) + 1
        self._lines.setdefault(one.rank, {}).setdefault(one.tenant, _Line()).add(number, one)
        if one.end_s < inf:
            insort(self._jobs, (one.end_s, number))
            self._numbers[number] = one.request_id

    def _remove(self, one: Waiting) -> None:
        number, _ = self._there.pop(one.request_id)
        self._sheddable -= one.sheddable
        self._work[one.rank] -= one.work
        if self._numbers.pop(number, None) is not None:
            del self._jobs[bisect_left(self._jobs, (one.end_s, number))]
        left = self._of_tenant[one.tenant] - 1
        if left:
            self._of_tenant[one.tenant] = left
        else:
            del self._of_tenant[one.tenant]
        tenants = self._lines[one.rank]
        line = tenants[one.tenant]
        line.remove(number, one)
        if not len(line):
            del tenants[one.tenant]
            if not tenants:
                del self._lines[one.rank]
                del self._work[one.rank]  # with what rounding has left
