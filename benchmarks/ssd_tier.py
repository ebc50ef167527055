"""How much of the disk the SSD tier leaves: its get and put against plain loops of O_DIRECT calls.

Every round visits every contender, each time beginning with another. The tier's read includes the
checksum of every block; its write includes headers and the syncs at the beginning of segments (checksums
come with a block, so they are made beforehand). The loops are threads that call preadv or pwritev on
page-aligned memory, nothing else; the one with the best median counts. A ratio is taken inside a round,
the median of all rounds is reported. Files are filled once before, so that no extent is new.
"""

import argparse
import contextlib
import itertools
import logging
import mmap
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from benchmarks import harness
from kvstore.ssd.tier import Put, SsdConfig, SsdTier
from mooncake.core.keys import block_checksum
from transfer.file import FileIO

KIB, MIB = 1 << 10, 1 << 20
SIZES = (256 * KIB, MIB, 4 * MIB)
THREADS = (8, 16, 32)
BATCH_BYTES = 64 * MIB
"""Of one get_many or put_many: a prompt's blocks."""
ROUNDS, QUICK_ROUNDS = 15, 5
FILE_BYTES, QUICK_FILE_BYTES = 2 << 30, 512 * MIB
SEGMENT_BYTES = 64 * MIB
BARS = {"READ": 0.8, "WRITE": None}
RECOVERY_OBJECTS = 16_384
RECOVERY_SEGMENT_BYTES = 32 * MIB
Go = Callable[[], None]


