"""Standard threads serve HTTP, with bounds on connections, idleness and bodies; for a few callers."""

import hmac
import socket
import socketserver
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import structlog

from mooncake.core.config import host_port, is_loopback

log = structlog.get_logger(__name__)

IDLE_S = 10.0
"""A connection on which nothing happens for that long is closed."""
SAFE = ("GET", "HEAD")
"""Methods that change nothing."""
TICK_S = 0.05
"""How soon `close` is noticed."""


class BoundedServer(ThreadingHTTPServer):
    """Closes what comes when `connections_max` threads are at work."""

    daemon_threads = True
    block_on_close = False  # daemon threads of idle clients end with their connection

    def __init__(
        self, address: tuple[str, int], handler: type["BoundedHandler"], connections_max: int
    ) -> None:
        """Bind; an address with colons is IPv6. Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(connections_max)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind. http.server would ask for our name besides: seconds, where no resolver answers."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """See socketserver."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """See socketserver."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log; a client that broke off is its own problem."""
        log.debug("http.connection_broke", client=client_address, error=repr(sys.exc_info()[1]))


class Serving:
    """A bound server that serves in a thread of its own, until `close`."""

    def __init__(self, server: BoundedServer, name: str) -> None:
        """Begin; `name` is the thread's."""
        self._server: BoundedServer | None = server
        host, self.port = str(server.server_address[0]), int(server.server_address[1])
        self.url = f"http://{host_port(host, self.port)}"
        self.thread = threading.Thread(target=server.serve_forever, args=(TICK_S,), name=name, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop listening (idempotent)."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self.thread.join(IDLE_S)


class BoundedHandler(BaseHTTPRequestHandler):
    """Reads whole bodies of at most `body_bytes_max`; subclasses answer."""

    protocol_version = "HTTP/1.1"
    server_version = "mooncake"
    sys_version = ""
    timeout = IDLE_S
    body_bytes_max: ClassVar[int]

    def refuse(self, status: int, text: str) -> None:
        """Answer a request whose body is not read."""
        raise NotImplementedError

    def not_let_in(self, token: bytes) -> tuple[int, str] | None:
        """Return status and text for who does not show `token`; with b"" only loopback names are let in.

        A web page can send requests to loopback, but neither the token nor another Host than its own; and a
        browser says whose page it is (Origin) with whatever changes something. Only our own may.
        """
        if token:
            shown = self.headers.get("Authorization", "").encode("latin-1", "replace")
            if hmac.compare_digest(shown, b"Bearer " + token):
                return None
            return 401, "show the token: Authorization: Bearer TOKEN"
        named = self.headers.get("Host", "localhost")
        host = urllib.parse.urlsplit(f"//{named}").hostname or ""
        if not is_loopback(host):
            return 403, f"Host {host!r}: without a token only loopback names are answered"
        origin = self.headers.get("Origin", "")
        if origin and self.command not in SAFE and origin != f"http://{named}":
            return 403, f"Origin {origin!r}: without a token no web page may {self.command}"
        return None

    def read_body(self) -> bytes | None:
        """Return the request's body; None if it has been refused, or the client has left."""
        length = self.headers.get("Content-Length", "0").strip()
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            self.close_connection = True  # the body is still in the pipe
            self.refuse(411, "Content-Length is required")
            return None
        size = int(length) if len(length) < 20 else self.body_bytes_max + 1
        if size > self.body_bytes_max:
            self.close_connection = True
            self.refuse(413, f"Maximum request body size {self.body_bytes_max} exceeded.")
            return None
        body = self.rfile.read(size)
        if len(body) < size:
            self.close_connection = True
            return None
        return body

    def reply(
        self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None
    ) -> None:
        """Send an answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Log requests for those who look for them."""
        log.debug("http.request", client=self.client_address[0], what=format % args)
