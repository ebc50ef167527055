"""Whatever is lost on the way and whoever leads: each request is charged once and given back once."""

import asyncio
from collections import deque
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from conductor import remote_core
from conductor.cluster import ClusterView
from conductor.core import build_decider
from conductor.core_desk import CoreDesk
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.metrics import GatewayMetrics
from conductor.plan import Plan, RequestFacts
from conductor.remote_core import RemoteCore
from conductor.scheduler import SchedulerConfig
from conductor.tenants import Quotas
from conductor.terms import DEFAULT_TERMS
from mooncake.core.messages import Term
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.options import GatewayOptions
from tests.unit.conductor.make import record

INSTANCES = (record("p0", "prefill"), record("d0", "decode"), record("d1", "decode"))


def show(view: ClusterView) -> None:
    for one in INSTANCES:
        view.instance_up(0.0, one)
        view.link_up(0.0, one.instance_id)
        view.pulse(0.0, one.instance_id, 0.0)


class Asked:
    client_id, terms, is_sibling, started_s, trace = "", DEFAULT_TERMS, False, 0.0, ""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.names = {"request_id": request_id}
        self.facts = self.look("", 1)

    def look(self, root: str, block_size: int) -> RequestFacts:
        self.facts = RequestFacts(
            request_id=self.request_id,
            prompt_len=100,
            max_tokens=8,
            keys=(),
            arrival_s=0.0,
            context_root=root,
        )
        return self.facts

    def unnamed(self) -> str:
        return "no tokens"


class Leader:
    """A core in one term, without sockets."""

    def __init__(self, number: int) -> None:
        self.view = ClusterView()
        show(self.view)
        cost, quotas = CostModel(), Quotas()
        decider = build_decider(
            SchedulerConfig(), 0.0, self.view, PrefixIndex(), cost, quotas, dict,
            GatewayMetrics(CollectorRegistry()),
        )  # fmt: skip
        self.term = Term("life", number, f"core-{number}")
        self.wires: dict[bytes, Wire] = {}
        self.quotas = quotas
        core = SimpleNamespace(view=self.view, decider=decider, cost=cost, quotas=quotas, tracing=None)
        self.desk = CoreDesk(core, self.term, self._say, clock=lambda: 0.0)

    def _say(self, identity: bytes, number: int, message: object) -> None:
        self.wires[identity].down.append((number, message))


class Wire:
    """The link of one gateway: in order both ways, and cut when another core leads."""

    def __init__(self, gateway: "Gateway") -> None:
        self.gateway = gateway
        self.term: Term | None = None
        self.away = "not joined"
        self.address = ""
        self.leader: Leader | None = None
        self.handed_in = False
        self.up: deque = deque()
        self.down: deque = deque()

    def send(self, number: int, message: object) -> bool:
        if self.handed_in:
            self.up.append((number, message))
        return self.handed_in

    def lose(self, reason: str) -> None:
        if self.term is not None:
            self.term, self.away, self.handed_in = None, reason, False
            self.gateway.core.core_lost(reason)

    async def close(self) -> None:
        self.handed_in = False

    def cut(self, leader: Leader) -> None:
        self.lose("another core leads")
        self.handed_in = False
        self.leader = leader
        leader.wires[self.gateway.name] = self
        self.up.clear()
        self.down.clear()

    def join(self) -> None:
        if self.term is None and self.leader is not None:
            handed_in = self.gateway.core.in_flight()
            self.handed_in = True
            self.send(0, handed_in)

    def deliver(self) -> None:
        """Both ways, the oldest of each."""
        if self.up:
            number, message = self.up.popleft()
            self.leader.desk.take(self.gateway.name, number, message)
        if self.down:
            number, message = self.down.popleft()
            kind = type(message).__name__
            if kind == "NotLeader":
                self.lose("not leader")
            elif kind == "Joined":
                if self.term is None:
                    self.term, self.away = message.term, ""
                    self.gateway.core.core_joined(message.term)
            elif self.term is not None:
                self.gateway.core.core_said(number, message)


