"""What a core does with gateways' messages during one term: who has what in flight, and what is answered.

One object lives for one term. What a gateway has charged is given back once: by itself, or here when it is
gone. A gateway that comes again hands in what it has; what was known of it before is void.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec
import structlog

from conductor.core import Core
from conductor.core_messages import (
    CHARGES_MAX,
    CORE_PROTOCOL,
    Answer,
    Ask,
    ChangeRole,
    Checked,
    FromCore,
    FromGateway,
    Join,
    Joined,
    ListDecisions,
    Listed,
    ListInstances,
    NotLeader,
    Ping,
    Pong,
    Question,
    Refused,
    Replan,
    SecondCheck,
    Told,
    Waiting,
)
from conductor.describe import described
from conductor.plan import Decision, Plan, Rejection, RequestFacts
from conductor.terms import Terms
from conductor.why import attributes
from mooncake.core.errors import CapacityError, MooncakeError, ProtocolError
from mooncake.core.keys import BlockNames
from mooncake.core.messages import Term

if TYPE_CHECKING:
    from mooncake.core.tracing_sdk import Span

log = structlog.get_logger(__name__)

SILENT_S = 5.0
"""A gateway pings four times a second; as long as relays wait, what it had in flight counts as running."""
GATEWAYS_MAX = 64
"""As many as that are no plan, but a loop of restarts; relays have slots for eight."""

NAMED = ("request_id", "trace_id")
"""What a log line says of a request."""

Send = Callable[[bytes, int, FromCore], None]
"""To the connection of one gateway, with the number of its question."""


def first_ticket(term: Term) -> int:
    """Return where tickets of a term begin: none of two terms, or of a gateway's own, are alike."""
    life = crc32(term.life.encode()) & 0x3FFF
    return 1 << 62 | life << 48 | (term.number & 0xFFFF) << 32


class RemoteAsked:
    """A gateway's request (an Asked)."""

    __slots__ = (
        "_contexts", "_question", "client_id", "facts", "is_sibling", "names", "span", "started_s", "terms",
        "trace",
    )  # fmt: skip

    def __init__(self, question: Question, now_s: float) -> None:
        """`now_s`: when it came in here.

        Raises:
            ProtocolError: names of blocks that are none.
        """
        self._question = question
        self._contexts = {
            one.root: (BlockNames.unpacked(one.names), one.has_tail) for one in question.contexts
        }
        self.client_id = question.client_id
        self.names = {key: question.names[key] for key in NAMED if key in question.names}
        self.trace = question.trace
        self.span: Span | None = None  # of what is done here for its decision
        self.terms: Terms = question.terms
        self.is_sibling = question.sibling
        self.started_s = now_s - question.age_s
        self.facts = msgspec.structs.replace(question.facts, arrival_s=self.started_s)

    @property
    def request_id(self) -> str:
        """See Asked."""
        return self._question.facts.request_id

    def look(self, root: str, block_size: int) -> RequestFacts:  # noqa: ARG002 -- as its context says
        """See Asked; without keys where the gateway named none for this context."""
        keys, has_tail = self._contexts.get(root, ((), False))
        tail = b"tail" if has_tail else None
        self.facts = msgspec.structs.replace(self.facts, context_root=root, keys=keys, tail_key=tail)
        return self.facts

    def unnamed(self) -> str:
        """See Asked."""
        return self._question.unnamed or "the gateway does not know the context"


class _Gateway:
    """One that has joined, over one connection."""

    __slots__ = ("adopted", "heard_s", "identity", "name", "requests", "tickets")

    def __init__(self, identity: bytes, name: str, now_s: float) -> None:
        self.identity = identity
        self.name = name
        self.heard_s = now_s
        self.tickets: dict[int, None] = {}  # ours, that it has to give back
        self.adopted: dict[int, int] = {}  # tickets of others that it handed in -> ours
        self.requests: dict[str, str] = {}  # accepted or waiting -> tenant


