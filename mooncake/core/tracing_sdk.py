"""The part of tracing that imports OpenTelemetry; only mooncake.core.tracing imports it, when it is on.

    span ends -> SpanProcessor (bounded; counts what it drops) -> its thread -> exporter -> collector

A collector that is slow or dead costs spans, and nobody who serves waits for it.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    get_current_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from mooncake.core.config import fail

WAITING_MAX: Final = 8192
"""Spans that wait to be sent, unless OTEL_BSP_MAX_QUEUE_SIZE says: 1,500 requests, 10 MB."""
CLOSE_S: Final = 2.0
"""At its end a process waits so long for the last spans to be sent."""
PROTOCOLS: Final = ("http/protobuf", "grpc")

_UNSET: Final = Status(StatusCode.UNSET)

Attributes = Mapping[str, AttributeValue]


def exporter() -> SpanExporter:
    """Return the exporter that the environment asks for: OTLP over HTTP, or gRPC.

    Raises:
        ConfigError: it asks for another protocol.
    """
    for key in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := os.environ.get(key, "").strip():
            break
    else:
        protocol = PROTOCOLS[0]
    if protocol not in PROTOCOLS:
        raise fail(key, protocol, f"must be one of {', '.join(PROTOCOLS)}")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp()


class Tracing:
    """Makes the spans of one process. All methods are quick and wait for nobody."""

    def __init__(
        self,
        exporter: SpanExporter,
        role: str,
        name: str = "",
        registry: CollectorRegistry = REGISTRY,
        waiting_max: int = 0,
    ) -> None:
        """`waiting_max`: spans that wait, 0 = as the environment says; others: see open_tracing."""
        waiting_max = waiting_max or _number("OTEL_BSP_MAX_QUEUE_SIZE", WAITING_MAX)
        # each retry of an exporter is a warning; that spans were lost is an error, and counted
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
        self._provider = TracerProvider(resource=_resource(role, name), shutdown_on_exit=False)
        self._scope = InstrumentationScope("mooncake", _version())
        self._processor = _Bounded(exporter, registry, waiting_max)

    def served(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> "Span | None":
        """Begin the span of a client's request, under the one that its headers name; None: not sampled."""
        context = propagate.extract(headers, Context())
        parent = get_current_span(context).get_span_context()
        fresh = not parent.is_valid
        trace = self._provider.id_generator.generate_trace_id() if fresh else parent.trace_id
        sampled = self._provider.sampler.should_sample(context, trace, name, SpanKind.SERVER, attributes)
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        own = self._named(trace, sampled.trace_state)
        return Span(self, name, own, None if fresh else parent, SpanKind.SERVER, attributes)

    def begin(
        self,
        name: str,
        parent: "Span | str",
        start_ns: int = 0,
        attributes: Attributes | None = None,
        after: "Span | None" = None,
    ) -> "Span":
        """Begin a span: where a request is sampled, all that is done for it is.

        Args:
            name: of what is done.
            parent: a span of this process, or the `traceparent` of another process's.
            start_ns: since 1970; 0 = now.
            attributes: counts, names and seconds.
            after: an earlier attempt at the same.
        """
        above = _remote(parent) if isinstance(parent, str) else parent.context
        trace = above.trace_id if above.is_valid else self._provider.id_generator.generate_trace_id()
        own = self._named(trace, above.trace_state)
        span = Span(
            self, name, own, above if above.is_valid else None, SpanKind.INTERNAL, attributes, start_ns
        )
        if after is not None:
            span.links = (Link(after.context),)
        return span

    def _named(self, trace: int, state: TraceState | None) -> SpanContext:
        number = self._provider.id_generator.generate_span_id()
        return SpanContext(trace, number, False, TraceFlags(TraceFlags.SAMPLED), state)

    def ended(self, span: "Span", end_ns: int) -> None:
        """Send a span that has ended, with others."""
        self._processor.on_end(
            ReadableSpan(
                span.name, span.context, span.parent, self._provider.resource, span.attributes, span.events,
                span.links, span.kind, None, span.status, span.start_ns, end_ns, self._scope,
            )
        )  # fmt: skip

    def flush(self) -> None:
        """Send what waits. It may take as long as the exporter does: for tests."""
        self._processor.force_flush()

    def close(self) -> None:
        """Send what waits, for CLOSE_S at most."""
        ending = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(CLOSE_S)


