"""The embedded metadata store over rpc: a server around it, and a client with its interface.

The Conductor hosts the server; stores, engines and `mooncake up` are clients. A restarted server
is empty and has a new epoch; `Registration` and `follow` bring everything back.
"""

from collections.abc import AsyncIterator
from typing import Any

from mooncake.core.errors import MooncakeError
from mooncake.core.messages import Ok
from mooncake.core.metadata import POLL_S
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.metadata_messages import (
    MetaChanges,
    MetaDelete,
    MetaEntries,
    MetaGet,
    MetaGrant,
    MetaKeepAlive,
    MetaLease,
    MetaPut,
    MetaPutResult,
    MetaReply,
    MetaRequest,
    MetaRevoke,
    MetaWatch,
)
from mooncake.core.metadata_outage import Outage
from mooncake.core.rpc import RpcClient, RpcServer

CALL_S = 1.0
"""Deadline of one call: everything here is a dictionary access on the same host or rack."""
WAIT_S_MAX = 30.0
"""Longest poll a client may ask for: bounds the tasks left behind by clients that vanished."""


class MetadataServer:
    """Serves a MemoryMetadata on `endpoint` (loopback or ipc, see rpc.check_endpoint)."""

    def __init__(self, endpoint: str, store: MemoryMetadata | None = None) -> None:
        """Bind at once; `endpoint` is the concrete address."""
        self.store = store or MemoryMetadata()
        self._rpc = RpcServer(endpoint, MetaRequest, self._handle)
        self.endpoint = self._rpc.endpoint

    def start(self) -> None:
        """Begin to serve on the running event loop."""
        self._rpc.start()

    async def close(self) -> None:
        """Stop serving; what the store held is forgotten."""
        await self._rpc.close()
        await self.store.close()

    async def _handle(self, request: MetaRequest) -> MetaReply:
        store = self.store
        match request:
            case MetaGet(prefix):
                return await store.get(prefix)
            case MetaPut(key, value, lease_id, if_revision):
                return await store.put(key, value, lease_id, if_revision if if_revision >= 0 else None)
            case MetaDelete(key):
                await store.delete(key)
            case MetaGrant(ttl_s):
                return MetaLease(await store.grant(ttl_s), ttl_s)
            case MetaKeepAlive(lease_id):
                alive = await store.keep_alive(lease_id)
                return MetaLease(lease_id if alive else 0, 0.0)
            case MetaRevoke(lease_id):
                await store.revoke(lease_id)
            case MetaWatch(prefix, revision, wait_s, epoch):
                return await store.poll(prefix, revision, epoch, min(max(0.0, wait_s), WAIT_S_MAX))
        return Ok()


class RemoteMetadata:
    """Client of a MetadataServer. Implements MetadataStore; a server away shows as PeerTimeout."""

    def __init__(self, endpoint: str, call_s: float = CALL_S, poll_s: float = POLL_S) -> None:
        """Connecting is lazy: the server may come later. A watch yields every `poll_s` at least."""
        self._rpc = RpcClient(endpoint, MetaReply)
        self._outage = Outage(endpoint)
        self._call_s = call_s
        self._poll_s = poll_s

    async def get(self, prefix: str) -> MetaEntries:
        """See MetadataStore."""
        reply: MetaEntries = await self._call(MetaGet(prefix))
        return reply

    async def put(
        self, key: str, value: bytes, lease_id: int = 0, if_revision: int | None = None
    ) -> MetaPutResult:
        """See MetadataStore."""
        compare = -1 if if_revision is None else if_revision
        reply: MetaPutResult = await self._call(MetaPut(key, value, lease_id, compare))
        return reply

    async def delete(self, key: str) -> None:
        """See MetadataStore."""
        await self._call(MetaDelete(key))

    async def grant(self, ttl_s: float) -> int:
        """See MetadataStore."""
        reply: MetaLease = await self._call(MetaGrant(ttl_s))
        return reply.lease_id

    async def keep_alive(self, lease_id: int) -> bool:
        """See MetadataStore."""
        reply: MetaLease = await self._call(MetaKeepAlive(lease_id))
        return reply.lease_id != 0

    async def revoke(self, lease_id: int) -> None:
        """See MetadataStore."""
        await self._call(MetaRevoke(lease_id))

    async def watch(self, prefix: str, from_revision: int, epoch: str = "") -> AsyncIterator[MetaChanges]:
        """See MetadataStore."""
        while True:
            request = MetaWatch(prefix, from_revision, self._poll_s, epoch)
            batch: MetaChanges = await self._call(request, self._poll_s)
            yield batch
            if batch.compacted:
                return
            from_revision = batch.revision

    async def close(self) -> None:
        """See MetadataStore."""
        await self._rpc.close()

    async def _call(self, request: Any, served_s: float = 0.0) -> Any:
        """Call; `served_s` is how long the server may take by design."""
        try:
            reply = await self._rpc.call(request, served_s + self._call_s)
        except MooncakeError as error:
            self._outage.failed(error)
            raise
        self._outage.answered()
        return reply
