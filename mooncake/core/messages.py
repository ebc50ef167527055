"""Messages on our wires, grouped by the process that receives them. Frozen, array-like, tagged."""

import msgspec

# ---------------------------------------------------------------- common


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="err"):
    """An exception as it travels: `code` is one of errors.WIRE_ERRORS."""

    code: str
    message: str


class Ok(msgspec.Struct, frozen=True, array_like=True, tag="ok"):
    """Nothing to say but success."""


# ---------------------------------------------------------------- to a store node
# Offsets and sizes are bytes inside the node's segment. Keys are 32 bytes (core.keys).


class Acquire(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="acq"):
    """Lease the longest prefix of `keys` that is complete. Answer: Acquired.

    `wait_s` > 0 waits (bounded by the node) for keys that are being written right now, and for those
    that are fetched from the store of node `source` ("" = nowhere else), which is known to have them. With
    `named` the answer says what the blocks are called, for one who copies them.
    """

    keys: list[bytes]
    lease_s: float
    wait_s: float = 0.0
    source: str = ""
    named: bool = False


class Block(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a complete block lies: segment offset, size, xxh3-128 of the bytes (16 bytes)."""

    offset: int
    size_bytes: int
    checksum: bytes


class Acquired(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="acqd"):
    """`blocks[i]` belongs to `keys[i]`; shorter than keys at the first miss. lease_id 0 = none.

    `names[i]`: as in Commit, where they were asked for. fetched_bytes of the blocks came from another store
    meanwhile, for which fetch_s were waited.
    """

    lease_id: int
    blocks: list[Block]
    names: list[bytes] = []
    fetched_bytes: int = 0
    fetch_s: float = 0.0


class Release(msgspec.Struct, frozen=True, array_like=True, tag="rel"):
    """Give a lease back. Unknown or expired leases are fine (idempotent). Answer: Ok."""

    lease_id: int


class Find(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="find"):
    """Look for each of `keys`, one blob of 32-byte keys in any order. Answer: Findings.

    `lease_s` > 0 leases all that are found; 0 only looks, and counts as no use of them. Objects in memory
    of at most `inline_bytes` come with the answer instead of being leased.
    """

    keys: bytes
    lease_s: float = 0.0
    inline_bytes: int = 0


class Used(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="used"):
    """Reads by the table in shared memory: what was hit, one blob of 32-byte keys, and misses. Answer: Ok."""

    keys: bytes
    misses: int = 0


class Findings(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="findd"):
    """Columns, one row per key: offsets and sizes as little-endian i64, checksums of 16 bytes.

    Size 0 = not there. Offset -1 = there, but not in memory: it can only be leased after it was fetched;
    -2 = the bytes are in `data`, which has those of all such rows in their order. lease_id 0 = no row that
    says where bytes lie is leased.
    """

    lease_id: int
    offsets: bytes
    sizes: bytes
    checksums: bytes
    data: bytes = b""


class Reserve(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="rsv"):
    """Allocate room to write blocks. Answer: Reserved.

    `writer` names the engine; everything it has in writing is given up by Abandon or after
    the node's write deadline (quarantined first: a stalled writer may still write).

    Hints, see kvstore.node.tags: `tenant` pays for the blocks, those of one `group` go together ("" = none);
    keys[i] stands at depth + i of its prompt (-1 = unknown); a soft pin lasts until the block was not hit
    for soft_pin_s (0 = none), a hard pin until it is unpinned; a pin that has no room is not given.

    `replace`: also for what is there, which stays readable until the commit takes its place. `keep`: what
    only a slower tier has is there, too; without it that is written anew, which is quicker than to bring it.
    """

    writer: str
    keys: list[bytes]
    size_bytes: int
    tenant: str = ""
    group: str = ""
    depth: int = -1
    soft_pin_s: float = 0.0
    hard_pin: bool = False
    replace: bool = False
    keep: bool = False


class Reserved(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="rsvd"):
    """`offsets[i]` for `keys[i]`: where to write; -1 = already there or being written; -2 = full.

    -3 = beyond the tenant's quota: too little of its own can go.
    `tickets[i]` must be shown at commit (0 where there is nothing to write).
    """

    offsets: list[int]
    tickets: list[int]


class Commit(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="cmt"):
    """Make written blocks visible: checksum[i] is xxh3-128 over the bytes. Answer: Committed.

    `names[i]`: what ListNames shall call the block, b"" = nothing; no names at all = nothing for any.
    """

    tickets: list[int]
    checksums: list[bytes]
    names: list[bytes] = []


class Committed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="cmtd"):
    """`done[i]` False: the ticket had expired, the block is not in the pool."""

    done: list[bool]


class Grant(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="grt"):
    """Allocate room for `count` objects that have no names yet, and a ring to show them by. Answer: Granted.

    If there is room to spare it is for up to `count_max`. `returned`: tickets that nobody will use.
    """

    writer: str
    size_bytes: int
    count: int
    count_max: int
    returned: list[int] = []


class Granted(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="grtd"):
    """`ring`: see kvstore.rings, -1 = none is free, and no room either. No room at all: Reserve tells why."""

    ring: int
    offsets: list[int]
    tickets: list[int]


class Abandon(msgspec.Struct, frozen=True, array_like=True, tag="abn"):
    """Give up tickets; empty list = all of `writer`'s (it restarted). Answer: Ok."""

    writer: str
    tickets: list[int]


class ReportBad(msgspec.Struct, frozen=True, array_like=True, tag="bad"):
    """A reader found bytes that differ from the checksum: drop these blocks. Answer: Ok.

    The node verifies for itself before it drops (a reader may be wrong, or malicious).
    """

    keys: list[bytes]


class Term(msgspec.Struct, frozen=True, array_like=True):
    """A leader's time in office (core.election). Numbers grow within one life of the metadata store."""

    life: str  # epoch of the metadata store
    number: int
    leader: str


class Pull(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="pull"):
    """Copy blocks from the store of node `source` into this one. Answer: Pulled.

    `wait_s` bounds the copying; what is under way then goes on. `orders`: in whose name, if a leader asks.
    """

    keys: list[bytes]
    source: str
    wait_s: float
    orders: Term | None = None


class Pulled(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="pulld"):
    """`held[i]`: this node has `keys[i]` now, whether or not it was copied for this."""

    held: list[bool]


class HandOver(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="hand"):
    """Let the store of node `target` copy blocks from this one, soon; nobody waits for it. Answer: Ok."""

    keys: list[bytes]
    target: str


class DropKeys(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="drop"):
    """Remove complete blocks from every tier; leased ones are freed later. Answer: KeysDropped.

    `unless_read_s` > 0 keeps those that somebody has read in so many seconds; `ask_only` removes nothing
    and says which these are.
    """

    keys: list[bytes]
    orders: Term | None = None
    unless_read_s: float = 0.0
    ask_only: bool = False


class KeysDropped(msgspec.Struct, frozen=True, array_like=True, tag="dropd"):
    """How many were there and are gone, and which were kept, see DropKeys."""

    dropped: int
    kept: list[bytes] = []


class Pin(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="pin"):
    """Keep complete blocks until not hit for `ttl_s`; inf = until unpinned, 0 = unpin. Answer: Pinned."""

    keys: list[bytes]
    ttl_s: float


class Pinned(msgspec.Struct, frozen=True, array_like=True, tag="pind"):
    """How many blocks are there and, now, as it was asked for."""

    pinned: int


class SetQuota(msgspec.Struct, frozen=True, array_like=True, tag="quota"):
    """Give a tenant a share under pressure, a wall if `strict`; -1 ends it. Answer: TenantUsage."""

    tenant: str
    quota_bytes: int
    strict: bool = False


class TenantUsage(msgspec.Struct, frozen=True, array_like=True, tag="quotad"):
    """What a tenant has; quota_bytes -1 = none."""

    used_bytes: int
    pinned_bytes: int
    quota_bytes: int


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag="snap"):
    """One page of the node's complete keys. Answer: SnapshotPage."""

    cursor: int = 0


