"""The simulator's nouns: what a world is made of, what became of a request, samples of load."""

import msgspec

from benchmarks.sim.engine import Engine, Job
from benchmarks.sim.failures import Failure
from benchmarks.sim.feed import Feed
from benchmarks.sim.host import Host
from benchmarks.sim.intervals import Gap, Tbt
from benchmarks.sim.trace import TraceRequest
from conductor.admission import MARGIN, AdmissionMode
from conductor.plan import Leg, Plan
from conductor.planner import PlannerConfig
from conductor.request import RequestMachine
from conductor.scheduler import Policy
from conductor.terms import DEFAULT_TERMS
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import InstanceRecord

WAITING_MAX = 1 << 20
"""Nothing is turned away for the length of a queue unless the caller asks for it."""
EVENT_DELAY_S = 0.005
"""From a store's change to the index: a turn of the store's loop, a message, a turn of the gateway's."""


class WorldConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who is there, and the policies.

    both: instances that do both; excludes the two others. host_blocks: of the store beside each instance
    that prefills; None = as the profile says. decode_host_blocks: beside each that only decodes.
    admission, decode_s, admission_margin: see conductor.admission; objectives that are None are not enforced.
    planner: who changes roles; None = nobody does.
    hold_s: see conductor.gate; classes: of service, taken in turn by the requests.
    tenants: names, taken in turn by the conversations.
    chunk_tokens: of a prompt; mixed: chunks run beside the batch (instances that do both, or inline).
    inline, append: see conductor.inline; want chunk_tokens, the most that a step computes.
    session_bonus_s: see conductor.scheduler; sessions are found in the trace (`sessions_of`).
    event_delay_s, event_loss: of what the stores tell the Conductor's index; blind: it hears nothing.
    failures: in order of time; see benchmarks.sim.failures.
    hot_copies: of any prefix, made ahead (see conductor.heat); below 2 none.
    restarts: (when, node) of stores that die and come back empty.
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
    admission_margin: float = MARGIN
    reject_ttft_s: float | None = None
    reject_tbt_s: float | None = None
    waiting_max: int = WAITING_MAX
    planner: PlannerConfig | None = None
    hold_s: float = 0.0
    classes: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()
    inline: bool = False
    append: bool = False
    session_bonus_s: float = 0.0
    event_delay_s: float = EVENT_DELAY_S
    event_loss: float = 0.0
    blind: bool = False
    failures: tuple[Failure, ...] = ()
    hot_copies: int = 0
    restarts: tuple[tuple[float, str], ...] = ()


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
        self.failed = ""
        self.ttft_s = -1.0
        self.tbt: Tbt | None = None
        self.given_tokens = 0  # to the client
        self.hit_tokens = 0
        self.new_tokens = 0
        self.prefill_s = 0.0
        self.handed_over_s = 0.0
        self.done = False
        self.ended_s = 0.0
        # of those whose engine or host broke down
        self.retries = self.moves = 0
        self.leg1_node = ""
        self.pushed = True  # its blocks go where it is to be decoded, while they are computed
        self.gaps: list[Gap] = []
        self.last_token_s = 0.0
        self.reached_tokens = 0  # of its context, computed for it or found, at some time
        self.twice_tokens = 0

    @property
    def affected(self) -> bool:
        """Whether a leg of it was lost."""
        return self.retries + self.moves > 0


class Sample(msgspec.Struct, frozen=True):
    """Load at one moment: per prefill instance predicted seconds of queue, per decode one the step time.

    up: instances that run, by role.
    """

    at_s: float
    queue_s: list[float]
    tbt_s: list[float]
    batch: list[int]
    up: dict[str, int]


class Instance:
    """One engine, the host it runs on, and what the host's store tells the Conductor."""

    def __init__(self, record: InstanceRecord, host: Host, engine: Engine, feed: Feed) -> None:
        """Idle."""
        self.record = record
        self.host = host
        self.engine = engine
        self.feed = feed
        self.up = True
        self.jobs = 0


class Running:
    """One leg in one engine, or on its way there."""

    def __init__(self, entry: Entry, job: Job, leg: Leg, instance: Instance) -> None:
        """`engine`: that start of the instance."""
        self.entry = entry
        self.job = job
        self.leg = leg
        self.instance = instance
        self.engine = instance.engine
        self.lease = 0
        self.staged_blocks = 0  # which came for it alone, to a host without a store
