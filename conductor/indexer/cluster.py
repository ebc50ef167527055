"""Our own cluster as one more source: what its stores and engines hold, for routers that are not ours.

Followed as a gateway does (kvstore.directory.follower, conductor.index_feed), by the metadata's records.
Names are ours, sha256 chains from the root of an engine's context, so equal tokens of another model never
meet. An engine's own cache is its GPU tier; the stores of the cluster are a pool for all, as memory: which of
them has a block on its SSD is not told. Adapters are named by their content there, not by what clients call
them: queries with a LoRA find no context here.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import msgspec
import structlog

from conductor.index import BLOCKS_MAX, PrefixIndex
from conductor.index_feed import IndexFeed
from conductor.indexer.contexts import Context, ContextKey, Holder, Tier
from conductor.indexer.hashes import Own, Salt
from conductor.indexer.service import Indexer
from kvstore.directory.follower import StoreFollower
from mooncake.core.keys import chain_packed, request_root
from mooncake.core.messages import (
    DRAINING,
    INSTANCES_PREFIX,
    STORES_PREFIX,
    InstanceRecord,
    StoreRecord,
    gpu_node,
)
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_follow import Event, Removed, follow

log = structlog.get_logger(__name__)

TENANT = "default"


class _Locked(PrefixIndex):
    """Changed by the feed's loop while threads look things up."""

    def __init__(self, indexer: Indexer, blocks_max: int) -> None:
        super().__init__(blocks_max)
        self._lock = indexer.lock

    def apply(self, node: str, stored: bytes, removed: bytes) -> None:
        with self._lock:
            super().apply(node, stored, removed)

    def reset(self, node: str) -> None:
        with self._lock:
            super().reset(node)

    def sweep(self, keys_max: int) -> None:
        with self._lock:
            super().sweep(keys_max)


class Cluster:
    """Follows one cluster into an Indexer, from `start` to `close`."""

    def __init__(self, indexer: Indexer, metadata: MetadataStore, blocks_max: int = BLOCKS_MAX) -> None:
        """Nothing happens before `start`."""
        self._indexer = indexer
        self._metadata = metadata
        self._index = _Locked(indexer, blocks_max)
        self._feed = IndexFeed(self._index)
        self._contexts: dict[ContextKey, Context] = {}
        self._instances: dict[str, InstanceRecord] = {}
        self._followers: dict[str, tuple[str, StoreFollower]] = {}  # node -> epoch and who follows it
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin on the running loop."""
        for prefix, apply in ((INSTANCES_PREFIX, self._on_instance), (STORES_PREFIX, self._on_store)):
            coming = self._follow(follow(self._metadata, prefix), apply)
            self._tasks.append(asyncio.create_task(coming, name=f"follow {prefix}"))

    async def close(self) -> None:
        """Stop (idempotent)."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(one.close() for _, one in self._followers.values()), return_exceptions=True)
        self._followers.clear()
        await self._feed.close()

    async def _follow(self, events: AsyncIterator[Event], apply: Callable[[Event], None]) -> None:
        async for event in events:
            try:
                apply(event)
            except msgspec.MsgspecError as error:
                # one bad record must not hide the others
                log.error("indexer.bad_record", key=event.key, error=str(error))

    def _on_instance(self, event: Event) -> None:
        instance_id = event.key.removeprefix(INSTANCES_PREFIX)
        known = self._instances.pop(instance_id, None)
        if known is not None:
            self._leave(known)
        record = None if isinstance(event, Removed) else msgspec.json.decode(event.value, type=InstanceRecord)
        if record is None or record.role == DRAINING:
            self._drop(gpu_node(instance_id))
            return
        if self._join(record):
            self._instances[instance_id] = record
            if record.gpu_events:
                node = gpu_node(instance_id)
                told = StoreRecord(
                    node, record.epoch, record.gpu_endpoint, record.gpu_events, "", 0, record.pid
                )
                self._mirror(told)

    def _on_store(self, event: Event) -> None:
        node = event.key.removeprefix(STORES_PREFIX)
        if isinstance(event, Removed):
            self._drop(node)
            with self._indexer.lock:
                for context in self._contexts.values():
                    context.unhold(node)
            return
        self._mirror(msgspec.json.decode(event.value, type=StoreRecord))
        with self._indexer.lock:
            for context in self._contexts.values():
                context.hold(node, Holder("", 0, Tier.CPU))

    def _mirror(self, record: StoreRecord) -> None:
        epoch, _ = self._followers.get(record.node, ("", None))
        if epoch != record.epoch:
            self._drop(record.node)
            self._followers[record.node] = record.epoch, StoreFollower(record, self._feed).start()

    def _drop(self, node: str) -> None:
        _, follower = self._followers.pop(node, ("", None))
        if follower is not None:
            task = asyncio.create_task(follower.close(), name="close store follower")
            self._closing.add(task)  # the loop alone would not keep it alive
            task.add_done_callback(self._closing.discard)
            self._feed.drop(node)

    # ------------------------------------------------------------ contexts

    def _join(self, record: InstanceRecord) -> bool:
        """Let an engine be found; False if its names cannot be told from those of another one."""
        key = ContextKey(TENANT, record.model, "", record.block_size)
        with self._indexer.lock:
            known = self._indexer.contexts.all.get(key)
            if known is None:
                naming = partial(_OwnNaming, bytes.fromhex(record.context_root), record.block_size)
                known = Context(key, Own(record.context_root), naming=naming, index=self._index)
                self._contexts[key] = self._indexer.contexts.all[key] = known
                for node in self._followers:
                    if not node.startswith(gpu_node("")):
                        known.hold(node, Holder("", 0, Tier.CPU))
            if known.profile != Own(record.context_root):
                log.error(
                    "indexer.another_context",
                    instance=record.instance_id,
                    model=record.model,
                    advice="an engine of the same model and block size names its blocks otherwise: left out",
                )
                return False
            known.join(record.instance_id, (record.instance_id, 0))
            known.hold(gpu_node(record.instance_id), Holder(record.instance_id, 0, Tier.GPU))
        return True

    def _leave(self, record: InstanceRecord) -> None:
        key = ContextKey(TENANT, record.model, "", record.block_size)
        with self._indexer.lock:
            context = self._contexts.get(key)
            if context is None:
                return
            context.unhold(gpu_node(record.instance_id))
            self._indexer.contexts.release(context, record.instance_id)
            if not context.services:
                del self._contexts[key]


class _OwnNaming:
    """Our names, for one salt."""

    def __init__(self, root: bytes, block_size: int, salt: Salt) -> None:
        self._root = request_root(root, salt, None) if salt else root
        self._size = block_size
        self.identity = self._root

    def span(self, parent: bytes | None, packed: bytes) -> bytes:
        return b"".join(chain_packed(parent or self._root, packed, self._size))
