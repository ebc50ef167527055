"""The shell of `mooncake store`: owns the segment, the clock, the sockets; Node decides (DESIGN 4, 6).

Startup: segment (touched in a thread), fd server, event socket, rpc server. Main loop: every
request (kvstore.store.requests) is one call of the node; its events go out once per turn of the loop.
Shutdown in reverse.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from kvstore.limits import (
    HEARTBEAT_S,
    TICK_S,
    NodeLimits,
)
from kvstore.node.allocator import ALIGN_BYTES
from kvstore.node.changes import NodeEvents
from kvstore.node.contract import id_base
from kvstore.node.events import EventPublisher
from kvstore.node.node import Node
from kvstore.rings import RINGS_BYTES
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
from kvstore.store.requests import Requests
from kvstore.store.ring_reader import RingReader
from kvstore.table import Table, table_bytes
from mooncake.core import wire
from mooncake.core.errors import ConfigError
from mooncake.core.messages import StoreRecord, StoreRequest
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_metrics import MetadataCollector, process_meter
from mooncake.core.rpc import RpcServer
from transfer.fdpass import FdServer, private_dir
from transfer.file import FileIO
from transfer.file_segment import FileSegment
from transfer.hugepages import create_segment
from transfer.segment import Progress, Segment

log = structlog.get_logger(__name__)


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
        self._fd_server: FdServer | None = None
        self._table_server: FdServer | None = None
        self._door: Door | None = None
        self._rpc: RpcServer | None = None
        self._beat: asyncio.Task[None] | None = None
        self._recheck = Recheck(self.node, self._clock, lambda: self.requests.after_change())
        self.requests = Requests(self.node, config.node, self.epoch, clock, self._recheck.report)

    @property
    def tiering(self) -> Tiering | None:
        """The SSD below the memory, if there is one."""
        return self.requests.tiering

    @property
    def pulls(self) -> Pulls | None:
        """What copies from other stores; None: this store works alone."""
        outside = self.requests.outside
        return outside.pulls if outside else None

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
        requests = self.requests
        requests.segment = self._segment
        rings = self._table.view(rows_bytes, RINGS_BYTES)
        requests.rings = RingReader(rings, self.node, requests.names, requests.after_change)
        if config.ssd is not None:
            requests.tiering = await asyncio.to_thread(self._open_tier, config.ssd)
            self.node.below = requests.is_below
            await asyncio.to_thread(self._load_names, requests.tiering)
        requests.events = EventPublisher(config.events, config.node, self.epoch)
        self._rpc = RpcServer(config.endpoint, StoreRequest, requests.handle)
        if config.transfer is not None:
            requests.outside = await asyncio.to_thread(Outside.open, config.transfer, self._segment)
            requests.outside.serve(
                self.node, config.node, requests.handle, self._metadata, self._clock, requests.names
            )
        record = StoreRecord(
            node=config.node,
            epoch=self.epoch,
            endpoint=self._rpc.endpoint,
            events=requests.events.endpoint,
            fd_path=str(Path(run_dir) / f"store-{config.node}.sock"),
            capacity_bytes=self._capacity_bytes,
            pid=os.getpid(),
            metrics_url=config.metrics_url,
            transfer=requests.outside.engine.name if requests.outside else "",
            segment_address=requests.outside.address if requests.outside else 0,
            door=str(Path(run_dir) / f"store-{config.node}.door"),
            table=str(Path(run_dir) / f"store-{config.node}.rows"),
        )
        # the record travels with the memory: an engine finds a restarted store without metadata
        self._fd_server = FdServer(record.fd_path, self._segment, wire.encode(record))
        self._table_server = FdServer(record.table, self._table)
        self._door = Door(record.door, requests.now, requests.handle)
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
            self.requests.names.add(key, name)

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
        return Tiering(self.node, self._segment, tier, io, limits, self._clock, self.requests.names.of, reads)

    def register(self, registry: CollectorRegistry) -> None:
        """Show its metrics there, once it has started."""
        if outside := self.requests.outside:
            registry.register(outside.engine.collector())
        if self.pulls:
            registry.register(PullCollector(self.config.node, self.pulls.stats))
        ssd = self.tiering.tier.stats if self.tiering else None
        if self.tiering:
            registry.register(SsdCollector(self.config.node, self.tiering))
        registry.register(StoreCollector(self.config.node, self.node, ssd))
        registry.register(MetadataCollector(process_meter()))

    @property
    def unsaved(self) -> int:
        """Blocks that would be lost with this process although there is an SSD for them."""
        return len(self.tiering.behind) if self.tiering else 0

    async def save(self, stop: Callable[[], bool]) -> None:
        """Copy to the SSD, if there is one, what only memory has, until it must `stop`."""
        if self.tiering:
            self.requests.flush()  # what has just been committed counts, too
            await self.tiering.save(stop)

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
        requests = self.requests
        if self.node.shelf.table:
            self.node.shelf.table.close()
        if requests.rings:
            requests.rings.close()
        self.node.shelf.table = requests.rings = None
        if self._beat:
            self._beat.cancel()
            await asyncio.gather(self._beat, return_exceptions=True)
        await self._close_servers()
        if requests.outside:
            await requests.outside.close()
        if requests.tiering:
            await requests.tiering.close()
        if requests.events:
            requests.events.close()
        self._recheck.close()
        if self._segment:
            self._segment.close()
        self._beat = self._rpc = self._fd_server = self._table_server = self._door = None
        self._segment = self._table = requests.segment = None
        requests.outside = requests.tiering = requests.events = None

    async def _close_servers(self) -> None:
        for server in (self._rpc, self._door, self._table_server, self._fd_server):
            if server:
                await server.close()

    async def close_tier(self) -> None:
        """Do without the SSD (idempotent). What only it has leaves the pool until the next start."""
        requests = self.requests
        if requests.tiering is None:
            return
        requests.flush()
        tiering, requests.tiering = requests.tiering, None
        gone = [key for key in tiering.keys() if self.node.block_of(key) is None]  # noqa: SIM118 - no dict
        requests.names.forget(gone)
        if requests.events:
            requests.events.publish(NodeEvents([], gone))
        await tiering.close()

    async def _keep_time(self) -> None:
        """Expire what is due; heartbeat."""
        beat_s = self._clock()
        requests = self.requests
        while True:
            requests.read_rings()
            self.node.tick(self._clock())
            if self.node.shelf.table:
                self.node.shelf.table.live(time.monotonic())
            if self.tiering:
                self.tiering.tick()
            self._evict_ahead()
            requests.after_change()
            if self._clock() >= beat_s:
                beat_s = self._clock() + HEARTBEAT_S
                requests.flush()
                assert requests.events
                requests.events.heartbeat()
            await asyncio.sleep(TICK_S)

    def _evict_ahead(self) -> None:
        """Keep a part of the memory free, if that is asked for, so that puts need not wait for evictions."""
        config = self.config
        if config.evict_above_ratio < 1:
            down_to = max(0.0, config.evict_above_ratio - config.evict_ratio)
            above_bytes = int(self._capacity_bytes * config.evict_above_ratio)
            may_go = self.tiering.tier.__contains__ if self.tiering else None
            self.node.evict_ahead(self._clock(), above_bytes, int(self._capacity_bytes * down_to), may_go)
