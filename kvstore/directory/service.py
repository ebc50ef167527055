"""The shell of a directory: follows every store that is registered, answers look-ups (DESIGN 2.2).

It owns nothing: started again it is full again as soon as every node has sent its snapshot. Any
number of them may run. Startup: the rpc socket, the list of stores, one follower each. Main loop:
followers feed the Directory, requests read it. Shutdown in reverse.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import structlog

from kvstore.directory.directory import BLOCKS_MAX, Directory, Mode
from kvstore.directory.follower import StoreFollower
from kvstore.directory.messages import (
    DirectoryReply,
    DirectoryRequest,
    DirectoryStatus,
    DirectoryStatusIs,
    Locate,
    Located,
    LocatePrefix,
    PrefixLocated,
    TaskReply,
    TaskRequest,
)
from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core.errors import ConfigError, RequestError
from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_follow import Event, Follower, Removed, follow
from mooncake.core.rpc import RpcServer

log = structlog.get_logger(__name__)

OnLeave = Callable[[str], None]
OnJoin = Callable[[StoreRecord], None]
TaskHandler = Callable[[TaskRequest], Awaitable[TaskReply]]
EVENTS_WAITING_MAX = 10_000
"""Events of one node that wait for its snapshot; beyond, the loop stands still until it is added."""


class _Load:
    """A snapshot that is being added page by page, and the events that wait for its end."""

    def __init__(self, pages: Sequence[bytes]) -> None:
        self.pages = deque(pages)
        self.events: deque[tuple[bytes, bytes]] = deque()
        self.task: asyncio.Task[None] | None = None


class DirectoryListener:
    """Feeds one Directory from the followers of all nodes, on the clock of the shell.

    A snapshot is added one page per turn of the loop: a loop that stands still for seconds answers
    nobody, and takes the heartbeats it did not read for silence.
    """

    def __init__(self, directory: Directory, clock: Callable[[], float] = time.monotonic) -> None:
        """`directory` is changed on the followers' loop."""
        self._directory = directory
        self._clock = clock
        self._loads: dict[str, _Load] = {}
        self._turn = asyncio.Lock()  # one page of one node per turn of the loop

    def on_snapshot(self, node: str, epoch: str, pages: Sequence[bytes]) -> None:
        """See StoreListener."""
        self.stop(node)
        self._directory.begin_snapshot(self._clock(), node, epoch)
        load = self._loads[node] = _Load(pages)
        load.task = asyncio.create_task(self._load(node, load), name=f"load {node}")

    def on_events(self, node: str, stored: bytes, removed: bytes) -> None:
        """See StoreListener."""
        load = self._loads.get(node)
        if load is None:
            self._directory.on_events(self._clock(), node, stored, removed)
            return
        load.events.append((stored, removed))
        if len(load.events) >= EVENTS_WAITING_MAX:
            self._end(node, load)

    def on_stale(self, node: str, reason: str) -> None:
        """See StoreListener."""
        self.stop(node)
        self._directory.on_stale(self._clock(), node, reason)

    def stop(self, node: str) -> None:
        """Add nothing more of a snapshot (idempotent)."""
        load = self._loads.pop(node, None)
        if load is not None and load.task is not None:
            load.task.cancel()

    async def close(self) -> None:
        """Stop all (idempotent)."""
        tasks = [load.task for load in self._loads.values() if load.task]
        for node in list(self._loads):
            self.stop(node)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, node: str, load: _Load) -> None:
        async with self._turn:
            while load.pages:
                self._directory.add_page(node, load.pages.popleft())
                await asyncio.sleep(0)
        load.task = None
        self._end(node, load)

    def _end(self, node: str, load: _Load) -> None:
        """Add what is left, at once, then the events that waited."""
        self.stop(node)
        for page in load.pages:
            self._directory.add_page(node, page)
        self._directory.end_snapshot(node)
        for stored, removed in load.events:
            self._directory.on_events(self._clock(), node, stored, removed)
        log.info("directory.loaded", node=node, blocks=len(self._directory))


