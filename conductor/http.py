"""What we add to vLLM's HTTP app: terms of headers and body, real statuses of rejected streams, Retry-After.

vLLM starts a streaming response before its first token, so a request turned away later would get
200 and an error inside the stream. `RejectionMiddleware` holds the response's start until its first
body chunk (which vLLM sends with the first token anyway) and answers 429 or 503 with Retry-After
when the dispatcher rejected the request meanwhile.

Every request has an id: its client's X-Request-Id, if that is one (REQUEST_ID), else one of ours. It is told
in the answer, vLLM's own ids contain it, and every log line of the request has it as request_id.

An answer to a request that asks for a class or a service tier has the class it got as x-slo-class, and the
tier as `service_tier` where vLLM's response has that field (not in streams).
"""

import json
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from structlog.contextvars import bound_contextvars

from conductor.agents import Agents, Turn
from conductor.genai_metrics import OPERATIONS
from conductor.programs import calls_tools
from conductor.spans import PROPAGATION, RequestTrace, Traces
from conductor.tenants import Quotas, Tenants
from conductor.terms import CLASS_HEADER, DEFAULT_TERMS, Terms
from conductor.vllm_seam import Unavailable
from mooncake.core.errors import RequestError
from mooncake.core.metric_labels import OTHER

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ID_HEADER = b"x-request-id"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}")
"""What a client may call its request. Anything else gets a name of ours: ids go into logs and names of legs.
Nobody may make file names of them: slashes and dots are allowed."""

ANSWERED_PATHS = frozenset(OPERATIONS)
"""What engines are needed for."""
TENANT_PATHS = ANSWERED_PATHS | {"/v1/messages/count_tokens", "/v1/models"}
"""What a tenant's own key opens: asking for answers. The rest, adapters and decisions, is the operator's."""


class HttpFate:
    """What an HTTP request asks for, and whether it was turned away; shared by its tasks."""

    def __init__(self, terms: Terms = DEFAULT_TERMS, names: dict[str, str] | None = None) -> None:
        """`names`: request_id, and trace_id if there is one, as log lines have them."""
        self.terms = terms
        self.names: dict[str, str] = {} if names is None else names
        self.error: Unavailable | None = None
        self.turn: Turn | None = None  # of an agent's program
        self.trace: RequestTrace | None = None
        self.operation = OTHER  # as metrics call it

    def begin(self, agents: Agents) -> None:
        """All that it says is known."""
        self.turn = agents.came(time.monotonic(), self.terms)
        if self.turn is not None:
            self.terms = self.turn.terms


FATE: ContextVar[HttpFate | None] = ContextVar("mooncake_http_fate", default=None)
"""Set per HTTP request; tasks that serve it inherit the same object."""


def tenant_served() -> str:
    """Return the tenant whose request the running task serves; "" = not known."""
    fate = FATE.get()
    return "" if fate is None else fate.terms.tenant


class RejectionMiddleware:
    """ASGI middleware; costs two attribute tests per body chunk."""

    def __init__(
        self,
        app: App,
        quotas: Quotas | None = None,
        api_key: str = "",
        *,
        hopeless: Callable[[Terms], Unavailable | None] = lambda _: None,
        agents: Agents | None = None,
        traces: Traces | None = None,
        answered: Callable[[int], None] = lambda _: None,
        lets_in: Callable[[Message], bool] = lambda _: True,
    ) -> None:
        """`quotas` know the tenants; `api_key`: shown to vLLM for a tenant that showed its own.

        `hopeless`: what to tell those who cannot be served whatever they ask, before it is parsed.
        `agents` hear of turns; None: nobody does. `traces`: None = tracing is off.
        `answered` hears the status of each answer that engines are needed for.
        `lets_in`: whether `app` will let a request in; of others nothing is read.
        """
        self._app = app
        self._hopeless = hopeless
        self._quotas = Quotas() if quotas is None else quotas
        self._api_key = api_key
        self._agents = agents
        self._traces = traces
        self._answered = answered
        self._lets_in = lets_in

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, names = _named(scope["headers"])
        fate = HttpFate(names=names)
        fate.operation = OPERATIONS.get(scope["path"], OTHER)
        if self._traces is not None and scope["method"] == "POST":
            fate.trace = self._traces.begin(scope["path"], headers, names["request_id"])
            headers = [pair for pair in headers if pair[0] not in PROPAGATION]
            if fate.trace is not None:
                names["trace_id"] = fate.trace.trace_id
        held = _Held(fate, send)
        token = FATE.set(fate)
        try:
            with bound_contextvars(**names):
                await self._serve({**scope, "headers": headers}, receive, held, fate)
        finally:
            FATE.reset(token)
            if fate.turn is not None:
                fate.turn.ended(time.monotonic(), served=fate.error is None)
            if fate.trace is not None:
                fate.trace.ended(held.status, complete=held.complete)
            if held.status and scope["path"] in ANSWERED_PATHS:
                self._answered(held.status)

    async def _serve(
        self, scope: MutableMapping[str, Any], receive: Receive, held: "_Held", fate: HttpFate
    ) -> None:
        tenants = self._quotas.tenants
        try:
            fate.terms = tenants.terms_of(scope["headers"])
        except RequestError as error:
            await _answer(held.send, HTTPStatus.BAD_REQUEST, str(error), [])
            return
        if self._api_key and scope["path"] in TENANT_PATHS and tenants.of_key(scope["headers"]) is not None:
            shown = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
            scope["headers"] = [*shown, (b"authorization", f"Bearer {self._api_key}".encode())]
        body: _Body | None = None
        if scope["method"] == "POST":
            receive = body = _Body(fate, tenants, receive)
        wanted = body is not None and scope["path"] in ANSWERED_PATHS and self._lets_in(scope)
        if body is not None and wanted and await body.read():
            fate.error = self._hopeless(fate.terms)
            if fate.error is None and self._agents is not None:
                fate.begin(self._agents)
        if fate.error is not None:
            told = fate.error
            await _answer(held.send, told.http_status, told.message, _retry_after(told))
        else:
            await self._app(scope, receive, held)


