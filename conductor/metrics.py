"""Metrics of the decision core and of gateways, on the /metrics page of their process.

A gateway's live in prometheus_client's default registry, which vLLM serves; vLLM unregisters only names that
start with "vllm:", so ours survive. One set per process; docs/metrics.md is the table of all of them.

Label values are words of ours, or names that operators gave, bounded by mooncake.core.metric_labels.
"""

from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from conductor.genai_metrics import GenAiMetrics
from conductor.modes import Fallback
from conductor.plan import Decision, Outcome
from conductor.quick_metrics import QuickCounter, QuickHistogram
from conductor.terms import CLASSES
from mooncake.core.metadata_metrics import MetadataCollector, process_meter
from mooncake.core.metric_labels import TENANTS_MAX, Bounded

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WAIT_S = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0)
_WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAP_S = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_ERROR_S = (-5.0, -1.0, -0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_ERROR_BLOCKS = (-1024.0, -256.0, -64.0, -16.0, -4.0, -1.0, 0.0, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
_DECISION_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_ANSWER_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
RESULTS = ("met", "ttft", "tbt", "failed", "rejected")
"""What became of a request for its service: both objectives kept, or why not; see conductor.slo_metrics."""
FAILURES = ("engine_lost", "engine_error", "no_place", "silent", "backlog", "other")
STATUSES = ("200", "400", "401", "404", "422", "429", "500", "501", "503", "other")
"""Of HTTP answers; any other status is "other"."""
SLO_TARGET_RATIO = 0.99
"""Part of the requests that are to keep their objectives: what is left over is the error budget that burn
rates are about. It is the usual first choice; alert rules may say another."""


class DecisionMetrics:
    """Of who decides: a decision core, or a gateway."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """A second instance in the same registry raises; tests bring their own."""
        self.registry = registry
        registry.register(MetadataCollector(process_meter()))
        self.tenant = Bounded(TENANTS_MAX)
        self.decision_s = QuickHistogram(
            "mooncake_decision_seconds", "Time to compute one plan.", _DECISION_S, registry
        )
        self.decisions = Counter(
            "mooncake_decisions", "Plans by how they came about.", ["kind"], registry=registry
        )
        self.prefix_lookup_blocks = Counter(
            "mooncake_prefix_lookup_blocks", "Full blocks of planned prompts.", registry=registry
        )
        self.prefix_hit_blocks = Counter(
            "mooncake_prefix_hit_blocks", "Of these, expected in the pool or cached.", registry=registry
        )
        self.predicted_ttft_s = Histogram(
            "mooncake_predicted_ttft_seconds",
            "Time to first token as planned.",
            buckets=LATENCY_S,
            registry=registry,
        )
        self.detect_s = Histogram(
            "mooncake_detect_seconds",
            "From an engine's last sign of life to its being declared lost.",
            buckets=LATENCY_S,
            registry=registry,
        )
        self.instances = Gauge(
            "mooncake_instances",
            "Engine instances, as this process sees them: take the max over processes, not the sum.",
            ["role", "state"],
            registry=registry,
        )
        self.fallbacks = Counter(
            "mooncake_fallbacks",
            "Requests planned by a poorer policy than configured, by what was missing.",
            ["kind"],
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
        self.tenant_tokens = Counter(
            "mooncake_tenant_tokens",
            "Tokens of prompts and answers, by tenant (those of --tenants, else other).",
            ["tenant"],
            registry=registry,
        )
        self.leads = Gauge(
            "mooncake_core_leads",
            "1 if this process may decide for the cluster now: the leading core, or a gateway that has none.",
            registry=registry,
        )
        for kind in Decision:
            self.decisions.labels(str(kind))  # shown as 0: a rule can tell "never" from "not there"
        for fallback in Fallback:
            self.fallback.labels(str(fallback))


class GatewayMetrics(DecisionMetrics):
    """All counters, gauges and histograms of one gateway; it decides, too, or can if it must."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """See DecisionMetrics."""
        super().__init__(registry)
        self._add_requests(registry)
        self._add_objectives(registry)
        self._add_latencies(registry)
        self._add_tokens(registry)
        self._add_tenants(registry)
        self.genai = GenAiMetrics(registry)
        text = "1: the name of the model that is served."
        self.model = Gauge("mooncake_model_info", text, ["model_name"], registry=registry)

    def _add_requests(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "mooncake_requests", "Client requests by how they ended.", ["outcome"], registry=registry
        )
        self.rejections = Counter(
            "mooncake_rejections",
            "Client requests turned away, by reason and class of service.",
            ["reason", "slo_class"],
            registry=registry,
        )
        self.failures = Counter(
            "mooncake_failures", "Client requests that failed, by reason.", ["reason"], registry=registry
        )
        self.responses = Counter(
            "mooncake_http_responses", "HTTP answers to clients, by status.", ["code"], registry=registry
        )
        self.migrations = Counter(
            "mooncake_migrations",
            "Requests moved to another engine after their first token.",
            ["reason"],
            registry=registry,
        )
        for reason in ("link down", "silent"):  # the usual ones are shown as 0
            self.migrations.labels(reason)
        self.retries = Counter(
            "mooncake_retries", "Legs placed again before the first token.", registry=registry
        )
        self.stale_outputs = Counter(
            "mooncake_stale_outputs", "Engine outputs of legs that were over.", registry=registry
        )
        self.in_flight = Gauge("mooncake_requests_in_flight", "Requests not ended.", registry=registry)
        self.waiting = Gauge(
            "mooncake_requests_waiting",
            "Requests that no engine has yet, by the class that they were given.",
            ["slo_class"],
            registry=registry,
        )
        self.core_refused = Counter(
            "mooncake_core_refused",
            "Answers that were not followed, as they came from a decision core that leads no more.",
            registry=registry,
        )
        self.core_answer_s = QuickHistogram(
            "mooncake_core_answer_seconds",
            "From a question to the decision core to its answer, or to its saying that the request waits.",
            _ANSWER_S,
            registry,
        )
        for outcome in (*map(str, Outcome), "rejected"):
            self.requests.labels(outcome)
        for reason in FAILURES:
            self.failures.labels(reason)
        for code in STATUSES:
            self.responses.labels(code)
        for name in CLASSES:
            self.waiting.labels(name)

    def _add_objectives(self, registry: CollectorRegistry) -> None:
        self.slo_requests = Counter(
            "mooncake_slo_requests",
            "Client requests by what became of their objectives; met is goodput. Who leaves counts nowhere.",
            ["slo_class", "result"],
            registry=registry,
        )
        self.objectives = Gauge(
            "mooncake_slo_objective_seconds",
            "Objectives of requests that bring none of their own; absent: there is none.",
            ["slo_class", "objective"],
            registry=registry,
        )
        self.slo_target = Gauge(
            "mooncake_slo_target_ratio",
            "Part of the requests that are to keep their objectives.",
            registry=registry,
        )
        self.slo_target.set(SLO_TARGET_RATIO)
        for name in CLASSES:
            for result in RESULTS:
                self.slo_requests.labels(name, result)
        self.ttft_slo_s: float | None = None
        self.tbt_slo_s: float | None = None

    def _add_latencies(self, registry: CollectorRegistry) -> None:
        by_class = ("slo_class",)
        self.ttft_s = QuickHistogram(
            "mooncake_ttft_seconds", "Time to first token.", LATENCY_S, registry, by_class
        )
        self.tbt_s = QuickHistogram(
            "mooncake_tbt_seconds",
            "Gap between outputs of a request (inter-token latency).",
            GAP_S,
            registry,
            by_class,
        )
        self.tpot_s = QuickHistogram(
            "mooncake_tpot_seconds", "Mean time per output token of an answer.", GAP_S, registry, by_class
        )
        self.e2e_s = QuickHistogram(
            "mooncake_e2e_seconds", "From a request to the end of its answer.", _WHOLE_S, registry, by_class
        )
        self.wait_s = QuickHistogram(
            "mooncake_wait_seconds",
            "Time before a plan was made: in the gateway's queue.",
            _WAIT_S,
            registry,
            by_class,
        )
        for histogram in (self.ttft_s, self.tbt_s, self.tpot_s, self.e2e_s, self.wait_s):
            histogram.series("default")
        self.ttft_error_s = Histogram(
            "mooncake_ttft_prediction_error_seconds",
            "Measured minus predicted time to first token.",
            buckets=_ERROR_S,
            registry=registry,
        )
        self.handover_s = Histogram(
            "mooncake_handover_seconds",
            "From the end of leg 1 (prefill) to the first output of leg 2 (decode).",
            buckets=LATENCY_S,
            registry=registry,
        )

    def _add_tokens(self, registry: CollectorRegistry) -> None:
        self.tokens = QuickCounter("mooncake_tokens", "Tokens handed to clients.", registry)
        self.prompt_tokens = QuickCounter(
            "mooncake_prompt_tokens", "Tokens of prompts that engines began.", registry
        )
        self.cached_tokens = Counter(
            "mooncake_cached_tokens",
            "Of these, not computed: found in the engine's own cache, or in the pool.",
            ["source"],
            registry=registry,
        )
        for source in ("engine", "pool"):
            self.cached_tokens.labels(source)
        self.prefix_real_hit_blocks = QuickCounter(
            "mooncake_prefix_real_hit_blocks", "Full blocks that engines had not to compute.", registry
        )
        self.prefix_hit_error = QuickHistogram(
            "mooncake_prefix_hit_error_blocks",
            "Blocks that an engine had not to compute minus those that its plan expected.",
            _ERROR_BLOCKS,
            registry,
        )

    def _add_tenants(self, registry: CollectorRegistry) -> None:
        self.tenant_requests = Counter(
            "mooncake_tenant_requests",
            "Client requests by how they ended and by tenant (those of --tenants, else other).",
            ["tenant", "outcome"],
            registry=registry,
        )
        self.tenant_rejections = Counter(
            "mooncake_tenant_rejections",
            "Client requests turned away, by tenant (those of --tenants, else other) and reason.",
            ["tenant", "reason"],
            registry=registry,
        )
        self.lowered = Counter(
            "mooncake_class_lowered",
            "Client requests whose tenant may not have the class they ask for (told in the answer).",
            ["tenant", "asked"],
            registry=registry,
        )

    def set_objectives(self, ttft_slo_s: float | None, tbt_slo_s: float | None) -> None:
        """Judge requests without objectives of their own by these from now on; None: by none."""
        self.ttft_slo_s, self.tbt_slo_s = ttft_slo_s, tbt_slo_s
        self.objectives.clear()
        for name, slo_class in CLASSES.items():
            if ttft_slo_s is not None and not slo_class.sheddable:  # batch work is there to wait
                self.objectives.labels(name, "ttft").set(ttft_slo_s)
            if tbt_slo_s is not None:
                self.objectives.labels(name, "tbt").set(tbt_slo_s)

    def set_model(self, name: str) -> None:
        """The model is served by this name."""
        self.genai.model = name
        self.model.clear()
        self.model.labels(name).set(1)

    def answered(self, status: int) -> None:
        """An HTTP answer began."""
        code = str(status)
        self.responses.labels(code if code in STATUSES else "other").inc()


def without_created() -> None:
    """Leave out when each counter was made: a quarter of the page's lines, vLLM's too, and nobody asks."""
    disable_created_metrics()  # type: ignore[no-untyped-call]


@cache
def process_metrics() -> GatewayMetrics:
    """Return this process's metrics in the registry that /metrics shows."""
    without_created()
    return GatewayMetrics()


@cache
def core_metrics() -> DecisionMetrics:
    """Return those of a process that decides, and serves no clients."""
    without_created()
    return DecisionMetrics()
