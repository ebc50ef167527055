"""What the prefix index holds and has given up, on the gateway's /metrics page; read when it is asked for."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conductor.index import PrefixIndex


class IndexCollector(Collector):
    """Turns IndexStats, and what engines tell of their own caches, into Prometheus metrics."""

    def __init__(self, index: PrefixIndex, gpu_blocks: Callable[[], dict[str, int]]) -> None:
        """`gpu_blocks`: see Members."""
        self._index, self._gpu_blocks = index, gpu_blocks

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number; a scrape counts nothing, so it costs microseconds."""
        stats = self._index.stats()
        yield GaugeMetricFamily("mooncake_index_blocks", "Blocks in the prefix index.", stats.blocks)
        yield GaugeMetricFamily("mooncake_index_holders", "Stores and engines that hold them.", stats.nodes)
        yield CounterMetricFamily(
            "mooncake_index_dropped", "Blocks dropped, the oldest, because the index was full.", stats.dropped
        )
        yield CounterMetricFamily(
            "mooncake_index_sweeps", "Passes that took restarted holders out.", stats.sweeps
        )
        known = GaugeMetricFamily(
            "mooncake_gpu_blocks_known",
            "Blocks that an engine says its own cache holds; 0 while it is out of step.",
            labels=["instance"],
        )
        for instance_id, count in self._gpu_blocks().items():
            known.add_metric([instance_id], count)
        yield known
