"""Counts of the transfer engine, and their Prometheus view (mooncake_transfer_*).

Counted once per part (the slices that one `Transport.run` call carries), never per slice. Labels are
bounded: links beyond LINKS_MAX share the name "other", reasons are the callers' fixed words.
"""

import itertools
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from transfer.health import PathState
from transfer.model import Opcode

LINKS_MAX = 64
"""Links with a name of their own: 64 of them over 3 transports are about 1,500 series."""
OTHER = "other"
PART_S = (
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0
)  # fmt: skip
"""Bounds of how long parts take: a copy of one block through shared memory, up to a part's deadline."""

Labels = tuple[str, ...]


class Durations:
    """How long parts took, by PART_S."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        """None was seen."""
        self.counts = [0] * (len(PART_S) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one part."""
        self.counts[bisect_left(PART_S, seconds)] += 1
        self.seconds += seconds


class Counts(msgspec.Struct):
    """Everything that is counted, by the values of the labels that the comments name."""

    bytes: defaultdict[Labels, float]  # transport, link, op
    seconds: defaultdict[Labels, float]  # transport, link, op
    parts: defaultdict[Labels, float]  # transport, link, op, outcome
    retries: defaultdict[Labels, float]  # transport, link
    failovers: defaultdict[Labels, float]  # from, to
    failures: defaultdict[Labels, float]  # transport, link, reason
    choices: defaultdict[Labels, float]  # transport, reason
    nic_bytes: defaultdict[Labels, float]  # link, a pair of NICs
    nic_seconds: defaultdict[Labels, float]  # link
    nic_events: defaultdict[Labels, float]  # link, event
    inflight_bytes: defaultdict[Labels, float]  # transport, link


_COUNTERS = {
    "bytes": ("Bytes moved.", ["transport", "link", "op"]),
    "seconds": ("Time spent moving them; parts that ran at once each count.", ["transport", "link", "op"]),
    "parts": ("Parts of batches by how they ended.", ["transport", "link", "op", "outcome"]),
    "retries": ("Parts tried again on the same transport.", ["transport", "link"]),
    "failovers": ("Parts given to another transport after a failure.", ["from", "to"]),
    "failures": ("Failed parts by reason.", ["transport", "link", "reason"]),
    "choices": ("Transports chosen, and why.", ["transport", "reason"]),
    "nic_bytes": ("Bytes moved between a pair of NICs.", ["link"]),
    "nic_seconds": ("Time that queue pairs between a pair of NICs were busy.", ["link"]),
    "nic_events": ("Connections, retries, evictions, quarantines of a pair of NICs.", ["link", "event"]),
}


