"""`mooncake_client`: the real client of one host.

It owns the host's segment and serves dummy clients (`MooncakeDistributedStore.setup_dummy`): any number of
processes that share its memory and have neither a segment nor an engine of their own.

Other hosts reach its segment at --host, loopback unless it is given, and beyond loopback only with a shared
secret (MOONCAKE_SECRET_FILE). Dummy clients are on this host: their port is on loopback always.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence

import msgspec
import structlog

from mooncake.core import log as logs
from mooncake.core.config import fail
from mooncake.core.errors import ConfigError, MooncakeError
from mooncake.core.secret import cluster_secret
from mooncake.dropin.client.http import ClientHttp
from mooncake.dropin.client.line import Welcome
from mooncake.dropin.client.relay import LOOPBACK, PORT, Neighbourhood, Relay
from mooncake.dropin.flags import asks_for_help, parse_flags
from mooncake.dropin.store.settings import CLIENT_HTTP_PORT, MASTER, TENANT, Settings, size_bytes
from mooncake.dropin.store.start import Started

EXIT_USAGE = 2
EXIT_FAILED = 1
LOOK_EVERY_S = 1.0
"""How soon the process ends after its segment has."""
ANY_HOST = ("0.0.0.0", "::", "")
USAGE = """usage: mooncake_client [--flag=value ...]

  --port=50052                               where dummy clients of this host connect, on loopback
  --host=127.0.0.1                           how other hosts call this one
  --global_segment_size="4 GB"               memory given to the pool
  --master_server_address=127.0.0.1:50051    mooncake_master, or etcd://HOST:PORT,...
  --metadata_server=P2PHANDSHAKE             accepted and not used
  --protocol=tcp                             tcp | rdma
  --device_names=                            mlx5_0,mlx5_1; empty = all
  --tenant_id=default                        whose names its dummy clients use
  --enable_offload=false                     an SSD tier below the segment, where MOONCAKE_OFFLOAD_* say
  --enable_http_server=false                 /health, /metrics and /metrics/summary, on loopback
  --http_port=9300

Other flags of upstream's are accepted and named in a warning.
"""

log = structlog.get_logger(__name__)


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Flags that mean something here, under upstream's names."""

    port: int = PORT
    host: str = LOOPBACK
    global_segment_size: str = "4 GB"
    master_server_address: str = MASTER
    metadata_server: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device_names: str = ""
    tenant_id: str = TENANT
    enable_offload: bool = False
    enable_http_server: bool = False
    http_port: int = CLIENT_HTTP_PORT

    def __post_init__(self) -> None:
        """Refuse flags that cannot work.

        Raises:
            ConfigError: names the flag and its value.
        """
        if not 0 <= self.port < 1 << 16:
            raise fail("port", self.port, "must be 0..65535")
        size_bytes("global_segment_size", self.global_segment_size)

    @property
    def settings(self) -> Settings:
        """As `setup` takes them."""
        return Settings.of(
            {
                "local_hostname": LOOPBACK if self.host in ANY_HOST else self.host,
                "metadata_server": self.metadata_server or "P2PHANDSHAKE",
                "global_segment_size": self.global_segment_size,
                "local_buffer_size": 0,
                "protocol": self.protocol,
                "rdma_devices": self.device_names,
                "master_server_addr": self.master_server_address,
                "tenant_id": self.tenant_id,
                "enable_ssd_offload": self.enable_offload,
                "enable_client_http_server": self.enable_http_server,
                "client_http_port": self.http_port,
            }
        )


class RealClient:
    """A client with a segment, and its dummies: `start`, `close`."""

    def __init__(self, options: ClientOptions) -> None:
        """Nothing is opened before `start`."""
        self.options = options
        self.port = options.port
        self.started: Started | None = None
        self.relay: Relay | None = None
        self.http: ClientHttp | None = None

    def start(self) -> None:
        """Join the pool and serve.

        Raises:
            ConfigError: a flag cannot work on this machine; PeerError: the master does not answer.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.started = started = Started(self.options.settings)
        master = started.background.master_settings
        welcome = Welcome(self.options.tenant_id, master, bool(cluster_secret()))
        pool = started.pool
        around = Neighbourhood(
            started.engine, welcome, lambda: pool.records, lambda: pool.directories, pool.changed
        )
        self.relay = Relay(around, self.options.port)
        self.relay.start()
        self.port = self.relay.port
        if self.options.enable_http_server:
            healthy, port = started.background.has_master, self.options.http_port
            self.http = ClientHttp(self.relay.counters, healthy, port)
            self.http.start()
            started.on_close(self.http.close)

    @property
    def serves(self) -> bool:
        """Whether the segment is still in the pool."""
        return self.started is not None and self.started.background.alive

    def close(self) -> None:
        """End the dummies' connections, then leave the pool with what is in the segment (idempotent)."""
        relay, started = self.relay, self.started
        self.relay = self.started = None
        if relay is not None:
            relay.close()
        if started is not None:
            started.close()


def serve(client: RealClient, stop: threading.Event) -> int:
    """Run `client` until `stop`; return the exit code."""
    client.start()
    try:
        log.info(
            "mooncake_client: serving",
            port=client.port, segment=client.started.hostname if client.started else "", pid=os.getpid(),
        )  # fmt: skip
        while not stop.wait(LOOK_EVERY_S):
            if not client.serves:
                log.error("mooncake_client: the segment of this process has ended")
                return EXIT_FAILED
    finally:
        client.close()
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Run a real client until SIGTERM; return the exit code."""
    words = sys.argv[1:] if words is None else words
    if asks_for_help(words):
        sys.stdout.write(USAGE)
        return 0
    logs.setup("client")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        options, unknown = parse_flags(words, ClientOptions, {"device_name": "device_names"})
        if unknown:
            log.warning("mooncake_client: these flags mean nothing here", flags=" ".join(unknown))
        return serve(RealClient(options), stop)
    except ConfigError as error:
        sys.stderr.write(f"mooncake_client: {error}\n")
        return EXIT_USAGE
    except MooncakeError as error:
        sys.stderr.write(f"mooncake_client: {error}\n")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
