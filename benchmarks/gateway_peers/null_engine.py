"""An engine that computes nothing: every request gets a token per step, as a batch of a real engine would.

One process plays several engines behind two fronts, and all paths under test get the same outputs:

    RelayFront   our relay's protocol (mooncake.core.messages), registered as an instance
    CoreFront    vLLM's EngineCore, as its own AsyncMPClient speaks to it

The first token of a request leaves as soon as the request is read, so what a client waits for is the way.
"""

import asyncio
import secrets
import threading
import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec
import zmq
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from mooncake.core import wire
from mooncake.core.messages import INSTANCES_PREFIX, Hello, InstanceRecord, Pulse, RelayOp, Welcome
from mooncake.core.metadata_open import open_metadata
from mooncake.core.metadata_registration import Registration

BLOCK_SIZE = 32
CONTEXT_ROOT = "ab" * 32
KV_BLOCKS = 1_000_000
"""More than all prompts of a run: nobody waits for room."""
IDLE_MS = 50
TOKEN_STRIDE = 7919
_ADD, _ABORT, _UTILITY = b"\x00", b"\x01", b"\x03"


class _Job:
    __slots__ = ("left", "made", "request_id")

    def __init__(self, request_id: str, left: int) -> None:
        self.request_id, self.left, self.made = request_id, left, 0


