"""The table of all metrics, made from the code: `python -m mooncake.metrics_table > docs/metrics.md`.

Every component's set is made as its process makes it, in a registry of its own, and nothing is started. What
cannot be read from there stands here: how many values a label may have, and what numbers without unit count.
"""

import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from conductor.core_metrics import CoreCollector
from conductor.hot_copies import HotMetrics
from conductor.index import PrefixIndex
from conductor.index_metrics import Booked, IndexCollector, LoadCollector
from conductor.indexer.follow import State as PublisherState
from conductor.indexer.metrics import IndexerCollector
from conductor.keeper import KeeperMetrics
from conductor.metrics import FAILURES, RESULTS, STATUSES, DecisionMetrics, GatewayMetrics
from conductor.modes import Fallback, IndexMode
from conductor.plan import Decision, Outcome, Reason
from conductor.role_keeper import RoleMetrics
from conductor.slo_metrics import MOVES
from conductor.terms import CLASSES
from kvstore.directory.directory import Mode
from kvstore.directory.metrics import COPIES_SHOWN_MAX, DirectoryMetrics, DirectoryView, ViewCollector
from kvstore.leader.task_types import State as TaskState
from kvstore.node.node import Node
from kvstore.ssd.model import Recovered, SsdStats
from kvstore.store.metrics import SsdCollector, StoreCollector
from kvstore.store.pull_metrics import PullCollector
from kvstore.store.pulls import PullStats
from mooncake.core.metadata_metrics import OPS, MetadataCollector, MetadataMeter
from mooncake.core.metric_labels import INSTANCES_MAX, TENANTS_MAX
from mooncake.core.reload import ReloadMetrics
from mooncake.core.tracing_sdk import span_counter
from mooncake.core.vitals import VitalsCollector, lag_histogram
from mooncake.worker.gpu_blocks import GpuBlocks, LeftOut
from mooncake.worker.metrics import GpuCollector, PulseCollector
from mooncake.worker.pulse import Pulse
from transfer.metrics import LINKS_MAX, TransferCollector, TransferMetrics

UNITS = {
    "_timestamp_seconds": "Unix time, s",
    "_requests_per_second": "requests/s",
    "_seconds": "s",
    "_bytes": "bytes",
    "_ratio": "1 = all of it",
    "_tokens": "tokens",
    "_blocks": "blocks",
    "_requests": "requests",
    "_instances": "instances",
    "_prefixes": "prefixes",
    "_contexts": "contexts",
    "_nodes": "nodes",
    "_keys": "keys",
    "_gateways": "gateways",
    "_info": "1",
    "_token_usage": "tokens",
}
"""Ends of names, and the unit they say; counters have _total after it."""
PLAIN = {
    **dict.fromkeys(
        (
            "mooncake_config_last_reload_success",
            "mooncake_core_leads",
            "mooncake_directory_exact",
            "mooncake_directory_leader",
            "mooncake_fallback_active",
            "mooncake_index_mode",
            "mooncake_metadata_connected",
        ),
        "0 or 1",
    ),
    "mooncake_config_generation": "changes",
    "mooncake_config_hash": "none: to compare",
    "mooncake_core_term": "number of a term",
    "mooncake_directory_entries": "keys",
    "mooncake_directory_nodes_exact": "nodes",
    "mooncake_directory_replicas": "blocks",
    "mooncake_directory_tasks": "tasks",
    "mooncake_directory_term": "number of a term",
    "mooncake_engine_requests_deferred": "requests",
    "mooncake_engine_requests_running": "requests",
    "mooncake_engine_requests_waiting": "requests",
    "mooncake_gpu_blocks_known": "blocks",
    "mooncake_hot_copies_wanted": "copies",
    "mooncake_index_holders": "holders",
    "mooncake_indexer_publishers": "publishers",
    "mooncake_predictions_measured": "predictions",
    "mooncake_process_open_fds": "descriptors",
    "mooncake_process_threads": "threads",
    "mooncake_requests_in_flight": "requests",
    "mooncake_requests_waiting": "requests",
    "mooncake_store_leases": "leases",
    "mooncake_store_pull_running": "copies",
    "mooncake_store_ssd_free_segments": "segments",
    "mooncake_store_ssd_objects": "blocks",
    "mooncake_store_tier_blocks": "blocks",
    "mooncake_store_writing": "blocks",
    "mooncake_transfer_path_state": "0 usable, 1 on trial, 2 quarantined",
}
"""Gauges whose names say in words what they count, as operators do, and end in no unit."""


def _words(words: Any) -> str:
    said = [str(word) for word in words]
    return f"{len(said)}: {', '.join(said)}" if len(said) <= 8 else f"{len(said)} words"


