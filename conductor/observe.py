"""Turns what the dispatcher sees into metrics and into measurements for the cost model."""

from conductor.clients import Client, Running
from conductor.cost import CostModel
from conductor.metrics import GatewayMetrics
from conductor.plan import Plan, RequestFacts
from conductor.vllm_seam import EngineCoreEventType, EngineCoreOutput

TBT_SAMPLE = 16
"""Every so many frames of an engine, one gap is measured: the fit needs tens, not thousands."""
TBT_GAP_S_MAX = 5.0
"""A longer gap means that the engine was idle or stopped, not that a step took so long."""


class _Steps:
    __slots__ = ("count", "last_s")

    def __init__(self) -> None:
        self.count = 0
        self.last_s = 0.0


class Observer:
    """Called on the hot path: keep it short."""

    def __init__(self, cost: CostModel, metrics: GatewayMetrics) -> None:
        self._cost = cost
        self._metrics = metrics
        self._steps: dict[str, _Steps] = {}

    def planned(self, facts: RequestFacts, plan: Plan) -> None:
        """A request was accepted."""
        self._metrics.decisions.labels(str(plan.decision)).inc()
        self._metrics.prefix_lookup_blocks.inc(len(facts.keys))
        self._metrics.prefix_hit_blocks.inc(plan.hit_blocks)
        self._metrics.predicted_ttft_s.observe(plan.predicted_ttft_s)

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
            self._cost.observe_output(len(client.emitted))
