"""GPU memory, seen from the host: what a driver must do, and staging where no NIC reaches it directly.

The best path is none of this: the NIC reads and writes device memory itself (GPUDirect), by
`export_dmabuf` or by registering the device address. Where that is refused, a `Stager` moves the bytes
through pinned host memory in chunks, so that the device copies one chunk while the network carries
another.

`transfer.device_cuda` implements the protocol with NVIDIA's driver; `transfer.device_fake` without a GPU.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeAlias

import structlog

from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerTimeout, RequestError
from transfer.model import Call

CHUNK_BYTES = 4 << 20
"""Long enough that a copy takes far longer than starting it: 4 MiB are 80 us at PCIe 5's 50 GB/s."""
CHUNKS = 4
"""Pinned at once, by all callers together: two at full pipeline."""
DEPTH = 2
"""Chunks one call has at a time: one in the device's hands, one in the network's."""
SETTLE_S = 1.0
"""How long a failed call waits for each copy that it had started; a healthy device needs a millisecond."""
RECHECK_S = 0.1
"""How often a caller who waits for a chunk looks whether it was cancelled, or a stuck copy has ended."""

log = structlog.get_logger(__name__)


class HostMemory(NamedTuple):
    """Pinned memory of this process: the device can read and write it while the host goes on."""

    address: int
    view: memoryview


class DeviceCopy(Protocol):
    """A copy that was started."""

    def wait(self, timeout_s: float) -> bool:
        """Return True once it has ended, False if it is still under way after `timeout_s`.

        Raises:
            MooncakeError: it has ended, and failed.
        """


class DeviceMemory(Protocol):
    """One kind of accelerator. Methods are called from several threads at once.

    Copies are ordered neither among each other nor after the work that computes what they copy: the
    caller has to know that device memory is complete before it is read, and unused before it is written.
    """

    def device_of(self, address: int) -> str | None:
        """Return the location ("cuda:1") of the device whose memory `address` is, None for host memory."""

    def allocate_host(self, size_bytes: int, near: int) -> HostMemory:
        """Return pinned memory that every device can use, for `free_host`.

        Args:
            size_bytes: of it.
            near: address of device memory that it will mostly serve.

        Raises:
            CapacityError: no more memory can be pinned.
        """

    def free_host(self, memory: HostMemory) -> None:
        """Free what `allocate_host` returned; nobody uses it."""

    def copy_to_host(self, host: int, device: int, size_bytes: int) -> DeviceCopy:
        """Start copying `size_bytes` from device address `device` to pinned host address `host`.

        Raises:
            RequestError: `device` is not device memory.
            MooncakeError: it could not be started; nothing is under way.
        """

    def copy_from_host(self, device: int, host: int, size_bytes: int) -> DeviceCopy:
        """Start copying from pinned host address `host` to device address `device`; see `copy_to_host`."""

    def export_dmabuf(self, address: int, size_bytes: int) -> tuple[int, int] | None:
        """Return a dma-buf descriptor (now the caller's) and the offset of `address` in it.

        None: this device, driver or range has none. A NIC registers it to reach the memory itself.
        """

    def close(self) -> None:
        """Give everything back (idempotent)."""


Sink: TypeAlias = Callable[[memoryview, int], None]
"""Called with (bytes, their offset in the range). When it returns or raises, it uses the memory no more."""
Source: TypeAlias = Callable[[memoryview, int], None]
"""Fills (memory, with the bytes at that offset in the range); the same promise."""


class _Flight(NamedTuple):
    """A chunk that the device is copying from or to."""

    chunk: HostMemory
    offset: int
    size_bytes: int
    copy: DeviceCopy


