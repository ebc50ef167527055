"""What a gateway does for agents' runs, from the events of their turns. Pure.

    a turn comes       it waits as if it had come with the first one of its program (conductor.gate)
    it is planned      the context that it goes on with stays in the pool until it is over
    it is over         its own context stays until the next turn has come, or is not expected any more

Kept are contexts of answers that call a tool, and of requests that ask for it with a time to live:
conductor.programs says for how long, conductor.keeps where there is room.
"""

from collections import deque

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.keeps import Context, Keeps, Order
from conductor.plan import Plan, RequestFacts
from conductor.programs import Programs
from conductor.terms import Terms

ORDERS_MAX = 4096
"""That wait to be sent: some seconds' worth of a busy gateway. The oldest are lost: they only cost hits."""


class Turn:
    """One request of a program."""

    __slots__ = ("_agents", "calls_tools", "keys", "node", "room", "terms", "work_s")

    def __init__(self, agents: "Agents", terms: Terms) -> None:
        self._agents = agents
        self.terms = terms
        self.calls_tools = False  # its answer does, as whoever sees it says
        self.node = ""
        self.keys: tuple[bytes, ...] = ()
        self.room = 0  # blocks that the node's store has room for
        self.work_s = 0.0

    def planned(self, now_s: float, facts: RequestFacts, plan: Plan) -> None:
        """It is sent as planned; of several answers to one prompt, the first counts."""
        self._agents.planned(now_s, self, facts, plan)

    def ended(self, now_s: float, *, served: bool) -> None:
        """It is over. `served`: it was answered."""
        self._agents.ended(now_s, self, served=served)


class Agents:
    """What is kept is bounded (conductor.keeps), and what is remembered (conductor.programs)."""

    def __init__(self, cost: CostModel, view: ClusterView, *, keeps: bool = True) -> None:
        """`keeps`: whether stores get orders; else turns only count from their program's begin."""
        self.programs = Programs()
        self.kept = Keeps()
        self._keeps = keeps
        self._cost = cost
        self._view = view
        self._orders: deque[Order] = deque(maxlen=ORDERS_MAX)

    def came(self, now_s: float, terms: Terms) -> Turn | None:
        """A request comes; None = it is no turn of a program. Its terms say since when there is one."""
        return Turn(self, self.programs.came(now_s, terms)) if terms.run else None

    def planned(self, now_s: float, turn: Turn, facts: RequestFacts, plan: Plan) -> None:
        """See Turn."""
        wanted = turn.terms.tools or turn.terms.cache_ttl_s is not None
        record = self._view.record(plan.prefill or plan.decode or "")
        if turn.keys or not (wanted and self._keeps) or record is None or not facts.keys:
            return
        turn.node, turn.keys = record.node, tuple(facts.keys)
        capacity_bytes = next((s.capacity_bytes for s in self._view.stores() if s.node == record.node), 0)
        turn.room = capacity_bytes // max(1, record.block_bytes)
        turn.work_s = self._cost.prefill_s(facts.prompt_len, 0)
        self._orders += self.kept.turn_came(now_s, turn.terms.run, turn.keys)

    def ended(self, now_s: float, turn: Turn, *, served: bool) -> None:
        """See Turn."""
        terms = turn.terms
        goes_on = served and (turn.calls_tools or terms.cache_ttl_s is not None)
        self.programs.ended(now_s, terms, goes_on=goes_on)
        if not turn.keys:
            return
        left = None
        if goes_on:
            value_s = self.programs.chance(terms) * turn.work_s
            left = Context(terms.run, turn.node, turn.keys, value_s, self.programs.ttl_s(terms))
        self._orders += self.kept.turn_over(now_s, terms.run, turn.keys, left, turn.room)

    def orders(self, now_s: float) -> list[Order]:
        """Return what stores have to hear since the last call."""
        self._orders += self.kept.tick(now_s)
        orders = list(self._orders)
        self._orders.clear()
        return orders
