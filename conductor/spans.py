"""One request as a trace: spans of what the gateway measures anyway (docs/tracing.md).

    gateway.request                      the HTTP request
      conductor.decide                   from its arrival to a plan or a rejection
      prefill | decode | whole           one per leg and attempt, from its sending to its last output
      handover                           from the end of prefill to decode's first token

Legs are an engine's, which adds what it does for them (mooncake.worker.spans), as a core does to a decision.
Made only where tracing is on; a dispatcher without a trace tests one attribute.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from conductor.genai_metrics import OPERATIONS
from conductor.plan import Leg, Outcome, Plan, Rejection
from conductor.why import attributes
from mooncake.core.tracing import WallClock

if TYPE_CHECKING:
    from conductor.vllm_seam import EngineCoreOutput, EngineCoreRequest
    from mooncake.core.tracing_sdk import Span, Tracing

PROPAGATION: Final = frozenset((b"traceparent", b"tracestate"))
"""vLLM would put them into every token's message, and say that its own tracing is off."""
COMPLETE: Final = ("length", "stop")
"""Finish reasons of a leg that did its work."""
LEGS_MAX: Final = 64
"""Attempts of one answer that get a span: a machine gives up long before."""


class Traces:
    """Begins the traces of one gateway."""

    def __init__(self, tracing: "Tracing", model: str) -> None:
        """`model`: as clients call it."""
        self._tracing = tracing
        self._model = model

    def begin(
        self, path: str, headers: Iterable[tuple[bytes, bytes]], request_id: str
    ) -> "RequestTrace | None":
        """Begin the trace of an HTTP request; None: nobody wants it."""
        operation = OPERATIONS.get(path)
        if operation is None:
            return None
        carried = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "mooncake",
            "gen_ai.request.model": self._model,
            "http.request.method": "POST",
            "url.path": path,
            "mooncake.request_id": request_id,
        }
        span = self._tracing.served("gateway.request", carried, attributes)
        return None if span is None else RequestTrace(self._tracing, span)


class RequestTrace:
    """The trace of one HTTP request, with the answers (choices, prompts of a batch) it asks for."""

    __slots__ = (
        "_cached",
        "_input",
        "_output",
        "_reasons",
        "_tracing",
        "_ttft_s",
        "named",
        "span",
        "trace_id",
    )

    def __init__(self, tracing: "Tracing", span: "Span") -> None:
        self._tracing = tracing
        self.span = span
        self.named, self.trace_id = span.traceparent, span.trace_id
        self._input = self._output = self._cached = 0
        self._reasons: list[str] = []
        self._ttft_s = 0.0

    def answer(self, request: "EngineCoreRequest", started_s: float, *, sibling: bool) -> "AnswerTrace":
        """Begin one answer; `sibling`: it has the prompt of another one."""
        params = request.sampling_params
        if params is not None and not sibling:
            self.span.attributes["gen_ai.request.temperature"] = params.temperature
            if params.max_tokens is not None:
                self.span.attributes["gen_ai.request.max_tokens"] = params.max_tokens
        if request.lora_request is not None:
            self.span.attributes["gen_ai.request.model"] = request.lora_request.lora_name
        if not sibling:
            self._input += len(request.prompt_token_ids or ())
        return AnswerTrace(self, self._tracing, started_s)

    def first(self, ttft_s: float, cached_tokens: int) -> None:
        """An answer's first token goes to the client."""
        self._ttft_s = self._ttft_s or ttft_s
        self._cached += cached_tokens

    def over(self, tokens: int, reason: str) -> None:
        """An answer is over."""
        self._output += tokens
        if reason:
            self._reasons.append(reason)

    def ended(self, status: int, *, complete: bool) -> None:
        """The HTTP response ended, or its client left; status 0: nothing was sent."""
        span = self.span
        span.attributes.update({
            "gen_ai.usage.input_tokens": self._input,
            "gen_ai.usage.output_tokens": self._output,
            "gen_ai.usage.cache_read.input_tokens": self._cached,
            "gen_ai.response.finish_reasons": tuple(self._reasons),
        })  # fmt: skip
        if status:
            span.attributes["http.response.status_code"] = status
        if self._ttft_s:
            span.attributes["gen_ai.server.time_to_first_token"] = self._ttft_s
        if status >= 500:
            span.failed(f"HTTP {status}")
        elif not complete:
            span.attributes["mooncake.client_left"] = True
            span.failed("the client left")
        span.end()


