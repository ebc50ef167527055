"""The transfer engine: register memory, move bytes between it and other engines' memory.

One object per process. `submit` cuts a batch into parts, gives each to the best transport that reaches
both buffers, and moves what failed on a broken link to the next one. Transports block; every peer has
threads of its own, so a stopped peer delays nobody else (DESIGN 7).
"""

import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from mooncake.core.errors import (
    CapacityError,
    MooncakeError,
    PeerTimeout,
    RequestError,
)
from mooncake.core.messages import Ok
from transfer.batch import Batch, divide
from transfer.config import EngineConfig
from transfer.control import Dialer, Handle, Listener, Session, serve_control
from transfer.device import DeviceMemory
from transfer.dispatch import Dispatcher
from transfer.fdpass import private_dir
from transfer.health import PathState
from transfer.memory import locate
from transfer.messages import (
    BufferInfo,
    Describe,
    Fence,
    Notify,
    Ping,
    RdmaConnect,
    RdmaDisconnect,
    SegmentInfo,
    ShmInfo,
)
from transfer.metrics import TransferCollector, TransferMetrics
from transfer.model import Buffer, Call, Opcode, Slice, Transport
from transfer.peers import PeerTable, RemotePeer
from transfer.rdma import RdmaConfig, RdmaTransport, open_rdma
from transfer.registry import Registry
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
NOTE_BYTES_MAX = 1 << 20
BATCHES_MAX = 16_384
"""Under way at once; upstream's vLLM connector has some hundreds."""
PART_BYTES = 1 << 20
"""Less is not worth a second thread: handing it over costs 50 us, moving it over TCP 300."""
CONNECT_S = 5.0
DEADLINE_S = 30.0
UNREGISTER_S = 10.0
LAST_RESORT_S = 1.0
"""After which data connections that still hold a buffer in use have let go of it, once hung up on."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class TransferEngine:
    """See the module. Every method may be called from any thread; `close` it, or use it as a context."""

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
        self._in_flight: set[Batch] = set()
        self._in_flight_bytes = 0
        self._notes: deque[tuple[str, str]] = deque()
        self._closed = False
        self._rdma: RdmaTransport | None = None
        self._topology: Topology | None = None
        self.name = ""
        self.port = 0

    def start(self) -> "TransferEngine":
        """Listen, open devices; return self.

        Raises:
            ConfigError: an address in use, a bad device or certificate.
        """
        config = self.config
        tls = config.tls
        data, memory = DataServer(self._registry, self._devices), MemoryServer(self._registry)
        self._data = data
        self._handlers: dict[type, Handle] = {
            Describe: lambda _session, _message: self.info,
            Ping: lambda _session, _message: Ok(),
            Notify: self._take_note,
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
            host = config.advertise or config.host
            self.name = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
            self._unix_path = private_dir(config.socket_dir()) / f"{self.epoch[:16]}.sock"
            listener.bind(self._unix_path)
            listener.me = me = (self.epoch, self.name)
            self._host = BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
            dialer = Dialer(me, config.secret, tls.client() if tls else None)
            self._peers = PeerTable(dialer)
            self._transports: dict[str, Transport] = {}
            self._shm = ShmTransport(self.epoch, self._host, self._registry, dialer, memory)
            for name in config.transports:
                transport = self._open_transport(name, dialer)
                if transport:
                    self._transports[name] = transport
            self._dispatcher = Dispatcher(self._transports, self.metrics)
        except BaseException:
            listener.close()
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

    def __enter__(self) -> "TransferEngine":
        """Start."""
        return self.start()

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Cancel what is under way, end every connection, forget every buffer (idempotent).

        When it returns, no peer reaches this process's memory any more; memory from `allocate` that a
        peer has mapped stays its copy to look at.
        """
        with self._lock:
            if self._closed or not self.name:
                self._closed = True
                return
            self._closed = True
            under_way = list(self._in_flight)
        for batch in under_way:
            batch.cancel()
        for batch in under_way:
            batch.wait(None)
        self._listener.close()
        for peer in self._peers.take_all():
            peer.close()
        for transport in self._transports.values():
            transport.close()
        self._devices.close()
        self._unix_path.unlink(missing_ok=True)

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

    def buffer_at(self, address: int) -> Buffer | None:
        """Return the registered buffer that holds `address`."""
        return self._registry.find(address, 1)

    def collector(self) -> TransferCollector:
        """Return mooncake_transfer_* of this engine, for a Prometheus registry."""
        rdma = self._rdma

        def states() -> dict[str, PathState]:
            return self._dispatcher.states() | (rdma.states() if rdma else {})

        return TransferCollector(self.metrics, states)

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
                rdma.rkeys(buffer) if rdma else {},
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

    # ------------------------------------------------------------ peers

    def peer(self, name: str, deadline_s: float = CONNECT_S) -> RemotePeer:
        """Return the engine called `name` ("host:port"), connected and described.

        Raises:
            PeerTimeout, PeerGone: nobody there; ConfigError: a bad name or another secret;
            ProtocolError: something else listens there.
        """
        self._check_open()
        known = self._peers.get(name)
        if known:
            return known
        peer, old = self._peers.open(name, deadline_s)
        if old:
            self._drop(old)
        return peer

    def forget(self, name: str) -> None:
        """Close every connection to `name`; the next transfer opens it anew."""
        peer = self._peers.get(name)
        if peer:
            self._drop(peer)
            peer.stale = True

    def _drop(self, peer: RemotePeer) -> None:
        for transport in self._transports.values():
            transport.forget(peer)
        peer.hang_up()

    def probe(self, name: str, deadline_s: float = CONNECT_S) -> float:
        """Return the seconds that `name` took to answer; raises as `peer`."""
        peer = self.peer(name, deadline_s)
        start_s = time.monotonic()
        peer.ask(Ping(), Ok, deadline_s)
        return time.monotonic() - start_s

    def notify(self, name: str, title: str, text: str, deadline_s: float = CONNECT_S) -> None:
        """Put (title, text) into the notifications of `name`.

        Raises:
            CapacityError: it does not fetch them; RequestError: too long; as `peer`.
        """
        if len(title) + len(text) > NOTE_BYTES_MAX:
            raise RequestError(f"a notification of over {NOTE_BYTES_MAX} characters")
        self.peer(name, deadline_s).ask(Notify(title, text), Ok, deadline_s)

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

    # ------------------------------------------------------------ transfers

    def submit(
        self,
        op: Opcode,
        name: str,
        local: Sequence[int],
        remote: Sequence[int],
        lengths: Sequence[int],
        *,
        deadline_s: float = DEADLINE_S,
        transport: str = "",
    ) -> Batch:
        """Begin to move `lengths[i]` bytes between `local[i]` here and `remote[i]` in `name`, for every i.

        Args:
            op: READ = remote to local, WRITE = local to remote.
            name: the peer.
            local: addresses inside registered buffers, each range within one.
            remote: addresses in the peer's address space, each range within one of its buffers.
            lengths: bytes.
            deadline_s: for the whole batch.
            transport: take this one where it reaches, "" = the best.

        Raises:
            RequestError: a range is not registered (nothing is moved then); CapacityError: too much
            is under way; as `peer`.
        """
        batch, peer, parts = self._prepare(op, name, local, remote, lengths, deadline_s, transport)
        for chosen, part in parts:
            peer.threads.submit(self._dispatcher.run_part, batch, peer, part, chosen)
        return batch

    def transfer(
        self,
        op: Opcode,
        name: str,
        local: int | Sequence[int],
        remote: int | Sequence[int],
        lengths: int | Sequence[int],
        *,
        deadline_s: float = DEADLINE_S,
        transport: str = "",
    ) -> None:
        """Do the same and wait; single numbers are fine.

        Raises:
            As `submit`; the first transfer's error; PeerTimeout: the deadline passed.
        """
        here, there, sizes = ([c] if isinstance(c, int) else c for c in (local, remote, lengths))
        batch, peer, parts = self._prepare(op, name, here, there, sizes, deadline_s, transport)
        for chosen, part in parts[1:]:
            peer.threads.submit(self._dispatcher.run_part, batch, peer, part, chosen)
        if parts:  # one part in this thread: a hand-over costs more than a small transfer
            self._dispatcher.run_part(batch, peer, parts[0][1], parts[0][0])
        if not batch.wait():
            batch.cancel()
        batch.check()

    def view(self, name: str, address: int, size_bytes: int) -> memoryview:
        """Return a same-host peer's bytes read-only, without a copy; its owner may change them.

        Raises:
            RequestError: no such buffer, or it is not shared memory; as `peer`.
        """
        peer = self.peer(name)
        theirs = self._find(peer, address, size_bytes)
        if theirs.shm is None or not self._shm_reaches(peer, theirs):
            raise RequestError(f"{name}: {address:#x} is not shared memory of this host: transfer it")
        return self._shm.view(peer, theirs, address, size_bytes)

    def _prepare(
        self,
        op: Opcode,
        name: str,
        local: Sequence[int],
        remote: Sequence[int],
        lengths: Sequence[int],
        deadline_s: float,
        hint: str,
    ) -> tuple[Batch, RemotePeer, list[tuple[str, list[Slice]]]]:
        """Check everything, charge it, and cut it into parts: (transport to begin with, slices)."""
        if not len(local) == len(remote) == len(lengths):
            raise RequestError(
                f"{len(local)} local and {len(remote)} remote addresses, {len(lengths)} lengths"
            )
        call = Call(deadline_s)
        peer = self.peer(name, min(deadline_s, CONNECT_S))
        slices = self._slices(peer, local, remote, lengths)
        size_bytes = sum(piece.size_bytes for piece in slices)
        batch = Batch(op, size_bytes, len(lengths), call)
        used = list({piece.mine.buffer_id: piece.mine for piece in slices}.values())
        self._registry.take(*used)
        try:
            self._charge(batch)
        except MooncakeError:
            self._registry.give(*used)
            raise
        batch.on_settled(lambda: self._settled(batch, used))
        parts: list[tuple[str, list[Slice]]] = []
        for chosen, group in self._dispatcher.by_transport(peer, slices, (), hint).items():
            lanes = self._transports[chosen].lanes(peer) if chosen else 1
            if lanes > 1 and size_bytes >= 2 * PART_BYTES:
                lanes = min(lanes, sum(piece.size_bytes for piece in group) // PART_BYTES)
                parts += [(chosen, part) for part in divide(group, lanes)]
            else:
                parts.append((chosen, group))
        batch.begin(len(parts))
        return batch, peer, parts

    def _slices(
        self, peer: RemotePeer, local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]
    ) -> list[Slice]:
        slices: list[Slice] = []
        mine: Buffer | None = None
        theirs: BufferInfo | None = None
        end = 0
        for index, (here, there, size) in enumerate(zip(local, remote, lengths, strict=True)):
            if size <= 0 or here <= 0 or there <= 0:
                if size == 0:
                    continue
                raise RequestError(f"transfer {index}: {size} bytes from {here:#x} to {there:#x}")
            if mine is None or here < mine.address or here + size > mine.end:
                mine = self._registry.find(here, size)
                if mine is None:
                    raise RequestError(f"transfer {index}: {here:#x}+{size} is not registered here")
            if theirs is None or there < theirs.address or there + size > end:
                theirs = self._find(peer, there, size)
                end = theirs.address + theirs.size_bytes
            slices.append(Slice(index, here, there, size, mine, theirs))
        return slices

    def _find(self, peer: RemotePeer, address: int, size_bytes: int) -> BufferInfo:
        """Return the peer's buffer; ask it once more if we know of none."""
        found = peer.find(address, size_bytes)
        if found is None:
            peer.refresh(CONNECT_S)
            found = peer.find(address, size_bytes)
        if found is None:
            raise RequestError(f"{peer.name} has registered no buffer that holds {address:#x}+{size_bytes}")
        return found

    def _charge(self, batch: Batch) -> None:
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            if len(self._in_flight) >= BATCHES_MAX or (
                self._in_flight and self._in_flight_bytes + batch.size_bytes > self.config.in_flight_bytes_max
            ):
                raise CapacityError(
                    f"{len(self._in_flight)} batches, {self._in_flight_bytes} bytes are under way: wait"
                )
            self._in_flight.add(batch)
            self._in_flight_bytes += batch.size_bytes

    def _settled(self, batch: Batch, used: Iterable[Buffer]) -> None:
        self._registry.give(*used)
        with self._lock:
            self._in_flight.discard(batch)
            self._in_flight_bytes -= batch.size_bytes

    def _check_open(self) -> None:
        if self._closed or not self.name:
            raise RequestError("the engine is closed" if self._closed else "start the engine first")

    def _shm_reaches(self, peer: RemotePeer, theirs: BufferInfo) -> bool:
        return bool(theirs.key) and peer.info.host == self._host
