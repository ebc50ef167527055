"""The KV connector that vLLM loads: over the Mooncake pool: one class, made once per side.

vLLM makes two instances: SCHEDULER (beside its scheduler) and WORKER (in the model runner); see
connector_scheduler.py and connector_worker.py for what each does. Registered by module path, so
stock vLLM finds it: `--kv-transfer-config '{"kv_connector": "MooncakeConnector",
"kv_connector_module_path": "mooncake.worker.connector", ...}'`.
"""

import functools
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvstore.engine.client import PoolClient
from mooncake.core.errors import ConfigError
from mooncake.core.tracing import open_tracing
from mooncake.worker.connector_meta import StepMeta
from mooncake.worker.connector_scheduler import SchedulerHalf
from mooncake.worker.connector_worker import WorkerHalf
from mooncake.worker.context import kv_context, ranks_of
from mooncake.worker.pulse import Pulse, RankPulse
from mooncake.worker.spans import PoolSpans
from mooncake.worker.spec import EngineFacts, EngineSpec, current_store, write_facts

log = structlog.get_logger(__name__)

# a virtual subclass: the halves and their tests need no vLLM import
KVConnectorMetadata.register(StepMeta)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from mooncake.core.tracing_sdk import Tracing


def tells_blocks(vllm_config: "VllmConfig", spec: EngineSpec) -> bool:
    """Return whether the engine has a prefix cache and publishes where its relay listens."""
    events = vllm_config.kv_events_config
    if not vllm_config.cache_config.enable_prefix_caching or events is None:
        return False
    return bool(events.enable_kv_cache_events) and events.endpoint == spec.kv_events


class MooncakeConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads KV blocks from the pool and saves computed ones into it."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        """The three parameter names are vLLM's contract."""
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        spec = msgspec.convert(extra["mooncake_spec"], EngineSpec)
        if spec.store is None:
            raise ConfigError("MooncakeConnector without a store record in mooncake_spec")
        ranks, rank = ranks_of(vllm_config, spec), 0
        pulse = Pulse(spec.pulse_path, create=False)
        parallel = vllm_config.parallel_config
        if role == KVConnectorRole.WORKER and parallel.distributed_executor_backend == "mp":
            rank = parallel.rank
            pulse = RankPulse(spec.pulse_path, rank)  # in a process of its own
        writer = f"{spec.instance_id}/{spec.epoch}"
        pool = PoolClient(
            spec.store,
            writer=f"{writer}/{rank}" if rank else writer,
            resolve=functools.partial(current_store, spec.store_path),
            touch=role == KVConnectorRole.WORKER,  # only that side copies bytes
        )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._tracing: Tracing | None = None
        if role == KVConnectorRole.SCHEDULER:
            context = kv_context(vllm_config, kv_cache_config)
            root = context.root()
            # engines that were to share blocks and do not: compare these lines
            log.info("kv.context", root=root.hex(), **context.settings())
            block_size = vllm_config.cache_config.block_size
            self._tracing = open_tracing(spec.role, spec.instance_id)
            self._scheduler = SchedulerHalf(
                pool, root, block_size, spec.load_mode, spec.save_decoded, pulse,
                None if self._tracing is None else PoolSpans(self._tracing), ranks,
            )  # fmt: skip
            page_bytes = kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
            layers = len(kv_cache_config.kv_cache_groups[0].layer_names)
            tells = tells_blocks(vllm_config, spec)
            facts = EngineFacts(root.hex(), page_bytes * layers * ranks, context.settings(), tells, ranks)
            write_facts(spec.facts_path, facts)
        else:
            self._worker = WorkerHalf(pool, pulse, rank, ranks)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: the pool is a cache; a preempted request is simply recomputed or loaded again."""
        return False

    # ------------------------------------------------------------ scheduler side

    @property
    def _sched(self) -> SchedulerHalf:
        assert self._scheduler is not None, "a scheduler call on the worker side"
        return self._scheduler

    def on_new_request(self, request: Any) -> None:  # noqa: D102 - vLLM's contract, see its base class
        self._sched.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:  # noqa: D102
        return self._sched.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:  # noqa: D102
        (block_ids,) = blocks.get_block_ids()
        self._sched.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:  # noqa: D102
        state = scheduler_output.kv_connector_block_state
        if state is not None:
            self._sched.bind_block_ids(state.resolve_block_ids)
        return self._sched.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:  # noqa: D102
        self._sched.loaded(
            connector_output.finished_recving or (), connector_output.invalid_block_ids or set()
        )

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:  # noqa: ARG002, D102
        self._sched.finished(request.request_id)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:  # noqa: D102
        return self.request_finished(request, block_ids)

    # ------------------------------------------------------------ worker side

    @property
    def _work(self) -> WorkerHalf:
        assert self._worker is not None, "a worker call on the scheduler side"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:  # noqa: D102
        self._work.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:  # noqa: D102
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMeta)
        self._work.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002, D102
        self._work.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:  # noqa: D102
        self._work.load_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:  # noqa: ARG002, D102
        self._work.save_layer(layer_name)

    def wait_for_save(self) -> None:  # noqa: D102
        self._work.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002, D102
        finished, self._invalid = self._work.outcome()
        return None, finished or None

    def get_block_ids_with_load_errors(self) -> set[int]:  # noqa: D102
        return self._invalid

    def shutdown(self) -> None:  # noqa: D102
        if self._worker is not None:
            self._worker.close()
        if self._tracing is not None:
            self._tracing.close()
