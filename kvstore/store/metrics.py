"""Prometheus view of one store node: read from the node at scrape time, so serving costs nothing."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.node.ages import BOUNDS_S
from kvstore.node.node import Node
from kvstore.ssd.model import SsdStats
from kvstore.ssd.tier import SsdTier
from kvstore.ssd.writebehind import WriteBehind
from mooncake.core.messages import StoreStats
from mooncake.core.metric_labels import OTHER, TENANTS_MAX, Bounded

_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]

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
    "read_bytes": "Bytes read.",
    "corrupt": "Blocks dropped because their bytes were wrong.",
    "write_errors": "Writes that failed.",
}


class Tiers(Protocol):
    """What moves blocks between DRAM and SSD: kvstore.ssd.tiering."""

    tier: SsdTier
    behind: WriteBehind
    promoted_blocks: int
    promoted_bytes: int


class SsdCollector(Collector):
    """mooncake_store_ssd_* of one node. Scraped from another thread: reads plain integers only."""

    def __init__(self, node: str, tiers: Tiers) -> None:
        """`tiers` are read at every scrape."""
        self._node = node
        self._tiers = tiers

    def collect(self) -> Iterator[Metric]:
        """Yield one sample per metric, labelled with the node."""
        tiers, stats = self._tiers, self._tiers.tier.stats()
        gauges = {f"ssd_{name}": (text, getattr(stats, name)) for name, text in _SSD_GAUGES.items()}
        gauges["ssd_waiting_bytes"] = ("Bytes that only memory has yet.", tiers.behind.waiting_bytes)
        counters = {f"ssd_{name}": (text, getattr(stats, name)) for name, text in _SSD_COUNTERS.items()}
        counters["ssd_given_up"] = ("Blocks that could not be copied.", tiers.behind.given_up)
        counters["demoted_blocks"] = ("Blocks copied from memory to the SSD.", stats.puts)
        counters["demoted_bytes"] = ("Bytes of them.", stats.put_bytes)
        counters["promoted_blocks"] = ("Blocks that the SSD gave back to memory.", tiers.promoted_blocks)
        counters["promoted_bytes"] = ("Bytes of them.", tiers.promoted_bytes)
        for kind, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, (text, value) in kind.items():
                metric = family(f"mooncake_store_{name}", text, labels=["node"])
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
        self._tenant = Bounded(TENANTS_MAX)

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
        text = "Bytes of each tenant that has a quota here; others together."
        tenants: dict[str, int] = {OTHER: 0}
        for name, size_bytes, has_quota in node.policy.tenants.shown():
            label = self._tenant(name) if has_quota else OTHER
            tenants[label] = tenants.get(label, 0) + size_bytes
        yield self._labelled(GaugeMetricFamily, "tenant_bytes", text, "tenant", tenants)
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
