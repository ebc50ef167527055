"""Prometheus metrics over HTTP on loopback, for processes that serve no HTTP otherwise.

Metrics never stop what they measure: a port that is taken is a warning, and is tried again.
"""

import asyncio
import contextlib
import socket
import threading

import structlog
from prometheus_client import CollectorRegistry, start_http_server

log = structlog.get_logger(__name__)

LOOPBACK = "127.0.0.1"
BIND_RETRY_S = 1.0
"""A port is taken while its last holder, or a connection made from it, still lives."""


def metrics_url(port: int) -> str:
    """Return where a process of this machine serves its metrics; "" = nowhere."""
    return f"http://{LOOPBACK}:{port}/metrics" if port else ""


class MetricsServer:
    """Serves a registry in its own thread, until closed. SO_REUSEADDR is set (http.server does)."""

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        """Port 0 is chosen by the system; `port` is right after the first bind."""
        self._registry = registry
        self.port = port
        self._bound: contextlib.ExitStack | None = None
        self._retry: asyncio.Task[None] | None = None

    @property
    def bound(self) -> bool:
        """Whether scrapes are answered."""
        return self._bound is not None

    def start(self) -> None:
        """Bind now, or as soon as the port is free. Needs a running loop for the latter."""
        try:
            self._bind()
        except OSError as error:
            log.warning("metrics.cannot_bind", port=self.port, error=str(error), retry_s=BIND_RETRY_S)
            self._retry = asyncio.create_task(self._keep_trying(), name="metrics bind")

    def _bind(self) -> None:
        server, thread = start_http_server(self.port, addr=LOOPBACK, registry=self._registry)
        self.port = int(server.server_port)
        self._bound = contextlib.ExitStack()
        self._bound.callback(server.server_close)
        self._bound.callback(thread.join)
        self._bound.callback(self._wake)
        # shutdown() itself would wait for the thread, which looks up every 0.5 s or when asked
        self._bound.callback(threading.Thread(target=server.shutdown, daemon=True).start)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((LOOPBACK, self.port), BIND_RETRY_S).close()

    async def _keep_trying(self) -> None:
        while True:
            await asyncio.sleep(BIND_RETRY_S)
            with contextlib.suppress(OSError):
                self._bind()
                log.info("metrics.bound", port=self.port)
                return

    async def close(self) -> None:
        """Stop and release the port."""
        if self._retry:
            self._retry.cancel()
            await asyncio.gather(self._retry, return_exceptions=True)
        if self._bound:
            await asyncio.to_thread(self._bound.close)
        self._bound = self._retry = None
