"""`mooncake.engine`: upstream Mooncake's Python transfer engine, on ours.

Names, signatures and return codes are those of `mooncake-transfer-engine` 0.3.13.post1, measured on its
wheel; vLLM, SGLang and others import it as they import upstream's. Three things differ on purpose, for
upstream ends the process there or lets strangers in:

- a misuse (a call before `initialize`, a batch id twice, an address that is not mapped) is logged in one
  line and answered with the code of a failure, never with a crash;
- local memory has to be registered for every transport, as upstream demands for RDMA only;
- it listens on loopback unless MOONCAKE_SECRET (or MOONCAKE_SECRET_FILE) is set, for all engines alike.

Besides, `close` ends an engine; else it ends with its object.
"""

import ctypes
import enum
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import structlog

from mooncake.core.errors import MooncakeError, PeerError, PeerTimeout, RequestError
from mooncake.dropin.engine.rpc import (
    CoroRPCInterface,
    ReceivedData,
    ReceivedTensor,
    RpcInterface,
    create_rpc_client,
    create_rpc_server,
)
from mooncake.dropin.engine.segment import SharedSegment
from mooncake.dropin.engine.start import TRANSPORTS, Started, log_to_stderr
from transfer import engine as transfer_engine
from transfer.batch import Batch
from transfer.memory import check_mapped
from transfer.model import Call, Opcode
from transfer.naming import P2P, PeerToPeer
from transfer.topology import Topology, parse_names

__all__ = [
    "SUPPORT_CUDA",
    "SUPPORT_EFA",
    "SUPPORT_HIP",
    "SUPPORT_INTRA_NVLINK",
    "SUPPORT_MNNVL",
    "SUPPORT_MUSA",
    "CoroRPCInterface",
    "InnerTransferEngine",
    "Read",
    "ReceivedData",
    "ReceivedTensor",
    "RpcInterface",
    "SharedSegment",
    "TransferEngine",
    "TransferNotify",
    "TransferOpcode",
    "Write",
    "create_rpc_client",
    "create_rpc_server",
]

SUPPORT_CUDA = False
SUPPORT_EFA = False
SUPPORT_HIP = False
SUPPORT_INTRA_NVLINK = False
SUPPORT_MNNVL = False
SUPPORT_MUSA = False

FAILED = -1
"""Also what upstream answers for a bad setting, a bad peer and a refused range."""
TIMED_OUT = -2
DONE = 1
PENDING = 0
NOT_REGISTERED = -3
OVERLAP = -7
BAD_NAME = -101
NO_ANSWER = -102
UNKNOWN_NAME = -200
"""Codes as measured on upstream: unregister, register, probe of what is no address, of a dead peer, of a
name that the metadata server does not know."""

log = structlog.get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class TransferOpcode(enum.IntEnum):
    """Direction of a transfer, as the initiator sees it."""

    Read = 0
    Write = 1


Direction: TypeAlias = TransferOpcode
"""Inside TransferEngine, where upstream has the enum as an attribute too."""
Read = TransferOpcode.Read
Write = TransferOpcode.Write


class TransferNotify:
    """A word from one application to the other."""

    def __init__(self, name: str = "", msg: str = "") -> None:
        """Both are text."""
        self.name = name
        self.msg = msg


class InnerTransferEngine:
    """What `get_engine` returns: a handle for other classes of this package, opaque as upstream's."""

    def __init__(self, engine: transfer_engine.TransferEngine) -> None:
        """Made by TransferEngine.get_engine."""
        self.engine = engine


