"""The indexer's sockets: threads of http.server, each with a connection that may stay.

Loopback needs no key; without one, only requests that name a loopback host are answered, and those that send
something must say that it is JSON or msgpack, so that no web page can send them.
"""

import asyncio
import urllib.parse
from typing import ClassVar

import msgspec
import structlog

from conductor.indexer.api import JSON, PACKED, Api
from conductor.indexer.requests import TOKENS_MAX, Wrong
from mooncake.core.config import check_host, fail
from mooncake.core.errors import ConfigError
from mooncake.core.http_server import BoundedHandler, BoundedServer, Serving

log = structlog.get_logger(__name__)

PORT = 13333
"""Upstream's."""
CONNECTIONS_MAX = 256
"""Threads: routers keep a few connections each."""
BODY_BYTES_MAX = 8 * TOKENS_MAX
"""Seven digits and a comma for each token."""
STARTED_IDLE_S = 75.0
"""A router's idle connection is kept for as long as its client usually does."""


class IndexerServer:
    """Serves an Api from `start` to `close`."""

    def __init__(self, api: Api, host: str, port: int, api_key: str) -> None:
        """Bind nothing before `start`; raises ConfigError for an open address without a key."""
        check_host(host, api_key)
        if not 0 <= port < 1 << 16:
            raise fail("port", port, "must be 0..65535")
        self._api, self._host, self._port, self._key = api, host, port, api_key
        self._serving: Serving | None = None

    def start(self) -> str:
        """Listen; return the URL.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        try:
            server = _Server((self._host, self._port), self._api, self._key.encode())
        except OSError as error:
            raise ConfigError(f"indexer on {self._host}:{self._port}: {error}") from error
        self._serving = Serving(server, "indexer")
        return self._serving.url

    async def close(self) -> None:
        """Stop listening (idempotent)."""
        if self._serving is not None:
            await asyncio.to_thread(self._serving.close)


class _Server(BoundedServer):
    request_queue_size = 128  # routers open their connections at once

    def __init__(self, address: tuple[str, int], api: Api, key: bytes) -> None:
        self.api = api
        self.key = key
        super().__init__(address, _Handler, CONNECTIONS_MAX)


class _Handler(BoundedHandler):
    server: _Server
    body_bytes_max: ClassVar[int] = BODY_BYTES_MAX
    timeout = STARTED_IDLE_S
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        if refusal := self.not_let_in(self.server.key):
            self.close_connection = True  # its body is not read
            self.refuse(*refusal)
            return
        body = self.read_body()
        if body is None:
            return
        kind = self.headers.get("Content-Type", "")
        plain = kind.partition(";")[0].strip().lower()
        if self.command == "POST" and not self.server.key and plain != JSON and plain not in PACKED:
            self.refuse(415, "send Content-Type: application/json or application/msgpack")
            return
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        try:
            answer = self.server.api.answer(self.command, url.path, query, kind, body)
        except Exception as error:  # one thread's bug must not look like a lost connection
            log.exception("indexer.failed", path=url.path)
            self.refuse(500, f"Internal server error: {type(error).__name__}")
            return
        self.reply(answer.status, answer.body, answer.content_type)

    def refuse(self, status: int, text: str) -> None:
        body = msgspec.json.encode(Wrong(text)) + b"\n"
        self.reply(status, body, JSON, {"WWW-Authenticate": "Bearer"} if status == 401 else None)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = _serve  # noqa: N815 - http.server's