_CLASSES, _OPERATIONS = _words(CLASSES), "3: chat, text_completion, other"
LABELS = {
    "asked": _CLASSES,
    "code": _words(STATUSES),
    "command": "2: copy, drop",
    "context": "2: known, unknown",
    "copies": f"{COPIES_SHOWN_MAX}: 1 to {COPIES_SHOWN_MAX}+",
    "direction": "2: load, save",
    "error_type": "2: none, failed",
    "event": "6: connected, moved, retried, failed, evicted, quarantined",
    "from": "transports: 3",
    "gen_ai_operation_name": _OPERATIONS,
    "gen_ai_provider_name": "1: mooncake",
    "gen_ai_request_model": "2: the name that the model is served by, other",
    "gen_ai_token_type": "2: input, output",
    "instance_id": f"instances, {INSTANCES_MAX} and other",
    "link": f"peers, {LINKS_MAX} and other",
    "mode": _words(IndexMode),
    "model_name": "1: the name that the model is served by",
    "node": "1: its own",
    "objective": "2: ttft, tbt",
    "op": "2: read, write",
    "outcome": _words([*Outcome, "rejected"]),
    "rank": "of the publisher",
    "role": "4: prefill, decode, both, draining",
    "slo_class": _CLASSES,
    "source": "2: engine, pool",
    "state": "3: alive, suspect, dead",
    "tenant": f"those of --tenants, {TENANTS_MAX} and other",
    "tier": "2: dram, ssd",
    "to": "transports: 3",
    "transport": "3: shm, tcp, rdma",
}
"""How many values a label may have, in any process. No other label may be used."""
LABELS_OF = {
    ("mooncake_config_reloads", "result"): "3: changed, unchanged, refused",
    ("mooncake_decisions", "kind"): _words(Decision),
    ("mooncake_directory_commands", "result"): "2: ok, failed",
    ("mooncake_directory_tasks", "kind"): "3: copy, move, drain",
    ("mooncake_directory_tasks", "state"): _words(TaskState),
    ("mooncake_failures", "reason"): _words(FAILURES),
    ("mooncake_fallback_active", "kind"): _words(Fallback),
    ("mooncake_fallbacks", "kind"): _words(Fallback),
    ("mooncake_gpu_blocks_left_out", "reason"): _words(LeftOut),
    ("mooncake_hot_wishes", "result"): "3: sent, failed, no_directory",
    ("mooncake_indexer_left_out", "reason"): "words of ours",
    ("mooncake_indexer_publishers", "state"): _words(PublisherState),
    ("mooncake_keep_orders", "result"): "2: sent, failed",
    ("mooncake_metadata_request_seconds", "op"): _words(OPS),
    ("mooncake_metadata_requests", "op"): _words(OPS),
    ("mooncake_metadata_requests", "result"): "2: ok, error",
    ("mooncake_migrations", "reason"): _words([*sorted(MOVES), "other"]),
    ("mooncake_prediction_error_ratio", "kind"): "4: prefill, tbt, transfer, output",
    ("mooncake_predictions_measured", "kind"): "4: prefill, tbt, transfer, output",
    ("mooncake_process_", "kind"): "kinds of processes and loops",
    ("mooncake_rejections", "reason"): f"{len(Reason)} of conductor.plan.Reason",
    ("mooncake_slo_requests", "result"): _words(RESULTS),
    ("mooncake_store_pinned_bytes", "kind"): "2: soft, hard",
    ("mooncake_store_removed_blocks", "reason"): "3: pressure, drop, bad",
    ("mooncake_store_tenant_bytes", "tenant"): f"those with a quota, {TENANTS_MAX} and other",
    ("mooncake_tenant_rejections", "reason"): f"{len(Reason)} of conductor.plan.Reason",
    ("mooncake_trace_spans", "result"): "3: sent, failed, dropped",
    ("mooncake_transfer_choices", "reason"): "3: best, health, failover",
    ("mooncake_transfer_failures", "reason"): "codes of mooncake.core.errors",
    ("mooncake_transfer_nic_bytes", "link"): f"pairs of NICs, with other links {LINKS_MAX} and other",
    ("mooncake_transfer_parts", "outcome"): "2: moved, failed",
}
"""The same for labels that mean something else in each metric; a name that ends with _ is a beginning."""


