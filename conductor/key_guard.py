"""Who may use the gateway's HTTP port when there is an API key: all but probes show it.

vLLM's own check covers /v1 and /inference. Beside these its app answers /invocations, which is inference
under another name, /tokenize, /scale_elastic_ep, /metrics with tenants' names, ...: what a release adds is
closed here from its first day.
"""

import hmac
import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from conductor.http import App, Message, Receive, Send

OPEN_PATHS = frozenset(("/health", "/ping"))
"""What balancers ask, who have no key: answered with a status and nothing else."""
METRICS = "/metrics"
_REFUSED = json.dumps({"error": "Unauthorized"}).encode()
_POLICY_VIOLATION = 1008
"""Code that ends a websocket (RFC 6455)."""


class KeyGuard:
    """ASGI middleware, the last before vLLM's app."""

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        """No `keys`: everybody may ask, as on loopback."""
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if not self.lets_in(scope):
            await _refuse(scope, send)
            return
        if _path(scope).startswith(METRICS):
            # vLLM negotiates below its path: the OpenMetrics encoder would write vllm:x as vllm_x
            headers = [pair for pair in scope["headers"] if pair[0] != b"accept"]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)

    def lets_in(self, scope: Message) -> bool:
        """Return whether a request may be served."""
        if not self._keys or _path(scope) in OPEN_PATHS or scope.get("method") == "OPTIONS":
            return True  # by OPTIONS browsers ask first, without a key
        shown = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        return scheme.lower() == b"bearer" and any(hmac.compare_digest(key, one) for one in self._keys)


def _path(scope: Message) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _refuse(scope: Message, send: Send) -> None:
    if scope["type"] == "websocket":
        close: dict[str, Any] = {"type": "websocket.close", "code": _POLICY_VIOLATION}
        await send(close)
        return
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_REFUSED)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": HTTPStatus.UNAUTHORIZED.value, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSED})