class TransferMetrics:
    """Counters of one engine. Any thread may call; a call is a few dictionary updates under one lock."""

    def __init__(self, links_max: int = LINKS_MAX) -> None:
        """Count from 0; `links_max` links get a label of their own."""
        self._lock = threading.Lock()
        self._links_max = links_max
        self._links: set[str] = set()
        self._counts = Counts(*(defaultdict(float) for _ in Counts.__struct_fields__))
        self._begun: dict[int, tuple[str, str, int]] = {}  # single slices in flight, by token
        self._tokens = itertools.count()
        self._singles: dict[tuple[str, str, int], list[float]] = {}  # [bytes, seconds, parts]
        self._durations: dict[tuple[str, int], Durations] = {}  # by transport and op

    def begin(self, transport: str, link: str, size_bytes: int) -> int:
        """Count a single slice that is about to run; give the token to `end`. Takes no lock."""
        token = next(self._tokens)
        self._begun[token] = (transport, link, size_bytes)
        return token

    def end(self, token: int, op: Opcode, moved_bytes: int, elapsed_s: float) -> None:
        """Count how it ended: whole, or not at all (then somebody else will move it, and count that)."""
        transport, link, _ = self._begun.pop(token)
        if moved_bytes:
            self.single(transport, link, op, moved_bytes, elapsed_s)

    def single(self, transport: str, link: str, op: Opcode, moved_bytes: int, elapsed_s: float) -> None:
        """Count a single slice that went by its best way."""
        with self._lock:
            cell = self._singles.get((transport, link, op))
            if cell is None:
                cell = self._singles[transport, link, op] = [0.0, 0.0, 0.0]
            cell[0] += moved_bytes
            cell[1] += elapsed_s
            cell[2] += 1
            self._took(transport, op, elapsed_s)

    def began(self, transport: str, link: str, size_bytes: int) -> None:
        """Count a part that is about to run: in flight until `moved` and `failed` told of all its bytes."""
        with self._lock:
            self._counts.inflight_bytes[transport, self._label(link)] += size_bytes

    def moved(self, transport: str, link: str, op: Opcode, size_bytes: int, elapsed_s: float) -> None:
        """Count a part, or what of it succeeded; of a part that failed whole, only the time is counted."""
        with self._lock:
            key = (transport, self._label(link), op.name.lower())
            self._counts.seconds[key] += elapsed_s
            if size_bytes == 0:
                return
            self._took(transport, op, elapsed_s)
            self._counts.bytes[key] += size_bytes
            self._counts.parts[(*key, "moved")] += 1
            self._counts.inflight_bytes[key[:2]] -= size_bytes

    def failed(self, transport: str, link: str, op: Opcode, size_bytes: int, reason: str) -> None:
        """Count a part, or what of it failed; `reason` is a fixed word, such as the error's `code`."""
        with self._lock:
            key = (transport, self._label(link))
            self._counts.parts[(*key, op.name.lower(), "failed")] += 1
            self._counts.failures[(*key, reason)] += 1
            self._counts.inflight_bytes[key] -= size_bytes

    def retried(self, transport: str, link: str) -> None:
        """Count a part that is tried again on the same transport."""
        with self._lock:
            self._counts.retries[transport, self._label(link)] += 1

    def failed_over(self, old: str, new: str) -> None:
        """Count a part that went from transport `old` to `new`."""
        with self._lock:
            self._counts.failovers[old, new] += 1

    def chose(self, transport: str, reason: str) -> None:
        """Count a choice; `reason` is a fixed word, such as "fastest", "hint" or "last resort"."""
        with self._lock:
            self._counts.choices[transport, reason] += 1

    def nic(self, link: str, event: str, size_bytes: int, elapsed_s: float) -> None:
        """Count what happened on one pair of NICs; a Meter of transfer.rdma."""
        pair = link.partition("/")[2].partition("@")[0]
        with self._lock:
            label = self._label(pair)
            self._counts.nic_events[label, event] += 1
            if event == "moved":
                self._counts.nic_bytes[label,] += size_bytes
                self._counts.nic_seconds[label,] += elapsed_s

    def label(self, link: str) -> str:
        """Return the label of `link`: its name, or "other" once LINKS_MAX links have theirs."""
        with self._lock:
            return self._label(link)

    def counts(self) -> Counts:
        """Return a copy, consistent in itself."""
        with self._lock:
            self._fold()
            counts = Counts(*(getattr(self._counts, name).copy() for name in Counts.__struct_fields__))
            for transport, link, size_bytes in list(self._begun.values()):
                counts.inflight_bytes[transport, self._label(link)] += size_bytes
            return counts

    def durations(self) -> dict[tuple[str, str], tuple[list[int], float]]:
        """Return how many parts took how long (see PART_S), and all their seconds, by transport and op."""
        with self._lock:
            return {
                (transport, Opcode(op).name.lower()): (list(one.counts), one.seconds)
                for (transport, op), one in self._durations.items()
            }

    def _took(self, transport: str, op: int, seconds: float) -> None:
        one = self._durations.get((transport, op))
        if one is None:
            one = self._durations[transport, op] = Durations()
        one.add(seconds)

    def _fold(self) -> None:
        """Add the single slices to the rest: labels are made here, not while bytes wait."""
        singles, self._singles = self._singles, {}
        for (transport, link, op), (size, seconds, parts) in singles.items():
            key = (transport, self._label(link), Opcode(op).name.lower())
            self._counts.bytes[key] += size
            self._counts.seconds[key] += seconds
            self._counts.parts[(*key, "moved")] += parts
            self._counts.choices[transport, "best"] += parts
            self._counts.inflight_bytes[key[:2]] += 0

    def _label(self, link: str) -> str:
        if link not in self._links:
            if len(self._links) >= self._links_max:
                return OTHER
            self._links.add(link)
        return link


class TransferCollector(Collector):
    """The Prometheus view of one engine, made at scrape time: transfers pay nothing for it."""

    def __init__(
        self, metrics: TransferMetrics, states: Callable[[], Mapping[str, PathState]] = dict[str, PathState]
    ) -> None:
        """`states` is `Health.states` at the time of the scrape, safe to call from another thread."""
        self._metrics = metrics
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """Yield one family per metric."""
        counts = self._metrics.counts()
        for name, (text, labels) in _COUNTERS.items():
            family = CounterMetricFamily(f"mooncake_transfer_{name}", text, labels=labels)
            _fill(family, getattr(counts, name))
            yield family
        yield self._parts()
        gauge = GaugeMetricFamily(
            "mooncake_transfer_inflight_bytes", "Bytes under way.", labels=["transport", "link"]
        )
        _fill(gauge, counts.inflight_bytes)
        yield gauge
        gauge = GaugeMetricFamily(
            "mooncake_transfer_path_state",
            "0 usable, 1 on trial, 2 quarantined; only paths that ever failed.",
            labels=["transport", "link"],
        )
        _fill(gauge, self._path_states())
        yield gauge

    def _parts(self) -> Metric:
        family = HistogramMetricFamily(
            "mooncake_transfer_part_seconds", "How long a part took that moved.", labels=["transport", "op"]
        )
        bounds = [*(f"{bound:g}" for bound in PART_S), "+Inf"]
        for labels, (counts, seconds) in sorted(self._metrics.durations().items()):
            family.add_metric(
                labels, list(zip(bounds, itertools.accumulate(counts), strict=True)), sum_value=seconds
            )
        return family

    def _path_states(self) -> dict[Labels, float]:
        """Return the worst state of those paths that share a label."""
        worst: dict[Labels, float] = {}
        for path, state in self._states().items():
            transport, _, link = path.partition("/")
            key = (transport, self._metrics.label(link))
            worst[key] = max(worst.get(key, state), state)
        return worst


def _fill(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[Labels, float]) -> None:
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
