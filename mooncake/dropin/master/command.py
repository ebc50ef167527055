"""`mooncake_master`: where the clients of `mooncake.store` find each other.

One process with what upstream's master offers to integrations: registration of stores (RPC port), a
directory of who has what, HTTP for operators and, if asked for, the HTTP metadata server. No byte and no
entry of a block lives here only: killed and started again it knows all within seconds, and clients go on
meanwhile.

It listens on loopback unless --rpc_address says otherwise, and beyond loopback only with a shared secret
(MOONCAKE_SECRET_FILE) and an admin token (MOONCAKE_ADMIN_TOKEN).
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec
import structlog

from kvstore.client.pool import Pool
from kvstore.leader.admin_http import TOKEN_ENV, AdminServer
from kvstore.leader.coordinator import Coordinator, CoordinatorConfig
from mooncake.core import log as logs
from mooncake.core.config import fail
from mooncake.core.errors import ConfigError
from mooncake.core.metadata_client import MetadataServer
from mooncake.core.rpc import check_endpoint
from mooncake.dropin.engine.start import environment
from mooncake.dropin.master.http import MasterHttp
from mooncake.dropin.store.start import MASTER_KEY, MasterSettings
from mooncake.http_metadata_server import KVBootstrapServer
from transfer.config import EngineConfig

EXIT_USAGE = 2
LOOPBACK = "127.0.0.1"
SECONDS_MAX = 86_400.0
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
"""Of gflags, which upstream's flags are."""
USAGE = """usage: mooncake_master [--flag=value ...]

  --rpc_port=50051                     where clients register (also --port)
  --rpc_address=127.0.0.1              address to listen at
  --metrics_port=9003                  HTTP: health, keys, segments, metrics
  --enable_http_metadata_server=false  serve GET | PUT | DELETE /metadata as well
  --http_metadata_server_host=127.0.0.1
  --http_metadata_server_port=8080
  --default_kv_lease_ttl=10000         ms for which clients do not remove what they have just read
  --default_kv_soft_pin_ttl=1800000    ms of a soft pin that names no time

Other flags of upstream's are accepted and named in a warning.
"""

log = structlog.get_logger(__name__)


class MasterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Flags that mean something here, under upstream's names."""

    rpc_port: int = 50_051
    rpc_address: str = LOOPBACK
    metrics_port: int = 9_003
    enable_http_metadata_server: bool = False
    http_metadata_server_host: str = LOOPBACK
    http_metadata_server_port: int = 8_080
    default_kv_lease_ttl: int = 10_000
    default_kv_soft_pin_ttl: int = 1_800_000

    def __post_init__(self) -> None:
        """Refuse flags that cannot work.

        Raises:
            ConfigError: names the flag and its value.
        """
        for name in ("rpc_port", "metrics_port", "http_metadata_server_port"):
            if not 0 <= getattr(self, name) < 1 << 16:
                raise fail(name, getattr(self, name), "must be 0..65535")
        for name in ("default_kv_lease_ttl", "default_kv_soft_pin_ttl"):
            if not 0 <= getattr(self, name) <= SECONDS_MAX * 1000:
                raise fail(name, getattr(self, name), "milliseconds of at most a day")

    @property
    def settings(self) -> MasterSettings:
        """What clients have to know."""
        return MasterSettings(self.default_kv_lease_ttl / 1000, self.default_kv_soft_pin_ttl / 1000)


def parse_flags(words: Sequence[str]) -> tuple[MasterOptions, list[str]]:
    """Return the options that gflags-like `words` give, and the flags that mean nothing here.

    Raises:
        ConfigError: a value is no number or no truth value.
    """
    known = {field.name: field for field in msgspec.structs.fields(MasterOptions)}
    values: dict[str, int | str | bool] = {}
    unknown: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        name = "rpc_port" if name == "port" else name
        field = known.get(name) or known.get(name.removeprefix("no"))
        is_switch = field is not None and field.type is bool
        if not word.startswith("-") or field is None or (field.name != name and not is_switch):
            unknown.append(word)
            if word.startswith("-") and not equals and left and not left[0].startswith("-"):
                left.pop(0)
            continue
        if not equals:
            if not is_switch and not left:
                raise fail(name, "", "a value is missing")
            text = ("true" if field.name == name else "false") if is_switch else left.pop(0)
        values[field.name] = _value(name, text, field.type)
    return MasterOptions(**values), unknown  # type: ignore[arg-type]


def _value(name: str, text: str, kind: type) -> int | str | bool:
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise fail(name, text, "true or false")
        return text.lower() in TRUE
    if kind is int:
        try:
            return int(text)
        except ValueError as error:
            raise fail(name, text, "a whole number") from error
    return text


class Master:
    """One master: `start`, `close`."""

    def __init__(self, options: MasterOptions) -> None:
        """Nothing is opened before `start`."""
        self.options = options
        self.endpoint = ""
        self.url = ""
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Open everything and begin to serve; `endpoint` and `url` say where.

        Raises:
            ConfigError: a flag cannot work on this machine. Nothing stays open.
        """
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        options, env = self.options, environment()
        host = f"[{options.rpc_address}]" if ":" in options.rpc_address else options.rpc_address
        server = MetadataServer(check_endpoint(f"tcp://{host}:{options.rpc_port}"))
        stack.push_async_callback(server.close)
        server.start()
        self.endpoint = server.endpoint
        await server.store.put(MASTER_KEY, msgspec.json.encode(options.settings))
        name = f"master-{socket.gethostname().split('.')[0]}-{os.getpid()}"
        directory = CoordinatorConfig(name=name, endpoint=f"tcp://{host}:*", admin_port=None)
        coordinator = Coordinator(directory, server.store)
        stack.push_async_callback(coordinator.close)
        await coordinator.start()
        engine = EngineConfig(host=options.rpc_address, secret=env.secret)
        pool = await asyncio.to_thread(Pool, self.endpoint, engine=engine, touch=False)
        stack.push_async_callback(asyncio.to_thread, pool.close)
        token = os.environ.get(TOKEN_ENV, "").strip()
        http = AdminServer(MasterHttp(pool).answer, options.rpc_address, options.metrics_port, token)
        stack.push_async_callback(asyncio.to_thread, http.close)
        self.url = http.start()
        if options.enable_http_metadata_server:
            metadata = KVBootstrapServer(
                options.http_metadata_server_port, options.http_metadata_server_host, env.secret
            )
            await asyncio.to_thread(metadata.run)
            stack.push_async_callback(asyncio.to_thread, metadata.close)

    async def close(self) -> None:
        """Stop serving (idempotent)."""
        await self._stack.aclose()


async def _serve(options: MasterOptions) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    master = Master(options)
    await master.start()
    try:
        log.info("mooncake_master: serving", rpc=master.endpoint, http=master.url)
        await stop.wait()
    finally:
        await master.close()
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Run a master until SIGTERM; return the exit code."""
    words = sys.argv[1:] if words is None else words
    if any(word.lstrip("-") in ("help", "h") and word.startswith("-") for word in words):
        sys.stdout.write(USAGE)
        return 0
    logs.setup("master")
    try:
        options, unknown = parse_flags(words)
        if unknown:
            log.warning("mooncake_master: these flags mean nothing here", flags=" ".join(unknown))
        return asyncio.run(_serve(options))
    except ConfigError as error:
        sys.stderr.write(f"mooncake_master: {error}\n")
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
