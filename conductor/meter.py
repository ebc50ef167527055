"""Measures what engines and clients of one gateway see; called per engine step, so kept short."""

from conductor.clients import Client, Running
from conductor.decider import Decider
from conductor.metrics import GatewayMetrics
from conductor.plan import Leg
from conductor.vllm_seam import EngineCoreEventType, EngineCoreOutput

TBT_SAMPLE = 16
"""After so many frames of an engine, a gap is measured: the fit needs tens, not thousands."""
TBT_GAP_S_MAX = 5.0
"""A longer gap means that the engine was idle or stopped, not that a step took so long."""


class _Steps:
    __slots__ = ("count", "last_s", "prompts", "prompts_s")

    def __init__(self) -> None:
        self.count = 0
        self.last_s = 0.0
        self.prompts: list[tuple[float, int, int]] = []  # of this frame: scheduled_s, tokens computed, known
        self.prompts_s = 0.0  # end of the last step in which one was done


class Meter:
    """Metrics of what is delivered; measurements for whoever decides."""

    def __init__(self, decider: Decider, metrics: GatewayMetrics) -> None:
        self._decider = decider
        self._metrics = metrics
        self._steps: dict[str, _Steps] = {}

    def lowered(self, asked: str, tenant: str) -> None:
        """A request gets a lower class than it asks for."""
        self._metrics.lowered.labels(self._decider.tenant_label(tenant), asked).inc()

    def lost(self, instance_id: str) -> None:
        """An instance is gone; should it come back, it is measured afresh."""
        self._steps.pop(instance_id, None)

    def prefilled(self, running: Running, output: EngineCoreOutput) -> None:
        """A leg's first output came; its event times are on our clock already. `frame` follows."""
        running.measured = True
        stats = output.prefill_stats
        if running.leg is Leg.DECODE or stats is None or stats.num_computed_tokens <= 0:
            return  # what a decode leg computes, it computes beside a batch
        for event in output.events or ():
            if event.type == EngineCoreEventType.SCHEDULED:
                prompt = event.timestamp, stats.num_computed_tokens, stats.num_cached_tokens
                self._steps_of(running.instance_id).prompts.append(prompt)
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
        steps = self._steps_of(instance_id)
        if steps.prompts:
            self._computed(steps, now_s)
        steps.count += 1
        if pure and steps.count > TBT_SAMPLE:
            steps.count = 0
            gap_s = now_s - steps.last_s
            if gap_s < TBT_GAP_S_MAX:
                self._decider.stepped(batch, context_tokens, gap_s)
        steps.last_s = now_s

    def _steps_of(self, instance_id: str) -> _Steps:
        steps = self._steps.get(instance_id)
        if steps is None:
            steps = self._steps[instance_id] = _Steps()
        return steps

    def _computed(self, steps: _Steps, now_s: float) -> None:
        """Prompts ended in one step: what it took since the last such one is shared by their tokens.

        An engine computes several together, so each for itself seems to take as long as all of them, and a
        queue priced like that would be many times too long.
        """
        begun_s = max(steps.prompts_s, min(at_s for at_s, _, _ in steps.prompts))
        tokens = sum(new for _, new, _ in steps.prompts)
        for _, new, cached in steps.prompts:
            self._decider.prefilled(new, cached, (now_s - begun_s) * new / tokens)
        steps.prompts_s = now_s
        steps.prompts.clear()

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
            if client.trace is not None:
                client.trace.first(ttft_s)
            if client.plan is not None:
                metrics.ttft_error_s.observe(ttft_s - client.plan.predicted_ttft_s)
                self._decider.started(now_s - client.due_s)
        if client.leg1_end_s and len(client.emitted) <= 1:
            metrics.handover_s.observe(now_s - client.leg1_end_s)
            client.leg1_end_s = 0.0
        client.last_s = now_s
