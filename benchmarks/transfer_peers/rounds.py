"""Rounds of contenders: their processes, what is measured, and its arithmetic.

Imports little: it also runs inside a slow VM (benchmarks.transfer_rdma).
"""

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mooncake.core.errors import PeerError, PeerGone, PeerTimeout

T = TypeVar("T")

KIB, MIB = 1 << 10, 1 << 20
START_S_MAX = 60.0
RUN_S_MAX = 60.0
"""For one sample, which is made to take a fraction of a second."""
ROOT = Path(__file__).resolve().parents[2]
BOOT = (  # appended: in the peers' environment `mooncake` is upstream's package
    f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.transfer_peers import worker; worker.main()"
)
ISOLATE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True)
class Contender:
    """One way to move bytes: a class in a module of benchmarks.transfer_peers, or in one named in full."""

    name: str
    module: str
    kind: str
    ops: tuple[str, ...] = ("WRITE", "READ")
    medium: str = "memory"
    foreign: bool = False  # lives in the peers' environment
    exposed: bool = False  # listens on every address


@dataclass(frozen=True)
class Cell:
    """What is moved in one go."""

    op: str
    size: int
    pages: int = 1
    medium: str = "memory"

    def __str__(self) -> str:
        """For a table's first column."""
        amount = f"{self.size // MIB}M" if self.size >= MIB else f"{self.size // KIB}K"
        medium = "" if self.medium == "memory" else f"{self.medium} "
        return f"{medium}{self.op[0]} {f'{self.pages}x' if self.pages > 1 else ''}{amount}"


@dataclass(frozen=True)
class Pace:
    """How thorough a run is."""

    rounds: int
    sample_s: float
    all_s: float  # no round begins later


@dataclass(frozen=True)
class Sample:
    """One contender in one cell in one round."""

    round: int
    cell: str
    contender: str
    gb_s: float
    us: float
    cpu_s_gb: float
    p99_us: float = 0.0  # 0 = not measured


@dataclass(frozen=True)
class Bar:
    """A promise: `mine` against `other` in all of `cells`, in every one of them."""

    text: str
    mine: str
    other: str
    figure: str  # of Sample
    at_least: float
    cells: tuple[Cell, ...]


# ---------------------------------------------------------------- arithmetic


def rotation(items: Sequence[T], turn: int) -> list[T]:
    """Return `items` in their order, starting with another one each turn."""
    first = turn % len(items) if items else 0
    return [*items[first:], *items[:first]]


def median_of(samples: Sequence[Sample], contender: str, cell: Cell, figure: str) -> float | None:
    """Return the median of a figure, None if it was never measured."""
    values = [getattr(s, figure) for s in samples if s.contender == contender and s.cell == str(cell)]
    return statistics.median(values) if values else None


def ratio(samples: Sequence[Sample], mine: str, other: str, cell: Cell, figure: str) -> float | None:
    """Return the median over rounds of how much better `mine` was than `other`, None if not measured.

    Above 1 is better: more bytes a second, fewer microseconds, fewer CPU seconds.
    """
    here = [s for s in samples if s.cell == str(cell)]
    found = {(s.contender, s.round): float(getattr(s, figure)) for s in here}
    values = []
    for (contender, turn), value in found.items():
        if contender == mine and (other, turn) in found:
            theirs = found[other, turn]
            values.append(value / theirs if figure == "gb_s" else theirs / value)
    return statistics.median(values) if values else None


def judge(samples: Sequence[Sample], bar: Bar) -> dict[str, Any]:
    """Return a row: the bar, the median of its cells' ratios, the worst with its cell, met or not."""
    by_cell = {str(c): ratio(samples, bar.mine, bar.other, c, bar.figure) for c in bar.cells}
    known = {cell: value for cell, value in by_cell.items() if value is not None}
    row: dict[str, Any] = {"bar": bar.text, "at least": bar.at_least}
    if not known:
        return {**row, "median": "-", "worst": "-", "where": "-", "met": "not measured"}
    worst = min(known, key=lambda cell: known[cell])
    met = "yes" if known[worst] >= bar.at_least else "NO"
    median = statistics.median(known.values())
    return {**row, "median": median, "worst": known[worst], "where": worst, "met": met}


