"""How fast bytes move: our transports against memcpy, Mooncake's C++ engine, NIXL, redis and O_DIRECT.

Each contender is a process of its own (two where it has a remote side) that the others' rounds find
stopped. Every round visits every cell, each time starting with another contender. Ratios are taken
inside a round, where the machine was as busy for both, and their median is reported.

The peers need a virtual environment of their own (`benchmarks/transfer_peers/install DIR`, then
--peer-venv DIR) and root: they listen on every address, so all contenders get an empty network.
Absent peers are skipped by name.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import harness
from mooncake.core.errors import ConfigError, PeerError, PeerGone, PeerTimeout

T = TypeVar("T")

KIB, MIB = 1 << 10, 1 << 20
START_S_MAX = 60.0
RUN_S_MAX = 60.0
"""For one sample, which is made to take a fraction of a second."""
POOL_BYTES_MAX = 1 << 30
"""Seventeen pools are in memory at the same time."""
ROOT = Path(__file__).resolve().parent.parent
BOOT = (  # appended: in the peers' environment `mooncake` is upstream's package
    f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.transfer_peers import worker; worker.main()"
)
ISOLATE = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True)
class Contender:
    """One way to move bytes: a class in a module of benchmarks.transfer_peers."""

    name: str
    module: str
    kind: str
    ops: tuple[str, ...] = ("WRITE", "READ")
    medium: str = "memory"
    foreign: bool = False  # lives in the peers' environment
    exposed: bool = False  # listens on every address


CONTENDERS = (
    Contender("memcpy", "memcpy", "Memcpy"),
    Contender("shm", "ours", "Shm"),
    Contender("tcp", "ours", "Tcp"),
    Contender("verify", "ours", "Verify", ops=("READ",)),
    Contender("upstream", "upstream", "Upstream", foreign=True, exposed=True),
    Contender("nixl", "ucx", "Ucx", foreign=True, exposed=True),
    Contender("redis", "redis_unix", "Redis", foreign=True),
    Contender("file", "disk", "File", ops=("READ",), medium="disk"),
    Contender("O_DIRECT", "disk", "Plain", ops=("READ",), medium="disk"),
)


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
        return f"{self.op[0]} {f'{self.pages}x' if self.pages > 1 else ''}{amount}"


SINGLES = tuple(n * KIB for n in (4, 64, 256)) + tuple(n * MIB for n in (1, 4, 16, 64))
BATCHES = ((256 * KIB, 128), (64 * KIB, 512))
CELLS = (
    *(Cell(op, size, pages) for size, pages in BATCHES for op in ("WRITE", "READ")),
    *(Cell(op, size) for size in SINGLES for op in ("WRITE", "READ")),
    Cell("READ", 256 * KIB, 128, "disk"),
    Cell("READ", MIB, 32, "disk"),
)


@dataclass(frozen=True)
class Pace:
    """How thorough a run is."""

    rounds: int
    sample_s: float
    all_s: float  # no round begins later
    pool_caches: int  # a pool is so many last-level caches big: what comes round again is cold
    sizes: tuple[int, ...]


FULL = Pace(7, 0.2, 3600.0, 8, SINGLES)
QUICK = Pace(5, 0.02, 30.0, 4, (4 * KIB, 256 * KIB, MIB, 16 * MIB))


@dataclass(frozen=True)
class Sample:
    """One contender in one cell in one round."""

    round: int
    cell: str
    contender: str
    gb_s: float
    us: float
    cpu_s_gb: float


@dataclass(frozen=True)
class Bar:
    """A promise: `mine` against `other` in all of `cells`, in every one of them."""

    text: str
    mine: str
    other: str
    figure: str  # of Sample
    at_least: float
    cells: tuple[Cell, ...]


def among(sizes: Sequence[int], pages: Sequence[int] = (1,), medium: str = "memory") -> tuple[Cell, ...]:
    """Return the cells with these sizes and numbers of pages."""
    return tuple(c for c in CELLS if c.size in sizes and c.pages in pages and c.medium == medium)


BIG = SINGLES[3:]
FROM_64K = among(SINGLES[1:])
PAGES_256K = among([256 * KIB], [128])
ALL_BATCHES = among([64 * KIB, 256 * KIB], [128, 512])
BARS = (
    Bar("shm / memcpy, 1-64 MiB", "shm", "memcpy", "gb_s", 0.90, among(BIG)),
    Bar("shm / NIXL", "shm", "nixl", "gb_s", 1.0, FROM_64K + ALL_BATCHES),
    Bar("shm / upstream", "shm", "upstream", "gb_s", 8.0, FROM_64K + ALL_BATCHES),
    Bar("tcp / memcpy, pages", "tcp", "memcpy", "gb_s", 0.30, PAGES_256K),
    Bar("tcp / upstream, pages", "tcp", "upstream", "gb_s", 2.5, PAGES_256K),
    Bar("upstream's us / tcp's", "tcp", "upstream", "us", 1.0, among([4 * KIB])),
    Bar("verified / memcpy", "verify", "memcpy", "gb_s", 0.60, among(BIG)),
    Bar("SSD / O_DIRECT", "file", "O_DIRECT", "gb_s", 0.90, CELLS[-2:]),
    Bar("NIXL's CPU / shm's", "shm", "nixl", "cpu_s_gb", 1.0, FROM_64K + ALL_BATCHES),
    Bar("upstream's CPU / shm's", "shm", "upstream", "cpu_s_gb", 1.0, FROM_64K + ALL_BATCHES),
    Bar("upstream's CPU / tcp's", "tcp", "upstream", "cpu_s_gb", 1.0, ALL_BATCHES),
)


FIGURES = {
    "gb_s": "GB/s",
    "us": "microseconds for one go",
    "ratio": "GB/s, times {}",
    "cpu_s_gb": "CPU seconds per GB, both processes",
}

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


def table(samples: Sequence[Sample], names: Sequence[str], medium: str, figure: str) -> list[dict[str, Any]]:
    """Return one row per measured cell: a figure of each contender, or its "ratio" to the first one."""
    measured = {s.cell for s in samples}
    rows = []
    for cell in (c for c in CELLS if c.medium == medium and str(c) in measured):
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
        initiator = [python, "-P", "-c", BOOT, "initiator", contender.module, contender.kind, *argv]
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
        return Sample(turn, str(cell), self.contender.name, rate, got["median_s"] * 1e6, cpu)

    def signal(self, number: int) -> None:
        """Signal the whole group, if there is any left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Kill the whole group."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.errors.close()


