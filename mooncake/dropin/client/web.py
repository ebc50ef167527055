"""HTTP of client processes: threads of http.server, loopback without a token, beyond it only with one.

Who may ask: without a token only requests that name a loopback host and do not come from a web page (these
show an Origin whenever they could change something); with a token those that show it.
"""

import urllib.parse
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from kvstore.leader.admin_http import TOKEN_ENV, check_admin
from mooncake.core.config import is_loopback
from mooncake.core.errors import ConfigError
from mooncake.core.http_server import BoundedHandler, BoundedServer, Serving

LOOPBACK = "127.0.0.1"
JSON = "application/json; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"

log = structlog.get_logger(__name__)


class Reply(msgspec.Struct, frozen=True):
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = JSON
    allow: str = ""


def json_reply(status: int, value: Any) -> Reply:
    """Return `value` as JSON."""
    return Reply(status, msgspec.json.encode(value))


Answer = Callable[[str, str, bytes], Reply]
"""Method, path as it was sent (percent-encoded, without its query), body; called in the caller's thread."""


class WebServer:
    """Serves an Answer, from `start` to `close`."""

    def __init__(
        self,
        answer: Answer,
        host: str,
        port: int,
        token: str = "",
        *,
        body_bytes_max: int = 0,
        connections_max: int = 16,
    ) -> None:
        """Nothing is bound before `start`.

        Raises:
            ConfigError: others can reach `host` and there is no token.
        """
        if not is_loopback(host) and not token:
            raise ConfigError(f"host={host!r}: others can reach it: set {TOKEN_ENV}, or use {LOOPBACK}")
        check_admin(LOOPBACK, port, token)
        self.port = port
        self._host = host
        self._serving: Serving | None = None
        self._settings = (answer, token, body_bytes_max, connections_max)

    def start(self) -> str:
        """Listen; return the URL.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        try:
            server = _Server((self._host, self.port), *self._settings)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"HTTP on {self._host}:{self.port}: {error}") from error
        self._serving = Serving(server, "http")
        self.port = self._serving.port
        return self._serving.url

    def close(self) -> None:
        """Stop listening (idempotent)."""
        if self._serving is not None:
            self._serving.close()


class _Server(BoundedServer):
    def __init__(
        self, address: tuple[str, int], answer: Answer, token: str, body_bytes_max: int, connections_max: int
    ) -> None:
        self.answer = answer
        self.token = token.encode()
        self.body_bytes_max = body_bytes_max
        super().__init__(address, _Handler, connections_max)


class _Handler(BoundedHandler):
    server: _Server

    def _serve(self) -> None:
        if refusal := self._refusal():
            self.close_connection = True  # its body is not read
            self._reply(refusal)
            return
        self.body_bytes_max = self.server.body_bytes_max  # type: ignore[misc]  # of this server, not of all
        body = self.read_body()
        if body is not None:
            self._reply(self.server.answer(self.command, urllib.parse.urlsplit(self.path).path, body))

    def _refusal(self) -> Reply | None:
        if refusal := self.not_let_in(self.server.token):
            return json_reply(refusal[0], {"error": refusal[1]})
        if self.server.token:
            return None
        if self.headers.get("Origin"):
            return json_reply(403, {"error": "without a token no web page is answered"})
        return None

    def _reply(self, reply: Reply) -> None:
        headers = {"Allow": reply.allow} if reply.allow else {}
        if reply.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self.reply(reply.status, reply.body, reply.content_type, headers)

    def refuse(self, status: int, text: str) -> None:
        self._reply(json_reply(status, {"error": text}))

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = do_OPTIONS = _serve  # noqa: N815
