"""The simulated world: engines, hosts and links around the production Conductor (DESIGN 2.3). Pure.

Production code decides: Scheduler, CostModel, PrefixIndex, ClusterView and one RequestMachine per request,
fed as the gateway's dispatcher feeds them. Only what stands around them is simulated:

    arrival --Scheduler--> fetch of blocks from another host --> prompt --> first token
            hand-over, from the begin of the prompt on --> decode batch --> last token

What is not: the gateway's own time, network latency, blocks of answers (a trace does not name them). A
prompt's blocks are in the store when it is done. Fetches begin when a request is sent, so they overlap with
the queue; a prompt whose blocks have not come keeps its place, as the Scheduler expects.
"""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.sim.engine import Engine
from benchmarks.sim.faults import Faults
from benchmarks.sim.feed import Feed
from benchmarks.sim.host import Host
from benchmarks.sim.hot import HotCopies
from benchmarks.sim.legs import Legs
from benchmarks.sim.nouns import Entry, Instance, Sample, WorldConfig
from benchmarks.sim.profile import Profile
from benchmarks.sim.roles import Roles
from benchmarks.sim.timeline import Timeline
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, losses, sessions_of
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.gate import Gate, GateConfig
from conductor.index import PrefixIndex
from conductor.plan import (
    Abort,
    Command,
    Deliver,
    Done,
    Fail,
    Plan,
    Rejection,
    Release,
    Replan,
    RequestFacts,
    Send,
    revised,
)
from conductor.planner import Planner
from conductor.request import RequestMachine
from conductor.scheduler import Mode, Scheduler, SchedulerConfig
from conductor.terms import CLASSES, Terms
from mooncake.core.messages import InstanceRecord, StoreRecord

ROOT = "00" * 32
"""One model, one context."""
MAX_TOKENS = 4096
"""Every request's limit: what the Conductor knows of an answer's length before it ends."""
WAIT_S_MAX = 3600.0
"""Nobody is sent away for waiting alone, unless an objective says so."""
TICK_S = 0.25
SAMPLE_S = 15.0
"""Distance of samples of load, as in the papers' figures; of short runs so that there are SAMPLES of them."""
SAMPLE_S_MIN, SAMPLES = 1.0, 100


