"""Worker half of the KV connector: moves pages between the engine's KV caches and the pool.

Load: copy, then verify the *source* after the copy, so a slot that was overwritten while we read
it cannot pass. Save: reserve at the start of the step (the answer travels while the first layer
computes), copy each layer's pages right after its attention, checksum and commit at the end of
the step: when prefill reports a request finished, its blocks are readable.

Of an engine of several ranks, each has a worker half, which moves only its own shares of blocks: objects
with names and checksums of their own (core.keys.share_key).
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import structlog

from mooncake.core.errors import MooncakeError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Block
from mooncake.worker.connector_meta import LoadJob, SaveJob, StepMeta
from mooncake.worker.layout import Bytes, PagedKv
from mooncake.worker.pulse import Pulse
from transfer.copy import scatter

log = structlog.get_logger(__name__)

RESERVE_WAIT_S = 0.5
"""A prefill step takes longer than this on any model worth sharing; then the step goes unsaved."""
COMMIT_WAIT_S = 0.5


class Writing:
    """One reserved block: where it goes and what it is."""

    __slots__ = ("block_id", "key", "next_node", "target", "ticket")

    def __init__(self, key: bytes, block_id: int, ticket: int, target: Bytes, next_node: str) -> None:
        """`target` is the writable pool object; `next_node` is where it is going to be decoded, "" = here."""
        self.key, self.block_id, self.ticket, self.target = key, block_id, ticket, target
        self.next_node = next_node


class WorkerHalf:
    """See the module's text. `pool` is a kvstore PoolClient (or a fake of the same shape)."""

    def __init__(self, pool: Any, pulse: Pulse, rank: int = 0, ranks: int = 1) -> None:
        """Start the loader thread. `rank`: of the engine's `ranks`, whose shares are ours."""
        self._rank, self._ranks = rank, ranks
        self._pool = pool
        self._pulse = pulse
        self._kv: PagedKv | None = None
        self._meta = StepMeta()
        self._reserving: tuple[Any, list[tuple[bytes, int, str]]] | None = None
        self._saves_fail = False  # since the last step that could be saved
        self._writing: list[Writing] = []
        self._layers_saved = 0
        self._save_started_s = 0.0
        self._jobs: queue.SimpleQueue[LoadJob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._finished: set[str] = set()
        self._invalid: set[int] = set()
        self._loader = threading.Thread(target=self._load_loop, name="kv-loader", daemon=True)
        self._loader.start()

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Take the engine's KV tensors."""
        self._kv = PagedKv.of_tensors(kv_caches)

    @property
    def kv(self) -> PagedKv:
        """The registered caches."""
        assert self._kv is not None, "register_kv_caches comes first"
        return self._kv

    # ------------------------------------------------------------ one step

    def begin_step(self, meta: StepMeta) -> None:
        """Called before the forward pass: ask for room for what this step will save."""
        self._end_saves(intact=False)  # of a step that broke off before its end
        if self._ranks > 1:
            meta = meta.share(self._rank, self._ranks)
        self._meta = meta
        if meta.saves:
            self._begin_reserve(meta.saves)

    def start_loads(self) -> None:
        """Hand async loads to the loader thread."""
        for job in self._meta.async_loads:
            self._jobs.put(job)

    def load_layer(self, layer_name: str) -> None:
        """Before a layer's attention: copy that layer's pages of synchronous loads."""
        if not self._meta.sync_loads:
            return
        started_s = time.perf_counter()
        layer = self.kv.layer_index[layer_name]
        for job in self._meta.sync_loads:
            for block, block_id in zip(job.blocks, job.block_ids, strict=True):
                if (source := self._source(block)) is not None:  # else end_step reports it
                    self.kv.write_layer(layer, block_id, source)
        self._pulse.add("load_seconds", time.perf_counter() - started_s)

    def save_layer(self, layer_name: str) -> None:
        """After a layer's attention: copy that layer's pages of blocks that are complete now."""
        if self._reserving is not None:
            self._finish_reserve()
        if not self._writing:
            return
        started_s = time.perf_counter()
        layer = self.kv.layer_index[layer_name]
        for item in self._writing:
            self.kv.read_layer(layer, item.block_id, item.target)
        self._layers_saved += 1
        self._pulse.add("save_seconds", time.perf_counter() - started_s)

    def end_step(self) -> None:
        """After the forward pass: verify synchronous loads, commit saves."""
        intact = True
        for job in self._meta.sync_loads:
            bad = self._bad_blocks(job)
            intact = intact and not bad  # attention has read those: its results are not saved
            self._conclude(job, bad)
        self._end_saves(intact=intact)

    def outcome(self) -> tuple[set[str], set[int]]:
        """Return (requests whose async load ended, block ids with bad bytes) since the last call."""
        if not self._finished and not self._invalid:
            return set(), set()
        with self._lock:
            finished, self._finished = self._finished, set()
            invalid, self._invalid = self._invalid, set()
        return finished, invalid

    # ------------------------------------------------------------ loading

    def _source(self, block: Block) -> Bytes | None:
        """Return the pool object of `block`, or None if its bytes cannot be a block of ours."""
        if block.size_bytes != self.kv.block_bytes:
            return None
        try:
            source = np.frombuffer(self._pool.view(block.offset, block.size_bytes), dtype=np.uint8)
        except Exception as error:  # noqa: BLE001 - runs inside the forward pass: never an engine failure
            log.warning("pool.unreadable", offset=block.offset, error=str(error))
            return None
        return source if len(source) == block.size_bytes else None

    def _load_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            bad = list(range(len(job.blocks)))
            try:
                for block, block_id in zip(job.blocks, job.block_ids, strict=True):
                    if (source := self._source(block)) is not None:
                        scatter(source.data, self.kv.block_pages(block_id), self._loaded)
                bad = self._bad_blocks(job)
            except Exception:
                # every block of the job counts as bad: the engine recomputes them. A dead loader
                # thread would hang every later load
                log.exception("pool.load_failed", request_id=job.request_id)
            self._conclude(job, bad, asynchronous=True)

    def _loaded(self, size_bytes: int, elapsed_s: float) -> None:  # noqa: ARG002 - bytes count once good
        self._pulse.add("load_seconds", elapsed_s)

    def _bad_blocks(self, job: LoadJob) -> list[int]:
        """Return the positions whose bytes are not what was committed under their key."""
        return [
            index
            for index, (key, block) in enumerate(zip(job.keys, job.blocks, strict=True))
            if (source := self._source(block)) is None or block_checksum(key, source.data) != block.checksum
        ]

    def _conclude(self, job: LoadJob, bad: list[int], *, asynchronous: bool = False) -> None:
        good = len(job.blocks) - len(bad)
        self._pulse.add("load_blocks", good)
        self._pulse.add("load_bytes", good * self.kv.block_bytes)
        if job.lease_id:
            self._tell(self._pool.release, job.lease_id)
        if bad:
            self._pulse.add("bad_blocks", len(bad))
            log.warning("pool.bad_blocks", request_id=job.request_id, blocks=len(bad))
            self._tell(self._pool.report_bad, [job.keys[index] for index in bad])
        with self._lock:  # last: the engine may compute and save these blocks anew from here on
            self._invalid.update(job.block_ids[index] for index in bad)
            if asynchronous:
                self._finished.add(job.request_id)

    def _tell(self, call: Callable[[Any], Any], argument: Any) -> None:
        """Tell the pool something that it can also find out by itself (leases end, sums differ)."""
        try:
            call(argument)
        except Exception as error:  # noqa: BLE001 - see _load_loop: the loader must live
            log.warning("pool.report_failed", error=str(error))

    # ------------------------------------------------------------ saving

    def _begin_reserve(self, saves: list[SaveJob]) -> None:
        wanted = [
            (key, block_id, job.target)
            for job in saves
            for key, block_id in zip(job.keys, job.block_ids, strict=True)
        ]
        self._save_started_s = time.perf_counter()
        try:
            depth = saves[0].depth if len(saves) == 1 else -1  # one request of several prompts has none
            call = self._pool.begin_reserve([key for key, _, _ in wanted], self.kv.block_bytes, depth=depth)
            self._reserving = (call, wanted)
        except MooncakeError as error:
            self._no_room(error)

    def _no_room(self, error: MooncakeError) -> None:
        """Count a step whose blocks are not saved; the first of many is logged."""
        self._pulse.add("pool_errors", 1)
        if not self._saves_fail:
            self._saves_fail = True
            log.warning("pool.reserve_failed", error=str(error))

    def _finish_reserve(self) -> None:
        assert self._reserving is not None
        (call, wanted), self._reserving = self._reserving, None
        self._layers_saved = 0
        try:
            slots = self._pool.finish_reserve(call, RESERVE_WAIT_S)
        except MooncakeError as error:
            self._no_room(error)
            return
        if self._saves_fail:
            self._saves_fail = False
            log.info("pool.reserve_works_again")
        for (key, block_id, next_node), slot in zip(wanted, slots, strict=True):
            if slot is not None:
                target = np.frombuffer(slot.view, dtype=np.uint8)
                self._writing.append(Writing(key, block_id, slot.ticket, target, next_node))

    def _end_saves(self, *, intact: bool) -> None:
        """Commit what was reserved if it is `intact` and every layer was copied, else abandon it."""
        if self._reserving is not None:  # no layer ran (empty step): nothing was written
            self._finish_reserve()
        if self._writing:
            self._commit(complete=intact and self._layers_saved == len(self.kv.pages))

    def _commit(self, *, complete: bool) -> None:
        started_s = time.perf_counter()
        writing, self._writing = self._writing, []
        try:
            tickets = [item.ticket for item in writing]
            if not complete:
                self._pool.abandon(tickets)
                return
            sums = [block_checksum(item.key, item.target.data) for item in writing]
            done = self._pool.commit(tickets, sums, COMMIT_WAIT_S)
            self._pulse.add("save_blocks", sum(done))
            self._pulse.add("save_bytes", sum(done) * self.kv.block_bytes)
            if late := len(done) - sum(done):
                self._pulse.add("late_saves", late)
                log.warning("pool.saved_too_late", blocks=late, advice="smaller --max-num-batched-tokens")
            for node in dict.fromkeys(item.next_node for item in writing if item.next_node):
                keys = [i.key for i, ok in zip(writing, done, strict=True) if ok and i.next_node == node]
                if keys:
                    self._pool.hand_over(keys, node)
        except MooncakeError as error:
            self._pulse.add("pool_errors", 1)
            log.warning("pool.commit_failed", error=str(error))
        self._pulse.add("save_seconds", time.perf_counter() - started_s)

    def close(self) -> None:
        """Stop the loader."""
        self._jobs.put(None)
        self._loader.join(timeout=2.0)
