"""The admin HTTP's sockets: threads of http.server; every answer comes from the process's own loop.

Loopback needs no token; without one, only requests that name a loopback host are answered, and those
that change something must say that they are JSON, so that no web page can send them.
"""

import asyncio
import concurrent.futures
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
import structlog

from kvstore.leader.admin_api import Answer
from mooncake.core.config import is_loopback
from mooncake.core.errors import ConfigError
from mooncake.core.http_server import BoundedHandler, BoundedServer, Serving

log = structlog.get_logger(__name__)

TOKEN_ENV = "MOONCAKE_ADMIN_TOKEN"
TOKEN_CHARS_MIN = 16
"""As of API keys: below this it can be guessed."""
CONNECTIONS_MAX = 64
"""Threads: operators, Prometheus and probes."""
ANSWER_S = 10.0
"""A listing of 16 M keys takes several seconds."""
BODY_BYTES_MAX = 2 << 20
"""16,384 keys in hexadecimal."""

Api = Callable[[str, str, Mapping[str, str], bytes], Coroutine[Any, Any, Answer]]
"""Method, path, query, body."""


def check_admin(host: str, port: int, token: str) -> None:
    """Refuse to serve a network without authentication.

    Raises:
        ConfigError: says what to do; never shows the token.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"admin_port={port}: 0 to 65535")
    if token and (len(token) < TOKEN_CHARS_MIN or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"admin token: at least {TOKEN_CHARS_MIN} printable ASCII characters")
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"admin_host={host!r}: others can reach it: set {TOKEN_ENV} or give --admin-token-file, "
            "or bind 127.0.0.1"
        )


class AdminServer:
    """Serves an Api over HTTP, from `start` to `close`."""

    def __init__(self, api: Api, host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        """Nothing is bound before `start`; raises as check_admin."""
        check_admin(host, port, token)
        self._api = api
        self._host = host
        self._port = port
        self._token = token
        self._serving: Serving | None = None

    def start(self) -> str:
        """Listen; return the URL. To be called on the loop that shall answer.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        loop = asyncio.get_running_loop()
        try:
            server = _Server((self._host, self._port), self._api, self._token, loop)
        except OSError as error:
            raise ConfigError(f"admin HTTP on {self._host}:{self._port}: {error}") from error
        self._serving = Serving(server, "admin")
        return self._serving.url

    def close(self) -> None:
        """Stop listening (idempotent); not to be called on the loop."""
        if self._serving is not None:
            self._serving.close()


class _Server(BoundedServer):
    def __init__(
        self, address: tuple[str, int], api: Api, token: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.api = api
        self.token = token.encode()
        self.loop = loop
        super().__init__(address, _Handler, CONNECTIONS_MAX)


class _Handler(BoundedHandler):
    server: _Server
    body_bytes_max = BODY_BYTES_MAX

    def _serve(self) -> None:
        body = self.read_body()
        if body is None:
            return
        if refusal := self._refusal():
            self._answer(refusal)
            return
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        coming = self.server.api(self.command, urllib.parse.unquote(url.path), query, body)
        try:
            handled = asyncio.run_coroutine_threadsafe(coming, self.server.loop)
        except RuntimeError:
            coming.close()
            self._answer(Answer(503, {"error": "the directory is stopping"}))
            return
        try:
            error = handled.exception(ANSWER_S)
        except (TimeoutError, concurrent.futures.CancelledError):
            handled.cancel()
            self._answer(Answer(503, {"error": f"not answered within {ANSWER_S:g} s: the directory is busy"}))
            return
        if error is not None:
            log.error("admin.died", path=url.path, exc_info=error)
            self._answer(Answer(500, {"error": f"{type(error).__name__}: {error}"}))
            return
        self._answer(handled.result())

    def _refusal(self) -> Answer | None:
        if refusal := self.not_let_in(self.server.token):
            return Answer(refusal[0], {"error": refusal[1]})
        if self.server.token:
            return None
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if self.command == "POST" and kind != "application/json":
            return Answer(415, {"error": "send Content-Type: application/json"})
        return None

    def refuse(self, status: int, text: str) -> None:
        self._answer(Answer(status, {"error": text}))

    def _answer(self, answer: Answer) -> None:
        body = answer.text or msgspec.json.encode(answer.body) + b"\n"
        kind = "text/plain; version=0.0.4; charset=utf-8" if answer.text else "application/json"
        headers = {"WWW-Authenticate": "Bearer"} if answer.status == 401 else {}
        self.reply(answer.status, body, kind, headers)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = _serve  # noqa: N815 - http.server's
