"""Tells the leading directory which prefixes should be on how many nodes: the shell of conductor.heat.

Every ROUND_S it asks Heat what is wished for now, and says what is new, has changed, or was last said
REPEAT_S ago, so that a new leader hears of it too. What is not said again ends by itself (TTL_S): a wish
lives as long as some gateway repeats it, and the last one to speak is right. Where fewer than two hosts
compute prompts it does nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from conductor.cluster import ClusterView
from conductor.heat import COPIES_MIN, ROUND_S, SHARE_MAX, TTL_S, Heat, Wish, candidates, placed
from conductor.index import PrefixIndex
from conductor.plan import Plan, RequestFacts
from kvstore.directory.messages import LEADER_KEY, DirectoryReply, KeepHot
from kvstore.leader.tasks import HOT_NODES_MAX
from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core.election import LeaderRecord
from mooncake.core.errors import CapacityError, MooncakeError, PeerTimeout, ProtocolError, RequestError
from mooncake.core.keys import share_keys
from mooncake.core.messages import Ok
from mooncake.core.metadata import MetadataStore
from mooncake.core.rpc import RpcClient

log = structlog.get_logger(__name__)

REPEAT_S = TTL_S / 3
"""A wish survives two lost repetitions."""
SAID_MAX = 64
"""Messages in one round; what is left has its turn in the next one."""
SAY_S = 2.0
"""Deadline of one message: the leader answers from memory."""
FIND_S = 2.0
"""For the metadata store to name the leader."""


class HotMetrics:
    """Of one gateway."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """A second one in the same registry raises."""
        self.prefixes = Gauge(
            "mooncake_hot_prefixes", "Prefixes wished for on many nodes.", registry=registry
        )
        self.copies = Gauge(
            "mooncake_hot_copies_wanted", "Copies wished for of all of them.", registry=registry
        )
        self.counted = Gauge(
            "mooncake_heat_counted_prefixes", "Prefixes whose use is counted now.", registry=registry
        )
        self.top_share = Gauge(
            "mooncake_heat_top_share_ratio",
            "Of the requests that found something in the pool, those that began with the most used block.",
            registry=registry,
        )
        self.wishes = Counter(
            "mooncake_hot_wishes",
            "Wishes told to the leading directory, by what came of it: sent, failed, or no_directory.",
            ["result"],
            registry=registry,
        )
        for result in ("sent", "failed", "no_directory"):
            self.wishes.labels(result)  # shown as 0


class HotCopies:
    """Lives on the gateway's loop: `planned` for every plan; `start`, `close`."""

    def __init__(
        self,
        heat: Heat,
        view: ClusterView,
        index: PrefixIndex,
        metadata: MetadataStore,
        metrics: HotMetrics,
    ) -> None:
        """Nothing happens before `start`. `metadata` is not closed here."""
        self._heat = heat
        self._view = view
        self._index = index
        self._metadata = metadata
        self._metrics = metrics
        self._said: dict[bytes, tuple[Wish, list[str], float]] = {}  # by the wish's first key
        self._client: RpcClient | None = None
        self._trouble = ""  # as it was logged
        self._task: asyncio.Task[None] | None = None

    def planned(self, facts: RequestFacts, plan: Plan) -> None:
        """A request is sent as planned."""
        record = self._view.record(plan.prefill or plan.decode or "")
        if record is not None:
            block = record.block_bytes, record.block_size, record.ranks
            self._heat.planned(time.monotonic(), facts.keys, plan.hit_blocks, *block)

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="hot copies")

    async def close(self) -> None:
        """End (idempotent); wishes end by themselves."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._hang_up()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(ROUND_S)
            try:
                await self.round(time.monotonic())
            except Exception:  # one bad round must not end all of them
                log.exception("hot_copies.round_failed")

    async def round(self, now_s: float) -> None:
        """Say what is due. Troubles are counted, and logged once until they change or end."""
        nodes = candidates(self._view)
        wishes = self._heat.step(now_s, len(nodes), self._room(nodes)) if len(nodes) >= COPIES_MIN else []
        self._metrics.counted.set(self._heat.counted)
        self._metrics.top_share.set(self._heat.top_share(now_s))
        self._metrics.prefixes.set(len(wishes))
        self._metrics.copies.set(sum(wish.copies for wish in wishes))
        due = []
        said, self._said = self._said, {}
        for wish, order in placed(wishes, nodes, self._index):
            before = said.get(wish.keys[0])
            # who holds it changes the order, and is no reason to say it again; who is there, is
            if before and before[0] == wish and set(before[1]) == set(order) and now_s < before[2] + REPEAT_S:
                self._said[wish.keys[0]] = before
            else:
                due.append((wish, order))
        try:
            if due:
                await self._say(now_s, due[:SAID_MAX])
        except MooncakeError as error:
            self._metrics.wishes.labels("failed").inc()
            self._note(str(error))
            await self._hang_up()

    async def _say(self, now_s: float, due: Sequence[tuple[Wish, list[str]]]) -> None:
        client = await self._leader()
        if client is None:
            self._metrics.wishes.labels("no_directory").inc(len(due))
            self._note("no directory leads: start `mooncake directory`, or say --hot-copies 0")
            return
        trouble = ""
        for wish, order in due:
            try:
                objects, size_bytes = share_keys(wish.keys, wish.ranks), -(-wish.size_bytes // wish.ranks)
                for begin in range(0, len(objects), KEYS_PER_REQUEST_MAX):
                    keys = objects[begin : begin + KEYS_PER_REQUEST_MAX]
                    nodes = order[:HOT_NODES_MAX]
                    await _call(client, KeepHot(keys, wish.copies, size_bytes, nodes, TTL_S))
            except (RequestError, CapacityError) as error:  # this one, and not before its next turn
                self._metrics.wishes.labels("failed").inc()
                trouble = str(error)
            else:
                self._metrics.wishes.labels("sent").inc()
            self._said[wish.keys[0]] = wish, order, now_s
        self._note(trouble)

    async def _leader(self) -> RpcClient | None:
        """Return a link to who leads now; None: nobody does."""
        try:
            async with asyncio.timeout(FIND_S):
                entries = (await self._metadata.get(LEADER_KEY)).entries
        except TimeoutError:
            raise PeerTimeout(f"metadata store: no answer within {FIND_S:g} s") from None
        found = [entry.value for entry in entries if entry.key == LEADER_KEY]
        try:
            record = msgspec.json.decode(found[0], type=LeaderRecord) if found else LeaderRecord("")
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"{LEADER_KEY}: {error}") from error
        if self._client is not None and self._client.endpoint != record.address:
            await self._hang_up()
        if self._client is None and record.address:
            self._client = RpcClient(record.address, DirectoryReply)
        return self._client

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _note(self, trouble: str) -> None:
        if trouble and not self._trouble:
            log.warning("hot_copies.trouble", reason=trouble)
        elif self._trouble and not trouble:
            log.info("hot_copies.trouble_over")
        self._trouble = trouble

    # ------------------------------------------------------------ who could have copies

    def _room(self, nodes: Sequence[str]) -> int:
        """Return how many blocks each of them may have."""
        capacities = [store.capacity_bytes for store in self._view.stores() if store.node in nodes]
        block_bytes = max((record.block_bytes for record, _ in self._view.alive()), default=0)
        return min(capacities, default=0) // SHARE_MAX // max(1, block_bytes)


async def _call(client: RpcClient, request: KeepHot) -> None:
    reply: Any = await client.call(request, SAY_S)
    if not isinstance(reply, Ok):
        raise ProtocolError(f"{client.endpoint}: no answer to KeepHot: {type(reply).__name__}")
