"""The admin server of a process: metrics, health, drain, and what else is registered, in threads of its own.

It answers whatever the process's own loop does: that is what makes /livez mean something. Health is told to
everybody who can connect, in a word and a reason; everything else needs the token (MOONCAKE_ADMIN_TOKEN),
without which it is bound to loopback only and answers loopback names only.
It never stops what it serves: a port that is taken is a warning, and is tried again.
"""

import gzip
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from mooncake.core.config import LOOPBACK, host_port, is_loopback, seen_at
from mooncake.core.health import Health, Verdict
from mooncake.core.http_server import BoundedHandler, BoundedServer, Serving

log = structlog.get_logger(__name__)

BIND_RETRY_S = 1.0
"""A port is taken while its last holder, or a connection made from it, still lives."""
CONNECTIONS_MAX = 32
"""Probes, a few scrapers, a few people with the live page open."""
BODY_BYTES_MAX = 1 << 20
"""Nothing that is sent here is larger than a file of settings."""
GZIP_BYTES_MIN = 4096
JSON, TEXT = "application/json", "text/plain; charset=utf-8"


class Asked(msgspec.Struct, frozen=True):
    """A request. `path` is decoded and has no query; header names are lower case."""

    method: str
    path: str
    query: dict[str, str] = {}
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Answer(msgspec.Struct, frozen=True):
    """What to say."""

    status: int
    body: bytes
    content_type: str = TEXT
    headers: dict[str, str] = {}


Handle = Callable[[Asked], Answer]
"""Runs in a thread of the server, several at once; touches an event loop by call_soon_threadsafe only."""


class _Route(msgspec.Struct, frozen=True):
    handle: Handle
    methods: tuple[str, ...]
    needs_token: bool


class Drains(msgspec.Struct, frozen=True):
    """What POST and GET /drain do; both are called from threads of the server."""

    begin: Callable[[str], None]  # with why, for people
    in_flight: Callable[[], int]
    is_done: Callable[[], bool]


def json_answer(status: int, value: object) -> Answer:
    """Return `value` as JSON."""
    return Answer(status, msgspec.json.encode(value) + b"\n", JSON)


def metrics_url(port: int, host: str = LOOPBACK, address: str = "") -> str:
    """Return where others find the metrics of a process; "" = nowhere.

    `address`: of this host for the cluster, where `host` is all of its addresses.
    """
    return f"http://{host_port(seen_at(host, address or LOOPBACK), port)}/metrics" if port else ""


