"""Nouns of the transfer engine: buffers, slices, peers' descriptions, and what a transport must do.

One engine per process. Its *segment* is everything it has registered: a list of buffers, addressed by
the owner's own virtual addresses. A *batch* moves bytes between local buffers and one peer's buffers;
it is cut into *slices*, each inside one local and one remote buffer, and a *transport* carries them.
"""

import enum
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout
from transfer.messages import BufferInfo, SegmentInfo

KEY_BYTES = 16
"""A capability: 128 random bits, unguessable, checked by the owner of the buffer at every access."""


class Opcode(enum.IntEnum):
    """Direction of a transfer, as the initiator sees it (upstream's numbers)."""

    READ = 0  # remote -> local
    WRITE = 1  # local -> remote


class Buffer:
    """A range of this process's memory that is registered with the engine."""

    def __init__(
        self,
        buffer_id: int,
        address: int,
        size_bytes: int,
        location: str,
        key: bytes,
        view: memoryview | None,
        owner: object = None,
    ) -> None:
        """Made by Registry.add.

        Args:
            buffer_id: never reused by this engine.
            address: first byte, a virtual address of this process (or a device pointer).
            size_bytes: length.
            location: "cpu:0", "cuda:1", "*" = unknown.
            key: KEY_BYTES that peers must show.
            view: the bytes, writable; None for device memory, which the host cannot address.
            owner: kept alive as long as the buffer is registered.
        """
        self.buffer_id = buffer_id
        self.address = address
        self.size_bytes = size_bytes
        self.end = address + size_bytes
        self.location = location
        self.key = key
        self.view = view
        self.owner = owner
        self.uses = 0  # transfers under way; the registry's to count
        self.retired = False  # being unregistered: no new uses
        self.handles: dict[str, Any] = {}
        """What each transport keeps about it, by the transport's name."""

    def part(self, address: int, size_bytes: int) -> memoryview:
        """Return the bytes at `address`, which lie inside (the caller has checked)."""
        assert self.view is not None
        start = address - self.address
        return self.view[start : start + size_bytes]


class Slice(msgspec.Struct, frozen=True):
    """One contiguous copy between one local and one remote buffer; request `index` of its batch."""

    index: int
    local: int  # address in this process
    remote: int  # address in the peer
    size_bytes: int
    mine: Buffer
    theirs: BufferInfo

    def part(self, start: int, size_bytes: int) -> "Slice":
        """Return `size_bytes` of it from byte `start` on."""
        here, there = self.local + start, self.remote + start
        return Slice(self.index, here, there, size_bytes, self.mine, self.theirs)


class Failure(msgspec.Struct, frozen=True):
    """A slice that a transport did not move, and why.

    A RequestError means that the owner refused (wrong key, out of range): no other path will help.
    A PeerError means that the link failed: another path may help.
    """

    slice: Slice
    error: MooncakeError


class Call:
    """Deadline and cancellation of one batch, shared by everybody who works on it."""

    def __init__(self, deadline_s: float) -> None:
        """`deadline_s` from now."""
        self.end_s = time.monotonic() + deadline_s
        self.cancelled = False
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []

    def left_s(self) -> float:
        """Return the seconds that are left, 0 if none or cancelled."""
        return 0.0 if self.cancelled else max(0.0, self.end_s - time.monotonic())

    def check(self, what: str) -> None:
        """Raise if there is no time left.

        Raises:
            PeerGone: the call was cancelled.
            PeerTimeout: the deadline has passed.
        """
        if self.cancelled:
            raise PeerGone(f"{what}: cancelled")
        if time.monotonic() >= self.end_s:
            raise PeerTimeout(f"{what}: deadline passed")

    def cancel(self) -> None:
        """Stop everybody: blocked waits are woken, `check` raises from now on (idempotent)."""
        with self._lock:
            self.cancelled = True
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    def add_waker(self, wake: Callable[[], None]) -> None:
        """Have `wake` called at `cancel`, at once if that has happened. It must not block."""
        with self._lock:
            if not self.cancelled:
                self._wakers.append(wake)
                return
        wake()

    def remove_waker(self, wake: Callable[[], None]) -> None:
        """Forget `wake` (idempotent)."""
        with self._lock:
            if wake in self._wakers:
                self._wakers.remove(wake)


class Peer(Protocol):
    """Another engine as this one knows it. `info` is replaced as a whole when it is refreshed."""

    info: SegmentInfo

    def ask(self, message: Any, kind: type[Any], deadline_s: float) -> Any:
        """Send one control message and return the answer.

        Raises:
            PeerTimeout, PeerGone: no answer.
            MooncakeError: the peer's own refusal, as the class it raised.
        """


class Transport(Protocol):
    """One way to move bytes. Methods are called from several threads at once."""

    name: str
    judges_itself: bool
    """It leaves broken paths alone by itself, which `reaches` shows; nobody else has to."""

    def register(self, buffer: Buffer) -> None:
        """Prepare `buffer` for this transport (pin it, make keys). Not able to: then not reachable."""

    def unregister(self, buffer: Buffer, deadline_s: float) -> None:
        """Fence: when this returns, no peer can reach `buffer` through this transport any more.

        Raises:
            PeerTimeout: a peer may still write into it after `deadline_s`; ask again later.
        """

    def describe(self, info: dict[str, Any]) -> None:
        """Add what peers must know about this transport to the fields of our SegmentInfo."""

    def reaches(self, peer: Peer, mine: Buffer, theirs: BufferInfo) -> bool:
        """Return whether it can, by all that is known without trying."""

    def lanes(self, peer: Peer) -> int:
        """Return how many `run` calls to `peer` profit from being made at once (>= 1)."""

    def run(self, peer: Peer, op: Opcode, slices: Sequence[Slice], call: Call) -> list[Failure]:
        """Move all `slices`, blocking; return those that failed ([] = all done).

        When it returns, nothing of it is in flight any more: neither local nor remote memory will be
        touched by it later. Never raises for a bad link, a bad peer or a passed deadline.
        """

    def forget(self, peer: Peer) -> None:
        """Drop every connection to `peer`."""

    def close(self) -> None:
        """Drop everything (idempotent)."""
