"""A batch of transfers under way: waited for, polled, awaited, cancelled; and how it is cut into parts."""

import asyncio
import threading
from collections.abc import Callable, Sequence

from mooncake.core.errors import MooncakeError, PeerTimeout
from transfer.model import Call, Failure, Opcode, Slice

QUIESCE_S = 5.0
"""After its deadline a batch ends within this, unless a machine is stopped: ticks, fences, a copied piece."""
CUT_BYTES = 4096
"""Long slices are cut at multiples of a page."""


class Batch:
    """Transfers of one direction to one peer. Made by TransferEngine.submit.

    It is *settled* when every transfer is done or has failed and nothing is in flight: until then the
    local memory must not be reused. A failed WRITE may have moved some of its bytes.
    """

    def __init__(self, op: Opcode, size_bytes: int, count: int, call: Call) -> None:
        """`count` transfers of `size_bytes` in all."""
        self.op = op
        self.size_bytes = size_bytes
        self.count = count
        self.call = call
        self.errors: dict[int, MooncakeError] = {}
        """By position among the transfers; complete once settled."""
        self._lock = threading.Lock()
        self._done = False
        self._latch = threading.Lock()  # held until settled: a tenth of an Event's price
        self._latch.acquire()
        self._callbacks: list[Callable[[], None]] = []
        self._parts = 0

    def done(self) -> bool:
        """Return whether the batch is settled."""
        return self._done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the batch is settled, at most `timeout_s`; return whether it is.

        None waits for the batch's own deadline and QUIESCE_S. False then means that a machine is
        stopped or a driver stuck: keep the memory out of use until `done`.
        """
        if timeout_s is None:
            timeout_s = self.call.left_s() + QUIESCE_S
        if not self._done and self._latch.acquire(timeout=max(timeout_s, 0.0)):
            self._latch.release()  # for the next who waits
        return self._done

    async def finished(self) -> bool:
        """As `wait`, on the running event loop."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(woken.set)

        self.on_settled(wake)
        try:
            await asyncio.wait_for(woken.wait(), self.call.left_s() + QUIESCE_S)
        except TimeoutError:
            return False
        return True

    def check(self) -> None:
        """Raise what went wrong.

        Raises:
            PeerTimeout: not settled yet.
            MooncakeError: the error of the first transfer that failed.
        """
        if not self.done():
            raise PeerTimeout("the batch is still under way: its memory must stay out of use")
        if self.errors:
            raise self.errors[min(self.errors)]

    def cancel(self) -> None:
        """Stop as soon as that is safe (idempotent); `wait` tells when it is settled."""
        self.call.cancel()

    def on_settled(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once the batch is settled, at once if it is; it must not block."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback()

    def fail(self, failures: Sequence[Failure]) -> None:
        """Record failures: the first error of each transfer."""
        with self._lock:
            for failure in failures:
                self.errors.setdefault(failure.slice.index, failure.error)

    def begin(self, parts: int) -> None:
        """Say how many parts will end."""
        self._parts = parts
        if not parts:
            self._settle()

    def part_ended(self) -> None:
        """One part has nothing in flight any more."""
        with self._lock:
            self._parts -= 1
            if self._parts:
                return
        self._settle()

    def _settle(self) -> None:
        with self._lock:
            self._done = True
            self._latch.release()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


def divide(slices: Sequence[Slice], parts: int) -> list[list[Slice]]:
    """Cut `slices`, in order, into at most `parts` lists of about the same number of bytes."""
    total = sum(piece.size_bytes for piece in slices)
    share = -(-total // max(parts, 1))
    share += -share % CUT_BYTES
    out: list[list[Slice]] = [[]]
    room = share
    for piece in slices:
        start = 0
        while piece.size_bytes - start > room:
            if room:
                out[-1].append(piece.part(start, room))
                start += room
            out.append([])
            room = share
        out[-1].append(piece if start == 0 else piece.part(start, piece.size_bytes - start))
        room -= piece.size_bytes - start
    return [part for part in out if part]