def _answers(failed: R) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Make a method answer `failed`, and log one line, instead of raising an error of ours."""

    def wrap(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except MooncakeError as error:
                log.error("mooncake.engine: call failed", call=method.__name__, reason=str(error))
                return failed

        return call

    return wrap


class TransferEngine:
    """See the module. Every method may be called from any thread."""

    TransferOpcode = TransferOpcode

    def __init__(self) -> None:
        """Open nothing; `initialize` does."""
        self._lock = threading.Lock()
        self._started: Started | None = None
        self._finalizer: Any = None
        log_to_stderr()

    # ------------------------------------------------------------ life

    @_answers(FAILED)
    def initialize(
        self,
        local_hostname: str,
        metadata_server: str,
        protocol: str,
        device_name: str | None,
        /,
    ) -> int:
        """Start; a second call ends the first engine and starts another.

        Args:
            local_hostname: how peers call this host, "10.0.0.5" or "10.0.0.5:17777". It is the name
                under which a metadata server knows this engine; with P2PHANDSHAKE the name is
                "host:port" with the port of `get_rpc_port`.
            metadata_server: see transfer.naming.naming_of.
            protocol: "tcp" | "rdma" | "" = whatever is here. Same-host peers use shared memory.
            device_name: RDMA devices, "mlx5_0,mlx5_1"; "" = all.

        Returns:
            0, or a negative code: a setting is wrong, or the metadata server cannot be reached.
        """
        _texts(local_hostname, metadata_server, protocol, device_name or "")
        with self._lock:
            self._close()
            started = Started(local_hostname, metadata_server, protocol, device_name or "")
            self._started = started
            self._finalizer = weakref.finalize(self, started.close)
        return 0

    def initialize_ext(
        self,
        local_hostname: str,
        metadata_server: str,
        protocol: str,
        device_name: str | None,
        metadata_type: str,
        /,
    ) -> int:
        """As `initialize`, with the scheme ("http" | "etcd") apart from the metadata server's address."""
        _texts(metadata_server, metadata_type)
        if metadata_server != P2P and "://" not in metadata_server:
            metadata_server = f"{metadata_type}://{metadata_server}"
        return self.initialize(local_hostname, metadata_server, protocol, device_name)

    def close(self) -> None:
        """End the engine (idempotent)."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        finalizer, self._finalizer, self._started = self._finalizer, None, None
        if finalizer is not None:
            finalizer()

    def _need(self) -> Started:
        started = self._started
        if started is None:
            raise RequestError("call initialize first, and look at what it returns")
        return started

    @_answers(FAILED)
    def get_rpc_port(self) -> int:
        """Return the port that peers reach this engine at."""
        return self._need().engine.port

    def get_engine(self) -> InnerTransferEngine | None:
        """Return a handle of the engine, None before `initialize`."""
        started = self._started
        return InnerTransferEngine(started.engine) if started else None

    def get_engine_ptr(self) -> int:
        """Return 0: there is no C++ object behind this engine."""
        log.warning("mooncake.engine: get_engine_ptr: this engine is no C++ object", answer=0)
        return 0

    # ------------------------------------------------------------ memory

    @_answers(FAILED)
    def register_memory(self, buffer_addr: int, capacity: int, location: str = "*") -> int:
        """Let peers reach `capacity` bytes at `buffer_addr`; -7: they overlap registered memory."""
        return self._register(self._need(), _natural(buffer_addr), _natural(capacity), location)

    @staticmethod
    def _register(started: Started, address: int, size_bytes: int, location: str) -> int:
        if size_bytes == 0:
            raise RequestError("capacity 0: nothing to register")
        known = location.partition(":")[0] in ("cpu", "cuda")
        if any(old.address < address + size_bytes and address < old.end for old in started.engine.buffers):
            log.warning("mooncake.engine: memory overlaps a registered range", address=hex(address))
            return OVERLAP
        started.engine.register(address, size_bytes, location if known else "*")
        return 0

    @_answers(FAILED)
    def unregister_memory(self, arg0: int, /) -> int:
        """End the registration that begins at this address; -3: there is none."""
        return self._unregister(self._need(), _natural(arg0))

    @staticmethod
    def _unregister(started: Started, address: int) -> int:
        buffer = started.engine.buffer_at(address)
        if buffer is None or buffer.address != address:
            log.warning("mooncake.engine: no memory is registered there", address=hex(address))
            return NOT_REGISTERED
        started.release(buffer)
        return 0

    @_answers(FAILED)
    def batch_register_memory(
        self, buffer_addresses: Sequence[int], capacities: Sequence[int], location: str = "*"
    ) -> int:
        """Register all; the first failure's code, with the rest registered nevertheless."""
        started = self._need()
        addresses, sizes = _naturals(buffer_addresses), _naturals(capacities)
        if len(addresses) != len(sizes):
            raise RequestError(f"{len(addresses)} addresses, {len(sizes)} capacities")
        codes = [self._register(started, *pair, location) for pair in zip(addresses, sizes, strict=True)]
        return next((code for code in codes if code), 0)

    @_answers(FAILED)
    def batch_unregister_memory(self, arg0: Sequence[int], /) -> int:
        """Unregister all; the first failure's code, with the rest unregistered nevertheless."""
        started = self._need()
        codes = [self._unregister(started, address) for address in _naturals(arg0)]
        return next((code for code in codes if code), 0)

    @_answers(0)
    def allocate_managed_buffer(self, arg0: int, /) -> int:
        """Return the address of that many registered bytes, 0 if there are none."""
        return self._need().managed.allocate(_natural(arg0))

    @_answers(FAILED)
    def free_managed_buffer(self, arg0: int, arg1: int, /) -> int:
        """Give a managed buffer back; of the length only its sign matters. Unknown ones are ignored."""
        _natural(arg1)
        if not self._need().managed.free(_natural(arg0)):
            log.warning("mooncake.engine: no managed buffer is there", address=hex(arg0))
        return 0

    @_answers(0)
    def get_first_buffer_address(self, arg0: str, /) -> int:
        """Return the address of the oldest buffer that this peer (or this engine) has, 0 = none."""
        started = self._need()
        if arg0 in (started.name, started.engine.name):
            info = started.engine.info
        else:
            with started.at(arg0) as address:
                info = started.engine.peer(address, started.env.connect_s).refresh(started.env.connect_s)
        oldest = min(info.buffers, key=lambda buffer: buffer.buffer_id, default=None)
        return oldest.address if oldest else 0

    @_answers(FAILED)
    def write_bytes_to_buffer(self, arg0: int, arg1: str | bytes, arg2: int, /) -> int:
        """Copy the first `arg2` bytes of `arg1` to address `arg0` of this process."""
        data = arg1.encode() if isinstance(arg1, str) else bytes(arg1)
        address, size_bytes = _natural(arg0), _natural(arg2)
        if size_bytes > len(data):
            raise RequestError(f"{size_bytes} bytes of {len(data)}")
        self._check_mapped(address, size_bytes)
        ctypes.memmove(address, data, size_bytes)
        return 0

    @_answers(b"")
    def read_bytes_from_buffer(self, arg0: int, arg1: int, /) -> bytes:
        """Return `arg1` bytes at address `arg0` of this process, b"" if they are not mapped."""
        address, size_bytes = _natural(arg0), _natural(arg1)
        self._check_mapped(address, size_bytes)
        return ctypes.string_at(address, size_bytes)

    def _check_mapped(self, address: int, size_bytes: int) -> None:
        held = self._started.engine.buffer_at(address) if self._started else None
        registered = held is not None and held.view is not None and address + size_bytes <= held.end
        if size_bytes and not registered:  # registered memory was looked at once
            check_mapped(address, size_bytes)

    # ------------------------------------------------------------ transfers

    def transfer_sync_write(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        transport_hint: str = "",
    ) -> int:
        """Write to the peer; 0 or a negative code."""
        return self.transfer_sync(
            target_hostname, buffer, peer_buffer_address, length, Write, None, transport_hint
        )

    def transfer_sync_read(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        transport_hint: str = "",
    ) -> int:
        """Read from the peer; 0 or a negative code."""
        return self.transfer_sync(
            target_hostname, buffer, peer_buffer_address, length, Read, None, transport_hint
        )

    def transfer_sync(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        opcode: Direction,
        notify: TransferNotify | None = None,
        transport_hint: str = "",
    ) -> int:
        """Transfer, then tell the peer `notify`; 0 or a negative code."""
        return self.batch_transfer_sync(
            target_hostname, [buffer], [peer_buffer_address], [length], opcode, notify, transport_hint
        )

    def batch_transfer_sync_write(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Write all; 0 if all arrived, else a negative code."""
        return self.batch_transfer_sync(
            target_hostname, buffers, peer_buffer_addresses, lengths, Write, None, transport_hint
        )

    def batch_transfer_sync_read(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Read all; 0 if all arrived, else a negative code."""
        return self.batch_transfer_sync(
            target_hostname, buffers, peer_buffer_addresses, lengths, Read, None, transport_hint
        )

    @_answers(FAILED)
    def batch_transfer_sync(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        opcode: Direction,
        notify: TransferNotify | None = None,
        transport_hint: str = "",
    ) -> int:
        """Transfer all, then tell the peer `notify`; 0 if all arrived, else a negative code."""
        _opcode(opcode)
        _texts(target_hostname, transport_hint)
        columns = _naturals(buffers), _naturals(peer_buffer_addresses), _naturals(lengths)
        started = self._need()
        with started.at(target_hostname) as address:
            deadline_s = started.env.transfer_s
            started.engine.peer(address, min(deadline_s, started.env.connect_s))
            started.engine.transfer(
                Opcode(opcode), address, *columns, deadline_s=deadline_s, transport=_hint(transport_hint)
            )
            if notify is not None:
                started.engine.notify(address, notify.name, notify.msg)
        return 0

    def transfer_submit_write(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        transport_hint: str = "",
    ) -> int:
        """Begin a write; return its id for `transfer_check_status`, 0 = refused."""
        return self.batch_transfer_async(
            target_hostname, [buffer], [peer_buffer_address], [length], Write, transport_hint
        )

    def batch_transfer_async_write(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Begin writes; return their id for `get_batch_transfer_status`, 0 = refused."""
        return self.batch_transfer_async(
            target_hostname, buffers, peer_buffer_addresses, lengths, Write, transport_hint
        )

    def batch_transfer_async_read(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Begin reads; return their id for `get_batch_transfer_status`, 0 = refused."""
        return self.batch_transfer_async(
            target_hostname, buffers, peer_buffer_addresses, lengths, Read, transport_hint
        )

    @_answers(0)
    def batch_transfer_async(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        opcode: Direction,
        transport_hint: str = "",
    ) -> int:
        """Begin transfers; return their id, 0 = refused. The memory stays in use until they have ended."""
        _opcode(opcode)
        _texts(target_hostname, transport_hint)
        columns = _naturals(buffers), _naturals(peer_buffer_addresses), _naturals(lengths)
        started = self._need()
        if not len(columns[0]) == len(columns[1]) == len(columns[2]):
            raise RequestError("as many addresses as lengths, on both sides")
        op, deadline_s = Opcode(opcode), started.env.transfer_s
        with started.at(target_hostname) as address:
            started.engine.peer(address, min(deadline_s, started.env.connect_s))
            try:
                batch = started.engine.submit(
                    op, address, *columns, deadline_s=deadline_s, transport=_hint(transport_hint)
                )
            except RequestError as error:  # a range that is not registered: upstream's batches fail later
                batch = Batch(op, 0, 1, Call(0.0))
                batch.errors[0] = error
                batch.begin(0)
        return started.keep(batch)

    @_answers(FAILED)
    def transfer_check_status(self, arg0: int, /) -> int:
        """Return 1 = done, 0 = under way, -1 = failed, -2 = timed out. An end is reported once."""
        started = self._need()
        number = _natural(arg0)
        batch = started.batch(number)
        if not batch.done():
            return PENDING
        started.forget(number)
        for error in batch.errors.values():
            log.error("mooncake.engine: transfer failed", batch=number, reason=str(error))
            return TIMED_OUT if isinstance(error, PeerTimeout) else FAILED
        return DONE

    @_answers(FAILED)
    def get_batch_transfer_status(self, arg0: Sequence[int], /) -> int:
        """Wait until all these batches have ended; 0 = all done, -1 = one failed. Ends are reported once."""
        started = self._need()
        numbers = _naturals(arg0)
        code = 0
        for number, batch in [(number, started.batch(number)) for number in numbers]:
            if not batch.wait():
                batch.cancel()
            else:
                started.forget(number)
            try:
                batch.check()
            except MooncakeError as error:
                log.error("mooncake.engine: transfer failed", batch=number, reason=str(error))
                code = FAILED
        return code

    # ------------------------------------------------------------ the rest

    def get_notifies(self) -> list[TransferNotify]:
        """Return what peers have sent since the last call."""
        started = self._started
        if started is None:
            log.error("mooncake.engine: call failed", call="get_notifies", reason="call initialize first")
            return []
        return [TransferNotify(name, text) for name, text in started.engine.notifications()]

    @_answers(FAILED)
    def send_probe(self, peer_server_name: str) -> int:
        """Ask a peer for a sign of life: 0, -101 = no address, -102 = no answer, -200 = no such name."""
        started = self._need()
        try:
            with started.at(peer_server_name) as address:
                started.engine.probe(address, started.env.connect_s)
        except MooncakeError as error:
            log.warning("mooncake.engine: probe failed", peer=peer_server_name, reason=str(error))
            if isinstance(error, PeerError):
                return NO_ANSWER
            return BAD_NAME if isinstance(started.naming, PeerToPeer) else UNKNOWN_NAME
        return 0

    @_answers("{}")
    def get_local_topology(self, device_name: str | None = None) -> str:
        """Return the NIC matrix as JSON: location -> [preferred, secondary], of `device_name` only."""
        started = self._started
        custom = started.env.topology if started else ""
        here = Topology.load(Path(custom)) if custom else Topology.discover()
        only = parse_names(device_name or "")
        if not only:
            return here.to_json()
        rows = {
            place: ([nic for nic in near if nic in only], [nic for nic in far if nic in only])
            for place, (near, far) in here.rows.items()
        }
        return Topology(rows).to_json()

    def warmup_efa_segment(self, segment_name: str) -> int:  # noqa: ARG002 - upstream's signature
        """Return 0: nothing to warm up without EFA, as upstream answers."""
        return 0


def _hint(text: str) -> str:
    """Return the transport to prefer; upstream takes any text and ignores what it does not know."""
    return text if text in TRANSPORTS[""] else ""


def _natural(value: Any) -> int:
    """Return `value` as an int; raises TypeError like upstream for what is no number of 0 or more."""
    number = operator.index(value)
    if number < 0:
        raise TypeError(f"{number}: must not be negative")
    return number


def _naturals(values: Any) -> list[int]:
    return [_natural(value) for value in values]


def _texts(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r}: must be a str")


def _opcode(value: Any) -> None:
    if not isinstance(value, TransferOpcode):
        raise TypeError(f"{value!r}: must be a TransferOpcode")
