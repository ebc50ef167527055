"""The numbers of `mooncake top`. Pure: pages of text in, rows out.

Rates and latencies are those of the time between two looks; where nothing happened meanwhile,
latencies are those since the start.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import msgspec
from prometheus_client.parser import text_string_to_metric_families

KEPT = (
    "mooncake_",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
"""A gateway's page has 300 kB, most of it vLLM's per-engine histograms: the rest is not parsed."""

Labels = tuple[tuple[str, str], ...]


class Instance(msgspec.Struct, frozen=True):
    """What GET /mooncake/instances says of an engine."""

    instance_id: str
    role: str
    state: str
    engine: int = -1
    metrics_url: str = ""


class Store(msgspec.Struct, frozen=True):
    """What it says of a store node."""

    node: str
    capacity_bytes: int
    metrics_url: str = ""


class Members(msgspec.Struct, frozen=True):
    """The answer of GET /mooncake/instances."""

    instances: list[Instance]
    stores: list[Store] = []
    in_flight: int = 0


class Page:
    """One /metrics page; an empty one stands for a process that did not answer."""

    def __init__(self, text: str = "") -> None:
        """Parse what is KEPT.

        Raises:
            ValueError: not a metrics page.
        """
        wanted = "\n".join(
            line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(KEPT)
        )
        self._samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(wanted + "\n"):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                self._samples.setdefault(sample.name, {})[labels] = sample.value

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum over all samples of `name` with these labels; None = there is none."""
        wanted = set(labels.items())
        values = [v for key, v in self._samples.get(name, {}).items() if wanted <= set(key)]
        return sum(values) if values else None

    def buckets(self, name: str) -> dict[float, float]:
        """Return a histogram as upper limit -> observations up to it."""
        found: dict[float, float] = {}
        for labels, value in self._samples.get(f"{name}_bucket", {}).items():
            limit = float(dict(labels)["le"])
            found[limit] = found.get(limit, 0.0) + value
        return found


class Look(msgspec.Struct, frozen=True):
    """Everything seen at one moment; pages by instance id and by node."""

    at_s: float
    members: Members
    gateway: Page
    instances: Mapping[str, Page]
    stores: Mapping[str, Page]


class InstanceRow(msgspec.Struct, frozen=True):
    """One engine; None = not known."""

    name: str
    role: str
    state: str
    running: float | None
    waiting: float | None
    kv_use: float | None  # 0..1
    pool_hits: float | None  # 0..1 of the prompt tokens that were looked up
    bad_blocks: float | None


class StoreRow(msgspec.Struct, frozen=True):
    """One node of the pool; None = not known."""

    node: str
    capacity_bytes: int
    used_bytes: float | None
    blocks: float | None
    hits: float | None  # 0..1 of the blocks asked for
    evictions: float | None
    bad_blocks: float | None


class Totals(msgspec.Struct, frozen=True):
    """The cluster; None = not known."""

    in_flight: int
    requests_per_s: float | None
    tokens_per_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tbt_p50_s: float | None
    prefix_hits: float | None  # 0..1 of the blocks of prompts


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """Return a quantile as Prometheus' histogram_quantile estimates it; None = no observation."""
    limits = sorted(buckets)
    if not limits or buckets[limits[-1]] <= 0:
        return None
    rank = share * buckets[limits[-1]]
    for low, high in pairwise([0.0, *limits]):
        below, upto = buckets.get(low, 0.0), buckets[high]
        if upto >= rank and upto > below:
            return low if math.isinf(high) else low + (high - low) * (rank - below) / (upto - below)
    return None


def totals(before: Look, now: Look) -> Totals:
    """Return the cluster's numbers between two looks."""
    seconds = now.at_s - before.at_s

    def rate(name: str) -> float | None:
        new, old = now.gateway.total(name), before.gateway.total(name)
        if new is None or seconds <= 0:
            return None
        return max(0.0, new - (old or 0.0)) / seconds  # a restarted gateway counts from 0

    def latency(share: float, name: str) -> float | None:
        new, old = now.gateway.buckets(name), before.gateway.buckets(name)
        recent = {limit: count - old.get(limit, 0.0) for limit, count in new.items()}
        return quantile(share, recent if max(recent.values(), default=0.0) > 0 else new)

    return Totals(
        in_flight=now.members.in_flight,
        requests_per_s=rate("mooncake_requests_total"),
        tokens_per_s=rate("mooncake_tokens_total"),
        ttft_p50_s=latency(0.5, "mooncake_ttft_seconds"),
        ttft_p95_s=latency(0.95, "mooncake_ttft_seconds"),
        tbt_p50_s=latency(0.5, "mooncake_tbt_seconds"),
        prefix_hits=_share(
            now.gateway.total("mooncake_prefix_hit_blocks_total"),
            now.gateway.total("mooncake_prefix_lookup_blocks_total"),
        ),
    )


def instance_rows(now: Look) -> list[InstanceRow]:
    """Return a row for each engine, in the gateway's order."""
    rows = []
    for instance in now.members.instances:
        page = now.instances.get(instance.instance_id, Page())
        engine = str(instance.engine)
        rows.append(
            InstanceRow(
                name=instance.instance_id,
                role=instance.role,
                state=instance.state,
                running=now.gateway.total("vllm:num_requests_running", engine=engine),
                waiting=now.gateway.total("vllm:num_requests_waiting", engine=engine),
                kv_use=now.gateway.total("vllm:kv_cache_usage_perc", engine=engine),
                pool_hits=_share(
                    page.total("mooncake_kv_hit_tokens_total"), page.total("mooncake_kv_lookup_tokens_total")
                ),
                bad_blocks=page.total("mooncake_kv_checksum_failures_total"),
            )
        )
    return rows


def store_rows(now: Look) -> list[StoreRow]:
    """Return a row for each node of the pool."""
    rows = []
    for store in now.members.stores:
        page = now.stores.get(store.node, Page())
        hits, misses = page.total("mooncake_store_hits_total"), page.total("mooncake_store_misses_total")
        rows.append(
            StoreRow(
                node=store.node,
                capacity_bytes=store.capacity_bytes,
                used_bytes=page.total("mooncake_store_used_bytes"),
                blocks=page.total("mooncake_store_blocks"),
                hits=None if misses is None else _share(hits, (hits or 0.0) + misses),
                evictions=page.total("mooncake_store_evictions_total"),
                bad_blocks=page.total("mooncake_store_checksum_failures_total"),
            )
        )
    return rows


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
