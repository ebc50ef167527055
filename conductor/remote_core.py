"""The decision core as a gateway sees it: over rpc while one leads, by a local policy while none does.

The gateway's own ClusterView is the book of what it has in flight: what the core charges for it is charged
there too, under the core's tickets. So whoever leads next is handed all of it, and a gateway that has to
decide alone knows at least its own load; its index is empty, so that load and sessions decide.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import structlog

from conductor.admission import AdmissionMode
from conductor.cluster import ClusterView
from conductor.core import build_decider, change_decider, scheduler_config
from conductor.core_link import CoreLink
from conductor.core_messages import (
    CHARGES_MAX,
    CONTEXTS_MAX,
    Answer,
    Ask,
    ChangeRole,
    Checked,
    Context,
    Ended,
    FromCore,
    FromGateway,
    Join,
    ListDecisions,
    Listed,
    ListInstances,
    Prefilled,
    Question,
    Refused,
    Replan,
    Running,
    SecondCheck,
    Stepped,
    Waiting,
)
from conductor.core_told import Telling
from conductor.cost import CostModel
from conductor.decider import Answered, Asked
from conductor.decider import Checked as OnChecked
from conductor.describe import described
from conductor.heat import Heat
from conductor.hot_copies import HotCopies, HotMetrics
from conductor.index import PrefixIndex
from conductor.members import Members, Sink
from conductor.metrics import GatewayMetrics
from conductor.modes import Fallback
from conductor.plan import Need, Plan, Rejection, RequestFacts
from conductor.scheduler import Policy, SchedulerConfig
from conductor.tenants import Quotas
from conductor.tenants_file import read_tenants
from conductor.terms import Terms
from mooncake.core.errors import WIRE_ERRORS, MooncakeError, PeerGone, PeerTimeout
from mooncake.core.keys import names_of
from mooncake.core.messages import Pulse, Term
from mooncake.core.metadata import MetadataStore
from mooncake.core.options import GatewayOptions

log = structlog.get_logger(__name__)

ASK_S = 0.5
"""To an answer, or to Waiting: a core takes milliseconds, and on a busy host waits for its turn."""
LOST_S = 2.0
"""What waited in the gate of a core that is gone is planned by whoever leads within this time, or here."""
PEOPLE_S = 2.0
"""Deadline of what people ask."""
PENDING_MAX = 16_384
"""Questions without an answer: more than the core's gate lets wait. Beyond, the gateway decides by itself."""


class _Pending:
    """A question. `message` makes it anew, `decide` answers it here; `waits`: the core said Waiting.

    `names`: what log lines call its request; empty: it was a person's, who is to hear of a refusal.
    """

    __slots__ = ("asked_s", "decide", "heard", "message", "names", "request_id", "timer", "waits")

    def __init__(
        self,
        request_id: str,
        message: Callable[[], FromGateway],
        decide: Callable[[], None],
        heard: Callable[[FromCore], None],
        names: dict[str, str],
    ) -> None:
        self.request_id = request_id
        self.names = names
        self.message = message
        self.decide = decide
        self.heard = heard
        self.waits = False
        self.asked_s = 0.0
        self.timer: asyncio.TimerHandle | None = None


