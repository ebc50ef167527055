"""Metrics of one instance: what its engine writes into shared memory, and what it tells of its own cache.

Read when they are asked for, in the relay's process: an engine pays a few additions per step for them. Labels
are those of the one instance: its id, and the role that it has now.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mooncake.worker.gpu_blocks import LeftOut
from mooncake.worker.gpu_events import GpuEvents
from mooncake.worker.pulse import Pulse

_NAMES = ["instance_id", "role"]
_GAUGES = {
    "requests_running": ("mooncake_engine_requests_running", "Requests in the engine's batch."),
    "requests_waiting": ("mooncake_engine_requests_waiting", "Requests in the engine's own queue."),
    "requests_deferred": (
        "mooncake_engine_requests_deferred",
        "Of those in the engine's queue, the ones that wait for blocks on their way, not for room.",
    ),
    "kv_use_ratio": ("mooncake_engine_kv_use_ratio", "Part of the engine's KV blocks that are in use."),
}
_COUNTERS = {
    "steps": ("mooncake_engine_steps", "Steps of the engine."),
    "preemptions": ("mooncake_engine_preemptions", "Requests begun anew that had been put off for KV room."),
    "prefix_lookup_tokens": (
        "mooncake_engine_prefix_lookup_tokens",
        "Prompt tokens looked up in the engine's own prefix cache.",
    ),
    "prefix_hit_tokens": ("mooncake_engine_prefix_hit_tokens", "Of these, found there."),
    "load_blocks": ("mooncake_kv_load_blocks", "Blocks loaded from the pool."),
    "save_blocks": ("mooncake_kv_save_blocks", "Blocks committed to the pool."),
    "late_saves": (
        "mooncake_kv_late_saves",
        "Blocks that were lost because a step outlasted its reservation.",
    ),
    "bad_blocks": ("mooncake_kv_checksum_failures", "Blocks whose bytes differed from their checksum."),
    "failed_loads": ("mooncake_kv_failed_loads", "Requests that recomputed because a load failed."),
    "lookup_timeouts": ("mooncake_kv_lookup_timeouts", "Pool look-ups given up."),
    "pool_errors": ("mooncake_kv_pool_errors", "Pool calls that failed."),
    "hit_tokens": ("mooncake_kv_hit_tokens", "Prompt tokens taken from the pool."),
    "lookup_tokens": ("mooncake_kv_lookup_tokens", "Prompt tokens looked up in the pool."),
    "fetch_bytes": ("mooncake_kv_fetched_bytes", "Bytes the store fetched from others for look-ups here."),
    "fetch_seconds": ("mooncake_kv_fetch_seconds", "Time that those look-ups waited for them."),
    "resumed_requests": ("mooncake_resumed_requests", "Requests continued from another engine."),
}
"""Fields of Pulse: name and text."""
_COPIES = {"load": ("load_bytes", "load_seconds"), "save": ("save_bytes", "save_seconds")}

Role = Callable[[], str]


class PulseCollector(Collector):
    """Turns the engine's shared counters into Prometheus metrics at scrape time."""

    def __init__(
        self, pulse: Pulse, instance_id: str, role: Role, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`role` is asked at every scrape."""
        self._pulse, self._instance_id, self._role, self._clock = pulse, instance_id, role, clock

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number."""
        pulse, labels = self._pulse, [self._instance_id, self._role()]
        for field, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=_NAMES)
            gauge.add_metric(labels, pulse.read(field))
            yield gauge
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=_NAMES)
            counter.add_metric(labels, pulse.read(field))
            yield counter
        moved = [*_NAMES, "direction"]
        size = CounterMetricFamily(
            "mooncake_kv_copy_bytes", "Bytes copied between the engine and the pool.", labels=moved
        )
        took = CounterMetricFamily("mooncake_kv_copy_seconds", "Time spent copying them.", labels=moved)
        for direction, (size_field, seconds_field) in _COPIES.items():
            size.add_metric([*labels, direction], pulse.read(size_field))
            took.add_metric([*labels, direction], pulse.read(seconds_field))
        yield size
        yield took
        age = GaugeMetricFamily(
            "mooncake_engine_pulse_age_seconds", "Age of the engine's last sign of life.", labels=_NAMES
        )
        age.add_metric(labels, pulse.age_s(self._clock()))
        yield age


class GpuCollector(Collector):
    """What is known of the engine's own prefix cache, once it tells."""

    def __init__(self, instance_id: str, role: Role) -> None:
        """Labels as of PulseCollector. The attributes are set when they are known."""
        self._instance_id, self._role = instance_id, role
        self.events: GpuEvents | None = None
        self.block_bytes = 0
        self.blocks_max = 0

    def collect(self) -> Iterator[Metric]:
        """Yield nothing of an engine that does not tell."""
        if self.events is None:
            return
        labels, reader = [self._instance_id, self._role()], self.events.reader
        held = len(reader.blocks)
        for name, text, value in (
            ("blocks", "Blocks in the engine's own prefix cache that have a name.", held),
            ("cache_bytes", "Bytes of these blocks.", held * self.block_bytes),
            ("capacity_bytes", "Bytes of all KV blocks of the engine.", self.blocks_max * self.block_bytes),
        ):
            gauge = GaugeMetricFamily(f"mooncake_gpu_{name}", text, labels=_NAMES)
            gauge.add_metric(labels, value)
            yield gauge
        for name, text, count in (
            ("evicted_blocks", "Blocks that the engine's own cache gave up.", reader.blocks.evicted),
            (
                "events_undecodable",
                "Messages of vLLM's about its cache that could not be read.",
                reader.undecodable,
            ),
            ("events_gaps", "Gaps in vLLM's messages about its cache.", reader.gaps),
            ("events_lost", "Gaps that nothing could fill: what was known was forgotten.", reader.lost),
        ):
            counter = CounterMetricFamily(f"mooncake_gpu_{name}", text, labels=_NAMES)
            counter.add_metric(labels, count)
            yield counter
        left_out = CounterMetricFamily(
            "mooncake_gpu_blocks_left_out", "Blocks that have no name of ours.", labels=[*_NAMES, "reason"]
        )
        for reason in LeftOut:
            left_out.add_metric([*labels, str(reason)], reader.blocks.left_out[reason])
        yield left_out
