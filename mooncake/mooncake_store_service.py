"""`mc_store_rest_server`, `python -m mooncake.mooncake_store_service`: a client of the pool with a REST API.

Flags, configuration and endpoints are upstream's (mooncake.mooncake_config, mooncake.dropin.client.rest). It
listens on loopback unless --host says otherwise, and beyond loopback only with a token (MOONCAKE_ADMIN_TOKEN)
that every request has to show.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import structlog

from kvstore.leader.admin_http import TOKEN_ENV
from mooncake.core import log as logs
from mooncake.core.config import admin_token, fail
from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, RequestError
from mooncake.dropin.client.rest import BODY_BYTES_MAX, Rest
from mooncake.dropin.client.web import LOOPBACK, WebServer
from mooncake.dropin.store.settings import size_bytes
from mooncake.mooncake_config import SIZES, MooncakeConfig
from mooncake.store import MooncakeDistributedStore

PORT = 8080
MAX_WAIT_S = 60.0
RETRY_S = 1.0
"""Between attempts to join; upstream's."""
CONNECTIONS_MAX = 16
"""Each may hold a body of BODY_BYTES_MAX."""
EXIT_USAGE = 2
EXIT_FAILED = 1

log = structlog.get_logger(__name__)


def override(config: MooncakeConfig, given: Mapping[str, str]) -> MooncakeConfig:
    """Return `config` with the fields in `given`; others are named in a warning.

    Raises:
        ConfigError: a value makes no sense.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(MooncakeConfig)}
    values: dict[str, str | int | bool] = {}
    for name, text in given.items():
        if name not in kinds:
            log.warning("mc_store_rest_server: a field that means nothing here", field=name)
        elif name in SIZES:
            values[name] = size_bytes(name, text)
        elif kinds[name] is bool:
            values[name] = text.strip().lower() in ("true", "1", "yes", "on")
        elif kinds[name] is int:
            try:
                values[name] = int(text)
            except ValueError as error:
                raise fail(name, text, "a whole number") from error
        else:
            values[name] = text
    return dataclasses.replace(config, **values)  # type: ignore[arg-type]  # each of its field's kind


class MooncakeStoreService:
    """A store and its REST API, with upstream's methods: start_store_service, start_http_service, stop."""

    def __init__(self, config_path: str | None = None, cli_config: Mapping[str, str] | None = None) -> None:
        """Read the configuration: the file, else the environment; `cli_config` goes before both.

        Raises:
            ConfigError: it is missing or wrong.
        """
        read = MooncakeConfig.from_file(config_path) if config_path else MooncakeConfig.load_from_env()
        self.config = override(read, cli_config or {})
        self.store: MooncakeDistributedStore | None = None
        self.url = ""
        self._web: WebServer | None = None

    def join(self, max_wait_s: float, stop: threading.Event) -> bool:
        """Join the pool, with further attempts for so long; return whether it did before `stop`."""
        config = self.config
        settings = {
            **dataclasses.asdict(config),
            "rdma_devices": config.device_name,
            "master_server_addr": config.master_server_address,
        }
        for name in ("device_name", "master_server_address"):
            del settings[name]
        end_s = time.monotonic() + max_wait_s
        while not stop.is_set():
            store = MooncakeDistributedStore()
            if store.setup(settings) == 0:
                self.store = store
                return True
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                break
            log.warning("mc_store_rest_server: not joined yet", left_s=round(left_s, 1))
            stop.wait(min(RETRY_S, left_s))
        return False

    def serve(self, port: int = PORT, host: str = LOOPBACK) -> str:
        """Serve the REST API in threads of its own; return the URL.

        Raises:
            ConfigError: the address cannot be had, or others can reach it and there is no token.
        """
        if self.store is None:
            raise RequestError("start_store_service first")
        token = admin_token()
        rest = Rest(self.store)
        web = WebServer(
            rest.answer, host, port, token, body_bytes_max=BODY_BYTES_MAX, connections_max=CONNECTIONS_MAX
        )
        self.url = web.start()
        self._web = web
        return self.url

    def close(self) -> None:
        """Stop serving and leave the pool (idempotent)."""
        web, self._web = self._web, None
        if web is not None:
            web.close()
        store, self.store = self.store, None
        if store is not None:
            store.close()

    async def start_store_service(self, max_wait_time: float = MAX_WAIT_S) -> bool:
        """As `join`."""
        stop = threading.Event()
        try:
            return await asyncio.to_thread(self.join, max_wait_time, stop)
        finally:
            stop.set()  # also when the caller gives up

    async def start_http_service(self, port: int = PORT) -> bool:
        """As `serve`, on loopback."""
        self.serve(port)
        return True

    async def stop(self) -> None:
        """As `close`."""
        await asyncio.to_thread(self.close)


def _serve(service: MooncakeStoreService, options: argparse.Namespace, stop: threading.Event) -> None:
    with contextlib.closing(service):
        if not service.join(options.max_wait_time, stop):
            if stop.is_set():
                return
            raise PeerGone(f"not joined within {options.max_wait_time:g} s: the lines above say why")
        url = service.serve(options.port, options.host)
        log.info("mc_store_rest_server: serving", url=url)
        stop.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGINT or SIGTERM; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mc_store_rest_server", description="Mooncake store with a REST API"
    )
    parser.add_argument("--config", help="JSON file; else MOONCAKE_CONFIG_PATH or MOONCAKE_MASTER and others")
    parser.add_argument(
        "-D", "--define", action="append", default=[], metavar="KEY=VALUE", help="override a field of it"
    )
    parser.add_argument("--port", type=int, default=PORT, help="of the REST API (default: 8080)")
    parser.add_argument(
        "--host", default=LOOPBACK, help=f"beyond loopback set {TOKEN_ENV} (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--max-wait-time", type=float, default=MAX_WAIT_S, help="seconds to wait for the master (default: 60)"
    )
    options = parser.parse_args(argv)
    logs.setup("rest")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    defined = {key: value for key, equals, value in (one.partition("=") for one in options.define) if equals}
    try:
        _serve(MooncakeStoreService(options.config, defined), options, stop)
    except MooncakeError as error:
        sys.stderr.write(f"mc_store_rest_server: {error}\n")
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    return 0


sync_main = main
"""Upstream's name."""

if __name__ == "__main__":
    sys.exit(main())
