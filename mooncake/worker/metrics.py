"""What a relay tells of its engine: the counters of the shared pulse, and the engine's own prefix cache."""

import time
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mooncake.worker.gpu_blocks import LeftOut
from mooncake.worker.gpu_events import GpuEvents
from mooncake.worker.pulse import Pulse

TRANSFERS = {  # (bytes, seconds) of each direction; same-host copies through shared memory
    "get": ("load_bytes", "load_seconds"),
    "put": ("save_bytes", "save_seconds"),
}
METRICS = {
    "load_blocks": ("mooncake_kv_load_blocks", "Blocks loaded from the pool"),
    "save_blocks": ("mooncake_kv_save_blocks", "Blocks committed to the pool"),
    "late_saves": (
        "mooncake_kv_late_saves",
        "Blocks that were lost because a step outlasted its reservation",
    ),
    "bad_blocks": ("mooncake_kv_checksum_failures", "Blocks whose bytes differed from their checksum"),
    "failed_loads": ("mooncake_kv_failed_loads", "Requests that recomputed because a load failed"),
    "lookup_timeouts": ("mooncake_kv_lookup_timeouts", "Pool look-ups given up"),
    "pool_errors": ("mooncake_kv_pool_errors", "Pool calls that failed"),
    "hit_tokens": ("mooncake_kv_hit_tokens", "Prompt tokens taken from the pool"),
    "lookup_tokens": ("mooncake_kv_lookup_tokens", "Prompt tokens looked up in the pool"),
    "fetch_bytes": ("mooncake_kv_fetched_bytes", "Bytes the store fetched from others for look-ups here"),
    "fetch_seconds": ("mooncake_kv_fetch_seconds", "Seconds those look-ups waited for them"),
    "resumed_requests": ("mooncake_resumed_requests", "Requests continued from another engine"),
}


class PulseCollector(Collector):
    """Turns the engine's shared counters into Prometheus metrics at scrape time."""

    def __init__(self, pulse: Pulse, instance_id: str, role: str) -> None:
        """Labels are fixed: one engine per relay."""
        self._pulse, self._labels = pulse, [instance_id, role]

    def collect(self) -> Any:
        """Yield one family per counter."""
        names = ["instance", "role"]
        for field, (name, text) in METRICS.items():
            family = CounterMetricFamily(name, text, labels=names)
            family.add_metric(self._labels, self._pulse.read(field))
            yield family
        moved = [*names, "transport", "direction"]
        size = CounterMetricFamily("mooncake_transfer_bytes", "Bytes between engine and pool", labels=moved)
        took = CounterMetricFamily("mooncake_transfer_seconds", "Seconds spent moving them", labels=moved)
        for direction, (size_field, seconds_field) in TRANSFERS.items():
            size.add_metric([*self._labels, "shm", direction], self._pulse.read(size_field))
            took.add_metric([*self._labels, "shm", direction], self._pulse.read(seconds_field))
        yield size
        yield took
        age = GaugeMetricFamily(
            "mooncake_engine_pulse_age_seconds", "Age of the engine's pulse", labels=names
        )
        age.add_metric(self._labels, self._pulse.age_s(time.monotonic()))
        yield age


class GpuCollector(Collector):
    """What is known of the engine's own prefix cache, once it tells."""

    def __init__(self, instance_id: str, role: str) -> None:
        """Labels as of PulseCollector."""
        self._labels = [instance_id, role]
        self.events: GpuEvents | None = None

    def collect(self) -> Any:
        """Yield nothing of an engine that does not tell."""
        if self.events is None:
            return
        names, reader = ["instance", "role"], self.events.reader
        blocks = GaugeMetricFamily(
            "mooncake_gpu_blocks", "Blocks in the engine's own prefix cache that have a name", labels=names
        )
        blocks.add_metric(self._labels, len(reader.blocks))
        yield blocks
        for name, text, count in (
            ("undecodable", "Messages of vLLM's about its cache that could not be read", reader.undecodable),
            ("gaps", "Gaps in vLLM's messages about its cache", reader.gaps),
            ("lost", "Of these, those that nothing could fill: what was known was forgotten", reader.lost),
        ):
            family = CounterMetricFamily(f"mooncake_gpu_events_{name}", text, labels=names)
            family.add_metric(self._labels, count)
            yield family
        left_out = CounterMetricFamily(
            "mooncake_gpu_blocks_left_out", "Blocks that have no name of ours", labels=[*names, "reason"]
        )
        for reason in LeftOut:
            left_out.add_metric([*self._labels, str(reason)], reader.blocks.left_out[reason])
        yield left_out
