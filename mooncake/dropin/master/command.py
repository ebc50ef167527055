"""`mooncake_master`: where the clients of `mooncake.store` find each other.

One process with what upstream's master offers to integrations: registration of stores (RPC port), a
directory of who has what, HTTP for operators and, if asked for, the HTTP metadata server. No byte and no
entry of a block lives here only: killed and started again it knows all within seconds, and clients go on
meanwhile.

It listens on loopback unless --rpc_address says otherwise, and beyond loopback only with a shared secret
(MOONCAKE_SECRET_FILE) and an admin token (MOONCAKE_ADMIN_TOKEN). Without a secret 0.0.0.0, which upstream's
examples give, means loopback, with a warning; an address of one interface is refused.
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
from kvstore.leader.admin_http import AdminServer
from kvstore.leader.coordinator import Coordinator, CoordinatorConfig
from mooncake.core import log as logs
from mooncake.core.config import ANY_HOSTS, admin_token, host_port
from mooncake.core.errors import ConfigError
from mooncake.core.metadata_client import MetadataServer
from mooncake.core.rpc import check_endpoint
from mooncake.dropin.engine.start import environment
from mooncake.dropin.flags import asks_for_help, parse_flags
from mooncake.dropin.master.flags import asks_for_nothing, warnings
from mooncake.dropin.master.http import MasterHttp
from mooncake.dropin.master.options import LOOPBACK, MasterOptions, config_words
from mooncake.dropin.master.quotas import Quotas, read_quotas
from mooncake.dropin.store.settings import MASTER_KEY, QUOTAS_KEY
from mooncake.http_metadata_server import KVBootstrapServer
from transfer.config import EngineConfig

EXIT_USAGE = 2
ALIASES = {"port": "rpc_port"}
USAGE = """usage: mooncake_master [--flag=value ...]

  --rpc_port=50051                      where clients register (also --port)
  --rpc_address=127.0.0.1               address to listen at
  --rpc_interface=                      network interface whose address that is
  --metrics_port=9003                   HTTP: health, keys, segments, drain jobs, quotas, metrics
  --metrics_host=                       address of it; as --rpc_address
  --enable_http_metadata_server=false   serve GET | PUT | DELETE /metadata as well
  --http_metadata_server_host=127.0.0.1
  --http_metadata_server_port=8080
  --default_kv_lease_ttl=10s            for which what was read is not removed unless forced
  --default_kv_soft_pin_ttl=30m         of a soft pin that names no time
  --allow_evict_soft_pinned_objects=true
  --client_ttl=5                        seconds after which a silent client's segment is gone
  --eviction_high_watermark_ratio=1     of a segment's memory: evict ahead of need when it is fuller
  --eviction_ratio=0.05                 how far below that
  --enable_offload=false                an SSD tier for clients that know a place for it
  --offload_on_evict=false              copy to the SSD only when memory runs short
  --promotion_on_hit=true               false: what the SSD gave to memory is the first to go
  --promotion_admission_threshold=1     reads until it stays like any other
  --enable_multi_tenants=false          only tenants with a quota write, and none beyond it
  --tenant_quota_connector_uri=         the file of quotas
  --config_path=                        a JSON or YAML file of flags

Other flags of upstream's are accepted; those that ask for what is not here are named in a warning.
"""

log = structlog.get_logger(__name__)


def read_flags(words: Sequence[str]) -> tuple[MasterOptions, list[str]]:
    """Return the options that a command line gives, and what has to be said of other flags in it.

    Raises:
        ConfigError: a value that cannot work; names the flag.
    """
    options, unknown = _parse(words)
    if options.config_path:
        options, unknown = _parse([*config_words(options.config_path), *words])
    return options, warnings(unknown)


def _parse(words: Sequence[str]) -> tuple[MasterOptions, list[str]]:
    return parse_flags([word for word in words if not asks_for_nothing(word)], MasterOptions, ALIASES)


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
        address = _listens_at("rpc_address", options.address, env.secret)
        quotas_path = options.tenant_quota_connector_uri if options.enable_multi_tenants else ""
        quotas_now = read_quotas(quotas_path) if quotas_path else {}
        server = MetadataServer(check_endpoint(f"tcp://{host_port(address, options.rpc_port)}"))
        stack.push_async_callback(server.close)
        # before it answers: nobody joins by other settings
        await server.store.put(MASTER_KEY, msgspec.json.encode(options.settings))
        await server.store.put(QUOTAS_KEY, msgspec.json.encode(quotas_now))
        server.start()
        self.endpoint = server.endpoint
        name = f"master-{socket.gethostname().split('.')[0]}-{os.getpid()}"
        directory = CoordinatorConfig(name=name, endpoint=f"tcp://{host_port(address, '*')}", admin_port=None)
        coordinator = Coordinator(directory, server.store)
        stack.push_async_callback(coordinator.close)
        await coordinator.start()
        engine = EngineConfig(host=address, secret=env.secret)
        pool = await asyncio.to_thread(Pool, self.endpoint, engine=engine, touch=False)
        stack.push_async_callback(asyncio.to_thread, pool.close)
        quotas = Quotas(quotas_path, server.store, coordinator.clients) if quotas_path else None
        if quotas:
            await quotas.start()
            stack.push_async_callback(quotas.close)
        api = MasterHttp(pool, coordinator, quotas)
        http_host = _listens_at("metrics_host", options.metrics_host or address, env.secret)
        http = AdminServer(api.answer, http_host, options.metrics_port, admin_token())
        stack.push_async_callback(asyncio.to_thread, http.close)
        self.url = http.start()
        if options.enable_http_metadata_server:
            given = options.http_metadata_server_host
            metadata_host = _listens_at("http_metadata_server_host", given, env.secret)
            metadata = KVBootstrapServer(options.http_metadata_server_port, metadata_host, env.secret)
            await asyncio.to_thread(metadata.run)
            stack.push_async_callback(asyncio.to_thread, metadata.close)

    async def close(self) -> None:
        """Stop serving (idempotent)."""
        await self._stack.aclose()


def _listens_at(flag: str, host: str, secret: bytes) -> str:
    """Return where to listen: "everywhere" without a secret is this host."""
    if host not in ANY_HOSTS or secret:
        return host
    log.warning(
        "mooncake_master: only this host can connect: to be reached from others set MOONCAKE_SECRET_FILE on "
        "all hosts, and MOONCAKE_ADMIN_TOKEN here",
        flag=flag, value=host,
    )  # fmt: skip
    return LOOPBACK


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
    if asks_for_help(words):
        sys.stdout.write(USAGE)
        return 0
    logs.setup("master")
    try:
        options, said = read_flags(words)
        for text in said:
            log.warning("mooncake_master: a flag that does nothing here", flag=text)
        return asyncio.run(_serve(options))
    except ConfigError as error:
        sys.stderr.write(f"mooncake_master: {error}\n")
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
