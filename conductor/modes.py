"""How much the Conductor knows, and which poorer policy it has fallen back to. Pure.

It knows what stores hold and, of engines that tell, what their own caches do (`gpu_node`).

What the index does not know costs hit rate and nothing else, so requests are served all the same; but an
operator has to see it, or a broken feed looks like a workload without shared prefixes.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

NAMES_MAX = 8
"""Nodes named in a message."""


class IndexMode(StrEnum):
    """EXACT: in step with all that tell. DEGRADED: with some. FALLBACK: with none, so load alone decides."""

    EXACT = "exact"
    DEGRADED = "degraded"
    FALLBACK = "fallback"


class Fallback(StrEnum):
    """What was poorer than configured: a metric label."""

    INDEX_EMPTY = "index_empty"  # IndexMode.FALLBACK: nobody's blocks are known
    INDEX_STALE = "index_stale"  # IndexMode.DEGRADED: those of some are not
    NO_PREFILL_ALIVE = "no_prefill_alive"  # decode instances do both legs
    NO_DECODE_ALIVE = "no_decode_alive"  # prefill instances do both legs
    CORE_AWAY = "core_away"  # a gateway decides by itself: no core leads, or it does not answer
    KEYS_UNKNOWN = "keys_unknown"  # nobody can name the prompt's blocks: nothing is looked up


def index_mode(holders: Mapping[str, bool], serving: Iterable[str]) -> tuple[IndexMode, str]:
    """Return the mode and what is missing ("" = nothing).

    Args:
        holders: followed stores and own caches of engines, and whether the index is in step with each.
        serving: nodes of instances that take work; one whose store is not followed is not known either.
    """
    if not holders:
        return IndexMode.FALLBACK, "no store is followed"
    missing = [node for node, in_step in sorted(holders.items()) if not in_step]
    missing += [node for node in sorted(dict.fromkeys(serving)) if node not in holders]
    if not missing:
        return IndexMode.EXACT, ""
    more = f" and {len(missing) - NAMES_MAX} more" if len(missing) > NAMES_MAX else ""
    detail = f"not in step with the blocks of {', '.join(missing[:NAMES_MAX])}{more}"
    return (IndexMode.DEGRADED if any(holders.values()) else IndexMode.FALLBACK), detail


class Fallbacks:
    """Which fall-backs are on, and why; says what is news."""

    def __init__(self) -> None:
        """None is on."""
        self._details: dict[Fallback, str] = {}

    def set(self, kind: Fallback, detail: str) -> bool:
        """Note the state of one, "" = off; return whether it changed."""
        if self._details.get(kind, "") == detail:
            return False
        self._details[kind] = detail
        return True

    def detail(self, kind: Fallback) -> str:
        """Return why `kind` is on, "" = off."""
        return self._details.get(kind, "")
