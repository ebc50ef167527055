"""Two tiers in one store: blocks are copied to the SSD before they are evicted, and come back when asked for.

Evicting a block that has a copy is its demotion; a host whose processes were all killed serves its copies
after the restart. To the outside there is one set of blocks, those in either tier: `merge` says what
followers are told. All methods but the jobs in threads run on the store's loop.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from kvstore.header import ObjectHeader, Record
from kvstore.node.changes import NodeEvents
from kvstore.node.node import Node
from kvstore.ssd.model import Put
from kvstore.ssd.tier import SYNC_S, SsdTier
from kvstore.ssd.writebehind import WriteBehind, WriteBehindLimits
from mooncake.core.errors import CapacityError, MooncakeError
from transfer.file import FileIO
from transfer.segment import Segment

log = structlog.get_logger(__name__)

WRITER = "ssd"
"""Who reserves room for what comes back."""
FETCH_S = 0.1
"""How long an acquire waits for the SSD, unless it says itself that it can wait: clients take a store that
does not answer within 0.2 s for lost. What is not here by then comes all the same, for the next who asks."""
FETCH_BYTES_MAX = 256 << 20
"""Fetched for one acquire: a quarter of a second of a fast SSD."""
FETCHES_MAX = 4
"""Under way at once; more would only wait for the same disk."""
HOLD_S = 60.0
"""A block stays in place while it is copied, or while its successors come back."""
CLOSE_S = 5.0
"""For copying what only DRAM has, at the end: what is left is computed again."""
STOP_LOOK_S = 0.1
"""How often it is asked, while a batch is written, whether there is time left."""

Clock = Callable[[], float]


class Tiering:
    """Moves blocks between a node's segment and its SSD tier."""

    def __init__(
        self,
        node: Node,
        segment: Segment,
        tier: SsdTier,
        io: FileIO,
        limits: WriteBehindLimits | None = None,
        clock: Clock = time.monotonic,
        name_of: Callable[[bytes], bytes] = lambda _: b"",
        reads: int = 1,
    ) -> None:
        """Everything is open; `close` closes `tier` and `io`. `name_of`: what a block is called.

        `reads`: of a block until it is worth a place in DRAM as others are; before, it is the first to go.
        """
        self._reads = reads
        self.tier = tier
        self._name_of = name_of
        self.behind = WriteBehind(limits)
        self.promoted_blocks = 0
        """That came back to DRAM since the start, and their bytes."""
        self.promoted_bytes = 0
        self._node = node
        self._segment = segment
        self._io = io
        self._clock = clock
        self._threads = ThreadPoolExecutor(1 + FETCHES_MAX, thread_name_prefix="store-ssd")
        self._copying: asyncio.Task[None] | None = None
        self._fetching: set[asyncio.Task[None]] = set()
        self._erasing: set[asyncio.Task[None]] = set()
        self._synced_s = clock()
        tier.drain_events()  # what was recovered is in the first snapshot

    # ------------------------------------------------------------ what the outside sees

    def keys(self) -> list[bytes]:
        """Return what is in either tier."""
        held = self._node.complete_keys()
        known = set(held)
        return held + [key for key in self.tier.keys() if key not in known]  # noqa: SIM118 - no dict

    def merge(self, events: NodeEvents) -> NodeEvents:
        """Return what changes for the outside, given what changed in DRAM; adds what changed on the SSD."""
        now_s = self._clock()
        for key in events.removed:
            self.behind.removed(key)
        for key in events.stored:
            block = self._node.block_of(key)
            if block is not None and key not in self.tier:
                self.behind.stored(now_s, key, block.size_bytes)
        on_ssd = self.tier.drain_events()
        stored = [key for key in events.stored if key not in self.tier]
        gone = [key for key in on_ssd.removed if self._node.block_of(key) is None]
        gone += [key for key in events.removed if key not in self.tier]
        return NodeEvents(stored, list(dict.fromkeys(gone)))

    # ------------------------------------------------------------ DRAM -> SSD

    def tick(self) -> None:
        """Begin what is due: a batch of copies, or a sync."""
        if self._is_copying():
            return
        now_s = self._clock()
        stats = self._node.stats()
        keys = self.behind.due(now_s, stats.used_bytes / stats.capacity_bytes)
        if keys or now_s - self._synced_s >= SYNC_S:
            self._copying = asyncio.create_task(self._copy(keys), name="store ssd copy")

    def _is_copying(self) -> bool:
        """Return whether a batch is under way: one at a time. Raises what ended the last one."""
        if self._copying is None:
            return False
        if self._copying.done():
            ended, self._copying = self._copying, None
            ended.result()
        return self._copying is not None

    async def _copy(self, keys: Sequence[bytes]) -> None:
        loop = asyncio.get_running_loop()
        try:
            lease_id, held = self._node.hold(self._clock(), keys, HOLD_S)
        except CapacityError as full:  # too many leases now: tried again behind the others
            log.warning("ssd.not_copied", blocks=len(keys), reason=str(full))
            for key in keys:
                self.behind.ended(self._clock(), key, copied=False)
            return
        puts, blocks = [], []
        for key in held:
            block = self._node.block_of(key)
            assert block is not None, "held"
            blocks.append(block)
            view = self._segment.view(block.offset, block.size_bytes)
            puts.append(Put(key, view, block.checksum, name=self._name_of(key)))
        try:
            errors = await loop.run_in_executor(self._threads, self._write, puts)
        finally:
            self._node.release(self._clock(), lease_id)
        self._synced_s = self._clock()
        late = []
        for put, block, error in zip(puts, blocks, errors, strict=True):
            known = self._node.block_of(put.key) is block
            self.behind.ended(self._clock(), put.key, copied=known and error is None)
            if not known:  # dropped or replaced meanwhile: nobody may find the copy
                late.append(put.key)
        if late:
            await self.drop(late)
        if failed := [error for error in errors if error is not None]:
            log.warning("ssd.not_copied", blocks=len(failed), reason=str(failed[0]))

    def _write(self, puts: Sequence[Put]) -> list[MooncakeError | None]:
        """In a thread."""
        errors = self.tier.put_many(puts) if puts else []
        self.tier.maintain()
        self.tier.sync()
        return errors

    # ------------------------------------------------------------ SSD -> DRAM

    async def fetch(self, keys: Sequence[bytes], wait_s: float) -> int:
        """Bring the blocks of the prefix that only the SSD has into DRAM; wait for them a bounded time.

        Args:
            keys: a prefix, in order.
            wait_s: what the caller says it can wait; FETCH_S if that is more.

        Returns:
            A lease that keeps the rest of the prefix in place until the caller has its own: to be released.
        """
        wanted, held = self._missing(keys)
        if not wanted or len(self._fetching) >= FETCHES_MAX:
            return 0
        lease_id, _ = self._node.hold(self._clock(), held, HOLD_S)
        task = asyncio.create_task(self._fetch(wanted), name="store ssd fetch")
        self._fetching.add(task)
        task.add_done_callback(self._fetched)
        await asyncio.wait((task,), timeout=max(wait_s, FETCH_S))
        return lease_id

    def _missing(self, keys: Sequence[bytes]) -> tuple[list[tuple[bytes, ObjectHeader]], list[bytes]]:
        """Return (what the SSD alone has of the prefix, what DRAM has of it), as far as both cover it."""
        wanted: list[tuple[bytes, ObjectHeader]] = []
        held: list[bytes] = []
        room = FETCH_BYTES_MAX
        for key in keys:
            if self._node.block_of(key) is not None:
                held.append(key)
                continue
            header = self.tier.find(key)
            if header is None or header.length_bytes > room:
                break
            room -= header.length_bytes
            wanted.append((key, header))
        return wanted, held

    async def _fetch(self, wanted: Sequence[tuple[bytes, ObjectHeader]]) -> None:
        loop = asyncio.get_running_loop()
        node = self._node
        places: list[tuple[bytes, int, ObjectHeader, memoryview]] = []
        for key, header in wanted:
            got = node.reserve(self._clock(), WRITER, [key], header.length_bytes)
            if got.offsets[0] >= 0:
                view = self._segment.view(got.offsets[0], header.length_bytes)
                places.append((key, got.tickets[0], header, view))
        if not places:
            return
        read = self.tier.get_many
        results = await loop.run_in_executor(self._threads, read, [(key, view) for key, _, _, view in places])
        hits = [result.hit and place[0] in self.tier for place, result in zip(places, results, strict=True)]
        good = [place for place, hit in zip(places, hits, strict=True) if hit]
        bad = [place[1] for place, hit in zip(places, hits, strict=True) if not hit]
        node.commit(self._clock(), [place[1] for place in good], [place[2].checksum for place in good])
        self.promoted_blocks += len(good)
        self.promoted_bytes += sum(place[2].length_bytes for place in good)
        if self._reads > 1:
            cold = [place[0] for place, got in zip(places, results, strict=True) if not got.promote]
            node.pass_through(cold, self._reads)
        if bad:  # their room rests in quarantine: a disk that hangs may still write there
            node.abandon(self._clock(), WRITER, bad)
            log.warning("ssd.not_fetched", blocks=len(bad))

    def _fetched(self, task: asyncio.Task[None]) -> None:
        self._fetching.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("ssd.fetch_died", exc_info=error)

    def replaced(self, keys: Sequence[bytes]) -> None:
        """These have just been committed: forget copies of other bytes under their keys."""
        blocks = {key: block for key in keys if (block := self._node.block_of(key)) is not None}
        records = self.tier.forget_others({key: block.checksum for key, block in blocks.items()})
        if records:
            task = asyncio.create_task(self._erase(records), name="store ssd erase")
            self._erasing.add(task)
            task.add_done_callback(self._erasing.discard)
        for record in records:
            key = record.object.key
            self.behind.stored(self._clock(), key, blocks[key].size_bytes)

    async def _erase(self, records: list[Record]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, self.tier.erase, records)

    async def drop(self, keys: Sequence[bytes]) -> list[bytes]:
        """Remove `keys` from the SSD; return those that were there."""
        held = [key for key in keys if key in self.tier]
        if held:
            await asyncio.get_running_loop().run_in_executor(self._threads, self.tier.remove, held)
        return held

    # ------------------------------------------------------------ end

    async def save(self, stop: Callable[[], bool]) -> None:
        """Copy what only DRAM has, batch by batch, until it is done, cannot be done, or must `stop`.

        A batch that is under way then goes on.
        """
        while not stop():
            if not self._is_copying():
                keys = self.behind.due(self._clock() + self.behind.limits.age_s, 1.0)
                if not keys:
                    return
                self._copying = asyncio.create_task(self._copy(keys), name="store ssd copy")  # see tick
            assert self._copying is not None
            await asyncio.wait((self._copying,), timeout=STOP_LOOK_S)

    async def close(self) -> None:
        """Copy what only DRAM has, within CLOSE_S, and close the tier."""
        end_s = self._clock() + CLOSE_S
        if begun := self._fetching | self._erasing:
            await asyncio.wait(begun, timeout=CLOSE_S)
        await self.save(lambda: self._clock() >= end_s)
        if self._copying is not None:  # it reads memory that is about to go
            await asyncio.wait((self._copying,), timeout=CLOSE_S)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._shut)
        self._threads.shutdown(wait=False)

    def _shut(self) -> None:
        """In a thread."""
        self.tier.close()
        self._io.close()
