"""Many reads and writes of files at once: the road to the SSD tier (DESIGN 7, file).

A fixed number of threads make blocking O_DIRECT calls, which release the interpreter lock. io_uring
was measured and is no faster at KV block sizes. Use one FileIO per disk: a stuck disk then holds up
its own threads only.

    io = FileIO(threads=16)
    file = DirectFile.open("/ssd/log", write=True, create=True, size_bytes=1 << 30)
    batch = io.submit(Opcode.WRITE, file, [(0, page), (4096, [page, page])], deadline_s=5.0)
    errors = batch.wait()

Memory safety: a request that has begun cannot be called back from the kernel. Cancelling, or passing
the deadline, stops only what has not begun; the batch is *settled* when the rest has ended. Until then
the memory in `FileBatch.unsettled` may still be written to: keep it from any other use.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    RequestError,
)
from transfer.file_disk import Bounce, DirectFile, address_of, size_of
from transfer.model import Opcode

__all__ = ["DirectFile", "FileBatch", "FileIO", "Request"]

THREADS = 16
"""Requests inside the disk at once: 8 nearly reach the bandwidth at 256 KiB, 32 add little."""
THREADS_MAX = 256
"""Each costs a stack and a bounce buffer; no disk gains from more."""
IN_FLIGHT_BYTES_MAX = 4 << 30
"""Accepted and not ended. At the 2 GB/s of a slow SSD this is 2 s of work: more is better refused."""
OFFSET_MAX = 1 << 63
"""Of the system calls."""
MEMORY_NAMED_MAX = 4
"""Ranges that an error message names."""

Request: TypeAlias = tuple[int, memoryview | Sequence[memoryview]]
"""(offset in the file, memory): one range of the file; several views are its bytes in order."""


class FileBatch:
    """Requests that were submitted together. Made by FileIO.submit, whose lock guards all that changes."""

    def __init__(
        self, io: "FileIO", op: Opcode, file: DirectFile, requests: Sequence[Request], deadline_s: float
    ) -> None:
        """See FileIO.submit."""
        self.op = op
        self.file = file
        self.end_s = time.monotonic() + deadline_s
        self.requests = [(offset, _views(op, file, offset, memory)) for offset, memory in requests]
        self.sizes = [size_of(views) for _, views in self.requests]
        self.errors: dict[int, MooncakeError] = {}
        """By the request's index; complete when the batch is settled."""
        self._io = io
        self._next = 0  # the first request that has not begun
        self._running: set[int] = set()
        self._settled = threading.Event()
        self._wakers: list[Callable[[], None]] = []

    def done(self) -> bool:
        """Return whether nothing is under way or will begin: the memory is the caller's again."""
        return self._settled.is_set()

    @property
    def unsettled(self) -> list[memoryview]:
        """The memory that the disk may still read or write."""
        with self._io.lock:
            return [view for index in sorted(self._running) for view in self.requests[index][1]]

    def cancel(self) -> None:
        """Begin no more requests; those get PeerGone. What has begun goes on: `wait` for it."""
        with self._io.lock:
            self._drop(PeerGone("cancelled before it began"))

    def wait(self, timeout_s: float | None = None) -> dict[int, MooncakeError]:
        """Return the errors of the requests that failed, by index, once the batch is settled.

        Args:
            timeout_s: how long to wait; default: until the batch's deadline.

        Raises:
            PeerTimeout: not settled: `unsettled` memory must not be used for anything else. When the
                deadline has passed, what has not begun never will. Waiting again is allowed.
        """
        end_s = self.end_s if timeout_s is None else time.monotonic() + timeout_s
        if not self._settled.wait(_left_s(min(end_s, self.end_s))):
            self._expire()
            self._settled.wait(_left_s(end_s))
        return self._result()

    async def finished(self, timeout_s: float | None = None) -> dict[int, MooncakeError]:
        """Do as `wait` without blocking the event loop.

        Cancelling the awaiting task does not cancel the batch: `cancel` it and `wait` before its memory
        is used again.
        """
        end_s = self.end_s if timeout_s is None else time.monotonic() + timeout_s
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(event.set)

        with self._io.lock:
            self._wakers.append(wake)
            if self.done():
                event.set()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), _left_s(min(end_s, self.end_s)))
            if not event.is_set():
                self._expire()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), _left_s(end_s))
        finally:
            with self._io.lock:
                self._wakers.remove(wake)
        return self._result()

    def _expire(self) -> None:
        with self._io.lock:
            if time.monotonic() >= self.end_s:
                self._drop(PeerTimeout("deadline passed before it began"))

    def _result(self) -> dict[int, MooncakeError]:
        if self.done():
            return self.errors
        memory = [f"{address_of(view):#x}+{view.nbytes}" for view in self.unsettled[:MEMORY_NAMED_MAX]]
        raise PeerTimeout(
            f"{self.op.name.lower()} {self.file.path}: not settled; the disk may still use the memory at "
            f"{', '.join(memory) or 'none yet'} and {max(0, len(self._running) - len(memory))} more"
        )

    # ------------------------------------------------------------ called with the io's lock held

    def _begin(self) -> int:
        index, self._next = self._next, self._next + 1
        self._running.add(index)
        return index

    def _end(self, index: int, error: MooncakeError | None) -> None:
        self._running.discard(index)
        self._io.in_flight_bytes -= self.sizes[index]
        if error is not None:
            self.errors[index] = error
        self._settle_if_ended()

    def _drop(self, error: MooncakeError) -> None:
        """End what has not begun (idempotent)."""
        for index in range(self._next, len(self.requests)):
            self.errors[index] = error
            self._io.in_flight_bytes -= self.sizes[index]
        self._next = len(self.requests)
        self._io.forget(self)
        self._settle_if_ended()

    def _settle_if_ended(self) -> None:
        if self._next == len(self.requests) and not self._running and not self.done():
            self.file.release()
            self._settled.set()
            for wake in self._wakers:
                wake()


