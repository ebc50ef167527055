"""A relay with an engine behind it that speaks the relay protocol and makes up tokens.

Runs in a thread of the test process. Token i of a prompt is `token(prompt, i)`, so a stream that
moved between fake engines can be compared with one that did not.
"""

import contextlib
import threading
import time
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
from mooncake.core.messages import EngineQueues, Hello, InstanceRecord, Pulse, RelayOp, RoleOrder, Welcome
from tests.unit.conductor.make import record

BLOCK_SIZE = 4
CONTEXT_ROOT = "ab" * 32
FIRST_SLOT = 3
"""Of the first gateway: any number but 0, which nobody would miss."""


def token(prompt: list[int], index: int) -> int:
    """The index-th token after `prompt`."""
    return 2 + (sum(prompt) * 31 + index * 7) % 250


class Job:
    def __init__(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        assert params is not None
        self.request = request
        self.kv: dict[str, Any] = params.extra_args["kv_transfer_params"]["mooncake"]
        self.made = len(self.kv.get("emitted", []))
        self.max_tokens = params.max_tokens
        self.first = True


class FakeEngine:
    """`freeze` stops everything (SIGSTOP); `kill` closes the sockets (SIGKILL)."""

    def __init__(self, instance_id: str, role: str, step_s: float = 0.002, epoch: str = "e1") -> None:
        self.instance_id, self.role, self.epoch, self.step_s = instance_id, role, epoch, step_s
        self.received: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self.hellos = 0
        self.cached = (0, 0)
        self.frozen = threading.Event()
        self.stands = threading.Event()  # frozen took effect
        self.elsewhere = 0  # requests of gateways that the test does not have
        self.moved = (0.0, 0.0, 0.0, 0.0)  # bytes and seconds: loaded, fetched
        self.orders: list[RoleOrder] = []
        self.fail_next = 0  # legs that end in finish reason "error"
        self.jobs: dict[str, Job] = {}
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._slots: list[str] = []  # gateways, as they come
        self._clients: dict[bytes, int] = {}  # slots, by connection
        self._outputs: dict[int, tuple[str, zmq.Socket]] = {}  # by slot
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._generic = MsgpackDecoder()
        self._thread = threading.Thread(target=self._run, name=f"fake {instance_id}", daemon=True)
        self._thread.start()

    @property
    def record(self) -> InstanceRecord:
        return record(
            self.instance_id,
            self.role,
            epoch=self.epoch,
            node="n1",
            endpoint=self.endpoint,
            context_root=CONTEXT_ROOT,
            block_size=BLOCK_SIZE,
            max_model_len=4096,
            kv_blocks=100_000,
            max_num_seqs=256,
            block_bytes=1024,
        )

    def freeze(self) -> None:
        """Return when it stands still; `frozen.clear()` lets it go on."""
        self.stands.clear()
        self.frozen.set()
        assert self.stands.wait(10)

    def kill(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def legs(self) -> list[str]:
        return [r.sampling_params.extra_args["kv_transfer_params"]["mooncake"]["leg"] for r in self.received]

    def _run(self) -> None:
        step_at_s = time.monotonic()
        while not self._stop.is_set():
            if self.frozen.is_set():
                self.stands.set()
                time.sleep(0.01)
                continue
            wait_s = min(0.02, max(0.0, step_at_s - time.monotonic()) if self.jobs else 0.02)
            if self._socket.poll(int(wait_s * 1000)):
                self._read()
            if self.jobs and time.monotonic() >= step_at_s:
                self._step()
                step_at_s = time.monotonic() + self.step_s
        self._socket.close()
        for _, socket in self._outputs.values():
            socket.close(linger=0)
        self._context.destroy(linger=0)

    def _read(self) -> None:
        while True:
            try:
                identity, operation, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if operation == RelayOp.HELLO:
                slot = self._clients[identity] = self._attach(wire.decode(frames[0], Hello))
                self.hellos += 1
                welcome = wire.encode(Welcome(slot, self.instance_id, self.epoch))
                self._socket.send_multipart([identity, RelayOp.WELCOME, welcome])
            elif operation == RelayOp.PING:
                queues = EngineQueues(running=len(self.jobs) + self.elsewhere)
                pulse = wire.encode(Pulse(self.epoch, 0.01, *self.moved, queues=queues))
                self._socket.send_multipart([identity, RelayOp.PONG, frames[0], pulse])
            elif operation == RelayOp.BYE:
                self._leave(self._clients.get(identity, 0))
            elif operation == RelayOp.ROLE:
                self.orders.append(wire.decode(frames[0], RoleOrder))
            elif operation == RelayOp.ENGINE:
                self._engine(frames)

    def _engine(self, frames: list[bytes]) -> None:
        kind, body = frames[0], frames[1:]
        if kind == b"\x00":
            request = self._requests.decode(body)
            self.received.append(request)
            self.jobs[request.request_id] = Job(request)
        elif kind == b"\x01":
            for engine_id in self._generic.decode(body):
                self.aborted.append(engine_id)
                self.jobs.pop(engine_id, None)
        else:
            slot, call_id, method, args = self._generic.decode(body)
            answer = UtilityOutput(call_id, None, UtilityResult([method, list(args)]))
            if method == "broken":
                answer = UtilityOutput(call_id, "no such method", None)
            self._send(slot, EngineCoreOutputs(utility_output=answer))

    def _step(self) -> None:
        now_s = time.monotonic()
        outputs: dict[int, list[EngineCoreOutput]] = {}
        for job in list(self.jobs.values()):
            outputs.setdefault(job.request.client_index, []).append(self._output(job, now_s))
        stats = SchedulerStats(num_running_reqs=len(self.jobs))
        for slot, own in outputs.items():
            self._send(slot, EngineCoreOutputs(outputs=own, scheduler_stats=stats, timestamp=now_s))

    def _output(self, job: Job, now_s: float) -> EngineCoreOutput:
        request = job.request
        prompt = request.prompt_token_ids
        assert prompt is not None
        output = EngineCoreOutput(request_id=request.request_id, new_token_ids=[])
        if job.first:
            job.first = False
            # a decode engine finds the prompt in the pool; only leg 1 and whole legs compute it
            found = self.cached  # in its own cache, and in the pool
            cached = len(prompt) if job.kv["leg"] == "decode" else sum(found)
            output.prefill_stats = PrefillStats(
                num_prompt_tokens=len(prompt),
                num_computed_tokens=len(prompt) - cached,
                num_cached_tokens=cached,
                num_local_cached_tokens=found[0],
                num_external_cached_tokens=found[1],
            )
            output.events = [
                EngineCoreEvent(EngineCoreEventType.QUEUED, now_s - 0.002),
                EngineCoreEvent(EngineCoreEventType.SCHEDULED, now_s - 0.001),
            ]
        if self.fail_next > 0:
            self.fail_next -= 1
            output.finish_reason = FinishReason.ERROR
            del self.jobs[request.request_id]
            return output
        output.new_token_ids = [token(prompt, job.made)]
        job.made += 1
        if job.made >= job.max_tokens:
            output.finish_reason = FinishReason.LENGTH
            del self.jobs[request.request_id]
        return output

    def _leave(self, slot: int) -> None:
        for engine_id in [eid for eid, job in self.jobs.items() if job.request.client_index == slot]:
            del self.jobs[engine_id]

    def _attach(self, hello: Hello) -> int:
        if hello.gateway_id not in self._slots:
            self._slots.append(hello.gateway_id)
        slot = FIRST_SLOT + self._slots.index(hello.gateway_id)
        known, socket = self._outputs.get(slot, ("", None))
        if known == hello.outputs:
            return slot
        if socket is not None:
            socket.close(linger=0)
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(hello.outputs)
        self._outputs[slot] = hello.outputs, socket
        return slot

    def _send(self, slot: int, outputs: EngineCoreOutputs) -> None:
        if slot in self._outputs:
            with contextlib.suppress(zmq.Again):  # a gateway that is gone
                self._outputs[slot][1].send_multipart(self._encoder.encode(outputs), zmq.NOBLOCK)


def encoded(record: InstanceRecord) -> bytes:
    return msgspec.json.encode(record)
