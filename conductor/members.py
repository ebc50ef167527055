"""The IO shell around ClusterView and PrefixIndex: who is there, links to them, what they hold.

Follows the metadata store's records, keeps one Link per registered engine start, pings them every
PULSE_S, and mirrors what store nodes and engines publish of their blocks into the PrefixIndex. Whoever
dispatches requests is told of outputs and of losses (`Sink`), the view first, as RequestMachine asks for.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog
import zmq

from conductor.cluster import PULSE_S, ClusterView, Health, Transition
from conductor.index import PrefixIndex
from conductor.index_feed import IndexFeed
from conductor.index_metrics import Booked, IndexCollector, LoadCollector
from conductor.links import Link, LinkState
from conductor.metrics import DecisionMetrics
from conductor.roles import Order
from kvstore.directory import follower
from mooncake.core.config import LOOPBACK, ROLES
from mooncake.core.messages import (
    DRAINING,
    INSTANCES_PREFIX,
    STORES_PREFIX,
    InstanceRecord,
    Pulse,
    RoleOrder,
    StoreRecord,
    Term,
    gpu_node,
)
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_follow import Event, Removed, follow

if TYPE_CHECKING:
    from conductor.vllm_seam import EngineCoreOutputs

log = structlog.get_logger(__name__)

ENGINE_SLOTS = 8
"""vLLM fixes its per-engine metric labels at start (34 kB of /metrics per slot). More instances than
slots share the last one; see conductor.engine_gauges."""

RELINK_S = 1.0
"""A lost link whose record still stands is tried again after this: long enough not to spin, short
enough that a false alarm costs little."""


class Sink(Protocol):
    """Whoever dispatches requests."""

    reads_outputs: bool
    """Whether `on_outputs` is wanted: reading what engines say imports vLLM."""

    def on_outputs(self, link: Link, outputs: "EngineCoreOutputs") -> None:
        """An engine said something."""
        ...

    def on_lost(self, instance_id: str, reason: str) -> None:
        """Move the instance's requests; the view knows already."""
        ...

    def on_draining(self, instance_id: str) -> None:
        """It takes nothing new, on its way to another role."""
        ...

    def on_pulse(self, link: Link, pulse: Pulse) -> None:
        """An engine told how it is, and what it has moved."""
        ...

    def on_tick(self, now_s: float) -> None:
        """PULSE_S have passed."""
        ...


class StoreFollower(Protocol):
    """Mirrors one store node, or the own cache of one engine, into the index until closed."""

    async def close(self) -> None:
        """Stop."""
        ...


FollowStore = Callable[[StoreRecord, IndexFeed], StoreFollower]


def follow_events(record: StoreRecord, feed: IndexFeed) -> StoreFollower:
    """Mirror a real store node: its snapshot, then its events."""
    return follower.StoreFollower(record, feed).start()


def cache_record(record: InstanceRecord) -> StoreRecord:
    """Return the record of an engine's own cache, as of a store that lends nothing to others."""
    node = gpu_node(record.instance_id)
    return StoreRecord(node, record.epoch, record.gpu_endpoint, record.gpu_events, "", 0, record.pid)


