"""An OTLP collector for tests: takes spans over HTTP, in this process, and shows them as trees."""

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """What tests look at."""

    name: str
    span_id: str
    parent: str  # id; "" = none
    service: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]


class Collector:
    """Listens on a port of its own until it is closed."""

    def __init__(self) -> None:
        self._traces: dict[str, list[Span]] = {}
        self._lock = threading.Lock()
        taken = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                taken(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="collector", daemon=True).start()

    def trace(self, trace_id: str) -> list[Span]:
        """Return the spans of a trace that have come, by their start."""
        with self._lock:
            return sorted(self._traces.get(trace_id, ()), key=lambda span: span.start_ns)

    def tree(self, trace_id: str) -> set[tuple[str, str]]:
        """Return names of a trace's spans with those of their parents."""
        spans = self.trace(trace_id)
        names = {span.span_id: span.name for span in spans}
        return {(span.name, names.get(span.parent, "")) for span in spans}

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for one in scope.spans:
                    span = Span(
                        one.name, one.span_id.hex(), one.parent_span_id.hex(), about["service.name"],
                        one.start_time_unix_nano, one.end_time_unix_nano,
                        {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in one.attributes},
                    )  # fmt: skip
                    with self._lock:
                        self._traces.setdefault(one.trace_id.hex(), []).append(span)
