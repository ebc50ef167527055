"""A contender's process: obeys JSON lines on stdin, answers on stdout; its owner process is its child.

    {"op": "READ", "size": 262144, "pages": 128, "for_s": 0.2}
    -> {"count": 3, "seconds": 0.21, "median_s": 0.07, "cpu_s": 0.4}

The first line it writes says {"ready": true}; by then its pools are touched and a block has gone
there and come back unchanged. CPU seconds are those of initiator and owner, all threads.

Every contender walks through its pools in the same way: local pages in order, remote pages scattered,
both pools larger than the last-level cache, so nobody finds in a cache what was moved before.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

COUNT_MAX = 2000
"""Moves per sample: 4 KiB moves would else be planned by the hundred thousand."""
CHECK_BYTES = 1 << 20
CHECK_PAGES = 4
PAGE_BYTES = 4096


def pool(size_bytes: int) -> Bytes:
    """Return touched, page-aligned private memory."""
    raw = np.zeros(size_bytes + PAGE_BYTES, np.uint8)
    raw += 1
    start = -raw.ctypes.data % PAGE_BYTES
    return raw[start : start + size_bytes]


class Contender:
    """One way to move bytes between two pools. Subclasses fill `local` and `plan`."""

    owner: subprocess.Popen[str] | None = None
    local: Bytes

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """Start the owner, touch the pools, connect. `folder` is for files, on the disk to measure."""
        self.pool_bytes = pool_bytes
        self.folder = folder
        self.walked = 0

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """In the owner process: return what the initiator must know, and what to keep alive."""
        raise NotImplementedError

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """Return a call that moves the pages of `size` bytes at these offsets. Not timed."""
        raise NotImplementedError

    def start_owner(self) -> Any:
        """Start the owner process and return what it says of itself."""
        argv = [*sys.orig_argv[: sys.orig_argv.index("initiator")], "owner", *sys.argv[2:]]
        self.owner = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.owner.stdout is not None
        return json.loads(self.owner.stdout.readline())

    def offsets(self, size: int, pages: int) -> tuple[list[int], list[int]]:
        """Return the next local and remote offsets; equal sizes walk through the whole pool."""
        slots = self.pool_bytes // size
        step = int(slots * 0.618) | 1  # odd: meets every slot of a power of two
        first, self.walked = self.walked // size, self.walked + size * pages
        numbers = range(first, first + pages)
        return [n % slots * size for n in numbers], [n * step % slots * size for n in numbers]

    def check(self) -> None:
        """Move a block there and back and compare."""
        local = [i * CHECK_BYTES for i in range(CHECK_PAGES)]
        remote = [(CHECK_PAGES - i) * CHECK_BYTES for i in range(CHECK_PAGES)]
        area = self.local[: CHECK_BYTES * CHECK_PAGES]
        sent = np.random.default_rng(1).integers(0, 256, area.size, np.uint8)
        area[:] = sent
        self.plan("WRITE", CHECK_BYTES, local, remote)()
        area[:] = 0
        self.plan("READ", CHECK_BYTES, local, remote)()
        if not np.array_equal(area, sent):
            raise RuntimeError("what came back is not what was sent")

    def cpu_s(self) -> float:
        """Return CPU seconds of both processes so far."""
        own_s = time.process_time()
        # clock_getcpuclockid(3), which Python has no name for: nanoseconds, every thread
        return own_s + (time.clock_gettime((~self.owner.pid << 3) | 2) if self.owner else 0.0)

    def run(self, op: str, size: int, pages: int, for_s: float) -> dict[str, float]:
        """Move batches of `pages` pages for about `for_s` seconds, after one that is not counted."""

        def next_plan() -> Callable[[], object]:
            return self.plan(op, size, *self.offsets(size, pages))

        once_s = for_s
        for _ in range(2):
            first = next_plan()
            started_s = time.perf_counter()
            first()
            once_s = min(once_s, time.perf_counter() - started_s)
            if once_s > for_s / 4:
                break
        plans = [next_plan() for _ in range(max(1, min(COUNT_MAX, int(for_s / once_s))))]
        gc.collect()
        gc.disable()
        cpu_s = self.cpu_s()
        stamps = [time.perf_counter()]
        for plan in plans:
            plan()
            stamps.append(time.perf_counter())
        cpu_s = self.cpu_s() - cpu_s
        gc.enable()
        return {
            "count": len(plans),
            "seconds": stamps[-1] - stamps[0],
            "median_s": float(np.median(np.diff(stamps))),
            "cpu_s": cpu_s,
        }


def main() -> None:
    """Arguments: role, module, class, pool bytes, a folder on the disk to measure."""
    role, module, name, pool_bytes, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    path = module if "." in module else f"benchmarks.transfer_peers.{module}"
    kind: type[Contender] = getattr(importlib.import_module(path), name)
    if role == "owner":
        facts, kept = kind.own(int(pool_bytes))
        answers.write(json.dumps(facts) + "\n")
        sys.stdin.read()  # until the initiator ends
        del kept
    else:
        contender = kind(int(pool_bytes), Path(folder))
        contender.check()
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(contender.run(**json.loads(line))) + "\n")
        if contender.owner is not None:
            contender.owner.kill()
    os._exit(0)  # the pools' libraries may hang in their destructors: nothing is left to save
