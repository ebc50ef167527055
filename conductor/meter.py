"""Measures what engines and clients of one gateway see; called per engine step, so kept short."""

from collections.abc import Callable

from conductor.clients import Client, Running
from conductor.decider import Decider
from conductor.metrics import GatewayMetrics
from conductor.plan import Leg, Outcome, Rejection
from conductor.slo_metrics import objectives_of, result_of
from conductor.terms import Terms
from conductor.vllm_seam import EngineCoreEventType, EngineCoreOutput, PrefillStats

TBT_SAMPLE = 16
"""After so many frames of an engine, a gap is measured: the fit needs tens, not thousands."""
TBT_GAP_S_MAX = 5.0
"""A longer gap means that the engine was idle or stopped, not that a step took so long."""


class _Steps:
    __slots__ = ("count", "prompts", "prompts_s", "stamp_s")

    def __init__(self) -> None:
        self.count = 0
        self.stamp_s = 0.0
        self.prompts: list[tuple[float, int, int]] = []  # of this frame: scheduled_s, tokens computed, known
        self.prompts_s = 0.0  # end of the last step in which one was done


class Meter:
    """Metrics of what is delivered; measurements for whoever decides."""

    def __init__(
        self, decider: Decider, metrics: GatewayMetrics, block_size: Callable[[str], int] = lambda _: 0
    ) -> None:
        """`block_size`: tokens per block of an instance, 0 = not known."""
        self._decider = decider
        self._metrics = metrics
        self._block_size = block_size
        self._steps: dict[str, _Steps] = {}

    def lowered(self, asked: str, tenant: str) -> None:
        """A request gets a lower class than it asks for."""
        self._metrics.lowered.labels(self._tenant(tenant), asked).inc()

    def rejected(self, terms: Terms, rejection: Rejection) -> None:
        """A request is turned away; one that was taken before is `ended` as well."""
        reason, slo_class = str(rejection.reason), terms.slo_class.name
        self._metrics.rejections.labels(reason, slo_class).inc()
        self._metrics.tenant_rejections.labels(self._tenant(terms.tenant), reason).inc()
        self._metrics.slo_requests.labels(slo_class, "rejected").inc()

    def over(self, terms: Terms, outcome: str) -> None:
        """A request has ended: once for each."""
        self._metrics.requests.labels(outcome).inc()
        self._metrics.tenant_requests.labels(self._tenant(terms.tenant), outcome).inc()

    def _tenant(self, tenant: str) -> str:
        return self._metrics.tenant(self._decider.tenant_label(tenant))

    def lost(self, instance_id: str) -> None:
        """An instance is gone; should it come back, it is measured afresh."""
        self._steps.pop(instance_id, None)

    def prefilled(self, running: Running, output: EngineCoreOutput) -> None:
        """A leg's first output came; its event times are on our clock already. `frame` follows."""
        running.measured = True
        stats = output.prefill_stats
        if running.leg is Leg.DECODE or stats is None:
            return  # what a decode leg computes, it computes beside a batch
        self._found(running, stats)
        if stats.num_computed_tokens <= 0:
            return
        for event in output.events or ():
            if event.type == EngineCoreEventType.SCHEDULED:
                prompt = event.timestamp, stats.num_computed_tokens, stats.num_cached_tokens
                self._steps_of(running.instance_id).prompts.append(prompt)
                return

    def _found(self, running: Running, stats: PrefillStats) -> None:
        """An engine says what it had not to compute of a prompt."""
        metrics, client = self._metrics, running.clients[0]
        if client.told or client.plan is None:
            return  # it goes on from another engine: part of this is its answer
        metrics.prompt_tokens.inc(stats.num_prompt_tokens)
        metrics.cached_tokens.labels("engine").inc(stats.num_local_cached_tokens)
        metrics.cached_tokens.labels("pool").inc(stats.num_external_cached_tokens)
        block_size = self._block_size(running.instance_id)
        if block_size:
            blocks = stats.num_cached_tokens // block_size
            metrics.prefix_real_hit_blocks.inc(blocks)
            metrics.prefix_hit_error.observe(blocks - client.plan.hit_blocks)

    def frame(
        self, instance_id: str, now_s: float, stamp_s: float, batch: int, context_tokens: int, pure: bool
    ) -> None:
        """One engine step came in.

        Args:
            instance_id: the engine's.
            now_s: when it came.
            stamp_s: when it was done, on the engine's clock: a busy gateway takes many frames at once.
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
            gap_s = stamp_s - steps.stamp_s
            if gap_s < TBT_GAP_S_MAX:
                self._decider.stepped(batch, context_tokens, gap_s)
        steps.stamp_s = stamp_s

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
            gap_s = now_s - client.last_s
            client.tbt.observe(gap_s)
            client.gaps += 1
            if gap_s > client.tbt_slo_s:
                client.late_gaps += 1
        else:
            self._began(client, now_s)
        if client.leg1_end_s and len(client.emitted) <= 1:
            metrics.handover_s.observe(now_s - client.leg1_end_s)
            client.leg1_end_s = 0.0
        client.last_s = now_s

    def _began(self, client: Client, now_s: float) -> None:
        """A client gets its first token."""
        metrics, terms = self._metrics, client.prompt.terms
        client.first_s = now_s
        ttft_s = now_s - client.started_s
        metrics.ttft_s.observe(ttft_s, client.slo_class)
        if client.trace is not None:
            client.trace.first(ttft_s)
        client.tbt = metrics.tbt_s.series(client.slo_class)
        client.ttft_slo_s, client.tbt_slo_s = objectives_of(terms, metrics.ttft_slo_s, metrics.tbt_slo_s)
        if client.plan is not None:
            metrics.ttft_error_s.observe(ttft_s - client.plan.predicted_ttft_s)
            self._decider.started(now_s - client.due_s)

    def ended(self, client: Client, outcome: Outcome, now_s: float) -> None:
        """A request that was taken has ended."""
        metrics, terms, slo_class = self._metrics, client.prompt.terms, client.slo_class
        self.over(terms, "rejected" if client.turned_away else str(outcome))
        if client.turned_away:
            return
        tokens, seconds = len(client.emitted), now_s - client.started_s
        ttft_s = client.first_s - client.started_s if client.first_s else None
        tpot_s = (client.last_s - client.first_s) / (tokens - 1) if tokens > 1 else None
        if tpot_s is not None:
            metrics.tpot_s.observe(tpot_s, slo_class)
        if ttft_s is not None:
            metrics.e2e_s.observe(seconds, slo_class)
        if outcome is Outcome.FAILED:
            metrics.slo_requests.labels(slo_class, "failed").inc()
        elif ttft_s is not None:
            result = result_of(ttft_s, client.ttft_slo_s, client.gaps, client.late_gaps)
            metrics.slo_requests.labels(slo_class, result).inc()
        elif seconds > objectives_of(terms, metrics.ttft_slo_s, None)[0]:
            metrics.slo_requests.labels(slo_class, "ttft").inc()  # it left, but not before it was late
        metrics.genai.ended(
            "other" if client.fate is None else client.fate.operation,
            adapter=client.request.lora_request is not None,
            seconds=seconds,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            prompt_tokens=0 if client.prompt.is_sibling else client.prompt.facts.prompt_len,
            answer_tokens=tokens,
            error="failed" if outcome is Outcome.FAILED else "",
        )