class AdminServer:
    """Routes and the thread that serves them: `start`, `close`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        port: int,
        *,
        host: str = LOOPBACK,
        token: str = "",
        health: Health | None = None,
        drains: Drains | None = None,
    ) -> None:
        """Nothing is bound before `start`.

        Args:
            registry: of the metrics.
            port: 0 is chosen by the system; `port` is right after the first bind.
            host: to bind; others than loopback need a token (core.config checks that).
            token: shown as `Authorization: Bearer TOKEN`; "" = loopback names only.
            health: of this process; None = a process that has nothing to say of it.
            drains: how it is told to go; None = it cannot be, but by signals.
        """
        self._registry = registry
        self._host = host
        self.port = port
        self._token = token.encode("latin-1", "replace")
        self._health = Health() if health is None else health
        self._drains = drains
        self._routes: dict[str, _Route] = {}
        self._serving: Serving | None = None
        self._closed = threading.Event()
        self._trying: threading.Thread | None = None
        for path, ask in (
            ("/livez", lambda: self._health.alive_now(time.monotonic())),
            ("/startupz", self._health.started_now),
            ("/readyz", self._health.ready_now),
        ):
            self.route(path, _verdict(ask), needs_token=False)
        self.route("/metrics", self._metrics)
        if drains is not None:
            self.route("/drain", self._drain, methods=("GET", "POST"))

    def route(
        self, path: str, handle: Handle, *, methods: tuple[str, ...] = ("GET",), needs_token: bool = True
    ) -> None:
        """Answer `path` from now on; one that ends with a slash answers all below it (the longest first)."""
        if not is_loopback(self._host) and not self._token and needs_token:
            log.error("admin.no_token", path=path, host=self._host)  # options were not checked: refuse
            return
        self._routes = {**self._routes, path: _Route(handle, methods, needs_token)}

    # ------------------------------------------------------------ life

    @property
    def bound(self) -> bool:
        """Whether requests are answered."""
        return self._serving is not None

    @property
    def url(self) -> str:
        """Where, on this machine; "" while it is not bound."""
        return self._serving.url if self._serving else ""

    def start(self) -> None:
        """Bind now, or as soon as the port is free."""
        try:
            self._bind()
        except OSError as error:
            log.warning("admin.cannot_bind", port=self.port, error=str(error), retry_s=BIND_RETRY_S)
            self._trying = threading.Thread(target=self._keep_trying, name="admin bind", daemon=True)
            self._trying.start()

    def _bind(self) -> None:
        self._serving = Serving(_Server((self._host, self.port), self), "admin")
        self.port = self._serving.port

    def _keep_trying(self) -> None:
        while not self._closed.wait(BIND_RETRY_S):
            try:
                self._bind()
            except OSError as error:
                log.debug("admin.cannot_bind", port=self.port, error=str(error))
            else:
                log.info("admin.bound", port=self.port)
                return

    def close(self) -> None:
        """Stop and release the port (idempotent); takes milliseconds."""
        self._closed.set()
        if self._trying is not None:
            self._trying.join()
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.close()

    # ------------------------------------------------------------ requests

    def answer(self, asked: Asked, let_in: Callable[[bytes], tuple[int, str] | None]) -> Answer:
        """Return what to say; `let_in` returns status and text for who may not know."""
        route = self._find(asked.path)
        refusal = let_in(self._token) if route is None or route.needs_token else None
        if refusal is not None:
            headers = {"WWW-Authenticate": "Bearer"} if refusal[0] == 401 else {}
            return Answer(refusal[0], f"{refusal[1]}\n".encode(), headers=headers)
        if route is None:
            return Answer(404, f"no such path; there are {', '.join(sorted(self._routes))}\n".encode())
        method = "GET" if asked.method == "HEAD" else asked.method
        if method not in route.methods:
            return Answer(405, b"method not allowed\n", headers={"Allow": ", ".join(route.methods)})
        return route.handle(asked)

    def _find(self, path: str) -> _Route | None:
        if exact := self._routes.get(path):
            return exact
        above = [one for one in self._routes if one.endswith("/") and path.startswith(one)]
        return self._routes[max(above, key=len)] if above else None

    def _metrics(self, asked: Asked) -> Answer:
        # never OpenMetrics, which Prometheus would rather have: that encoder writes vllm:x as vllm_x
        body = generate_latest(self._registry)
        if len(body) >= GZIP_BYTES_MIN and "gzip" in asked.headers.get("accept-encoding", ""):
            return Answer(200, gzip.compress(body, 1), CONTENT_TYPE_PLAIN_0_0_4, {"Content-Encoding": "gzip"})
        return Answer(200, body, CONTENT_TYPE_PLAIN_0_0_4)

    def _drain(self, asked: Asked) -> Answer:
        assert self._drains is not None
        if asked.method == "POST":
            self._drains.begin("asked for")
        state = "drained" if self._drains.is_done() else str(self._health.phase)
        status = 202 if asked.method == "POST" else 200
        return json_answer(status, {"state": state, "in_flight": self._drains.in_flight()})


def _verdict(ask: Callable[[], Verdict]) -> Handle:
    def answer(asked: Asked) -> Answer:  # noqa: ARG001
        verdict = ask()
        return Answer(200 if verdict.ok else 503, f"{verdict.why}\n".encode())

    return answer


class _Server(BoundedServer):
    def __init__(self, address: tuple[str, int], admin: AdminServer) -> None:
        self.admin = admin
        super().__init__(address, _Handler, CONNECTIONS_MAX)


class _Handler(BoundedHandler):
    body_bytes_max = BODY_BYTES_MAX
    server: _Server

    def _serve(self) -> None:
        body = self.read_body()
        if body is None:
            return
        parts = urllib.parse.urlsplit(self.path)
        asked = Asked(
            method=self.command,
            path=urllib.parse.unquote(parts.path),
            query=dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True)),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=body,
        )
        try:
            answer = self.server.admin.answer(asked, self.not_let_in)
        except Exception:  # one page must not look like the end of the process
            log.exception("admin.failed", path=asked.path)
            answer = Answer(500, b"failed: see the log of this process\n")
        self.reply(answer.status, answer.body, answer.content_type, answer.headers)

    do_GET = do_HEAD = do_POST = _serve  # noqa: N815 - http.server's names

    def refuse(self, status: int, text: str) -> None:
        self.reply(status, f"{text}\n".encode(), TEXT)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Probes come every few seconds: nobody wants to read of them."""