class Row(msgspec.Struct, frozen=True):
    """One metric, by the name that it is scraped by (of a histogram, without _bucket and so on)."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    text: str


class Component(StrEnum):
    """What a process does; one may do several."""

    GATEWAY = "Gateway"
    CORE = "Decision core"
    INSTANCE = "Prefill and decode"
    POOL = "Pool"
    TRANSFER = "Transfer"
    METADATA = "Metadata"
    PROCESS = "Process"
    INDEXER = "Indexer"


WHERE = {
    Component.GATEWAY: "on the page of each gateway, beside vLLM's own (`vllm:*`) and the decision core's",
    Component.CORE: "on the page of a core of its own, and of each gateway, which decides if no core does",
    Component.INSTANCE: "on the page of each instance, of either role",
    Component.POOL: "on the page of each store; `mooncake_directory_*` on that of the directory",
    Component.TRANSFER: "on the page of each store that copies from others",
    Component.METADATA: "on every page: how the process gets on with etcd, or with our own metadata store",
    Component.PROCESS: "on every page; `mooncake_trace_spans_total` where tracing is on",
    Component.INDEXER: "on the page of `mooncake indexer`",
}


class _Seen(CollectorRegistry):
    """Remembers what was registered: a metric without a series does not tell its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collector] = []

    def register(self, collector: Collector) -> None:
        super().register(collector)
        self.seen.append(collector)

    def families(self) -> Iterator[tuple[Metric, tuple[str, ...]]]:
        for collector in self.seen:
            for family in collector.collect():
                names: Sequence[str] = getattr(family, "_labelnames", ()) or ()
                yield family, tuple(names or getattr(collector, "_labelnames", ()))


def components() -> dict[Component, list[Row]]:
    """Return every metric of each component, by name; each is one component's."""
    found: dict[Component, list[Row]] = {}
    taken: set[str] = set()
    for component, fill in FILL.items():
        registry = _Seen()
        fill(registry)
        rows = {row.name: row for row in (_row(*one) for one in registry.families())}
        found[component] = [rows[name] for name in sorted(rows) if name not in taken]
        taken |= set(rows)
    return {component: found[component] for component in Component}


def _row(family: Metric, labels: tuple[str, ...]) -> Row:
    counter = family.type == "counter"
    name = family.name + "_total" * counter
    return Row(name, family.type, unit_of(family.name, family.type), labels, family.documentation)


def unit_of(name: str, kind: str) -> str:
    """Return the unit of a metric, `name` without _total; "" = its name says none, and none is said here."""
    if name in PLAIN:
        return PLAIN[name]
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    return unit or ("times" if kind == "counter" else "")


def bound_of(name: str, label: str) -> str:
    """Return how many values a label of a metric has; "" = nobody knows: it must not be used."""
    name = name.removesuffix("_total")
    beginnings = [
        (start, text) for (start, one), text in LABELS_OF.items() if one == label and start[-1] == "_"
    ]
    of_many = next((text for start, text in beginnings if name.startswith(start)), "")
    return LABELS_OF.get((name, label)) or of_many or LABELS.get(label, "")


# ---------------------------------------------------------------- the sets, as processes make them


def _metadata(registry: CollectorRegistry) -> None:
    meter = MetadataMeter()
    meter.confirmed(1, 0.0, new=True)
    registry.register(MetadataCollector(meter, lambda: 0.0))


def _process(registry: CollectorRegistry) -> None:
    registry.register(VitalsCollector("gateway"))
    lag_histogram(registry)
    ReloadMetrics(registry)
    span_counter(registry)


def _core(registry: CollectorRegistry) -> None:
    DecisionMetrics(registry)
    registry.register(IndexCollector(PrefixIndex(1), dict))
    registry.register(LoadCollector(lambda: [Booked("i", "prefill", 0.0, 0, 0, 0)]))
    registry.register(CoreCollector(SimpleNamespace(term=0, gateways=[])))
    RoleMetrics(registry)
    HotMetrics(registry)


def _gateway(registry: CollectorRegistry) -> None:
    GatewayMetrics(registry)
    KeeperMetrics(registry)


def _instance(registry: CollectorRegistry) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pulse = Pulse(Path(folder) / "pulse", create=True)
    registry.register(PulseCollector(pulse, "prefill-0", lambda: "prefill"))
    gpu = GpuCollector("prefill-0", lambda: "prefill")
    reader = SimpleNamespace(blocks=GpuBlocks(b"", 1, 1), undecodable=0, gaps=0, lost=0)
    gpu.events = cast(Any, SimpleNamespace(reader=reader))
    registry.register(gpu)


