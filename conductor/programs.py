"""Agents' runs: which requests belong to one, since when, and for how long its next turn is awaited. Pure.

A *program* is one run of an agent: requests with the same x-program-id or, where none is said, of the same
session. Between two of its turns tools run. Learned of these pauses (Continuum, arXiv 2511.02230):

    how long     a histogram per tenant, of all tenants until it knows enough, as of the lengths of answers:
                 what is kept for the next turn is kept for as long as KEPT of the pauses
    how often    the share of turns that called tools and were gone on with: what keeping them is worth

Turns of one program that run at once make its pauses look shorter than they are for each of them.
"""

from collections import OrderedDict

import msgspec

from conductor.lengths import OutputLengths
from conductor.terms import Terms

PROGRAMS_MAX = 65_536
"""Remembered; about 20 MB. The one that was used least lately is forgotten first."""
KEPT = 0.9
"""Share of pauses that a context is kept for: the rest are as long as all others together."""
TTL_PRIOR_S = 60.0
"""Until pauses were seen: most tools answer within seconds, builds and searches within a minute."""
TTL_MIN_S = 2.0
TTL_MAX_S = 600.0
"""Learned or given: a pool has had other work to do by then."""
PAUSE_S_MAX = 3600.0
"""A longer one is a new visit, not a tool's."""
BACK_PRIOR = (9.0, 10.0)
"""Turns gone on with, of so many: a program of ten."""
BACK_MEMORY = 256.0
"""When so many turns are counted, both numbers are halved."""
TENANTS_MAX = 1024
"""Whose turns are counted."""
_PAUSE = "pause"
_CALLS = (b'"finish_reason":"tool_calls"', b'"stop_reason":"tool_use"', b'"type":"function_call"')
"""In vLLM's chats, messages and responses that call a tool; in what a model writes, quotes are escaped."""


def calls_tools(body: bytes) -> bool:
    """Return whether a part of a response says that the answer calls a tool."""
    return any(mark in body for mark in _CALLS)


class _Run:
    __slots__ = ("active", "calls_tools", "paused_s", "since_s")

    def __init__(self, now_s: float) -> None:
        self.since_s = now_s
        self.active = 0  # turns that are not over
        self.calls_tools = False
        self.paused_s: float | None = None  # since when its tools run


class Programs:
    """Bounded; constant time per call."""

    def __init__(self, programs_max: int = PROGRAMS_MAX) -> None:
        """Nothing is known yet."""
        self._max = programs_max
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._pauses = OutputLengths()  # in milliseconds
        self._back: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def came(self, now_s: float, terms: Terms) -> Terms:
        """A turn comes; return its terms, of an agent's with when the first turn of its program came."""
        if not terms.run:
            return terms
        run = self._runs.get(terms.run)
        if run is None:
            run = self._runs[terms.run] = _Run(now_s)
            if len(self._runs) > self._max:
                self._runs.popitem(last=False)
        elif run.paused_s is not None:
            self._gone_on(terms.tenant, now_s - run.paused_s)
            run.paused_s = None
        self._runs.move_to_end(terms.run)
        run.active += 1
        is_agent = bool(terms.program) or run.calls_tools  # a chat with somebody may go on for days
        return msgspec.structs.replace(terms, since_s=run.since_s) if is_agent else terms

    def ended(self, now_s: float, terms: Terms, *, goes_on: bool) -> None:
        """A turn that came is over. `goes_on`: its answer calls a tool, as far as anybody can tell."""
        run = self._runs.get(terms.run) if terms.run else None
        if run is None:
            return
        run.active = max(0, run.active - 1)
        run.calls_tools = run.calls_tools or goes_on
        if goes_on and not run.active:
            run.paused_s = now_s
            back, turns = self._back.pop(terms.tenant, BACK_PRIOR)
            part = 0.5 if turns >= BACK_MEMORY else 1.0
            self._back[terms.tenant] = back * part, turns * part + 1
            if len(self._back) > TENANTS_MAX:
                self._back.popitem(last=False)

    def ttl_s(self, terms: Terms) -> float:
        """Return how long the next turn is worth waiting for: as it was said, or learned."""
        if terms.cache_ttl_s is not None:
            return min(terms.cache_ttl_s, TTL_MAX_S)
        pause_ms = self._pauses.quantile(terms.tenant, _PAUSE, KEPT)
        return min(max(TTL_PRIOR_S if pause_ms is None else pause_ms / 1000, TTL_MIN_S), TTL_MAX_S)

    def chance(self, terms: Terms) -> float:
        """Return how likely a turn like this one is gone on with."""
        if terms.cache_ttl_s is not None:
            return 1.0  # who asks for it knows
        back, turns = self._back.get(terms.tenant, BACK_PRIOR)
        return min(1.0, back / turns)

    def _gone_on(self, tenant: str, pause_s: float) -> None:
        if 0 <= pause_s <= PAUSE_S_MAX:
            self._pauses.observe(tenant, _PAUSE, max(1, round(pause_s * 1000)))
            back, turns = self._back.get(tenant, BACK_PRIOR)
            self._back[tenant] = back + 1, turns