class _Body:
    """The receive channel of one request: looks at its body when all of it is there (see conductor.terms).

    The front end reads a body before it adds a request, and drops these fields of chats and completions.
    """

    def __init__(self, fate: HttpFate, tenants: Tenants, receive: Receive) -> None:
        self._fate = fate
        self._tenants = tenants
        self._receive = receive
        self._parts: list[bytes] = []
        self._known: deque[Message] = deque()

    async def read(self) -> bool:
        """Take the whole body, which the front end gets in one piece; return whether the client is there."""
        while True:
            message = await self._receive()
            whole = self._whole(message)
            if whole is not None:
                self._known.append({"type": "http.request", "body": whole, "more_body": False})
                return True
            if message["type"] != "http.request":
                self._known.append(message)
                return False

    async def __call__(self) -> Message:
        if self._known:
            return self._known.popleft()
        message = await self._receive()
        self._whole(message)
        return message

    def _whole(self, message: Message) -> bytes | None:
        """Return the body with its last part, else None; nothing of it is kept then."""
        if message["type"] != "http.request":
            return None
        self._parts.append(message.get("body", b""))
        if message.get("more_body"):
            return None
        body = b"".join(self._parts)  # no copy of a single part
        self._parts.clear()
        self._fate.terms = self._tenants.with_body(self._fate.terms, body)
        return body


class _Held:
    """The send channel of one response; its start waits for the first body chunk."""

    def __init__(self, fate: HttpFate, send: Send) -> None:
        self.status = 0  # 0: nothing was sent
        self.complete = False  # known of traced ones
        self._fate = fate
        self._send = send
        self._start: Message | None = None
        self._replaced = False

    async def send(self, message: Message) -> None:
        """Send, with what every answer says of its request."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_about(self._fate, message)]
        elif self._fate.trace is not None and not message.get("more_body"):
            self.complete = True
        await self._send(message)

    async def __call__(self, message: Message) -> None:
        if self._replaced:
            return  # the rest of a stream whose place an error took
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is not None:
            start, self._start = self._start, None
            error = self._fate.error
            if error is not None and start["status"] < 400:
                self._replaced = True
                await self._reject(error)
                return
            if error is not None:
                start["headers"] = [*start.get("headers", ()), *_retry_after(error)]
            elif self._fate.terms.says_class or self._fate.terms.tier:
                message = _told(self._fate.terms, start, message)
            await self.send(start)
        turn = self._fate.turn
        if turn is not None and turn.terms.tools and calls_tools(message.get("body", b"")):
            turn.calls_tools = True
        await self.send(message)

    async def _reject(self, error: Unavailable) -> None:
        await _answer(self.send, error.http_status, error.message, _retry_after(error))


def _told(terms: Terms, start: Message, message: Message) -> Message:
    """Let an answer say which class and tier it got: return its (first) body chunk, with `start` changed."""
    headers = [*start.get("headers", ()), (CLASS_HEADER, terms.slo_class.name.encode())]
    body = message.get("body", b"")
    if terms.tier and not message.get("more_body") and start["status"] == HTTPStatus.OK:
        # such quotes end no string in JSON, so these bytes are a field; the last one is the response's own
        for value in (b"null", json.dumps(terms.tier).encode()):
            before, field, after = body.rpartition(b'"service_tier":' + value)
            if field:
                tier = json.dumps(terms.slo_class.tier).encode()
                body = before + b'"service_tier":' + tier + after
                break
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        message = {**message, "body": body}
    start["headers"] = headers
    return message


def _named(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], dict[str, str]]:
    """Return the headers of a request with its id as the only one, and that id for log lines."""
    said, others = b"", []
    for pair in headers:
        if pair[0] == ID_HEADER:
            said = pair[1]
        else:
            others.append(pair)
    if not REQUEST_ID.fullmatch(said):
        said = secrets.token_hex(16).encode()
    others.append((ID_HEADER, said))
    return others, {"request_id": said.decode()}


def _about(fate: HttpFate, start: Message) -> list[tuple[bytes, bytes]]:
    about = []
    if all(name.lower() != ID_HEADER for name, _ in start.get("headers", ())):  # vLLM may have said it
        about.append((ID_HEADER, fate.names["request_id"].encode()))
    if fate.trace is not None:
        about.append((b"traceresponse", fate.trace.named.encode()))
    return about


async def _answer(
    send: Send, status: HTTPStatus, message: str, more_headers: list[tuple[bytes, bytes]]
) -> None:
    body = json.dumps(
        {"error": {"message": message, "type": status.phrase, "param": None, "code": status.value}}
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *more_headers,
    ]
    await send({"type": "http.response.start", "status": status.value, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _retry_after(error: Unavailable) -> list[tuple[bytes, bytes]]:
    if error.retry_after_s <= 0:
        return []
    return [(b"retry-after", str(math.ceil(error.retry_after_s)).encode())]
