"""What a leg of a request would take on an instance, by the cost model, the index and its load. Pure.

Two tiers are known of. What an engine's own cache holds costs it nothing and is no use to others; what stores
hold is loaded, and fetched before where another node has it. The deeper of the two counts.
"""

import msgspec

from conductor.cluster import ClusterView, Load
from conductor.coming import Coming
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Needs, RequestFacts
from mooncake.core.messages import InstanceRecord, gpu_node


class Worker(msgspec.Struct, frozen=True):
    """An instance that takes work."""

    record: InstanceRecord
    load: Load

    @property
    def id(self) -> str:
        """Name of the instance."""
        return self.record.instance_id


class Prefill(msgspec.Struct, frozen=True):
    """One way to prefill a request on one instance. work_s excludes the queue.

    gpu_blocks: leading blocks in the engine's own cache, which it need not load.
    """

    worker: Worker
    ttft_s: float
    work_s: float
    hit_blocks: int
    fetch_blocks: int
    fetch_node: str | None
    gpu_blocks: int = 0


class Decode(msgspec.Struct, frozen=True):
    """A request's answer on one instance, and the KV tokens it will hold: expected, and of a long answer."""

    worker: Worker
    tbt_s: float
    kv_tokens: int
    kv_tokens_high: int

    @property
    def is_full(self) -> bool:
        """Whether it would have to wait for KV room or a place in the batch."""
        record, load = self.worker.record, self.worker.load
        kv_tokens = load.decode_kv_tokens + self.kv_tokens_high
        return kv_tokens > record.kv_blocks * record.block_size or load.decode_requests >= record.max_num_seqs


class Trail:
    """What was priced since it was cleared: whoever wants to know gives one to the scheduler."""

    __slots__ = ("decodes", "prefills")

    def __init__(self) -> None:
        """Empty."""
        self.clear()

    def clear(self) -> None:
        """Begin anew, before the next question; the lists so far are theirs who took them."""
        self.prefills: list[Prefill] = []
        self.decodes: list[tuple[Decode, int, int]] = []  # with the requests and KV tokens there, then


class Hits(msgspec.Struct, frozen=True):
    """Leading blocks of a prompt by holder, and the (blocks, node) of the most that others can fetch.

    Holders are store nodes and, as gpu_node, the own caches of engines: two name spaces in one look-up.
    """

    blocks: dict[str, int]
    deepest: tuple[int, str]
    coming: dict[str, int] = {}  # by instance: what it will have computed when its queue is done
    computed_s: dict[tuple[int, int, int, int, int], float] = {}  # most instances ask the same

    def on_gpu(self, instance_id: str) -> int:
        """Return how many an engine's own cache holds."""
        return self.blocks.get(gpu_node(instance_id), 0) if self.blocks else 0


