"""Turns decisions into metrics, records and lessons for others, and what engines moved into bandwidths."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import msgspec
import structlog

from conductor.cost import CostModel
from conductor.decider import Asked
from conductor.metrics import DecisionMetrics
from conductor.modes import Fallback, Fallbacks, IndexMode, index_mode
from conductor.plan import Decision, Plan, Rejection, RequestFacts
from conductor.pricing import Trail
from conductor.why import Decided, Decisions, explain
from mooncake.core.messages import Pulse

log = structlog.get_logger(__name__)

_BLIND = (Decision.LEAST_LOAD, Decision.ROUND_ROBIN, Decision.RANDOM)
"""Decisions of policies that never ask the index: nothing is poorer without it."""
_ROLES = {
    Decision.NO_PREFILL_ALIVE: (Fallback.NO_PREFILL_ALIVE, "decode instances do both legs"),
    Decision.NO_DECODE_ALIVE: (Fallback.NO_DECODE_ALIVE, "prefill instances do both legs"),
}


Planned = Callable[[RequestFacts, Plan], None]
Finished = Callable[[int], None]


class _Moved:
    """Counters of one start of an engine, up to where they were learned from."""

    __slots__ = ("epoch", "fetch_bytes", "fetch_s", "load_bytes", "load_s")

    def __init__(self, pulse: Pulse) -> None:
        self.epoch = pulse.epoch
        self.load_bytes, self.load_s = pulse.load_bytes, pulse.load_s
        self.fetch_bytes, self.fetch_s = pulse.fetch_bytes, pulse.fetch_s


class Observer:
    """Called for every decision: keep it short."""

    def __init__(self, cost: CostModel, metrics: DecisionMetrics, away: bool = False) -> None:
        """`away`: these are decisions of a gateway that should not make them (Fallback.CORE_AWAY)."""
        self.trail = Trail()
        self.decisions = Decisions()
        self._cost = cost
        self._metrics = metrics
        self._away = away
        self._on_plan: list[Planned] = []
        self._on_answer: list[Finished] = []
        self._moved: dict[str, _Moved] = {}
        self._fallbacks = Fallbacks()
        self._index_mode = IndexMode.FALLBACK
        self._unnamed: dict[str, None] = {}  # causes that were logged: a handful
        for mode in IndexMode:
            metrics.index_mode.labels(str(mode)).set(mode is self._index_mode and not away)
        for kind in Fallback:
            metrics.fallbacks.labels(str(kind))  # shown as 0: a rule can tell "never" from "not there"

    def listen(self, planned: Planned, finished: Finished | None = None) -> None:
        """Let somebody hear of every plan that is acted on, and of every whole answer's tokens.

        Both are called at once, on the hot path: quick, and raising nothing.
        """
        self._on_plan.append(planned)
        if finished is not None:
            self._on_answer.append(finished)

    # ------------------------------------------------------------ decisions

    def explained(
        self, now_s: float, asked: Asked, answer: Plan | Rejection, emitted_n: int = 0, *, priced: bool = True
    ) -> Decided:
        """Return the record of an answer; `priced`: the scheduler gave it, just now."""
        facts = asked.facts
        trail = Trail()
        if priced:
            trail.prefills, trail.decodes = self.trail.prefills, self.trail.decodes
        why = partial(
            explain,
            time.time(),
            msgspec.structs.replace(facts, keys=[], tail_key=None),  # a thousand of these would add up
            answer,
            trail,
            prompt_blocks=len(facts.keys),
            client_id=asked.client_id,
            waited_s=now_s - asked.started_s,
            output_tokens=self._cost.output_tokens(facts.max_tokens, facts.tenant, facts.slo_class),
            emitted_tokens=emitted_n,
            index_mode=str(self._index_mode),
        )
        return Decided(facts.request_id, asked.client_id, why, asked.names)

    def decided(self, decided: Decided) -> None:
        """An answer is acted on: keep its record."""
        self.decisions.add(decided)
        if log.is_enabled_for(logging.DEBUG):
            why = msgspec.to_builtins(decided.why())
            log.debug("conductor.decision", **decided.names, why=why)

    def planned(self, asked: Asked, plan: Plan) -> None:
        """A request was accepted."""
        facts = asked.facts
        self._metrics.decisions.labels(str(plan.decision)).inc()
        self._metrics.prefix_lookup_blocks.inc(len(facts.keys))
        self._metrics.prefix_hit_blocks.inc(plan.hit_blocks)
        self._metrics.predicted_ttft_s.observe(plan.predicted_ttft_s)
        self._note_roles(plan)
        for hear in self._on_plan:
            hear(facts, plan)
        if self._away:
            self._count(Fallback.CORE_AWAY)
        elif facts.keys and plan.decision not in _BLIND and self._index_mode is not IndexMode.EXACT:
            empty = self._index_mode is IndexMode.FALLBACK
            self._count(Fallback.INDEX_EMPTY if empty else Fallback.INDEX_STALE)
        if not facts.keys and facts.tail_key is None:
            self._count(Fallback.KEYS_UNKNOWN)
            cause = asked.unnamed()
            if cause not in self._unnamed:
                self._unnamed[cause] = None
                log.warning("conductor.keys_unknown", **asked.names, reason=cause)

    def replanned(self, now_s: float, asked: Asked, answer: Plan | Rejection, emitted_n: int) -> None:
        """A leg was placed again, or found no place."""
        self.decided(self.explained(now_s, asked, answer, emitted_n))
        if isinstance(answer, Plan):
            self._metrics.decisions.labels(str(answer.decision)).inc()

    def answered(self, tokens: int, tenant: str, slo_class: str, max_tokens: int) -> None:
        """An answer is whole."""
        self._cost.observe_output(tokens, tenant, slo_class, max_tokens)
        for hear in self._on_answer:
            hear(tokens)

    def _note_roles(self, plan: Plan) -> None:
        for decision, (kind, detail) in _ROLES.items():
            if plan.decision is decision:
                self._count(kind)
                self._set(kind, detail)
            elif plan.prefill is not None:
                self._set(kind, "")  # two legs: both are there

    def _count(self, kind: Fallback) -> None:
        self._metrics.fallbacks.labels(str(kind)).inc()

    def _set(self, kind: Fallback, detail: str) -> None:
        if not self._fallbacks.set(kind, detail):
            return
        self._metrics.fallback.labels(str(kind)).set(bool(detail))
        if detail:
            log.warning("conductor.fallback", kind=str(kind), reason=detail)
        else:
            log.info("conductor.fallback_over", kind=str(kind))

    def tick(self, stores: Mapping[str, bool], serving: Iterable[str]) -> None:
        """Look at the state of things, a few times a second; arguments as `index_mode` takes them."""
        if self._away:
            return
        mode, detail = index_mode(stores, serving)
        if mode is not self._index_mode:
            self._metrics.index_mode.labels(str(self._index_mode)).set(0)
            self._metrics.index_mode.labels(str(mode)).set(1)
            self._index_mode = mode
        self._set(Fallback.INDEX_EMPTY, detail if mode is IndexMode.FALLBACK else "")
        self._set(Fallback.INDEX_STALE, detail if mode is IndexMode.DEGRADED else "")
        errors = self._cost.errors()
        for kind, ratio, count in (
            ("prefill", errors.prefill_ratio, errors.prefill_count),
            ("tbt", errors.tbt_ratio, errors.tbt_count),
            ("transfer", errors.transfer_ratio, errors.transfer_count),
            ("output", errors.output_ratio, errors.output_count),
        ):
            self._metrics.predictions.labels(kind).set(count)
            if count:  # an error of 0 would say that predictions are perfect
                self._metrics.prediction_error.labels(kind).set(ratio)

    # ------------------------------------------------------------ measurements

    def moved(self, instance_id: str, pulse: Pulse) -> None:
        """An engine told what it has loaded from its store, and what that fetched from others."""
        known = self._moved.get(instance_id)
        if known is None or known.epoch != pulse.epoch:
            self._moved[instance_id] = _Moved(pulse)  # what was before we listened is nobody's measurement
            return
        # seconds come before their bytes (a load counts when it is verified): wait for both
        if pulse.load_bytes > known.load_bytes:
            size, took_s = pulse.load_bytes - known.load_bytes, pulse.load_s - known.load_s
            self._cost.observe_transfer(int(size), took_s, remote=False)
            known.load_bytes, known.load_s = pulse.load_bytes, pulse.load_s
        if pulse.fetch_bytes > known.fetch_bytes:
            size, took_s = pulse.fetch_bytes - known.fetch_bytes, pulse.fetch_s - known.fetch_s
            self._cost.observe_transfer(int(size), took_s, remote=True)
            known.fetch_bytes, known.fetch_s = pulse.fetch_bytes, pulse.fetch_s

    def lost(self, instance_id: str) -> None:
        """An instance is gone; should it come back, it is measured afresh."""
        self._moved.pop(instance_id, None)
