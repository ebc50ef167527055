"""The numbers of `mooncake top`. Pure: pages of text in, rows out.

Rates, latencies and shares are those of the time between two looks; where nothing happened meanwhile,
latencies and shares are those since the start.
"""

from collections.abc import Callable, Iterable, Mapping

import msgspec

from mooncake.top_pages import Look, Page, quantile

CORE_AWAY = "core_away"
"""The kind of mooncake_fallback_active that says so: conductor.modes.Fallback."""
NOT_LOOKED = Page()


class InstanceRow(msgspec.Struct, frozen=True):
    """One engine; None = not known."""

    name: str
    role: str
    state: str
    running: float | None
    waiting: float | None
    kv_use: float | None  # 0..1
    engine_hits: float | None  # 0..1 of the prompt tokens that its own cache was asked for
    pool_hits: float | None  # 0..1 of those that the pool was asked for
    loaded_per_s: float | None  # bytes, from the pool
    saved_per_s: float | None
    bad_blocks: float | None


class FrontRow(msgspec.Struct, frozen=True):
    """One gateway or core in a process of its own; None = not known."""

    name: str
    pid: int
    does: str  # serves | decides | stands by
    in_flight: float | None
    requests_per_s: float | None
    alone: float | None  # 1: decides for itself, as no core answers it


class StoreRow(msgspec.Struct, frozen=True):
    """One node of the pool; None = not known."""

    node: str
    capacity_bytes: int
    used_bytes: float | None
    blocks: float | None
    hits: float | None  # 0..1 of the blocks asked for
    ssd_capacity_bytes: float | None  # None: it has none
    ssd_used_bytes: float | None
    ssd_hits: float | None  # 0..1 of what memory had not
    evicted_per_s: float | None
    evictions: float | None
    bad_blocks: float | None


class Totals(msgspec.Struct, frozen=True):
    """The cluster; None = not known. Mappings have only what is not 0, the largest first."""

    in_flight: int
    waiting: float | None
    waiting_by_class: Mapping[str, float]
    requests_per_s: float | None
    tokens_per_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tbt_p50_s: float | None
    tbt_p95_s: float | None
    prefix_hits: float | None  # 0..1 of the blocks of prompts
    rejected_per_s: Mapping[str, float]  # by reason
    moved_per_s: Mapping[str, float]  # bytes, by path between hosts
    loaded_per_s: float | None  # bytes, pool -> engines
    saved_per_s: float | None  # bytes, engines -> pool


class Mark(msgspec.Struct, frozen=True):
    """What an operator should know of; `grave`: requests suffer now."""

    text: str
    grave: bool = False


class _Change:
    """Two looks at the pages of some processes."""

    def __init__(self, before: Look, now: Look, pages: Callable[[Look], Mapping[str, Page]]) -> None:
        self.pages = pages(now)
        self._before = pages(before)
        self._seconds = now.at_s - before.at_s

    def rate(self, name: str, *processes: str, **labels: str) -> float | None:
        """Return the growth per second, of all or of some; None = unknown to all."""
        return _sum(self._rate(process, name, labels) for process in processes or self.pages)

    def _rate(self, process: str, name: str, labels: Mapping[str, str]) -> float | None:
        old = self._before.get(process)
        new = self.pages.get(process, NOT_LOOKED).total(name, **labels)
        if new is None or old is None or self._seconds <= 0:
            return None
        return max(0.0, new - (old.total(name, **labels) or 0.0)) / self._seconds  # a new one counts from 0

    def rates(self, name: str, label: str) -> dict[str, float]:
        """Return the growth per second by the values of a label."""
        values = {value: None for page in self.pages.values() for value in page.by(name, label)}
        return _largest({value: self.rate(name, **{label: value}) or 0.0 for value in values})

    def share(self, part: str, whole: str, *processes: str) -> float | None:
        """Return part / whole between the looks, or else since the start."""
        recent = self.rate(whole, *processes)
        if recent:
            return min(1.0, (self.rate(part, *processes) or 0.0) / recent)
        chosen = processes or tuple(self.pages)
        found = [self.pages.get(process, NOT_LOOKED) for process in chosen]
        of = _sum(page.total(whole) for page in found)
        return (_sum(page.total(part) for page in found) or 0.0) / of if of else None

    def latency(self, share: float, name: str) -> float | None:
        """Return a quantile of a histogram of all these processes."""
        new: dict[float, float] = {}
        recent: dict[float, float] = {}
        for process, page in self.pages.items():
            old = self._before.get(process, NOT_LOOKED).buckets(name)
            for limit, count in page.buckets(name).items():
                new[limit] = new.get(limit, 0.0) + count
                recent[limit] = recent.get(limit, 0.0) + count - old.get(limit, 0.0)
        return quantile(share, recent if max(recent.values(), default=0.0) > 0 else new)