def cache_bytes() -> int:
    """Return the size of the last-level cache, 32 MiB if the kernel does not tell."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max([32 * MIB, *(int(file.read_text().strip().removesuffix("K")) * KIB for file in files)])


def absent(contender: Contender, peer_python: Path | None, isolated: bool) -> str:
    """Return why a contender cannot run, "" if it may."""
    if contender.foreign and peer_python is None:
        return "no --peer-venv (see benchmarks/transfer_peers/install)"
    if contender.foreign and not (peer_python and peer_python.exists()):
        return f"{peer_python} does not exist"
    if contender.exposed and not isolated:
        return "it listens on every address, and a network of its own needs root, unshare and ip"
    if contender.module == "redis_unix" and not shutil.which("redis-server"):
        return "no redis-server"
    return ""


@contextlib.contextmanager
def started(
    chosen: Sequence[Contender], args: argparse.Namespace, pool_bytes: int, skipped: dict[str, str]
) -> Iterator[list[Worker]]:
    """Yield the workers that are ready, stopped; say in `skipped` why others are not."""
    isolated = os.geteuid() == 0 and bool(shutil.which("unshare")) and bool(shutil.which("ip"))
    peer_python = Path(args.peer_venv) / "bin" / "python" if args.peer_venv else None
    workers: list[Worker] = []
    with contextlib.ExitStack() as ends:
        folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="bench-transfer-", dir=args.dir))
        for contender in chosen:
            reason = absent(contender, peer_python, isolated)
            if reason:
                skipped[contender.name] = reason
                continue
            python = str(peer_python) if contender.foreign else sys.executable
            worker = Worker(contender, python, [str(pool_bytes), folder], isolated)
            ends.callback(worker.stop)
            workers.append(worker)
        end_s = time.monotonic() + START_S_MAX
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
    workers: list[Worker], cells: Sequence[Cell], pace: Pace, skipped: dict[str, str]
) -> list[Sample]:
    """Run the rounds there is time for; a contender that fails is out, and `skipped` says why."""
    samples: list[Sample] = []
    cells = [c for c in cells if any(w.contender.medium == c.medium for w in workers)]
    end_s = time.monotonic() + pace.all_s
    with harness.progress(pace.rounds * len(cells)) as begin:
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


def report(samples: list[Sample], names: list[str], skipped: dict[str, str]) -> list[dict[str, Any]]:
    """Print the tables; return the closing one."""
    for medium in ("memory", "disk"):
        here = [c.name for c in CONTENDERS if c.medium == medium and c.name in names]
        for figure, title in FIGURES.items() if here else ():
            harness.show(f"{medium}: {title.format(here[0])}", table(samples, here, medium, figure))
    bars = [judge(samples, bar) for bar in BARS]
    harness.show("Bars: medians of ratios over rounds, the worst cell decides", bars)
    if skipped:
        harness.show("Skipped", [{"contender": n, "why": why} for n, why in skipped.items()])
    return bars


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short samples: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--peers", metavar="LIST", help="only these contenders, by comma")
    venv = os.environ.get("MOONCAKE_BENCH_PEERS")
    parser.add_argument("--peer-venv", default=venv, metavar="DIR", help="default: $MOONCAKE_BENCH_PEERS")
    parser.add_argument("--dir", metavar="DIR", help="on the disk to measure (default: the temporary folder)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    wanted = args.peers.split(",") if args.peers else [c.name for c in CONTENDERS]
    unknown = set(wanted) - {c.name for c in CONTENDERS}
    if unknown:
        raise ConfigError(
            f"--peers {','.join(unknown)}: choose among {', '.join(c.name for c in CONTENDERS)}"
        )
    pace = QUICK if args.quick else FULL
    cells = [c for c in CELLS if c.size in pace.sizes]
    pool_bytes = 1 << (min(POOL_BYTES_MAX, pace.pool_caches * cache_bytes()) - 1).bit_length()
    skipped: dict[str, str] = {}
    chosen = [c for c in CONTENDERS if c.name in wanted]
    with started(chosen, args, pool_bytes, skipped) as workers:
        names = [w.contender.name for w in workers]
        samples = measure(workers, cells, pace, skipped)
    bars = report(samples, names, skipped)
    result = {"pool_bytes": pool_bytes, "pace": asdict(pace), "bars": bars, "skipped": skipped}
    harness.save(args.json, {**result, "samples": [asdict(s) for s in samples]})


if __name__ == "__main__":
    main()
