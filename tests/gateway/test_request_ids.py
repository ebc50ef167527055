"""Every request has one id: its client's or ours, in the answer, in vLLM's own id, and in every log line."""

from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry

from conductor.http import RejectionMiddleware
from conductor.spans import Traces
from mooncake.core.tracing_sdk import Tracing

HEX = set("0123456789abcdef")


class Front:
    """What stands behind the middleware: keeps what it gets, and answers in two chunks."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.messages = 0
        self.logged: dict[str, Any] = {}
        self.says: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = dict(scope["headers"])
        if scope["method"] == "POST":
            more = True
            while more:
                message = await receive()
                self.messages += 1
                self.body += message["body"]
                more = message["more_body"]
        self.logged = structlog.contextvars.get_contextvars()
        await send({"type": "http.response.start", "status": 200, "headers": self.says})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})


async def ask(
    front: Front, *headers: tuple[bytes, bytes], path: str = "/v1/completions", traces: Traces | None = None
) -> dict[str, str]:
    """Send a request in three parts; return the answer's headers."""
    parts = [b'{"prompt": ', b'"hi"', b"}"]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = RejectionMiddleware(front, traces=traces)
    await app({"type": "http", "method": "POST", "path": path, "headers": list(headers)}, receive, send)
    start, *bodies = sent
    assert b"".join(one["body"] for one in bodies) == b"ab"
    names = [name for name, _ in start["headers"]]
    assert names.count(b"x-request-id") == 1
    return {name.decode(): value.decode() for name, value in start["headers"]}


async def test_a_clients_id_is_taken_and_told_and_logged() -> None:
    front = Front()
    answer = await ask(front, (b"x-request-id", b"run-7.step:2"))
    assert answer["x-request-id"] == "run-7.step:2"
    assert front.headers[b"x-request-id"] == b"run-7.step:2"  # vLLM makes its own from it
    assert front.logged["request_id"] == "run-7.step:2"
    assert "request_id" not in structlog.contextvars.get_contextvars()


@pytest.mark.parametrize(
    "said", [b"", b"a" * 129, b"two words", b'"},{"level":"critical', b"line\r\nbreak", b"\xc3\xa9"]
)
async def test_what_is_no_id_gets_one_of_ours(said: bytes) -> None:
    front = Front()
    answer = await ask(front, (b"x-request-id", said))
    assert len(answer["x-request-id"]) == 32
    assert set(answer["x-request-id"]) <= HEX
    assert front.headers[b"x-request-id"].decode() == answer["x-request-id"] == front.logged["request_id"]


async def test_requests_without_an_id_get_different_ones() -> None:
    assert (await ask(Front()))["x-request-id"] != (await ask(Front()))["x-request-id"]


async def test_an_id_that_vllm_told_already_is_not_told_twice() -> None:
    front = Front()
    front.says = [(b"X-Request-Id", b"mine")]
    app_says = await ask_raw(front)
    assert [name.lower() for name, _ in app_says].count(b"x-request-id") == 1


async def ask_raw(front: Front) -> list[tuple[bytes, bytes]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(b"x-request-id", b"mine")]}
    await RejectionMiddleware(front)(scope, None, send)
    return list(sent[0]["headers"])


async def test_a_body_in_parts_reaches_vllm_in_one_piece() -> None:
    front = Front()
    await ask(front)
    assert (front.body, front.messages) == (b'{"prompt": "hi"}', 1)


async def test_a_traced_request_is_told_its_trace_and_logs_it() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    tracing = Tracing(InMemorySpanExporter(), "gateway", registry=CollectorRegistry())
    front = Front()
    traceparent = b"00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-01"
    answer = await ask(front, (b"traceparent", traceparent), traces=Traces(tracing, "m"))
    assert answer["traceresponse"].split("-")[1] == "0123456789abcdef0123456789abcdef"
    assert answer["traceresponse"].split("-")[2] != "00f067aa0ba902b7"  # our span, under the client's
    assert front.logged["trace_id"] == "0123456789abcdef0123456789abcdef"
    assert b"traceparent" not in front.headers  # vLLM would send it back with every token
    untraced = await ask(Front(), path="/tokenize", traces=Traces(tracing, "m"))
    assert "traceresponse" not in untraced
    tracing.close()
