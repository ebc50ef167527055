"""Tells stores which agents' contexts to keep: the shell of conductor.agents.

What is to be said is said every PIN_S, to each store in order; a store that does not answer is left out until
the next round. What is lost on the way costs hits, or room until its time is over: a pin ends by itself.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from conductor.agents import Agents
from conductor.cluster import ClusterView
from conductor.keeps import Order
from kvstore.leader.store_clients import StoreClients
from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core.errors import MooncakeError
from mooncake.core.keys import share_keys
from mooncake.core.messages import Pin, Pinned

log = structlog.get_logger(__name__)

PIN_S = 0.1
"""Distance of two rounds: what a turn leaves is the newest of its store, and evicted last for longer."""
SAY_S = 2.0
"""Deadline of one message: a store answers from memory."""


class KeeperMetrics:
    """Of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """A second one in the same registry raises."""
        self.contexts = Gauge(
            "mooncake_kept_contexts", "Contexts of agents kept for their next turn.", registry=registry
        )
        self.blocks = Gauge("mooncake_kept_blocks", "Blocks of these contexts.", registry=registry)
        self.orders = Counter(
            "mooncake_keep_orders",
            "Orders to stores to keep a context, or no more, by what came of them.",
            ["result"],
            registry=registry,
        )
        for result in ("sent", "failed"):
            self.orders.labels(result)  # shown as 0


class Keeper:
    """Lives on the gateway's loop: `start`, `close`."""

    def __init__(self, agents: Agents, view: ClusterView, metrics: KeeperMetrics) -> None:
        """Nothing is said before `start`."""
        self._agents = agents
        self._view = view
        self._metrics = metrics
        self._clients = StoreClients()
        self._trouble: dict[str, str] = {}  # by node, as it was logged
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="keeper")

    async def close(self) -> None:
        """End (idempotent); pins end by themselves."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._clients.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PIN_S)
            try:
                await self.round(time.monotonic())
            except Exception:  # one bad round must not end all of them
                log.exception("keeper.round_failed")

    async def round(self, now_s: float) -> None:
        """Say what is to be said; troubles are counted, and logged once per store until they end."""
        orders: dict[str, list[Order]] = {}
        for order in self._agents.orders(now_s):
            orders.setdefault(order.node, []).append(order)
        self._metrics.contexts.set(len(self._agents.kept))
        self._metrics.blocks.set(self._agents.kept.total)
        self._know_stores()
        if orders:
            await asyncio.gather(*(self._say(node, said) for node, said in orders.items()))

    def _know_stores(self) -> None:
        there = {record.node: record for record in self._view.stores()}
        for node in [node for node, record in self._clients.records.items() if there.get(node) != record]:
            self._clients.leave(node)
            self._agents.kept.node_gone(node)  # a store that has started anew has no pins either
        for node, record in there.items():
            if node not in self._clients.records:
                self._clients.join(record)

    async def _say(self, node: str, orders: Sequence[Order]) -> None:
        # names of shares that no engine there has are of nothing in its store, which passes over them
        ranks = max((record.ranks for record, *_ in self._view.instances() if record.node == node), default=1)
        for done, order in enumerate(orders):
            try:
                objects = share_keys(order.keys, ranks)
                for begin in range(0, len(objects), KEYS_PER_REQUEST_MAX):
                    keys = objects[begin : begin + KEYS_PER_REQUEST_MAX]
                    await self._clients.ask(node, Pin(keys, order.ttl_s), Pinned, SAY_S)
            except MooncakeError as error:
                self._metrics.orders.labels("failed").inc(len(orders) - done)
                if node not in self._trouble:
                    log.warning("keeper.trouble", node=node, reason=str(error))
                self._trouble[node] = str(error)
                return
            self._metrics.orders.labels("sent").inc()
        if self._trouble.pop(node, None) is not None:
            log.info("keeper.trouble_over", node=node)
