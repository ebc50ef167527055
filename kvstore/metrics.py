"""Prometheus view of one store node: read from the node at scrape time, so serving costs nothing."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mooncake.core.messages import StoreStats

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


class StoreCollector(Collector):
    """mooncake_store_* of one node. Scraped from another thread: reads plain integers only."""

    def __init__(
        self, node: str, stats: Callable[[], StoreStats], quarantined_bytes: Callable[[], int]
    ) -> None:
        """`stats` and `quarantined_bytes` are read at every scrape."""
        self._node = node
        self._stats = stats
        self._quarantined_bytes = quarantined_bytes

    def collect(self) -> Iterator[Metric]:
        """Yield one sample per metric, labelled with the node."""
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield self._gauge(name, text, getattr(stats, name))
        yield self._gauge(
            "quarantined_bytes", "Bytes that a lost writer may still hit.", self._quarantined_bytes()
        )
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"mooncake_store_{name}", text, labels=["node"])
            family.add_metric([self._node], getattr(stats, name))
            yield family

    def _gauge(self, name: str, text: str, value: int) -> Metric:
        family = GaugeMetricFamily(f"mooncake_store_{name}", text, labels=["node"])
        family.add_metric([self._node], value)
        return family