class Tier:
    """The production tier, filled with objects of one size."""

    name = "tier"

    def __init__(self, folder: Path, size: int, file_bytes: int, io: FileIO) -> None:
        """Make and fill it."""
        path = str(folder / "tier")
        config = SsdConfig(
            node="bench",
            path=path,
            capacity_bytes=file_bytes,
            segment_bytes=SEGMENT_BYTES,
            object_bytes=size,
        )
        self.tier = SsdTier.open(config, io)
        self.size = size
        self.numbers = itertools.count()
        # a block's first bytes differ, so its checksum does: the disk cannot be clever
        self.views = _views(size, BATCH_BYTES // size)
        for _ in range(2 * file_bytes // BATCH_BYTES):  # twice: segments are being reused from now on
            self.write()()

    def write(self) -> Go:
        """Return a put of one batch of new objects."""
        items = []
        for view in self.views:
            key = next(self.numbers).to_bytes(8, "little") * 4
            view[:32] = key
            items.append(Put(key, view, block_checksum(key, view)))

        def go() -> None:
            problems = [error for error in self.tier.put_many(items) if error is not None]
            if problems:
                raise problems[0]

        return go

    def read(self) -> Go:
        """Return a get of one batch of objects at random."""
        keys = random.Random(next(self.numbers)).sample(self.tier.keys(), len(self.views))
        wanted = list(zip(keys, self.views, strict=True))

        def go() -> None:
            if not all(got.hit for got in self.tier.get_many(wanted)):
                raise RuntimeError("the tier did not serve what it holds")

        return go

    def close(self) -> None:
        """Close it."""
        self.tier.close()


class Loop:
    """Threads that take block after block."""

    def __init__(self, fd: int, threads: int, size: int, file_bytes: int) -> None:
        """Use the open file `fd`."""
        self.name = f"x{threads}"
        self.fd, self.threads, self.size, self.file_bytes = fd, threads, size, file_bytes
        self.pool = ThreadPoolExecutor(threads)
        self.views = _views(size, BATCH_BYTES // size)
        self.seeds = itertools.count()

    def write(self) -> Go:
        """Return a write of one batch, one block behind the other from a random place on."""
        room = self.file_bytes // self.size - len(self.views)
        first = random.Random(next(self.seeds)).randrange(room) * self.size
        return self._go(os.pwritev, [first + i * self.size for i in range(len(self.views))])

    def read(self) -> Go:
        """Return a read of one batch at random places."""
        places = random.Random(next(self.seeds)).sample(range(self.file_bytes // self.size), len(self.views))
        return self._go(os.preadv, [place * self.size for place in places])

    def _go(self, call: Callable[[int, list[memoryview], int], int], offsets: list[int]) -> Go:
        def loop(rest: Iterator[tuple[int, memoryview]]) -> None:
            for offset, view in rest:  # a list's iterator gives each block to one thread
                if call(self.fd, [view], offset) != self.size:
                    raise RuntimeError("short access")

        blocks = list(zip(offsets, self.views, strict=True))
        return lambda: [*self.pool.map(loop, [iter(blocks)] * self.threads)].clear()

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()


def _views(size: int, count: int) -> list[memoryview]:
    """Return page-aligned memory, touched, with bytes that do not repeat."""
    pool = memoryview(mmap.mmap(-1, size * count))
    pool[:] = random.Random(size).randbytes(size * count)
    return [pool[i * size : (i + 1) * size] for i in range(count)]


@contextlib.contextmanager
def contenders(folder: Path, size: int, file_bytes: int, io: FileIO) -> Iterator[list[Tier | Loop]]:
    """Yield the tier and the loops over files of the same size."""
    path = folder / "plain"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    open_ones: list[Tier | Loop] = []
    try:
        page = _views(BATCH_BYTES, 1)[0]
        os.posix_fallocate(fd, 0, file_bytes)
        for offset in range(0, file_bytes, BATCH_BYTES):
            os.pwritev(fd, [page], offset)
        open_ones.append(Tier(folder, size, file_bytes, io))
        open_ones += [Loop(fd, threads, size, file_bytes) for threads in THREADS]
        yield open_ones
    finally:
        for each in open_ones:
            each.close()
        os.close(fd)
        path.unlink()
        with contextlib.suppress(FileNotFoundError):
            (folder / "tier" / "objects").unlink()


def judge(op: str, size: int, gb_s: dict[str, list[float]]) -> dict[str, Any]:
    """Return the row of one cell: medians, and the median of the ratios to the best loop."""
    medians = {name: statistics.median(values) for name, values in gb_s.items()}
    best = max((name for name in gb_s if name != Tier.name), key=lambda name: medians[name])
    ratios = [mine / other for mine, other in zip(gb_s[Tier.name], gb_s[best], strict=True)]
    ratio, bar = statistics.median(ratios), BARS[op]
    return {
        "op": op,
        "KiB": size // KIB,
        "tier GB/s": medians[Tier.name],
        "loop GB/s": medians[best],
        "threads": best,
        "ratio": ratio,
        "least": min(ratios),
        "most": max(ratios),
        "bar": "-" if bar is None else f"{bar} met" if ratio >= bar else f"{bar} MISSED",
    }


def measure(folder: Path, size: int, file_bytes: int, rounds: int, io: FileIO) -> list[dict[str, Any]]:
    """Return the rows of one block size."""
    rows = []
    with contenders(folder, size, file_bytes, io) as all_of_them:
        for op in ("READ", "WRITE"):
            gb_s: dict[str, list[float]] = {each.name: [] for each in all_of_them}
            for turn in range(rounds):
                first = turn % len(all_of_them)
                for each in all_of_them[first:] + all_of_them[:first]:
                    go = each.read() if op == "READ" else each.write()
                    started_s = time.perf_counter()
                    go()
                    gb_s[each.name].append(BATCH_BYTES / (time.perf_counter() - started_s) / 1e9)
            rows.append(judge(op, size, gb_s))
    return rows


def recovery(folder: Path, io: FileIO) -> dict[str, Any]:
    """Return how long a start takes with many small objects, whose headers are as large as they."""
    config = SsdConfig(
        node="bench",
        path=str(folder / "recovery"),
        capacity_bytes=3 * RECOVERY_OBJECTS * 4096,
        segment_bytes=RECOVERY_SEGMENT_BYTES,
        object_bytes=2 * 4096,
    )
    tier = SsdTier.open(config, io)
    view = _views(4096, 1)[0]
    for first in range(0, RECOVERY_OBJECTS, 1024):
        keys = [number.to_bytes(8, "little") * 4 for number in range(first, first + 1024)]
        tier.put_many([Put(key, view, block_checksum(key, view)) for key in keys])
    tier.close()
    started_s = time.perf_counter()
    tier = SsdTier.open(config, io)
    taken_s = time.perf_counter() - started_s
    found = tier.recovered.objects
    tier.close()
    return {"objects": found, "s": taken_s, "objects/s": found / taken_s}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small files, few rounds: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--dir", metavar="DIR", help="on the disk to measure (default: the temporary folder)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    file_bytes = QUICK_FILE_BYTES if args.quick else FILE_BYTES
    rows = []
    io = FileIO()
    with (
        harness.progress(len(SIZES) + 1) as begin,
        tempfile.TemporaryDirectory(prefix="bench-ssd-", dir=args.dir) as folder,
    ):
        for size in SIZES:
            begin(f"blocks of {size // KIB} KiB")
            rows += measure(Path(folder), size, file_bytes, rounds, io)
        begin("recovery")
        start = recovery(Path(folder), io)
    io.close()
    harness.show(f"SSD tier: medians of {rounds} rounds, batches of {BATCH_BYTES // MIB} MiB", rows)
    harness.show("Start, headers read and the newest two segments verified", [start])
    harness.save(args.json, {"rounds": rounds, "file_bytes": file_bytes, "rows": rows, "start": start})


if __name__ == "__main__":
    main()
