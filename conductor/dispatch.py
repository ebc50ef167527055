"""The IO shell of RequestMachine: engine outputs and client calls in, legs out, as a Decider says.

Everything runs on one event loop and never waits: sends are non-blocking, and a LocalDecider takes
microseconds, so `add` has dispatched the request when it returns. Hashing a prompt's keys happens
inline too (conductor.prompt_keys): at most 2 ms for 128k tokens nobody has sent before, once per request.

One request: add -> plan -> Send -> engine outputs -> Deliver -> outputs queue -> vLLM's front end.
Each leg has its own engine-side id (eid); an output whose eid is not registered is late and dropped.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import NoReturn

import structlog

from conductor import legs
from conductor.clients import Client, Family, Prompt, Running, family_of
from conductor.decider import Decider
from conductor.engine_gauges import EngineGauges, as_stats, fill, queues_of
from conductor.http import FATE
from conductor.links import Link
from conductor.members import Members
from conductor.meter import Meter
from conductor.metrics import GatewayMetrics
from conductor.plan import (
    Abort,
    Command,
    Deliver,
    Done,
    Fail,
    Leg,
    Outcome,
    Plan,
    Rejection,
    Release,
    Replan,
    Send,
    Stale,
    revised,
)
from conductor.prompt_keys import KeyMemo
from conductor.request import RequestMachine
from conductor.slo_metrics import failure_word, move_word
from conductor.spans import AnswerTrace
from conductor.terms import CLASSES, DEFAULT_TERMS, Terms
from conductor.turned_away import unavailable
from conductor.vllm_seam import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    Unavailable,
)
from mooncake.core.fingerprint import AdapterNames
from mooncake.core.messages import Pulse

log = structlog.get_logger(__name__)

REQUEST_SILENT_S_MAX = 600.0
"""No engine output for this long although its engine lives: something is stuck, fail the request."""
SWEEP_S = 5.0
"""How often silent requests are looked for."""
OUTPUTS_MAX = 100_000
"""Decoded frames waiting for vLLM's output handler; beyond it the gateway has lost the race, and what engines
say fails its request instead of waiting behind them. Only ends of requests, one for each, are added still."""

FINISH = {str(reason): reason for reason in FinishReason}
"""The request machine's words for vLLM's finish reasons."""

_COMPLETE = (FinishReason.LENGTH, FinishReason.STOP)
"""Finish reasons of a leg 1 that did its work."""

FailRequest = Callable[[str, Exception], Sequence[str]]
"""Ends a client's stream with an error; returns sibling requests to abort."""