def _fronts(look: Look) -> Mapping[str, Page]:
    return look.fronts


def _instances(look: Look) -> Mapping[str, Page]:
    return look.instances


def _stores(look: Look) -> Mapping[str, Page]:
    return look.stores


def totals(before: Look, now: Look) -> Totals:
    """Return the cluster's numbers between two looks."""
    fronts = _Change(before, now, _fronts)
    instances = _Change(before, now, _instances)
    of_all = now.total("mooncake_requests_in_flight") if now.members.gateways else None
    queued: dict[str, float] = {}
    for page in now.fronts.values():
        for slo_class, count in page.by("mooncake_requests_waiting", "slo_class").items():
            queued[slo_class] = queued.get(slo_class, 0.0) + count
    moved = [_Change(before, now, pages).rates("mooncake_transfer_bytes_total", "transport")
             for pages in (_stores, _instances)]  # fmt: skip
    return Totals(
        in_flight=now.members.in_flight if of_all is None else int(of_all),
        waiting=now.total("mooncake_requests_waiting"),
        waiting_by_class=_largest(queued),
        requests_per_s=fronts.rate("mooncake_requests_total"),
        tokens_per_s=fronts.rate("mooncake_tokens_total"),
        ttft_p50_s=fronts.latency(0.5, "mooncake_ttft_seconds"),
        ttft_p95_s=fronts.latency(0.95, "mooncake_ttft_seconds"),
        tbt_p50_s=fronts.latency(0.5, "mooncake_tbt_seconds"),
        tbt_p95_s=fronts.latency(0.95, "mooncake_tbt_seconds"),
        prefix_hits=fronts.share("mooncake_prefix_hit_blocks_total", "mooncake_prefix_lookup_blocks_total"),
        rejected_per_s=fronts.rates("mooncake_rejections_total", "reason"),
        moved_per_s=_largest(
            {path: sum(one.get(path, 0.0) for one in moved) for one in moved for path in one}
        ),
        loaded_per_s=instances.rate("mooncake_kv_copy_bytes_total", direction="load"),
        saved_per_s=instances.rate("mooncake_kv_copy_bytes_total", direction="save"),
    )


def front_rows(before: Look, now: Look) -> list[FrontRow]:
    """Return a row for each core and gateway with a process of its own."""
    change = _Change(before, now, _fronts)
    rows = []
    leader = now.members.core.leader
    for core in now.members.cores:
        leads = leader.rpartition("-")[0] == core.name  # each start of a core is a candidate of its own
        rows.append(FrontRow(core.name, core.pid, "decides" if leads else "stands by", None, None, None))
    for gateway in now.members.gateways:
        page = now.fronts.get(gateway.name, NOT_LOOKED)
        rows.append(
            FrontRow(
                gateway.name,
                gateway.pid,
                "serves",
                page.total("mooncake_requests_in_flight"),
                change.rate("mooncake_requests_total", gateway.name),
                page.total("mooncake_fallback_active", kind=CORE_AWAY),
            )
        )
    return rows


