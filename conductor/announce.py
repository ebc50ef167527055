"""A gateway that is about to leave says so on its API port too, to balancers that know no admin port."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mooncake.core.health import Health, Phase

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]
PATH = "/health"
"""vLLM's own, which says that all is well as long as anything answers."""


class DrainAnnounced:
    """ASGI: GET /health is 503 while the process drains; all else passes."""

    def __init__(self, app: App, health: Health) -> None:
        """`app`: asked otherwise."""
        self._app, self._health = app, health

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve one request."""
        if self._health.phase is not Phase.DRAINING or scope.get("path") != PATH:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