class Span:
    """What is being done, until it `end`s.

    OpenTelemetry's own class checks and copies attributes one by one under a lock: of a request's traces that
    was three quarters of the cost.
    """

    __slots__ = (
        "_tracing", "attributes", "context", "events", "kind", "links", "name", "parent", "start_ns", "status"
    )  # fmt: skip

    def __init__(
        self,
        tracing: Tracing,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: Attributes | None,
        start_ns: int = 0,
    ) -> None:
        """See Tracing.begin."""
        self._tracing = tracing
        self.name = name
        self.context = context
        self.parent = parent
        self.kind = kind
        self.attributes: dict[str, AttributeValue] = {} if attributes is None else dict(attributes)
        self.start_ns = start_ns or time.time_ns()
        self.events: list[Event] = []
        self.links: Sequence[Link] = ()
        self.status = _UNSET

    @property
    def traceparent(self) -> str:
        """The W3C name by which another process makes spans under this one."""
        context = self.context
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    @property
    def trace_id(self) -> str:
        """Of the trace that it is of."""
        return f"{self.context.trace_id:032x}"

    def event(self, name: str, attributes: Attributes) -> None:
        """Something happens now."""
        self.events.append(Event(name, attributes, time.time_ns()))

    def failed(self, why: str) -> None:
        """It is no success."""
        self.status = Status(StatusCode.ERROR, why)

    def end(self, end_ns: int = 0) -> None:
        """It is over, now or at `end_ns`."""
        self._tracing.ended(self, end_ns or time.time_ns())


def _remote(traceparent: str) -> SpanContext:
    """Return the context that another process has named; what is none begins a trace of its own."""
    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())
    return get_current_span(context).get_span_context()


def span_counter(registry: CollectorRegistry) -> Counter:
    """Return where spans are counted; a second one in the same registry raises."""
    return Counter("mooncake_trace_spans", "Spans, by what became of them.", ["result"], registry=registry)


class _Bounded(BatchSpanProcessor):
    """Hands spans on while fewer than so many wait, those that are being sent included."""

    def __init__(self, exporter: SpanExporter, registry: CollectorRegistry, waiting_max: int) -> None:
        counter = span_counter(registry)
        self._dropped = counter.labels("dropped")
        self._waiting = _Waiting(waiting_max)
        batch = min(_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), waiting_max)
        counted = _Counted(exporter, counter, self._waiting)
        super().__init__(counted, max_queue_size=waiting_max, max_export_batch_size=batch)

    def on_end(self, span: ReadableSpan) -> None:
        if not (span.context and span.context.trace_flags.sampled):
            return
        if self._waiting.take():
            super().on_end(span)
        else:
            self._dropped.inc()


class _Waiting:
    """How many spans wait: asked by those who serve, told by the exporter's thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._now = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self._now >= self._most:
                return False
            self._now += 1
            return True

    def done(self, count: int) -> None:
        with self._lock:
            self._now -= count


class _Counted(SpanExporter):
    """An exporter whose results are counted."""

    def __init__(self, exporter: SpanExporter, counter: Counter, waiting: _Waiting) -> None:
        self._exporter = exporter
        self._waiting = waiting
        self._sent, self._failed = counter.labels("sent"), counter.labels("failed")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self._waiting.done(len(spans))
            (self._sent if result is SpanExportResult.SUCCESS else self._failed).inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _resource(role: str, name: str) -> Resource:
    about = {
        "service.name": f"mooncake-{role}",
        "service.namespace": "mooncake",
        "service.version": _version(),
        "service.instance.id": name or f"{role}-{socket.gethostname().split('.')[0]}-{os.getpid()}",
        "mooncake.role": role,
    }
    said = {
        pair.partition("=")[0].strip() for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")
    }
    if os.environ.get("OTEL_SERVICE_NAME"):
        said.add("service.name")
    return Resource.create({key: value for key, value in about.items() if key not in said})


def _number(key: str, default: int) -> int:
    text = os.environ.get(key, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise fail(key, text, "must be a whole number above 0")
    return int(text)


def _version() -> str:
    try:
        return version("mooncake-serving")
    except PackageNotFoundError:
        return "0"
