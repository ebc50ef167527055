"""Counters of copied bytes, kept in the process that copies (for same-host transfers: the engine)."""

from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter


class Meter(Protocol):
    """Learns of finished copies. Called once per copy call, never per page."""

    def __call__(self, size_bytes: int, elapsed_s: float) -> None:
        """Record one copy of `size_bytes` that took `elapsed_s`."""


def no_meter(size_bytes: int, elapsed_s: float) -> None:
    """Record nothing."""


class TransferMetrics:
    """mooncake_transfer_bytes_total and mooncake_transfer_seconds_total {transport, direction}."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Register the counters; one TransferMetrics per registry."""
        labels = ("transport", "direction")
        self._bytes = Counter("mooncake_transfer_bytes", "Bytes copied.", labels, registry=registry)
        self._seconds = Counter(
            "mooncake_transfer_seconds", "Seconds spent copying.", labels, registry=registry
        )

    def meter(self, transport: str, direction: str) -> Meter:
        """Return the recorder of one (transport, direction); labels are looked up here, once.

        Args:
            transport: shm, tcp, rdma or file.
            direction: put (into a segment) or get (out of it).
        """
        sizes = self._bytes.labels(transport, direction)
        seconds = self._seconds.labels(transport, direction)

        def record(size_bytes: int, elapsed_s: float) -> None:
            sizes.inc(size_bytes)
            seconds.inc(elapsed_s)

        return record
