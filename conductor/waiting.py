"""Who is next when engines have enough to do: classes, tenants with weights, deadlines. Pure.

    class     a lower rank goes first, always; a request with `promote_s` takes the rank PROMOTED from then
              on (batch work that would miss its job's objective otherwise)
    tenant    within a rank, the one with the least work taken by weight (VTC, arXiv 2401.00588): a counter
              that grows by the work of what is taken; who comes back from idleness starts at the least
              busy tenant's counter, so nobody saves up
    request   first come, first served within a tenant

The room is bounded, in all and per tenant. A full one gives up what is sheddable and ranks below the
newcomer, the lowest rank and the latest first; otherwise the newcomer is refused. Everything is a dictionary
of queues: constant work per request, linear in tenants.
"""

from collections import deque
from collections.abc import Callable
from enum import StrEnum

import msgspec

PROMOTED = 1
"""Rank of what would be late: after premium, with the interactive ones."""
TENANTS_MAX = 4096
"""Counters of idle tenants that are remembered; the least busy are forgotten first."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """One request that waits. `work` is what it costs, in tokens or seconds: the same for all."""

    request_id: str
    tenant: str = ""
    rank: int = 2
    work: float = 1.0
    deadline_s: float
    sheddable: bool = False
    promote_s: float | None = None


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
        self._queues: dict[int, dict[str, deque[Waiting]]] = {}  # by rank, then by tenant
        self._there: dict[str, Waiting] = {}
        self._of_tenant: dict[str, int] = {}
        self._taken: dict[str, float] = {}  # work by weight, per tenant
        self._promotions: dict[str, Waiting] = {}
        self._work: dict[int, float] = {}  # by rank

    def __len__(self) -> int:
        return len(self._there)

    def waiting(self, tenant: str) -> int:
        """Return how many of a tenant wait."""
        return self._of_tenant.get(tenant, 0)

    def work(self, rank: int | None = None) -> float:
        """Return the work of those whose rank is as good as `rank` or better; None: of all."""
        return sum(work for found, work in self._work.items() if rank is None or found <= rank)

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
        self._put(one)
        if one.promote_s is not None and one.rank > PROMOTED:
            self._promotions[one.request_id] = one
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
        for lower in sorted((found for found in self._queues if found > rank), reverse=True):
            newest = [
                candidate
                for queue in self._queues[lower].values()
                if (candidate := next((one for one in reversed(queue) if one.sheddable), None))
            ]
            if newest:
                order = {request_id: n for n, request_id in enumerate(self._there)}
                return max(newest, key=lambda one: order[one.request_id])
        return None

    # ------------------------------------------------------------ out

    def take(self, now_s: float) -> Waiting | None:
        """Return the next request to be served; it does not wait any more. Call `expire` before."""
        self._promote(now_s)
        for rank in sorted(self._queues):
            tenants = self._queues[rank]
            tenant = min(tenants, key=lambda name: (self._taken.get(name, 0.0), name))
            one = tenants[tenant][0]
            weight = 1.0 if self._weight is None else self._weight(tenant)
            self._taken[tenant] = self._taken.get(tenant, 0.0) + one.work / weight
            self._remove(one)
            return one
        return None

    def remove(self, request_id: str) -> bool:
        """Forget a request whose client left; return whether it waited."""
        one = self._there.get(request_id)
        if one is not None:
            self._remove(one)
        return one is not None

    def expire(self, now_s: float) -> list[Left]:
        """Return who has waited until its deadline; linear in those who wait."""
        late = [one for one in self._there.values() if one.deadline_s <= now_s]
        for one in late:
            self._remove(one)
        return [Left(one, Why.EXPIRED) for one in late]

    # ------------------------------------------------------------ inside

    def _promote(self, now_s: float) -> None:
        due = [
            one for one in self._promotions.values() if one.promote_s is not None and one.promote_s <= now_s
        ]
        for one in due:
            self._remove(one)
            self._put(msgspec.structs.replace(one, rank=PROMOTED, promote_s=None))

    def _put(self, one: Waiting) -> None:
        self._there[one.request_id] = one
        self._work[one.rank] = self._work.get(one.rank, 0.0) + one.work
        self._of_tenant[one.tenant] = self.waiting(one.tenant) + 1
        self._queues.setdefault(one.rank, {}).setdefault(one.tenant, deque()).append(one)

    def _remove(self, one: Waiting) -> None:
        del self._there[one.request_id]
        self._work[one.rank] -= one.work
        self._promotions.pop(one.request_id, None)
        left = self._of_tenant[one.tenant] - 1
        if left:
            self._of_tenant[one.tenant] = left
        else:
            del self._of_tenant[one.tenant]
        tenants = self._queues[one.rank]
        queue = tenants[one.tenant]
        if queue[0] is one:
            queue.popleft()
        else:
            queue.remove(one)
        if not queue:
            del tenants[one.tenant]
            if not tenants:
                del self._queues[one.rank]
                del self._work[one.rank]  # with what rounding has left
