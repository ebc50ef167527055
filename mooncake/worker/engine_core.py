"""vLLM's EngineCoreProc, told its addresses instead of shaking hands, and able to resume requests.

Its input comes from the relay; its outputs go straight to the gateway that owns the slot
(outputs.py). What the network can send must not end it: vLLM's input thread dies with the first
frame that does not decode, ours answers that request with an error.
"""

import contextlib
from collections.abc import Generator
from typing import Any

import msgspec
import structlog
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine import core as vllm_core
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from mooncake.worker.outputs import Attach, OutputRouter
from mooncake.worker.pulse import Pulse
from mooncake.worker.resume import resume_request
from mooncake.worker.spec import EngineSpec

log = structlog.get_logger(__name__)

UNDECODABLE = "mooncake-undecodable"
_CLIENT_INDEX_FIELD = EngineCoreRequest.__struct_fields__.index("client_index")


def undecodable(frame: bytes, error: Exception) -> EngineCoreRequest:
    """Return a request that carries `error` to preprocessing, named as far as the bytes allow."""
    try:
        fields = msgspec.msgpack.decode(frame)
        request_id, client_index = str(fields[0]), int(fields[_CLIENT_INDEX_FIELD])
    except (msgspec.MsgspecError, ValueError, TypeError, LookupError, RecursionError):
        request_id, client_index = "?", -1  # slot -1 is nobody: the sender learns by its deadline
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=None,
        mm_features=None,
        sampling_params=None,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        client_index=client_index,
        trace_headers={UNDECODABLE: f"{type(error).__name__}: {error}"},
    )


class TolerantDecoder(MsgpackDecoder):
    """Turns a request that does not decode into one that fails by itself."""

    def decode(self, bufs: Any) -> Any:
        """Decode as vLLM does; never raises."""
        try:
            return super().decode(bufs)
        except Exception as error:
            # whatever the bytes provoke in msgspec, torch or vLLM's own checks
            log.exception("engine.undecodable_request")
            first: Any = bufs[0] if isinstance(bufs, list | tuple) else bufs
            return undecodable(bytes(getattr(first, "buffer", first)), error)


def install_decoder() -> None:
    """Make vLLM's input thread use TolerantDecoder."""
    vllm_core.MsgpackDecoder = TolerantDecoder


class MooncakeEngine(vllm_core.EngineCoreProc):
    """One engine. Made in its own process; `run_busy_loop` serves until shutdown is requested."""

    def __init__(self, spec: EngineSpec, pulse: Pulse, **arguments: Any) -> None:
        """`arguments` are EngineCoreProc's; its constructor already needs our address."""
        self._spec = spec
        self._pulse = pulse
        super().__init__(**arguments)
        pulse.at_beat = self._say_how_it_is

    @contextlib.contextmanager
    def _perform_handshakes(self, *_: Any) -> Generator[Any, None, None]:
        # outputs: process_output_sockets is ours and learns them while it runs
        yield EngineZmqAddresses(inputs=[self._spec.engine_in], outputs=[])

    def preprocess_add_request(self, request: Any) -> Any:
        """Input thread: refuse what did not decode, resume what an earlier engine began."""
        if request.trace_headers and UNDECODABLE in request.trace_headers:
            raise ValueError(request.trace_headers[UNDECODABLE])
        params = request.sampling_params
        if params is not None and params.extra_args:
            # a client's wish to hear of cached blocks again would have us count them twice (gpu_blocks)
            params.extra_args.pop("kv_cache_report_mode", None)
        prepared, wave = super().preprocess_add_request(request)
        if resume_request(prepared):
            self._pulse.add("resumed_requests", 1)
        return prepared, wave

    def process_output_sockets(self, output_paths: Any, coord_output_path: Any, engine_index: int) -> None:
        """Output thread: encode once, send to the gateway that owns the slot."""
        assert not output_paths
        assert coord_output_path is None
        encoder, router = MsgpackEncoder(), OutputRouter()
        while True:
            item = self.output_queue.get()
            if isinstance(item, bytes):  # ENGINE_CORE_DEAD: the relay sees the process end and says so
                break
            if isinstance(item, Attach):
                router.attach(item)
                continue
            slot, outputs = item
            if outputs.scheduler_stats is not None:
                self._count_step(outputs.scheduler_stats)
            outputs.engine_index = engine_index
            router.send(slot, encoder.encode(outputs))
        router.close()

    def _count_step(self, stats: SchedulerStats) -> None:
        """Output thread: vLLM says this once per step."""
        pulse, found = self._pulse, stats.prefix_cache_stats
        pulse.add("steps", 1)
        if found.queries:
            pulse.add("prefix_lookup_tokens", found.queries)
            pulse.add("prefix_hit_tokens", found.hits)
        if found.preempted_requests:
            pulse.add("preemptions", found.preempted_requests)

    def _say_how_it_is(self) -> None:
        """Pulse thread: also when no step is made, as after everything was aborted."""
        running, waiting = self.scheduler.get_request_counts()
        self._pulse.set("requests_running", running)
        self._pulse.set("requests_waiting", waiting)
        self._pulse.set("requests_deferred", len(self.scheduler.deferred_waiting))
        self._pulse.set("kv_use_ratio", self.scheduler.kv_cache_manager.usage)

    def mooncake_attach_client(self, slot: int, endpoint: str) -> None:
        """Send the outputs of one gateway slot to `endpoint` from here on."""
        self.output_queue.put_nowait(Attach(slot, endpoint))

    def mooncake_abort_client(self, slot: int) -> int:
        """Abort everything of one gateway slot (its gateway is gone); return how many."""
        gone = [r.request_id for r in self.scheduler.requests.values() if r.client_index == slot]
        self.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
        self.output_queue.put_nowait(Attach(slot, None))
        return len(gone)