class SnapshotPage(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="snapd"):
    """Keys as one blob of 32-byte keys. Events after `seq` are not in it. cursor 0 = last page."""

    epoch: str
    seq: int
    keys: bytes
    cursor: int


class ListNames(msgspec.Struct, frozen=True, array_like=True, tag="names"):
    """One page of the names that commits gave. Answer: NamesPage."""

    cursor: int = 0


class NamesPage(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="namesd"):
    """`names[i]` of the i-th of `keys`, one blob of 32-byte keys; cursor 0 = last page."""

    keys: bytes
    names: list[bytes]
    cursor: int


class Stats(msgspec.Struct, frozen=True, array_like=True, tag="st"):
    """Ask for counters. Answer: StoreStats."""


class StoreStats(msgspec.Struct, frozen=True, array_like=True, tag="std"):
    """Counters since start, gauges now. `ssd_*`: of the tier below the memory, 0 = there is none."""

    capacity_bytes: int
    used_bytes: int
    blocks: int
    writing: int
    leases: int
    hits: int
    misses: int
    evictions: int
    checksum_failures: int
    commits: int
    hard_pinned_bytes: int = 0
    soft_pinned_bytes: int = 0
    ssd_capacity_bytes: int = 0
    ssd_used_bytes: int = 0
    ssd_blocks: int = 0
    ssd_hits: int = 0
    ssd_read_bytes: int = 0
    evicted_bytes: int = 0
    eviction_attempts: int = 0  # rounds of eviction; a put that finds room needs none
    eviction_successes: int = 0  # those that gave as much as was needed
    puts_begun: int = 0
    puts_refused: int = 0  # no room, beyond the quota, or there already
    puts_discarded: int = 0  # given up by the writer, or never committed
    drops: int = 0
    soft_pins: int = 0
    tenants: dict[str, int] = {}  # bytes of those with a strict quota
    granted_bytes: int = 0  # of used_bytes: room given to writers ahead


