"""Prometheus view of one store node: read from the node at scrape time, so serving costs nothing."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.ssd_model import SsdStats
from kvstore.writebehind import WriteBehind
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
