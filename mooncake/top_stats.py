"""The numbers of `mooncake top`. Pure: pages of text in, rows out.

Rates and latencies are those of the time between two looks; where nothing happened meanwhile,
latencies are those since the start.
"""

import math
from collections.abc import Iterable, Mapping
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

CORE_AWAY = "core_away"
"""The kind of mooncake_fallback_active that says so: conductor.modes.Fallback."""

Labels = tuple[tuple[str, str], ...]


class Load(msgspec.Struct, frozen=True):
    """What was given to an engine and is not finished."""

    prefill_requests: int = 0
    decode_requests: int = 0


class Instance(msgspec.Struct, frozen=True):
    """What GET /mooncake/instances says of an engine."""

    instance_id: str
    role: str
    state: str
    engine: int = -1
    metrics_url: str = ""
    load: Load = Load()


class Store(msgspec.Struct, frozen=True):
    """What it says of a store node."""

    node: str
    capacity_bytes: int
    metrics_url: str = ""


class Front(msgspec.Struct, frozen=True):
    """What it says of a gateway or a core in a process of its own."""

    name: str
    pid: int = 0
    metrics_url: str = ""


class Deciding(msgspec.Struct, frozen=True):
    """Who decides, as the gateway that was asked knows. mode: local, core, or fallback for a reason."""

    mode: str = "local"
    leader: str = ""
    term: int = 0
    reason: str = ""


class Members(msgspec.Struct, frozen=True):
    """The answer of GET /mooncake/instances."""

    instances: list[Instance]
    stores: list[Store] = []
    in_flight: int = 0
    gateways: list[Front] = []
    cores: list[Front] = []
    core: Deciding = Deciding()


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
    """Everything seen at one moment; pages by instance id, by node, and of gateways and cores by name.

    One process that is both gateway and core is named "".
    """

    at_s: float
    members: Members
    fronts: Mapping[str, Page]
    instances: Mapping[str, Page]
    stores: Mapping[str, Page]

    def total(self, name: str) -> float | None:
        """Return the sum over all gateways and cores; None = none of them tells."""
        return _sum(page.total(name) for page in self.fronts.values())


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

    def latency(share: float, name: str) -> float | None:
        new: dict[float, float] = {}
        recent: dict[float, float] = {}
        for front, page in now.fronts.items():
            old = before.fronts.get(front, Page()).buckets(name)
            for limit, count in page.buckets(name).items():
                new[limit] = new.get(limit, 0.0) + count
                recent[limit] = recent.get(limit, 0.0) + count - old.get(limit, 0.0)
        return quantile(share, recent if max(recent.values(), default=0.0) > 0 else new)

    of_all = now.total("mooncake_requests_in_flight") if now.members.gateways else None
    return Totals(
        in_flight=now.members.in_flight if of_all is None else int(of_all),
        requests_per_s=_sum(_rate(before, now, front, "mooncake_requests_total") for front in now.fronts),
        tokens_per_s=_sum(_rate(before, now, front, "mooncake_tokens_total") for front in now.fronts),
        ttft_p50_s=latency(0.5, "mooncake_ttft_seconds"),
        ttft_p95_s=latency(0.95, "mooncake_ttft_seconds"),
        tbt_p50_s=latency(0.5, "mooncake_tbt_seconds"),
        prefix_hits=_share(
            now.total("mooncake_prefix_hit_blocks_total"),
            now.total("mooncake_prefix_lookup_blocks_total"),
        ),
    )


def front_rows(before: Look, now: Look) -> list[FrontRow]:
    """Return a row for each core and gateway with a process of its own."""
    rows = []
    leader = now.members.core.leader
    for core in now.members.cores:
        leads = leader.rpartition("-")[0] == core.name  # each start of a core is a candidate of its own
        rows.append(FrontRow(core.name, core.pid, "decides" if leads else "stands by", None, None, None))
    for gateway in now.members.gateways:
        page = now.fronts.get(gateway.name, Page())
        rows.append(
            FrontRow(
                gateway.name,
                gateway.pid,
                "serves",
                page.total("mooncake_requests_in_flight"),
                _rate(before, now, gateway.name, "mooncake_requests_total"),
                page.total("mooncake_fallback_active", kind=CORE_AWAY),
            )
        )
    return rows


def _rate(before: Look, now: Look, front: str, name: str) -> float | None:
    new = now.fronts[front].total(name) if front in now.fronts else None
    old = before.fronts.get(front)
    seconds = now.at_s - before.at_s
    if new is None or old is None or seconds <= 0:
        return None
    return max(0.0, new - (old.total(name) or 0.0)) / seconds  # a restarted gateway counts from 0


def instance_rows(now: Look) -> list[InstanceRow]:
    """Return a row for each engine, in the gateway's order."""
    rows = []
    for instance in now.members.instances:
        page = now.instances.get(instance.instance_id, Page())
        engine = str(instance.engine)
        gateway = now.fronts.get("", Page())  # an engine tells its state to any one of several gateways
        given = float(instance.load.prefill_requests + instance.load.decode_requests)
        rows.append(
            InstanceRow(
                name=instance.instance_id,
                role=instance.role,
                state=instance.state,
                running=given
                if now.members.gateways
                else gateway.total("vllm:num_requests_running", engine=engine),
                waiting=gateway.total("vllm:num_requests_waiting", engine=engine),
                kv_use=gateway.total("vllm:kv_cache_usage_perc", engine=engine),
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


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
