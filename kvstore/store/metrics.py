"""Prometheus view of one store node: read from the node at scrape time, so serving costs nothing."""

import itertools
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.node.ages import BOUNDS_S
from kvstore.node.node import Node
from kvstore.ssd.model import SsdStats
from kvstore.ssd.writebehind import WriteBehind
from mooncake.core.messages import StoreStats

_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]

TENANTS_MAX = 20
"""Shown one by one: every label value is a time series for good, and tenants come and go."""
OTHERS = "(others)"
_TIERS: tuple[tuple[_Family, str, str, str, str], ...] = (
    (GaugeMetricFamily, "tier_capacity_bytes", "Bytes of a tier.", "capacity_bytes", "capacity_bytes"),
    (GaugeMetricFamily, "tier_used_bytes", "Bytes in use.", "used_bytes", "live_bytes"),
    (GaugeMetricFamily, "tier_blocks", "Blocks that can be read.", "blocks", "objects"),
    (CounterMetricFamily, "tier_hits", "Blocks found in a tier.", "hits", "hits"),
    (CounterMetricFamily, "tier_misses", "Blocks asked for in a tier and not there.", "misses", "misses"),
    (CounterMetricFamily, "tier_evictions", "Blocks given up to make room.", "evictions", "evictions"),
)
"""(kind, name, text, field of StoreStats, field of SsdStats)"""
_GAUGES = {
    "capacity_bytes": "Bytes of the node's segment.",
    "used_bytes": "Bytes in use: complete, in writing, hidden under a lease, in quarantine.",
    "blocks": "Complete blocks.",
    "writing": "Blocks reserved and not committed yet.",
    "leases": "Leases that readers hold.",
}
_COUNTERS = {
    "hits": "Blocks found by acquire.",
    "misses": "Blocks asked for and not found (everything after the first miss counts).",
    "evictions": "Blocks given up to make room.",
    "checksum_failures": "Blocks dropped because their bytes were wrong.",
    "commits": "Blocks made visible.",
}


_SSD_GAUGES = {
    "capacity_bytes": "Bytes of the tier's file.",
    "live_bytes": "Bytes of blocks that can be read.",
    "objects": "Blocks that can be read.",
    "free_segments": "Segments ready for the next copies.",
}
_SSD_COUNTERS = {
    "hits": "Blocks read and verified.",
    "misses": "Blocks asked for and not there.",
    "evictions": "Blocks given up to make room.",
    "puts": "Blocks copied from memory.",
    "put_bytes": "Bytes copied from memory.",
    "read_bytes": "Bytes read.",
    "corrupt": "Blocks dropped because their bytes were wrong.",
    "write_errors": "Writes that failed.",
}


class SsdCollector(Collector):
    """mooncake_store_ssd_* of one node. Scraped from another thread: reads plain integers only."""

    def __init__(self, node: str, stats: Callable[[], SsdStats], behind: WriteBehind) -> None:
        """`stats` and `behind` are read at every scrape."""
        self._node = node
        self._stats = stats
        self._behind = behind

    def collect(self) -> Iterator[Metric]:
        """Yield one sample per metric, labelled with the node."""
        stats = self._stats()
        gauges = {name: (text, getattr(stats, name)) for name, text in _SSD_GAUGES.items()}
        gauges["waiting_bytes"] = ("Bytes that only memory has yet.", self._behind.waiting_bytes)
        counters = {name: (text, getattr(stats, name)) for name, text in _SSD_COUNTERS.items()}
        counters["given_up"] = ("Blocks that could not be copied.", self._behind.given_up)
        for kind, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, (text, value) in kind.items():
                metric = family(f"mooncake_store_ssd_{name}", text, labels=["node"])
                metric.add_metric([self._node], value)
                yield metric


class StoreCollector(Collector):
    """mooncake_store_* of one node. Scraped from another thread: reads plain integers only.

    By tier: what an acquire found in memory, also after the SSD brought it there; what was read from the
    SSD. So the SSD's part of all hits is ssd / dram.
    """

    def __init__(self, name: str, node: Node, ssd: Callable[[], SsdStats] | None = None) -> None:
        """`node` and `ssd` are read at every scrape."""
        self._name = name
        self._node = node
        self._ssd = ssd

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, labelled with the node."""
        node, stats = self._node, self._node.stats()
        for name, text in _GAUGES.items():
            yield self._metric(GaugeMetricFamily, name, text, getattr(stats, name))
        quarantined = "Bytes that a lost writer may still hit."
        yield self._metric(
            GaugeMetricFamily, "quarantined_bytes", quarantined, node.writing.quarantined_bytes
        )
        for name, text in _COUNTERS.items():
            yield self._metric(CounterMetricFamily, name, text, getattr(stats, name))
        refused = "Pins not given for lack of room; the blocks are cached all the same."
        yield self._metric(CounterMetricFamily, "pins_refused", refused, node.pins_refused)
        gone = {"pressure": node.shelf.evictions, "drop": node.drops, "bad": node.checksum_failures}
        text = "Blocks that left memory: evicted, dropped on request, found to be damaged."
        yield self._labelled(CounterMetricFamily, "removed_blocks", text, "reason", gone)
        pinned = {"soft": stats.soft_pinned_bytes, "hard": stats.hard_pinned_bytes}
        text = "Bytes that are evicted last (soft) or not at all (hard)."
        yield self._labelled(GaugeMetricFamily, "pinned_bytes", text, "kind", pinned)
        text = f"Bytes of the {TENANTS_MAX} largest tenants; the others together."
        yield self._labelled(
            GaugeMetricFamily, "tenant_bytes", text, "tenant", _largest(node.policy.tenants.used())
        )
        yield from self._tiers(stats)
        yield self._ages()

    def _tiers(self, stats: StoreStats) -> Iterator[Metric]:
        ssd = self._ssd() if self._ssd else None
        for family, name, text, dram, of_ssd in _TIERS:
            values = {"dram": getattr(stats, dram)} | ({"ssd": getattr(ssd, of_ssd)} if ssd else {})
            yield self._labelled(family, name, text, "tier", values)

    def _ages(self) -> Metric:
        ages = self._node.shelf.ages
        family = HistogramMetricFamily(
            "mooncake_store_eviction_age_seconds",
            "Age of evicted blocks: from their commit, which is known to the second.",
            labels=["node"],
        )
        counts = itertools.accumulate(list(ages.counts))
        bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
        family.add_metric([self._name], list(zip(bounds, counts, strict=True)), ages.sum_s)
        return family

    def _metric(self, family: _Family, name: str, text: str, value: float) -> Metric:
        metric = family(f"mooncake_store_{name}", text, labels=["node"])
        metric.add_metric([self._name], value)
        return metric

    def _labelled(
        self, family: _Family, name: str, text: str, label: str, values: Mapping[str, float]
    ) -> Metric:
        metric = family(f"mooncake_store_{name}", text, labels=["node", label])
        for key, value in values.items():
            metric.add_metric([self._name, key], value)
        return metric


def _largest(tenants: Mapping[str, int]) -> dict[str, int]:
    order = sorted(tenants.items(), key=lambda item: (-item[1], item[0]))
    shown = dict(order[:TENANTS_MAX])
    if len(order) > TENANTS_MAX:
        shown[OTHERS] = sum(size_bytes for _, size_bytes in order[TENANTS_MAX:])
    return shown
