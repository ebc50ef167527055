"""The gateway's own metrics, on the /metrics page beside vLLM's.

They live in prometheus_client's default registry, which vLLM serves; vLLM unregisters only names
that start with "vllm:", so ours survive. One set per process.
"""

from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from conductor.quick_metrics import QuickCounter, QuickHistogram

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WAIT_S = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0)
_GAP_S = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_ERROR_S = (-5.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class GatewayMetrics:
    """All counters, gauges and histograms of one gateway."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """A second instance in the same registry raises; tests bring their own."""
        self.registry = registry
        self.requests = Counter(
            "mooncake_requests", "Client requests by how they ended.", ["outcome"], registry=registry
        )
        self.rejections = Counter(
            "mooncake_rejections",
            "Client requests turned away, by reason and class of service.",
            ["reason", "slo_class"],
            registry=registry,
        )
        self.tenant_rejections = Counter(
            "mooncake_tenant_rejections",
            "Client requests turned away, by tenant (those of --tenants, else other) and reason.",
            ["tenant", "reason"],
            registry=registry,
        )
        self.tenant_tokens = Counter(
            "mooncake_tenant_tokens",
            "Tokens of prompts and answers, by tenant (those of --tenants, else other).",
            ["tenant"],
            registry=registry,
        )
        self.lowered = Counter(
            "mooncake_class_lowered",
            "Client requests whose tenant may not have the class they ask for (told in the answer).",
            ["tenant", "asked"],
            registry=registry,
        )
        self.decisions = Counter(
            "mooncake_decisions", "Plans by how they came about.", ["kind"], registry=registry
        )
        self.migrations = Counter(
            "mooncake_migrations",
            "Requests moved to another engine after their first token.",
            ["reason"],
            registry=registry,
        )
        self.retries = Counter(
            "mooncake_retries", "Legs placed again before the first token.", registry=registry
        )
        self.stale_outputs = Counter(
            "mooncake_stale_outputs", "Engine outputs of legs that were over.", registry=registry
        )
        self.tokens = QuickCounter("mooncake_tokens", "Tokens handed to clients.", registry)
        self.prefix_lookup_blocks = Counter(
            "mooncake_prefix_lookup_blocks", "Full blocks of planned prompts.", registry=registry
        )
        self.prefix_hit_blocks = Counter(
            "mooncake_prefix_hit_blocks", "Of these, expected in the pool or cached.", registry=registry
        )
        self.ttft_s = Histogram(
            "mooncake_ttft_seconds", "Time to first token.", buckets=_LATENCY_S, registry=registry
        )
        self.class_ttft_s = Histogram(
            "mooncake_class_ttft_seconds",
            "Time to first token, by class of service.",
            ["slo_class"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.class_wait_s = Histogram(
            "mooncake_class_wait_seconds",
            "Time before a plan was made: in the gateway's queue, by class of service.",
            ["slo_class"],
            buckets=_WAIT_S,
            registry=registry,
        )
        self.tbt_s = QuickHistogram(
            "mooncake_tbt_seconds", "Gap between outputs of a request.", _GAP_S, registry
        )
        self.predicted_ttft_s = Histogram(
            "mooncake_predicted_ttft_seconds",
            "Time to first token as planned.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.ttft_error_s = Histogram(
            "mooncake_ttft_prediction_error_seconds",
            "Measured minus predicted time to first token.",
            buckets=_ERROR_S,
            registry=registry,
        )
        self.handover_s = Histogram(
            "mooncake_handover_seconds",
            "From the end of leg 1 to the first output of leg 2.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.detect_s = Histogram(
            "mooncake_detect_seconds",
            "From an engine's last sign of life to its being declared lost.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.instances = Gauge(
            "mooncake_instances", "Engine instances.", ["role", "state"], registry=registry
        )
        self.fallbacks = Counter(
            "mooncake_fallbacks",
            "Requests planned by a poorer policy than configured, by what was missing.",
            ["kind"],
            registry=registry,
        )
        self.core_refused = Counter(
            "mooncake_core_refused",
            "Answers that were not followed, as they came from a decision core that leads no more.",
            registry=registry,
        )
        self.fallback = Gauge("mooncake_fallback_active", "1 while it is so.", ["kind"], registry=registry)
        self.index_mode = Gauge(
            "mooncake_index_mode",
            "1 for the mode of the prefix index: in step with every store, with some, with none.",
            ["mode"],
            registry=registry,
        )
        self.prediction_error = Gauge(
            "mooncake_prediction_error_ratio",
            "Moving mean of |predicted - measured| / measured.",
            ["kind"],
            registry=registry,
        )
        self.predictions = Gauge(
            "mooncake_predictions_measured", "Predictions compared since start.", ["kind"], registry=registry
        )
        self.waiting = Gauge(
            "mooncake_requests_waiting", "Requests that no engine has yet.", registry=registry
        )
        self.in_flight = Gauge("mooncake_requests_in_flight", "Requests not ended.", registry=registry)


@cache
def process_metrics() -> GatewayMetrics:
    """Return this process's metrics in the registry that /metrics shows."""
    return GatewayMetrics()