def instance_rows(before: Look, now: Look) -> list[InstanceRow]:
    """Return a row for each engine, in the gateway's order."""
    change = _Change(before, now, _instances)
    rows = []
    for instance in now.members.instances:
        name = instance.instance_id
        page = now.instances.get(name, NOT_LOOKED)
        running = page.total("mooncake_engine_requests_running")
        given = float(instance.load.prefill_requests + instance.load.decode_requests)
        rows.append(
            InstanceRow(
                name=name,
                role=instance.role,
                state=instance.state,
                running=given if running is None else running,
                waiting=page.total("mooncake_engine_requests_waiting"),
                kv_use=page.total("mooncake_engine_kv_use_ratio"),
                engine_hits=change.share(
                    "mooncake_engine_prefix_hit_tokens_total",
                    "mooncake_engine_prefix_lookup_tokens_total",
                    name,
                ),
                pool_hits=change.share(
                    "mooncake_kv_hit_tokens_total", "mooncake_kv_lookup_tokens_total", name
                ),
                loaded_per_s=change.rate("mooncake_kv_copy_bytes_total", name, direction="load"),
                saved_per_s=change.rate("mooncake_kv_copy_bytes_total", name, direction="save"),
                bad_blocks=page.total("mooncake_kv_checksum_failures_total"),
            )
        )
    return rows


def store_rows(before: Look, now: Look) -> list[StoreRow]:
    """Return a row for each node of the pool."""
    change = _Change(before, now, _stores)
    rows = []
    for store in now.members.stores:
        page = now.stores.get(store.node, NOT_LOOKED)
        rows.append(
            StoreRow(
                node=store.node,
                capacity_bytes=store.capacity_bytes,
                used_bytes=page.total("mooncake_store_used_bytes"),
                blocks=page.total("mooncake_store_blocks"),
                hits=_hits(page, "mooncake_store_hits_total", "mooncake_store_misses_total"),
                ssd_capacity_bytes=page.total("mooncake_store_ssd_capacity_bytes"),
                ssd_used_bytes=page.total("mooncake_store_ssd_live_bytes"),
                ssd_hits=_hits(page, "mooncake_store_ssd_hits_total", "mooncake_store_ssd_misses_total"),
                evicted_per_s=change.rate("mooncake_store_evictions_total", store.node),
                evictions=page.total("mooncake_store_evictions_total"),
                bad_blocks=page.total("mooncake_store_checksum_failures_total"),
            )
        )
    return rows


def marks(now: Look) -> list[Mark]:
    """Return what is not as it should be, the grave first."""
    found = []
    core = now.members.core
    if core.mode == "fallback":
        found.append(Mark(f"no core decides: {core.reason}", grave=True))
    for instance in now.members.instances:
        if instance.state != "alive":
            found.append(Mark(f"{instance.instance_id} is {instance.state}", grave=instance.state == "dead"))
        if instance.role == "draining":
            found.append(Mark(f"{instance.instance_id} drains"))
    found += [
        Mark(f"fallback: {kind.replace('_', ' ')}")
        for kind in _active(now, "mooncake_fallback_active", "kind")
    ]
    found += [
        Mark(f"prefix index {mode}")
        for mode in _active(now, "mooncake_index_mode", "mode")
        if mode != "exact"
    ]
    for node, page in now.stores.items():
        tried = page.by("mooncake_transfer_path_state", "link")
        found += [Mark(f"{node}: path to {link} failed, is tried again") for link, n in tried.items() if n]
    return sorted(found, key=lambda mark: not mark.grave)


def _active(now: Look, name: str, label: str) -> list[str]:
    values = {v: None for page in now.fronts.values() for v, n in page.by(name, label).items() if n}
    return list(values)


def _hits(page: Page, hits: str, misses: str) -> float | None:
    found, missed = page.total(hits), page.total(misses)
    asked = (found or 0.0) + (missed or 0.0)
    return (found or 0.0) / asked if missed is not None and asked else None


def _largest(values: Mapping[str, float]) -> dict[str, float]:
    known = [(name, value) for name, value in values.items() if value]
    return dict(sorted(known, key=lambda pair: (-pair[1], pair[0])))


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
