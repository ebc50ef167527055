"""What a decision core of its own says of its office, on its /metrics page; read when it is asked for."""

from collections.abc import Iterator, Sized
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Office(Protocol):
    """A CoreService."""

    @property
    def term(self) -> int:
        """Number of the term in which it leads; 0 = it does not."""
        ...

    @property
    def gateways(self) -> Sized:
        """Those that have joined."""
        ...


class CoreCollector(Collector):
    """mooncake_core_* of one core."""

    def __init__(self, office: Office) -> None:
        """`office` is asked at every scrape."""
        self._office = office

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number."""
        text = "Number of the term in which this core leads, 0 if it does not."
        yield GaugeMetricFamily("mooncake_core_term", text, self._office.term)
        yield GaugeMetricFamily(
            "mooncake_core_gateways", "Gateways that have joined this core.", len(self._office.gateways)
        )
