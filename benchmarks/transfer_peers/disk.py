"""Reads of a file on an SSD: by transfer.file, and by a plain loop of O_DIRECT calls in threads."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.transfer_peers.worker import Contender, pool
from transfer.file import DirectFile, FileIO
from transfer.model import Opcode

THREADS = (4, 8, 16, 32)
"""The plain loop uses the fastest of these, found at its start."""
TRIES = 3
TRY = (256 << 10, 128)  # page bytes, pages


class File(Contender):
    """transfer.file with its defaults."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local = pool(pool_bytes)
        self.written = np.random.default_rng(3).integers(0, 256, pool_bytes, np.uint8)
        self.path = folder / type(self).__name__
        with self.path.open("wb") as file:
            file.write(self.written.data)
            os.fsync(file.fileno())
        self.open()

    def open(self) -> None:
        """Get ready to read `path`."""
        self.io, self.file = FileIO(), DirectFile.open(str(self.path))

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        requests = [(at, self.local[n : n + size].data) for n, at in zip(local, remote, strict=True)]
        return lambda: self.io.transfer(Opcode[op], self.file, requests)

    def check(self) -> None:
        """Read the file and compare."""
        self.local[:] = 0
        offsets = list(range(0, self.pool_bytes, TRY[0]))
        self.plan("READ", TRY[0], offsets, offsets)()
        if not np.array_equal(self.written, self.local):
            raise RuntimeError("what was read is not what was written")


class Plain(File):
    """Threads that take page after page."""

    def open(self) -> None:
        """See File."""
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        self.pool = ThreadPoolExecutor(max(THREADS))
        self.threads = min(THREADS, key=self.seconds)

    def seconds(self, threads: int) -> float:
        """Return the best time of some batches with so many threads."""
        self.threads, taken_s = threads, []
        for _ in range(TRIES):
            plan = self.plan("READ", TRY[0], *self.offsets(*TRY))
            started_s = time.perf_counter()
            plan()
            taken_s.append(time.perf_counter() - started_s)
        return min(taken_s)

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender; `op` is READ."""
        pages = [(at, self.local[n : n + size].data) for n, at in zip(local, remote, strict=True)]

        def loop(rest: Iterator[tuple[int, memoryview]]) -> None:
            for at, page in rest:  # a list's iterator gives each page to one thread
                if os.preadv(self.fd, [page], at) != size:
                    raise RuntimeError(f"short {op}")

        return lambda: list(self.pool.map(loop, [iter(pages)] * self.threads))