class RemoteCore:
    """A Decider. What people ask is answered by the core, or from what is known here."""

    def __init__(
        self, options: GatewayOptions, metadata: MetadataStore, metrics: GatewayMetrics, name: str = ""
    ) -> None:
        """Nothing runs before `start`.

        Args:
            options: as the core's.
            metadata: says who leads, and which instances there are; not closed here.
            metrics: of this process.
            name: of this gateway and no other; "" = one is made up.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        name = name or f"gateway-{secrets.token_hex(4)}"  # a restarted gateway is another one
        self.name = name
        self.view = ClusterView()
        self._index, self._cost = PrefixIndex(), CostModel()
        self.members = Members(
            metadata, self.view, self._index, name, metrics, follow_store=None, address=options.address
        )
        self.quotas = Quotas(read_tenants(options.tenants))
        config = _own_config(options)
        self._local = build_decider(
            config, options.hold_s, self.view, self._index, self._cost, self.quotas, dict, metrics, away=True
        )
        self._heat = Heat(self._cost, options.hot_copies)
        self._hot = HotCopies(self._heat, self.view, self._index, metadata, HotMetrics(metrics.registry))
        self._local.observer.listen(self._hot.planned)
        self._local.observer.listen(self._planned_here)
        self._checks = config.admission is not AdmissionMode.OBJECTIVES
        self._metrics = metrics
        self._link = CoreLink(metadata, self, metrics)
        self._telling = Telling(lambda told: self._link.send(0, told))
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._offers: dict[str, int] = {}  # requests that have no answer -> number
        self._running: dict[str, Running] = {}
        self._show_away()

    @property
    def decider(self) -> "RemoteCore":
        """Who is asked."""
        return self

    def start(self, sink: Sink) -> None:
        """Look for the leader and join it, on the running loop. `sink`: the dispatcher of this process."""
        self.members.start(sink)
        self._hot.start()
        self._link.start()

    async def close(self) -> None:
        """Leave (idempotent)."""
        self._telling.flush()
        await self._link.close()
        for pending in self._pending.values():
            if pending.timer is not None:
                pending.timer.cancel()
        self._pending.clear()
        await self._hot.close()
        await self.members.close()

    def prepare(self, options: GatewayOptions) -> Callable[[], None]:
        """Return what makes it go by other options, as far as that can change; what is in flight stays.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        tenants, config = read_tenants(options.tenants), _own_config(options)

        def change() -> None:
            self.quotas.change(time.monotonic(), tenants)
            change_decider(self._local, config, options.hold_s)
            self._checks = config.admission is not AdmissionMode.OBJECTIVES
            self._heat.change(options.hot_copies)

        return change

    # ------------------------------------------------------------ what the dispatcher asks

    def offer(self, asked: Asked, later: Answered) -> Plan | Rejection | None:
        """See Decider."""
        facts = asked.facts
        self._running[facts.request_id] = Running(
            facts.request_id, facts.tenant, facts.slo_class, facts.prompt_len, facts.max_tokens
        )
        here = partial(self._offer_here, asked, later)
        message = partial(self._asking, asked)
        heard = partial(self._planned, asked, later)
        if self._ask(_Pending(facts.request_id, message, here, heard, asked.names)):
            return None
        answer = self._local.offer(asked, later)
        if isinstance(answer, Rejection):
            del self._running[facts.request_id]
        return answer

    def hopeless(self, terms: Terms) -> Rejection | None:  # noqa: ARG002
        """See Decider: only the core knows, and it is asked with the prompt."""
        return None

    def _asking(self, asked: Asked) -> Ask:
        contexts = []
        for root, block_size in self._local.contexts()[:CONTEXTS_MAX]:
            contexts += _context(asked.look(root, block_size), block_size)
        return Ask(_question(asked, contexts))

    def _offer_here(self, asked: Asked, later: Answered) -> None:
        answer = self._local.offer(asked, later)
        if answer is not None:
            later(answer)

    def _planned_here(self, facts: RequestFacts, plan: Plan) -> None:
        """Tell a core that is joined, or being joined, what was planned without it."""
        tickets = (plan.prefill_ticket, plan.decode_ticket)
        charges = [charge for ticket in tickets if (charge := self.view.charge(ticket))]
        running = self._running.get(facts.request_id)
        self._link.send(0, Join(self.name, charges, [] if running is None else [running], more=True))

    def _planned(self, asked: Asked, later: Answered, message: FromCore) -> None:
        assert isinstance(message, Answer)
        if message.plan is not None:
            block_size = next((size for root, size in self._local.contexts() if root == message.root), 1)
            self._hot.planned(asked.look(message.root, block_size), message.plan)
        self._take_answer(later, message)

    def replan(
        self, asked: Asked, emitted_n: int, exclude: Sequence[str], need: Need, then: Answered
    ) -> None:
        """See Decider."""
        facts = asked.facts

        def message() -> Replan:
            sizes = dict(self._local.contexts())
            contexts = _context(facts, sizes.get(facts.context_root, 1))
            return Replan(_question(asked, contexts), emitted_n, list(exclude), need)

        def placed_here(answer: Plan | Rejection) -> None:
            if isinstance(answer, Plan):
                self._planned_here(facts, answer)
            then(answer)

        here = partial(self._local.replan, asked, emitted_n, exclude, need, placed_here)
        if not self._ask(_Pending("", message, here, partial(self._replanned, then), asked.names)):
            here()

    def _replanned(self, then: Answered, message: FromCore) -> None:
        assert isinstance(message, Answer)
        self._take_answer(then, message)

    def _take_answer(self, then: Answered, message: Answer) -> None:
        now_s = time.monotonic()
        for charge in message.charges:
            if self.view.record(charge.instance_id) is not None:
                self.view.adopt(now_s, charge)
        answer = message.rejection if message.plan is None else message.plan
        assert answer is not None
        then(answer)

    def second_check(self, asked: Asked, plan: Plan, then: OnChecked) -> None:
        """See Decider."""
        if not self._checks or plan.decode is None:
            then(None)  # the core would not say anything else
            return
        decode, ticket = plan.decode, plan.decode_ticket

        def heard(message: FromCore) -> None:
            assert isinstance(message, Checked)
            then(message.rejection)

        here = partial(self._local.second_check, asked, plan, then)
        message = partial(SecondCheck, _question(asked, []), decode, ticket)
        if not self._ask(_Pending("", message, here, heard, asked.names)):
            here()

    def release(self, ticket: int) -> None:
        """See Decider."""
        self._local.release(ticket)
        self._telling.released(ticket)

    def ended(self, asked: Asked, tokens: int, *, ran: bool, finished: bool) -> None:
        """See Decider."""
        facts = asked.facts
        self._running.pop(facts.request_id, None)
        number = self._offers.pop(facts.request_id, 0)
        if number:
            self._forget(number)
        self._local.ended(asked, tokens, ran=ran, finished=finished)
        self._telling.ended(
            Ended(facts.request_id, facts.tenant, facts.slo_class, facts.max_tokens, tokens, ran, finished)
        )

    def source(self, facts: RequestFacts, target: str, known: str) -> str:
        """See Decider: the plan, or leg 1, says who has the blocks; nobody else is known here."""
        return self._local.source(facts, target, known)

    def target(self, prefill: str, decode: str) -> str:
        """See Decider."""
        return self._local.target(prefill, decode)

    def tenant_label(self, tenant: str) -> str:
        """See Decider."""
        return self._local.tenant_label(tenant)

    # ------------------------------------------------------------ what was seen

    def prefilled(self, new_tokens: int, cached_tokens: int, seconds: float) -> None:
        """See Decider."""
        self._local.prefilled(new_tokens, cached_tokens, seconds)
        self._telling.prefilled(Prefilled(new_tokens, cached_tokens, seconds))

    def started(self, late_s: float) -> None:
        """See Decider."""
        self._local.started(late_s)
        self._telling.started(late_s)

    def stepped(self, requests: int, context_tokens: int, seconds: float) -> None:
        """See Decider."""
        self._local.stepped(requests, context_tokens, seconds)
        self._telling.stepped(Stepped(requests, context_tokens, seconds))

    def on_lost(self, instance_id: str) -> None:
        """See Decider."""
        self._local.on_lost(instance_id)

    def on_pulse(self, instance_id: str, pulse: Pulse) -> None:
        """See Decider."""
        self._local.on_pulse(instance_id, pulse)

    def on_tick(self, now_s: float) -> None:
        """See Decider."""
        self._link.tick(now_s)
        self._local.on_tick(now_s)

    # ------------------------------------------------------------ questions

    def _ask(self, pending: _Pending) -> bool:
        """Ask the core; False: it is away, or there is too much that it has not answered."""
        if self._link.term is None or len(self._pending) >= PENDING_MAX:
            return False
        self._telling.flush()  # in the order in which it happened
        number = next(self._numbers)
        if not self._link.send(number, pending.message()):
            return False
        self._pending[number] = pending
        pending.asked_s = time.monotonic()
        if pending.request_id:
            self._offers[pending.request_id] = number
        pending.timer = asyncio.get_running_loop().call_later(ASK_S, self._overdue, number)
        return True

    def _forget(self, number: int) -> _Pending | None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            self._offers.pop(pending.request_id, None)
            if pending.timer is not None:
                pending.timer.cancel()
        return pending

    def _overdue(self, number: int) -> None:
        """A question was not answered; if nothing else was either, the core is taken for gone at once."""
        pending = self._pending.get(number)
        if pending is not None and self._link.heard_s < pending.asked_s:
            self._link.lose(f"no answer within {ASK_S:g} s")
        self._decide_here(number)

    def _decide_here(self, number: int) -> None:
        if pending := self._forget(number):
            pending.decide()

    # ------------------------------------------------------------ what the link says

    def in_flight(self) -> Join:
        """See CoreLinkEvents."""
        self._telling.flush()  # to the core before, or nobody: what is handed in now is without it
        running = list(itertools.islice(self._running.values(), CHARGES_MAX))
        running = [one for one in running if one.request_id not in self._offers]
        return Join(self.name, self.view.charges()[:CHARGES_MAX], running)

    def core_joined(self, term: Term) -> None:
        """See CoreLinkEvents."""
        log.info("gateway.core_joined", address=self._link.address, term=term.number, leader=term.leader)
        self._show_away()
        self._telling.repeat()
        for number in list(self._pending):
            pending = self._forget(number)
            if pending is not None and not self._ask(pending):
                pending.decide()

    def core_lost(self, reason: str) -> None:
        """See CoreLinkEvents."""
        log.warning("gateway.core_away", reason=reason, pending=len(self._pending))
        self._show_away()
        loop = asyncio.get_running_loop()
        for number, pending in list(self._pending.items()):
            if pending.timer is not None:
                pending.timer.cancel()
            if pending.waits:
                pending.timer = loop.call_later(LOST_S, self._decide_here, number)
            else:
                pending.timer = loop.call_later(0, self._decide_here, number)

    def core_said(self, number: int, message: FromCore) -> None:
        """See CoreLinkEvents."""
        if isinstance(message, Waiting):
            pending = self._pending.get(number)
            if pending is not None and pending.timer is not None:
                if not pending.waits:
                    self._metrics.core_answer_s.observe(time.monotonic() - pending.asked_s)
                pending.waits = True
                pending.timer.cancel()
            return
        pending = self._forget(number)
        if pending is not None and not pending.waits:
            self._metrics.core_answer_s.observe(time.monotonic() - pending.asked_s)
        if pending is None:
            if isinstance(message, Answer) and message.plan is not None:  # its client has left meanwhile
                for charge in message.charges:
                    self._telling.released(charge.ticket)
        elif isinstance(message, Refused) and pending.names:
            log.warning("gateway.core_refused", **pending.names, reason=message.message)
            pending.decide()
        else:
            pending.heard(message)

    def _show_away(self) -> None:
        away = bool(self._link.away)
        self._metrics.fallback.labels(str(Fallback.CORE_AWAY)).set(away)
        self._metrics.leads.set(0)  # what it decides meanwhile counts as a fall-back

    # ------------------------------------------------------------ people

    def status(self) -> dict[str, Any]:
        """Return who decides, JSON-ready."""
        term = self._link.term
        if term is None:
            return {"mode": "fallback", "reason": self._link.away, "gateway": self.name}
        leader = {"leader": term.leader, "term": term.number, "address": self._link.address}
        return {"mode": "core", **leader, "gateway": self.name}

    async def instances(self) -> list[dict[str, Any]]:
        """Return the instances as the core sees them, or as this gateway does while it is away."""
        try:
            return await self._people(ListInstances())
        except PeerGone:
            return described(self.view, self.members)

    async def decisions(self, request_id: str) -> list[dict[str, Any]]:
        """Return the last decisions, newest first; only those of `request_id`, if given.

        The core's; and those that were made here.
        """
        own: list[dict[str, Any]] = msgspec.to_builtins(self._local.decisions.last(request_id))
        try:
            found = await self._people(ListDecisions(request_id))
        except PeerGone:
            return own
        return sorted([*found, *own], key=lambda one: -float(one["at_s"]))

    async def change_role(self, instance_id: str, role: str) -> None:
        """Begin a change of roles.

        Raises:
            RequestError: it cannot be followed.
            PeerGone: no core leads.
        """
        await self._people(ChangeRole(instance_id, role))

    async def _people(self, message: FromGateway) -> list[dict[str, Any]]:
        future: asyncio.Future[FromCore] = asyncio.get_running_loop().create_future()
        gone = PeerGone(f"no decision core: {self._link.away or 'it does not answer'}; ask again in a moment")

        def heard(said: FromCore) -> None:
            if not future.done():
                future.set_result(said)

        def here() -> None:
            if not future.done():
                future.set_exception(gone)

        if not self._ask(_Pending("", lambda: message, here, heard, {})):
            raise gone
        try:
            async with asyncio.timeout(PEOPLE_S):
                said = await future
        except TimeoutError:
            raise PeerTimeout(f"decision core: no answer within {PEOPLE_S:g} s") from None
        if isinstance(said, Refused):
            raise WIRE_ERRORS.get(said.code, MooncakeError)(said.message)
        assert isinstance(said, Listed)
        return said.entries


def _context(facts: RequestFacts, block_size: int) -> list[Context]:
    if not facts.keys and facts.tail_key is None:
        return []
    names = names_of(facts.keys[:]).tobytes()  # makes all keys at once, not one by one
    return [Context(facts.context_root, block_size, names, facts.tail_key is not None)]


def _question(asked: Asked, contexts: list[Context]) -> Question:
    facts = msgspec.structs.replace(asked.facts, keys=[], tail_key=None)
    age_s = max(0.0, time.monotonic() - asked.started_s)
    return Question(
        facts, asked.terms, asked.client_id, age_s, asked.is_sibling, "" if contexts else asked.unnamed(),
        contexts, asked.names, asked.trace,
    )  # fmt: skip


def _own_config(options: GatewayOptions) -> SchedulerConfig:
    """Return how it decides while no core does: it knows no other node's blocks."""
    return msgspec.structs.replace(scheduler_config(options), policy=Policy.CACHE_AWARE)
