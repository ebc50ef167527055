"""Stores without memory: sets of keys that speak the stores' protocol over real sockets, orders included."""

import asyncio

import msgspec

from kvstore.node.changes import NodeEvents
from kvstore.node.events import EventPublisher, Snapshots
from mooncake.core.election import Fence
from mooncake.core.errors import NotLeader, RequestError
from mooncake.core.messages import (
    STORES_PREFIX,
    DropKeys,
    KeysDropped,
    Pull,
    Pulled,
    Snapshot,
    Stats,
    StoreRecord,
    StoreRequest,
    StoreStats,
)
from mooncake.core.rpc import RpcServer

SIZE = 4096


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


class FakeStore:
    """One store; `pool` are all, by name. `slow_s` per Pull; `orders` is whom it obeyed, in order."""

    def __init__(self, pool: "dict[str, FakeStore]", node: str, *numbers: int):
        self.node = node
        self.epoch = f"{node}-{len(pool)}"
        self.blocks = dict.fromkeys(keys(*numbers))
        self.orders: list[int] = []
        self.refused: list[int] = []
        self.slow_s = 0.0
        self._pool = pool
        self._fence = Fence()
        self._events = EventPublisher("tcp://127.0.0.1:*", node, self.epoch)
        self._snapshots = Snapshots(self.epoch)
        self._rpc = RpcServer("tcp://127.0.0.1:*", StoreRequest, self._handle)
        self._beat: asyncio.Task | None = None
        pool[node] = self

    def start(self) -> StoreRecord:
        self._rpc.start()
        self._beat = asyncio.create_task(self._keep_time())
        return StoreRecord(
            self.node, self.epoch, self._rpc.endpoint, self._events.endpoint, "", 1000 * SIZE, 0
        )

    async def register(self, metadata) -> None:
        await metadata.put(STORES_PREFIX + self.node, msgspec.json.encode(self.start()))

    async def close(self) -> None:
        self._pool.pop(self.node, None)
        self._beat.cancel()
        await asyncio.gather(self._beat, return_exceptions=True)
        await self._rpc.close()
        self._events.close()

    async def _keep_time(self) -> None:
        while True:
            self._events.heartbeat()
            await asyncio.sleep(0.1)

    async def _handle(self, request):
        match request:
            case Snapshot(cursor):
                return self._snapshots.page(cursor, self._events.seq, lambda: list(self.blocks))
            case Stats():
                return StoreStats(1000 * SIZE, len(self.blocks) * SIZE, len(self.blocks), *[0] * 7)
            case Pull(wanted, source, _, orders):
                self._obey(orders)
                await asyncio.sleep(self.slow_s)
                there = self._pool[source].blocks if source in self._pool else {}
                new = [key for key in wanted if key in there and key not in self.blocks]
                self.blocks.update(dict.fromkeys(new))
                self._events.publish(NodeEvents(new, []))
                return Pulled([key in self.blocks for key in wanted])
            case DropKeys(wanted, orders):
                self._obey(orders)
                gone = [key for key in wanted if key in self.blocks]
                for key in gone:
                    del self.blocks[key]
                self._events.publish(NodeEvents([], gone))
                return KeysDropped(len(gone))
        raise RequestError(f"not here: {request}")

    def _obey(self, orders) -> None:
        if not self._fence.admits(orders):
            self.refused.append(orders.number)
            raise NotLeader(f"term {orders.number} is over")
        self.orders.append(orders.number)