StoreRequest = (
    Acquire
    | Find
    | Used
    | Release
    | Reserve
    | Grant
    | Commit
    | Abandon
    | ReportBad
    | Pull
    | HandOver
    | DropKeys
    | Pin
    | SetQuota
    | Snapshot
    | ListNames
    | Stats
)
StoreReply = (
    Acquired
    | Findings
    | Reserved
    | Granted
    | Committed
    | Pulled
    | KeysDropped
    | Pinned
    | TenantUsage
    | SnapshotPage
    | NamesPage
    | StoreStats
    | Ok
    | Failure
)


class StoreEvents(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="ev"):
    """Ordered changes of one node, published on its event socket (PUB). Blobs of 32-byte keys.

    `seq` counts messages from 1 within `epoch` (a new epoch = the node restarted empty).
    A gap means: take a snapshot. An empty message is a heartbeat and repeats the last seq.
    """

    node: str
    epoch: str
    seq: int
    stored: bytes
    removed: bytes


# ---------------------------------------------------------------- between a gateway and a relay
# ZMQ DEALER (gateway) <-> ROUTER (relay). First frame = one of these bytes; then:
#   gateway -> relay   HELLO [Hello]           answered by WELCOME [Welcome] or REFUSED [Failure]
#                      ENGINE [vLLM frames...] forwarded to the engine verbatim (type, payload...)
#                      PING [8 bytes]          answered by PONG [same 8 bytes][Pulse]
#                      BYE                     the relay aborts everything of this gateway
#   relay -> gateway   DIED [Failure]          the engine process is gone; the relay stops
# Tokens do not pass the relay: the engine's output socket (PUSH) for the gateway's slot connects
# straight to the gateway's PULL socket named in Hello and sends vLLM's EngineCoreOutputs frames.
# A relay's endpoint and epoch belong to one engine start: a restart is a new endpoint.

RELAY_PROTOCOL = 2
RELAY_SLOTS = 8
"""Gateways one relay serves at once: each slot is one output socket (vLLM's client_index)."""


class RelayOp:
    """First frames of the relay protocol."""

    HELLO = b"H"
    WELCOME = b"W"
    REFUSED = b"X"
    ENGINE = b"E"
    PING = b"P"
    PONG = b"Q"
    BYE = b"B"
    DIED = b"D"
    ROLE = b"R"


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A gateway introduces itself; sending it again after a loss is harmless.

    outputs: ZMQ address where the gateway takes this engine's outputs (loopback or ipc).
    """

    gateway_id: str
    outputs: str
    protocol: int = RELAY_PROTOCOL


DRAINING = "draining"
"""Role of an instance on its way to another one: neither pool has it."""


class RoleOrder(msgspec.Struct, frozen=True, array_like=True):
    """Register with this role from now on; with hold_s (seconds), for so long unless another order comes.

    The new record is the answer. role: prefill | decode | both, or DRAINING. term: of the core that orders,
    whose successor's orders count from the first one; None: of a gateway that has no core beside it.
    """

    role: str
    hold_s: float = 0.0
    term: Term | None = None


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The slot is the client_index that this gateway must write into its requests."""

    slot: int
    instance_id: str
    epoch: str


class EngineQueues(msgspec.Struct, frozen=True, array_like=True):
    """What an engine has now: requests in its batch, all that wait, and of these the deferred ones.

    deferred: they wait for blocks on their way, not for room. kv_use_ratio: of its KV blocks.
    """

    running: int = 0
    waiting: int = 0
    deferred: int = 0
    kv_use_ratio: float = 0.0


