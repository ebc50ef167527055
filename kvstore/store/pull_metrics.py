"""Prometheus view of what a store copies from others."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.store.pulls import PullStats

_COUNTERS = {
    "pulls": "Copies begun: one per reader or order that lacked something.",
    "blocks": "Blocks copied from other stores and verified.",
    "bytes": "Bytes of them.",
    "seconds": "Time that copies took; they overlap.",
    "missing": "Blocks that their owner did not have (any more).",
    "bad": "Copies cut short by bytes that were not what was committed.",
    "failures": "Copies cut short because the other store was away.",
    "handed_over": "Blocks that another store was told to copy from here, because it decodes next.",
    "handovers_failed": "Times that another store could not be told so.",
    "refused": "Copies not begun because as many as allowed were under way.",
}


class PullCollector(Collector):
    """mooncake_store_pull_* of one node. Scraped from another thread: reads plain numbers only."""

    def __init__(self, node: str, stats: PullStats) -> None:
        """`stats` is read at every scrape."""
        self._node = node
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield one sample per metric, labelled with the node."""
        running = GaugeMetricFamily("mooncake_store_pull_running", "Copies under way.", labels=["node"])
        running.add_metric([self._node], self._stats.running)
        yield running
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"mooncake_store_pull_{name}", text, labels=["node"])
            counter.add_metric([self._node], getattr(self._stats, name))
            yield counter
