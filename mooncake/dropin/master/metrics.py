"""`/metrics` and `/metrics/summary` of `mooncake_master`: upstream's names, as far as there is such a number.

Upstream's master is asked for every read and write, so it counts requests. Ours is not: stores count what is
done to them, and the master adds that up. ABSENT says why the other names are not there; docs/master.md shows
both, and a test holds them against the list of upstream's.
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from mooncake.core.config import format_size
from mooncake.core.messages import StoreStats
from mooncake.dropin.master.quotas import Usage


def held_bytes(stats: StoreStats) -> int:
    """Return the bytes of memory in use of a segment, without room that writers were given ahead."""
    return stats.used_bytes - stats.granted_bytes


class PoolNumbers(msgspec.Struct, frozen=True):
    """What there is at one moment: `stats` by segment name, of those that answer."""

    stats: Mapping[str, StoreStats]
    keys: int
    tenants: Sequence[Usage] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of memory in use, without room that writers were given ahead."""
        return sum(held_bytes(one) for one in self.stats.values())

    def sum(self, name: str) -> int:
        """Return the sum of a field of StoreStats."""
        return sum(getattr(one, name) for one in self.stats.values())


class Metric(msgspec.Struct, frozen=True):
    """One name without labels."""

    kind: str
    text: str
    value: Callable[[PoolNumbers], int]


def _sum(kind: str, name: str, text: str) -> Metric:
    return Metric(kind, text, lambda pool: pool.sum(name))


METRICS: Mapping[str, Metric] = {
    "file_cache_hit_bytes_total": _sum("counter", "ssd_read_bytes", "Bytes read from SSDs."),
    "file_cache_hit_nums_": _sum("counter", "ssd_hits", "Objects read from SSDs."),
    "file_cache_nums_": _sum("gauge", "ssd_blocks", "Objects on SSDs."),
    "master_active_clients": Metric("gauge", "Segments that answer.", lambda pool: len(pool.stats)),
    "master_allocated_bytes": Metric("gauge", "Bytes of memory in use.", lambda pool: pool.held_bytes),
    "master_allocated_file_size_bytes": _sum("gauge", "ssd_used_bytes", "Bytes of SSDs in use."),
    "master_attempted_evictions_total": _sum("counter", "eviction_attempts", "Rounds of eviction."),
    "master_evicted_key_count": _sum("counter", "evictions", "Objects evicted from memory."),
    "master_evicted_size_bytes": _sum("counter", "evicted_bytes", "Bytes evicted from memory."),
    "master_key_count": Metric("gauge", "Objects in the pool.", lambda pool: pool.keys),
    "master_promotion_completed_bytes_total": _sum("counter", "ssd_read_bytes", "Bytes SSDs gave to memory."),
    "master_promotion_completed_total": _sum("counter", "ssd_hits", "Objects SSDs gave to memory."),
    "master_put_end_requests_total": _sum("counter", "commits", "Copies written to the end."),
    "master_put_start_discard_cnt": _sum("counter", "puts_discarded", "Writes given up, or never finished."),
    "master_put_start_failures_total": _sum(
        "counter", "puts_refused", "Copies not begun: no room, no quota, or there already."
    ),
    "master_put_start_requests_total": _sum(
        "counter", "puts_begun", "Copies that stores were asked to take."
    ),
    "master_remove_requests_total": _sum("counter", "drops", "Copies removed on request."),
    "master_soft_pin_key_count": _sum("gauge", "soft_pins", "Objects with a soft pin."),
    "master_successful_evictions_total": _sum(
        "counter", "eviction_successes", "Rounds of eviction that gave as much as was needed."
    ),
    "master_total_capacity_bytes": _sum("gauge", "capacity_bytes", "Bytes of memory."),
    "master_total_file_capacity_bytes": _sum("gauge", "ssd_capacity_bytes", "Bytes of SSD tiers."),
    "mem_cache_hit_nums_": Metric(
        "counter", "Objects read from memory.", lambda pool: max(0, pool.sum("hits") - pool.sum("ssd_hits"))
    ),
    "mem_cache_nums_": _sum("gauge", "blocks", "Copies in memory."),
    "total_get_nums_": Metric(
        "counter", "Objects asked for.", lambda pool: pool.sum("hits") + pool.sum("misses")
    ),
    "valid_get_nums_": _sum("counter", "hits", "Objects asked for and found."),
}
SEGMENT_METRICS: Mapping[str, tuple[str, Callable[[StoreStats], int]]] = {
    "segment_allocated_bytes": ("Bytes of memory in use of the segment.", held_bytes),
    "segment_total_capacity_bytes": ("Bytes of memory of the segment.", lambda one: one.capacity_bytes),
}
TENANT_METRICS: Mapping[str, tuple[str, Callable[[Usage], int]]] = {
    "mooncake_tenant_quota_requested_bytes": ("Quota.", lambda one: one.quota_bytes),
    "mooncake_tenant_quota_effective_bytes": ("Quota that the pool has.", lambda one: one.effective_bytes),
    "mooncake_tenant_quota_charged_bytes": ("Bytes in memory.", lambda one: one.used_bytes),
    "mooncake_tenant_quota_over_quota": (
        "1: more than the quota.",
        lambda one: int(one.used_bytes > one.effective_bytes),
    ),
    "mooncake_tenant_quota_admission_closed": ("Always 0.", lambda _: 0),
    "mooncake_tenant_quota_explicit_policy": ("Always 1.", lambda _: 1),
}
"""With --enable_multi_tenants, by tenant."""

