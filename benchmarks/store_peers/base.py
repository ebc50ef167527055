"""What every store here does the same way: which objects, how many, and what is timed.

Objects are put once and read many times: before the first GET or EXISTS of a size its objects are filled in,
FILL_OBJECTS_MAX of them or a pool of them, the less of both. What a sample of PUT wrote is removed after it,
untimed. Reads end in memory that was touched and, where a store wants it, registered before; redis makes a
new bytes object instead (in its favour: nothing is copied twice).
"""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.transfer_peers.worker import Contender, pool

FILL_OBJECTS_MAX = 4096
PUT_BYTES_MAX = 96 << 20
"""Of one sample: it has to find room beside what was filled in, untouched by eviction."""
GOES_MAX = 1000
Go = Callable[[], object]
Check = Callable[[object], bool]


class StoreContender(Contender):
    """Subclasses fill `put`, `get`, `exists`, `remove`; each prepares a call, which is then timed."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local = pool(pool_bytes)
        self.local[:] = np.random.default_rng(1).integers(0, 256, pool_bytes, np.uint8)
        self.filled: dict[int, int] = {}
        self.turn = 0

    def put(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """Return a call that stores `size` bytes of `local` from each of `at`; it raises if it could not."""
        raise NotImplementedError

    def get(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """Return a call that reads into `local`; it raises if it could not."""
        raise NotImplementedError

    def exists(self, keys: Sequence[str]) -> Go:
        """Return a call that looks for keys that are there; it raises if one is not."""
        raise NotImplementedError

    def remove(self, keys: Sequence[str]) -> None:
        """Remove what was put."""
        raise NotImplementedError

    def first_byte(self, key: str, size: int) -> int:
        """Return the first byte of an object, as GET leaves it."""
        self.get([key], [0], size)()
        return int(self.local[0])

    def check(self) -> None:
        """Put an object and read it, before anything is measured."""
        size = 1 << 20
        self.local[:size] = 7
        self.put(["check"], [0], size)()
        self.local[:size] = 0
        if self.first_byte("check", size) != 7:
            raise RuntimeError("what came back is not what was put")
        self.remove(["check"])

    def names(self, size: int) -> int:
        """Have the objects of this size in the store; return how many there are, called f"{size}-{n}"."""
        if size not in self.filled:
            count = min(FILL_OBJECTS_MAX, self.pool_bytes // size)
            for start in range(0, count, 64):
                some = range(start, min(start + 64, count))
                self.put([f"{size}-{n}" for n in some], [n * size for n in some], size)()
            self.filled[size] = count
        return self.filled[size]

    def prepare(self, op: str, size: int, pages: int) -> tuple[Go, list[str]]:
        """Return the next call, and the keys that it puts."""
        self.turn += 1
        slots = self.pool_bytes // size
        at = [(self.turn * pages + page) % slots * size for page in range(pages)]
        if op == "PUT":
            keys = [f"put-{self.turn}-{page}" for page in range(pages)]
            return self.put(keys, at, size), keys
        count = self.names(size)
        step = int(count * 0.618) | 1
        keys = [f"{size}-{(self.turn * pages + page) * step % count}" for page in range(pages)]
        return (self.get(keys, at, size) if op == "GET" else self.exists(keys)), []

    def run(self, op: str, size: int, pages: int, for_s: float) -> dict[str, float]:
        """Call for about `for_s` seconds, after one or two calls that are not counted."""
        once_s, written = for_s, []
        for _ in range(2):
            go, keys = self.prepare(op, size, pages)
            written += keys
            started_s = time.perf_counter()
            go()
            once_s = min(once_s, time.perf_counter() - started_s)
        count = max(1, min(GOES_MAX, int(for_s / once_s)))
        if op == "PUT":
            count = min(count, max(1, PUT_BYTES_MAX // (size * pages)))
        goes = []
        for _ in range(count):
            go, keys = self.prepare(op, size, pages)
            goes.append(go)
            written += keys
        gc.collect()
        gc.disable()
        cpu_s = self.cpu_s()
        stamps = [time.perf_counter()]
        for go in goes:
            go()
            stamps.append(time.perf_counter())
        cpu_s = self.cpu_s() - cpu_s
        gc.enable()
        if written:
            self.remove(written)
        median_s, p99_s = (float(one) for one in np.percentile(np.diff(stamps), (50, 99)))
        seconds = stamps[-1] - stamps[0]
        return {"count": count, "seconds": seconds, "median_s": median_s, "p99_s": p99_s, "cpu_s": cpu_s}
