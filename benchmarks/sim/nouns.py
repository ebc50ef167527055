"""The simulator's nouns: what a world is made of, what became of a request, samples of load."""

import msgspec

from benchmarks.sim.engine import Engine, Tbt
from benchmarks.sim.host import Host
from benchmarks.sim.trace import TraceRequest
from conductor.admission import AdmissionMode
from conductor.plan import Plan
from conductor.planner import PlannerConfig
from conductor.request import RequestMachine
from conductor.scheduler import Policy
from conductor.terms import DEFAULT_TERMS
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import InstanceRecord

WAITING_MAX = 1 << 20
"""Nothing is turned away for the length of a queue unless the caller asks for it."""


class WorldConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who is there, and the policies.

    both: instances that do both; excludes the two others. host_blocks: of the store beside each instance
    that prefills; None = as the profile says. decode_host_blocks: beside each that only decodes.
    admission, decode_s: see conductor.admission; objectives that are None are not enforced.
    planner: who changes roles; None = nobody does.
    hold_s: see conductor.gate; classes: of service, taken in turn by the requests.
    chunk_tokens: of a prompt; mixed: chunks run beside the batch (instances that do both, or inline).
    inline: see conductor.inline; wants chunk_tokens, the most that a step computes.
    session_bonus_s: see conductor.scheduler; sessions are found in the trace (`sessions_of`).
    blind: no event of the stores reaches the Conductor's index.
    """

    prefill: int = 8
    decode: int = 8
    both: int = 0
    policy: Policy = Policy.KVCACHE
    seed: int = 0
    host_blocks: int | None = None
    decode_host_blocks: int = 0
    eviction: str = "lru"
    chunk_tokens: int = 0
    mixed: bool = False
    admission: AdmissionMode = AdmissionMode.OBJECTIVES
    decode_s: float | None = None
    reject_ttft_s: float | None = None
    reject_tbt_s: float | None = None
    waiting_max: int = WAITING_MAX
    planner: PlannerConfig | None = None
    hold_s: float = 0.0
    classes: tuple[str, ...] = ()
    inline: bool = False
    session_bonus_s: float = 0.0
    blind: bool = False


class Entry:
    """One request and what became of it."""

    def __init__(self, number: int, trace: TraceRequest) -> None:
        """Not yet sent."""
        self.number = number
        self.trace = trace
        self.keys = [block.to_bytes(KEY_BYTES, "little") for block in trace.hash_ids]
        self.machine: RequestMachine | None = None
        self.plan: Plan | None = None
        self.terms = DEFAULT_TERMS
        self.session = ""
        self.rejected = ""
        self.ttft_s = -1.0
        self.tbt: Tbt | None = None
        self.hit_tokens = 0
        self.new_tokens = 0
        self.prefill_s = 0.0
        self.lease = 0
        self.handed_over_s = 0.0
        self.done = False


class Sample(msgspec.Struct, frozen=True):
    """Load at one moment: per prefill instance predicted seconds of queue, per decode one the step time."""

    at_s: float
    queue_s: list[float]
    tbt_s: list[float]
    batch: list[int]


class Instance:
    """One engine and the host it runs on."""

    def __init__(self, record: InstanceRecord, host: Host, engine: Engine) -> None:
        """Idle."""
        self.record = record
        self.host = host
        self.engine = engine
        self.jobs = 0
        self.next_role = ""  # while it finishes what it has
