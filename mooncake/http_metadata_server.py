"""`mooncake_http_metadata_server`: a small key-value store over HTTP, with upstream Mooncake's protocol.

    GET | PUT | DELETE  /metadata?key=NAME

Status codes and bodies are those measured on upstream's server (0.3.13.post1). It differs in what it takes:
it listens on loopback unless told otherwise, and beyond loopback only with a shared secret (MOONCAKE_SECRET
or MOONCAKE_SECRET_FILE), which every request has to prove then; keys, bytes and connections are bounded.
"""

import argparse
import enum
import os
import signal
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence

import structlog

from mooncake.core import log as logs
from mooncake.core.config import is_loopback
from mooncake.core.errors import ConfigError
from mooncake.core.http_server import BoundedHandler, BoundedServer, Serving
from mooncake.core.secret import read_secret
from transfer.naming import proves

PORT = 8080
KEYS_MAX = 100_000
KEY_CHARS_MAX = 1024
VALUE_BYTES_MAX = 1 << 20
"""Upstream's limit, which is aiohttp's default."""
TOTAL_BYTES_MAX = 256 << 20
CONNECTIONS_MAX = 256
"""Threads; a client asks once and goes."""
JSON_TEXT = "application/json; charset=utf-8"
"""What upstream calls its plain texts."""

log = structlog.get_logger(__name__)


class KVPoll(enum.Enum):
    """State of a server (upstream's names and numbers)."""

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class _Table:
    """Keys and values, bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._bytes = 0

    def get(self, key: str) -> tuple[int, bytes, str]:
        with self._lock:
            value = self._values.get(key)
        return (404, b"metadata not found", JSON_TEXT) if value is None else (200, value, "application/json")

    def put(self, key: str, value: bytes) -> tuple[int, bytes, str]:
        with self._lock:
            old = self._values.get(key)
            if old is not None and "rpc_meta" in key:  # upstream's clients rely on it: one owner per port
                return 400, b"Duplicate rpc_meta key not allowed", JSON_TEXT
            total = self._bytes + len(key) + len(value) - (len(key) + len(old) if old is not None else 0)
            if (old is None and len(self._values) >= KEYS_MAX) or total > TOTAL_BYTES_MAX:
                return 507, b"metadata server is full", JSON_TEXT
            self._values[key] = value
            self._bytes = total
        return 200, b"metadata updated", JSON_TEXT

    def delete(self, key: str) -> tuple[int, bytes, str]:
        with self._lock:
            value = self._values.pop(key, None)
            if value is None:
                return 404, b"metadata not found", JSON_TEXT
            self._bytes -= len(key) + len(value)
        return 200, b"metadata deleted", JSON_TEXT


class _Server(BoundedServer):
    def __init__(self, address: tuple[str, int], secret: bytes) -> None:
        self.table = _Table()
        self.secret = secret
        super().__init__(address, _Handler, CONNECTIONS_MAX)


class _Handler(BoundedHandler):
    server: _Server
    body_bytes_max = VALUE_BYTES_MAX

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.path != "/metadata":
            self.reply(404, b"404: Not Found", "text/plain; charset=utf-8")
            return
        body = self.read_body()
        if body is None:
            return
        key = urllib.parse.parse_qs(url.query).get("key", [""])[0].strip()
        secret = self.server.secret
        proof = self.headers.get("Authorization", "")
        if secret and not proves(proof, secret, self.command, key, body, time.time()):
            self.reply(401, b"a proof of the shared secret is required", JSON_TEXT)
        elif not key:
            self.reply(400, b"metadata key is required", JSON_TEXT)
        elif len(key) > KEY_CHARS_MAX:
            self.reply(400, f"metadata key is longer than {KEY_CHARS_MAX} characters".encode(), JSON_TEXT)
        elif self.command == "GET":
            self.reply(*self.server.table.get(key))
        elif self.command == "PUT":
            self.reply(*self.server.table.put(key, body))
        elif self.command == "DELETE":
            self.reply(*self.server.table.delete(key))
        else:
            self.reply(405, b"Method not allowed", JSON_TEXT)

    def refuse(self, status: int, text: str) -> None:
        self.reply(status, text.encode(), "text/plain; charset=utf-8")

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = do_PATCH = do_OPTIONS = _serve  # noqa: N815 - http.server's


class KVBootstrapServer:
    """The server, with upstream's methods."""

    def __init__(self, port: int, host: str = "127.0.0.1", secret: bytes = b"") -> None:
        """Listens from `run` on.

        Args:
            port: 0 = any; `port` holds the real one after `run`.
            host: beyond loopback only with a secret.
            secret: every request must prove it, see transfer.naming.prove; b"" = none.

        Raises:
            ConfigError: the network would have to be trusted.
        """
        if not is_loopback(host) and not secret:
            raise ConfigError(
                f"metadata server host = {host!r}: beyond loopback it needs a shared secret; "
                "set MOONCAKE_SECRET or MOONCAKE_SECRET_FILE here and for all engines"
            )
        self.port = port
        self.host = host
        self.thread: threading.Thread | None = None
        self._secret = secret
        self._serving: Serving | None = None

    def run(self) -> threading.Thread:
        """Listen, serve in a background thread and return it.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        try:
            server = _Server((self.host, self.port), self._secret)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"metadata server {self.host}:{self.port}: {error}") from error
        self._serving = Serving(server, "metadata")
        self.port, self.thread = self._serving.port, self._serving.thread
        log.info("metadata server ready", url=f"http://{self.host}:{self.port}/metadata")
        return self.thread

    def close(self) -> None:
        """Stop listening (idempotent)."""
        if self._serving is not None:
            self._serving.close()

    def poll(self) -> KVPoll:
        """Return Success while it serves, else Failed."""
        return KVPoll.Success if self.thread is not None and self.thread.is_alive() else KVPoll.Failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mooncake_http_metadata_server` command until SIGINT or SIGTERM; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mooncake_http_metadata_server",
        description="Metadata server of Mooncake's transfer engines",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=PORT, help="Port to listen on")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Host to bind to; beyond loopback set MOONCAKE_SECRET"
    )
    levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    parser.add_argument("--log-level", choices=levels, default="INFO", help="Logging level")
    options = parser.parse_args(argv)
    logs.setup("metadata", options.log_level)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = KVBootstrapServer(options.port, options.host, read_secret(os.environ))
        server.run()
    except ConfigError as error:
        log.error(str(error))
        return 2
    while server.poll() is KVPoll.Success and not stop.wait(1.0):
        pass
    failed = not stop.is_set()
    server.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
