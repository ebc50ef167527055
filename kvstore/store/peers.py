"""The other stores of the pool, as the metadata store lists them, and how to reach them."""

import asyncio

import msgspec
import structlog

from kvstore.engine.remote import RemoteStore
from mooncake.core.errors import PeerGone
from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_follow import Removed, follow
from transfer.engine import TransferEngine

log = structlog.get_logger(__name__)


class Peers:
    """Follows the stores' records. A metadata store that is away changes nothing: the last list counts."""

    def __init__(self, metadata: MetadataStore, engine: TransferEngine, node: str) -> None:
        """Nothing happens before `start`.

        Args:
            metadata: where stores register; it is not closed here.
            engine: of this store; not closed here either.
            node: this store's own name, which is no peer.
        """
        self._metadata = metadata
        self._engine = engine
        self._node = node
        self._records: dict[str, StoreRecord] = {}
        self._remotes: dict[str, RemoteStore] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> "Peers":
        """Begin to follow."""
        self._task = asyncio.create_task(self._follow(), name="store peers")
        return self

    async def close(self) -> None:
        """Stop (idempotent)."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    @property
    def nodes(self) -> list[str]:
        """Return the names of the stores that are open to other hosts."""
        return list(self._records)

    def remote(self, node: str) -> RemoteStore:
        """Return the store of `node`.

        Raises:
            PeerGone: none of that name is registered and open to other hosts.
        """
        remote = self._remotes.get(node)
        if remote is None:
            record = self._records.get(node)
            if record is None:
                raise PeerGone(f"no store of node {node!r} is registered with a transfer address")
            remote = self._remotes[node] = RemoteStore(self._engine, record, f"store-{self._node}")
        return remote

    async def _follow(self) -> None:
        async for event in follow(self._metadata, STORES_PREFIX):
            node = event.key.removeprefix(STORES_PREFIX)
            record = None if isinstance(event, Removed) else _decode(node, event.value)
            old = self._records.pop(node, None)
            self._remotes.pop(node, None)
            if record is not None and record.transfer and node != self._node:
                self._records[node] = record
            if old is not None and (record is None or old.transfer != record.transfer):
                # a dead store's links would each be tried once more
                await asyncio.to_thread(self._engine.forget, old.transfer)


def _decode(node: str, value: bytes) -> StoreRecord | None:
    try:
        record = msgspec.json.decode(value, type=StoreRecord)
    except msgspec.MsgspecError as error:
        log.warning("peers.bad_record", node=node, error=str(error))
        return None
    if record.node != node:
        log.warning("peers.bad_record", node=node, error=f"it is a record of {record.node}")
        return None
    return record
