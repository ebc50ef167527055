"""What a client process has moved and asked, under upstream's names: Prometheus text and a summary.

Counted once per call of a client whose HTTP is on (mooncake.dropin.client.http); other clients count nothing.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping

BOUNDS_US = (
    50, 75, 125, 150, 200, 250, 300, 400, 500, 750, 1_000, 1_500, 2_000, 3_000, 5_000, 7_000, 15_000, 20_000,
    50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000,
)  # fmt: skip
"""Upstream's buckets."""
RPC_NAMES_MAX = 64
"""Kinds of calls; there are about a dozen."""
GET, PUT, BATCH_GET, BATCH_PUT = "get", "put", "batch_get", "batch_put"
TITLES = {GET: "Get", PUT: "Put", BATCH_GET: "Batch Get", BATCH_PUT: "Batch Put"}
MODE = 'client_mode="real"'
PERCENTILE = 0.95
UNITS = ("B", "KB", "MB", "GB", "TB")
UNIT = 1024


class Histogram:
    """Durations by upstream's buckets. Not thread-safe: Counters is."""

    def __init__(self) -> None:
        """Nothing was counted."""
        self.counts = [0] * (len(BOUNDS_US) + 1)
        self.sum_us = 0.0

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.counts)

    def add(self, us: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_US, us)] += 1
        self.sum_us += us

    def bound_us(self, share: float) -> str:
        """Return the bound below which at least `share` of all are, as text."""
        below, count = 0, self.count
        for bound, number in zip(BOUNDS_US, self.counts, strict=False):
            below += number
            if below >= share * count:
                return f"<{bound}μs"
        return f">{BOUNDS_US[-1]}μs"

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the samples of one label set."""
        below = 0
        for bound, number in zip(BOUNDS_US, self.counts, strict=False):
            below += number
            yield f'{name}_bucket{{{labels},le="{bound:.6f}"}} {below}\n'
        yield f'{name}_bucket{{{labels},le="+Inf"}} {self.count}\n'
        yield f"{name}_sum{{{labels}}} {self.sum_us:.0f}\n"
        yield f"{name}_count{{{labels}}} {self.count}\n"

    def summary(self) -> str:
        """Return how many, and how long they took."""
        if not self.count:
            return "No data"
        return f"count={self.count}, p95{self.bound_us(PERCENTILE)}, max{self.bound_us(1.0)}"


class Counters:
    """Of one process. Thread-safe."""

    def __init__(self) -> None:
        """Nothing was counted; throughput is counted from now on."""
        self._lock = threading.Lock()
        self._begun_s = time.monotonic()
        self._read_bytes = self._write_bytes = 0
        self._transfers = {kind: Histogram() for kind in TITLES}
        self._rpcs: dict[str, Histogram] = {}

    def note(self, rpc: str, seconds: float, *, transfer: str = "", size_bytes: int = 0) -> None:
        """Count one call.

        Args:
            rpc: what it is called.
            seconds: it took.
            transfer: GET, PUT, BATCH_GET or BATCH_PUT if it moved bytes.
            size_bytes: so many.
        """
        us = seconds * 1e6
        with self._lock:
            known = self._rpcs.get(rpc)
            if known is None:
                if len(self._rpcs) >= RPC_NAMES_MAX:
                    return
                known = self._rpcs[rpc] = Histogram()
            known.add(us)
            if transfer and size_bytes:
                self._transfers[transfer].add(us)
                if transfer in (GET, BATCH_GET):
                    self._read_bytes += size_bytes
                else:
                    self._write_bytes += size_bytes

    def metrics(self) -> str:
        """Return all of it for Prometheus."""
        with self._lock:
            return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, title, value in (
            ("mooncake_transfer_read_bytes", "Total bytes read", self._read_bytes),
            ("mooncake_transfer_write_bytes", "Total bytes written", self._write_bytes),
        ):
            yield f"# HELP {name} {title}\n# TYPE {name} counter\n{name}{{{MODE}}} {value}\n"
        for kind, histogram in self._transfers.items():
            name = f"mooncake_transfer_{kind}_latency"
            yield f"# HELP {name} {TITLES[kind]} transfer latency (us)\n# TYPE {name} histogram\n"
            yield from histogram.lines(name, MODE)
        name = "mooncake_client_rpc_count"
        yield f"# HELP {name} Total number of RPC calls made by the client\n# TYPE {name} counter\n"
        for rpc, histogram in self._rpcs.items():
            yield f'{name}{{{MODE},rpc_name="{rpc}"}} {histogram.count}\n'
        name = "mooncake_client_rpc_latency"
        yield f"# HELP {name} Latency of RPC calls made by the client (in us)\n# TYPE {name} histogram\n"
        for rpc, histogram in self._rpcs.items():
            yield from histogram.lines(name, f'{MODE},rpc_name="{rpc}"')

    def summary(self) -> str:
        """Return all of it for a reader."""
        with self._lock:
            past_s = max(1e-3, time.monotonic() - self._begun_s)
            read, written = self._read_bytes, self._write_bytes
            lines = [
                "Client Metrics Summary",
                "=== Transfer Metrics Summary ===",
                f"Total Read: {_size(read)}",
                f"Total Write: {_size(written)}",
                f"Average Read Throughput: {_size(read / past_s)}/s",
                f"Average Write Throughput: {_size(written / past_s)}/s",
                "",
                "=== Latency Summary (microseconds) ===",
                *_named(TITLES, self._transfers),
                "",
                "=== RPC Metrics Summary ===",
                *_named({}, self._rpcs),
            ]
        return "\n".join(lines) + "\n"


def _named(titles: Mapping[str, str], histograms: Mapping[str, Histogram]) -> list[str]:
    return [f"{titles.get(name, name)}: {one.summary()}" for name, one in histograms.items()]


def _size(value: float) -> str:
    unit = 0
    while value >= UNIT and unit + 1 < len(UNITS):
        value, unit = value / UNIT, unit + 1
    return f"{value:.0f} B" if isinstance(value, int) and not unit else f"{value:.2f} {UNITS[unit]}"