def table(
    samples: Sequence[Sample], names: Sequence[str], cells: Sequence[Cell], figure: str
) -> list[dict[str, Any]]:
    """Return one row per measured cell: a figure of each contender, or its "ratio" to the first one."""
    measured = {s.cell for s in samples}
    rows = []
    for cell in (c for c in cells if str(c) in measured):
        row: dict[str, Any] = {"": str(cell)}
        for name in names:
            if figure == "ratio":
                value = ratio(samples, name, names[0], cell, "gb_s")
            else:
                value = median_of(samples, name, cell, figure)
            row[name] = "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        rows.append(row)
    return rows


# ---------------------------------------------------------------- processes


class Worker:
    """A contender's process group. It runs only while it is asked something."""

    def __init__(self, contender: Contender, python: str, argv: list[str], isolated: bool) -> None:
        """Start it; `answer` tells when it is ready."""
        self.contender = contender
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop
        flags = ["-E", "-P"] if contender.foreign else ["-P"]  # no PYTHONPATH: it may lead to our `mooncake`
        initiator = [python, *flags, "-c", BOOT, "initiator", contender.module, contender.kind, *argv]
        self.process = subprocess.Popen(
            [*ISOLATE, *initiator] if isolated else initiator,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
            cwd=tempfile.gettempdir(),
        )

    def answer(self, deadline_s: float) -> dict[str, Any]:
        """Return its next line.

        Raises:
            PeerGone: it ended; the message is the last thing it said.
            PeerTimeout: it said nothing in time.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], deadline_s)[0]:
            raise PeerTimeout(f"no answer in {deadline_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise PeerGone(said[-1] if said else "it ended without a word")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, turn: int, cell: Cell, for_s: float) -> Sample:
        """Measure once; raises as `answer`."""
        assert self.process.stdin is not None
        ask = {"op": cell.op, "size": cell.size, "pages": cell.pages, "for_s": for_s}
        self.signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then `answer` tells why
            self.process.stdin.write(json.dumps(ask) + "\n")
            self.process.stdin.flush()
        got = self.answer(RUN_S_MAX)
        self.signal(signal.SIGSTOP)
        gigabytes = got["count"] * cell.pages * cell.size / 1e9
        rate, cpu = gigabytes / got["seconds"], got["cpu_s"] / gigabytes
        late_us = got.get("p99_s", 0.0) * 1e6
        return Sample(turn, str(cell), self.contender.name, rate, got["median_s"] * 1e6, cpu, late_us)

    def signal(self, number: int) -> None:
        """Signal the whole group, if there is any left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Kill the whole group."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.errors.close()


@contextlib.contextmanager
def started(
    chosen: Sequence[tuple[Contender, str]],
    pool_bytes: int,
    folder: str,
    isolated: bool,
    skipped: dict[str, str],
    start_s: float = START_S_MAX,
) -> Iterator[list[Worker]]:
    """Yield the workers that are ready, stopped; say in `skipped` why others are not.

    Args:
        chosen: contenders and the Python each runs in.
        pool_bytes: of each pool.
        folder: for files, on the disk to measure.
        isolated: each gets an empty network.
        skipped: reasons by contender.
        start_s: for all together.
    """
    workers: list[Worker] = []
    with contextlib.ExitStack() as ends:
        for contender, python in chosen:
            worker = Worker(contender, python, [str(pool_bytes), folder], isolated)
            ends.callback(worker.stop)
            workers.append(worker)
        end_s = time.monotonic() + start_s
        for worker in list(workers):
            try:
                worker.answer(max(0.0, end_s - time.monotonic()))
            except PeerError as error:
                skipped[worker.contender.name] = str(error)
                workers.remove(worker)
        for worker in workers:
            worker.signal(signal.SIGSTOP)
        yield workers


def measure(
    workers: list[Worker],
    cells: Sequence[Cell],
    pace: Pace,
    skipped: dict[str, str],
    begin: Callable[[str], None],
) -> list[Sample]:
    """Run the rounds there is time for; a contender that fails is out, and `skipped` says why."""
    samples: list[Sample] = []
    end_s = time.monotonic() + pace.all_s
    for turn in range(pace.rounds):
        if time.monotonic() > end_s:
            break
        for number, cell in enumerate(cells):
            begin(f"round {turn + 1} of {pace.rounds}: {cell}")
            for worker in rotation(list(workers), turn + number):
                if worker.contender.medium != cell.medium or cell.op not in worker.contender.ops:
                    continue
                try:
                    samples.append(worker.sample(turn, cell, pace.sample_s))
                except PeerError as error:
                    skipped[worker.contender.name] = f"{cell}: {error}"
                    workers.remove(worker)
    return samples
