"""A small cluster in virtual time around the real Scheduler, ClusterView and RequestMachine.

Only engines, links and the gateway's shell are simulated: an engine prefills one prompt at a time
and decodes all its streams at a fixed pace; it can be killed (its link breaks), stalled (it says
nothing, later it says everything), and come back as a new epoch. The gateway itself can be stalled.
One `random.Random(seed)` decides everything, so a seed is a whole history.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from random import Random

from conductor.cluster import PULSE_S, ClusterView, Transition
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import (
    Abort,
    Command,
    Deliver,
    Done,
    Fail,
    Leg,
    Outcome,
    Plan,
    Release,
    Replan,
    RequestFacts,
    Send,
    Stale,
)
from conductor.request import PrefillGroup, RequestMachine
from conductor.scheduler import Scheduler, SchedulerConfig
from tests.unit.conductor.make import BLOCK, facts, keys, record

WIRE_S = 0.001
LINK_LOSS_S = 0.08  # measured: a killed peer's socket event arrives this late
TOKEN_S = 0.02
PREFILL_TOKENS_S = 5000.0


def token(request_id: str, position: int) -> int:
    """The token a request has at a position, whichever engine computes it."""
    return sum(request_id.encode()) * 1000 + position


class Engine:
    """One instance: its legs, and whether it runs."""

    def __init__(self, name: str, role: str, node: str) -> None:
        self.name, self.role, self.node = name, role, node
        self.epoch = 0
        self.up = False
        self.stalled_until_s = 0.0
        self.legs: dict[str, Send] = {}
        self.busy_until_s = 0.0


class World:
    """One history. `run` returns when all requests are done or the horizon has passed."""

    def __init__(self, seed: int, roles: dict[str, str], config: SchedulerConfig) -> None:
        self.random = Random(seed)
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self.cluster, self.index, self.cost = ClusterView(), PrefixIndex(), CostModel()
        self.scheduler = Scheduler(config, self.index, self.cost, self.cluster)
        self.engines = {name: Engine(name, role, f"n-{name}") for name, role in roles.items()}
        self.gateway_stalled_until_s = 0.0
        self.machines: dict[str, RequestMachine] = {}
        self.shared: dict[str, list[RequestMachine]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self.counts: Counter[str] = Counter()
        self.transitions: list[Transition] = []
        for engine in self.engines.values():
            self.boot(engine)
        self.at(0.0, self.tick)

    # ------------------------------------------------------------ time

    def at(self, delay_s: float, what: Callable[[], object]) -> None:
        self.at_time(self.now_s + delay_s, what)

    def at_time(self, when_s: float, what: Callable[[], object]) -> None:
        """Absolute, so that what waits for the same moment keeps its order: links are ordered."""
        heapq.heappush(self._events, (when_s, next(self._order), what))

    def to_gateway(self, delay_s: float, what: Callable[[], object]) -> None:
        """Something the gateway's loop does; a stalled gateway does it when it wakes."""

        def act() -> None:
            if self.gateway_stalled_until_s > self.now_s:
                self.at_time(self.gateway_stalled_until_s, act)
            else:
                what()

        self.at(delay_s, act)

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._events)
            what()

    # ------------------------------------------------------------ faults

    def boot(self, engine: Engine) -> None:
        engine.epoch += 1
        engine.up, engine.legs, engine.busy_until_s = True, {}, self.now_s
        one = record(
            engine.name, engine.role, epoch=f"e{engine.epoch}", node=engine.node, block_bytes=1 << 14
        )

        def joined() -> None:
            self.changed(self.cluster.instance_up(self.now_s, one))
            self.changed(self.cluster.link_up(self.now_s, engine.name))
            self.changed(self.cluster.pulse(self.now_s, engine.name, 0.0))

        self.to_gateway(WIRE_S, joined)

    def kill(self, name: str, back_after_s: float) -> None:
        engine = self.engines[name]
        if not engine.up:
            return
        engine.up, engine.legs = False, {}
        epoch = engine.epoch

        def broken() -> None:
            # this link's end: a new link to the next start is another link
            current = self.cluster.record(name)
            if current is not None and current.epoch == f"e{epoch}":
                self.changed(self.cluster.link_down(self.now_s, name))

        self.to_gateway(LINK_LOSS_S, broken)
        self.at(back_after_s, lambda: self.boot(engine))

    def stall(self, name: str, length_s: float) -> None:
        self.engines[name].stalled_until_s = self.now_s + length_s

    def stall_gateway(self, length_s: float) -> None:
        self.gateway_stalled_until_s = self.now_s + length_s

    # ------------------------------------------------------------ engines

    def on_engine(self, engine: Engine, delay_s: float, what: Callable[[], object]) -> None:
        """Something this start of the engine does; a stalled engine does it when it wakes."""
        epoch = engine.epoch

        def act() -> None:
            if not engine.up or engine.epoch != epoch:
                return
            if engine.stalled_until_s > self.now_s:
                self.at_time(engine.stalled_until_s, act)
            else:
                what()

        self.at(delay_s, act)

    def receive(self, engine: Engine, send: Send) -> None:
        engine.legs[send.eid] = send
        prompt_len = self.facts_of(send.request_id).prompt_len
        work_s = prompt_len / PREFILL_TOKENS_S if send.leg is not Leg.DECODE else 0.0
        engine.busy_until_s = max(engine.busy_until_s, self.now_s) + work_s
        rest_s = engine.busy_until_s - self.now_s
        self.on_engine(engine, rest_s, lambda: self.emit(engine, send, send.resume_n, work_s))

    def emit(self, engine: Engine, send: Send, position: int, work_s: float = 0.0) -> None:
        if send.eid not in engine.legs:
            return
        about = self.facts_of(send.request_id)
        if work_s:
            self.index.apply(engine.node, b"".join(about.keys), b"")
            self.cost.observe_prefill(about.prompt_len, 0, work_s)
        last = 1 if send.leg is Leg.PREFILL else about.max_tokens
        tokens, finish = [token(send.request_id, position)], None
        if self.random.random() < 0.002:
            tokens, finish = [], "error"  # as a failed KV load ends
        elif position + 1 >= last:
            finish = "length"
        else:
            self.on_engine(engine, TOKEN_S, lambda: self.emit(engine, send, position + 1))
        if finish is not None:
            del engine.legs[send.eid]
        self.to_gateway(WIRE_S, lambda: self.heard(send.eid, tokens, finish))

    def facts_of(self, request_id: str) -> RequestFacts:
        return self.machines[request_id].facts

    # ------------------------------------------------------------ the gateway's shell

    def tick(self) -> None:
        self.changed(self.cluster.tick(self.now_s))
        for engine in self.engines.values():
            self.ping(engine, f"e{engine.epoch}")
        self.to_gateway(PULSE_S, self.tick)

    def ping(self, engine: Engine, epoch: str) -> None:
        def pong() -> None:
            self.changed(self.cluster.pulse(self.now_s, engine.name, 0.0, epoch))

        self.on_engine(engine, WIRE_S, lambda: self.to_gateway(WIRE_S, pong))

    def changed(self, transitions: list[Transition]) -> None:
        self.transitions += transitions
        for transition in transitions:
            if transition.lost:
                for machine in list(self.machines.values()):
                    self.carry_out(machine.instance_lost(transition.instance_id))

    def heard(self, eid: str, tokens: list[int], finish: str | None) -> None:
        name = eid.rpartition("#")[0]
        machine = self.machines.get(name) or self.shared[name][0]
        self.carry_out(machine.output(eid, tokens, finish))

    def arrive(self, request_id: str, children: int, **about: object) -> None:
        """A client sends a request (with n children)."""
        names = [request_id] if children == 1 else [f"{request_id}.{i}" for i in range(children)]
        group = PrefillGroup(request_id) if children > 1 else None
        prompt_len = self.random.randint(20, 2000)
        chain = f"chain{self.random.randrange(4)}"
        machines = []
        for name in names:
            what = facts(
                name,
                prompt_len,
                self.random.randint(2, 20),
                keys=keys(prompt_len // BLOCK, chain),
                first_token=bool(about.get("first_token")) and children == 1,
            )
            machine = self.machines[name] = RequestMachine(what, group)
            machines.append(machine)
            self.tokens[name], self.outcomes[name] = [], []
        self.shared[request_id] = machines
        for machine in machines:
            self.begin(machine)

    def begin(self, machine: RequestMachine) -> None:
        answer = self.scheduler.on_request(self.now_s, machine.facts)
        if isinstance(answer, Plan):
            self.counts[str(answer.decision)] += 1
            self.carry_out(machine.start(answer))
        else:  # a client that was told Retry-After comes back
            self.counts["rejected"] += 1
            self.to_gateway(answer.retry_after_s, lambda: self.begin(machine))

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            self.one(command)

    def one(self, command: Command) -> None:
        self.counts[type(command).__name__] += 1
        match command:
            case Send():
                engine = self.engines[command.instance_id]
                self.on_engine(engine, WIRE_S, lambda: self.receive(engine, command))
            case Abort():
                engine = self.engines[command.instance_id]
                self.on_engine(engine, WIRE_S, lambda: engine.legs.pop(command.eid, None))
            case Deliver(rid, tokens, _, _):
                assert not self.outcomes[rid], f"{rid}: tokens after its end"
                self.tokens[rid] += tokens
            case Replan():
                self.to_gateway(command.delay_s, lambda: self.replan(command))
            case Release(_, ticket):
                before = self.cluster.charged
                self.scheduler.release(self.now_s, ticket)
                assert self.cluster.charged == before - 1, "gave back what was not charged"
            case Done(rid, outcome):
                self.outcomes[rid].append(outcome)
            case Fail() | Stale():
                pass

    def replan(self, command: Replan) -> None:
        machine = self.machines[command.request_id]
        answer = self.scheduler.replan(
            self.now_s, machine.facts, command.emitted_n, command.exclude, command.need
        )
        self.carry_out(machine.plan_result(command.need, answer))
