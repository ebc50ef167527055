"""What vLLM's gauges of engines show in a gateway: `vllm:num_requests_running` and its like.

vLLM sets them from the statistics of a step, which an engine sends to one gateway, and labels them by the
number of an engine in a group whose size is fixed at the start. Here engines come and go, several gateways
have the same ones, and more engines than numbers share the last. So what each engine has is kept, from its
steps and its pulses, and a number shows the sum over those who have it: of requests; of KV use, the mean.
"""

from collections.abc import Container, Mapping

from conductor.vllm_seam import SchedulerStats
from mooncake.core.messages import EngineQueues

NOTHING = EngineQueues()


class EngineGauges:
    """Pure: engines by number, and what was last shown of each number."""

    def __init__(self) -> None:
        """No engine is known."""
        self._slots: dict[str, int] = {}
        self._engines: dict[int, dict[str, EngineQueues]] = {}
        self._shown: dict[int, EngineQueues] = {}

    def stepped(self, slot: int, instance_id: str, queues: EngineQueues) -> EngineQueues:
        """An engine tells of a step, which vLLM is to see at once; return what it is to see."""
        self.heard(slot, instance_id, queues)
        shown = self._shown[slot] = _sum(self._engines[slot])
        return shown

    def heard(self, slot: int, instance_id: str, queues: EngineQueues) -> None:
        """An engine says how it is."""
        if self._slots.get(instance_id, slot) != slot:
            self._forget(instance_id)
        self._slots[instance_id] = slot
        self._engines.setdefault(slot, {})[instance_id] = queues

    def changed(self, there: Container[str]) -> list[tuple[int, EngineQueues]]:
        """Forget engines that are not `there`; return the numbers that show something else now."""
        for instance_id in [one for one in self._slots if one not in there]:
            self._forget(instance_id)
        sums = [(slot, _sum(engines)) for slot, engines in sorted(self._engines.items())]
        changed = [(slot, now) for slot, now in sums if now != self._shown.get(slot, NOTHING)]
        self._shown.update(changed)
        return changed

    def _forget(self, instance_id: str) -> None:
        del self._engines[self._slots.pop(instance_id)][instance_id]


def _sum(engines: Mapping[str, EngineQueues]) -> EngineQueues:
    found = list(engines.values())
    if len(found) == 1:
        return found[0]
    return EngineQueues(
        sum(one.running for one in found),
        sum(one.waiting for one in found),
        sum(one.deferred for one in found),
        sum(one.kv_use_ratio for one in found) / max(1, len(found)),
    )


def queues_of(stats: SchedulerStats) -> EngineQueues:
    """Return the gauges among a step's statistics."""
    deferred = stats.num_skipped_waiting_reqs
    return EngineQueues(
        stats.num_running_reqs, stats.num_waiting_reqs + deferred, deferred, stats.kv_cache_usage
    )


def fill(stats: SchedulerStats, queues: EngineQueues) -> None:
    """Write the gauges; the rest are counts since the last step, which are right whoever shares a number."""
    stats.num_running_reqs = queues.running
    stats.num_waiting_reqs = queues.waiting - queues.deferred
    stats.num_skipped_waiting_reqs = queues.deferred
    stats.kv_cache_usage = queues.kv_use_ratio


def as_stats(queues: EngineQueues) -> SchedulerStats:
    """Return statistics that set the gauges and count nothing."""
    stats = SchedulerStats()
    fill(stats, queues)
    return stats
