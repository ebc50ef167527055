"""The simulated world: engines, hosts and links around the production Conductor (DESIGN 2.3). Pure.

Production code decides: Scheduler, CostModel, PrefixIndex, ClusterView and one RequestMachine per request,
fed as the gateway's dispatcher feeds them. Only what stands around them is simulated:

    arrival --Scheduler--> fetch of blocks from another host --> prompt --> first token
            hand-over, from the begin of the prompt on --> decode batch --> last token

What is not: the gateway's own time, network latency, losses of engines, blocks of answers (a trace does not
name them). A prompt's blocks become visible when it is done. Fetches begin when a request is sent, so they
overlap with the queue; a prompt whose blocks have not come keeps its place, as the Scheduler expects.
"""

from collections.abc import Callable, Sequence

from benchmarks.sim.engine import Engine, Job, Tbt, Work
from benchmarks.sim.host import Host
from benchmarks.sim.nouns import Entry, Instance, Sample, WorldConfig
from benchmarks.sim.profile import Profile
from benchmarks.sim.roles import Roles
from benchmarks.sim.timeline import Link, Timeline
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, sessions_of
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.gate import Gate, GateConfig
from conductor.index import PrefixIndex
from conductor.plan import Abort, Command, Deliver, Done, Leg, Plan, Rejection, Release, RequestFacts, Send
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
"""Distance of samples of load, as in the papers' figures."""


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
                session_bonus_s=config.session_bonus_s,
                decode_s=config.decode_s,
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
        if config.session_bonus_s:
            for entry, session in zip(self.entries, sessions_of(requests), strict=True):
                entry.session = session
        self.gate = Gate(
            GateConfig(
                hold_s=config.hold_s,
                waiting_max=config.waiting_max,
                tenant_max=config.waiting_max,
                wait_s=WAIT_S_MAX,
            ),
            self.cost,
            self.cluster,
        )
        self._pumping = False
        self.samples: list[Sample] = []
        self.active = 0
        self.fetches = 0
        self.fetched_bytes = 0
        self.instances: dict[str, Instance] = {}
        self._hosts: dict[str, Host] = {}
        self._next_arrival = 0
        self._roles = Roles(self.time, self.cluster, self.planner, self.instances, self._going)
        self.switches = self._roles.switches
        for role, count in (("prefill", config.prefill), ("decode", config.decode), ("both", config.both)):
            for number in range(count if bool(config.both) == (role == "both") else 0):
                self._boot(f"{role}-{number:03}", role)

    def _boot(self, name: str, role: str) -> None:
        profile, config = self.profile, self.config
        node = f"host-{name}"
        own = profile.host_kv_tokens // BLOCK_TOKENS if config.host_blocks is None else config.host_blocks
        blocks = config.decode_host_blocks if role == "decode" else own
        index = PrefixIndex() if config.blind else self.index
        host = Host(node, blocks, config.eviction, Link(profile.egress_bytes_s), index)
        record = InstanceRecord(
            instance_id=name, role=role, epoch="1", endpoint="", node=node, pid=1, model="m",
            context_root=ROOT, block_size=BLOCK_TOKENS, max_model_len=profile.context_tokens_max,
            kv_blocks=profile.gpu_kv_tokens // BLOCK_TOKENS, max_num_seqs=profile.sequences_max,
            max_num_batched_tokens=config.chunk_tokens or profile.context_tokens_max,
            block_bytes=self.block_bytes, vllm_version="",
        )  # fmt: skip
        engine = Engine(self.time, profile, self, config.chunk_tokens, mixed=config.mixed)
        self.instances[name] = Instance(record, host, engine)
        self._hosts[node] = host
        if blocks:
            # the address only says that the store is open to other hosts
            self.cluster.store_up(StoreRecord(node, "1", "", "", "", 0, 1, transfer=node))
        self.cluster.instance_up(0.0, record)
        self.cluster.link_up(0.0, name)
        self.cluster.pulse(0.0, name, 0.0)

    # ------------------------------------------------------------ the run

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Let everything happen; `progress` hears how many requests have arrived, now and then."""
        self._arrive()
        self._sample()
        self._tick()
        self._roles.replan()
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

    def _going(self) -> bool:
        """Return whether there is work still, or to come."""
        return self.active > 0 or self._next_arrival < len(self.entries)

    def _sample(self) -> None:
        now_s = self.time.now_s
        queue_s, tbt_s, batch = [], [], []
        for instance in self.instances.values():
            if instance.record.role != "decode":
                queue_s.append(self.cluster.load(instance.record.instance_id).queue_s(now_s))
            if instance.record.role != "prefill":
                engine = instance.engine
                tbt_s.append(self.profile.step_s(engine.batch, engine.kv_tokens))
                batch.append(engine.batch)
        self.samples.append(Sample(now_s, queue_s, tbt_s, batch))
        if self._going():
            self.time.at(now_s + SAMPLE_S, self._sample)

    def _tick(self) -> None:
        """As the gateway's: deadlines pass without anybody giving load back."""
        if not self.config.hold_s:
            return
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
        )
        prompt_len = trace.input_tokens
        entry.machine = RequestMachine(facts)
        answer, others = self.gate.offer(
            self.time.now_s, facts.request_id, prompt_len, entry.terms,
            lambda now_s: self.scheduler.on_request(now_s, facts),
        )  # fmt: skip
        self.active += 1
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
        if self.planner is not None:
            answer_tokens = self.cost.output_tokens(MAX_TOKENS)
            self.planner.planned(answer, entry.trace.input_tokens, answer_tokens)
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
                    self._send(entry, command)
                case Release():
                    self.scheduler.release(self.time.now_s, command.ticket)
                    self._pump_soon()
                case Deliver():
                    if entry.ttft_s < 0:
                        entry.ttft_s = self.time.now_s - entry.trace.arrival_s
                case Abort():
                    pass  # the leg has not begun
                case Done():
                    entry.done = True
                    entry.machine = None
                    self.active -= 1
                case _:
                    raise AssertionError(f"nothing fails here: {command}")

    def _send(self, entry: Entry, command: Send) -> None:
        instance = self.instances[command.instance_id]
        trace, plan = entry.trace, entry.plan
        assert plan is not None
        answer_tokens = trace.output_tokens - 1
        instance.jobs += 1
        if command.leg is Leg.DECODE:
            job = Job(command.eid, trace.input_tokens, answer_tokens)
            job.first_token_s = self.time.now_s
            self.time.at(entry.handed_over_s, lambda: self._handed_over(entry, instance, job))
            return
        job = Job(command.eid, trace.input_tokens, answer_tokens if command.leg is Leg.WHOLE else 0)
        if plan.fetch_node is not None and entry.machine is not None:
            # as conductor.dispatch asks for a leg's source
            node = instance.record.node
            source = self.scheduler.source(entry.machine.facts, node, plan.fetch_node)
            if source:
                self._fetch(entry, instance, job, self._hosts[source])
        instance.engine.add_prompt(job)

    def _fetch(self, entry: Entry, instance: Instance, job: Job, source: Host) -> None:
        """Copy the planned blocks that the own host lacks; what is under way to it is only waited for."""
        assert entry.plan is not None
        now_s, host = self.time.now_s, instance.host
        lease, there = source.lease(now_s, entry.keys[: entry.plan.hit_blocks])
        depth = host.held(entry.keys[:there])
        wanted = entry.keys[depth:there]
        missing = [key for key in wanted if key not in host.arriving]
        ready_s = max((host.arriving[key] for key in wanted if key in host.arriving), default=now_s)
        if missing:
            size_bytes = len(missing) * self.block_bytes
            arrived_s = source.egress.book(now_s, size_bytes)
            ready_s = max(ready_s, arrived_s)
            host.arriving.update(dict.fromkeys(missing, arrived_s))
            self.fetches += 1
            self.fetched_bytes += size_bytes
            self.time.at(arrived_s, lambda: self._fetched(host, missing, depth, size_bytes, now_s))
        job.blocked = True

        def ready() -> None:
            source.release(self.time.now_s, lease)
            job.blocked = False
            instance.engine.kick()

        self.time.at(ready_s, ready)

    def _fetched(self, host: Host, keys: list[bytes], depth: int, size_bytes: int, begun_s: float) -> None:
        for key in keys:
            del host.arriving[key]
        host.store(self.time.now_s, keys, depth)
        self.cost.observe_transfer(size_bytes, self.time.now_s - begun_s, remote=True)

    def _handed_over(self, entry: Entry, instance: Instance, job: Job) -> None:
        """The decode instance looks again before it takes a request (paper 1.3)."""
        assert entry.plan is not None
        assert entry.machine is not None
        instance.host.store(self.time.now_s, entry.keys, 0)
        if rejection := self.scheduler.second_check(entry.plan):
            entry.rejected = f"after prefill: {rejection.reason}"
            self._execute(entry, entry.machine.abort())
            return
        instance.engine.add_answer(job)

    # ------------------------------------------------------------ what engines tell (EngineEvents)

    def begin(self, job: Job) -> Work:
        """See EngineEvents: look for the prompt's blocks, and begin to hand over."""
        entry = self._entry(job)
        now_s, plan = self.time.now_s, entry.plan
        assert plan is not None
        instance = self.instances[plan.prefill or plan.decode or ""]
        entry.lease, found = instance.host.lease(now_s, entry.keys)
        prompt = entry.trace.input_tokens
        known = min(found * BLOCK_TOKENS, prompt - 1)  # the last token is always computed
        entry.hit_tokens, entry.new_tokens = known, prompt - known
        if plan.prefill is not None:
            entry.handed_over_s = instance.host.egress.book(now_s, prompt * self.profile.kv_token_bytes)
        return Work(prompt - known, known, known * self.profile.kv_token_bytes / self.profile.load_bytes_s)

    def prefilled(self, job: Job, work: Work, seconds: float) -> None:
        """See EngineEvents."""
        entry = self._entry(job)
        assert entry.plan is not None
        assert entry.machine is not None
        now_s = self.time.now_s
        entry.prefill_s = seconds
        host = self.instances[entry.plan.prefill or entry.plan.decode or ""].host
        depth = -(-work.known_tokens // BLOCK_TOKENS)
        host.store(now_s, entry.keys[depth:], depth)
        host.release(now_s, entry.lease)
        entry.handed_over_s = max(entry.handed_over_s, now_s)
        self.cost.observe_prefill(work.new_tokens, work.known_tokens, seconds)
        over = entry.trace.output_tokens == 1
        finish = "stop" if over else "length" if entry.plan.prefill is not None else None
        if over:
            self.cost.observe_output(1)
        self._execute(entry, entry.machine.output(job.eid, [0], finish))

    def stepped(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """See EngineEvents."""
        self.cost.observe_tbt(batch, kv_tokens, seconds)

    def answered(self, job: Job, tbt: Tbt) -> None:
        """See EngineEvents."""
        entry = self._entry(job)
        assert entry.machine is not None
        entry.tbt = tbt
        self.cost.observe_output(entry.trace.output_tokens)
        if self.planner is not None:
            self.planner.answered(entry.trace.output_tokens)
        self._execute(entry, entry.machine.output(job.eid, [0] * job.answer_tokens, "stop"))

    def _entry(self, job: Job) -> Entry:
        return self.entries[int(job.eid.partition("#")[0])]
