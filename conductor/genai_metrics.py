"""OpenTelemetry's metrics of generative AI, by the names that its Prometheus exporter gives them.

Of the semantic conventions (gen_ai.server.*, gen_ai.client.token.usage), so that dashboards made for any
server show this one, too. What they count is also in mooncake_*: these have the model, those the class.
"""

from prometheus_client import CollectorRegistry

from conductor.quick_metrics import QuickHistogram
from mooncake.core.metric_labels import OTHER

PROVIDER = "mooncake"
_DURATION_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92
)  # fmt: skip
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(float(4**power) for power in range(14))
"""Bounds that the conventions ask for; of tokens, powers of 4 up to 67 million."""
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}
"""Paths that engines are needed for, in the conventions' words; metrics call all others "other", traces leave
them out."""
_LABELS = ("gen_ai_operation_name", "gen_ai_request_model", "gen_ai_provider_name")


class GenAiMetrics:
    """Of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """A second one in the same registry raises."""
        self.model = OTHER
        """The name that this gateway serves its model by; adapters, which clients may load, are OTHER."""
        self._duration_s = QuickHistogram(
            "gen_ai_server_request_duration_seconds",
            "From a request to the end of its answer.",
            _DURATION_S,
            registry,
            (*_LABELS, "error_type"),
        )
        self._ttft_s = QuickHistogram(
            "gen_ai_server_time_to_first_token_seconds", "Time to first token.", _TTFT_S, registry, _LABELS
        )
        self._tpot_s = QuickHistogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per output token after the first.",
            _TPOT_S,
            registry,
            _LABELS,
        )
        self._tokens = QuickHistogram(
            "gen_ai_client_token_usage",
            "Tokens of a request's prompt (input) and of its answer (output).",
            _TOKENS,
            registry,
            (*_LABELS, "gen_ai_token_type"),
        )

    def ended(
        self,
        operation: str,
        *,
        adapter: bool,
        seconds: float,
        ttft_s: float | None,
        tpot_s: float | None,
        prompt_tokens: int,
        answer_tokens: int,
        error: str,
    ) -> None:
        """A request is over.

        Args:
            operation: of OPERATIONS, or "other".
            adapter: whether it asked for a LoRA adapter instead of the model.
            seconds: from its arrival.
            ttft_s: None: it had no token.
            tpot_s: None: it had not two.
            prompt_tokens: 0 where another answer to the same prompt counts them.
            answer_tokens: that were delivered.
            error: "" = none.
        """
        labels = operation, OTHER if adapter else self.model, PROVIDER
        self._duration_s.observe(seconds, *labels, error)
        if ttft_s is not None:
            self._ttft_s.observe(ttft_s, *labels)
        if tpot_s is not None:
            self._tpot_s.observe(tpot_s, *labels)
        if prompt_tokens:
            self._tokens.observe(prompt_tokens, *labels, "input")
        if answer_tokens:
            self._tokens.observe(answer_tokens, *labels, "output")