class Pulse(msgspec.Struct, frozen=True, array_like=True):
    """Health of the engine behind the relay; age of the engine's last sign of life in seconds.

    load_*: since its start, what it copied from its host's store, and the time that took; fetch_*: what that
    store first had to fetch from others for it. queues: None from a relay before they were told.
    """

    epoch: str
    engine_age_s: float
    load_bytes: float = 0.0
    load_s: float = 0.0
    fetch_bytes: float = 0.0
    fetch_s: float = 0.0
    queues: EngineQueues | None = None


# `kv_transfer_params["mooncake"]` in a request's sampling_params.extra_args (plain dict on vLLM's
# wire): what the KV connector needs to know of a request.


class KvParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """leg: prefill (save full blocks and tail), decode (load both), whole (aggregated).

    emitted: tokens that an earlier engine already produced for this request (migration, or the
    first token of leg 1). CONTRACT: the EngineCoreRequest keeps its ORIGINAL prompt_token_ids and
    ORIGINAL sampling params (max_tokens, min_tokens, seed, penalties, grammar ... unchanged);
    the engine process appends `emitted` as output tokens of the request before it schedules it
    (mooncake.worker.resume), so stop checks, penalties, grammar and the seeded generator continue
    exactly where they stopped. The engine's outputs then contain only NEW tokens.
    prompt_len: len(prompt_token_ids).
    source: node whose store has (more of) the blocks, where this engine's own store may fetch them.
    target: node that is going to decode: blocks are handed over to its store while they are computed.
    trace: W3C traceparent of the leg's span; "" = it is not traced (mooncake.core.tracing).
    """

    leg: str
    prompt_len: int
    emitted: list[int] = []
    source: str = ""
    target: str = ""
    trace: str = ""


# ---------------------------------------------------------------- records in the metadata store

INSTANCES_PREFIX = "/mooncake/instances/"
STORES_PREFIX = "/mooncake/stores/"
GATEWAYS_PREFIX = "/mooncake/gateways/"
CORES_PREFIX = "/mooncake/cores/"


class InstanceRecord(msgspec.Struct, frozen=True):
    """What an engine instance says of itself under INSTANCES_PREFIX + instance_id (JSON)."""

    instance_id: str
    role: str  # prefill | decode | both | draining
    epoch: str  # new at every start of the engine
    endpoint: str  # relay's ZMQ address
    node: str
    pid: int
    model: str
    context_root: str  # hex; see core.keys
    block_size: int
    max_model_len: int
    kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_bytes: int  # size of one KV block, all layers and ranks
    vllm_version: str
    metrics_url: str = ""  # Prometheus metrics, reachable on its host only; "" = none
    context: dict[str, str] = {}  # what context_root commits to: KvContext.settings()
    gpu_endpoint: str = ""  # like a store's `endpoint`, for what the engine's own cache holds; "" = untold
    gpu_events: str = ""  # like a store's `events`; the node is called gpu_node(instance_id)
    ranks: int = 1  # that share each block: as many objects in a store (core.keys.share_keys)


def gpu_node(instance_id: str) -> str:
    """Return the name by which an engine's own cache speaks as a store does; no store's has a colon."""
    return f"gpu:{instance_id}"


class StoreRecord(msgspec.Struct, frozen=True):
    """What a store node says of itself under STORES_PREFIX + node (JSON)."""

    node: str
    epoch: str
    endpoint: str  # request/reply ZMQ address
    events: str  # PUB ZMQ address
    fd_path: str  # unix socket that hands out the segment's memfd (same host only)
    capacity_bytes: int
    pid: int
    metrics_url: str = ""  # as in InstanceRecord
    transfer: str = ""  # "host:port" of its transfer engine, for engines of other hosts; "" = none
    segment_address: int = 0  # of the segment's first byte, as that transfer engine names it
    door: str = ""  # unix socket for calls of plain threads (same host only), see kvstore.store.door
    table: str = ""  # unix socket that hands out the memfd of its table (same host only), see kvstore.table


class FrontRecord(msgspec.Struct, frozen=True):
    """What a gateway says of itself under GATEWAYS_PREFIX + name, a core under CORES_PREFIX + name (JSON)."""

    name: str
    pid: int
    url: str = ""  # where clients reach the gateway; several of one host share it; "" = a core
    metrics_url: str = ""  # as in InstanceRecord
