"""Blocks of other hosts come here: by a reader's hint, by a leader's order, or handed over by their writer.

A pull leases the blocks at their owner, reads them piece by piece through the transfer engine straight into
this segment, verifies and commits each piece. So a reader may go on with the first piece while the last is
still on its way, and a pull that fails half-way leaves what it has. All methods run on the store's loop;
what waits for another host runs in threads.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import structlog

from kvstore.engine.remote import RemoteStore
from kvstore.limits import WAIT_S_MAX
from kvstore.node.contract import FULL
from kvstore.node.names import Names
from kvstore.node.node import Node
from kvstore.store.peers import Peers
from mooncake.core.errors import CapacityError, MooncakeError
from mooncake.core.messages import Acquired, Block

log = structlog.get_logger(__name__)

WRITER = "pull"
"""Who reserves room for what comes here."""
PULLS_MAX = 8
"""At once, a thread each; more would only wait for the same link."""
PULL_S_MAX = 30.0
"""A pull that takes longer is given up: computing the rest is quicker."""
PIECE_BYTES = 16 << 20
"""Read, verified and committed together: 2 ms of a fast link, so that readers see progress."""
LINGER_S = 0.5
"""What has come stays in place until its pull is over and this long after, for those who waited for it:
the rest of a long prompt must not evict its beginning."""
CLOSE_S = 5.0
"""For pulls under way at the end; the engine has been closed, so that they fail at once."""

Clock = Callable[[], float]
T = TypeVar("T")


class PullStats(msgspec.Struct):
    """Counters since start; `running` is a gauge. `missing`: the owner did not have it (any more)."""

    pulls: int = 0
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    missing: int = 0
    bad: int = 0
    failures: int = 0
    refused: int = 0
    handed_over: int = 0
    handovers_failed: int = 0
    running: int = 0


class _Place(msgspec.Struct, frozen=True):
    """A block of the owner and the room for it here."""

    key: bytes
    block: Block
    offset: int
    ticket: int
    name: bytes


class _Pull(msgspec.Struct):
    """One pull under way: what it is after, and its leases on what is here."""

    keys: list[bytes]
    source: str
    leases: list[int] = []


class Pulls:
    """Brings blocks of other stores into this one."""

    def __init__(
        self, node: Node, segment_address: int, peers: Peers, clock: Clock, names: Names | None = None
    ) -> None:
        """Copy nothing yet.

        Args:
            node: where the blocks go.
            segment_address: of the segment's first byte, as registered with the engine of `peers`.
            peers: the other stores.
            clock: monotonic seconds.
            names: learns what the copies are called; None: nobody wants to know.
        """
        self._names = names
        self.stats = PullStats()
        self._node = node
        self._address = segment_address
        self._peers = peers
        self._clock = clock
        self._threads = ThreadPoolExecutor(PULLS_MAX, thread_name_prefix="store-pull")
        self._under_way: dict[bytes, asyncio.Task[None]] = {}
        self._tasks: dict[asyncio.Task[None], _Pull] = {}

    async def fetch(self, keys: Sequence[bytes], source: str, wait_s: float, *, prefix: bool = True) -> None:
        """Bring what this store lacks of `keys` from the store of `source`; wait for it at most `wait_s`.

        What is under way then goes on. Nothing that goes wrong over there raises: then there is less.

        Args:
            keys: 32 bytes each.
            source: name of a node that is known to have them.
            wait_s: 0 = only begin.
            prefix: what follows a block that the source has not is of no use.
        """
        missing = [key for key in keys if self._node.block_of(key) is None]
        wanted = [key for key in missing if key not in self._under_way]
        if wanted:
            self._begin(wanted, [key for key in keys if key not in missing], source, wait_s, prefix)
        tasks = {task for key in missing if (task := self._under_way.get(key)) is not None}
        if tasks and wait_s > 0:
            await asyncio.wait(tasks, timeout=wait_s)

    def _begin(
        self, wanted: list[bytes], here: list[bytes], source: str, wait_s: float, prefix: bool
    ) -> None:
        if len(self._tasks) >= PULLS_MAX:
            self.stats.refused += 1
            return
        try:
            remote = self._peers.remote(source)
        except MooncakeError as error:
            self.stats.failures += 1
            log.warning("pull.no_peer", source=source, reason=str(error))
            return
        pull = _Pull(wanted, source)
        self._hold(pull, here)
        task = asyncio.create_task(self._pull(pull, remote, wait_s, prefix), name="store pull")
        self._tasks[task] = pull
        for key in wanted:
            self._under_way[key] = task
        self.stats.pulls += 1
        self.stats.running += 1
        task.add_done_callback(self._ended)

    async def _pull(self, pull: _Pull, remote: RemoteStore, wait_s: float, prefix: bool) -> None:
        begun_s = self._clock()
        end_s = begun_s + PULL_S_MAX
        left = pull.keys
        try:
            while left and (rest_s := end_s - self._clock()) > 0:
                wait_s = min(wait_s, WAIT_S_MAX)
                held = await self._in_thread(_acquire, remote, left, rest_s, wait_s)
                try:
                    if not await self._take(pull, remote, left[: len(held.blocks)], held, end_s):
                        return
                finally:
                    if held.lease_id:
                        await self._in_thread(remote.release, held.lease_id)
                left = left[len(held.blocks) :]
                self.stats.missing += len(left) if prefix else min(1, len(left))
                left = [] if prefix else left[1:]
        except MooncakeError as error:
            self.stats.failures += 1
            log.warning("pull.failed", source=pull.source, left=len(left), reason=str(error))
        finally:
            self.stats.seconds += self._clock() - begun_s

    async def _take(
        self, pull: _Pull, remote: RemoteStore, keys: list[bytes], held: Acquired, end_s: float
    ) -> bool:
        """Copy the blocks, leased at their owner; False: no room here, or bad bytes there."""
        piece: list[_Place] = []
        piece_bytes = 0
        Names.check(held.names, len(keys))
        names = held.names or [b""] * len(keys)
        for key, block, name in zip(keys, held.blocks, names, strict=True):
            room = self._node.reserve(self._clock(), WRITER, [key], block.size_bytes)
            if room.offsets[0] == FULL:
                await self._read(pull, remote, piece, end_s)
                return False
            if room.offsets[0] >= 0:  # else it came from somewhere else meanwhile
                piece.append(_Place(key, block, room.offsets[0], room.tickets[0], name))
                piece_bytes += block.size_bytes
            if piece_bytes >= PIECE_BYTES:
                if not await self._read(pull, remote, piece, end_s):
                    return False
                piece, piece_bytes = [], 0
        return await self._read(pull, remote, piece, end_s)

    async def _read(self, pull: _Pull, remote: RemoteStore, piece: Sequence[_Place], end_s: float) -> bool:
        """Read into reserved room, verify, commit; False: not all of `piece` is here now."""
        if not piece:
            return True
        keys, blocks = [place.key for place in piece], [place.block for place in piece]
        targets = [[(self._address + place.offset, place.block.size_bytes)] for place in piece]
        good = 0
        try:
            rest_s = max(0.0, end_s - self._clock())
            good = await self._in_thread(remote.read, keys, blocks, targets, rest_s)
        finally:
            # their room rests in quarantine: a transfer that was given up may still write there
            if bad := [place.ticket for place in piece[good:]]:
                self._node.abandon(self._clock(), WRITER, bad)
        tickets = [place.ticket for place in piece[:good]]
        done = self._node.commit(self._clock(), tickets, [block.checksum for block in blocks[:good]]).done
        for place, committed in zip(piece[:good], done, strict=True):
            if committed and place.name and self._names is not None:
                self._names.add(place.key, place.name)
        self._hold(pull, keys[:good])
        self.stats.blocks += good
        self.stats.bytes += sum(block.size_bytes for block in blocks[:good])
        self.stats.bad += good < len(piece)
        return good == len(piece)

    def _hold(self, pull: _Pull, keys: Sequence[bytes]) -> None:
        """Keep `keys` in place until the pull is over."""
        try:
            lease_id, _ = self._node.hold(self._clock(), keys, PULL_S_MAX + LINGER_S)
        except CapacityError:
            return  # too many leases now: what is evicted meanwhile is a miss
        if lease_id:
            pull.leases.append(lease_id)

    def _ended(self, task: asyncio.Task[None]) -> None:
        pull = self._tasks.pop(task)
        self.stats.running -= 1
        for key in pull.keys:
            del self._under_way[key]
        asyncio.get_running_loop().call_later(LINGER_S, self._let_go, pull)
        if not task.cancelled() and (error := task.exception()):
            log.error("pull.died", source=pull.source, exc_info=error)

    def _let_go(self, pull: _Pull) -> None:
        for lease_id in pull.leases:
            self._node.release(self._clock(), lease_id)

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def close(self) -> None:
        """Wait for what is under way, a bounded time: close the engine before, then it fails at once."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        self._threads.shutdown(wait=False, cancel_futures=True)


def _acquire(remote: RemoteStore, keys: list[bytes], lease_s: float, wait_s: float) -> Acquired:
    return remote.acquire(keys, lease_s, wait_s, named=True)