class FileIO:
    """A bounded pool of threads that read and write files. Methods may be called from any thread."""

    def __init__(self, threads: int = THREADS, in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX) -> None:
        """Start the threads.

        Args:
            threads: requests that are inside the disk at once.
            in_flight_bytes_max: of all requests that are accepted and have not ended.

        Raises:
            ConfigError: a bad number.
        """
        if not 0 < threads <= THREADS_MAX:
            raise ConfigError(f"file io threads={threads}: must be 1 to {THREADS_MAX}")
        if in_flight_bytes_max <= 0:
            raise ConfigError(f"file io in_flight_bytes_max={in_flight_bytes_max}: must be positive")
        self.in_flight_bytes_max = in_flight_bytes_max
        self.in_flight_bytes = 0
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)
        self._queue: deque[FileBatch] = deque()  # those with requests that have not begun
        self._closed = False
        # daemons: a thread that a stuck disk holds must not keep the process from ending
        self._threads = [
            threading.Thread(target=self._run, name=f"file-io-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, op: Opcode, file: DirectFile, requests: Sequence[Request], deadline_s: float = 30.0
    ) -> FileBatch:
        """Take `requests`; returns at once.

        Args:
            op: READ = file -> memory, WRITE = memory -> file.
            file: stays open until they have ended, whatever happens.
            requests: begun in this order, done in any: they must not overlap in file or memory.
            deadline_s: what has not begun by then never will.

        Raises:
            RequestError: a bad range or memory, read-only memory or file, closed file or FileIO.
            CapacityError: more than `in_flight_bytes_max` with what is under way; nothing was taken.
        """
        if op is Opcode.WRITE and not file.writable:
            raise RequestError(f"write {file.path}: opened for reading only")
        batch = FileBatch(self, op, file, requests, deadline_s)
        size = sum(batch.sizes)
        with self.lock:
            if self._closed:
                raise RequestError(f"{op.name.lower()} {file.path}: the file io is closed")
            if self.in_flight_bytes + size > self.in_flight_bytes_max:
                raise CapacityError(
                    f"{op.name.lower()} {file.path}: {size} bytes and {self.in_flight_bytes} in flight are "
                    f"more than {self.in_flight_bytes_max}; wait for some, or split the batch"
                )
            file.hold()
            self.in_flight_bytes += size
            self._queue.append(batch)
            self._work.notify(len(batch.requests))
            if not batch.requests:
                batch._drop(PeerGone("empty"))  # settles it; there is no request to tell
        return batch

    def transfer(
        self, op: Opcode, file: DirectFile, requests: Sequence[Request], deadline_s: float = 30.0
    ) -> None:
        """Submit and wait.

        Raises:
            MooncakeError: as `submit` and `wait`, or the first request's that failed.
        """
        errors = self.submit(op, file, requests, deadline_s).wait()
        if errors:
            raise errors[min(errors)]

    def close(self, deadline_s: float = 10.0) -> None:
        """Drop what has not begun, wait for the rest, end the threads (idempotent).

        Raises:
            PeerTimeout: a stuck disk still holds threads, and the memory of their requests.
        """
        end_s = time.monotonic() + deadline_s
        with self.lock:
            self._closed = True
            for batch in list(self._queue):
                batch._drop(PeerGone("the file io was closed before it began"))
            self._work.notify_all()
        for thread in self._threads:
            thread.join(_left_s(end_s))
        stuck = sum(thread.is_alive() for thread in self._threads)
        if stuck:
            raise PeerTimeout(f"{stuck} file io threads are still inside the disk after {deadline_s} s")

    def forget(self, batch: FileBatch) -> None:
        """For FileBatch, under the lock: nothing of it will begin."""
        with contextlib.suppress(ValueError):
            self._queue.remove(batch)

    def _run(self) -> None:
        bounce = Bounce()
        while (job := self._take()) is not None:
            batch, index = job
            error: MooncakeError | None = None
            try:
                offset, views = batch.requests[index]
                batch.file.move(batch.op, offset, views, bounce)
            except MooncakeError as caught:
                error = caught
            except BaseException:
                error = MooncakeError("file io: a thread died, see its traceback")
                raise
            finally:
                with self.lock:
                    batch._end(index, error)
            del job, batch, views  # an idle thread holds nobody's memory

    def _take(self) -> tuple[FileBatch, int] | None:
        """Return the next request; None when closed. Waits while there is none."""
        with self.lock:
            while True:
                while self._queue:
                    batch = self._queue[0]
                    if time.monotonic() >= batch.end_s:
                        batch._drop(PeerTimeout("deadline passed before it began"))
                        continue
                    index = batch._begin()
                    if batch._next == len(batch.requests):
                        self._queue.popleft()
                    return batch, index
                if self._closed:
                    return None
                self._work.wait()


def _left_s(end_s: float) -> float:
    return max(0.0, end_s - time.monotonic())


def _views(
    op: Opcode, file: DirectFile, offset: int, memory: memoryview | Sequence[memoryview]
) -> list[memoryview]:
    """Return the memory of one request as byte views, checked."""
    views = [memory] if isinstance(memory, memoryview) else [view for view in memory if view.nbytes]
    size = size_of(views)
    wrong = ""
    if not size or not 0 <= offset < OFFSET_MAX - size:
        wrong = "not a range of at least one byte in a file"
    for view in views:
        if not view.c_contiguous:
            wrong = "memory must be contiguous; pass several views instead"
        elif view.readonly and op is Opcode.READ:
            wrong = "into read-only memory"
    if wrong:
        raise RequestError(f"{op.name.lower()} {file.path} at {offset}+{size}: {wrong}")
    return [view.cast("B") for view in views]
