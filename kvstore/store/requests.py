"""What a store answers, and what follows: Node decides; names, other stores and the SSD take their part."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kvstore.limits import PULL_WAIT_S_MAX, WAIT_S_MAX, check_keys
from kvstore.node.events import EventPublisher, Snapshots
from kvstore.node.finding import find, split_keys
from kvstore.node.keeping import pin, set_quota, tags_of
from kvstore.node.names import Names
from kvstore.node.node import Node
from kvstore.ssd.tiering import Tiering
from kvstore.store.outside import Outside
from kvstore.store.pulls import Pulls
from kvstore.store.ring_reader import RingReader
from mooncake.core.election import Fence
from mooncake.core.errors import NotLeader, RequestError
from mooncake.core.messages import (
    Abandon,
    Acquire,
    Acquired,
    Commit,
    Committed,
    DropKeys,
    Find,
    Findings,
    Grant,
    Granted,
    HandOver,
    KeysDropped,
    ListNames,
    Ok,
    Pin,
    Pull,
    Pulled,
    Release,
    ReportBad,
    Reserve,
    Reserved,
    SetQuota,
    Snapshot,
    SnapshotPage,
    Stats,
    StoreRequest,
    StoreStats,
    Term,
    Used,
)
from transfer.segment import Segment


class Requests:
    """On the loop of its store. What it needs besides the node is set by the service while it starts."""

    def __init__(
        self,
        node: Node,
        name: str,
        epoch: str,
        clock: Callable[[], float],
        report: Callable[[ReportBad], Awaitable[Ok]],
    ) -> None:
        """Answer for `node`.

        Args:
            node: decides.
            name: of the store.
            epoch: of this start.
            clock: monotonic seconds.
            report: looks at blocks that are said to be bad.
        """
        self.node = node
        self._name = name
        self._clock = clock
        self.names = Names(self._is_there)
        self.snapshots = Snapshots(epoch)
        self.tiering: Tiering | None = None
        self.outside: Outside | None = None
        self.rings: RingReader | None = None
        self.events: EventPublisher | None = None
        self.segment: Segment | None = None
        self._fence = Fence()
        self._flush_due = False
        self._waiting: dict[asyncio.Future[None], bytes] = {}  # readers that wait for a key
        self._waiting_handlers: dict[type, Callable[[Any], Awaitable[Any]]] = {
            Find: self._fetch_and_find,
            Acquire: self._acquire,
            ReportBad: report,
            Pull: self._pull,
            DropKeys: self._drop,
        }
        self._handlers: dict[type, Callable[[Any], Any]] = {
            HandOver: self._hand_over,
            Release: self._release,
            Used: self._used,
            Reserve: self._reserve,
            Grant: self._grant,
            Pin: lambda request: pin(self.node, self._clock(), request),
            SetQuota: lambda request: set_quota(self.node, self._clock(), request),
            Commit: self._commit,
            Abandon: self._abandon,
            Snapshot: self._snapshot,
            ListNames: lambda request: self.names.page(request.cursor),
            Stats: lambda _: self._stats(),
        }

    @property
    def _pulls(self) -> Pulls | None:
        return self.outside.pulls if self.outside else None

    def _view(self, offset: int, size_bytes: int) -> memoryview:
        assert self.segment
        return self.segment.view(offset, size_bytes)

    def read_rings(self) -> None:
        """Take in what writers have put, before anything else is answered or expires."""
        if self.rings is not None:
            self.rings.read()

    # ------------------------------------------------------------ requests

    def now(self, request: StoreRequest) -> Any | None:
        """Return the answer of a request that needs not wait for anything; None: `handle` will answer."""
        self.read_rings()
        if isinstance(request, Find):  # changes nothing that others wait for
            return self._find(request) if self._in_memory(request) else None
        handler = self._handlers.get(type(request))
        if handler is None:
            return None
        try:
            return handler(request)
        finally:
            self.after_change()

    async def handle(self, request: StoreRequest) -> Any:
        """Return the answer; raises MooncakeError."""
        self.read_rings()
        try:
            if (waiting := self._waiting_handlers.get(type(request))) is not None:
                return await waiting(request)
            return self._handlers[type(request)](request)
        finally:
            self.after_change()

    async def _acquire(self, request: Acquire) -> Acquired:
        if not request.wait_s >= 0:  # also refuses NaN
            raise RequestError(f"wait_s={request.wait_s}: must not be negative")
        begun_s = self._clock()
        end_s = begun_s + min(request.wait_s, WAIT_S_MAX)
        while request.wait_s and (rest_s := end_s - self._clock()) > 0:
            key = self.node.first_writing(self._clock(), request.keys)
            if key is None:
                break
            await self._until_written(key, rest_s)
        wait_s = min(request.wait_s, WAIT_S_MAX)
        held = await self.tiering.fetch(request.keys, wait_s) if self.tiering else 0
        lacking: dict[bytes, None] = {}
        fetch_s = 0.0
        try:
            if request.source and (pulls := self._pulls):
                lacking = {key: None for key in request.keys if self.node.block_of(key) is None}
                fetch_begun_s = self._clock()
                rest_s = begun_s + min(request.wait_s, PULL_WAIT_S_MAX) - fetch_begun_s
                await pulls.fetch(request.keys, request.source, max(0.0, rest_s))
                fetch_s = self._clock() - fetch_begun_s
            answer = self.node.acquire(self._clock(), request.keys, request.lease_s)
            found = request.keys[: len(answer.blocks)]
            names = [self.names.of(key) for key in found] if request.named else []
            if any(names) or lacking:
                came = [b.size_bytes for key, b in zip(found, answer.blocks, strict=True) if key in lacking]
                names = names if any(names) else []
                answer = Acquired(answer.lease_id, answer.blocks, names, sum(came), fetch_s)
            return answer
        finally:
            self.node.release(self._clock(), held)

    def _in_memory(self, request: Find) -> bool:
        """Whether nothing that is to be leased has to come from the SSD first."""
        tiering = self.tiering
        if tiering is None or not request.lease_s:
            return True
        block_of, tier = self.node.block_of, tiering.tier
        return not any(block_of(key) is None and key in tier for key in split_keys(request.keys))

    def _find(self, request: Find) -> Findings:
        elsewhere = self._size_on_ssd if self.tiering else None
        return find(self.node, self._clock(), request, elsewhere, self._view)

    async def _fetch_and_find(self, request: Find) -> Findings:
        if self.tiering is None or self._in_memory(request):
            return self._find(request)
        tier, block_of = self.tiering.tier, self.node.block_of
        known = [key for key in split_keys(request.keys) if block_of(key) is not None or key in tier]
        held = await self.tiering.fetch(known, 0.0)
        try:
            return self._find(request)
        finally:
            self.node.release(self._clock(), held)

    def _size_on_ssd(self, key: bytes) -> int:
        header = self.tiering.tier.find(key) if self.tiering else None
        return header.length_bytes if header else 0

    async def _pull(self, request: Pull) -> Pulled:
        self._check_orders(request.orders)
        check_keys(request.keys)
        if not request.wait_s >= 0:
            raise RequestError(f"wait_s={request.wait_s}: must not be negative")
        pulls = self._pulls
        if pulls is None:
            raise RequestError(f"store {self._name} copies from no other store: start it with --transfer")
        if request.source == self._name:
            raise RequestError(f"store {self._name} cannot copy from itself")
        wait_s = min(request.wait_s, PULL_WAIT_S_MAX)
        await pulls.fetch(request.keys, request.source, wait_s, prefix=False)
        return Pulled([self.node.block_of(key) is not None for key in request.keys])

    def _hand_over(self, request: HandOver) -> Ok:
        check_keys(request.keys)
        if self.outside:
            self.outside.hand_over(request.keys, request.target)
        return Ok()

    async def _drop(self, request: DropKeys) -> KeysDropped:
        self._check_orders(request.orders)
        keys = request.keys
        check_keys(keys)
        kept: list[bytes] = []
        if request.unless_read_s:
            kept = self.node.read_within(self._clock(), keys, request.unless_read_s)
            keys = [key for key in keys if key not in kept] if kept else keys
        if request.ask_only:
            return KeysDropped(0, kept)
        held = {key for key in keys if self.node.block_of(key) is not None}
        self.node.drop(self._clock(), keys)
        if self.tiering:
            held.update(await self.tiering.drop(keys))
        return KeysDropped(len(held), kept)

    def _check_orders(self, orders: Term | None) -> None:
        """Follow no leader whose term is over."""
        if orders is not None and not self._fence.admits(orders):
            raise NotLeader(f"orders of {orders.leader}, term {orders.number}: another leads now")

    async def _until_written(self, key: bytes, wait_s: float) -> None:
        """Return when `key` is no longer being written, or after `wait_s`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = key
        try:
            await asyncio.wait((future,), timeout=wait_s)
        finally:
            del self._waiting[future]

    def _release(self, request: Release) -> Ok:
        self.node.release(self._clock(), request.lease_id)
        return Ok()

    def _grant(self, request: Grant) -> Granted:
        self.node.give_back(request.writer, request.returned)
        if not request.count:
            return Granted(-1, [], [])
        ring = self.rings.lend(request.writer) if self.rings else -1
        if ring < 0:
            return Granted(-1, [], [])
        room = (request.size_bytes, request.count, request.count_max)
        return Granted(ring, *self.node.grant(self._clock(), request.writer, *room))

    def _used(self, request: Used) -> Ok:
        self.node.used(self._clock(), split_keys(request.keys), request.misses)
        return Ok()

    def _reserve(self, request: Reserve) -> Reserved:
        tags = tags_of(request)
        return self.node.reserve(
            self._clock(), request.writer, request.keys, request.size_bytes, tags,
            replace=request.replace, keep=request.keep,
        )  # fmt: skip

    def _commit(self, request: Commit) -> Committed:
        tickets, names = request.tickets, request.names
        Names.check(names, len(tickets))
        wanted = names or self.tiering
        keys = [self.node.key_in_writing(ticket) for ticket in tickets] if wanted else []
        answer = self.node.commit(self._clock(), tickets, request.checksums)
        for key, name, done in zip(keys, names, answer.done, strict=False):
            if done and key and name:
                self.names.add(key, name)
        if self.tiering:
            self.tiering.replaced([key for key, done in zip(keys, answer.done, strict=True) if done and key])
        return answer

    def _is_there(self, key: bytes) -> bool:
        return self.node.block_of(key) is not None or self.is_below(key)

    def is_below(self, key: bytes) -> bool:
        """Whether the SSD has a block."""
        return self.tiering is not None and key in self.tiering.tier

    def _abandon(self, request: Abandon) -> Ok:
        if self.rings and not request.tickets:
            self.rings.end(request.writer)
        self.node.abandon(self._clock(), request.writer, request.tickets)
        return Ok()

    def _stats(self) -> StoreStats:
        self.node.tick(self._clock())
        stats = self.node.stats()
        if self.tiering is None:
            return stats
        ssd = self.tiering.tier.stats()
        return msgspec.structs.replace(
            stats,
            ssd_capacity_bytes=ssd.capacity_bytes,
            ssd_used_bytes=ssd.live_bytes,
            ssd_blocks=ssd.objects,
            ssd_hits=ssd.hits,
            ssd_read_bytes=ssd.read_bytes,
        )

    def _snapshot(self, request: Snapshot) -> SnapshotPage:
        self.flush()  # so that seq and the complete set are the same moment
        assert self.events
        keys = self.tiering.keys if self.tiering else self.node.complete_keys
        return self.snapshots.page(request.cursor, self.events.seq, keys)

    # ------------------------------------------------------------ consequences

    def after_change(self) -> None:
        """Wake readers whose block is written or lost; publish at the end of this turn of the loop."""
        for future, key in self._waiting.items():
            if not future.done() and not self.node.is_writing(key):
                future.set_result(None)
        if self.node.has_events and not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Publish what has changed."""
        self._flush_due = False
        if self.events and (self.tiering or self.node.has_events):
            events = self.node.drain_events()
            if self.tiering:
                events = self.tiering.merge(events)
            self.names.forget(events.removed)
            self.events.publish(events)
