"""Starting and ending what is behind a drop-in engine: settings, port, name, batches, logs."""

import contextlib
import errno
import itertools
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mooncake.core.config import is_loopback
from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerError, RequestError
from mooncake.core.log import as_library
from mooncake.dropin.engine.env import EngineEnv, read_env, read_log_level
from mooncake.dropin.engine.memory import ManagedBuffers
from transfer.batch import Batch
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
from transfer.model import Buffer
from transfer.naming import P2P, Naming, Record, naming_of
from transfer.topology import parse_names

BATCHES_MAX = 65_536
"""Ids that nobody has asked about; the oldest finished one is forgotten then."""
NAMES_MAX = 65_536
METADATA_S = 5.0
UNREGISTER_S = 10.0
TRANSPORTS = {
    "tcp": ("shm", "tcp"),
    "rdma": ("shm", "rdma", "tcp"),
    "": ("shm", "rdma", "tcp"),
}
PORT_TRIES = 8
"""Another process may take the port between the look and the bind."""
SOMEBODY = "192.0.2.1"
"""An address reserved for documentation; nothing is sent to it."""
INFINIBAND = Path("/sys/class/infiniband")

log = structlog.get_logger(__name__)


class Started:
    """Everything that exists from `initialize` on."""

    def __init__(self, host: str, metadata: str, protocol: str, devices: str) -> None:
        """Start; see mooncake.engine.TransferEngine.initialize.

        Raises:
            ConfigError: a setting is wrong; PeerError: the metadata server cannot be reached.
        """
        env = environment()
        self.env = env
        self.naming: Naming = naming_of(metadata, env.secret)
        place = host if metadata == P2P or _resolves(_host_of(host)) else _own_address()
        self.engine = _start(place, protocol, devices, env)
        self.name = self.engine.name if metadata == P2P else host
        self.record = Record(self.engine.name, self.engine.epoch)
        self.managed = ManagedBuffers(self.engine.allocate, self.release)
        self._lock = threading.Lock()
        self._addresses: dict[str, str] = {}
        self._ids = itertools.count(1)
        self._batches: dict[int, Batch] = {}
        try:
            self.naming.publish(self.name, self.record, METADATA_S)
        except MooncakeError:
            self.engine.close()
            raise

    def close(self) -> None:
        """Withdraw the name and end the engine."""
        with contextlib.suppress(MooncakeError):  # then the name stays behind and leads nowhere
            self.naming.withdraw(self.name, self.record, METADATA_S)
        self.engine.close()

    def release(self, buffer: Buffer) -> None:
        """Unregister; raises as TransferEngine.unregister."""
        self.engine.unregister(buffer, UNREGISTER_S)

    def address(self, name: str) -> str:
        """Return the address of the peer `name`; raises as Naming.resolve."""
        known = self._addresses.get(name)
        if known is None:
            known = self.naming.resolve(name, METADATA_S)
            with self._lock:
                if len(self._addresses) >= NAMES_MAX:
                    self._addresses.clear()
                self._addresses[name] = known
        return known

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[str]:
        """Yield the address of `name`; look it up anew next time if the peer cannot be reached."""
        try:
            yield self.address(name)
        except PeerError:
            self._addresses.pop(name, None)
            raise

    def keep(self, batch: Batch) -> int:
        """Return the id of a batch that is under way.

        Raises:
            CapacityError: nobody has asked about BATCHES_MAX of them.
        """
        with self._lock:
            if len(self._batches) >= BATCHES_MAX:
                ended = next((number for number, old in self._batches.items() if old.done()), None)
                if ended is None:
                    batch.cancel()
                    raise CapacityError(f"{BATCHES_MAX} batches are under way")
                del self._batches[ended]
            number = next(self._ids)
            self._batches[number] = batch
        return number

    def batch(self, number: int) -> Batch:
        """Return a batch by its id; raises RequestError."""
        batch = self._batches.get(number)
        if batch is None:
            raise RequestError(f"no batch {number}: its end has been reported, or it never was")
        return batch

    def forget(self, number: int) -> None:
        """The end of a batch has been reported."""
        self._batches.pop(number, None)


def open_engine(host: str, protocol: str, devices: str, env: EngineEnv) -> TransferEngine:
    """Return a running engine for peers that call this machine `host`, or nothing that resolves.

    Raises:
        ConfigError: it cannot run.
    """
    return _start(host if _resolves(_host_of(host)) else _own_address(), protocol, devices, env)


