"""What every process tells of itself: event-loop lag, memory, descriptors, threads, CPU time."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mooncake.core.errors import ConfigError
from mooncake.core.health import Health

log = structlog.get_logger(__name__)

BEAT_S = 0.1
"""Ten wake-ups a second cost 0.1 % of a core and see every block of the loop that a client could."""
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LABELS = ["kind"]
MULTIPROC_ENV = "PROMETHEUS_MULTIPROC_DIR"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


def refuse_shared_files() -> None:
    """Raise if prometheus_client would keep metrics in files that processes share.

    Raises:
        ConfigError: says what to unset: its sums would add up gauges that several processes see alike.
    """
    if folder := os.environ.get(MULTIPROC_ENV):
        raise ConfigError(
            f"environment variable {MULTIPROC_ENV} = {folder!r}: unset it: every process serves its own "
            "metrics on its admin port, and Prometheus adds them up"
        )


def lag_histogram(registry: CollectorRegistry) -> Histogram:
    """Return where the lag of loops is observed, by kind; a second one in the same registry raises."""
    return Histogram(
        "mooncake_process_event_loop_lag_seconds",
        "How much later than asked for the process's loop turned, ten times a second; of a relay, the "
        "longest turn of each tenth of a second.",
        LABELS,
        registry=registry,
        buckets=LAG_BUCKETS_S,
    )


class Turns:
    """The lag of a loop that waits for events only, as a relay's: its longest turn of each BEAT_S.

    Who comes during a turn waits for its end at most. Each turn by itself is no measure of that: their number
    grows with the work, and most do next to nothing.
    """

    def __init__(self, lag_s: Histogram, kind: str) -> None:
        """`lag_s`: of the process."""
        self._lag_s = lag_s.labels(kind)
        self._begun_s = 0.0
        self._longest_s = 0.0

    def turned(self, now_s: float, busy_s: float) -> None:
        """The loop has turned, and did something for `busy_s`."""
        self._longest_s = max(self._longest_s, busy_s)
        if now_s - self._begun_s >= BEAT_S:
            self._lag_s.observe(self._longest_s)
            self._begun_s, self._longest_s = now_s, 0.0


class VitalsCollector(Collector):
    """Reads /proc at scrape time. What a kernel does not tell is left out."""

    def __init__(self, kind: str, children: Mapping[str, int] | None = None) -> None:
        """`kind`: of this process; `children`: kind -> pid of those that serve no metrics themselves."""
        self._kind, self._children = kind, {} if children is None else children

    def collect(self) -> Any:
        """Yield one family for each vital sign."""
        pids = {self._kind: os.getpid(), **self._children}
        for name, text, read in (
            ("resident_bytes", "Memory in RAM, shared pages included", _resident_bytes),
            ("open_fds", "Open file descriptors", _open_fds),
            ("threads", "Threads", _threads),
        ):
            gauge = GaugeMetricFamily(f"mooncake_process_{name}", text, labels=LABELS)
            _tell(gauge, pids, read)
            yield gauge
        cpu = CounterMetricFamily("mooncake_process_cpu_seconds", "CPU time used", labels=LABELS)
        _tell(cpu, pids, _cpu_s)
        yield cpu


def _tell(family: Any, pids: Mapping[str, int], read: Callable[[int], float]) -> None:
    for kind, pid in pids.items():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended, or is not ours to look at
            family.add_metric([kind], read(pid))


def _resident_bytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def _open_fds(pid: int) -> float:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _threads(pid: int) -> float:
    return float(_stat(pid)[17])


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS


def _stat(pid: int) -> list[str]:
    """Return the fields of proc(5) stat from the third on: the second may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextlib.asynccontextmanager
async def beating(
    kind: str,
    health: Health,
    lag_s: Histogram,
    look: Callable[[], None] = lambda: None,
) -> AsyncIterator[None]:
    """Measure the running loop's lag, keep `health` alive by it, and `look` around at each beat."""
    task = asyncio.create_task(_beat(lag_s.labels(kind), health, look), name="beat")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        health.forget(LOOP)


LOOP = "the event loop"


async def _beat(lag_s: Histogram, health: Health, look: Callable[[], None]) -> None:
    due_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        health.beat(LOOP, now_s)
        lag_s.observe(max(0.0, now_s - due_s))
        try:
            look()
        except Exception:  # it says nothing of the loop, which turns
            log.exception("vitals.look_failed")
        due_s = now_s + BEAT_S
        await asyncio.sleep(BEAT_S)