class Front(ABC):
    """One engine; `jobs` by client index, as vLLM sends one frame per client and step."""

    def __init__(self, socket: "zmq.Socket[bytes]", vocabulary: int) -> None:
        self.socket = socket
        self.jobs: dict[int, dict[str, _Job]] = {}
        self._low, self._span = vocabulary // 2, vocabulary // 4  # words, neither bytes nor specials
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._generic = MsgpackDecoder()

    def drain(self) -> None:
        """Read all that has come."""
        while True:
            try:
                self.read(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return

    def step(self) -> None:
        """One token for everybody."""
        for index, jobs in self.jobs.items():
            if jobs:
                self._emit(index, list(jobs.values()), {})

    @abstractmethod
    def read(self, frames: list[bytes]) -> None:
        """Take one message."""

    @abstractmethod
    def send(self, index: int, frames: Any) -> None:
        """Send one message to client `index`."""

    def engine(self, index: int, frames: list[bytes]) -> None:
        """Take what a client says to the engine itself."""
        kind, *body = frames
        if kind == _ADD:
            self._add(index, self._requests.decode(body))
        elif kind == _ABORT:
            for request_id in self._generic.decode(body):
                self.jobs.get(index, {}).pop(request_id, None)
        elif kind == _UTILITY:
            _, call_id, method, _ = self._generic.decode(body)
            result = ["generate"] if method == "get_supported_tasks" else True
            answer = UtilityOutput(call_id, None, UtilityResult(result))
            self.send(index, self._encoder.encode(EngineCoreOutputs(utility_output=answer)))

    def _add(self, index: int, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        assert params is not None
        extra = (params.extra_args or {}).get("kv_transfer_params", {}).get("mooncake", {})
        job = _Job(request.request_id, (params.max_tokens or 1) - len(extra.get("emitted", ())))
        self.jobs.setdefault(index, {})[job.request_id] = job
        prompt_len, now_s = len(request.prompt_token_ids or ()), time.monotonic()
        cached = prompt_len if extra.get("leg") == "decode" else 0
        stats = PrefillStats(
            num_prompt_tokens=prompt_len, num_computed_tokens=prompt_len - cached, num_cached_tokens=cached
        )
        events = [
            EngineCoreEvent(EngineCoreEventType.QUEUED, now_s),
            EngineCoreEvent(EngineCoreEventType.SCHEDULED, now_s),
        ]
        self._emit(index, [job], {"prefill_stats": stats, "events": events})

    def _emit(self, index: int, jobs: list[_Job], first: dict[str, Any]) -> None:
        outputs = []
        for job in jobs:
            job.left -= 1
            job.made += 1
            token = self._low + job.made * TOKEN_STRIDE % self._span
            finish = None
            if job.left <= 0:
                finish = FinishReason.LENGTH
                self.jobs[index].pop(job.request_id, None)
            outputs.append(EngineCoreOutput(job.request_id, [token], finish_reason=finish, **first))
        stats = SchedulerStats(num_running_reqs=sum(map(len, self.jobs.values())))
        whole = EngineCoreOutputs(outputs=outputs, scheduler_stats=stats, timestamp=time.monotonic())
        self.send(index, self._encoder.encode(whole))


class CoreFront(Front):
    """What AsyncMPClient takes for its EngineCore."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: str, vocabulary: int) -> None:
        """`folder`: where the client has bound its two sockets, or is going to."""
        socket = context.socket(zmq.DEALER)
        super().__init__(socket, vocabulary)
        socket.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        socket.connect(f"ipc://{folder}/in")
        socket.send(b"")  # ready, and nothing to say about it
        self._outputs = context.socket(zmq.PUSH)
        self._outputs.connect(f"ipc://{folder}/out")

    def read(self, frames: list[bytes]) -> None:
        """Every frame is for the engine: there is no relay."""
        self.engine(0, frames)

    def send(self, index: int, frames: Any) -> None:
        """There is one client."""
        del index
        self._outputs.send_multipart(frames)


class RelayFront(Front):
    """What a gateway takes for a relay with its engine."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", instance_id: str, role: str, vocabulary: int
    ) -> None:
        super().__init__(context.socket(zmq.ROUTER), vocabulary)
        self.instance_id, self.role, self.epoch = instance_id, role, secrets.token_hex(4)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._context = context
        self._slots: dict[bytes, int] = {}  # by the connection's name
        self._outputs: list[zmq.Socket[bytes]] = []

    def record(self, model: str, max_model_len: int) -> InstanceRecord:
        """What it says of itself."""
        return InstanceRecord(
            instance_id=self.instance_id, role=self.role, epoch=self.epoch, endpoint=self.endpoint,
            node="null", pid=1, model=model, context_root=CONTEXT_ROOT, block_size=BLOCK_SIZE,
            max_model_len=max_model_len, kv_blocks=KV_BLOCKS, max_num_seqs=1024,
            max_num_batched_tokens=8192, block_bytes=1 << 16, vllm_version="0.32.0",
        )  # fmt: skip

    def read(self, frames: list[bytes]) -> None:
        """See core.messages, "between a gateway and a relay"."""
        identity, operation, *rest = frames
        if operation == RelayOp.HELLO:
            slot = self._slots.get(identity)
            if slot is None:
                outputs = self._context.socket(zmq.PUSH)
                outputs.setsockopt(zmq.LINGER, 0)
                outputs.connect(wire.decode(rest[0], Hello).outputs)
                slot = self._slots[identity] = len(self._outputs)
                self._outputs.append(outputs)
            welcome = wire.encode(Welcome(slot, self.instance_id, self.epoch))
            self.socket.send_multipart([identity, RelayOp.WELCOME, welcome])
        elif operation == RelayOp.PING:
            pulse = wire.encode(Pulse(self.epoch, 0.01))
            self.socket.send_multipart([identity, RelayOp.PONG, rest[0], pulse])
        elif operation == RelayOp.BYE:
            self.jobs.pop(self._slots[identity], None)
        elif operation == RelayOp.ENGINE:
            self.engine(self._slots[identity], rest)

    def send(self, index: int, frames: Any) -> None:
        """To the gateway that owns slot `index`."""
        self._outputs[index].send_multipart(frames)


def serve(fronts: list[Front], step_s: float, stop: threading.Event) -> None:
    """Step every `step_s` while there is anything to do, until `stop`."""
    poller = zmq.Poller()
    for front in fronts:
        poller.register(front.socket, zmq.POLLIN)
    due_s = time.monotonic()
    while not stop.is_set():
        busy = any(jobs for front in fronts for jobs in front.jobs.values())
        wait_ms = int(max(0.0, due_s - time.monotonic()) * 1000) if busy else IDLE_MS
        if poller.poll(wait_ms):
            for front in fronts:
                front.drain()
        now_s = time.monotonic()
        if now_s < due_s:
            continue
        for front in fronts:
            front.step()
        due_s = max(due_s + step_s, now_s)  # steps that were missed stay missed


async def register(metadata: str, records: list[InstanceRecord], stop: threading.Event) -> None:
    """Keep the instances registered until `stop`."""
    store = open_metadata(metadata)
    kept = []
    for one in records:

        def encode(record: InstanceRecord = one) -> bytes:
            return msgspec.json.encode(record)

        kept.append(Registration(store, INSTANCES_PREFIX + one.instance_id, encode))
        kept[-1].start()
    await asyncio.to_thread(stop.wait)
    for registration in kept:
        await registration.close()
    await store.close()
