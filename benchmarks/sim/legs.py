"""The legs of all requests in the simulated engines: sent, computed, handed over, lost. Pure.

A leg whose engine breaks down is lost. Its machine is told when the Conductor notices, with all tokens that
came until then, and asks for another place; there the prompt and those tokens are looked for in the pool,
and the rest is computed.
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.sim.copies import Copies
from benchmarks.sim.engine import Job, Work
from benchmarks.sim.host import Host
from benchmarks.sim.intervals import Tbt, tbt_of
from benchmarks.sim.nouns import Entry, Instance, Running
from benchmarks.sim.profile import Profile
from benchmarks.sim.timeline import Timeline
from benchmarks.sim.trace import BLOCK_TOKENS
from conductor.cost import CostModel
from conductor.plan import Command, Leg, Send
from conductor.planner import Planner
from conductor.scheduler import Scheduler


class Legs:
    """Listens to all engines (EngineEvents)."""

    def __init__(
        self,
        time: Timeline,
        profile: Profile,
        conductor: tuple[Scheduler, CostModel, Planner | None],
        instances: Mapping[str, Instance],
        hosts: Mapping[str, Host],
        execute: Callable[[Entry, Sequence[Command]], None],
    ) -> None:
        """`execute` carries out what a request's machine answers."""
        self._time = time
        self._profile = profile
        self._scheduler, self._cost, self._planner = conductor
        self._instances = instances
        self._hosts = hosts
        self._execute = execute
        self._running: dict[str, Running] = {}  # by the engine's name for it
        self.copies = Copies(time, self._cost, BLOCK_TOKENS * profile.kv_token_bytes)

    # ------------------------------------------------------------ from the request machines

    def send(self, entry: Entry, command: Send) -> None:
        """Begin a leg: its prompt, or its answer once the prompt's blocks have been handed over."""
        instance, plan, eid = self._instances[command.instance_id], entry.plan, command.eid
        assert plan is not None
        instance.jobs += 1
        if command.leg is Leg.DECODE and entry.pushed and command.instance_id == plan.decode:
            job = Job(eid, entry.trace.input_tokens, entry.trace.output_tokens - command.resume_n)
            job.first_token_s = self._time.now_s
            running = self._running[eid] = Running(entry, job, command.leg, instance)
            source = self._hosts[entry.leg1_node]
            life = source.lives
            self._time.at(entry.handed_over_s, lambda: self._handed_over(running, source, life))
        else:
            self._compute(Running(entry, self._prompt(entry, command), command.leg, instance))
        if command.leg is Leg.DECODE:
            entry.pushed = False

    def abort(self, eid: str) -> None:
        """Forget a leg, which has not begun or whose engine is no more; unknown ones are fine."""
        self._running.pop(eid, None)

    def _prompt(self, entry: Entry, command: Send) -> Job:
        """Return the job of computing a prompt and what was answered of it, whose own token is the next."""
        emitted = command.resume_n
        left = 0 if command.leg is Leg.PREFILL else entry.trace.output_tokens - emitted - 1
        job = Job(command.eid, entry.trace.input_tokens + emitted, left)
        if emitted:
            job.resumed, job.before = True, list(entry.gaps)
            job.first_token_s = entry.last_token_s or entry.trace.arrival_s + entry.ttft_s
        return job

    def _compute(self, running: Running) -> None:
        """Let an engine compute a prompt; what is to be fetched for it comes meanwhile, or first."""
        self._running[running.job.eid] = running
        if not running.instance.up:
            return  # nobody has noticed yet
        if source := self._source(running):
            entry = running.entry
            assert entry.plan is not None
            # the first time what was planned, else what there is
            depth = None if entry.affected or running.job.resumed else entry.plan.hit_blocks
            self.copies.fetch(running, self._hosts[source], entry.keys[:depth])
        running.engine.add_prompt(running.job)

    def _source(self, running: Running) -> str:
        """As conductor.dispatch asks for a leg's source."""
        entry = running.entry
        assert entry.plan is not None
        assert entry.machine is not None
        known = entry.leg1_node or entry.plan.fetch_node or ""
        if not known and not running.job.resumed:
            return ""  # the plan found computing quicker
        host = running.instance.host
        if host.node is None:  # nothing stays there, but what is needed now may come
            return known if known != host.name else ""
        return self._scheduler.source(entry.machine.facts, host.name, known)

    def _handed_over(self, running: Running, source: Host, life: int) -> None:
        """The decode instance looks again before it takes a request (paper 1.3)."""
        entry, instance = running.entry, running.instance
        if self._running.get(running.job.eid) is not running or instance.engine is not running.engine:
            return
        assert entry.plan is not None
        assert entry.machine is not None
        if not instance.up:
            return  # nobody has noticed yet
        if source.lives != life:  # it broke down with the rest: that has to be computed here
            send = Send(
                entry.machine.facts.request_id, running.job.eid, running.leg, "", entry.machine.emitted_n
            )
            self._compute(Running(entry, self._prompt(entry, send), running.leg, instance))
            return
        instance.host.store(self._time.now_s, entry.keys, 0)
        if rejection := self._scheduler.second_check(entry.plan):
            entry.rejected = f"after prefill: {rejection.reason}"
            self._execute(entry, entry.machine.abort())
            return
        instance.engine.add_answer(running.job)

    # ------------------------------------------------------------ engines that break down

    def crashed(self, instance: Instance) -> None:
        """An engine is no more, and nobody knows yet: tokens that came until now still count."""
        for one in instance.engine.stop():
            running = self._running.get(one.job.eid)
            if running is None:
                continue
            entry = running.entry
            assert entry.machine is not None
            entry.gaps, entry.last_token_s = one.gaps, one.last_s
            entry.reached_tokens = max(entry.reached_tokens, one.prompt_tokens + one.tokens)
            self._execute(entry, entry.machine.output(one.job.eid, [0] * one.tokens, None))

    def lost(self, instance_id: str) -> None:
        """It is known now: whatever these legs might still say is nobody's."""
        gone = [eid for eid, one in self._running.items() if one.instance.record.instance_id == instance_id]
        for eid in gone:
            del self._running[eid]

    # ------------------------------------------------------------ what engines tell (EngineEvents)

    def begin(self, job: Job) -> Work:
        """See EngineEvents: look for the prompt's blocks, and begin to hand over."""
        running = self._running[job.eid]
        entry, host, now_s = running.entry, running.instance.host, self._time.now_s
        running.lease, found = host.lease(now_s, entry.keys)
        # the last token is always computed
        known = min(
            max(found, running.staged_blocks) * BLOCK_TOKENS, entry.trace.input_tokens, job.prompt_tokens - 1
        )
        entry.twice_tokens += max(0, min(entry.reached_tokens, job.prompt_tokens) - known)
        if not job.resumed:
            entry.hit_tokens, entry.new_tokens = known, job.prompt_tokens - known
        if running.leg is Leg.PREFILL:
            entry.handed_over_s = host.egress.book(now_s, job.prompt_tokens * self._profile.kv_token_bytes)
        load_s = known * self._profile.kv_token_bytes / self._profile.load_bytes_s
        return Work(job.prompt_tokens - known, known, load_s)

    def prefilled(self, job: Job, work: Work, seconds: float) -> None:
        """See EngineEvents."""
        running = self._running[job.eid]
        entry, host, now_s = running.entry, running.instance.host, self._time.now_s
        assert entry.machine is not None
        entry.prefill_s += seconds
        entry.reached_tokens = max(entry.reached_tokens, job.prompt_tokens)
        depth = -(-work.known_tokens // BLOCK_TOKENS)
        host.store(now_s, entry.keys[depth:], depth)
        host.release(now_s, running.lease)
        if running.leg is Leg.PREFILL:
            entry.handed_over_s = max(entry.handed_over_s, now_s)
            entry.leg1_node = host.name
        self._cost.observe_prefill(work.new_tokens, work.known_tokens, seconds)
        over = entry.machine.emitted_n + 1 == entry.trace.output_tokens
        finish = "stop" if over else "length" if running.leg is Leg.PREFILL else None
        if over:
            entry.tbt = tbt_of(job.before) if job.before else None
            self._cost.observe_output(entry.trace.output_tokens)
        if finish is not None:
            del self._running[job.eid]
        self._execute(entry, entry.machine.output(job.eid, [0], finish))

    def stepped(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """See EngineEvents."""
        self._cost.observe_tbt(batch, kv_tokens, seconds)

    def answered(self, job: Job, tbt: Tbt) -> None:
        """See EngineEvents."""
        entry = self._running.pop(job.eid).entry
        assert entry.machine is not None
        entry.tbt = tbt
        self._cost.observe_output(entry.trace.output_tokens)
        if self._planner is not None:
            self._planner.answered(entry.trace.output_tokens)
        self._execute(entry, entry.machine.output(job.eid, [0] * job.answer_tokens, "stop"))