class Dispatcher:
    """Owns every request between vLLM's front end and the engines. A Sink of Members."""

    reads_outputs = True

    def __init__(
        self, members: Members, decider: Decider, metrics: GatewayMetrics, *, first_token: bool = True
    ) -> None:
        """`first_token`: stream leg 1's own token where that is exact (DESIGN 5, step 9)."""
        self.outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()  # OUTPUTS_MAX
        self.fail_request: FailRequest | None = None
        self._members = members
        self._decider = decider
        self._metrics = metrics
        self._meter = Meter(decider, metrics, self._block_size)
        self._first_token = first_token
        self._adapters = AdapterNames()
        self._memo = KeyMemo()
        self._gauges = EngineGauges()
        self._clients: dict[str, Client] = {}
        self._families: dict[str, Family] = {}
        self._running: dict[str, Running] = {}
        self._swept_s = 0.0
        self._refusal = ""
        self._idle = asyncio.Event()
        self._idle.set()

    # ------------------------------------------------------------ from the front end

    def add(self, request: EngineCoreRequest) -> None:
        """Plan and dispatch one request (or one of its n > 1 children).

        Raises:
            Unavailable: nobody can take it, or nobody in time.
        """
        if request.abort_immediately:
            return  # vLLM frees another engine's hand-over this way; ours expire by themselves
        if request.resumable or request.request_id in self._clients:
            raise Unavailable("streaming input is not supported", 0.0, HTTPStatus.NOT_IMPLEMENTED)
        if self._refusal:
            raise Unavailable(self._refusal, 1.0, HTTPStatus.SERVICE_UNAVAILABLE)
        now_s = time.monotonic()
        fate = FATE.get()
        terms = DEFAULT_TERMS if fate is None else fate.terms
        terms = terms.ranked(request.priority)
        request.priority = terms.engine_priority
        if terms.asked:
            self._meter.lowered(terms.asked, terms.tenant)
        family_id = family_of(request)
        family = self._families.get(family_id or request.request_id)
        if family is None:
            family = Family(family_id or request.request_id, lone=family_id is None)
            self._families[family.family_id] = family
        traced, trace = None if fate is None else fate.trace, None
        if traced is not None:
            trace = traced.answer(request, now_s, sibling=bool(family.clients))
        prompt = Prompt(
            request, terms, family, now_s, self._adapters, self._memo, self._first_token,
            None if fate is None else fate.names, "" if trace is None else trace.deciding,
        )  # fmt: skip
        client = Client(request, prompt, family, now_s, fate, trace)
        answer = self._decider.offer(prompt, partial(self._answered, client))
        if isinstance(answer, Rejection):
            self._refused(client, answer)
        family.clients.append(client)
        self._clients[request.request_id] = client
        self._idle.clear()
        self._metrics.in_flight.set(len(self._clients))
        if answer is None:
            self._waits(client, True)
        else:
            self._begin(client, answer)

    def hopeless(self, terms: Terms) -> Unavailable | None:
        """Return what to tell a client whose prompt nobody needs to look at; it counts as rejected.

        Reading and tokenising prompts for nothing would take from the engines, and the client waits for it.
        """
        rejection = self._decider.hopeless(terms)
        if rejection is None:
            return None
        self._meter.over(terms, "rejected")
        self._meter.rejected(terms, rejection)
        return unavailable(rejection)

    def _refused(self, client: Client, rejection: Rejection) -> NoReturn:
        if not client.family.clients:
            self._families.pop(client.family.family_id, None)
        self._meter.over(client.prompt.terms, "rejected")
        self._meter.rejected(client.prompt.terms, rejection)
        if client.trace is not None:
            client.trace.decided(time.monotonic(), rejection, len(client.prompt.facts.keys))
        error = unavailable(rejection)
        if client.fate is not None:
            client.fate.error = error
        raise error

    def _begin(self, client: Client, plan: Plan) -> None:
        client.plan = plan
        client.heard_s = time.monotonic()
        if client.trace is not None:
            client.trace.decided(client.heard_s, plan, len(client.prompt.facts.keys))
        if plan.promoted:
            client.request.priority = CLASSES["interactive"].priority
        client.due_s = client.heard_s + plan.predicted_ttft_s
        if client.fate is not None and client.fate.turn is not None:
            client.fate.turn.planned(client.heard_s, client.prompt.facts, plan)
        client.machine = RequestMachine(client.prompt.facts, client.family.shared)
        self._metrics.wait_s.observe(client.heard_s - client.started_s, client.slo_class)
        self._run(client.machine.start(plan))

    def _waits(self, client: Client, waits: bool) -> None:
        """Count a client among those that no engine has, or no more."""
        if client.waits is not waits:
            client.waits = waits
            self._metrics.waiting.labels(client.slo_class).inc(1 if waits else -1)

    def _answered(self, client: Client, answer: Plan | Rejection) -> None:
        """A request that waited, or was asked about elsewhere, has its answer."""
        self._waits(client, False)
        if isinstance(answer, Plan):
            self._begin(client, answer)
        else:
            self._turn_away(client, answer)

    def _turn_away(self, client: Client, rejection: Rejection) -> None:
        """Tell a client that was taken, and waits for its first token, that it will not be served."""
        if self._clients.get(client.request.request_id) is not client:
            return  # it left
        client.turned_away = True
        self._meter.rejected(client.prompt.terms, rejection)
        if client.trace is not None:
            client.trace.decided(time.monotonic(), rejection, len(client.prompt.facts.keys))
        self._tell_failure(client, unavailable(rejection))
        self._run(client.machine.abort())

    def abort(self, request_ids: Sequence[str]) -> None:
        """The client left, or vLLM's detokenizer found a stop string. Unknown ids are fine."""
        for request_id in request_ids:
            if client := self._clients.get(request_id):
                self._run(client.machine.abort())

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._clients)

    def refuse(self, why: str) -> None:
        """Take no new requests from now on; those in flight go on."""
        self._refusal = why

    async def idle(self, deadline_s: float) -> bool:
        """Wait until nothing is in flight; False if `deadline_s` passed before."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------ from the engines (Sink)

    def on_outputs(self, link: Link, outputs: EngineCoreOutputs) -> None:
        """See Sink. Runs once per engine step: the gateway's hot path."""
        now_s = time.monotonic()
        stamp_s = outputs.timestamp
        legs.shift_events(outputs.outputs, now_s - stamp_s)
        outputs.timestamp = now_s  # engines on other hosts have other monotonic clocks
        slot = outputs.engine_index = self._members.engine_slot(link.instance_id)
        if outputs.scheduler_stats is not None:
            queues = queues_of(outputs.scheduler_stats)
            fill(outputs.scheduler_stats, self._gauges.stepped(slot, link.instance_id, queues))
        kept: list[EngineCoreOutput] = []
        context_tokens = 0
        pure = True
        lost_race = self.outputs.qsize() >= OUTPUTS_MAX
        for output in outputs.outputs:
            running = self._running.get(output.request_id)
            if running is None:
                self._metrics.stale_outputs.inc()
                continue
            client = running.clients[0]
            # before it counts as delivered; other legs have nothing for a client
            if lost_race and (running.leg is not Leg.PREFILL or client.machine.facts.first_token):
                self._run(client.machine.overrun())
                continue
            if not running.measured:
                pure = False
                self._meter.prefilled(running, output)
                self._first_of_leg(running, output, now_s)
            context_tokens += client.machine.facts.prompt_len + len(client.emitted)
            self._on_output(running, output, now_s, kept)
        if kept or not pure:
            batch = len(outputs.outputs)
            self._meter.frame(link.instance_id, now_s, stamp_s, batch, context_tokens, pure)
        outputs.outputs = kept
        # statistics travel even when every request of the step is gone, else gauges freeze
        if kept or (outputs.scheduler_stats is not None and not lost_race):
            self.outputs.put_nowait(outputs)

    def _show_engines(self) -> None:
        """Bring vLLM's gauges up to date: an engine tells one gateway of a step, and none when it is gone."""
        for slot, queues in self._gauges.changed(self._members.links):
            if not self.outputs.full():  # it is told again when it changes again
                stats = as_stats(queues)
                self.outputs.put_nowait(EngineCoreOutputs(engine_index=slot, scheduler_stats=stats))

    def _first_of_leg(self, running: Running, output: EngineCoreOutput, now_s: float) -> None:
        for client in running.clients:  # the one that sent it knows it
            if client.trace is not None:
                client.trace.output(now_s, running.eid, output)

    def _on_output(
        self, running: Running, output: EngineCoreOutput, now_s: float, kept: list[EngineCoreOutput]
    ) -> None:
        client = running.clients[0]
        client.heard_s = now_s
        reason = output.finish_reason
        finish = None if reason is None else str(reason)
        if running.leg is Leg.PREFILL and reason in _COMPLETE:
            leg1, node = legs.leg1_result(output), self._node_of(running.instance_id)
            for member in running.clients:
                member.leg1, member.leg1_end_s, member.leg1_node = leg1, now_s, node
        commands = client.machine.output(running.eid, output.new_token_ids, finish)
        if finish is not None:
            self._running.pop(running.eid, None)
            for member in running.clients:
                if member.trace is not None:
                    member.trace.leg_ended(now_s, running.eid, finish)
        for command in commands:
            if type(command) is Deliver and command.request_id == client.request.request_id:
                self._deliver(client, command, output, now_s)
                kept.append(output)
            else:
                self._execute(command)

    def on_lost(self, instance_id: str, reason: str) -> None:
        """See Sink."""
        self._meter.lost(instance_id)
        self._decider.on_lost(instance_id)
        hit = [running for running in self._running.values() if running.instance_id == instance_id]
        for running in hit:
            del self._running[running.eid]  # late outputs of this leg are nobody's
        label = move_word(reason)
        # everyone is told: a request may count on the instance before it runs there
        for client in list(self._clients.values()):
            client.move_reason = label
            if client.trace is not None:
                client.trace.instance_lost(time.monotonic(), instance_id, label)
            self._run(client.machine.instance_lost(instance_id))
        log.warning("dispatch.instance_lost", instance=instance_id, reason=reason, legs=len(hit))

    def on_draining(self, instance_id: str) -> None:
        """See Sink: who counts on it for later is placed anew when its prompt is done."""
        for client in list(self._clients.values()):
            self._run(client.machine.leave_place(instance_id))

    def on_pulse(self, link: Link, pulse: Pulse) -> None:
        """See Sink."""
        self._decider.on_pulse(link.instance_id, pulse)
        if pulse.queues is not None:
            self._gauges.heard(self._members.engine_slot(link.instance_id), link.instance_id, pulse.queues)

    def on_tick(self, now_s: float) -> None:
        """See Sink: look for requests that an engine forgot."""
        self._decider.on_tick(now_s)
        self._show_engines()
        if now_s - self._swept_s < SWEEP_S:
            return
        self._swept_s = now_s
        silent = [c for c in self._clients.values() if now_s - c.heard_s > REQUEST_SILENT_S_MAX]
        for client in silent:
            log.error("dispatch.request_silent", **client.names)
            self._run(client.machine.deadline())

    # ------------------------------------------------------------ commands

    def _run(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self._execute(command)

    def _execute(self, command: Command) -> None:
        client = self._clients.get(command.request_id)
        match command:
            case Release():
                self._decider.release(command.ticket)
            case Stale():
                self._metrics.stale_outputs.inc()
            case Abort():
                self._abort(client, command)
            case Send() if client is not None:
                self._send(client, command)
            case Replan():
                self._replan(command)
            case Deliver() if client is not None:
                self._deliver_own(client, command)
            case Fail() if client is not None:
                self._fail(client, command)
            case Done() if client is not None:
                self._done(client, command)
            case _:
                log.debug("dispatch.command_late", command=type(command).__name__)

    def _abort(self, client: Client | None, command: Abort) -> None:
        self._running.pop(command.eid, None)
        if client is not None and client.trace is not None:
            client.trace.leg_lost(time.monotonic(), command.eid, "")
        if link := self._members.up(command.instance_id):
            link.abort([command.eid])

    def _send(self, client: Client, command: Send) -> None:
        shared = command.leg is Leg.PREFILL
        clients = client.family.clients if shared else [client]
        (client.family.eids if shared else client.eids).append(command.eid)
        self._running[command.eid] = Running(command.eid, command.leg, command.instance_id, clients)
        if command.leg is Leg.DECODE and client.plan is not None and not client.told:
            checked = partial(self._checked, client, command)
            self._decider.second_check(client.prompt, client.plan, checked)
        else:
            self._send_leg(client, command)

    def _checked(self, client: Client, command: Send, rejection: Rejection | None) -> None:
        if command.eid not in self._running:
            return  # aborted or lost while it was asked about
        if rejection is None:
            self._send_leg(client, command)
        else:  # the machine settles first
            asyncio.get_running_loop().call_soon(self._turn_away, client, rejection)

    def _send_leg(self, client: Client, command: Send) -> None:
        link = self._members.up(command.instance_id)
        if link is None:
            # lost between plan and send: tell the machine once it has settled
            loop = asyncio.get_running_loop()
            loop.call_soon(self.on_lost, command.instance_id, "no link")
            return
        request, slot = client.request, link.slot
        source = self._source(client, command)
        target = self._target(client, command) if command.leg is Leg.PREFILL else ""
        trace = "" if client.trace is None else self._leg_span(client, client.trace, command, source, target)
        if command.leg is Leg.PREFILL:
            first = client.machine.facts.first_token
            link.add(legs.prefill_leg(request, command.eid, slot, source, target, first, trace))
            return
        make = legs.decode_leg if command.leg is Leg.DECODE else legs.whole_leg
        emitted = client.emitted[: command.resume_n]
        done = client.told or client.leg1 is not None
        link.add(make(request, command.eid, slot, emitted, done, source, trace))

    def _leg_span(self, client: Client, trace: AnswerTrace, command: Send, source: str, target: str) -> str:
        record = self._members.view.record(command.instance_id)
        nodes = {"mooncake.source_node": source, "mooncake.target_node": target}
        where: dict[str, str | int] = {key: node for key, node in nodes.items() if node}
        if record is not None:
            blocks = -(-client.machine.facts.prompt_len // record.block_size)
            where["mooncake.node"] = record.node
            where["mooncake.prompt_bytes"] = blocks * record.block_bytes
        sent = command.eid, command.leg, command.instance_id
        return trace.sent(time.monotonic(), *sent, where, command.resume_n)

    def _source(self, client: Client, command: Send) -> str:
        """Return the node whose store has what the engine's own may lack: as planned, or since leg 1."""
        planned = client.plan.fetch_node if client.plan is not None else None
        known = client.leg1_node or planned or ""
        if not known and not command.resume_n:
            return ""  # the plan found computing quicker
        return self._decider.source(client.machine.facts, self._node_of(command.instance_id), known)

    def _target(self, client: Client, command: Send) -> str:
        """Return the node that is going to decode what this leg 1 computes, if it is another one."""
        decode = client.plan.decode if client.plan is not None else None
        if decode is None:
            return ""
        return self._decider.target(self._node_of(command.instance_id), self._node_of(decode))

    def _block_size(self, instance_id: str) -> int:
        record = self._members.view.record(instance_id)
        return 0 if record is None else record.block_size

    def _node_of(self, instance_id: str) -> str:
        record = self._members.view.record(instance_id)
        return "" if record is None else record.node

    def _deliver(self, client: Client, command: Deliver, output: EngineCoreOutput, now_s: float) -> None:
        """Turn an engine's output into the client's."""
        output.request_id = client.request.request_id
        output.new_token_ids = command.tokens
        output.finish_reason = None if command.finish is None else FINISH[command.finish]
        if client.told:
            legs.strip_continuation(output)
        elif command.leg is not Leg.PREFILL:
            legs.graft_leg1(output, client.leg1)
        client.told = True
        client.emitted += command.tokens
        self._meter.delivered(client, len(command.tokens), now_s)

    def _deliver_own(self, client: Client, command: Deliver) -> None:
        """Deliver something that no engine output carries (the end of a request that lost its engine)."""
        output = EngineCoreOutput(request_id=client.request.request_id, new_token_ids=[])
        self._deliver(client, command, output, time.monotonic())
        self.outputs.put_nowait(EngineCoreOutputs(outputs=[output]))

    def _replan(self, command: Replan) -> None:
        client = self._clients.get(command.request_id)
        if client is None:
            return
        if command.delay_s <= 0:  # later ones only ask again (bounded by the machine)
            if command.emitted_n:
                self._metrics.migrations.labels(client.move_reason or "engine error").inc()
            else:
                self._metrics.retries.inc()
            if client.trace is not None:
                client.trace.moved(client.move_reason or "engine error", command.emitted_n)
        # never inline: the machine's other commands come first
        asyncio.get_running_loop().call_later(command.delay_s, self._ask_again, client, command)

    def _ask_again(self, client: Client, command: Replan) -> None:
        placed = partial(self._placed, client, command)
        self._decider.replan(client.prompt, client.machine.emitted_n, command.exclude, command.need, placed)

    def _placed(self, client: Client, command: Replan, answer: Plan | Rejection) -> None:
        client.heard_s = time.monotonic()
        if isinstance(answer, Plan):
            client.plan = answer if client.plan is None else revised(client.plan, answer)
        self._run(client.machine.plan_result(command.need, answer))

    def _fail(self, client: Client, command: Fail) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE if command.retryable else HTTPStatus.INTERNAL_SERVER_ERROR
        log.error("dispatch.request_failed", **client.names, reason=command.reason)
        self._metrics.failures.labels(failure_word(command.reason)).inc()
        self._tell_failure(client, Unavailable(command.reason, 1.0, status))

    def _tell_failure(self, client: Client, error: Unavailable) -> None:
        if client.fate is not None and not client.told:
            client.fate.error = error
        if self.fail_request is None:
            output = legs.error_output(client.request.request_id)
            self.outputs.put_nowait(EngineCoreOutputs(outputs=[output]))
            return
        siblings = self.fail_request(client.request.request_id, error)
        if siblings:
            asyncio.get_running_loop().call_soon(self.abort, siblings)

    def _done(self, client: Client, command: Done) -> None:
        request_id = client.request.request_id
        finished = command.outcome is Outcome.FINISHED
        ran = client.plan is not None
        self._decider.ended(client.prompt, len(client.emitted), ran=ran, finished=finished)
        del self._clients[request_id]
        self._waits(client, False)
        if client.trace is not None:
            client.trace.over(time.monotonic(), command.outcome, len(client.emitted))
        self._meter.ended(client, command.outcome, time.monotonic())
        self._metrics.in_flight.set(len(self._clients))
        family = client.family
        family.clients.remove(client)
        over = list(client.eids)
        if not family.clients:
            over += family.eids
            self._families.pop(family.family_id, None)
        for eid in over:
            self._running.pop(eid, None)
        if not self._clients:
            self._idle.set()