class CoreDesk:
    """One term: `take` every message, `tick` a few times a second, `close`. All on the core's loop."""

    def __init__(
        self, core: Core, term: Term, send: Send, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`send` must not raise, and drops what it may not say any more."""
        self.term = term
        self._core = core
        self._decider = core.decider
        self._send = send
        self._clock = clock
        self._gateways: dict[bytes, _Gateway] = {}  # by the identity of the connection
        core.view.number_from(first_ticket(term))

    @property
    def gateways(self) -> list[str]:
        """Names of those that have joined."""
        return [one.name for one in self._gateways.values()]

    def take(self, identity: bytes, number: int, message: FromGateway) -> None:
        """Serve one message."""
        if isinstance(message, Join) and not message.more:
            self._join(identity, number, message)
            return
        gateway = self._gateways.get(identity)
        if gateway is None:
            self._send(identity, number, NotLeader())  # of it: it has not handed in what it has
            return
        gateway.heard_s = self._clock()
        try:
            self._serve(gateway, number, message)
        except MooncakeError as error:
            self._send(identity, number, Refused(error.code, str(error)))

    def _serve(self, gateway: _Gateway, number: int, message: FromGateway) -> None:
        match message:
            case Told():
                self._told(gateway, message)
            case Join():
                self._take_over(gateway, message)
            case Ask():
                self._ask(gateway, number, message)
            case Replan():
                asked = self._asked(message.question)
                asked.look(message.question.facts.context_root, 1)
                placed = partial(self._placed, gateway, number, asked)
                self._decider.replan(asked, message.emitted_n, message.exclude, message.need, placed)
            case SecondCheck():
                self._check(gateway, number, message)
            case Ping():
                self._send(gateway.identity, number, Pong(self.term))
            case ListInstances():
                entries = described(self._core.view, self._core.members)
                self._send(gateway.identity, number, Listed(entries))
            case ListDecisions():
                found = self._decider.decisions.last(message.request_id)
                entries = [msgspec.to_builtins(one) for one in found]
                self._send(gateway.identity, number, Listed(entries))
            case ChangeRole():
                self._core.roles.change(message.instance_id, message.role)
                self._send(gateway.identity, number, Listed())

    def tick(self) -> None:
        """Give back what gateways had that are gone."""
        now_s = self._clock()
        for gateway in list(self._gateways.values()):
            if now_s - gateway.heard_s > SILENT_S:
                log.warning("core.gateway_silent", gateway=gateway.name, requests=len(gateway.requests))
                self._forget(gateway)

    def close(self) -> None:
        """The term is over: nobody has anything in flight here."""
        for gateway in list(self._gateways.values()):
            self._forget(gateway)

    # ------------------------------------------------------------ who is there

    def _join(self, identity: bytes, number: int, message: Join) -> None:
        if message.protocol != CORE_PROTOCOL:
            why = f"core speaks protocol {CORE_PROTOCOL}, gateway {message.gateway_id} {message.protocol}"
            self._send(identity, number, Refused(ProtocolError.code, why))
            return
        for known in list(self._gateways.values()):
            if known.identity == identity or known.name == message.gateway_id:
                self._forget(known)
        if len(self._gateways) >= GATEWAYS_MAX:
            why = f"{GATEWAYS_MAX} gateways have joined already"
            self._send(identity, number, Refused(CapacityError.code, why))
            return
        gateway = self._gateways[identity] = _Gateway(identity, message.gateway_id, self._clock())
        self._take_over(gateway, message)
        log.info(
            "core.gateway_joined",
            gateway=gateway.name, charges=len(gateway.tickets), requests=len(gateway.requests),
        )  # fmt: skip
        self._send(identity, number, Joined(self.term))

    def _take_over(self, gateway: _Gateway, message: Join) -> None:
        now_s = self._clock()
        for charge in message.charges:
            if ticket := self._core.view.take_over(now_s, charge):
                gateway.adopted[charge.ticket] = ticket
                gateway.tickets[ticket] = None
        for one in message.running:
            if one.request_id in gateway.requests:
                continue  # it waited there when the gateway joined
            answer_tokens = self._core.cost.output_tokens(one.max_tokens, one.tenant, one.slo_class)
            self._core.quotas.admit(
                now_s, one.request_id, one.tenant, one.prompt_tokens, answer_tokens, sibling=True
            )
            gateway.requests[one.request_id] = one.tenant

    def _forget(self, gateway: _Gateway) -> None:
        del self._gateways[gateway.identity]
        for request_id, tenant in gateway.requests.items():
            self._decider.over(request_id, tenant, 0, ran=True)
        for ticket in gateway.tickets:
            self._decider.release(ticket)

    # ------------------------------------------------------------ decisions

    def _asked(self, question: Question) -> RemoteAsked:
        asked = RemoteAsked(question, self._clock())
        if asked.trace and self._core.tracing is not None:
            asked.span = self._core.tracing.begin("core.decide", asked.trace)
        return asked

    def _ask(self, gateway: _Gateway, number: int, message: Ask) -> None:
        asked = self._asked(message.question)
        if len(gateway.requests) >= CHARGES_MAX:
            raise CapacityError(f"{CHARGES_MAX} requests of {gateway.name} are in flight")
        if any(asked.request_id in one.requests for one in self._gateways.values()):
            raise ProtocolError(f"request {asked.request_id} is in flight already")
        gateway.requests[asked.request_id] = asked.facts.tenant
        answer = self._decider.offer(asked, partial(self._answered, gateway, number, asked))
        if answer is None:
            self._send(gateway.identity, number, Waiting(self.term))
            return
        if isinstance(answer, Rejection):
            del gateway.requests[asked.request_id]
        self._answered(gateway, number, asked, answer)

    def _answered(self, gateway: _Gateway, number: int, asked: RemoteAsked, answer: Plan | Rejection) -> None:
        self._answer(gateway, number, asked, answer, asked.facts.context_root)

    def _placed(self, gateway: _Gateway, number: int, asked: RemoteAsked, answer: Plan | Rejection) -> None:
        self._answer(gateway, number, asked, answer, "")

    def _answer(
        self, gateway: _Gateway, number: int, asked: RemoteAsked, answer: Plan | Rejection, root: str
    ) -> None:
        if asked.span is not None:
            asked.span.attributes.update({**attributes(answer), "mooncake.term": self.term.number})
            asked.span.end()
        if isinstance(answer, Rejection):
            self._send(gateway.identity, number, Answer(self.term, None, answer))
            return
        tickets = [ticket for ticket in (answer.prefill_ticket, answer.decode_ticket) if ticket]
        gateway.tickets.update(dict.fromkeys(tickets))
        charges = [charge for ticket in tickets if (charge := self._core.view.charge(ticket))]
        self._send(gateway.identity, number, Answer(self.term, answer, None, root, charges))

    def _check(self, gateway: _Gateway, number: int, message: SecondCheck) -> None:
        ticket = gateway.adopted.get(message.decode_ticket, message.decode_ticket)
        asked = RemoteAsked(message.question, self._clock())
        plan = Plan(
            request_id=asked.request_id, prefill=None, decode=message.decode,
            decision=Decision.MIGRATED, decode_ticket=ticket,
        )  # fmt: skip

        def checked(rejection: Rejection | None) -> None:
            self._send(gateway.identity, number, Checked(self.term, rejection))

        self._decider.second_check(asked, plan, checked)

    # ------------------------------------------------------------ what gateways saw

    def _told(self, gateway: _Gateway, told: Told) -> None:
        for ticket in told.released:
            ours = gateway.adopted.pop(ticket, ticket)
            if ours in gateway.tickets:
                del gateway.tickets[ours]
                self._decider.release(ours)
        for one in told.ended:
            if gateway.requests.pop(one.request_id, None) is not None:
                self._decider.over(one.request_id, one.tenant, one.tokens, ran=one.ran)
            if one.finished:
                self._decider.learn(one.tokens, one.tenant, one.slo_class, one.max_tokens)
        for prefill in told.prefilled:
            self._decider.prefilled(prefill.new_tokens, prefill.cached_tokens, prefill.seconds)
        for late_s in told.late_s:
            self._decider.started(late_s)
        for step in told.stepped:
            self._decider.stepped(step.requests, step.context_tokens, step.seconds)
