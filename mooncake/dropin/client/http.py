"""HTTP of a client process, as upstream's: `setup(enable_client_http_server=True, client_http_port=9300)`.

GET /health             200 {"status": "healthy", "code": 0}, else 503
GET /metrics            Prometheus
GET /metrics/summary    the same for a reader

On loopback; MOONCAKE_CLIENT_HTTP_HOST names another address, and then MOONCAKE_ADMIN_TOKEN is needed. A port
that cannot be had is a warning: metrics never stop what they measure.
"""

import os
import time
from collections.abc import Callable, Sequence

import structlog

from kvstore.client.model import Place
from kvstore.leader.admin_http import TOKEN_ENV
from mooncake.core.errors import ConfigError
from mooncake.dropin.client.counters import BATCH_GET, BATCH_PUT, GET, PUT, Counters
from mooncake.dropin.client.web import LOOPBACK, Reply, WebServer
from mooncake.dropin.store.calls import Calls, Parts
from mooncake.dropin.store.start import Settings, Started
from mooncake.dropin.store.types import OK, ReplicateConfig

HOST_ENV = "MOONCAKE_CLIENT_HTTP_HOST"
HEALTHY = 0
NO_MASTER = 2
"""As health_check answers."""
CONNECTIONS_MAX = 16
"""Prometheus and probes."""
METRICS = "text/plain; version=0.0.4"
PLAIN = "text/plain"
JSON = "application/json"

log = structlog.get_logger(__name__)


class ClientHttp:
    """The endpoints, from `start` to `close`."""

    def __init__(self, counters: Counters, healthy: Callable[[], bool], port: int) -> None:
        """Nothing is bound before `start`; `port` 0 = any."""
        self.counters = counters
        self.url = ""
        self._healthy = healthy
        self._port = port
        self._web: WebServer | None = None

    def start(self) -> None:
        """Listen, or warn."""
        host = os.environ.get(HOST_ENV, "").strip() or LOOPBACK
        token = os.environ.get(TOKEN_ENV, "").strip()
        try:
            web = WebServer(self.answer, host, self._port, token, connections_max=CONNECTIONS_MAX)
            self.url = web.start()
        except ConfigError as error:
            log.warning("mooncake.store: no HTTP of this client", reason=str(error))
        else:
            self._web = web

    def close(self) -> None:
        """Stop listening (idempotent)."""
        web, self._web = self._web, None
        if web is not None:
            web.close()

    def answer(self, method: str, path: str, body: bytes) -> Reply:  # noqa: ARG002 - there is none
        """Return the answer to one request; see web.Answer."""
        if method in ("GET", "HEAD"):
            if path == "/health":
                if self._healthy():
                    return Reply(200, b'{"status":"healthy","code":%d}' % HEALTHY, JSON)
                return Reply(503, b'{"status":"master_unreachable","code":%d}' % NO_MASTER, JSON)
            if path == "/metrics":
                return Reply(200, self.counters.metrics().encode(), METRICS)
            if path == "/metrics/summary":
                return Reply(200, self.counters.summary().encode(), PLAIN)
        return Reply(404, b"404 Not Found", PLAIN)


class CountedCalls(Calls):
    """Calls, counted."""

    def __init__(self, started: Started, http: ClientHttp) -> None:
        """Count for `http`, which is not closed here."""
        super().__init__(started)
        self.http = http

    def put(
        self,
        names: Sequence[str],
        sources: Sequence[Parts],
        config: ReplicateConfig | None,
        *,
        replace: bool = False,
    ) -> list[int]:
        """See Calls."""
        begun_s = time.perf_counter()
        codes = super().put(names, sources, config, replace=replace)
        moved = sum(
            part.nbytes for parts, code in zip(sources, codes, strict=True) if code == OK for part in parts
        )
        one = len(names) == 1
        self._note("PutStart", one, begun_s, PUT if one else BATCH_PUT, moved)
        return codes

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """See Calls."""
        begun_s, moved, one = time.perf_counter(), 0, len(names) == 1
        try:
            values = super().get(names)
            moved = sum(len(value) for value in values if value)
        finally:
            self._note("GetReplicaList", one, begun_s, GET if one else BATCH_GET, moved)
        return values

    def get_into(self, names: Sequence[str], targets: Sequence[Parts]) -> list[int]:
        """See Calls."""
        begun_s, one = time.perf_counter(), len(names) == 1
        codes = super().get_into(names, targets)
        moved = sum(code for code in codes if code > 0)
        self._note("GetReplicaList", one, begun_s, GET if one else BATCH_GET, moved)
        return codes

    def sizes(self, names: Sequence[str]) -> list[int]:
        """See Calls."""
        begun_s = time.perf_counter()
        codes = super().sizes(names)
        self._note("ExistKey", len(names) == 1, begun_s)
        return codes

    def places(self, names: Sequence[str]) -> list[list[Place]]:
        """See Calls."""
        begun_s = time.perf_counter()
        try:
            return super().places(names)
        finally:
            self._note("GetReplicaList", len(names) == 1, begun_s)

    def remove(self, names: Sequence[str], force: bool) -> list[int]:
        """See Calls."""
        begun_s = time.perf_counter()
        codes = super().remove(names, force)
        self._note("Remove", len(names) == 1, begun_s)
        return codes

    def _note(self, rpc: str, one: bool, begun_s: float, transfer: str = "", moved: int = 0) -> None:
        past_s = time.perf_counter() - begun_s
        self.http.counters.note(rpc if one else f"Batch{rpc}", past_s, transfer=transfer, size_bytes=moved)


def calls_of(started: Started, settings: Settings) -> Calls:
    """Return the calls of `started`; counted, and shown until it is closed, where `settings` ask for it."""
    if not settings.enable_client_http_server:
        return Calls(started)
    http = ClientHttp(Counters(), started.background.has_master, settings.client_http_port)
    http.start()
    started.on_close(http.close)
    return CountedCalls(started, http)
