"""Settings of a transfer engine, checked before anything is opened."""

import os
import ssl
import tempfile
from pathlib import Path

import msgspec

from mooncake.core.config import is_loopback
from mooncake.core.errors import ConfigError
from mooncake.core.secret import SECRET_BYTES_MIN

CONNECTIONS_MAX = 16
TRANSPORTS = ("shm", "rdma", "tcp")


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Both ends show a certificate of the same authority."""

    certificate: str  # PEM file with this engine's certificate chain
    key: str  # PEM file
    authority: str  # PEM file with the certificate that signed everybody's

    def server(self) -> ssl.SSLContext:
        """Return the context of the listener; raises as `client`."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client(self) -> ssl.SSLContext:
        """Return the context of outgoing connections.

        Raises:
            ConfigError: a file is missing or no PEM.
        """
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"tls {self.certificate!r}, {self.key!r}, {self.authority!r}: {error}"
            ) from error
        return context


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything has a working default: an engine for this host only."""

    host: str = "127.0.0.1"  # bound
    port: int = 0  # 0 = any
    advertise: str = ""  # how other hosts call this one, "" = host
    secret: bytes = b""  # the same for all engines; needed to bind anything but loopback
    tls: TlsConfig | None = None
    transports: tuple[str, ...] = TRANSPORTS
    open_buffers: bool = (
        True  # peers learn the keys with the description; False: the application hands them out
    )
    tcp_connections: int = 4  # per peer
    in_flight_bytes_max: int = 16 << 30
    run_dir: str = ""  # of the unix socket, "" = the user's
    verbs: str = "auto"  # library: "ibverbs" | "pyverbs"
    nics: tuple[str, ...] = ()  # RDMA devices, () = all
    nic_port: int = 1
    gid_index: int | None = None
    topology: str = ""  # JSON or a path, "" = read from sysfs
    slice_bytes: int = 1 << 20  # of RDMA
    endpoints_max: int = 256  # queue pairs kept, of RDMA

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: names the setting, its value and what to do.
        """
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port {self.port}: 0 to 65535")
        if self.secret and len(self.secret) < SECRET_BYTES_MIN:
            raise ConfigError(f"a secret of {len(self.secret)} bytes: at least {SECRET_BYTES_MIN}")
        if not is_loopback(self.host) and not self.secret:
            raise ConfigError(
                f"host {self.host!r} is open to other machines: set a secret, the same for all engines"
            )
        unknown = [name for name in self.transports if name not in TRANSPORTS]
        if unknown or not self.transports:
            raise ConfigError(f"transports {list(self.transports)}: some of {list(TRANSPORTS)}")
        if not 1 <= self.tcp_connections <= CONNECTIONS_MAX:
            raise ConfigError(f"tcp_connections {self.tcp_connections}: 1 to {CONNECTIONS_MAX}")
        if self.in_flight_bytes_max <= 0 or self.slice_bytes < 4096 or self.endpoints_max < 1:
            raise ConfigError("in_flight_bytes_max, endpoints_max: 1 or more; slice_bytes: 4096 or more")

    def socket_dir(self) -> Path:
        """Return the private directory of the unix socket (see fdpass.private_dir)."""
        if self.run_dir:
            return Path(self.run_dir)
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        base = Path(runtime) if runtime else Path(tempfile.gettempdir()) / f"mooncake-{os.getuid()}"
        return base / "transfer"


def split_name(name: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[v6]:port".

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = name.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or int(port) >= 1 << 16:
        raise ConfigError(f"peer {name!r}: must be host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
