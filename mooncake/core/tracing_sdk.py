"""The part of tracing that imports OpenTelemetry; only mooncake.core.tracing imports it, when it is on.

    span ends -> SpanProcessor (bounded; counts what it drops) -> its thread -> exporter -> collector

A collector that is slow or dead costs spans, and nobody who serves waits for it.
"""

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from mooncake.core.config import fail

WAITING_MAX: Final = 8192
"""Spans that wait to be sent, unless OTEL_BSP_MAX_QUEUE_SIZE says: 1,500 requests, 10 MB."""
CLOSE_S: Final = 2.0
"""At its end a process waits so long for the last spans to be sent."""
PROTOCOLS: Final = ("http/protobuf", "grpc")

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
        self._bounded = _Bounded(exporter, registry, waiting_max)
        self._provider.add_span_processor(self._bounded)
        self._tracer = self._provider.get_tracer("mooncake", _version())

    def served(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Span | None:
        """Begin the span of a client's request, under the one that its headers name; None: not sampled."""
        span = self._tracer.start_span(name, propagate.extract(headers), SpanKind.SERVER, attributes)
        return span if span.is_recording() else None

    def begin(
        self,
        name: str,
        parent: Span | str,
        start_ns: int | None = None,
        attributes: Attributes | None = None,
        after: Span | None = None,
        asks: bool = False,
    ) -> Span:
        """Begin a span.

        Args:
            name: of what is done.
            parent: a span of this process, or another process's `named`.
            start_ns: since 1970; None = now.
            attributes: counts, names and seconds.
            after: an earlier attempt at the same.
            asks: another process is asked.
        """
        context = remote(parent) if isinstance(parent, str) else set_span_in_context(parent)
        links = () if after is None else (Link(after.get_span_context()),)
        kind = SpanKind.CLIENT if asks else SpanKind.INTERNAL
        return self._tracer.start_span(name, context, kind, attributes, links, start_ns)

    def flush(self) -> None:
        """Send what waits. It may take as long as the exporter does: for tests."""
        self._provider.force_flush()

    def close(self) -> None:
        """Send what waits, for CLOSE_S at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(CLOSE_S)


def named(span: Span) -> str:
    """Return the W3C traceparent by which another process makes spans under `span`."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id(span: Span) -> str:
    """Return the id of the trace that `span` is of."""
    return f"{span.get_span_context().trace_id:032x}"


def remote(traceparent: str) -> Context:
    """Return the context that another process has `named`; what is none begins a trace of its own."""
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())


def failed(span: Span, why: str) -> None:
    """Let `span` say that it failed."""
    span.set_status(Status(StatusCode.ERROR, why))


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
