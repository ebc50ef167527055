"""What `mooncake top` has read: who there is, and everybody's /metrics page. Pure: text in, numbers out."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

import msgspec
from prometheus_client.parser import text_string_to_metric_families

KEPT = "mooncake_"
"""A gateway's page has 300 kB, most of it vLLM's per-engine histograms: the rest is not parsed."""

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

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums over all samples of `name`, by the values of a label."""
        found: dict[str, float] = {}
        for labels, value in self._samples.get(name, {}).items():
            for key, text in labels:
                if key == label:
                    found[text] = found.get(text, 0.0) + value
        return found

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
        known: Iterable[float | None] = (page.total(name) for page in self.fronts.values())
        values = [value for value in known if value is not None]
        return sum(values) if values else None


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
