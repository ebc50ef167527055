"""Copies of much memory go in several threads: one core does not fill a memory's channels."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from kvstore.client.model import fill
from kvstore.engine.link import StoreLink
from mooncake.core.errors import PeerTimeout
from mooncake.core.keys import block_checksum

T = TypeVar("T")
R = TypeVar("R")

LANE_BYTES = 2 << 20
"""Work for one more thread: less is done sooner than handed over."""
LANES_MAX = 4


class Lanes:
    """The threads of one store's client. Thread-safe."""

    def __init__(self) -> None:
        """No thread is started before it is needed."""
        self._count = min(LANES_MAX, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="pool-copy")

    def run(self, work: Callable[[Sequence[T]], R], items: Sequence[T], total_bytes: int) -> list[R]:
        """Return what `work` answers to parts of `items`, in order; several at once where that pays.

        Nothing is under way any more when this returns or raises: memory may be given up then.
        """
        lanes = min(self._count, total_bytes // LANE_BYTES, len(items))
        if lanes < 2:
            return [work(items)]
        step = -(-len(items) // lanes)
        waits = [self._threads.submit(work, items[at : at + step]) for at in range(step, len(items), step)]
        try:
            first = work(items[:step])
        finally:
            wait(waits)
        return [first, *(one.result() for one in waits)]

    def write(
        self,
        link: StoreLink,
        keys: Sequence[bytes],
        sources: Sequence[Sequence[memoryview]],
        sizes: Sequence[int],
        offsets: Sequence[int],
        rows: Sequence[int],
        end_s: float,
    ) -> list[bytes]:
        """Copy these rows of `sources` to `offsets` of a store's segment; return their checksums.

        Raises:
            PeerTimeout: the deadline passed.
        """
        memory = link.segment.view(0, link.segment.size_bytes)

        def work(some: Sequence[int]) -> list[bytes]:
            sums = []
            for row in some:
                if time.monotonic() > end_s:
                    raise PeerTimeout(f"store {link.record.node}: the deadline passed while writing")
                target = memory[offsets[row] : offsets[row] + sizes[row]]
                fill(target, sources[row])
                sums.append(block_checksum(keys[row], target))
            return sums

        parts = self.run(work, rows, sum(sizes[row] for row in rows))
        return [one for part in parts for one in part]

    def close(self) -> None:
        """Start nothing more (idempotent)."""
        self._threads.shutdown(wait=False)
