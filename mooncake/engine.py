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

import threading
import weakref
from pathlib import Path
from typing import Any

import structlog

from mooncake.core.errors import MooncakeError, PeerError, RequestError
from mooncake.dropin.engine.answers import BAD_NAME, FAILED, NO_ANSWER, UNKNOWN_NAME, answers, texts
from mooncake.dropin.engine.memory_forms import MemoryForms
from mooncake.dropin.engine.rpc import (
    CoroRPCInterface,
    ReceivedData,
    ReceivedTensor,
    RpcInterface,
    create_rpc_client,
    create_rpc_server,
)
from mooncake.dropin.engine.segment import SharedSegment
from mooncake.dropin.engine.start import Started, log_to_stderr
from mooncake.dropin.engine.transfer_forms import TransferForms
from mooncake.dropin.engine.types import Read, TransferNotify, TransferOpcode, Write
from transfer import engine as transfer_engine
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

log = structlog.get_logger(__name__)


class InnerTransferEngine:
    """What `get_engine` returns: a handle for other classes of this package, opaque as upstream's."""

    def __init__(self, engine: transfer_engine.TransferEngine) -> None:
        """Made by TransferEngine.get_engine."""
        self.engine = engine


class TransferEngine(MemoryForms, TransferForms):
    """See the module. Every method may be called from any thread."""

    TransferOpcode = TransferOpcode

    def __init__(self) -> None:
        """Open nothing; `initialize` does."""
        self._lock = threading.Lock()
        self._started: Started | None = None
        self._finalizer: Any = None
        log_to_stderr()

    # ------------------------------------------------------------ life

    @answers(FAILED)
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
        texts(local_hostname, metadata_server, protocol, device_name or "")
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
        texts(metadata_server, metadata_type)
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

    @answers(FAILED)
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

    # ------------------------------------------------------------ the rest

    def get_notifies(self) -> list[TransferNotify]:
        """Return what peers have sent since the last call."""
        started = self._started
        if started is None:
            log.error("mooncake.engine: call failed", call="get_notifies", reason="call initialize first")
            return []
        return [TransferNotify(name, text) for name, text in started.engine.notifications()]

    @answers(FAILED)
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

    @answers("{}")
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
