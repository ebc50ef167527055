"""Turns what the dispatcher sees into metrics, records and measurements for the cost model."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import msgspec
import structlog

from conductor.clients import Client, Running
from conductor.cost import CostModel
from conductor.metrics import GatewayMetrics
from conductor.modes import Fallback, Fallbacks, IndexMode, index_mode
from conductor.plan import Decision, Plan, Rejection, RequestFacts
from conductor.planner import Planner
from conductor.pricing import Trail
from conductor.tenants import Tenants
from conductor.vllm_seam import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest
from conductor.why import Decided, Decisions, explain
from mooncake.core.messages import Pulse

log = structlog.get_logger(__name__)

TBT_SAMPLE = 16
"""Every so many frames of an engine, one gap is measured: the fit needs tens, not thousands."""
TBT_GAP_S_MAX = 5.0
"""A longer gap means that the engine was idle or stopped, not that a step took so long."""
_BLIND = (Decision.LEAST_LOAD, Decision.ROUND_ROBIN, Decision.RANDOM)
"""Decisions of policies that never ask the index: nothing is poorer without it."""
_ROLES = {
    Decision.NO_PREFILL_ALIVE: (Fallback.NO_PREFILL_ALIVE, "decode instances do both legs"),
    Decision.NO_DECODE_ALIVE: (Fallback.NO_DECODE_ALIVE, "prefill instances do both legs"),
}


class _Steps:
    __slots__ = ("count", "last_s")

    def __init__(self) -> None:
        self.count = 0
        self.last_s = 0.0


class _Moved:
    """Counters of one start of an engine, up to where they were learned from."""

    __slots__ = ("epoch", "fetch_bytes", "fetch_s", "load_bytes", "load_s")

    def __init__(self, pulse: Pulse) -> None:
        self.epoch = pulse.epoch
        self.load_bytes, self.load_s = pulse.load_bytes, pulse.load_s
        self.fetch_bytes, self.fetch_s = pulse.fetch_bytes, pulse.fetch_s


class Observer:
    """Called on the hot path: keep it short."""

    def __init__(self, cost: CostModel, metrics: GatewayMetrics) -> None:
        self.trail = Trail()
        self.decisions = Decisions()
        self._cost = cost
        self._metrics = metrics
        self.planner: Planner | None = None  # of roles: hears what is planned and answered
        self.on_plan: Callable[[RequestFacts, Plan], None] | None = None  # hears of every plan
        self._steps: dict[str, _Steps] = {}
        self._moved: dict[str, _Moved] = {}
        self._fallbacks = Fallbacks()
        self._index_mode = IndexMode.FALLBACK
        self._unnamed: dict[str, None] = {}  # causes that were logged: a handful
        for mode in IndexMode:
            metrics.index_mode.labels(str(mode)).set(mode is self._index_mode)
        for kind in Fallback:
            metrics.fallbacks.labels(str(kind))  # shown as 0: a rule can tell "never" from "not there"

    # ------------------------------------------------------------ decisions

    def explained(
        self, now_s: float, client: Client, answer: Plan | Rejection, *, asked: bool = True
    ) -> Decided:
        """Return the record of an answer; `asked`: the scheduler gave it, just now."""
        facts = client.machine.facts
        client_id = client.request.external_req_id or ""
        trail = Trail()
        if asked:
            trail.prefills, trail.decodes = self.trail.prefills, self.trail.decodes
        why = partial(
            explain,
            time.time(),
            msgspec.structs.replace(facts, keys=[], tail_key=None),  # a thousand of these would add up
            answer,
            trail,
            prompt_blocks=len(facts.keys),
            client_id=client_id,
            waited_s=now_s - client.started_s,
            output_tokens=self._cost.output_tokens(facts.max_tokens, facts.tenant, facts.slo_class),
            emitted_tokens=len(client.emitted),
            index_mode=str(self._index_mode),
        )
        return Decided(facts.request_id, client_id, why)

    def decided(self, decided: Decided) -> None:
        """An answer is acted on: keep its record."""
        self.decisions.add(decided)
        if log.is_enabled_for(logging.DEBUG):
            why = msgspec.to_builtins(decided.why())
            log.debug("conductor.decision", request=decided.request_id, why=why)

    def planned(self, request: EngineCoreRequest, facts: RequestFacts, plan: Plan) -> None:
        """A request was accepted."""
        self._metrics.decisions.labels(str(plan.decision)).inc()
        self._metrics.prefix_lookup_blocks.inc(len(facts.keys))
        self._metrics.prefix_hit_blocks.inc(plan.hit_blocks)
        self._metrics.predicted_ttft_s.observe(plan.predicted_ttft_s)
        self._note_roles(plan)
        if self.on_plan is not None:
            self.on_plan(facts, plan)
        if self.planner is not None:
            answer_tokens = self._cost.output_tokens(facts.max_tokens, facts.tenant, facts.slo_class)
            self.planner.planned(plan, facts.prompt_len, answer_tokens)
        if facts.keys and plan.decision not in _BLIND and self._index_mode is not IndexMode.EXACT:
            empty = self._index_mode is IndexMode.FALLBACK
            self._count(Fallback.INDEX_EMPTY if empty else Fallback.INDEX_STALE)
        if not facts.keys and facts.tail_key is None:
            self._count(Fallback.KEYS_UNKNOWN)
            cause = _unnamed(request)
            if cause not in self._unnamed:
                self._unnamed[cause] = None
                log.warning("conductor.keys_unknown", request=facts.request_id, reason=cause)

    def lowered(self, asked: str, tenant: str, tenants: Tenants) -> None:
        """A request gets a lower class than it asks for."""
        self._metrics.lowered.labels(tenants.label(tenant), asked).inc()

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
        self._steps.pop(instance_id, None)
        self._moved.pop(instance_id, None)

    def prefilled(self, running: Running, output: EngineCoreOutput, now_s: float) -> None:
        """A leg's first output came; its event times are on our clock already."""
        running.measured = True
        stats = output.prefill_stats
        if stats is None or stats.num_computed_tokens <= 0:
            return
        for event in output.events or ():
            if event.type == EngineCoreEventType.SCHEDULED:
                seconds = now_s - event.timestamp
                self._cost.observe_prefill(stats.num_computed_tokens, stats.num_cached_tokens, seconds)
                return

    def frame(self, instance_id: str, now_s: float, batch: int, context_tokens: int, pure: bool) -> None:
        """One engine step came in.

        Args:
            instance_id: the engine's.
            now_s: when it came.
            batch: requests in it.
            context_tokens: tokens in the contexts of these requests.
            pure: no request of it was prefilled in this step.
        """
        steps = self._steps.get(instance_id)
        if steps is None:
            steps = self._steps[instance_id] = _Steps()
        steps.count = steps.count + 1 if pure else 0
        if steps.count > 1 and steps.count % TBT_SAMPLE == 0:
            gap_s = now_s - steps.last_s
            if gap_s < TBT_GAP_S_MAX:
                self._cost.observe_tbt(batch, context_tokens, gap_s)
        steps.last_s = now_s

    def delivered(self, client: Client, tokens: int, now_s: float) -> None:
        """Tokens go to the client."""
        metrics = self._metrics
        metrics.tokens.inc(tokens)
        if client.first_s:
            metrics.tbt_s.observe(now_s - client.last_s)
        else:
            client.first_s = now_s
            ttft_s = now_s - client.started_s
            metrics.ttft_s.observe(ttft_s)
            metrics.class_ttft_s.labels(client.slo_class).observe(ttft_s)
            if client.plan is not None:
                metrics.ttft_error_s.observe(ttft_s - client.plan.predicted_ttft_s)
        if client.leg1_end_s and len(client.emitted) <= 1:
            self._handed_over(client, now_s)
        client.last_s = now_s

    def _handed_over(self, client: Client, now_s: float) -> None:
        self._metrics.handover_s.observe(now_s - client.leg1_end_s)
        client.leg1_end_s = 0.0

    def ended(self, client: Client, outcome: str) -> None:
        """A request is over."""
        self._metrics.requests.labels(outcome).inc()
        if outcome == "finished":
            facts = client.machine.facts
            tokens = len(client.emitted)
            self._cost.observe_output(tokens, facts.tenant, facts.slo_class, facts.max_tokens)
            if self.planner is not None:
                self.planner.answered(tokens)


def _unnamed(request: EngineCoreRequest) -> str:
    if request.prompt_embeds is not None:
        return "prompt embeddings"
    if request.lora_request is not None:
        return "an adapter whose weights cannot be read here"
    return "no tokens"
