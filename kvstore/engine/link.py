"""One attachment of an engine process to one start (epoch) of a store: memory, rpc, what was granted."""

import contextlib
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from kvstore.engine.door import DoorClient
from kvstore.node.contract import CHECKSUM_BYTES, ID_BITS, id_base
from mooncake.core import wire
from mooncake.core.errors import PeerGone, ProtocolError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Acquired, Block, Reserved, StoreRecord, StoreReply
from mooncake.core.rpc import BlockingRpcClient
from transfer.fdpass import fetch_segment
from transfer.segment import Segment


class Call(msgspec.Struct, frozen=True):
    """A request on its way; give it to the matching `finish_` or to `forget`."""

    link: "StoreLink"
    call_id: bytes
    began_s: float
    wait_s: float = 0.0  # the store was asked to wait this long
    keys: list[bytes] = []
    size_bytes: int = 0
    leases: bool = False  # the answer may be a lease


class Slot(msgspec.Struct, frozen=True):
    """Where one block has to be written, before `expires_s` (time.monotonic), then committed."""

    key: bytes
    offset: int
    ticket: int
    view: memoryview
    expires_s: float


class Lease(msgspec.Struct, frozen=True):
    """The blocks of the longest known prefix; `views[i]` (read-only) are the bytes of `blocks[i]`.

    Bytes are guaranteed until `expires_s` (time.monotonic); verify *after* copying to be sure.
    """

    lease_id: int
    keys: list[bytes]
    blocks: list[Block]
    views: list[memoryview]
    expires_s: float

    def __len__(self) -> int:
        return len(self.blocks)

    def verify(self, index: int) -> bool:
        """Return whether block `index` still is what was committed under its key (0.2 ms for 3 MB)."""
        return block_checksum(self.keys[index], self.views[index]) == self.blocks[index].checksum


