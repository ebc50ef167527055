"""RequestMachine under any order of events: late, repeated and stale outputs, losses, returns.

The model holds engines that keep talking after they were declared lost. Whatever happens: tokens
arrive exactly once and in order, at most one leg is live, charges are given back exactly once,
attempts are bounded, nothing follows Done, and once the world behaves every request completes.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conductor.plan import (
    Abort,
    Command,
    Decision,
    Deliver,
    Done,
    Fail,
    Leg,
    Need,
    Plan,
    Reason,
    Rejection,
    Release,
    Replan,
    Send,
    Stale,
)
from conductor.request import MIGRATIONS_MAX, PREFILL_ATTEMPTS_MAX, PrefillGroup, RequestMachine, State
from tests.unit.conductor.make import facts

INSTANCES = ("p0", "p1", "d0", "d1")
MAX_TOKENS = 6
LEGS_MAX = PREFILL_ATTEMPTS_MAX + MIGRATIONS_MAX + 8


class Engine:
    """One leg on one engine; goes on talking whatever the machine thinks of it."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.next = send.resume_n
        self.finished = False


class Requests(RuleBasedStateMachine):
    @initialize(children=st.integers(1, 3), first_token=st.booleans(), data=st.data())
    def begin(self, children, first_token, data):
        group = PrefillGroup("g") if children > 1 else None
        self.first_token = first_token and children == 1
        self.machines = [
            RequestMachine(facts(f"c{i}", max_tokens=MAX_TOKENS, first_token=self.first_token), group)
            for i in range(children)
        ]
        self.by_id = {m.facts.request_id: m for m in self.machines}
        self.delivered: dict[str, int] = dict.fromkeys(self.by_id, 0)
        self.finishes: dict[str, int] = dict.fromkeys(self.by_id, 0)
        self.done: dict[str, int] = dict.fromkeys(self.by_id, 0)
        self.charged: set[int] = set()
        self.tickets = 0
        self.engines: dict[str, Engine] = {}  # all legs ever
        self.live: dict[str, Engine] = {}
        self.replans: list[Replan] = []
        for machine in self.machines:
            plan = self.plan(machine, data.draw(st.booleans()), data)
            self.feed(machine, machine.start(plan))

    # ------------------------------------------------------------ the shell and the scheduler

    def ticket(self) -> int:
        self.tickets += 1
        self.charged.add(self.tickets)
        return self.tickets

    def plan(self, machine, prefill, data, *, decode=True) -> Plan:
        pick = st.sampled_from(INSTANCES)
        return Plan(
            request_id=machine.facts.request_id,
            prefill=data.draw(pick) if prefill else None,
            decode=data.draw(pick) if decode else None,
            decision=Decision.KVCACHE_CENTRIC,
            prefill_ticket=self.ticket() if prefill or decode else 0,
            decode_ticket=self.ticket() if decode else 0,
        )

    def feed(self, machine: RequestMachine, commands: list[Command]) -> None:
        was_done = machine.facts.request_id if self.done[machine.facts.request_id] else None
        for command in commands:
            self.carry_out(command, was_done)

    def carry_out(self, command: Command, was_done: str | None) -> None:
        rid = command.request_id
        if isinstance(command, Release):
            assert command.ticket in self.charged, "gave back what was not charged"
            self.charged.remove(command.ticket)
            return
        if isinstance(command, Stale):
            return
        # a child that is done may still pass on commands of the leg it shared
        shared = isinstance(command, Send | Abort) and "#p" in command.eid
        assert not self.done[rid] or shared, "spoke after Done"
        if isinstance(command, Send):
            assert command.eid not in self.engines, "an engine id was used twice"
            self.engines[command.eid] = self.live[command.eid] = Engine(command)
        elif isinstance(command, Abort):
            assert self.live.pop(command.eid).send.instance_id == command.instance_id
        elif isinstance(command, Deliver):
            expected = list(range(self.delivered[rid], self.delivered[rid] + len(command.tokens)))
            assert command.tokens == expected, "tokens lost, repeated or out of order"
            self.delivered[rid] += len(command.tokens)
            self.finishes[rid] += command.finish is not None
        elif isinstance(command, Replan):
            assert command.emitted_n == (0 if command.need is Need.PREFILL else self.delivered[rid])
            self.replans.append(command)
        elif isinstance(command, Fail):
            self.finishes[rid] += 1
        elif isinstance(command, Done):
            self.done[rid] += 1
        assert was_done is None or shared or self.done[rid] <= 1

    def say(self, engine: Engine, count: int) -> None:
        """The engine emits up to `count` tokens, and its finish with the last one."""
        leg, eid = engine.send.leg, engine.send.eid
        last = 1 if leg is Leg.PREFILL else MAX_TOKENS
        tokens = list(range(engine.next, min(engine.next + count, last)))
        engine.next += len(tokens)
        engine.finished = engine.next >= last
        machine = self.listener(eid)
        if engine.finished:
            self.live.pop(eid, None)
        self.feed(machine, machine.output(eid, tokens, "length" if engine.finished else None))

    def listener(self, eid: str) -> RequestMachine:
        """Any child hears a shared leg; the shell picks one that is still there if it can."""
        if eid.startswith("g#"):
            return next((m for m in self.machines if m.state is not State.DONE), self.machines[0])
        return self.by_id[eid.rpartition("#")[0]]

    # ------------------------------------------------------------ what may happen

    @precondition(lambda self: any(not e.finished for e in self.engines.values()))
    @rule(data=st.data(), count=st.integers(0, 3))
    def an_engine_speaks(self, data, count):
        talking = [e for e in self.engines.values() if not e.finished]
        self.say(data.draw(st.sampled_from(talking)), count)

    @precondition(lambda self: bool(self.engines))
    @rule(data=st.data(), finish=st.sampled_from(["length", "stop", None, "error"]))
    def a_leg_that_is_over_is_heard_again(self, data, finish):
        over = [eid for eid in self.engines if eid not in self.live]
        if over:
            eid = data.draw(st.sampled_from(over))
            machine = self.listener(eid)
            answer = machine.output(eid, [999], finish)
            assert [type(c) for c in answer] == [Stale]

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data(), finish=st.sampled_from(["error", "abort"]))
    def a_leg_fails(self, data, finish):
        eid = data.draw(st.sampled_from(sorted(self.live)))
        self.live.pop(eid).finished = True
        machine = self.listener(eid)
        self.feed(machine, machine.output(eid, [], finish))

    @rule(instance=st.sampled_from(INSTANCES))
    def an_instance_is_lost(self, instance):
        for machine in self.machines:
            self.feed(machine, machine.instance_lost(instance))

    @precondition(lambda self: bool(self.replans))
    @rule(data=st.data(), fate=st.sampled_from(["place", "skip", "nobody"]))
    def a_replan_is_answered(self, data, fate):
        replan = self.replans.pop(data.draw(st.integers(0, len(self.replans) - 1)))
        self.answer(replan, fate, data)

    def answer(self, replan: Replan, fate: str, data) -> None:
        machine = self.by_id[replan.request_id]
        answer: Plan | Rejection
        if fate == "nobody":
            answer = Rejection(request_id="r", reason=Reason.NO_INSTANCE_ALIVE, retry_after_s=1.0)
        elif replan.need is Need.PREFILL:
            answer = self.plan(machine, fate == "place", data, decode=False)
        else:
            answer = self.plan(machine, False, data)
        self.feed(machine, machine.plan_result(replan.need, answer))

    @rule(data=st.data())
    def a_client_leaves(self, data):
        machine = data.draw(st.sampled_from(self.machines))
        self.feed(machine, machine.abort())

    @rule(data=st.data())
    def a_deadline_passes(self, data):
        machine = data.draw(st.sampled_from(self.machines))
        self.feed(machine, machine.deadline())

    @rule(data=st.data())
    def an_output_finds_no_room(self, data):
        machine = data.draw(st.sampled_from(self.machines))
        self.feed(machine, machine.overrun())

    # ------------------------------------------------------------ what must hold

    @invariant()
    def at_most_one_leg_is_live_per_machine(self):
        own = [eid for eid in self.live if "#d" in eid]
        assert len({eid.rpartition("#")[0] for eid in own}) == len(own)
        assert len([eid for eid in self.live if "#p" in eid]) <= 1

    @invariant()
    def a_machine_is_done_exactly_when_it_said_so(self):
        for rid, machine in self.by_id.items():
            assert self.done[rid] == (machine.state is State.DONE)
            assert self.finishes[rid] <= 1
            assert self.delivered[rid] <= MAX_TOKENS

    @invariant()
    def attempts_are_bounded(self):
        assert len(self.engines) <= LEGS_MAX * len(self.machines)

    @invariant()
    def all_charges_are_back_when_all_are_done(self):
        if all(self.done.values()) and not self.replans:
            assert not self.charged
            assert not self.live

    def teardown(self):
        """The world behaves from now on: every request must complete."""
        if not hasattr(self, "machines"):
            return
        for _ in range(100):
            if self.replans:
                self.answer(self.replans.pop(0), "place", Fixed())
            elif self.live:
                self.say(next(iter(self.live.values())), 2)
            else:
                break
        assert all(machine.state is State.DONE for machine in self.machines), "stuck"
        assert not self.charged, "charges left"


class Fixed:
    """Draws the first choice: a scheduler with one healthy instance."""

    def draw(self, strategy):
        return "p0"


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=2 * settings.default.max_examples, stateful_step_count=40, deadline=None
)
