"""What the prefix index holds and what instances were given to do, on the /metrics page of who decides.

Read when it is asked for: counting costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conductor.index import PrefixIndex
from mooncake.core.metric_labels import INSTANCES_MAX, OTHER


class Booked(msgspec.Struct, frozen=True):
    """The work that one instance was given and has not given back, at one moment."""

    instance_id: str
    role: str
    queue_seconds: float
    prefill_requests: int
    decode_requests: int
    kv_tokens: int


_LOADS = {
    "queue_seconds": "Predicted time until a prompt that comes now would begin there.",
    "prefill_requests": "Prompts that wait or are computed there.",
    "decode_requests": "Answers that are, or will be, written there.",
    "kv_tokens": "Tokens of the contexts of these answers.",
}
"""Fields of Booked."""


class IndexCollector(Collector):
    """Turns IndexStats, and what engines tell of their own caches, into Prometheus metrics."""

    def __init__(self, index: PrefixIndex, gpu_blocks: Callable[[], Mapping[str, int]]) -> None:
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
            labels=["instance_id"],
        )
        told = sorted(self._gpu_blocks().items())
        for instance_id, count in told[:INSTANCES_MAX]:
            known.add_metric([instance_id], count)
        if len(told) > INSTANCES_MAX:
            known.add_metric([OTHER], sum(count for _, count in told[INSTANCES_MAX:]))
        yield known


class LoadCollector(Collector):
    """mooncake_instance_*: where the work is."""

    def __init__(self, booked: Callable[[], Sequence[Booked]]) -> None:
        """`booked`: of every instance; a scrape asks from a thread of its own."""
        self._booked = booked

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number; of instances beyond INSTANCES_MAX, one sum."""
        booked = sorted(self._booked(), key=lambda one: one.instance_id)
        for name, text in _LOADS.items():
            family = GaugeMetricFamily(f"mooncake_instance_{name}", text, labels=["instance_id", "role"])
            for one in booked[:INSTANCES_MAX]:
                family.add_metric([one.instance_id, one.role], getattr(one, name))
            if len(booked) > INSTANCES_MAX:
                family.add_metric([OTHER, OTHER], sum(getattr(one, name) for one in booked[INSTANCES_MAX:]))
            yield family
