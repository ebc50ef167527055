"""Short makers of the nouns that conductor tests talk about."""

from hashlib import sha256

from conductor.cluster import ClusterView
from conductor.plan import Decision, Plan, RequestFacts
from mooncake.core.messages import InstanceRecord, StoreRecord

ROOT = "aa" * 32
BLOCK = 32


def keys(count: int, chain: str = "prompt") -> list[bytes]:
    return [sha256(f"{chain}/{i}".encode()).digest() for i in range(count)]


def record(
    instance_id: str,
    role: str = "both",
    *,
    epoch: str = "e1",
    node: str = "n0",
    endpoint: str = "",
    block_size: int = BLOCK,
    context_root: str = ROOT,
    max_model_len: int = 32_768,
    kv_blocks: int = 4096,
    max_num_seqs: int = 64,
    block_bytes: int = 1 << 20,
    context: dict[str, str] | None = None,
) -> InstanceRecord:
    return InstanceRecord(
        instance_id=instance_id,
        role=role,
        epoch=epoch,
        endpoint=endpoint or f"inproc://{instance_id}",
        node=node,
        pid=1,
        model="m",
        context_root=context_root,
        block_size=block_size,
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        block_bytes=block_bytes,
        vllm_version="0.32.0",
        context=context or {},
    )


def store(node: str, transfer: str = "127.0.0.1:1") -> StoreRecord:
    return StoreRecord(node, "e", "tcp://x", "tcp://y", "/fd", 1 << 20, 1, transfer=transfer)


def cluster(*records: InstanceRecord) -> ClusterView:
    """Return a view in which all `records` are alive at 0 s, each node with a store open to others."""
    view = ClusterView()
    for node in dict.fromkeys(one.node for one in records):
        view.store_up(store(node))
    for one in records:
        view.instance_up(0.0, one)
        view.link_up(0.0, one.instance_id)
        view.pulse(0.0, one.instance_id, 0.0)
    return view


def facts(
    request_id: str = "r", prompt_len: int = 1000, max_tokens: int = 16, **more: object
) -> RequestFacts:
    fields: dict[str, object] = {"keys": keys(prompt_len // BLOCK), "arrival_s": 0.0}
    fields.update(more)
    return RequestFacts(request_id=request_id, prompt_len=prompt_len, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def plan(prefill: str | None, decode: str | None, prefill_ticket: int = 1, decode_ticket: int = 2) -> Plan:
    return Plan(
        request_id="r",
        prefill=prefill,
        decode=decode,
        decision=Decision.KVCACHE_CENTRIC,
        prefill_ticket=prefill_ticket,
        decode_ticket=decode_ticket,
    )
