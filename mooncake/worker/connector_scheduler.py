"""Scheduler half of the KV connector: what to load, what to save, per request.

Called by vLLM's scheduler in its step loop, so nothing here may wait long: a pool look-up is sent
when the request arrives and its answer is usually there when the request is scheduled first.
Traps that shaped it (reference: vLLM 0.32 notes): `get_num_new_matched_tokens` is asked again
after a failed load, so a request whose load failed never loads again (else a livelock), and for
async loads `update_state_after_alloc` is called a second time with 0 tokens.

Of an engine of several ranks, every block is as many objects, one rank's share each (core.keys.share_key).
They are looked up block by block, a block counts if all its shares are there, and the lease on them is given
back here, once vLLM says that all ranks have loaded.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core import keys as names
from mooncake.core.errors import MooncakeError
from mooncake.core.fingerprint import AdapterNames
from mooncake.core.messages import Acquired, Block
from mooncake.worker.connector_meta import NOTHING, LoadJob, SaveJob, StepMeta
from mooncake.worker.params import kv_params_of
from mooncake.worker.pulse import Pulse
from mooncake.worker.spans import PoolSpans

log = structlog.get_logger(__name__)

LOOKUP_WAIT_S = 0.25
"""A look-up older than this counts as a miss: recomputing 500 tokens costs about as much."""
LEASE_S = 30.0
"""Longest time from look-up to end of load; a queued request renews by looking up again."""
HANDOVER_WAIT_S = 0.2
"""A decode leg waits this long for blocks that prefill is just committing."""
FETCH_WAIT_S = 5.0
"""A request waits this long for blocks of another host: the Conductor found that quicker than computing."""


@dataclass
class Tracked:
    """What the connector knows of one request in the engine."""

    request: Any
    leg: str
    prompt_len: int
    root: bytes
    keys: list[bytes]
    tail_key: bytes | None
    saves: bool
    source: str = ""  # node that has more of the blocks
    target: str = ""  # node that is going to decode
    call: bytes | None = None
    call_s: float = 0.0
    lease_id: int = 0
    leased_s: float = 0.0
    found: list[Block] = field(default_factory=list)
    looked_up: bool = False
    no_load: bool = False
    loading: set[int] = field(default_factory=set)
    saved: int = 0  # full blocks known to be in the pool, from the start
    tail_saved: bool = False
    trace: str = ""  # the leg's span; "" = it is not traced
    load: tuple[float, int, int] | None = None  # of a load that is traced: start, blocks, bytes


class SchedulerHalf:
    """See the module's text. `pool` is a kvstore PoolClient or None-like fake in tests."""

    def __init__(
        self,
        pool: Any,
        root: bytes,
        block_size: int,
        load_mode: str,
        save_decoded: bool,
        pulse: Pulse,
        spans: PoolSpans | None = None,
        ranks: int = 1,
    ) -> None:
        """`root` is the engine's context root (core.keys.context_root); `spans` None: tracing is off."""
        assert ranks == 1 or load_mode == "async"
        self._ranks = ranks
        self._pool = pool
        self._root = root
        self._block_size = block_size
        self._async = load_mode == "async"
        self._save_decoded = save_decoded
        self._pulse = pulse
        self._spans = spans
        self._adapters = AdapterNames()
        self._requests: dict[str, Tracked] = {}
        self._pending_loads: list[LoadJob] = []
        self._pending_sync: list[LoadJob] = []
        self._leases: dict[str, int] = {}  # of loads under way, by request: of several ranks

    # ------------------------------------------------------------ arrival and look-up

    def on_new_request(self, request: Any) -> None:
        """Name the request's blocks and ask the pool for them."""
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None or request.mm_features:
            return  # pooling, embeddings, pictures: token ids do not name the bytes
        ours = kv_params_of(params.extra_args)
        lora = self._adapters.name_of(request.lora_request) if request.lora_request else None
        if request.lora_request and lora is None:
            return  # nobody can say which adapter's weights compute it
        root = names.request_root(self._root, request.cache_salt, lora)
        leg = str(ours.get("leg", "whole"))
        full, tail = names.prompt_keys(root, request.prompt_token_ids, self._block_size)
        state = Tracked(
            request=request,
            leg=leg,
            prompt_len=len(request.prompt_token_ids),
            root=root,
            keys=full,
            tail_key=tail,
            saves=True,
            source=str(ours.get("source", "")),
            target=str(ours.get("target", "")),
            trace=str(ours.get("trace", "")) if self._spans is not None else "",
            # the last token is computed anyway; vLLM would ask, load and ask again for ever
            no_load=bool(request.skip_reading_prefix_cache) or len(request.prompt_token_ids) < 2,
        )
        if leg == "decode" and not self._save_decoded:
            state.saves = False
        self._requests[request.request_id] = state
        if not state.no_load:
            self._begin_lookup(state)

    def _wanted(self, state: Tracked) -> list[bytes]:
        """Return the blocks to look up: full ones, then for a decode leg the prompt's tail."""
        if state.leg == "decode" and state.tail_key is not None:
            return [*state.keys[: state.prompt_len // self._block_size], state.tail_key]
        return state.keys

    def _objects(self, blocks: list[bytes]) -> list[bytes]:
        """Return the names in the pool of all shares of `blocks`, as many as one request may ask for."""
        if self._ranks == 1:
            return blocks
        return names.share_keys(blocks[: KEYS_PER_REQUEST_MAX // self._ranks], self._ranks)

    def _begin_lookup(self, state: Tracked) -> None:
        wanted = self._wanted(state)
        state.looked_up = False
        state.found = []
        state.loading = set()
        if not wanted:
            state.looked_up = True
            return
        try:
            keys = self._objects(wanted)
            state.call = self._pool.begin_acquire(keys, LEASE_S, _wait_s(state), source=state.source)
            state.call_s = time.monotonic()
        except MooncakeError as error:
            self._failed_lookup(state, error)

    def _failed_lookup(self, state: Tracked, error: MooncakeError) -> None:
        self._pulse.add("pool_errors", 1)
        log.warning("pool.lookup_failed", request_id=state.request.request_id, error=str(error))
        state.call = None
        state.looked_up = True
        state.no_load = True

    def _poll_lookup(self, state: Tracked) -> bool:
        """Return whether the answer (or the decision to go without) is there."""
        if state.looked_up:
            return True
        if state.call is None:
            self._begin_lookup(state)
            return state.looked_up
        limit_s = LOOKUP_WAIT_S + _wait_s(state)
        try:
            if not self._pool.poll(state.call):
                if time.monotonic() - state.call_s < limit_s:
                    return False
                self._pool.forget(state.call)
                self._pulse.add("lookup_timeouts", 1)
                self._looked_up(state, None)
                state.call, state.looked_up, state.no_load = None, True, True
                return True
            answer: Acquired = self._pool.finish_acquired(state.call, 0.0)
        except MooncakeError as error:
            self._failed_lookup(state, error)
            return True
        self._looked_up(state, answer)
        state.call = None
        state.looked_up = True
        state.lease_id, state.found, state.leased_s = answer.lease_id, answer.blocks, time.monotonic()
        state.saved = self._full_found(state)
        self._pulse.add("lookup_tokens", state.prompt_len)
        if answer.fetched_bytes:
            self._pulse.add("fetch_bytes", answer.fetched_bytes)
            self._pulse.add("fetch_seconds", answer.fetch_s)
        if state.target and state.saved:
            self._hand_over(state)
        return True

    def _looked_up(self, state: Tracked, answer: Acquired | None) -> None:
        if state.trace and self._spans is not None:
            wanted = len(self._wanted(state))
            self._spans.looked_up(state.trace, state.call_s, wanted, answer, state.source, self._ranks)

    def _hand_over(self, state: Tracked) -> None:
        """What was found here is not saved again: the decoding node's store can copy it now."""
        try:
            self._pool.hand_over(self._objects(state.keys[: state.saved]), state.target)
        except MooncakeError as error:
            log.debug("pool.hand_over_failed", error=str(error))  # it is fetched when it is needed

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Answer vLLM's get_num_new_matched_tokens; `computed` is the local hit in tokens."""
        state = self._requests.get(request.request_id)
        if state is None or state.no_load:
            return 0, False
        if not self._poll_lookup(state):
            return None, False
        if state.lease_id and time.monotonic() - state.leased_s > LEASE_S / 2:
            self._drop_lease(state)  # queued for long: blocks may go before the load ends
            self._begin_lookup(state)
            return None, False
        extra = self._covered(state) - computed
        if extra <= 0:
            return 0, False
        return extra, self._async

    def _blocks_found(self, state: Tracked) -> int:
        """Return how many blocks are there, with all their shares."""
        return len(state.found) // self._ranks

    def _full_found(self, state: Tracked) -> int:
        """Return how many of the found blocks are full ones: a decode leg's last may be the tail.

        Not min(found, keys): decoding makes more keys, and then the tail would count as full.
        """
        with_tail = state.leg == "decode" and state.tail_key is not None
        full = state.prompt_len // self._block_size if with_tail else len(state.keys)
        return min(self._blocks_found(state), full)

    def _covered(self, state: Tracked) -> int:
        """Return the tokens that the leased blocks cover, from the start."""
        tokens = self._full_found(state) * self._block_size
        if self._blocks_found(state) > state.prompt_len // self._block_size and state.leg == "decode":
            tokens = max(tokens, state.prompt_len)  # the tail came too
        total = int(state.request.num_tokens)
        # a synchronous load must leave a token to compute; an async one may cover everything
        return min(tokens, total if self._async else total - 1)

    # ------------------------------------------------------------ allocation and steps

    def allocated(self, request: Any, block_ids: Sequence[int], extra: int) -> None:
        """VLLM has allocated blocks; load `extra` tokens behind the locally computed ones."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        state.looked_up = False  # vLLM asks again only after a preemption: then look up anew
        if extra == 0:  # also the second call of an async load, whose job has the lease
            self._drop_lease(state)
            return
        covered = self._covered(state)
        first = (covered - extra) // self._block_size
        last = -(-covered // self._block_size)
        wanted = self._wanted(state)
        job = LoadJob(
            request.request_id,
            wanted[first:last],
            state.found[first * self._ranks : last * self._ranks],
            list(block_ids[first:last]),
            state.lease_id,
        )
        state.lease_id, state.found = 0, []  # the worker half releases the lease after the load
        if self._ranks > 1:  # of several, none can say when the others are done
            self._leases[request.request_id], job.lease_id = job.lease_id, 0
        state.loading = set(job.block_ids)
        if state.trace and self._async:
            state.load = time.monotonic(), len(job.keys), sum(block.size_bytes for block in job.blocks)
        (self._pending_loads if self._async else self._pending_sync).append(job)
        self._pulse.add("hit_tokens", extra)

    def step(self, output: Any) -> StepMeta:
        """Return the jobs of this step (vLLM's build_connector_meta)."""
        saves: list[SaveJob] = []
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            self._collect_save(new.req_id, new.num_computed_tokens + scheduled[new.req_id], saves)
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._collect_save(request_id, computed + scheduled[request_id], saves)
        if not saves and not self._pending_loads and not self._pending_sync:
            return NOTHING
        meta = StepMeta(self._pending_loads, self._pending_sync, saves)
        self._pending_loads, self._pending_sync = [], []
        return meta

    def _collect_save(self, request_id: str, after: int, saves: list[SaveJob]) -> None:
        """Add the blocks of a request that are full once `after` tokens are computed."""
        state = self._requests.get(request_id)
        if state is None or not state.saves:
            return
        full = after // self._block_size
        with_tail = (
            state.leg == "prefill"
            and state.tail_key is not None
            and not state.tail_saved
            and after >= state.prompt_len
        )
        if full <= state.saved and not with_tail:
            return
        if full > len(state.keys):
            self._extend_keys(state, full)
            full = min(full, len(state.keys))
        block_ids = self._block_ids(request_id)
        first = state.saved
        job = SaveJob(state.keys[first:full], block_ids[first:full], state.target, first)
        state.saved = max(state.saved, full)
        if with_tail and state.tail_key is not None:
            state.tail_saved = True
            job.keys.append(state.tail_key)
            job.block_ids.append(block_ids[state.prompt_len // self._block_size])
        if job.keys:
            saves.append(job)

    def bind_block_ids(self, block_ids_of: Any) -> None:
        """`block_ids_of(request_id)` returns vLLM's current block ids (one list per group)."""
        self._block_ids_of = block_ids_of

    def _block_ids(self, request_id: str) -> list[int]:
        (block_ids,) = self._block_ids_of(request_id)
        return list(block_ids)

    def _extend_keys(self, state: Tracked, full: int) -> None:
        """Name decoded blocks: the chain goes on over the emitted tokens."""
        start = len(state.keys) * self._block_size
        tokens = list(state.request.all_token_ids[start : full * self._block_size])
        parent = state.keys[-1] if state.keys else state.root
        state.keys.extend(names.chain(parent, tokens, self._block_size))

    # ------------------------------------------------------------ outcome

    def loaded(self, finished: Sequence[str], invalid_block_ids: set[int]) -> None:
        """Take note of finished and failed loads."""
        if invalid_block_ids:
            for state in self._requests.values():
                if state.loading & invalid_block_ids and not state.no_load:  # ranks may say so one by one
                    state.no_load = True
                    state.saved = 0  # let the recomputed blocks be saved again
                    self._pulse.add("failed_loads", 1)
        for request_id in finished:
            if lease_id := self._leases.pop(request_id, 0):
                self._release(lease_id)
            if state_or_none := self._requests.get(request_id):
                self._loaded(state_or_none)
                state_or_none.loading = set()

    def _loaded(self, state: Tracked) -> None:
        load, state.load = state.load, None
        if load is not None and self._spans is not None:
            self._spans.loaded(state.trace, *load, intact=not state.no_load)

    def finished(self, request_id: str) -> None:
        """The request left the engine."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return
        if state.call is not None:
            self._abandon_call(state)
        self._drop_lease(state)

    def _abandon_call(self, state: Tracked) -> None:
        """A look-up whose answer nobody reads may hold a lease: it ends by its own term."""
        assert state.call is not None
        self._pool.forget(state.call)
        state.call = None

    def _drop_lease(self, state: Tracked) -> None:
        if not state.lease_id:
            return
        lease_id, state.lease_id, state.found = state.lease_id, 0, []
        self._release(lease_id)

    def _release(self, lease_id: int) -> None:
        try:
            self._pool.release(lease_id)
        except MooncakeError as error:
            log.debug("pool.release_failed", error=str(error))  # leases end by themselves


def _wait_s(state: Tracked) -> float:
    """Return how long the store may wait for blocks that are on their way."""
    if state.source:
        return FETCH_WAIT_S
    return HANDOVER_WAIT_S if state.leg == "decode" else 0.0
