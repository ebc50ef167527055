"""The owner's half of an engine: its memory, its listener, its transports (see transfer.engine)."""

import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import structlog

from mooncake.core.config import host_port
from mooncake.core.errors import (
    CapacityError,
    PeerTimeout,
    RequestError,
)
from mooncake.core.log import as_library
from mooncake.core.messages import Ok
from transfer.config import EngineConfig
from transfer.control import Dialer, Handle, Listener, Session, serve_control
from transfer.device import DeviceMemory
from transfer.fdpass import private_dir
from transfer.memory import check_mapped, locate
from transfer.messages import (
    Ask,
    BufferInfo,
    Describe,
    Fence,
    Notify,
    Ping,
    RdmaConnect,
    RdmaDisconnect,
    SegmentInfo,
    ShmInfo,
    Told,
)
from transfer.metrics import TransferMetrics
from transfer.model import Buffer, Transport
from transfer.rdma import RdmaConfig, RdmaTransport, open_rdma
from transfer.registry import Registry, is_host
from transfer.segment import PAGE_BYTES, Segment
from transfer.shm import ShmTransport
from transfer.shm_link import MemoryServer
from transfer.staged import Devices, StagedTransport
from transfer.tcp import TcpTransport
from transfer.tcp_server import DataServer
from transfer.topology import Topology
from transfer.verbs import Loaded
from transfer.verbs import load as load_verbs
from transfer.verbs.api import Verbs

log = structlog.get_logger(__name__)

