"""`mooncake.store`: upstream Mooncake's Python store, on our pool.

Names, signatures and return codes are those of `mooncake-transfer-engine` 0.3.13.post1, measured on its
wheel; vLLM, SGLang, LMCache and others import it as they import upstream's. docs/store.md says what each
call does and what differs. On purpose it differs where upstream ends the process or hides a failure:

- a call before `setup` or after `close` is an error: a code where a code is returned, else an exception;
- `get` and `get_buffer` raise when an object may be there and cannot be read: that is no miss;
- what lives on stores that are there can be used while the master is away;
- every read is verified by checksum.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from mooncake.core.errors import MooncakeError, RequestError
from mooncake.dropin.client.counted import calls_of
from mooncake.dropin.client.dummy import DummySettings, DummyStarted
from mooncake.dropin.engine.start import log_to_stderr
from mooncake.dropin.store.answers import answers_code, answers_codes
from mooncake.dropin.store.buffers import (
    BufferLease,
    BufferLeaseView,
    BufferPool,
    RegisteredBufferLease,
    RegisteredBufferLeaseView,
    RegisteredBufferPool,
)
from mooncake.dropin.store.calls import Calls, Parts, texts
from mooncake.dropin.store.engram import EngramStore, EngramStoreConfig
from mooncake.dropin.store.hostmem import (
    MooncakeHostMemAllocator,
    bind_to_numa_node,
    get_alloc_func_addr,
    get_free_func_addr,
)
from mooncake.dropin.store.memory_forms import MemoryForms
from mooncake.dropin.store.parallel_forms import ParallelForms
from mooncake.dropin.store.parallel_types import ParallelAxis, ReadTarget, TensorParallelism
from mooncake.dropin.store.segment_forms import SegmentForms
from mooncake.dropin.store.sessions import SessionForms, Sessions
from mooncake.dropin.store.settings import BUFFER_BYTES, Settings
from mooncake.dropin.store.start import Started
from mooncake.dropin.store.tasks import TaskForms
from mooncake.dropin.store.tensor_forms import TensorForms
from mooncake.dropin.store.tensors import metadata_size as _tensor_metadata_size
from mooncake.dropin.store.tensors import serialize as _serialize_tensor
from mooncake.dropin.store.tensors import tensor_of as _deserialize_tensor
from mooncake.dropin.store.types import (
    ACTIVATION,
    COMPLETE,
    FAILED,
    GENERAL,
    GRADIENT,
    INITIALIZED,
    INTERNAL,
    INVALID_PARAMS,
    KVCACHE,
    METADATA,
    OK,
    OPTIMIZER_STATE,
    PENDING,
    PROCESSING,
    REMOVED,
    REPLICA_COPY,
    REPLICA_MOVE,
    RPC_FAIL,
    SAMPLE,
    SUCCESS,
    TENSOR,
    UNDEFINED,
    UNKNOWN,
    WEIGHT,
    BufferHandle,
    Descriptor,
    DiskDescriptor,
    MemoryDescriptor,
    ObjectDataType,
    QueryTaskResponse,
    ReplicaDescriptor,
    ReplicaStatus,
    ReplicateConfig,
    SoftPinAction,
    TaskStatus,
    TaskType,
    descriptors,
)
from mooncake.dropin.store.vendor import MooncakeDistributedNoFRegister, _get_pyclient_from_wrapper
from transfer.model import Buffer

__all__ = [
    "ACTIVATION",
    "COMPLETE",
    "FAILED",
    "GENERAL",
    "GRADIENT",
    "INITIALIZED",
    "KVCACHE",
    "METADATA",
    "OPTIMIZER_STATE",
    "PENDING",
    "PROCESSING",
    "REMOVED",
    "REPLICA_COPY",
    "REPLICA_MOVE",
    "SAMPLE",
    "SUCCESS",
    "TENSOR",
    "UNDEFINED",
    "UNKNOWN",
    "WEIGHT",
    "BufferHandle",
    "BufferLease",
    "BufferLeaseView",
    "BufferPool",
    "Descriptor",
    "DiskDescriptor",
    "EngramStore",
    "EngramStoreConfig",
    "MemoryDescriptor",
    "MooncakeDistributedNoFRegister",
    "MooncakeDistributedStore",
    "MooncakeHostMemAllocator",
    "ObjectDataType",
    "ParallelAxis",
    "QueryTaskResponse",
    "ReadTarget",
    "RegisteredBufferLease",
    "RegisteredBufferLeaseView",
    "RegisteredBufferPool",
    "ReplicaDescriptor",
    "ReplicaStatus",
    "ReplicateConfig",
    "SoftPinAction",
    "TaskStatus",
    "TaskType",
    "TensorParallelism",
    "_deserialize_tensor",
    "_get_pyclient_from_wrapper",
    "_serialize_tensor",
    "_tensor_metadata_size",
    "bind_to_numa_node",
    "get_alloc_func_addr",
    "get_free_func_addr",
]

HEALTHY = 0
NOT_SET_UP = 1
NO_MASTER = 2
"""Answers of health_check; 0 and 2 as measured on upstream, which crashes where we answer 1."""
P2P_HANDSHAKE = "P2PHANDSHAKE"

log = structlog.get_logger(__name__)


class MooncakeDistributedStore(
    MemoryForms, SegmentForms, TensorForms, ParallelForms, SessionForms, TaskForms
):
    """A client of the pool. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Open nothing; `setup` does."""
        self._lock = threading.Lock()
        self._calls: Calls | None = None
        self._finalizer: Any = None
        self._buffers: dict[int, Buffer] = {}
        self._sessions = Sessions()
        log_to_stderr()

    # ------------------------------------------------------------ life

    @answers_code
    def setup(
        self,
        local_hostname: str | dict[str, Any] = "",
        metadata_server: str = "",
        global_segment_size: int | str = 0,
        local_buffer_size: int | str = BUFFER_BYTES,
        protocol: str = "tcp",
        rdma_devices: str = "",
        master_server_addr: str = "",
        engine: object = None,  # noqa: ARG002 - see Args
        enable_ssd_offload: bool = False,
        ssd_offload_path: str = "",
        tenant_id: str = "default",
        enable_client_http_server: bool = False,
        client_http_port: int = 9300,
        *,
        config: dict[str, Any] | None = None,
    ) -> int:
        """Join the pool; see mooncake.dropin.store.settings for what the settings mean here.

        A second call with the same settings changes nothing; with others it ends the first client.

        Args:
            local_hostname: how other hosts call this one, "10.0.0.5" or "10.0.0.5:17777"; or all settings
                in one dict, where sizes may be texts like "16MB".
            metadata_server: any; needed by upstream only.
            global_segment_size: bytes given to the pool; 0 = none.
            local_buffer_size: any; needed by upstream only.
            protocol: "tcp" | "rdma". Same-host stores are used by shared memory.
            rdma_devices: "mlx5_0,mlx5_1"; "" = all.
            master_server_addr: HOST:PORT of mooncake_master, or etcd://...
            engine: not used: the pool has an engine of its own.
            enable_ssd_offload: the segment has a tier on the SSD, which the next start finds again.
            ssd_offload_path: a directory for it; "" = of MOONCAKE_OFFLOAD_FILE_STORAGE_PATH.
            tenant_id: whose names these are.
            enable_client_http_server: answer /health, /metrics and /metrics/summary, on loopback.
            client_http_port: there; one that is taken is a warning.
            config: the dict, by its name.

        Returns:
            0; -600: a setting is wrong; -1: the master or this machine refuses.
        """
        given = local_hostname if isinstance(local_hostname, dict) else config
        if given is None:
            given = {
                "local_hostname": local_hostname, "metadata_server": metadata_server,
                "global_segment_size": global_segment_size, "local_buffer_size": local_buffer_size,
                "protocol": protocol, "rdma_devices": rdma_devices,
                "master_server_addr": master_server_addr, "tenant_id": tenant_id,
                "enable_ssd_offload": enable_ssd_offload, "ssd_offload_path": ssd_offload_path,
                "enable_client_http_server": enable_client_http_server, "client_http_port": client_http_port,
            }  # fmt: skip
        settings = Settings.of(given)
        settings.master  # noqa: B018 - raises
        return self._join(settings, lambda: Started(settings))

    @answers_code
    def setup_dummy(self, mem_pool_size: int | str, local_buffer_size: int | str, server_address: str) -> int:
        """Join the pool through this host's real client, `mooncake_client`; this process gives no memory.

        Args:
            mem_pool_size: any; alloc_from_mem_pool takes what it needs.
            local_buffer_size: any; nothing is staged.
            server_address: HOST:PORT of the real client.

        Returns:
            0; -600: an argument is wrong; -1: there is no real client.
        """
        settings = DummySettings.of_dummy(mem_pool_size, local_buffer_size, server_address)
        return self._join(settings, lambda: DummyStarted(settings))

    def _join(self, settings: Settings, start: Callable[[], Started]) -> int:
        with self._lock:
            if self._calls is not None and _asked(self._calls.started) == settings:
                return OK
            self._close()
            try:
                started = start()
            except MooncakeError as error:
                log.error("mooncake.store: setup failed", reason=str(error))
                return INTERNAL
            self._calls = calls_of(started, settings)
            self._finalizer = weakref.finalize(self, started.close)
        return OK

    def init_all(self, arg0: str, arg1: str, arg2: int, /) -> int:
        """Do a short setup: protocol, devices, bytes given to the pool; -600: it is set up already."""
        if self._calls is not None:
            log.error("mooncake.store: init_all: it is set up already")
            return INVALID_PARAMS
        return self.setup("127.0.0.1", P2P_HANDSHAKE, arg2, BUFFER_BYTES, arg0, arg1)

    def close(self) -> int:
        """Leave the pool with this process's segment and what is in it (idempotent)."""
        with self._lock:
            self._close()
        return OK

    def _close(self) -> None:
        finalizer, self._finalizer, self._calls = self._finalizer, None, None
        self._buffers.clear()
        self._sessions = Sessions()
        if finalizer is not None:
            finalizer()

    def _need(self) -> Calls:
        calls = self._calls
        if calls is None:
            raise RequestError("call setup first, and look at what it returns")
        return calls

    def get_hostname(self) -> str:
        """Return "host:port" of this client, which is also the name of its segment; "" before setup."""
        return self._calls.started.hostname if self._calls else ""

    def health_check(self) -> int:
        """Return 0: in the pool; 1: not set up; 2: the master is away."""
        if self._calls is None:
            return NOT_SET_UP
        return HEALTHY if self._calls.started.background.has_master() else NO_MASTER

    # ------------------------------------------------------------ objects as bytes

    @answers_code
    def put(self, key: str, value: Any, config: ReplicateConfig | None = None) -> int:
        """Store a copy of `value`; 0 also if the key is there: its value stays."""
        return self._need().put(texts([key]), [[memoryview(value)]], config)[0]

    @answers_code
    def put_parts(self, key: str, *args: Any, config: ReplicateConfig | None = None) -> int:
        """Store buffers as one object, one behind the other; none at all is 0."""
        parts = [memoryview(part) for part in args]
        return self._need().put(texts([key]), [parts], config)[0] if parts else OK

    @answers_code
    def put_batch(
        self, keys: Sequence[str], values: Sequence[Any], config: ReplicateConfig | None = None
    ) -> int:
        """Store several; 0, or the code of the first that failed. An empty one: none is stored."""
        return self._batch(self._need().put, keys, values, config)

    @staticmethod
    def _batch(
        write: Callable[[Sequence[str], Sequence[Parts], ReplicateConfig | None], list[int]],
        keys: Sequence[str],
        values: Sequence[Any],
        config: ReplicateConfig | None,
    ) -> int:
        sources = [[memoryview(value)] for value in values]
        if len(keys) != len(sources) or not all(parts[0].nbytes for parts in sources):
            return INVALID_PARAMS
        return next((code for code in write(texts(keys), sources, config) if code), OK)

    @answers_code
    def upsert(self, key: str, value: Any, config: ReplicateConfig | None = None) -> int:
        """Store `value`, in the place of what is there."""
        return self._need().upsert(texts([key]), [[memoryview(value)]], config)[0]

    @answers_code
    def upsert_parts(self, key: str, *args: Any, config: ReplicateConfig | None = None) -> int:
        """As put_parts, in the place of what is there."""
        parts = [memoryview(part) for part in args]
        return self._need().upsert(texts([key]), [parts], config)[0] if parts else OK

    @answers_code
    def upsert_batch(
        self, keys: Sequence[str], values: Sequence[Any], config: ReplicateConfig | None = None
    ) -> int:
        """As put_batch, in the place of what is there."""
        return self._batch(self._need().upsert, keys, values, config)

    def get(self, arg0: str, /) -> bytes:
        """Return the object, b"" if there is none.

        Raises:
            PeerError: it may be there and cannot be read; RequestError: not set up.
        """
        return self._need().get(texts([arg0]))[0] or b""

    def get_batch(self, arg0: Sequence[str], /) -> list[bytes]:
        """Return the objects, b"" for each that is not there; raises as get."""
        return [value or b"" for value in self._need().get(texts(arg0))]

    def get_buffer(self, arg0: str, /) -> BufferHandle | None:
        """Return the object in memory that can be written to, None if there is none; raises as get."""
        return self.batch_get_buffer([arg0])[0]

    def batch_get_buffer(self, arg0: Sequence[str], /) -> list[BufferHandle | None]:
        """As get_buffer, for several."""
        return [None if value is None else BufferHandle(value) for value in self._need().get(texts(arg0))]

    # ------------------------------------------------------------ looking and removing

    @answers_code
    def is_exist(self, arg0: str, /) -> int:
        """Return 1 or 0; negative: nobody can tell."""
        size = self._need().sizes(texts([arg0]))[0]
        return _there(size)

    @answers_codes
    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """As is_exist, for several."""
        return [_there(size) for size in self._need().sizes(texts(keys))]

    @answers_code
    def get_size(self, arg0: str, /) -> int:
        """Return the bytes of an object, -704: there is none."""
        return self._need().sizes(texts([arg0]))[0]

    @answers_code
    def remove(self, key: str, force: bool = False) -> int:
        """Remove an object everywhere; -704: there is none, -706: somebody has just read it."""
        return self._need().remove(texts([key]), force)[0]

    @answers_codes
    def batch_remove(self, keys: Sequence[str], force: bool = False) -> list[int]:
        """As remove, for several."""
        return self._need().remove(texts(keys), force)

    @answers_code
    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        """Remove what has a name in which the pattern (Python's) occurs; return how many."""
        return self._need().remove_matching(regex_pattern, force)

    @answers_code
    def remove_all(self, force: bool = False) -> int:
        """Remove every object of this tenant that was put by name; return how many."""
        return self._need().remove_matching(None, force)

    def get_replica_desc(self, key: str) -> list[ReplicaDescriptor]:
        """Return where the copies of an object are; raises as get."""
        return descriptors(self._need().places(texts([key]))[0])

    def batch_get_replica_desc(self, keys: Sequence[str]) -> dict[str, list[ReplicaDescriptor]]:
        """As get_replica_desc, for those of `keys` that are there."""
        places = self._need().places(texts(keys))
        return {key: descriptors(found) for key, found in zip(keys, places, strict=True) if found}

    def batch_replica_clear(self, keys: Sequence[str], segment_name: str = "") -> list[str]:
        """Remove copies, of one segment or all, of what nobody has just read; return those names.

        Raises:
            RequestError: not set up.
        """
        return self._need().clear(texts(keys), segment_name)


def _asked(started: Started) -> Settings:
    return started.asked if isinstance(started, DummyStarted) else started.settings


def _there(size: int) -> int:
    if size > 0:
        return 1
    return size if size == RPC_FAIL else 0
