"""Whether a request was served as promised, and why one was moved or failed: words for metrics. Pure.

Goodput is what kept both objectives: the first token in time, and at most a tenth of the gaps between outputs
longer than the objective (the slowest tenth of an answer's tokens is what planner and simulator judge by,
too). What a client got until it left is judged alike: vLLM ends answers at stop strings by leaving. Who left
before the first token counts as late once the objective had passed, else nowhere.
"""

from math import inf

from conductor.metrics import FAILURES
from conductor.plan import Reason
from conductor.request import OVERRUN
from conductor.terms import Terms
from mooncake.core.metric_labels import OTHER

LATE_SHARE_MAX = 0.1
"""Of an answer's gaps may be longer than the objective of time between tokens."""
MOVES = frozenset((
    "silent", "engine silent", "link down", "record removed", "restarted", "no link", "engine error"
))  # fmt: skip
"""Why requests are moved: what conductor.cluster says of the lost instance, without numbers."""
_PLACES = frozenset(map(str, Reason))


def objectives_of(terms: Terms, ttft_slo_s: float | None, tbt_slo_s: float | None) -> tuple[float, float]:
    """Return what holds for a request: its own, else these; inf = none. Batch work waits without one."""
    ttft_s = terms.ttft_slo_s
    if ttft_s is None and not terms.slo_class.sheddable:
        ttft_s = ttft_slo_s
    tbt_s = tbt_slo_s if terms.tbt_slo_s is None else terms.tbt_slo_s
    return inf if ttft_s is None else ttft_s, inf if tbt_s is None else tbt_s


def result_of(ttft_s: float, ttft_slo_s: float, gaps: int, late_gaps: int) -> str:
    """Return "met", or which objective a served request missed: "ttft" before "tbt"."""
    if ttft_s > ttft_slo_s:
        return "ttft"
    return "tbt" if late_gaps > gaps * LATE_SHARE_MAX else "met"


def move_word(reason: str) -> str:
    """Return the label of why requests leave an instance."""
    word = reason.partition(" for ")[0]  # no numbers in it
    return word if word in MOVES else OTHER


def failure_word(reason: str) -> str:
    """Return the label of what a request machine says of its failure."""
    if reason in _PLACES:
        found = "no_place"
    elif reason.startswith("lost ") or " was lost" in reason:
        found = "engine_lost"
    elif " ended with " in reason:
        found = "engine_error"
    elif reason == "deadline exceeded":
        found = "silent"
    elif reason == OVERRUN:
        found = "backlog"
    else:
        found = OTHER
    assert found in FAILURES
    return found
