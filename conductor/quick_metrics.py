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


class QuickSeries:
    """One series of a histogram: keep it where it is counted."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class QuickHistogram(Collector):
    """A histogram; `buckets` are upper bounds that rise. Label values are the caller's, and bounded there."""

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        labels: Sequence[str] = (),
    ) -> None:
        """Without `labels` there is one series, from the start on."""
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._bounds = tuple(buckets)
        self._series: dict[tuple[str, ...], QuickSeries] = {}
        if not self._labels:
            self.series()
        registry.register(self)

    def series(self, *values: str) -> QuickSeries:
        """Return the series of these label values, made when it is asked for first."""
        found = self._series.get(values)
        if found is None:
            assert len(values) == len(self._labels), values
            found = self._series[values] = QuickSeries(self._bounds)
        return found

    def observe(self, value: float, *labels: str) -> None:
        """Count one value."""
        self.series(*labels).observe(value)

    def collect(self) -> Iterable[Metric]:
        """Return the one family, for a scrape."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, series in list(self._series.items()):
            total, buckets = 0, []
            for bound, count in zip((*self._bounds, inf), list(series.counts), strict=True):
                total += count
                buckets.append((floatToGoString(bound), total))  # type: ignore[no-untyped-call]
            family.add_metric(values, buckets, series.total)
        return (family,)