class Members:
    """Engine instances and store nodes of one cluster, as this gateway sees them."""

    def __init__(
        self,
        metadata: MetadataStore,
        view: ClusterView,
        index: PrefixIndex,
        gateway_id: str,
        metrics: DecisionMetrics,
        follow_store: FollowStore | None = follow_events,
        address: str = LOOPBACK,
    ) -> None:
        """Nothing happens before `start`.

        `follow_store` None: a core knows what stores and engines hold, so this gateway need not.
        `address`: of this host, where engines send their tokens.
        """
        self.view = view
        self._address = address
        self.links: dict[str, Link] = {}
        self.term: Term | None = None
        """In which orders are given; a core's last one, for relays to refuse what it says after it."""
        self._metadata = metadata
        self._feed = IndexFeed(index)
        self._gateway_id = gateway_id
        self._metrics = metrics
        self._follow_store = follow_store
        self._stores: dict[str, StoreFollower] = {}
        self._caches: dict[str, tuple[str, StoreFollower]] = {}  # instance -> epoch, whose cache it follows
        self._slots: dict[str, int] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sink: Sink | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False
        self._booked: list[Booked] = []  # as of the last tick: scrapes come from other threads
        if follow_store is not None:
            metrics.registry.register(IndexCollector(index, self.gpu_blocks))
            metrics.registry.register(LoadCollector(lambda: self._booked))

    # ------------------------------------------------------------ life

    def start(self, sink: Sink) -> None:
        """Begin to follow the cluster, on the running loop."""
        self._sink = sink
        self.view.tick(time.monotonic())  # from now on it can tell a late tick of ours from silence
        instances = follow(self._metadata, INSTANCES_PREFIX)
        stores = follow(self._metadata, STORES_PREFIX)
        self._tasks = [
            asyncio.create_task(self._follow(instances, self._on_instance), name="follow instances"),
            asyncio.create_task(self._follow(stores, self._on_store), name="follow stores"),
            asyncio.create_task(self._tick_forever(), name="members tick"),
        ]

    async def close(self) -> None:
        """Leave every relay in good order."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self.links.values():
            link.close()
        self.links.clear()
        followers = [*self._stores.values(), *(follower for _, follower in self._caches.values())]
        await asyncio.gather(*(f.close() for f in followers), return_exceptions=True)
        await self._feed.close()
        self._context.destroy()

    async def _follow(self, events: AsyncIterator[Event], apply: Callable[[Event], None]) -> None:
        async for event in events:
            try:
                apply(event)
            except msgspec.MsgspecError as error:
                # one bad record must not hide the others
                log.error("members.bad_record", key=event.key, error=str(error))

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            try:
                self.tick(time.monotonic())
            except Exception:  # a failed tick must not end all ticks
                log.exception("members.tick_failed")

    def tick(self, now_s: float) -> None:
        """Ping everyone and judge silence."""
        for link in list(self.links.values()):
            link.tick(now_s)
        self._apply(self.view.tick(now_s))
        self._count()
        assert self._sink is not None
        self._sink.on_tick(now_s)

    def stores_in_step(self) -> dict[str, bool]:
        """Return the store nodes and own caches followed, and whether the index knows what each holds."""
        return {node: self._feed.in_step(node) for node in (*self._stores, *map(gpu_node, self._caches))}

    def gpu_blocks(self) -> dict[str, int]:
        """Return how many blocks each engine that tells says it has in its own cache; 0 out of step."""
        return {instance_id: self._feed.told(gpu_node(instance_id)) for instance_id in list(self._caches)}

    def engine_slot(self, instance_id: str) -> int:
        """Return the index under which vLLM's per-engine metrics know the instance."""
        slot = self._slots.get(instance_id)
        if slot is None:
            used = set(self._slots.values())
            slot = next((i for i in range(ENGINE_SLOTS) if i not in used), ENGINE_SLOTS - 1)
            self._slots[instance_id] = slot
        return slot

    # ------------------------------------------------------------ records

    def _on_instance(self, event: Event) -> None:
        now_s = time.monotonic()
        if isinstance(event, Removed):
            instance_id = event.key.removeprefix(INSTANCES_PREFIX)
            self._drop_link(instance_id)
            self._drop_cache(instance_id)
            self._apply(self.view.instance_removed(now_s, instance_id))
            self._slots.pop(instance_id, None)
            return
        record = msgspec.json.decode(event.value, type=InstanceRecord)
        known = self.links.get(record.instance_id)
        if known is not None and known.record.epoch != record.epoch:
            self._drop_link(record.instance_id)
        before = self.view.record(record.instance_id)
        self._apply(self.view.instance_up(now_s, record))
        if record.role == DRAINING and before is not None and before.role != DRAINING:
            assert self._sink is not None
            self._sink.on_draining(record.instance_id)
        if record.instance_id not in self.links:
            self._link(record, relink=False)
        self._follow_cache(record)

    def _follow_cache(self, record: InstanceRecord) -> None:
        """Mirror an engine's own cache, of its current start."""
        epoch, _ = self._caches.get(record.instance_id, ("", None))
        if epoch == record.epoch:
            return
        self._drop_cache(record.instance_id)
        if record.gpu_events and self._follow_store is not None:
            follower = self._follow_store(cache_record(record), self._feed)
            self._caches[record.instance_id] = record.epoch, follower

    def _drop_cache(self, instance_id: str) -> None:
        _, follower = self._caches.pop(instance_id, ("", None))
        if follower is not None:
            self._retire(follower)
            self._feed.drop(gpu_node(instance_id))

    def _link(self, record: InstanceRecord, relink: bool) -> None:
        if self._closed:
            return
        assert self._sink is not None
        link = Link(
            self._context, record, self._gateway_id, self,
            address=self._address, relink=relink, reads=self._sink.reads_outputs,
        )  # fmt: skip
        self.links[record.instance_id] = link
        link.start()

    def _drop_link(self, instance_id: str) -> None:
        if timer := self._timers.pop(instance_id, None):
            timer.cancel()
        if link := self.links.pop(instance_id, None):
            link.close()

    def _on_store(self, event: Event) -> None:
        node = event.key.removeprefix(STORES_PREFIX)
        if old := self._stores.pop(node, None):
            self._retire(old)
        if isinstance(event, Removed):
            self.view.store_removed(node)
            self._feed.drop(node)
            return
        record = msgspec.json.decode(event.value, type=StoreRecord)
        self.view.store_up(record)
        if self._follow_store is not None:
            self._stores[node] = self._follow_store(record, self._feed)

    def _retire(self, follower: StoreFollower) -> None:
        task = asyncio.create_task(follower.close(), name="close store follower")
        self._closing.add(task)  # the loop alone would not keep it alive
        task.add_done_callback(self._closing.discard)

    # ------------------------------------------------------------ what links say

    def link_up(self, link: Link) -> None:
        """See LinkEvents."""
        log.info("members.link_up", instance=link.instance_id, slot=link.slot, epoch=link.record.epoch)
        self._apply(self.view.link_up(time.monotonic(), link.instance_id))
        link.tick(time.monotonic())  # the first pulse makes it ALIVE: do not wait for the next tick

    def link_pulse(self, link: Link, pulse: Pulse, round_trip_s: float) -> None:
        """See LinkEvents."""
        del round_trip_s
        transitions = self.view.pulse(time.monotonic(), link.instance_id, pulse.engine_age_s, pulse.epoch)
        self._apply(transitions)
        assert self._sink is not None
        self._sink.on_pulse(link, pulse)

    def link_outputs(self, link: Link, outputs: "EngineCoreOutputs") -> None:
        """See LinkEvents."""
        assert self._sink is not None
        self._sink.on_outputs(link, outputs)

    def link_lost(self, link: Link, reason: str) -> None:
        """See LinkEvents."""
        log.warning("members.link_lost", instance=link.instance_id, reason=reason)
        if self.links.get(link.instance_id) is not link:
            return  # an older start of the same instance
        del self.links[link.instance_id]
        self._apply(self.view.link_down(time.monotonic(), link.instance_id), link, reason)
        if not self._closed:
            loop = asyncio.get_running_loop()
            self._timers[link.instance_id] = loop.call_later(RELINK_S, self._relink, link.record)

    def _relink(self, record: InstanceRecord) -> None:
        self._timers.pop(record.instance_id, None)
        current = self.view.record(record.instance_id)
        if current is not None and current.epoch == record.epoch and record.instance_id not in self.links:
            self._link(current, relink=True)

    # ------------------------------------------------------------ transitions

    def _apply(self, transitions: list[Transition], link: Link | None = None, reason: str = "") -> None:
        for change in transitions:
            link = link or self.links.get(change.instance_id)
            log.info(
                "members.health",
                instance=change.instance_id,
                before=str(change.before),
                after=str(change.after),
                reason=reason or change.reason,
            )
            if change.lost:
                if link is not None and link.heard_s:
                    self._metrics.detect_s.observe(time.monotonic() - link.heard_s)
                assert self._sink is not None
                self._sink.on_lost(change.instance_id, change.reason)

    def _count(self) -> None:
        counts: dict[tuple[str, str], int] = {}
        booked = []
        now_s = time.monotonic()
        for record, health, load in self.view.instances():
            key = (record.role, str(health))
            counts[key] = counts.get(key, 0) + 1
            booked.append(
                Booked(
                    record.instance_id, record.role, load.queue_s(now_s), load.prefill_requests,
                    load.decode_requests, load.decode_kv_tokens,
                )
            )  # fmt: skip
        self._booked = booked
        for role in (*ROLES, DRAINING):
            for health in Health:
                gauge = self._metrics.instances.labels(role, str(health))
                gauge.set(counts.get((role, str(health)), 0))

    def order_role(self, order: Order) -> bool:
        """Tell an instance's relay which role to take; False without a link."""
        link = self.up(order.instance_id)
        if link is None:
            return False
        link.take_role(RoleOrder(order.role, order.hold_s, self.term))
        return True

    def up(self, instance_id: str) -> Link | None:
        """Return the instance's link if it can carry a request now."""
        link = self.links.get(instance_id)
        return link if link is not None and link.state is LinkState.UP else None