def _pool(registry: CollectorRegistry) -> None:
    none: dict[str, Any] = dict.fromkeys(SsdStats.__struct_fields__, 0)
    ssd = SsdStats(**none | {"recovered": Recovered()})
    behind = SimpleNamespace(waiting_bytes=0, given_up=0)
    tier = SimpleNamespace(stats=lambda: ssd)
    tiers = SimpleNamespace(tier=tier, behind=behind, promoted_blocks=0, promoted_bytes=0)
    registry.register(StoreCollector("n", Node(1 << 12), lambda: ssd))
    registry.register(SsdCollector("n", cast(Any, tiers)))
    registry.register(PullCollector("n", PullStats()))
    DirectoryMetrics(registry)
    zeros: dict[str, Any] = dict.fromkeys(DirectoryView.__struct_fields__, 0)
    view = DirectoryView(**zeros | {"mode": Mode.EXACT, "tasks": [], "replicas": {}})
    registry.register(ViewCollector(view))


def _transfer(registry: CollectorRegistry) -> None:
    registry.register(TransferCollector(TransferMetrics()))


def _indexer(registry: CollectorRegistry) -> None:
    none: Counter[Any] = Counter()
    indexer = SimpleNamespace(
        lock=contextlib.nullcontext(), contexts=SimpleNamespace(all={}), queries=none,
        states=lambda: none, followers=list,
    )  # fmt: skip
    registry.register(IndexerCollector(cast(Any, indexer)))


FILL = {
    Component.METADATA: _metadata,
    Component.CORE: _core,
    Component.GATEWAY: _gateway,
    Component.INSTANCE: _instance,
    Component.POOL: _pool,
    Component.TRANSFER: _transfer,
    Component.PROCESS: _process,
    Component.INDEXER: _indexer,
}
"""A set that holds another one comes after it: what both have is the first one's."""


# ---------------------------------------------------------------- the page


def page() -> str:
    """Return docs/metrics.md."""
    parts = [HEAD]
    for component, rows in components().items():
        parts.append(f"## {component}\n\n{WHERE[component][0].upper()}{WHERE[component][1:]}.\n")
        parts.append(
            "| name | type | unit | labels, and how many values each has | meaning |\n|---|---|---|---|---|"
        )
        for row in rows:
            labels = "; ".join(f"`{label}` ({bound_of(row.name, label)})" for label in row.labels)
            parts.append(f"| `{row.name}` | {row.kind} | {row.unit} | {labels} | {row.text} |")
        parts.append("")
    return "\n".join(parts)


HEAD = """<!-- made by `python -m mooncake.metrics_table > docs/metrics.md`: a test compares -->
# Metrics

Every process has its own page, `GET /metrics` on its admin port (of `mooncake indexer`: on its only one), and
gateways that share one HTTP port have one each: nothing is shared by files. Scrape all of them and let
Prometheus add counters up: `sum by (...)`. What several processes see of the same thing
(`mooncake_instances`, `mooncake_index_*`) is the same number on each: take the `max`.
`PROMETHEUS_MULTIPROC_DIR` is refused: its files would add up what must not be.

Labels that name things have a bound, and `other` for what is beyond it: nothing that a client sends makes a
series. `instance_id` is our name of an instance; `instance` is Prometheus' own, the address that it scraped.
Histograms are scraped as `NAME_bucket`, `NAME_sum` and `NAME_count`. When a counter was made (`*_created`) is
left out. `gen_ai_*` are OpenTelemetry's names for generative AI. Names of the original Mooncake are served by
the drop-in commands (docs/master.md), for those who have dashboards of it.

Of vLLM's own metrics (`vllm:*`), a gateway has one set for each of 8 engines, labelled by the number that
`/mooncake/instances` shows as `engine`; more engines share the last. There the gauges of requests are sums,
and the use of KV memory a mean; an engine that is gone counts nothing. Every gateway shows all engines, four
times a second at least, so never add these gauges up over gateways, and numbers differ between gateways:
`max by (process)` first, or better the gauges of each instance's own page, which boards and rules use
(`mooncake_engine_requests_running`, `_waiting`, `_deferred`, `mooncake_engine_kv_use_ratio`, by
`instance_id`). Counters and histograms may be added up: each gateway counts its own requests. Where there are
many engines, leave vLLM's out: `mooncake gateway ... -- --disable-log-stats`, three quarters of the page.

A gateway's API port shows the same page at `/metrics`, for the API key where there is one (tenants' names are
in it); vLLM alone shows it to everybody. It is text, never OpenMetrics, which writes `vllm:x` as `vllm_x`.

Goodput is `mooncake_slo_requests_total{result="met"}`: the first token came within its objective, and at most
a tenth of the gaps between outputs were longer than theirs. Requests bring objectives, or have the operator's
(`mooncake_slo_objective_seconds`); without any, whatever is served is met.
"""


def main() -> int:
    """Print the page."""
    sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