class StoreLink:
    """Never changes its store: a restarted one gets a new link, old memory lives as long as its views."""

    def __init__(self, record: StoreRecord, segment: Segment) -> None:
        """Use `attach`."""
        self.record = record
        self.segment = segment
        self._epoch_bits = id_base(record.epoch) >> ID_BITS
        self._rpc = BlockingRpcClient(record.endpoint, StoreReply)
        self._door = DoorClient(record.door) if record.door else None

    @classmethod
    def attach(
        cls, fd_path: str, deadline_s: float, *, touch: bool, unless_epoch: str = ""
    ) -> "StoreLink | None":
        """Fetch and map what is served at `fd_path`; None if that is still `unless_epoch`.

        The record comes with the memory, so both are of one epoch, whatever the metadata says.

        Raises:
            PeerTimeout: no answer within `deadline_s`.
            PeerGone: nobody serves there.
            ProtocolError: it is not a store.
            CapacityError: the memory cannot be mapped.
        """
        segment = fetch_segment(fd_path, deadline_s, touch=False)
        try:
            if segment.name == unless_epoch:
                segment.close()
                return None
            record = _record_of(segment)
            if touch:
                segment.touch()
            return cls(record, segment)
        except BaseException:
            segment.close()
            raise

    @property
    def is_served(self) -> bool:
        """Whether somebody listens where this store handed out its memory; never waits."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            return probe.connect_ex(self.record.fd_path) not in (errno.ECONNREFUSED, errno.ENOENT)

    def begin(self, request: Any) -> bytes:
        """Send; raises CapacityError, or PeerGone when the link was closed meanwhile."""
        return self._rpc.begin(request)

    def send(self, request: Any) -> None:
        """Send a request whose answer nobody needs; raises as `begin`."""
        self.forget(self.begin(request))

    def poll(self, call_id: bytes) -> bool:
        """Return whether the answer is here; a closed link never has it."""
        return self._rpc.poll(call_id)

    def finish(self, call_id: bytes, deadline_s: float, kind: type[Any]) -> Any:
        """Return the answer, a `kind`; raises as BlockingRpcClient.finish."""
        return self._is(self._rpc.finish(call_id, deadline_s), kind)

    def _is(self, reply: Any, kind: type[Any]) -> Any:
        if not isinstance(reply, kind):
            raise ProtocolError(f"{self.record.endpoint}: {type(reply).__name__} instead of {kind.__name__}")
        return reply

    def ask(self, request: Any, deadline_s: float, kind: type[Any]) -> Any:
        """Return the answer, a `kind`, by the shortest way; raises as `begin` and `finish`."""
        if self._door is None:
            return self.finish(self.begin(request), deadline_s, kind)
        return self._is(self._door.call(request, deadline_s), kind)

    def tell(self, request: Any) -> None:
        """Send what needs no answer, with the next `ask` or soon; without a door, raises as `begin`."""
        if self._door is None:
            self.send(request)
        else:
            self._door.tell(request)

    def ring(self) -> None:
        """Wake the store, without waiting."""
        if self._door is not None:
            self._door.ring()

    def when_idle(self, call: Callable[[], None]) -> None:
        """Have `call` called, in a thread, when nothing was told or used for a while."""
        if self._door is not None:
            self._door.on_idle = call

    def used(self, keys: Sequence[bytes]) -> None:
        """Tell of reads by the table, b"" for a miss, with the next `ask` or soon."""
        if self._door is not None:
            self._door.used(keys)

    def forget(self, call_id: bytes) -> None:
        """Drop interest in an answer."""
        self._rpc.forget(call_id)

    def close(self) -> None:
        """Close the socket and our hold on the memory; views stay valid until they are dropped."""
        with contextlib.suppress(zmq.ZMQError):
            self._rpc.close()
        if self._door:
            self._door.close()
        self.segment.close()

    def is_mine(self, some_id: int) -> bool:
        """Return whether a lease or ticket was given by this epoch of the store."""
        return some_id >> ID_BITS == self._epoch_bits

    def check_acquired(self, reply: Acquired, keys_max: int) -> None:
        """Pass if `reply` can be ours.

        Raises:
            PeerGone: it is of another epoch: the store restarted at its old address.
            ProtocolError: ranges outside the segment, or more blocks than keys.
        """
        if len(reply.blocks) > keys_max or (bool(reply.blocks) != bool(reply.lease_id)):
            raise ProtocolError(f"{self.record.endpoint}: {len(reply.blocks)} blocks for {keys_max} keys")
        if reply.lease_id and not self.is_mine(reply.lease_id):
            raise self._restarted()
        for block in reply.blocks:
            self._check_block(block)

    def _check_block(self, block: Block) -> None:
        """Raise ProtocolError unless `block` lies in the segment."""
        if (
            block.offset < 0
            or block.size_bytes <= 0
            or block.offset + block.size_bytes > self.segment.size_bytes
            or len(block.checksum) != CHECKSUM_BYTES
        ):
            raise ProtocolError(f"{self.record.endpoint}: block {block} is not in its segment")

    def check_reserved(self, reply: Reserved, keys: int, size_bytes: int) -> None:
        """Pass if `reply` can be ours; raises as `check_acquired`."""
        if not len(reply.offsets) == len(reply.tickets) == keys:
            raise ProtocolError(f"{self.record.endpoint}: {len(reply.offsets)} slots for {keys} keys")
        last = self.segment.size_bytes - size_bytes
        for offset, ticket in zip(reply.offsets, reply.tickets, strict=True):
            if offset >= 0 and not self.is_mine(ticket):
                raise self._restarted()
            if offset > last:
                raise ProtocolError(f"{self.record.endpoint}: offset {offset} leaves its segment")

    def _restarted(self) -> PeerGone:
        return PeerGone(f"store {self.record.node} restarted: epoch {self.record.epoch} is over")


def _record_of(segment: Segment) -> StoreRecord:
    """Return the store's record that came with `segment`; raises ProtocolError if they do not fit."""
    record = wire.decode(segment.note, StoreRecord)
    if record.epoch != segment.name or record.capacity_bytes != segment.size_bytes:
        raise ProtocolError(f"segment {segment.name}: its record {record} does not fit")
    return record