class Pricing:
    """Predicts; chooses nothing."""

    def __init__(
        self, index: PrefixIndex, cost: CostModel, cluster: ClusterView, coming: Coming, *, fetches: bool
    ) -> None:
        """`coming`: what is planned and not computed yet. `fetches`: blocks of other nodes count."""
        self._index = index
        self._coming = coming
        self.cost = cost
        self._cluster = cluster
        self.fetches = fetches
        self.trail: Trail | None = None  # where every price is left, if somebody wants to know

    def hits(self, facts: RequestFacts) -> Hits:
        """Look a request's blocks up."""
        blocks = self._index.longest_prefix(facts.keys)
        is_open = self._cluster.is_open
        deepest = max(((n, node) for node, n in blocks.items() if is_open(node)), default=(0, ""))
        return Hits(blocks, deepest, self._coming.match(facts.keys, known(blocks)))

    def prefill(
        self, now_s: float, facts: RequestFacts, worker: Worker, hits: Hits, emitted_n: int = 0
    ) -> Prefill:
        """The cheaper of: own node's blocks and compute the rest; fetch the deepest prefix first."""
        option = self._cheaper(now_s, facts, worker, hits, emitted_n)
        if self.trail is not None:
            self.trail.prefills.append(option)
        return option

    def _cheaper(
        self, now_s: float, facts: RequestFacts, worker: Worker, hits: Hits, emitted_n: int
    ) -> Prefill:
        record = worker.record
        total = facts.prompt_len + emitted_n
        queue_s = worker.load.queue_s(now_s)
        stored, cached = hits.blocks.get(record.node, 0), hits.on_gpu(worker.id)
        local = max(stored, cached, hits.coming.get(worker.id, 0))
        work_s = self._compute_s(record, total, local, cached, hits)
        best = Prefill(worker, queue_s + work_s, work_s, local, 0, None, cached)
        depth, node = hits.deepest
        if not self.fetches or depth <= local or not self._cluster.is_open(record.node):
            return best
        # a store fetches what it lacks itself, whatever its engine's cache holds
        fetch_s = self.cost.transfer_s((depth - stored) * record.block_bytes, remote=True)
        work_s = self._compute_s(record, total, depth, cached, hits)
        # what the fetch takes beyond the queue holds the engine's place, so it counts as its work
        ttft_s = max(queue_s, fetch_s) + work_s
        if ttft_s >= best.ttft_s:
            return best
        return Prefill(worker, ttft_s, ttft_s - queue_s, depth, depth - stored, node, cached)

    def needs(self, facts: RequestFacts, block_size: int) -> Needs:
        """Price a prompt where most of its blocks are, loading them left out, and its answer as of now."""
        blocks = known(self._index.longest_prefix(facts.keys))
        new_tokens, hit_tokens = split(max(1, facts.prompt_len), blocks, block_size)
        tokens, high = self.cost.output_range(facts.max_tokens, facts.tenant, facts.slo_class, 0)
        loads = [load for record, load in self._cluster.alive() if record.role != "prefill"]
        requests = sum(load.decode_requests for load in loads) // max(1, len(loads)) + 1
        kv_tokens = sum(load.decode_kv_tokens for load in loads) // max(1, len(loads)) + facts.prompt_len
        answer_s = tokens * self.cost.tbt_s(requests, kv_tokens)
        return Needs(self.cost.prefill_s(new_tokens, hit_tokens), answer_s, facts.prompt_len + high)

    def decode(self, facts: RequestFacts, worker: Worker, emitted_n: int = 0) -> Decode:
        """Price an answer, of which emitted_n tokens are out."""
        tokens, high = self.cost.output_range(facts.max_tokens, facts.tenant, facts.slo_class, emitted_n)
        kv_tokens = facts.prompt_len + max(emitted_n + 1, tokens)
        load = worker.load
        tbt_s = self.cost.tbt_s(load.decode_requests + 1, load.decode_kv_tokens + kv_tokens)
        option = Decode(worker, tbt_s, kv_tokens, max(kv_tokens, facts.prompt_len + high))
        if self.trail is not None:
            self.trail.decodes.append((option, load.decode_requests, load.decode_kv_tokens))
        return option

    def left(self, facts: RequestFacts, emitted_n: int = 0) -> int:
        """Predict how many tokens of the answer are to come."""
        tokens = self.cost.output_tokens(facts.max_tokens, facts.tenant, facts.slo_class, emitted_n)
        return max(1, tokens - emitted_n)

    def handover_s(self, facts: RequestFacts, worker: Worker, node: str | None, hits: Hits) -> float:
        """Predict the hand-over of a prompt from `node` (None = its blocks are anywhere) to `worker`."""
        record = worker.record
        blocks = -(-facts.prompt_len // record.block_size) - hits.on_gpu(worker.id)
        size_bytes = blocks * record.block_bytes
        return self.cost.transfer_s(size_bytes, remote=node is not None and record.node != node)

    def _compute_s(
        self, record: InstanceRecord, total_tokens: int, hit_blocks: int, cached_blocks: int, hits: Hits
    ) -> float:
        asked = total_tokens, hit_blocks, cached_blocks, record.block_size, record.block_bytes
        found_s = hits.computed_s.get(asked)
        if found_s is not None:
            return found_s
        new_tokens, hit_tokens = split(total_tokens, hit_blocks, record.block_size)
        load_s = self.cost.transfer_s((hit_blocks - cached_blocks) * record.block_bytes, remote=False)
        hits.computed_s[asked] = computed_s = load_s + self.cost.prefill_s(new_tokens, hit_tokens)
        return computed_s


def known(blocks: dict[str, int]) -> int:
    """Return how many leading blocks somebody holds."""
    return max(blocks.values(), default=0)


def split(total_tokens: int, hit_blocks: int, block_size: int) -> tuple[int, int]:
    """Return (tokens to compute, tokens known). The last is always computed: it gives the first token."""
    hit_tokens = min(hit_blocks * block_size, total_tokens - 1)
    return total_tokens - hit_tokens, hit_tokens
