"""Another host's store: its blocks are read and written through the transfer engine.

The same requests as on the host itself (acquire, release, reserve, commit) travel over the engine's greeted
control connection; the bytes go straight between the store's segment and registered memory of this process,
scattered over as many ranges as the caller likes (one KV block = one page per layer). What was read is
verified before the lease ends; what cannot be verified counts as not found, and the store is told.
"""

import time
from collections.abc import Iterable, Sequence

import msgspec
import structlog
import xxhash

from kvstore.engine.remote_call import UNDO_S, Ranges, RemoteCall
from kvstore.limits import LEASE_S_MAX
from mooncake.core.errors import MooncakeError, ProtocolError, RequestError
from mooncake.core.keys import checksum_seed
from mooncake.core.messages import (
    Abandon,
    Acquire,
    Acquired,
    Block,
    Commit,
    Committed,
    Pull,
    Pulled,
    Release,
    ReportBad,
    Reserve,
    Reserved,
    StoreRecord,
)
from transfer.engine import TransferEngine
from transfer.model import Opcode

log = structlog.get_logger(__name__)

DEADLINE_S = 5.0
ASK_S = 2.0
"""For one request: two round trips and a turn of the store's loop are a millisecond."""


class Found(msgspec.Struct, frozen=True):
    """What a `get` did: `blocks` of the prefix are in place, `bad` of the rest failed verification."""

    blocks: int
    bad: int = 0