class Gateway:
    """A RemoteCore, and what a dispatcher would do with its plans."""

    def __init__(self, name: str, metadata: MemoryMetadata) -> None:
        self.name = name.encode()
        options = GatewayOptions(model="m", run_dir="/tmp")
        self.core = RemoteCore(options, metadata, GatewayMetrics(CollectorRegistry()), name)
        self.core._link = self.wire = Wire(self)
        show(self.core.view)
        self.open: dict[str, tuple[Asked, Plan | None]] = {}

    def ask(self, request_id: str) -> None:
        asked = Asked(request_id)
        self.open[request_id] = asked, None
        answer = self.core.offer(asked, lambda plan: self.planned(asked, plan))
        if answer is not None:
            self.planned(asked, answer)

    def planned(self, asked: Asked, plan: Plan) -> None:
        assert self.open[asked.request_id][1] is None, "planned twice"
        self.open[asked.request_id] = asked, plan

    def end(self, number: int) -> None:
        if self.open:
            asked, plan = self.open.pop(list(self.open)[number % len(self.open)])
            if plan is not None:
                self.core.release(plan.prefill_ticket)
                self.core.release(plan.decode_ticket)
            self.core.ended(asked, 8, ran=plan is not None, finished=plan is not None)


WHICH = st.integers(0, 1)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["ask", "deliver", "deliver", "join", "lose", "overdue"]), WHICH),
    st.tuples(st.just("end"), WHICH, st.integers(0, 9)),
    st.tuples(st.just("die")),
)


class Play:
    """Two gateways, and one leader after the other."""

    def __init__(self) -> None:
        self.metadata = MemoryMetadata()
        self.gateways = [Gateway(f"g{number}", self.metadata) for number in range(2)]
        self.leaders: list[Leader] = []
        self.succeed()

    def succeed(self) -> None:
        self.leaders.append(Leader(len(self.leaders) + 1))
        for gateway in self.gateways:
            gateway.wire.cut(self.leaders[-1])

    def step(self, number: int, kind: str, which: int = 0, of: int = 0) -> None:
        gateway = self.gateways[which]
        match kind:
            case "die":
                self.succeed()
            case "ask":
                gateway.ask(f"r{number}")
            case "end":
                gateway.end(of)
            case "deliver":
                gateway.wire.deliver()
            case "join":
                gateway.wire.join()
            case "lose":
                gateway.wire.lose("silent")
            case "overdue":
                for question in list(gateway.core._pending)[:1]:
                    gateway.core._overdue(question)

    async def settle(self) -> None:
        """Until everybody has joined and nothing is on its way."""
        await asyncio.sleep(0)  # what is told at the end of a turn
        wires = [gateway.wire for gateway in self.gateways]
        while any(wire.up or wire.down or wire.term is None for wire in wires):
            for wire in wires:
                if wire.up or wire.down:
                    wire.deliver()
                else:
                    wire.join()
            await asyncio.sleep(0)

    def check(self) -> None:
        """Each request that is open is charged once: at its gateway, and at the core, whoever planned it."""
        leader, opened = self.leaders[-1], sum(len(gateway.open) for gateway in self.gateways)
        assert all(plan is not None for gateway in self.gateways for _, plan in gateway.open.values())
        assert leader.view.charged == 2 * opened
        assert sum(gateway.core.view.charged for gateway in self.gateways) == 2 * opened
        assert sum(leader.view.load(name).decode_requests for name in ("d0", "d1")) == opened
        assert len(leader.quotas) == opened
        assert sum(len(one.tickets) for one in leader.desk._gateways.values()) == 2 * opened


async def play(steps: list[tuple]) -> None:
    game = Play()
    for number, step in enumerate(steps):
        game.step(number, *step)
        await asyncio.sleep(0)
    await game.settle()
    game.check()
    for gateway in game.gateways:
        while gateway.open:
            gateway.end(0)
    await game.settle()
    game.check()
    for gateway in game.gateways:
        await gateway.core.close()
    await game.metadata.close()


@pytest.fixture(autouse=True, scope="module")
def no_clock():
    """What is overdue is a step here, not a matter of time."""
    before = remote_core.ASK_S, remote_core.LOST_S
    remote_core.ASK_S = remote_core.LOST_S = 3600.0
    yield
    remote_core.ASK_S, remote_core.LOST_S = before


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=60))
def test_every_ticket_is_given_back_exactly_once_whoever_leads(steps):
    asyncio.run(play(steps))


def test_a_request_that_was_planned_as_the_core_died_is_known_to_the_next_one():
    asyncio.run(play([("join", 0), ("deliver", 0), ("ask", 0), ("deliver", 0), ("die",), ("ask", 0)]))
