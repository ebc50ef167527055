"""The shell of `mooncake store`: owns the segment, the clock, the sockets; Node decides (DESIGN 4, 6).

Startup: segment (touched in a thread), fd server, event socket, rpc server, metrics. Main loop: every
request is one call of the node; its events go out once per turn of the loop. Shutdown in reverse.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from kvstore.limits import (
    HEARTBEAT_S,
    PULL_WAIT_S_MAX,
    TICK_S,
    WAIT_S_MAX,
    NodeLimits,
    check_keys,
)
from kvstore.node.allocator import ALIGN_BYTES
from kvstore.node.changes import NodeEvents
from kvstore.node.contract import CHECKSUM_BYTES, id_base
from kvstore.node.events import EventPublisher, Snapshots
from kvstore.node.finding import find, split_keys
from kvstore.node.keeping import pin, set_quota, tags_of
from kvstore.node.names import Names
from kvstore.node.node import Node
from kvstore.rings import RINGS_BYTES, Fill, Rings
from kvstore.ssd.model import SsdConfig
from kvstore.ssd.tier import SsdTier
from kvstore.ssd.tiering import Tiering
from kvstore.ssd.writebehind import WriteBehindLimits
from kvstore.store.config import FileMemory, StoreConfig
from kvstore.store.door import Door
from kvstore.store.metrics import SsdCollector, StoreCollector
from kvstore.store.outside import Outside
from kvstore.store.pull_metrics import PullCollector
from kvstore.store.pulls import Pulls
from kvstore.store.recheck import Recheck
from kvstore.table import Table, table_bytes
from mooncake.core import wire
from mooncake.core.election import Fence
from mooncake.core.errors import ConfigError, MooncakeError, NotLeader, ProtocolError, RequestError
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
    StoreRecord,
    StoreRequest,
    StoreStats,
    Term,
    Used,
)
from mooncake.core.metadata import MetadataStore
from mooncake.core.rpc import RpcServer
from mooncake.core.scrape import MetricsServer, metrics_url
from transfer.fdpass import FdServer, private_dir
from transfer.file import FileIO
from transfer.file_segment import FileSegment
from transfer.hugepages import create_segment
from transfer.segment import Progress, Segment

log = structlog.get_logger(__name__)

RINGS_EVERY_S = 0.005
"""How late an object that was put by a ring may come into the table and the events, while rings are used."""
RINGS_WATCH_S = 1.0
"""So long after the last one; then a writer has to wake the store."""


class StoreService:
    """One store node: `start`, `run_until`, `close`."""

    def __init__(
        self,
        config: StoreConfig,
        limits: NodeLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        metadata: MetadataStore | None = None,
        memory: FileMemory | None = None,
    ) -> None:
        """Nothing is opened before `start`.

        Args:
            config: see StoreConfig.
            limits: see kvstore.limits.
            clock: monotonic seconds.
            metadata: where the other stores register, to copy from them; needs `config.transfer`. None:
                this store works alone. It is not closed here.
            memory: to divide, which only this process can map; None: its own, shared with this host.
        """
        self.config = config
        self._memory = memory
        self._metadata = metadata
        self.epoch = secrets.token_hex(8)
        capacity_bytes = config.capacity_bytes // ALIGN_BYTES * ALIGN_BYTES
        policy = config.policy(capacity_bytes)
        self.node = Node(capacity_bytes, limits, policy, first_id=id_base(self.epoch))
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._segment: Segment | None = None
        self._table: Segment | None = None
        self._rings: Rings | None = None
        self._watch_until_s = 0.0
        self._watching: asyncio.TimerHandle | None = None
        self._fd_server: FdServer | None = None
        self._table_server: FdServer | None = None
        self._door: Door | None = None
        self._events: EventPublisher | None = None
        self._rpc: RpcServer | None = None
        self._metrics: MetricsServer | None = None
        self._outside: Outside | None = None
        self.tiering: Tiering | None = None
        self._fence = Fence()
        self._beat: asyncio.Task[None] | None = None
        self._snapshots = Snapshots(self.epoch)
        self._names = Names(self._is_there)
        self._flush_due = False
        self._waiting: dict[asyncio.Future[None], bytes] = {}  # readers that wait for a key
        self._recheck = Recheck(self.node, self._clock, self._after_change)
        self._waiting_handlers: dict[type, Callable[[Any], Awaitable[Any]]] = {
            Find: self._fetch_and_find,
            Acquire: self._acquire,
            ReportBad: self._recheck.report,
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
            ListNames: lambda request: self._names.page(request.cursor),
            Stats: lambda _: self._stats(),
        }

    @property
    def metrics_port(self) -> int | None:
        """The port that is served, once started."""
        return self._metrics.port if self._metrics else None

    @property
    def pulls(self) -> Pulls | None:
        """What copies from other stores; None: this store works alone."""
        return self._outside.pulls if self._outside else None

    # ------------------------------------------------------------ life

    async def start(self, progress: Progress | None = None) -> StoreRecord:
        """Open everything and begin to serve; the record tells others how to reach it.

        Args:
            progress: called from a thread while memory is being touched.

        Raises:
            ConfigError: a setting cannot work on this machine. Nothing stays open.
        """
        try:
            return await self._start(progress)
        except BaseException:
            await self.close()
            raise

    async def _start(self, progress: Progress | None) -> StoreRecord:
        config = self.config
        run_dir = await asyncio.to_thread(private_dir, config.run_dir)
        self._segment = await asyncio.to_thread(self._open_segment, progress)
        self._recheck.open(self._segment)
        rows_bytes = table_bytes(self._capacity_bytes)
        self._table = await asyncio.to_thread(Segment.create, self.epoch, rows_bytes + RINGS_BYTES)
        self.node.shelf.table = Table(self._table.view(0, rows_bytes), whole=config.ssd is None)
        self._rings = Rings(self._table.view(rows_bytes, RINGS_BYTES), _on_nonsense)
        if config.ssd is not None:
            self.tiering = await asyncio.to_thread(self._open_tier, config.ssd)
            self.node.below = self._is_below
            await asyncio.to_thread(self._load_names, self.tiering)
        self._events = EventPublisher(config.events, config.node, self.epoch)
        self._rpc = RpcServer(config.endpoint, StoreRequest, self._handle)
        if config.transfer is not None:
            self._outside = await asyncio.to_thread(Outside.open, config.transfer, self._segment)
            self._outside.serve(
                self.node, config.node, self._handle, self._metadata, self._clock, self._names
            )
        if config.metrics_port is not None:
            self._metrics = self._serve_metrics(config.metrics_port)
        record = StoreRecord(
            node=config.node,
            epoch=self.epoch,
            endpoint=self._rpc.endpoint,
            events=self._events.endpoint,
            fd_path=str(Path(run_dir) / f"store-{config.node}.sock"),
            capacity_bytes=self._capacity_bytes,
            pid=os.getpid(),
            metrics_url=metrics_url(self.metrics_port or 0),
            transfer=self._outside.engine.name if self._outside else "",
            segment_address=self._outside.address if self._outside else 0,
            door=str(Path(run_dir) / f"store-{config.node}.door"),
            table=str(Path(run_dir) / f"store-{config.node}.rows"),
        )
        # the record travels with the memory: an engine finds a restarted store without metadata
        self._fd_server = FdServer(record.fd_path, self._segment, wire.encode(record))
        self._table_server = FdServer(record.table, self._table)
        self._door = Door(record.door, self._now, self._handle)
        self._rpc.start()
        self._door.start()
        self._table_server.start()
        self._fd_server.start()
        self._beat = asyncio.create_task(self._keep_time(), name="store beat")
        if self._memory is not None:  # who is on this host comes in by the transfer engine, too
            record = msgspec.structs.replace(record, fd_path="", door="", table="")
        log.info("store.started", **msgspec.structs.asdict(record))
        return record

    def _open_segment(self, progress: Progress | None) -> Segment:
        if (memory := self._memory) is not None:
            return FileSegment.open(self.epoch, memory.path, self._capacity_bytes, memory.offset)
        return create_segment(self.epoch, self._capacity_bytes, self.config.hugepages, progress)

    def _load_names(self, tiering: Tiering) -> None:
        for key, name in tiering.tier.names():
            self._names.add(key, name)

    def _open_tier(self, config: SsdConfig) -> Tiering:
        """Open the SSD tier with what it kept from earlier starts."""
        assert self._segment is not None
        io = FileIO()
        try:
            tier = SsdTier.open(config, io, self._clock)
        except BaseException:
            io.close()
            raise
        limits = WriteBehindLimits(age_s=self.config.ssd_age_s)
        reads = self.config.ssd_reads
        return Tiering(self.node, self._segment, tier, io, limits, self._clock, self._names.of, reads)

    def _serve_metrics(self, port: int) -> MetricsServer:
        registry = CollectorRegistry()
        if self._outside:
            registry.register(self._outside.engine.collector())
        if self.pulls:
            registry.register(PullCollector(self.config.node, self.pulls.stats))
        ssd = self.tiering.tier.stats if self.tiering else None
        if self.tiering:
            registry.register(SsdCollector(self.config.node, self.tiering.tier.stats, self.tiering.behind))
        registry.register(StoreCollector(self.config.node, self.node, ssd))
        server = MetricsServer(registry, port)
        server.start()
        return server

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; raises if one of the service's own tasks dies."""
        servers = [one.task for one in (self._fd_server, self._table_server) if one and one.task]
        if self._beat is None or len(servers) < 2:
            raise ConfigError("start the store before run_until")
        stopped = asyncio.create_task(stop.wait(), name="store stop")
        try:
            tasks = {stopped, self._beat, *servers}
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            stopped.cancel()

    async def close(self) -> None:
        """Stop serving and give the memory back (idempotent)."""
        if self.node.shelf.table:
            self.node.shelf.table.close()
            self._read_rings()
            self.node.shelf.table = None
        if self._watching:
            self._watching.cancel()
        self._watching = self._rings = None
        if self._beat:
            self._beat.cancel()
            await asyncio.gather(self._beat, return_exceptions=True)
        await self._close_servers()
        if self._outside:
            await self._outside.close()
        if self.tiering:
            await self.tiering.close()
        if self._events:
            self._events.close()
        self._recheck.close()
        if self._segment:
            self._segment.close()
        self._beat = self._rpc = self._fd_server = self._events = self._metrics = self._segment = None
        self._table = self._table_server = None
        self._outside = self.tiering = self._door = None

    async def _close_servers(self) -> None:
        for server in (self._rpc, self._door, self._table_server, self._fd_server, self._metrics):
            if server:
                await server.close()

    async def close_tier(self) -> None:
        """Do without the SSD (idempotent). What only it has leaves the pool until the next start."""
        if self.tiering is None:
            return
        self._flush()
        tiering, self.tiering = self.tiering, None
        gone = [key for key in tiering.keys() if self.node.block_of(key) is None]  # noqa: SIM118 - no dict
        self._names.forget(gone)
        if self._events:
            self._events.publish(NodeEvents([], gone))
        await tiering.close()

    async def _keep_time(self) -> None:
        """Expire what is due; heartbeat."""
        beat_s = self._clock()
        while True:
            self._read_rings()
            self.node.tick(self._clock())
            if self.node.shelf.table:
                self.node.shelf.table.live(time.monotonic())
            if self.tiering:
                self.tiering.tick()
            self._evict_ahead()
            self._after_change()
            if self._clock() >= beat_s:
                beat_s = self._clock() + HEARTBEAT_S
                self._flush()
                assert self._events
                self._events.heartbeat()
            await asyncio.sleep(TICK_S)

    def _evict_ahead(self) -> None:
        """Keep a part of the memory free, if that is asked for, so that puts need not wait for evictions."""
        config = self.config
        if config.evict_above_ratio < 1:
            down_to = max(0.0, config.evict_above_ratio - config.evict_ratio)
            above_bytes = int(self._capacity_bytes * config.evict_above_ratio)
            may_go = self.tiering.tier.__contains__ if self.tiering else None
            self.node.evict_ahead(self._clock(), above_bytes, int(self._capacity_bytes * down_to), may_go)

    # ------------------------------------------------------------ requests

    def _now(self, request: StoreRequest) -> Any | None:
        """Return the answer of a request that needs not wait for anything; None: `_handle` will answer."""
        self._read_rings()
        if isinstance(request, Find):  # changes nothing that others wait for
            return self._find(request) if self._in_memory(request) else None
        handler = self._handlers.get(type(request))
        if handler is None:
            return None
        try:
            return handler(request)
        finally:
            self._after_change()

    async def _handle(self, request: StoreRequest) -> Any:
        self._read_rings()
        try:
            if (waiting := self._waiting_handlers.get(type(request))) is not None:
                return await waiting(request)
            return self._handlers[type(request)](request)
        finally:
            self._after_change()

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
            if request.source and (pulls := self.pulls):
                lacking = {key: None for key in request.keys if self.node.block_of(key) is None}
                fetch_begun_s = self._clock()
                rest_s = begun_s + min(request.wait_s, PULL_WAIT_S_MAX) - fetch_begun_s
                await pulls.fetch(request.keys, request.source, max(0.0, rest_s))
                fetch_s = self._clock() - fetch_begun_s
            answer = self.node.acquire(self._clock(), request.keys, request.lease_s)
            found = request.keys[: len(answer.blocks)]
            names = [self._names.of(key) for key in found] if request.named else []
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
        assert self._segment
        elsewhere = self._size_on_ssd if self.tiering else None
        return find(self.node, self._clock(), request, elsewhere, self._segment.view)

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
        if self.pulls is None:
            raise RequestError(
                f"store {self.config.node} copies from no other store: start it with --transfer"
            )
        if request.source == self.config.node:
            raise RequestError(f"store {self.config.node} cannot copy from itself")
        wait_s = min(request.wait_s, PULL_WAIT_S_MAX)
        await self.pulls.fetch(request.keys, request.source, wait_s, prefix=False)
        return Pulled([self.node.block_of(key) is not None for key in request.keys])

    def _hand_over(self, request: HandOver) -> Ok:
        check_keys(request.keys)
        if self._outside:
            self._outside.hand_over(request.keys, request.target)
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
        ring = self._rings.lend(request.writer, time.monotonic()) if self._rings else -1
        if ring < 0:
            return Granted(-1, [], [])
        room = (request.size_bytes, request.count, request.count_max)
        return Granted(ring, *self.node.grant(self._clock(), request.writer, *room))

    def _read_rings(self) -> None:
        """Take in what writers have put, before anything else is answered or expires."""
        rings = self._rings
        if rings is None or rings.is_read:
            return
        for fill in rings.read(time.monotonic()):
            try:
                self._fill(fill)
            except MooncakeError as error:
                log.warning("store.not_filled", error=str(error))
        rings.done()
        self._after_change()
        self._watch_until_s = time.monotonic() + RINGS_WATCH_S
        if self._watching is None:
            rings.watch(on=True)
            self._watching = asyncio.get_running_loop().call_later(RINGS_EVERY_S, self._watch)

    def _watch(self) -> None:
        """Look into the rings every few milliseconds, as long as they are used."""
        self._watching = None
        self._read_rings()
        if self._watching is not None or self._rings is None:
            return
        if time.monotonic() < self._watch_until_s:
            self._watching = asyncio.get_running_loop().call_later(RINGS_EVERY_S, self._watch)
        else:
            self._rings.watch(on=False)
            self._read_rings()  # what was written before the writer could see that

    def _fill(self, fill: Fill) -> None:
        rows = len(fill.tickets)
        keys = split_keys(fill.keys)
        if len(keys) != rows or len(fill.checksums) != CHECKSUM_BYTES * rows:
            raise RequestError(f"{len(keys)} keys for {rows} tickets")
        Names.check(fill.names, rows)
        for row, (ticket, key) in enumerate(zip(fill.tickets, keys, strict=True)):
            checksum = fill.checksums[CHECKSUM_BYTES * row : CHECKSUM_BYTES * (row + 1)]
            if self.node.fill(ticket, key, checksum) and fill.names and fill.names[row]:
                self._names.add(key, fill.names[row])

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
                self._names.add(key, name)
        if self.tiering:
            self.tiering.replaced([key for key, done in zip(keys, answer.done, strict=True) if done and key])
        return answer

    def _is_there(self, key: bytes) -> bool:
        return self.node.block_of(key) is not None or self._is_below(key)

    def _is_below(self, key: bytes) -> bool:
        return self.tiering is not None and key in self.tiering.tier

    def _abandon(self, request: Abandon) -> Ok:
        if self._rings and not request.tickets:
            self._rings.end(request.writer)
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
        self._flush()  # so that seq and the complete set are the same moment
        assert self._events
        keys = self.tiering.keys if self.tiering else self.node.complete_keys
        return self._snapshots.page(request.cursor, self._events.seq, keys)

    # ------------------------------------------------------------ consequences

    def _after_change(self) -> None:
        """Wake readers whose block is written or lost; publish at the end of this turn of the loop."""
        for future, key in self._waiting.items():
            if not future.done() and not self.node.is_writing(key):
                future.set_result(None)
        if self.node.has_events and not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._events and (self.tiering or self.node.has_events):
            events = self.node.drain_events()
            if self.tiering:
                events = self.tiering.merge(events)
            self._names.forget(events.removed)
            self._events.publish(events)


def _on_nonsense(writer: str, error: ProtocolError) -> None:
    log.warning("rings.nonsense", writer=writer, error=str(error))