class AnswerTrace:
    """What a dispatcher tells of one answer. Times are the monotonic clock's."""

    __slots__ = (
        "_cached", "_clock", "_decide", "_handed_s", "_legs", "_reason", "_request", "_started_s", "_tracing"
    )  # fmt: skip

    def __init__(self, request: RequestTrace, tracing: "Tracing", started_s: float) -> None:
        self._request = request
        self._tracing = tracing
        self._clock = WallClock()
        self._started_s = started_s
        self._decide: Span | None = self._begin("conductor.decide", started_s)
        self._legs: dict[str, _Leg] = {}
        self._handed_s = 0.0
        self._cached = 0
        self._reason = ""

    def _begin(self, name: str, start_s: float, attributes: Any = None, after: Any = None) -> "Span":
        parent = self._request.span
        return self._tracing.begin(name, parent, self._clock.ns(start_s), attributes, after)

    @property
    def deciding(self) -> str:
        """The decision's span, for who decides elsewhere."""
        return "" if self._decide is None else self._decide.traceparent

    def decided(self, now_s: float, answer: Plan | Rejection, blocks: int) -> None:
        """It has a plan, or is turned away; `blocks` of its prompt have names."""
        span, self._decide = self._decide, None
        if span is None:  # turned away after it was planned
            span = self._begin("conductor.check", now_s)
        span.attributes.update(attributes(answer))
        span.attributes["mooncake.waited_s"] = now_s - self._started_s
        span.attributes["mooncake.prompt_blocks"] = blocks
        if isinstance(answer, Rejection):
            span.failed(str(answer.reason))
        span.end(self._clock.ns(now_s))

    def sent(
        self, now_s: float, eid: str, leg: Leg, instance_id: str, where: dict[str, Any], resume_n: int
    ) -> str:
        """A leg goes to an engine; return its span, for the engine.

        Args:
            now_s: the time.
            eid: the engine's name of the leg.
            leg: which.
            instance_id: whose engine.
            where: node, sources and sizes, as attributes.
            resume_n: tokens that the client has.
        """
        earlier = list(self._legs.values())
        before = next((one.span for one in reversed(earlier) if _side(one.leg) == _side(leg)), None)
        span = self._begin(str(leg), now_s, {"mooncake.instance": instance_id, **where}, before)
        if before is not None:
            span.attributes["mooncake.attempt"] = 1 + sum(_side(one.leg) == _side(leg) for one in earlier)
        if resume_n:
            span.attributes["mooncake.resumed_tokens"] = resume_n
        if len(self._legs) < LEGS_MAX:
            self._legs[eid] = _Leg(leg, instance_id, span, where, now_s)
        return span.traceparent

    def output(self, now_s: float, eid: str, output: "EngineCoreOutput") -> None:
        """The first output of a leg came, its event times on our clock."""
        leg = self._legs.get(eid)
        if leg is None:
            return
        about = leg.span.attributes
        about["mooncake.first_output_s"] = now_s - leg.sent_s
        at_s = {event.type.name: event.timestamp for event in output.events or ()}
        if "QUEUED" in at_s and "SCHEDULED" in at_s:
            about["mooncake.queue_s"] = at_s["SCHEDULED"] - at_s["QUEUED"]
        if (stats := output.prefill_stats) is not None:
            about["mooncake.computed_tokens"] = stats.num_computed_tokens
            about["mooncake.cached_tokens"] = stats.num_cached_tokens
            if leg.leg is not Leg.DECODE:
                self._cached = max(0, stats.num_cached_tokens)
        if self._handed_s and leg.leg is Leg.DECODE:
            self._handover(now_s, leg)

    def _handover(self, now_s: float, leg: "_Leg") -> None:
        start_s, self._handed_s = self._handed_s, 0.0
        first = next((one for one in self._legs.values() if one.leg is Leg.PREFILL and one.done), None)
        source = "" if first is None else first.where.get("mooncake.node", "")
        target = leg.where.get("mooncake.node", "")
        path = "shared memory" if source == target else "network"
        to = {"mooncake.from_node": source, "mooncake.to_node": target, "mooncake.path": path}
        if size_bytes := leg.where.get("mooncake.prompt_bytes"):
            to["mooncake.bytes"] = size_bytes
        self._begin("handover", start_s, to).end(self._clock.ns(now_s))

    def leg_ended(self, now_s: float, eid: str, reason: str) -> None:
        """A leg's last output came."""
        leg = self._legs.get(eid)
        if leg is None or leg.over:
            return
        leg.done = reason in COMPLETE
        if leg.leg is not Leg.PREFILL:
            self._reason = reason
        elif leg.done:
            self._handed_s = now_s
        why = "" if leg.done else "the engine says: " + reason
        leg.end(self._clock.ns(now_s), {"mooncake.finish": reason}, why)

    def leg_lost(self, now_s: float, eid: str, why: str) -> None:
        """A leg's engine is gone, or the leg is no longer wanted ("")."""
        leg = self._legs.get(eid)
        if leg is None or leg.over:
            return
        leg.end(self._clock.ns(now_s), {"mooncake.finish": "lost" if why else "aborted"}, why)

    def instance_lost(self, now_s: float, instance_id: str, why: str) -> None:
        """An engine is gone."""
        for eid, leg in self._legs.items():
            if leg.instance_id == instance_id:
                self.leg_lost(now_s, eid, why)

    def moved(self, reason: str, emitted: int) -> None:
        """A leg is to be placed again; its client has `emitted` tokens."""
        told: dict[str, Any] = {"mooncake.reason": reason, "mooncake.emitted_tokens": emitted}
        self._request.span.event("migration" if emitted else "retry", told)

    def first(self, ttft_s: float) -> None:
        """Its first token goes to the client."""
        self._request.first(ttft_s, self._cached)

    def over(self, now_s: float, outcome: Outcome, tokens: int) -> None:
        """Nothing more happens; its client has `tokens`."""
        if self._decide is not None:  # its client left before
            span, self._decide = self._decide, None
            span.attributes["mooncake.decision"] = "none"
            span.end(self._clock.ns(now_s))
        for eid in self._legs:
            self.leg_lost(now_s, eid, "")
        self._request.over(tokens, self._reason or str(outcome))


class _Leg:
    __slots__ = ("done", "instance_id", "leg", "over", "sent_s", "span", "where")

    def __init__(
        self, leg: Leg, instance_id: str, span: "Span", where: dict[str, Any], sent_s: float
    ) -> None:
        self.leg = leg
        self.instance_id = instance_id
        self.span = span
        self.where = where
        self.sent_s = sent_s
        self.done = False  # as it should
        self.over = False

    def end(self, end_ns: int, attributes: dict[str, Any], why: str = "") -> None:
        self.over = True
        self.span.attributes.update(attributes)
        if why:
            self.span.failed(why)
        self.span.end(end_ns)


def _side(leg: Leg) -> bool:
    """Whether a leg makes a prompt's blocks only: a later one of its side is another attempt."""
    return leg is Leg.PREFILL