class DirectoryService:
    """One directory process: `start`, `run_until`, `close`."""

    def __init__(
        self,
        metadata: MetadataStore,
        endpoint: str = "tcp://127.0.0.1:0",
        blocks_max: int = BLOCKS_MAX,
        clock: Callable[[], float] = time.monotonic,
        on_leave: OnLeave | None = None,
        on_join: OnJoin | None = None,
        on_task: TaskHandler | None = None,
    ) -> None:
        """Nothing is opened before `start`.

        Args:
            metadata: where stores register; it is not closed here.
            endpoint: where look-ups are answered, see rpc.check_endpoint; port 0 = any.
            blocks_max: bound of the directory.
            clock: monotonic seconds.
            on_leave: called when a node's lease has ended, after its replicas were dropped.
            on_join: called with the record of every start of a node.
            on_task: answers requests for tasks; None: they are refused.
        """
        self.directory = Directory(blocks_max)
        self._metadata = metadata
        self._endpoint = endpoint
        self._clock = clock
        self._on_leave = on_leave
        self._on_join = on_join
        self._on_task = on_task
        self._listener = DirectoryListener(self.directory, clock)
        self._stores: dict[str, StoreFollower | None] = {}  # key of the record; None: not readable
        self._members: Follower | None = None
        self._task: asyncio.Task[None] | None = None
        self._rpc: RpcServer | None = None

    async def start(self) -> str:
        """Open everything and begin to serve; returns the concrete endpoint.

        Raises:
            ConfigError: the endpoint cannot be bound.
        """
        self._rpc = RpcServer(self._endpoint, DirectoryRequest, self._handle)
        self._rpc.start()
        self._members = follow(self._metadata, STORES_PREFIX)
        self._task = asyncio.create_task(self._follow(self._members), name="directory members")
        log.info("directory.started", endpoint=self._rpc.endpoint)
        return self._rpc.endpoint

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; raises if the service's own task dies."""
        if self._task is None:
            raise ConfigError("start the directory before run_until")
        stopped = asyncio.create_task(stop.wait(), name="directory stop")
        try:
            await asyncio.wait({stopped, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
        finally:
            stopped.cancel()

    async def close(self) -> None:
        """Stop (idempotent)."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        followers = [follower for follower in self._stores.values() if follower]
        await asyncio.gather(*(follower.close() for follower in followers))
        await self._listener.close()
        if self._rpc:
            await self._rpc.close()
        self._task = self._rpc = self._members = None
        self._stores.clear()

    # ------------------------------------------------------------ members

    async def _follow(self, members: Follower) -> None:
        async for event in members:
            await self._on_member(event)

    async def _on_member(self, event: Event) -> None:
        follower = self._stores.pop(event.key, None)
        if follower:
            await follower.close()
            self._listener.stop(
                event.key.removeprefix(STORES_PREFIX)
            )  # it must not speak for the node's next start
        node = event.key.removeprefix(STORES_PREFIX)
        if isinstance(event, Removed):
            if self.directory.leave(node):
                log.info("directory.left", node=node)
                if self._on_leave:
                    self._on_leave(node)
            return
        self._stores[event.key] = None
        try:
            record = msgspec.json.decode(event.value, type=StoreRecord)
        except msgspec.MsgspecError as error:
            log.warning("directory.bad_record", key=event.key, error=str(error))
            return
        if record.node != node:
            log.warning("directory.bad_record", key=event.key, error=f"it is a record of {record.node}")
            return
        self.directory.join(self._clock(), node, record.epoch)
        if self._on_join:
            self._on_join(record)
        self._stores[event.key] = StoreFollower(record, self._listener).start()

    # ------------------------------------------------------------ requests

    async def _handle(self, request: DirectoryRequest) -> DirectoryReply:
        self.see_members()
        directory, now_s = self.directory, self._clock()
        mode, lag_s = directory.mode(), directory.lag_s(now_s)
        match request:
            case Locate(keys, exact_only):
                _check_count(keys)
                return _located(directory.replicas(keys, exact_only=exact_only), mode, lag_s)
            case LocatePrefix(keys):
                _check_count(keys)
                prefix = directory.longest_prefix(keys)
                return PrefixLocated(prefix.covered, prefix.by_node, mode, lag_s)
            case DirectoryStatus():
                return DirectoryStatusIs(mode, lag_s, len(directory), directory.status(now_s))
            case _:
                if self._on_task is None:
                    raise RequestError("this directory only answers look-ups: it runs without a coordinator")
                return await self._on_task(request)

    @property
    def metadata_connected(self) -> bool:
        """Whether the metadata store answered last time."""
        return self._members is not None and self._members.connected

    def see_members(self) -> None:
        """The members are known if the metadata store answers and every record it has was taken in."""
        members = self._members
        self.directory.members_known = (
            members is not None
            and members.connected
            and members.synced.is_set()
            and members.entries.keys() == self._stores.keys()
        )


def _check_count(keys: Sequence[bytes]) -> None:
    if len(keys) > KEYS_PER_REQUEST_MAX:
        raise RequestError(f"{len(keys)} keys in one look-up: at most {KEYS_PER_REQUEST_MAX}")


def _located(found: list[tuple[str, ...]], mode: Mode, lag_s: float) -> Located:
    nodes: dict[str, int] = {}
    rows: dict[tuple[str, ...], list[int]] = {}  # few distinct ones: one list each
    holders = []
    for names in found:
        row = rows.get(names)
        if row is None:
            row = rows[names] = [nodes.setdefault(name, len(nodes)) for name in names]
        holders.append(row)
    return Located(list(nodes), holders, mode, lag_s)
