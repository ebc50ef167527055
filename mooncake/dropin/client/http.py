"""HTTP of a client process, as upstream's: `setup(enable_client_http_server=True, client_http_port=9300)`.

GET /health             200 {"status": "healthy", "code": 0}, else 503
GET /metrics            Prometheus
GET /metrics/summary    the same for a reader

On loopback; MOONCAKE_CLIENT_HTTP_HOST names another address, and then MOONCAKE_ADMIN_TOKEN is needed. A port
that cannot be had is a warning: metrics never stop what they measure.
"""

import os
from collections.abc import Callable

import structlog

from mooncake.core.config import admin_token
from mooncake.core.errors import ConfigError
from mooncake.dropin.client.counters import Counters
from mooncake.dropin.client.web import LOOPBACK, Reply, WebServer

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
        try:
            web = WebServer(self.answer, host, self._port, admin_token(), connections_max=CONNECTIONS_MAX)
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