def _start(host: str, protocol: str, devices: str, env: EngineEnv) -> TransferEngine:
    """Return a running engine; without RDMA, and with a word about it, where that does not work.

    Raises:
        ConfigError: it cannot run at all.
    """
    if protocol not in TRANSPORTS:
        log.warning("mooncake.engine: no such protocol here, using what there is", protocol=protocol)
    transports = ("tcp",) if env.force_tcp else TRANSPORTS.get(protocol, TRANSPORTS[""])
    nics = tuple(parse_names(devices)) or env.nics
    there = {path.name for path in INFINIBAND.iterdir()} if INFINIBAND.is_dir() else set()
    if "rdma" in transports and not (there & set(nics) if nics else there):
        transports = tuple(name for name in transports if name != "rdma")
        if protocol == "rdma" or nics:
            reason = f"{', '.join(nics) or 'any device'} is missing in {INFINIBAND}"
            log.warning("mooncake.engine: no RDMA here", reason=reason, using=transports)
    name = _host_of(host)
    bind = bind_host(name, env)
    given = {
        "nic_port": env.nic_port, "gid_index": env.gid_index, "topology": env.topology or None,
        "slice_bytes": env.slice_bytes, "endpoints_max": env.endpoints_max,
    }  # fmt: skip
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    settings |= {"host": bind, "advertise": name, "secret": env.secret}
    if "rdma" not in transports:
        return _listen(EngineConfig(transports=transports, **settings), env)
    try:
        return _listen(EngineConfig(transports=transports, nics=nics, **settings), env)
    except ConfigError as error:
        transports = tuple(each for each in transports if each != "rdma")
        engine = _listen(EngineConfig(transports=transports, **settings), env)
        log.warning("mooncake.engine: no RDMA here", reason=str(error), using=transports)
        return engine


def _host_of(name: str) -> str:
    """Return the host of "host", "host:port", "v6" or "[v6]:port"; "" = loopback."""
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return (name if name.count(":") > 1 else name.partition(":")[0]) or "127.0.0.1"


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 0))
    except (OSError, UnicodeError):
        return False


def _own_address() -> str:
    """Return the address that this machine talks to others from, loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((SOMEBODY, 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def environment() -> EngineEnv:
    """Return the settings of this process; raises as read_env."""
    return read_env(os.environ)


def bind_host(host: str, env: EngineEnv) -> str:
    """Return the address to listen at, for peers that call this host `host`: loopback without a secret."""
    wanted = env.bind_host or host
    if is_loopback(wanted) or env.secret:
        return wanted
    log.warning(
        "mooncake.engine: only peers on this host can connect: set MOONCAKE_SECRET or MOONCAKE_SECRET_FILE "
        "on all hosts",
        host=wanted,
    )
    return "127.0.0.1"


def _listen(config: EngineConfig, env: EngineEnv) -> TransferEngine:
    """Start an engine on the first free port of the range.

    Raises:
        ConfigError: none is free, or something else is wrong.
    """
    ports = list(range(env.port_min, env.port_max + 1))
    random.shuffle(ports)  # as upstream does: engines that start together try different ones
    candidates = itertools.chain([env.port] if env.port else [], ports)
    for _ in range(PORT_TRIES):
        port = next((port for port in candidates if _is_free(config.host, port)), None)
        if port is None:
            break
        try:
            return TransferEngine(msgspec.structs.replace(config, port=port)).start()
        except ConfigError as error:
            cause = error.__cause__
            if not (isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE):
                raise
    raise ConfigError(
        f"no port from {env.port_min} to {env.port_max} is free: set MC_MIN_RPC_PORT, MC_MAX_RPC_PORT"
    )


def _is_free(host: str, port: int) -> bool:
    """Return whether a listener could bind; a bad host counts as free, for the engine to explain."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def log_to_stderr() -> None:
    """Keep stdout for the application where nobody has configured the logs; honour MC_LOG_LEVEL."""
    if structlog.is_configured():
        return
    try:
        level, complaint = read_log_level(os.environ), None
    except ConfigError as error:
        level, complaint = "info", error
    as_library(level)
    if complaint:
        log.error("mooncake.engine: bad setting, logging at INFO", reason=str(complaint))
