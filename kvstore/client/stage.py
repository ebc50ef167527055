"""Registered memory for callers that have none: bytes of other hosts pass through it.

Memory that the caller has registered with the pool is read into and written from directly.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from mooncake.core.errors import CapacityError, PeerTimeout
from transfer.engine import TransferEngine
from transfer.model import Buffer

STAGE_BYTES = 32 << 20
"""At once: a batch that is larger passes in parts, an object that is larger gets memory of its own."""
BIG_BYTES_MAX = 4 << 30
"""An object that does not fit the stage and is larger than this has to be put from registered memory."""

Range = tuple[int, int]
"""(address, size_bytes) in registered memory."""


class Stage:
    """One buffer of an engine, used by one caller at a time. Made with the first use."""

    def __init__(self, engine: TransferEngine) -> None:
        """`engine` is not closed here; its end frees the buffer."""
        self._engine = engine
        self._lock = threading.Lock()
        self._buffer: Buffer | None = None

    @contextlib.contextmanager
    def room(self, size_bytes: int, end_s: float) -> Iterator[Buffer]:
        """Yield a buffer of at least `size_bytes`, for this caller alone.

        Raises:
            PeerTimeout: others use it until `end_s`.
            CapacityError: an object larger than BIG_BYTES_MAX.
        """
        if size_bytes > BIG_BYTES_MAX:
            raise CapacityError(f"{size_bytes} bytes through a stage: register the memory instead")
        if not self._lock.acquire(timeout=max(0.0, end_s - time.monotonic())):
            raise PeerTimeout("others are using the staging memory")
        try:
            if size_bytes > STAGE_BYTES:
                big = self._engine.allocate(size_bytes)
                try:
                    yield big
                finally:
                    self._engine.unregister(big)
            else:
                if self._buffer is None:
                    self._buffer = self._engine.allocate(STAGE_BYTES)
                yield self._buffer
        finally:
            self._lock.release()

    def direct(self, parts: Sequence[memoryview]) -> list[Range] | None:
        """Return where `parts` lie, if all of it is registered already."""
        ranges: list[Range] = []
        for part in parts:
            if not part.nbytes:
                continue
            address = int(np.frombuffer(part, np.uint8).__array_interface__["data"][0])
            buffer = self._engine.buffer_at(address)
            if buffer is None or address + part.nbytes > buffer.end:
                return None
            ranges.append((address, part.nbytes))
        return ranges or None


def batches(rows: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield `rows` in order, as many at once as fit the stage; one alone that does not."""
    batch: list[int] = []
    used = 0
    for row in rows:
        if batch and used + sizes[row] > STAGE_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += sizes[row]
    if batch:
        yield batch