class RemoteStore:
    """One store of another host (or of this one). Thread-safe as its engine is."""

    def __init__(self, engine: TransferEngine, record: StoreRecord, writer: str) -> None:
        """Nothing is opened before the first call.

        Args:
            engine: of this process; everything that is read into or written from is registered there.
            record: of the store, with `transfer`.
            writer: name of this process, as PoolClient's.

        Raises:
            RequestError: the store is not open to other hosts.
        """
        if not record.transfer:
            raise RequestError(f"store {record.node} is not open to other hosts: it has no transfer address")
        self._call = RemoteCall(engine, record)
        self._engine = engine
        self._record = record
        self._writer = writer

    def get(self, keys: Sequence[bytes], targets: Sequence[Ranges], deadline_s: float = DEADLINE_S) -> Found:
        """Read the longest prefix of `keys` that the store has complete into `targets`.

        Args:
            keys: 32 bytes each, in prefix order.
            targets: for each key where its block goes; sizes must add up to the block's.
            deadline_s: for all of it.

        Returns:
            How many blocks are in place and verified. Ranges of the others may have been written to.

        Raises:
            PeerError: the store is away; RequestError: a target of the wrong size.
        """
        end_s = time.monotonic() + deadline_s
        held = self.acquire(keys, deadline_s, deadline_s=deadline_s)
        if not held.lease_id:
            return Found(0)
        try:
            blocks = held.blocks
            good = self.read(keys, blocks, targets[: len(blocks)], max(0.0, end_s - time.monotonic()))
            return Found(good, int(good < len(blocks)))
        finally:
            self.release(held.lease_id)

    def acquire(
        self,
        keys: Sequence[bytes],
        lease_s: float,
        wait_s: float = 0.0,
        deadline_s: float = ASK_S,
        *,
        named: bool = False,
    ) -> Acquired:
        """Lease the longest prefix of `keys` that the store has complete; to be released, if any.

        Args:
            keys: 32 bytes each, in prefix order.
            lease_s: how long the blocks must stay there.
            wait_s: let the store wait (at most its WAIT_S_MAX) for blocks in writing.
            deadline_s: for the answer; ASK_S more than `wait_s` is the most.
            named: say also what the blocks are called.

        Raises:
            PeerError: the store is away or restarted.
        """
        request = Acquire(list(keys), min(lease_s, LEASE_S_MAX), wait_s, named=named)
        held: Acquired = self._call.ask(request, Acquired, min(ASK_S + wait_s, deadline_s))
        if held.lease_id:
            try:
                self._call.check_epoch([held.lease_id])
                self._check_blocks(held.blocks, keys)
            except MooncakeError:
                self.release(held.lease_id)
                raise
        return held

    def read(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[Block],
        targets: Sequence[Ranges],
        deadline_s: float = DEADLINE_S,
    ) -> int:
        """Read leased `blocks` into `targets`; return how many of them, from the first, are verified.

        The store is told of the first that is not.

        Raises:
            PeerError: the store is away; RequestError: a target of the wrong size.
        """
        for block, target in zip(blocks, targets, strict=True):
            if sum(size for _, size in target) != block.size_bytes:
                raise RequestError(f"a block of {block.size_bytes} bytes does not fit its target")
        end_s = time.monotonic() + deadline_s
        self._call.move(Opcode.READ, [block.offset for block in blocks], targets, end_s)
        for at, block in enumerate(blocks):
            if scattered_checksum(keys[at], map(self._bytes, targets[at])) != block.checksum:
                log.warning("pool.bad_block", node=self._record.node, key=keys[at].hex()[:16])
                self._call.tell(ReportBad([keys[at]]))
                return at
        return len(blocks)

    def pull(self, keys: Sequence[bytes], source: str) -> None:
        """Let the store begin to copy `keys` from that of node `source`.

        Raises:
            PeerError: it is away. RequestError: it copies from nobody.
        """
        self._call.ask(Pull(list(keys), source, 0.0), Pulled, UNDO_S)

    def release(self, lease_id: int) -> None:
        """Give a lease back; one that cannot be given back ends by its term."""
        self._call.tell(Release(lease_id))

    def put(
        self, keys: Sequence[bytes], sources: Sequence[Ranges], deadline_s: float = DEADLINE_S
    ) -> list[bool]:
        """Write blocks, all of one size; return for each whether the store has it now.

        False: the store is full, somebody else is writing it at this moment, or it was not committed in
        time. A block that the store had already is True and stays as it is.

        Raises:
            PeerError: the store is away; nothing of this call becomes visible then, unless the answer to
                the commit itself was lost. RequestError: sources of different sizes.
        """
        if not keys:
            return []
        end_s = time.monotonic() + deadline_s
        sizes = {sum(size for _, size in source) for source in sources}
        if len(sizes) != 1 or len(sources) != len(keys):
            raise RequestError(f"put: {len(keys)} keys, {len(sources)} sources of {sorted(sizes)} bytes")
        room = self._call.ask(
            Reserve(self._writer, list(keys), sizes.pop()), Reserved, min(ASK_S, deadline_s)
        )
        if not len(room.offsets) == len(room.tickets) == len(keys):
            raise ProtocolError(f"{self._record.transfer}: {len(room.offsets)} slots for {len(keys)} keys")
        mine = [at for at, offset in enumerate(room.offsets) if offset >= 0]
        tickets = [room.tickets[at] for at in mine]
        try:
            self._call.check_epoch(tickets)
            self._call.move(
                Opcode.WRITE, [room.offsets[at] for at in mine], [sources[at] for at in mine], end_s
            )
            sums = [scattered_checksum(keys[at], map(self._bytes, sources[at])) for at in mine]
            done = self._commit(tickets, sums, end_s)
        except MooncakeError:
            if tickets:  # an empty list would mean everything of this writer
                self._call.tell(Abandon(self._writer, tickets))
            raise
        known = {at for at, ok in zip(mine, done, strict=True) if ok}
        return [at in known or self._has(keys[at], end_s) for at in range(len(keys))]

    def _commit(self, tickets: list[int], sums: list[bytes], end_s: float) -> list[bool]:
        if not tickets:
            return []
        left_s = max(0.0, end_s - time.monotonic())
        answer: Committed = self._call.ask(Commit(tickets, sums), Committed, left_s)
        if len(answer.done) != len(tickets):
            raise ProtocolError(f"{self._record.transfer}: {len(answer.done)} of {len(tickets)} results")
        return answer.done

    def _has(self, key: bytes, end_s: float) -> bool:
        """Return whether the store has the block that it did not let us write."""
        held = self._call.ask(Acquire([key], UNDO_S), Acquired, max(0.0, end_s - time.monotonic()))
        if held.lease_id:
            self._call.tell(Release(held.lease_id))
        return bool(held.blocks)

    def _check_blocks(self, blocks: Sequence[Block], keys: Sequence[bytes]) -> None:
        """Pass if every block lies in the segment."""
        if len(blocks) > len(keys):
            raise ProtocolError(f"{self._record.transfer}: {len(blocks)} blocks for {len(keys)} keys")
        for block in blocks:
            if not 0 < block.size_bytes <= self._record.capacity_bytes - block.offset or block.offset < 0:
                raise ProtocolError(f"{self._record.transfer}: block {block} is not in its segment")

    def _bytes(self, place: tuple[int, int]) -> memoryview:
        address, size = place
        buffer = self._engine.buffer_at(address)
        if buffer is None or buffer.view is None or address + size > buffer.end:
            raise RequestError(f"{address:#x}+{size} is not registered host memory")
        return buffer.part(address, size)


def scattered_checksum(key: bytes, parts: Iterable[memoryview]) -> bytes:
    """Return the block_checksum of bytes that lie in several places."""
    digest = xxhash.xxh3_128(seed=checksum_seed(key))
    for part in parts:
        digest.update(part)
    return digest.digest()