class Stager:
    """Moves device memory through a few pinned chunks that all callers share. Thread-safe.

    Whatever fails, the chunks come back, with one exception: a copy that does not end within SETTLE_S
    keeps its chunk until it does, since the device may still write there.
    """

    def __init__(self, device: DeviceMemory, chunk_bytes: int = CHUNK_BYTES, chunks: int = CHUNKS) -> None:
        """Of at most `chunks` x `chunk_bytes`, which are pinned when they are first needed.

        Raises:
            ConfigError: a bad number.
        """
        if chunk_bytes <= 0 or chunks <= 0:
            raise ConfigError(f"staging of {chunks} x {chunk_bytes} bytes: both must be positive")
        self.chunk_bytes = chunk_bytes
        self._device = device
        self._changed = threading.Condition()
        self._closed = False
        self._chunks_max = chunks
        self._chunks: list[HostMemory] = []
        self._free: list[HostMemory] = []
        self._stuck: list[_Flight] = []

    @property
    def used_chunks(self) -> int:
        """How many are in somebody's hands."""
        with self._changed:
            self._reclaim()
            return len(self._chunks) - len(self._free)

    def stage_out(self, address: int, size_bytes: int, sink: Sink, call: Call) -> None:
        """Give the device's bytes to `sink`, chunk by chunk in order.

        Args:
            address: of the device.
            size_bytes: from there.
            sink: called in this thread while the device copies the next chunk.
            call: deadline and cancellation.

        Raises:
            PeerTimeout, PeerGone: deadline or cancellation, before all was given.
            CapacityError: not a single chunk can be pinned.
            MooncakeError: the device's. Errors of `sink` come through as they are.
        """
        flying: deque[_Flight] = deque()
        at = 0
        try:
            while at < size_bytes or flying:
                while at < size_bytes and len(flying) < DEPTH:
                    chunk = self._take(address, call, wait=not flying)
                    if chunk is None:
                        break
                    part = min(self.chunk_bytes, size_bytes - at)
                    with self._returned_on_error(chunk):
                        copy = self._device.copy_to_host(chunk.address, address + at, part)
                    flying.append(_Flight(chunk, at, part, copy))
                    at += part
                _await_copy(flying[0], call)
                sink(flying[0].chunk.view[: flying[0].size_bytes], flying[0].offset)
                self._put(flying.popleft().chunk)
        finally:
            self._abandon(flying)

    def stage_in(self, address: int, size_bytes: int, source: Source, call: Call) -> None:
        """Fill the device's bytes from `source`, chunk by chunk in order.

        Args:
            address: of the device.
            size_bytes: from there.
            source: called in this thread while the device copies the chunk before.
            call: deadline and cancellation.

        Raises:
            PeerTimeout, PeerGone, MooncakeError: as `stage_out`; the range is then partly written.
        """
        flying: deque[_Flight] = deque()
        try:
            for at in range(0, size_bytes, self.chunk_bytes):
                chunk = None
                while chunk is None:
                    if len(flying) < DEPTH:
                        chunk = self._take(address, call, wait=not flying)
                    if chunk is None:
                        _await_copy(flying[0], call)
                        self._put(flying.popleft().chunk)
                part = min(self.chunk_bytes, size_bytes - at)
                with self._returned_on_error(chunk):
                    source(chunk.view[:part], at)
                    copy = self._device.copy_from_host(address + at, chunk.address, part)
                flying.append(_Flight(chunk, at, part, copy))
            while flying:
                _await_copy(flying[0], call)
                self._put(flying.popleft().chunk)
        finally:
            self._abandon(flying)

    def close(self, deadline_s: float = 10.0) -> None:
        """Take no more chunks (calls under way fail), wait for those in use, unpin (idempotent).

        Raises:
            PeerTimeout: some chunks are still in use; all stay pinned, ask again later.
        """
        end_s = time.monotonic() + deadline_s
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._reclaim()
            while len(self._free) < len(self._chunks):
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    used = len(self._chunks) - len(self._free)
                    raise PeerTimeout(f"{used} chunks of pinned memory are still in use after {deadline_s} s")
                self._changed.wait(min(left_s, RECHECK_S))
                self._reclaim()
            chunks, self._chunks, self._free = self._chunks, [], []
        for chunk in chunks:
            self._device.free_host(chunk)

    def _take(self, near: int, call: Call, *, wait: bool) -> HostMemory | None:
        """Return a free chunk; without `wait`, None if there is none."""
        with self._changed:
            while True:
                call.check("staging: waiting for pinned memory")
                if self._closed:
                    raise RequestError("staging: closed")
                self._reclaim()
                if not self._free and len(self._chunks) < self._chunks_max:
                    self._pin_one(near)
                if self._free:
                    return self._free.pop()
                if not wait:
                    return None
                self._changed.wait(min(call.left_s(), RECHECK_S))

    def _pin_one(self, near: int) -> None:
        """Add a chunk; where no more can be pinned, make do with those there are (lock held)."""
        try:
            chunk = self._device.allocate_host(self.chunk_bytes, near)
        except CapacityError as error:
            if not self._chunks:
                raise
            log.warning(
                "device.few_chunks", have=len(self._chunks), wanted=self._chunks_max, reason=str(error)
            )
            self._chunks_max = len(self._chunks)
            return
        self._chunks.append(chunk)
        self._free.append(chunk)

    def _put(self, chunk: HostMemory) -> None:
        with self._changed:
            self._free.append(chunk)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _returned_on_error(self, chunk: HostMemory) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._put(chunk)
            raise

    def _abandon(self, flying: deque[_Flight]) -> None:
        """Bring the chunks of a failed call back; empty after a good one."""
        for flight in flying:
            if _ended(flight, SETTLE_S):
                self._put(flight.chunk)
            else:
                with self._changed:
                    self._stuck.append(flight)

    def _reclaim(self) -> None:
        """Take back the chunks of stuck copies that have ended (lock held)."""
        for flight in [flight for flight in self._stuck if _ended(flight, 0)]:
            self._stuck.remove(flight)
            self._free.append(flight.chunk)


def _await_copy(flight: _Flight, call: Call) -> None:
    if not flight.copy.wait(call.left_s()):
        call.check("staging: waiting for the device")
        raise PeerTimeout("staging: deadline passed waiting for the device")


def _ended(flight: _Flight, timeout_s: float) -> bool:
    try:
        return flight.copy.wait(timeout_s)
    except MooncakeError:  # the call has its own error already; what matters is that it has ended
        return True
