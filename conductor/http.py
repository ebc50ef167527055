"""What we add to vLLM's HTTP app: terms from headers, real statuses for rejected streams, Retry-After.

vLLM starts a streaming response before its first token, so a request turned away later would get
200 and an error inside the stream. `RejectionMiddleware` holds the response's start until its first
body chunk (which vLLM sends with the first token anyway) and answers 429 or 503 with Retry-After
when the dispatcher rejected the request meanwhile.
"""

import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from conductor.terms import DEFAULT_TERMS, Terms, terms_of
from conductor.vllm_seam import Unavailable
from mooncake.core.errors import RequestError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class HttpFate:
    """What an HTTP request asks for, and whether it was turned away; shared by its tasks."""

    def __init__(self, terms: Terms = DEFAULT_TERMS) -> None:
        self.terms = terms
        self.error: Unavailable | None = None


FATE: ContextVar[HttpFate | None] = ContextVar("mooncake_http_fate", default=None)
"""Set per HTTP request; tasks that serve it inherit the same object."""


class RejectionMiddleware:
    """ASGI middleware; costs two attribute tests per body chunk."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            fate = HttpFate(terms_of(scope["headers"]))
        except RequestError as error:
            await _answer(send, HTTPStatus.BAD_REQUEST, str(error), [])
            return
        token = FATE.set(fate)
        try:
            await self._app(scope, receive, _Held(fate, send))
        finally:
            FATE.reset(token)


class _Held:
    """The send channel of one response; its start waits for the first body chunk."""

    def __init__(self, fate: HttpFate, send: Send) -> None:
        self._fate = fate
        self._send = send
        self._start: Message | None = None
        self._replaced = False

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
            await self._send(start)
        await self._send(message)

    async def _reject(self, error: Unavailable) -> None:
        await _answer(self._send, error.http_status, error.message, _retry_after(error))


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
