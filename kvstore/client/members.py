"""Who is in the pool: stores and directories, followed by one background thread with a loop of its own.

A metadata store that is away changes nothing: the last list counts. A store of this host is one whose
socket is here and whose memory says that it is the one of the record; every other one is reached through
the transfer engine.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from kvstore.client.access import Access
from kvstore.client.local import LocalStore
from kvstore.client.remote import DistantStore
from kvstore.client.stage import Stage
from kvstore.directory.messages import DIRECTORIES_PREFIX, DirectoryRecord
from kvstore.engine.client import PoolClient
from kvstore.leader.placement import Placer, Room
from kvstore.leader.task_book import drain_key
from mooncake.core.errors import MooncakeError, PeerError, PeerGone, PeerTimeout
from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_follow import Removed, follow
from mooncake.core.metadata_messages import MetaEntry
from transfer.engine import TransferEngine

log = structlog.get_logger(__name__)

ROOM_EVERY_S = 2.0
"""How often stores are asked how full they are, when there is a choice; the placer counts in between."""
AWAY_S = 1.0
"""A store of another host that failed a call is left alone so long: no call pays for it twice."""
CLOSE_S = 10.0
LIST_EVERY_S = 0.2
NEAR = "here"

OpenMetadata = Callable[[], MetadataStore]
Take = Callable[[str, bytes | None], None]
T = TypeVar("T")


class Members:
    """`stores` by name, endpoints of `directories` by name; both dicts are replaced, never changed."""

    def __init__(self, engine: TransferEngine | None, writer: str, touch: bool) -> None:
        """Know nobody. `engine`: for stores of other hosts; None: they are left out."""
        self.stores: dict[str, Access] = {}
        self.directories: dict[str, str] = {}
        self.changed = threading.Event()
        """Set whenever one of them was replaced, for one who waits for it and clears it."""
        self.placer = Placer()
        self.placing = threading.Lock()
        self._engine = engine
        self._stage = Stage(engine) if engine else None
        self._writer = writer
        self._touch = touch
        self._away: dict[str, float] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._listed = threading.Event()
        self._died: BaseException | None = None

    # ------------------------------------------------------------ who is there

    def join(self, record: StoreRecord) -> None:
        """Use a store, or its next start, from now on. Attaches if it is here, which may take a moment."""
        known = self.stores.get(record.node)
        if known is not None and known.record == record:
            return
        access: Access | None = self._local(record)
        if access is None and record.transfer and self._engine and self._stage:
            access = DistantStore(self._engine, self._stage, record, self._writer)
        if access is None:
            log.info("pool.out_of_reach", node=record.node, transfer=record.transfer)
            self.leave(record.node)
            return
        with self._lock:
            if self._closed:
                access.close()
                return
            old = self.stores.get(record.node)
            self.stores = {**self.stores, record.node: access}
            self._away.pop(record.node, None)
        self.changed.set()
        with self.placing:
            size_bytes = record.capacity_bytes
            self.placer.update(Room(record.node, size_bytes, size_bytes, _locality(access)))
        if old is not None:
            old.close()

    def _local(self, record: StoreRecord) -> LocalStore | None:
        if not record.fd_path or not Path(record.fd_path).is_socket():
            return None
        try:
            client = PoolClient(record, self._writer, touch=self._touch)
        except MooncakeError as error:
            log.info("pool.not_attached", node=record.node, error=str(error))
            return None
        if client.record is None or client.record.epoch != record.epoch:
            client.close()  # another host's store of the same path, or one that has been restarted since
            return None
        return LocalStore(client, record, self._writer)

    def leave(self, node: str) -> None:
        """Use a store no more (idempotent)."""
        with self._lock:
            old = self.stores.get(node)
            self.stores = {name: access for name, access in self.stores.items() if name != node}
        self.changed.set()
        with self.placing:
            self.placer.leave(node)
        if old is not None:
            old.close()

    def lost(self, access: Access, error: MooncakeError) -> None:
        """Leave a store that failed alone for a moment; one of this host looks after itself."""
        if not access.near and isinstance(error, PeerTimeout | PeerGone):
            self._away[access.node] = time.monotonic() + AWAY_S
            log.info("pool.store_away", node=access.node, error=str(error))

    def is_away(self, node: str) -> bool:
        """Whether a store failed a moment ago."""
        return bool(self._away) and self._away.get(node, 0.0) > time.monotonic()

    # ------------------------------------------------------------ the background

    def follow(self, metadata: OpenMetadata, deadline_s: float) -> None:
        """Follow the metadata store in a thread; return when it was listed once.

        Raises:
            PeerTimeout: it did not answer in time.
            MooncakeError: whatever `metadata` raises.
        """
        self._thread = threading.Thread(target=self._run, args=(metadata,), name="pool", daemon=True)
        self._thread.start()
        if not self._listed.wait(deadline_s):
            raise PeerTimeout(f"the metadata store did not answer within {deadline_s:g} s")
        if self._died is not None:
            raise self._died

    def close(self) -> None:
        """End the thread and let go of every store (idempotent)."""
        self._closed = True
        loop, task, thread = self._loop, self._task, self._thread
        if loop is not None and task is not None and thread is not None and thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                loop.call_soon_threadsafe(task.cancel)
            thread.join(CLOSE_S)
        with self._lock:
            stores, self.stores = self.stores, {}
        for access in stores.values():
            access.close()

    def _run(self, metadata: OpenMetadata) -> None:
        try:
            asyncio.run(self._main(metadata))
        except asyncio.CancelledError:
            pass
        except MooncakeError as error:
            self._died = error
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            log.debug("pool.interpreter_ends", reason=str(error))  # asyncio wanted one more thread
        finally:
            self._listed.set()

    async def _main(self, metadata: OpenMetadata) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        store = metadata()
        try:
            for prefix, take in self._takers:
                for entry in await self._list(store, prefix):
                    await asyncio.to_thread(take, entry.key.removeprefix(prefix), entry.value)
            self._listed.set()
            async with asyncio.TaskGroup() as group:
                for prefix, take in self._takers:
                    group.create_task(self._follow(store, prefix, take))
                group.create_task(self._ask_rooms())
        finally:
            await store.close()

    @property
    def _takers(self) -> tuple[tuple[str, Take], ...]:
        """What is followed, in the order in which it has to be known."""
        return (
            (DIRECTORIES_PREFIX, self._on_directory),
            (drain_key(""), self._on_drain),
            (STORES_PREFIX, self._on_store),
        )

    async def _list(self, store: MetadataStore, prefix: str) -> list[MetaEntry]:
        while True:
            try:
                return (await store.get(prefix)).entries
            except PeerError as error:
                log.info("pool.no_metadata", error=str(error))
                await asyncio.sleep(LIST_EVERY_S)

    async def _follow(self, store: MetadataStore, prefix: str, take: Take) -> None:
        """Apply changes one by one, in a thread: to attach to a store takes a moment."""
        async for event in follow(store, prefix):
            value = None if isinstance(event, Removed) else event.value
            await _aside(take, event.key.removeprefix(prefix), value)

    def _on_store(self, name: str, value: bytes | None) -> None:
        record = _decoded(value, StoreRecord, name)
        if record is not None and record.node == name:
            self.join(record)
        else:
            self.leave(name)

    def _on_drain(self, node: str, value: bytes | None) -> None:
        """Place nothing more on a node that is emptied, until somebody says otherwise."""
        with self.placing:
            self.placer.drain(node, on=value is not None)

    def _on_directory(self, name: str, value: bytes | None) -> None:
        record = _decoded(value, DirectoryRecord, name)
        others = {known: endpoint for known, endpoint in self.directories.items() if known != name}
        self.directories = {**others, name: record.endpoint} if record is not None else others
        self.changed.set()

    async def _ask_rooms(self) -> None:
        """Keep the placer's view young, while there is a choice."""
        while True:
            await asyncio.sleep(ROOM_EVERY_S)
            stores = self.stores
            if len(stores) > 1:
                await asyncio.gather(*(_aside(self._ask_room, one) for one in stores.values()))

    def _ask_room(self, access: Access) -> None:
        if self.is_away(access.node):
            return
        try:
            stats = access.stats(ROOM_EVERY_S)
        except MooncakeError as error:
            self.lost(access, error)
            return
        with self.placing:
            if self.stores.get(access.node) is access:
                free_bytes = stats.capacity_bytes - stats.used_bytes
                self.placer.update(Room(access.node, stats.capacity_bytes, free_bytes, _locality(access)))


async def _aside(call: Callable[..., None], *args: object) -> None:
    """Run `call` in a thread. There are none once the interpreter ends: then the caller's task ends in peace.

    A program that has not closed its stores must not end with our tracebacks.
    """
    try:
        await asyncio.to_thread(call, *args)
    except RuntimeError as error:
        if "shutdown" not in str(error):
            raise
        raise asyncio.CancelledError from error


def _locality(access: Access) -> str:
    return NEAR if access.near else ""


def _decoded(value: bytes | None, kind: type[T], name: str) -> T | None:
    if value is None:
        return None
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as error:
        log.warning("pool.bad_record", name=name, error=str(error))
        return None