class World:
    """Runs a list of requests to its end."""

    def __init__(self, requests: Sequence[TraceRequest], profile: Profile, config: WorldConfig) -> None:
        """`requests` in order of arrival."""
        self.profile, self.config = profile, config
        self.time = Timeline()
        self.cluster, self.index = ClusterView(), PrefixIndex()
        self.cost = CostModel(
            profile.prefill_prior(), profile.tbt_prior(), profile.load_bytes_s, profile.egress_bytes_s
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                mode=Mode.AGGREGATED if config.both else Mode.DISAGGREGATED,
                policy=config.policy,
                ttft_slo_s=config.reject_ttft_s,
                tbt_slo_s=config.reject_tbt_s,
                admission=config.admission,
                inline=config.inline,
                append=config.append,
                session_bonus_s=config.session_bonus_s,
                decode_s=config.decode_s,
                admission_margin=config.admission_margin,
                waiting_max=config.waiting_max,
                seed=config.seed,
            ),
            self.index,
            self.cost,
            self.cluster,
        )
        self.planner = None if config.planner is None else Planner(config.planner, self.cost)
        self.block_bytes = BLOCK_TOKENS * profile.kv_token_bytes
        self.entries = [Entry(number, one) for number, one in enumerate(requests)]
        if config.classes:
            terms = [
                Terms(slo_class=CLASSES[name], ttft_slo_s=config.reject_ttft_s) for name in config.classes
            ]
            for entry in self.entries:
                entry.terms = terms[entry.number % len(terms)]
        if config.tenants:
            for entry, session in zip(self.entries, sessions_of(requests), strict=True):
                entry.terms = Terms(
                    slo_class=entry.terms.slo_class,
                    tenant=config.tenants[int(session) % len(config.tenants)],
                    ttft_slo_s=config.reject_ttft_s,
                )
        if config.session_bonus_s:
            for entry, session in zip(self.entries, sessions_of(requests), strict=True):
                entry.session = session
        self.gate = Gate(
            GateConfig(
                hold_s=config.hold_s,
                waiting_max=config.waiting_max,
                tenant_max=config.waiting_max,
                wait_s=WAIT_S_MAX,
                batch_wait_s=WAIT_S_MAX,
            ),
            self.cluster,
            cost=self.cost,
        )
        self._pumping = False
        self._is_lost = losses(config.event_loss, config.seed)
        self.samples: list[Sample] = []
        self._sample_s = min(SAMPLE_S, max(SAMPLE_S_MIN, requests[-1].arrival_s / SAMPLES))
        self.in_flight: dict[int, Entry] = {}  # by number, in order of arrival
        self.ended_s = 0.0
        self.instances: dict[str, Instance] = {}
        self._hosts: dict[str, Host] = {}
        conductor = self.scheduler, self.cost, self.planner
        self._legs = Legs(self.time, profile, conductor, self.instances, self._hosts, self._execute)
        self.copies = self._legs.copies
        self._next_arrival = 0
        self._roles = Roles(self.time, self.cluster, self.planner, self.instances, self._going, self._leave)
        self.switches = self._roles.switches
        self.faults = Faults(self.time, self.cluster, self.instances, config.failures, self._going, self)
        for role, count in (("prefill", config.prefill), ("decode", config.decode), ("both", config.both)):
            for number in range(count if bool(config.both) == (role == "both") else 0):
                self._boot(f"{role}-{number:03}", role)
        self.hot = HotCopies(
            self.time, self.cluster, self.index, self.cost, self._hosts, self.block_bytes, self._going,
            config.hot_copies,
        )  # fmt: skip
        for when_s, node in config.restarts:
            self.time.at(when_s, partial(self._restart, self.instances[node.removeprefix("host-")]))

    def _boot(self, name: str, role: str) -> None:
        profile, config = self.profile, self.config
        node = f"host-{name}"
        own = profile.host_kv_tokens // BLOCK_TOKENS if config.host_blocks is None else config.host_blocks
        blocks = config.decode_host_blocks if role == "decode" else own
        index = PrefixIndex() if config.blind else self.index
        host = Host(node, blocks, config.eviction, profile.egress_bytes_s)
        feed = Feed(self.time, node, index, config.event_delay_s, self._is_lost, host.keys)
        host.tell = feed.publish
        record = InstanceRecord(
            instance_id=name, role=role, epoch="1", endpoint="", node=node, pid=1, model="m",
            context_root=ROOT, block_size=BLOCK_TOKENS, max_model_len=profile.context_tokens_max,
            kv_blocks=profile.gpu_kv_tokens // BLOCK_TOKENS, max_num_seqs=profile.sequences_max,
            max_num_batched_tokens=config.chunk_tokens or profile.context_tokens_max,
            block_bytes=self.block_bytes, vllm_version="",
        )  # fmt: skip
        self.instances[name] = instance = Instance(record, host, self._engine(), feed)
        self._hosts[node] = host
        self._open(instance)
        self.cluster.instance_up(0.0, record)
        self.cluster.link_up(0.0, name)
        self.cluster.pulse(0.0, name, 0.0)

    def _engine(self) -> Engine:
        config = self.config
        return Engine(self.time, self.profile, self._legs, config.chunk_tokens, mixed=config.mixed)

    def _open(self, instance: Instance) -> None:
        """The host's store puts its record; its address only says that it is open to other hosts."""
        host = instance.host
        if host.node is not None:
            capacity_bytes = host.capacity_blocks * self.block_bytes
            self.cluster.store_up(
                StoreRecord(host.name, host.epoch, "", "", "", capacity_bytes, 1, transfer=host.name)
            )
            instance.feed.start(host.epoch)

    def _restart(self, instance: Instance) -> None:
        """The store dies alone, and is back at once, empty."""
        instance.host.restart()
        self._open(instance)

    # ------------------------------------------------------------ the run

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Let everything happen; `progress` hears how many requests have arrived, now and then."""
        self._arrive()
        self._sample()
        self._tick()
        self._roles.replan()
        self.hot.start()
        self.faults.start()
        told = 0
        while self.time.step():
            if progress is not None and self._next_arrival - told >= 100:
                told = self._next_arrival
                progress(told)

    def _arrive(self) -> None:
        """Take the next request, and set the arrival of the one after it."""
        entries = self.entries
        if self._next_arrival == len(entries):
            return
        entry = entries[self._next_arrival]
        self._next_arrival += 1

        def come() -> None:
            self._arrive()
            self._request(entry)

        self.time.at(entry.trace.arrival_s, come)

    @property
    def fetches(self) -> int:
        """Copies of blocks between hosts."""
        return self.copies.count

    @property
    def fetched_bytes(self) -> int:
        """Their size."""
        return self.copies.size_bytes

    @property
    def active(self) -> int:
        """Requests that have come and not ended."""
        return len(self.in_flight)

    def _going(self) -> bool:
        """Return whether there is work still, or to come."""
        return bool(self.in_flight) or self._next_arrival < len(self.entries)

    def _sample(self) -> None:
        now_s = self.time.now_s
        queue_s, tbt_s, batch = [], [], []
        up: dict[str, int] = {}
        for instance in self.instances.values():
            if not instance.up:
                continue
            up[instance.record.role] = up.get(instance.record.role, 0) + 1
            if instance.record.role != "decode":
                queue_s.append(self.cluster.load(instance.record.instance_id).queue_s(now_s))
            if instance.record.role != "prefill":
                engine = instance.engine
                tbt_s.append(self.profile.step_s(engine.batch, engine.kv_tokens))
                batch.append(engine.batch)
        self.samples.append(Sample(now_s, queue_s, tbt_s, batch, up))
        if self._going():
            self.time.at(now_s + self._sample_s, self._sample)

    def _tick(self) -> None:
        """As the gateway's: deadlines pass without anybody giving load back."""
        if not any(entry.terms.slo_class.sheddable for entry in self.entries) and not self.config.hold_s:
            return  # nobody ever waits
        self._pump_soon()
        if self._going():
            self.time.at(self.time.now_s + TICK_S, self._tick)

    # ------------------------------------------------------------ the gateway's shell

    def _request(self, entry: Entry) -> None:
        trace = entry.trace
        facts = RequestFacts(
            request_id=str(entry.number),
            prompt_len=trace.input_tokens,
            max_tokens=MAX_TOKENS,
            keys=entry.keys,
            arrival_s=self.time.now_s,
            context_root=ROOT,
            first_token=True,
            single_leg=trace.output_tokens == 1,
            session=entry.session,
            slo_class=entry.terms.slo_class.name,
        )
        entry.machine = RequestMachine(facts)
        answer, others = self.gate.offer(
            self.time.now_s, facts.request_id,
            lambda: self.scheduler.needs(facts, BLOCK_TOKENS), entry.terms,
            lambda now_s: self.scheduler.on_request(now_s, facts),
        )  # fmt: skip
        self.in_flight[entry.number] = entry
        for other in others:
            self._answered(other.request_id, other.answer)
        if answer is not None:
            self._answered(facts.request_id, answer)

    def _answered(self, request_id: str, answer: Plan | Rejection) -> None:
        entry = self.entries[int(request_id)]
        assert entry.machine is not None
        if isinstance(answer, Rejection):
            entry.rejected = str(answer.reason)
            self._execute(entry, entry.machine.abort())
            return
        entry.plan = answer
        self.hot.planned(entry.keys, answer)
        if self.planner is not None:
            answer_tokens = self.cost.output_tokens(MAX_TOKENS)
            self.planner.planned(answer, entry.trace.input_tokens, answer_tokens, MAX_TOKENS)
        self._execute(entry, entry.machine.start(answer))

    def _pump(self) -> None:
        self._pumping = False
        for outcome in self.gate.pump(self.time.now_s):
            self._answered(outcome.request_id, outcome.answer)

    def _pump_soon(self) -> None:
        if len(self.gate) and not self._pumping:
            self._pumping = True
            self.time.at(self.time.now_s, self._pump)

    def _execute(self, entry: Entry, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Send():
                    self._legs.send(entry, command)
                case Release():
                    self.scheduler.release(self.time.now_s, command.ticket)
                    self._pump_soon()
                case Deliver():
                    self._delivered(entry, len(command.tokens))
                case Replan():
                    self._replan(entry, command)
                case Abort():
                    self._legs.abort(command.eid)
                case Fail():
                    entry.failed = command.reason
                case Done():
                    self._done(entry)
                # and Stale, which says that there is nothing to do

    def _delivered(self, entry: Entry, tokens: int) -> None:
        entry.given_tokens += tokens
        if entry.ttft_s < 0:
            entry.ttft_s = self.time.now_s - entry.trace.arrival_s

    def _leave(self, instance_id: str) -> None:
        """As the gateway's dispatcher when an instance drains."""
        for entry in list(self.in_flight.values()):
            if entry.machine is not None:
                self._execute(entry, entry.machine.leave_place(instance_id))

    def _done(self, entry: Entry) -> None:
        entry.done = True
        entry.machine = None
        del self.in_flight[entry.number]
        entry.ended_s = self.ended_s = self.time.now_s

    def _replan(self, entry: Entry, command: Replan) -> None:
        machine = entry.machine
        assert machine is not None
        if command.delay_s <= 0:  # later ones only ask again
            if command.emitted_n:
                entry.moves += 1
            else:
                entry.retries += 1

        def answer() -> None:
            got = self.scheduler.replan(
                self.time.now_s, machine.facts, machine.emitted_n, command.exclude, command.need
            )
            if isinstance(got, Plan):
                entry.plan = got if entry.plan is None else revised(entry.plan, got)
                entry.pushed = entry.pushed and got.decode is None  # its blocks went elsewhere
            self._execute(entry, machine.plan_result(command.need, got))

        self.time.at(self.time.now_s + command.delay_s, answer)

    # ------------------------------------------------------------ what breaks down (Shell of Faults)

    def crashed(self, instance: Instance) -> None:
        """See Shell."""
        self._legs.crashed(instance)

    def lost(self, instance_id: str) -> None:
        """See Shell: as the gateway, tell everyone, as a request may count on it before it runs there."""
        self._legs.lost(instance_id)
        for entry in list(self.in_flight.values()):
            if entry.plan is None or entry.machine is None:
                continue  # it waits in the gate
            if entry.plan.decode == instance_id:
                entry.pushed = False
            self._execute(entry, entry.machine.instance_lost(instance_id))

    def revived(self, instance: Instance) -> None:
        """See Shell."""
        engine, instance.engine = instance.engine, self._engine()
        instance.engine.busy_s, instance.engine.prefill_busy_s = engine.busy_s, engine.prefill_busy_s
        if not instance.host.up:
            instance.host.up = True
            self._open(instance)
