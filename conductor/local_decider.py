"""Decides in this process: quotas, gate, scheduler, and what they learn from (a Decider).

The same object serves the dispatcher of a lone gateway, every gateway of a decision core, and, over what a
gateway knows by itself, that gateway while no core leads.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.decider import Answered, Asked, Checked
from conductor.gate import Gate
from conductor.metrics import DecisionMetrics
from conductor.observe import Observer
from conductor.plan import Need, Needs, Plan, Rejection, RequestFacts
from conductor.scheduler import Scheduler
from conductor.tenants import Quotas
from conductor.terms import Terms
from conductor.why import Decided, Decisions
from mooncake.core.messages import Pulse


class LocalDecider:
    """Lives on one event loop. Every offer is answered in the call, or waits in the gate."""

    def __init__(
        self,
        view: ClusterView,
        scheduler: Scheduler,
        cost: CostModel,
        gate: Gate,
        quotas: Quotas,
        observer: Observer,
        stores: Callable[[], Mapping[str, bool]],
        metrics: DecisionMetrics,
    ) -> None:
        """All are shared with who feeds them. `stores`: Members.stores_in_step."""
        self.view = view
        self.scheduler = scheduler
        self.cost = cost
        self.gate = gate
        self.quotas = quotas
        self.observer = observer
        self._stores = stores
        self._metrics = metrics
        self._later: dict[str, tuple[Asked, Answered]] = {}  # of those that wait in the gate
        self._why: dict[str, Decided] = {}  # of answers that are not yet given
        self._pumping = False
        scheduler.listen(observer.trail)

    # ------------------------------------------------------------ requests

    def offer(self, asked: Asked, later: Answered) -> Plan | Rejection | None:
        """See Decider."""
        now_s = time.monotonic()
        rejection = self._over_quota(now_s, asked)
        if rejection is not None:
            self._note(asked, rejection)
            return rejection
        answer, others = self.gate.offer(
            now_s, asked.request_id, lambda: self._needs(asked), asked.terms,
            lambda at_s: self._plan(at_s, asked),
        )  # fmt: skip
        for other in others:
            self._answer_later(other.request_id, other.answer)
        if answer is None:
            self._later[asked.request_id] = asked, later
            return None
        self._note(asked, answer)
        if isinstance(answer, Rejection):
            self._settle(asked.request_id, asked.facts.tenant, 0, ran=False)
        return answer

    def hopeless(self, terms: Terms) -> Rejection | None:
        """See Decider."""
        return self.scheduler.hopeless(time.monotonic(), terms)

    def replan(
        self, asked: Asked, emitted_n: int, exclude: Sequence[str], need: Need, then: Answered
    ) -> None:
        """See Decider."""
        now_s = time.monotonic()
        self.observer.trail.clear()
        answer = self.scheduler.replan(now_s, asked.facts, emitted_n, exclude, need)
        self.observer.replanned(now_s, asked, answer, emitted_n)
        then(answer)

    def second_check(self, asked: Asked, plan: Plan, then: Checked) -> None:
        """See Decider."""
        rejection = self.scheduler.second_check(plan)
        if rejection is not None:
            self._note(asked, rejection)
        then(rejection)

    def release(self, ticket: int) -> None:
        """See Decider."""
        self.scheduler.release(time.monotonic(), ticket)
        self._pump_soon()

    def ended(self, asked: Asked, tokens: int, *, ran: bool, finished: bool) -> None:
        """See Decider."""
        facts = asked.facts
        self.over(facts.request_id, facts.tenant, tokens, ran=ran)
        if finished:
            self.learn(tokens, facts.tenant, facts.slo_class, facts.max_tokens)

    def over(self, request_id: str, tenant: str, tokens: int, *, ran: bool) -> None:
        """A request is over: it neither waits nor counts for its tenant any more. Unknown ones are fine."""
        if self._later.pop(request_id, None) is not None:
            self.gate.leave(request_id)
        self._settle(request_id, tenant, tokens, ran=ran)

    def learn(self, tokens: int, tenant: str, slo_class: str, max_tokens: int) -> None:
        """An answer is whole."""
        self.observer.answered(tokens, tenant, slo_class, max_tokens)

    def source(self, facts: RequestFacts, target: str, known: str) -> str:
        """See Decider."""
        return self.scheduler.source(facts, target, known)

    def target(self, prefill: str, decode: str) -> str:
        """See Decider."""
        return self.scheduler.target(prefill, decode)

    def tenant_label(self, tenant: str) -> str:
        """See Decider."""
        return self.quotas.tenants.label(tenant)

    @property
    def decisions(self) -> Decisions:
        """The last answers, explained."""
        return self.observer.decisions

    # ------------------------------------------------------------ what was seen

    def prefilled(self, new_tokens: int, cached_tokens: int, seconds: float) -> None:
        """See Decider."""
        self.cost.observe_prefill(new_tokens, cached_tokens, seconds)

    def started(self, late_s: float) -> None:
        """See Decider."""
        self.cost.observe_late(late_s)

    def stepped(self, requests: int, context_tokens: int, seconds: float) -> None:
        """See Decider."""
        self.cost.observe_tbt(requests, context_tokens, seconds)

    def on_lost(self, instance_id: str) -> None:
        """See Decider."""
        self.observer.lost(instance_id)

    def on_pulse(self, instance_id: str, pulse: Pulse) -> None:
        """See Decider."""
        self.observer.moved(instance_id, pulse)

    def on_tick(self, now_s: float) -> None:
        """See Decider."""
        del now_s
        self.observer.tick(self._stores(), (record.node for record, _ in self.view.alive()))
        self._pump_soon()  # deadlines pass, and engines come, without anybody giving load back

    # ------------------------------------------------------------ inside

    def _over_quota(self, now_s: float, asked: Asked) -> Rejection | None:
        """Take the request's part of its tenant's quotas; `_settle` corrects it by what it really took."""
        facts = asked.facts
        answer_tokens = self.cost.output_tokens(facts.max_tokens, facts.tenant, facts.slo_class)
        sibling = asked.is_sibling  # n > 1 choices have one prompt
        prompt_tokens = 0 if sibling else facts.prompt_len
        return self.quotas.admit(
            now_s, facts.request_id, facts.tenant, prompt_tokens, answer_tokens, sibling=sibling
        )

    def _settle(self, request_id: str, tenant: str, tokens: int, *, ran: bool) -> None:
        taken = self.quotas.ended(time.monotonic(), request_id, tokens, ran=ran)
        if taken:
            label = self._metrics.tenant(self.quotas.tenants.label(tenant))
            self._metrics.tenant_tokens.labels(label).inc(taken)

    def _plan(self, now_s: float, asked: Asked) -> Plan | Rejection:
        """Plan against every context that is alive, the most common first."""
        begun_s = time.perf_counter()
        answer: Plan | Rejection | None = None
        for root, block_size in self.contexts():
            facts = asked.look(root, block_size)
            self.observer.trail.clear()
            answer = self.scheduler.on_request(now_s, facts)
            if isinstance(answer, Plan):
                break
        assert answer is not None
        self._metrics.decision_s.observe(time.perf_counter() - begun_s)
        self._why[asked.request_id] = self.observer.explained(now_s, asked, answer)
        return answer

    def contexts(self) -> list[tuple[str, int]]:
        """Return roots and block sizes, the most common first; never none."""
        contexts = Counter((r.context_root, r.block_size) for r, _ in self.view.alive())
        return [pair for pair, _ in contexts.most_common()] or [("", 1)]

    def _needs(self, asked: Asked) -> Needs:
        root, block_size = self.contexts()[0]
        return self.scheduler.needs(asked.look(root, block_size), block_size)

    def _note(self, asked: Asked, answer: Plan | Rejection) -> None:
        """Keep why. The scheduler's answers are explained; others are the gate's, or a second check's."""
        why = self._why.pop(asked.request_id, None)
        if why is None:
            why = self.observer.explained(time.monotonic(), asked, answer, priced=False)
        self.observer.decided(why)
        if isinstance(answer, Plan):
            self.observer.planned(asked, answer)

    def _answer_later(self, request_id: str, answer: Plan | Rejection) -> None:
        asked, later = self._later.pop(request_id)
        self._note(asked, answer)
        later(answer)

    def _pump(self) -> None:
        """Let in who waits and for whom there is room now."""
        self._pumping = False
        for outcome in self.gate.pump(time.monotonic()):
            self._answer_later(outcome.request_id, outcome.answer)

    def _pump_soon(self) -> None:
        if len(self.gate) and not self._pumping:
            self._pumping = True  # never inline: the commands that gave load back come first
            asyncio.get_running_loop().call_soon(self._pump)
