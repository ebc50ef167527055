"""Prometheus view of one directory process: mooncake_directory_*. Labels have a handful of values each."""

from collections import Counter as Count
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.directory.directory import Mode
from kvstore.leader.task_types import Kind, Progress, State

COPIES_SHOWN_MAX = 4
"""Keys with so many replicas or more are one bucket: beyond that nobody does anything about it."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class DirectoryView(msgspec.Struct, frozen=True, kw_only=True):
    """What one directory is at one moment; `replicas`: how many keys have so many holders.

    `entries` are keys in the table: also those of nodes that left, until the next sweep.
    """

    mode: Mode
    lag_s: float
    entries: int
    nodes: int
    nodes_exact: int
    sweeps: int
    overflows: int
    leader: bool
    term: int
    hot_keys: int
    tasks: Sequence[Progress]
    replicas: Mapping[int, int]


class DirectoryMetrics:
    """Counts requests to stores; `render` adds a view."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Start at zero."""
        self._registry = CollectorRegistry() if registry is None else registry
        self._commands = Counter(
            "mooncake_directory_commands",
            "Blocks that stores were told to copy or drop.",
            ["command", "result"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mooncake_directory_command_seconds",
            "From a request to a store until its answer.",
            ["command"],
            buckets=SECONDS,
            registry=self._registry,
        )

    def on_commands(self, command: str, result: str, commands: int, seconds: float) -> None:
        """See executor.Observer."""
        self._commands.labels(command, result).inc(commands)
        self._seconds.labels(command).observe(seconds)

    def render(self, view: DirectoryView) -> bytes:
        """Return everything in Prometheus' text form; may be called in any thread."""
        registry = CollectorRegistry()
        registry.register(ViewCollector(view))
        return generate_latest(registry) + generate_latest(self._registry)


class ViewCollector(Collector):
    """Turns a view into Prometheus metrics."""

    def __init__(self, view: DirectoryView) -> None:
        """Of one moment."""
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number."""
        view = self._view
        yield _gauge("exact", "1 if every node is in step, 0 if answers are hints.", view.mode is Mode.EXACT)
        yield _gauge("lag_seconds", "Longest time that a node has been out of step.", view.lag_s)
        yield _gauge("blocks", "Distinct blocks that some node holds.", sum(view.replicas.values()))
        yield _gauge("entries", "Blocks in the table, also of nodes that are gone.", view.entries)
        yield _gauge("nodes", "Nodes of the pool.", view.nodes)
        yield _gauge("nodes_exact", "Nodes that are in step.", view.nodes_exact)
        yield _gauge("leader", "1 if this directory leads.", view.leader)
        yield _gauge("term", "Number of the term in which this directory leads, 0 if it does not.", view.term)
        yield _gauge("hot_keys", "Blocks that are to have several replicas.", view.hot_keys)
        yield _counter("sweeps", "Scans of the whole table for nodes that are gone.", view.sweeps)
        yield _counter("overflows", "Blocks that did not fit into the directory.", view.overflows)
        yield self._replicas()
        yield self._tasks()

    def _replicas(self) -> Metric:
        family = GaugeMetricFamily(
            "mooncake_directory_replicas", "Blocks by the number of nodes that hold them.", labels=["copies"]
        )
        buckets: Count[int] = Count()
        for copies, blocks in self._view.replicas.items():
            buckets[min(copies, COPIES_SHOWN_MAX)] += blocks
        for copies in range(1, COPIES_SHOWN_MAX + 1):
            last = copies == COPIES_SHOWN_MAX
            family.add_metric([f"{copies}+" if last else str(copies)], buckets[copies])
        return family

    def _tasks(self) -> Metric:
        family = GaugeMetricFamily(
            "mooncake_directory_tasks", "Tasks that this leader remembers.", labels=["kind", "state"]
        )
        counts = Count((task.kind, task.state) for task in self._view.tasks if task.task_id)
        for kind in (Kind.COPY, Kind.MOVE, Kind.DRAIN):
            for state in State:
                family.add_metric([kind, state], counts[kind, state])
        return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mooncake_directory_{name}", text, value=float(value))


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(f"mooncake_directory_{name}", text, value=value)