NOTES_MAX = 4096
UNREGISTER_S = 10.0
LAST_RESORT_S = 1.0
"""After which data connections that still hold a buffer in use have let go of it, once hung up on."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Owner:
    """What peers see of this process. TransferEngine adds the transfers that it begins itself."""

    def __init__(
        self,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
        verbs: Verbs | None = None,
        device: DeviceMemory | None = None,
    ) -> None:
        """Open nothing yet: `start` does.

        Args:
            config: settings.
            verbs: for tests; None = the library that `config.verbs` names.
            device: for tests; None = NVIDIA's driver, where there is a GPU.
        """
        self.config = config
        self._verbs = verbs
        self._devices = Devices(device)
        self.epoch = secrets.token_hex(16)
        self.metrics = TransferMetrics()
        self._registry = Registry()
        self._lock = threading.Lock()
        self._notes: deque[tuple[str, str]] = deque()
        self._closed = False
        self._transports: dict[str, Transport] = {}
        self._services: dict[str, Callable[[bytes], bytes]] = {}
        self._rdma: RdmaTransport | None = None
        self._topology: Topology | None = None
        self._unix_path: Path | None = None
        self.name = ""
        self.port = 0

    def start(self) -> Self:
        """Listen, open devices; return self.

        Raises:
            ConfigError: an address in use, a bad device or certificate.
            RequestError: it was started before.
        """
        as_library()
        if self.name or self._closed:
            raise RequestError("an engine starts once")
        config = self.config
        tls = config.tls
        data, memory = DataServer(self._registry, self._devices), MemoryServer(self._registry)
        self._data = data
        self._handlers: dict[type, Handle] = {
            Describe: lambda _session, _message: self.info,
            Ping: lambda _session, _message: Ok(),
            Notify: self._take_note,
            Ask: self._answer,
            Fence: data.fence,
        }
        listener = Listener(
            ("", ""),
            config.secret,
            {
                "control": self._serve_control,
                "data": lambda session: data.serve(listener, session),
                "memory": lambda session: memory.serve(listener, session),
            },
            tls.server() if tls else None,
        )
        self._listener = listener
        try:
            self.port = listener.bind((config.host, config.port))[1]
            self.name = host_port(config.advertise or config.host, self.port)
            self._unix_path = private_dir(config.socket_dir()) / f"{self.epoch[:16]}.sock"
            listener.bind(self._unix_path)
            listener.me = me = (self.epoch, self.name)
            self._host = BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
            self._dialer = dialer = Dialer(me, config.secret, tls.client() if tls else None)
            self._shm = ShmTransport(self.epoch, self._host, self._registry, dialer, memory)
            for name in config.transports:
                transport = self._open_transport(name, dialer)
                if transport:
                    self._transports[name] = transport
        except BaseException:
            listener.close()
            if self._unix_path:
                self._unix_path.unlink(missing_ok=True)
            self.name = ""
            raise
        listener.start()
        return self

    def _open_transport(self, name: str, dialer: Dialer) -> Transport | None:
        if name == "shm":
            return StagedTransport(self._shm, self._devices)
        if name == "tcp":
            return StagedTransport(TcpTransport(dialer, self.config.tcp_connections), self._devices)
        rdma = self._open_rdma()
        if rdma:
            self._handlers |= {RdmaConnect: rdma.handle, RdmaDisconnect: rdma.handle}
            self._rdma = rdma
        return rdma

    def _open_rdma(self) -> RdmaTransport | None:
        config = self.config
        loaded = Loaded(self._verbs, "given") if self._verbs else load_verbs(config.verbs)
        if loaded.verbs is None:
            log.info("transfer.rdma_off", reason=loaded.reason)
            return None
        path = Path(config.topology)
        if not config.topology:
            self._topology = Topology.discover(only=config.nics if self._verbs is None else ())
        elif config.topology.lstrip().startswith("{"):
            self._topology = Topology.parse(config.topology, config.nics)
        else:
            self._topology = Topology.load(path, config.nics)
        port = f":{config.nic_port}" if config.nic_port != 1 else ""
        settings = RdmaConfig(
            devices=tuple(f"{nic}{port}" for nic in config.nics),
            gid_index=config.gid_index,
            slice_bytes=config.slice_bytes,
            endpoints_max=config.endpoints_max,
        )
        return open_rdma(loaded, settings, self._topology, self._devices.export_dmabuf, self.metrics.nic)

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End every connection, forget every buffer (idempotent).

        When it returns, no peer reaches this process's memory any more; memory from `allocate` that a
        peer has mapped stays its copy to look at.
        """
        with self._lock:
            if self._closed or not self.name:
                self._closed = True
                return
            self._closed = True
        self._end_transfers()
        self._listener.close()
        for transport in self._transports.values():
            transport.close()
        self._hang_up()
        self._devices.close()
        if self._unix_path:
            self._unix_path.unlink(missing_ok=True)

    def _end_transfers(self) -> None:
        """Stop what this engine itself has begun."""

    def _hang_up(self) -> None:
        """Close the control connections, which transports need until they are closed."""

    # ------------------------------------------------------------ memory

    def register(self, memory: Any, size_bytes: int | None = None, location: str = "*") -> Buffer:
        """Let peers reach `memory`, and make it usable as the local end of transfers.

        Args:
            memory: see memory.locate. It is kept alive, and must stay mapped, until `unregister`.
            size_bytes: of an address; else all of it.
            location: "cpu:0", "cuda:1", "*" = unknown.

        Raises:
            RequestError: no such memory, or it overlaps registered memory; CapacityError: too many.
        """
        self._check_open()
        address, size, location = locate(memory, size_bytes, location)
        if location == "*":
            location = self._devices.location_of(address)
        if isinstance(memory, int) and is_host(location):
            check_mapped(address, size)
        owner = None if isinstance(memory, int) else memory
        buffer = self._registry.add(address, size, location, owner)
        for transport in self._transports.values():
            transport.register(buffer)
        return buffer

    def allocate(self, size_bytes: int, location: str = "cpu:0") -> Buffer:
        """Return fresh registered memory, zero, touched, that same-host peers reach as shared memory.

        Raises:
            ConfigError: the machine has not that much.
        """
        if size_bytes <= 0:
            raise RequestError(f"allocate({size_bytes}): a positive number of bytes")
        whole = size_bytes + -size_bytes % PAGE_BYTES
        return self.register(Segment.create(f"mooncake-{self.epoch[:8]}", whole), size_bytes, location)

    def unregister(self, buffer: Buffer, deadline_s: float = UNREGISTER_S) -> None:
        """Take `buffer` back: when this returns, nothing will read or write it any more.

        Raises:
            RequestError: it is not registered.
            PeerTimeout: somebody may still use it (named); it stays out of reach for new transfers.
                Call again later, and keep the memory out of use until then.
        """
        end_s = time.monotonic() + deadline_s
        self._registry.hide(buffer)
        for transport in self._transports.values():
            transport.unregister(buffer, max(0.0, end_s - time.monotonic()))
        try:
            self._registry.retire(buffer, max(0.0, end_s - time.monotonic()))
        except PeerTimeout:
            self._data.hang_up_all()  # a peer stopped in mid-frame; the others just connect anew
            self._registry.retire(buffer, LAST_RESORT_S)

    def grant(self, buffer: Buffer) -> dict[str, Any]:
        """Return the capability of `buffer`, for RemotePeer.learn at a peer (open_buffers=False)."""
        rkeys = self._rdma.rkeys(buffer) if self._rdma else {}
        return {"buffer_id": buffer.buffer_id, "key": buffer.key, "rkeys": rkeys}

    def buffer_at(self, address: int) -> Buffer | None:
        """Return the registered buffer that holds `address`."""
        return self._registry.find(address, 1)

    @property
    def topology(self) -> Topology:
        """Which NICs are near which memory; empty without RDMA."""
        return self._topology or Topology({})

    @property
    def buffers(self) -> list[Buffer]:
        """The registered buffers, by address."""
        return list(self._registry)

    @property
    def info(self) -> SegmentInfo:
        """What peers learn of this engine."""
        fields: dict[str, Any] = {}
        for transport in self._transports.values():
            transport.describe(fields)
        rdma = self._rdma
        buffers = [
            BufferInfo(
                buffer.buffer_id,
                buffer.address,
                buffer.size_bytes,
                buffer.location,
                buffer.key if self.config.open_buffers else b"",
                ShmInfo(buffer.handles["shm"][1]) if "shm" in buffer.handles else None,
                rdma.rkeys(buffer) if rdma and self.config.open_buffers else {},
            )
            for buffer in self._registry
        ]
        return SegmentInfo(
            name=self.name,
            epoch=self.epoch,
            version=self._registry.version,
            host=self._host,
            pid=os.getpid(),
            buffers=buffers,
            unix_path=str(self._unix_path),
            topology=self._topology.to_json() if self._topology else "",
            **fields,
        )

    # ------------------------------------------------------------ applications

    def serve(self, service: str, answer: Callable[[bytes], bytes]) -> None:
        """Have `answer` called with what peers ask of `service`; in their connections' threads, at once.

        It may raise MooncakeErrors, which the peer then raises. Whoever asks has been greeted: with a
        secret, it knows it.
        """
        self._services[service] = answer

    def _answer(self, _session: Session, message: Ask) -> Told:
        answer = self._services.get(message.service)
        if answer is None:
            raise RequestError(f"{self.name} serves no {message.service!r}")
        return Told(answer(message.body))

    # ------------------------------------------------------------ notifications

    def notifications(self) -> list[tuple[str, str]]:
        """Return what peers have sent since the last call, in order of arrival."""
        with self._lock:
            notes, self._notes = list(self._notes), deque()
        return notes

    def _take_note(self, _session: Session, message: Notify) -> Ok:
        with self._lock:
            if len(self._notes) >= NOTES_MAX:
                raise CapacityError(f"{NOTES_MAX} notifications wait to be fetched")
            self._notes.append((message.name, message.text))
        return Ok()

    def _serve_control(self, session: Session) -> None:
        self._listener.welcome(session)
        serve_control(session, self._handlers)

    def _check_open(self) -> None:
        if self._closed or not self.name:
            raise RequestError("the engine is closed" if self._closed else "start the engine first")
