"""How a directory reaches every store: one rpc client each, wherever the store is."""

import asyncio
from typing import Any, TypeVar

import structlog

from mooncake.core.errors import MooncakeError, PeerGone, ProtocolError
from mooncake.core.messages import Stats, StoreRecord, StoreReply, StoreRequest, StoreStats
from mooncake.core.rpc import RpcClient

log = structlog.get_logger(__name__)

STATS_EVERY_S = 1.0
"""Placement counts what it gave out since a report; a second of writing is a few per cent of a node."""
STATS_S = 2.0
"""Deadline of one report; a node that is late is not asked again before."""

T = TypeVar("T")


class StoreClients:
    """One client per registered store. All methods run on one loop."""

    def __init__(self) -> None:
        """Know no store."""
        self._records: dict[str, StoreRecord] = {}
        self._clients: dict[str, RpcClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def records(self) -> dict[str, StoreRecord]:
        """The stores that are registered now."""
        return self._records

    def join(self, record: StoreRecord) -> None:
        """Know a store, or its next start."""
        self.leave(record.node)
        self._records[record.node] = record

    def leave(self, node: str) -> None:
        """Forget a store (idempotent); calls under way end by their deadline."""
        self._records.pop(node, None)
        client = self._clients.pop(node, None)
        if client is not None:
            task = asyncio.create_task(client.close(), name=f"close client of {node}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def ask(self, node: str, request: StoreRequest, kind: type[T], deadline_s: float) -> T:
        """Return the store's answer, a `kind`.

        Raises:
            PeerGone: the node is not registered.
            MooncakeError: as RpcClient.call.
        """
        record = self._records.get(node)
        if record is None:
            raise PeerGone(f"no store of node {node!r} is registered")
        client = self._clients.get(node)
        if client is None:
            client = self._clients[node] = RpcClient(record.endpoint, StoreReply)
        reply: Any = await client.call(request, deadline_s)
        if not isinstance(reply, kind):
            raise ProtocolError(f"store {node}: {type(reply).__name__} instead of {kind.__name__}")
        return reply

    async def close(self) -> None:
        """Close every client (idempotent)."""
        for node in list(self._records):
            self.leave(node)
        if self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)


class StatsPoll:
    """Asks every store for its counters, again and again; at most one question to each is open."""

    def __init__(self, clients: StoreClients, every_s: float = STATS_EVERY_S) -> None:
        """Nothing happens before `run`."""
        self._clients = clients
        self._every_s = every_s
        self._asking: dict[str, asyncio.Task[None]] = {}
        self.stats: dict[str, StoreStats] = {}
        """The last answer of each store that is registered."""

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            while True:
                for node in [node for node in self.stats if node not in self._clients.records]:
                    del self.stats[node]
                for node in self._clients.records:
                    if node not in self._asking:
                        task = asyncio.create_task(self._ask(node), name=f"stats of {node}")
                        self._asking[node] = task
                await asyncio.sleep(self._every_s)
        finally:
            for task in self._asking.values():
                task.cancel()

    async def _ask(self, node: str) -> None:
        try:
            stats = await self._clients.ask(node, Stats(), StoreStats, STATS_S)
            if node in self._clients.records:
                self.stats[node] = stats
        except MooncakeError as error:
            log.debug("stats.failed", node=node, reason=str(error))
        finally:
            self._asking.pop(node, None)
