"""What the RDMA transport needs of a verbs library: RC queue pairs, one-sided READ and WRITE.

One completion queue per queue pair and polling only: pyverbs deadlocks in its blocking wait, and a lane
of the transport is used by one thread at a time (docs/adr/0003).
"""

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec

from transfer.messages import NicInfo, QpInfo
from transfer.model import Opcode

TIMEOUT_EXPONENT = 14
"""4.096 us * 2**14 = 67 ms until a packet is sent again."""
RETRIES = 6
"""Transport retries. 7 means for ever on some devices; 14/6 gave up after 0.43 s on rxe."""
RNR_RETRIES = 6
READS_OUTSTANDING_MAX = 16
"""max_rd_atomic: what every real NIC offers."""


class WorkStatus(enum.Enum):
    """What became of a work request."""

    DONE = "done"
    REFUSED = "refused"  # remote access error: wrong key or out of range
    UNREACHABLE = "unreachable"  # retries exhausted
    FLUSHED = "flushed"  # the queue pair is in error: this one may have been tried or not
    FAILED = "failed"  # anything else


class Work(msgspec.Struct, frozen=True, gc=False):
    """One READ or WRITE."""

    work_id: int
    op: Opcode
    local: int
    lkey: int
    remote: int
    rkey: int
    size_bytes: int


class Done(msgspec.Struct, frozen=True, gc=False):
    """One completion; `detail` is the library's own words for people."""

    work_id: int
    status: WorkStatus
    detail: str = ""


class Memory(Protocol):
    """A registered range. Its keys are plain numbers, valid until `close`."""

    lkey: int
    rkey: int

    def close(self) -> None:
        """Deregister (idempotent). A fence: when it returns, no peer can reach the range."""


class QueuePair(Protocol):
    """One RC queue pair with its own completion queue. Used by one thread at a time, but for `close`."""

    def local(self) -> QpInfo:
        """Return what the other side needs to connect."""

    def connect(self, remote: QpInfo) -> None:
        """Bring it to RTS with finite retries.

        Raises:
            PeerGone: there is no route, or the queue pair cannot be moved.
        """

    def post(self, works: Sequence[Work]) -> None:
        """Post all, in order, each signalled. The caller never has more than `depth` outstanding.

        Raises:
            PeerGone: the library refused; the queue pair has to be closed.
        """

    def poll(self, count_max: int) -> list[Done]:
        """Return completions, [] if there are none yet. Never blocks."""

    def close(self) -> None:
        """Destroy (idempotent). A fence: when it returns, no write of the peer through it will land.

        Work that was outstanding gets no completion any more: it is the caller's to count.
        """


class Nic(Protocol):
    """One opened port of one device."""

    info: NicInfo
    depth: int
    """Work requests that may be outstanding on one queue pair."""

    def is_up(self) -> bool:
        """Return whether the port is active now."""

    def register(self, address: int, size_bytes: int) -> Memory:
        """Register host memory for local and remote access.

        Raises:
            CapacityError: memlock limit or device limit; RequestError: not memory of this process.
        """

    def register_dmabuf(self, fd: int, offset: int, address: int, size_bytes: int) -> Memory:
        """Register device memory that was exported as a dma-buf (GPUDirect).

        Raises:
            CapacityError: this device or kernel cannot do it.
        """

    def queue_pair(self) -> QueuePair:
        """Make one, not connected.

        Raises:
            CapacityError: the device has no more.
        """

    def close(self) -> None:
        """Close the device (idempotent); close memories and queue pairs first."""


class Verbs(Protocol):
    """A verbs library."""

    name: str

    def devices(self) -> list[str]:
        """Return the names of the devices; [] where there is no RDMA at all, never an exception."""

    def open(self, device: str, port: int = 1, gid_index: int | None = None) -> Nic:
        """Open one port.

        Args:
            device: one of `devices()`.
            port: counted from 1.
            gid_index: None = the first IPv4-mapped GID, else the first non-zero one.

        Raises:
            ConfigError: no such device, port or GID.
        """
