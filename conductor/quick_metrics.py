"""Metrics that are counted once per token: prometheus_client's take a lock, and a loop over the buckets.

One thread counts (the event loop's); scrapes may come from any. A scrape between two additions sees the one
and not yet the other, as with prometheus_client's own.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import inf

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class QuickCounter(Collector):
    """A counter without labels."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._name, self._documentation = name, documentation
        self._value = 0
        registry.register(self)

    def inc(self, amount: int = 1) -> None:
        """Add."""
        self._value += amount

    def collect(self) -> Iterable[Metric]:
        """Return the one family, for a scrape."""
        return (CounterMetricFamily(self._name, self._documentation, value=self._value),)


class QuickHistogram(Collector):
    """A histogram without labels; `buckets` are upper bounds that rise."""

    def __init__(
        self, name: str, documentation: str, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        """Return the one family, for a scrape."""
        family = HistogramMetricFamily(self._name, self._documentation)
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, inf), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))  # type: ignore[no-untyped-call]
        family.add_metric((), buckets, self._sum)
        return (family,)