_READS = "reads and look-ups ask no master: total_get_nums_ and valid_get_nums_ count them"
_BATCH = "a batch counts as so many single operations"
_LEASES = "a segment is there as long as its lease: master_active_clients"
_TASKS = "mooncake_directory_commands_total, in the same answer"
_PROMOTION = "everything that is read is promoted: nothing is queued, refused or expires"
_HA = "there is no log to replicate"
_UNCOUNTED = "removals are counted one by one"
_REVOKE = "as master_put_start_discard_cnt"
ABSENT_PREFIXES: Mapping[str, str] = {
    "ha_": _HA,
    "master_batch_": _BATCH,
    "master_copy_": _TASKS,
    "master_create_": _TASKS,
    "master_evict_disk_replica_": "a full tier gives up its oldest objects by itself",
    "master_exist_key_": _READS,
    "master_fetch_tasks_": _TASKS,
    "master_get_replica_list_": _READS,
    "master_mount_segment_": _LEASES,
    "master_move_": _TASKS,
    "master_nof_": "there is no NVMe-oF pool",
    "master_ping_": _LEASES,
    "master_promotion_": _PROMOTION,
    "master_put_end_": "a copy that was not finished is in master_put_start_discard_cnt",
    "master_put_revoke_": _REVOKE,
    "master_put_start_": "master_put_start_failures_total has them all",
    "master_query_task_": _TASKS,
    "master_remount_segment_": _LEASES,
    "master_remove_": _UNCOUNTED,
    "master_total_nof_": "there is no NVMe-oF pool",
    "master_unmount_segment_": _LEASES,
    "master_update_task_": _TASKS,
    "mem_cache_hit_bytes_": "readers of a host read by themselves: mooncake_transfer_bytes_total",
}
"""Upstream's names that begin so and are not in METRICS are not there, and why."""


def why_absent(name: str) -> str:
    """Return why a name of upstream's is not there, "" if it is."""
    if name in METRICS or name in SEGMENT_METRICS:
        return ""
    return next(reason for prefix, reason in ABSENT_PREFIXES.items() if name.startswith(prefix))


def render(pool: PoolNumbers) -> str:
    """Return the numbers as Prometheus reads them."""
    lines = []
    for name, metric in METRICS.items():
        lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {metric.kind}"]
        lines.append(f"{name} {metric.value(pool)}")
    for name, (text, number) in SEGMENT_METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        lines += [f'{name}{{segment="{segment}"}} {number(one)}' for segment, one in pool.stats.items()]
    for name, (text, value) in TENANT_METRICS.items() if pool.tenants else ():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        lines += [f'{name}{{tenant_id="{_escaped(one.tenant)}"}} {value(one)}' for one in pool.tenants]
    return "\n".join(lines) + "\n"


def summary(pool: PoolNumbers) -> str:
    """Return one line for people."""
    used, room = pool.held_bytes, pool.sum("capacity_bytes")
    size = format_size
    return (
        "role=leader, state=serving, service_ready=true, master={Mem Storage: "
        f"{size(used)} / {size(room)} ({100 * used / max(1, room):.1f}%) | "
        f"SSD Storage: {size(pool.sum('ssd_used_bytes'))} / {size(pool.sum('ssd_capacity_bytes'))} | "
        f"Keys: {pool.keys} (soft-pinned: {pool.sum('soft_pins')}) | Clients: {len(pool.stats)} | "
        f"Get: Success/Total={pool.sum('hits')}/{pool.sum('hits') + pool.sum('misses')} | "
        f"Eviction: Success/Attempts={pool.sum('eviction_successes')}/{pool.sum('eviction_attempts')}, "
        f"keys={pool.sum('evictions')}, size={size(pool.sum('evicted_bytes'))} | "
        f"Promotion: completed={pool.sum('ssd_hits')}, bytes={size(pool.sum('ssd_read_bytes'))}}}"
    )


def table(names: Sequence[str]) -> str:
    """Return the table of docs/master.md: of upstream's `names`, which are there and why others are not."""
    there = [f"`{name}`" for name in names if not why_absent(name)]
    rows = []
    for prefix, reason in ABSENT_PREFIXES.items():
        some = [name for name in names if name.startswith(prefix) and why_absent(name)]
        others = any(name.startswith(prefix) and not why_absent(name) for name in names)
        rows.append(f"| {'other ' if others else ''}`{prefix}*` ({len(some)}) | {reason} |")
    return "\n".join([f"There: {', '.join(there)}.", "", "| not there | why |", "|---|---|", *rows]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
