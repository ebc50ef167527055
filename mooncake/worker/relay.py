"""The relay: a light process (no vLLM, no torch) between gateways and one engine.

It forwards requests, which are rare, as vLLM's own msgpack frames; tokens, which are not, go from
the engine straight to each gateway (outputs.py), so a token costs the relay nothing. One blocking
poll loop forwards, watches the engine's process (pidfd) and pulse, answers heartbeats, and
releases everything of a gateway that fell silent.
Protocol: core.messages, "between a gateway and a relay".
"""

import contextlib
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import zmq

from mooncake.core import rpc, wire
from mooncake.core.config import ROLES
from mooncake.core.election import Fence
from mooncake.core.errors import CapacityError, MooncakeError, ProtocolError
from mooncake.core.messages import (
    DRAINING,
    RELAY_PROTOCOL,
    RELAY_SLOTS,
    EngineQueues,
    Failure,
    Hello,
    Pulse,
    RelayOp,
    RoleOrder,
    Welcome,
)
from mooncake.worker.pulse import Pulse as PulseFile
from mooncake.worker.spec import EngineSpec

log = structlog.get_logger(__name__)

ENGINE_IDENTITY = (0).to_bytes(2, "little")  # EngineCoreProc: engine_index as two bytes
VLLM_ADD, VLLM_ABORT, VLLM_UTILITY = b"\x00", b"\x01", b"\x03"
FORWARDED = (VLLM_ADD, VLLM_ABORT, VLLM_UTILITY)
MOVED = ("load_bytes", "load_seconds", "fetch_bytes", "fetch_seconds")
"""Counters that a PONG carries: gateways learn from them how quick transfers are."""
REQUESTS = ("requests_running", "requests_waiting", "requests_deferred")
"""And how the engine is now, for vLLM's gauges of it (conductor.engine_gauges)."""
GATEWAY_SILENT_S = 5.0
"""A gateway pings every 0.25 s; 20 missed pings mean that it is gone."""
POLL_MS = 200
QUEUE_MESSAGES_MAX = 100_000
"""Per gateway: about 20 s of frames at 5,000 tokens/s; a gateway that far behind is cut off."""
ORDERED = (*ROLES, DRAINING)
HOLD_S_MAX = 600.0
NAME_CHARS_MAX = 256
"""Of a request's id in a log line."""
DRAIN_FRAMES = 64
"""Frames taken from one socket before the others get a look."""


class Slot:
    """One connected gateway."""

    def __init__(self, gateway_id: str, identity: bytes, outputs: str, seen_s: float) -> None:
        """`identity` is the ROUTER's name of the connection, `outputs` where its tokens go."""
        self.gateway_id = gateway_id
        self.identity = identity
        self.outputs = outputs
        self.seen_s = seen_s


class Relay:
    """Owns the sockets; `run` forwards until told to stop or the engine ends."""

    def __init__(self, spec: EngineSpec, pulse: PulseFile, endpoint: str = "tcp://127.0.0.1:0") -> None:
        """Bind everything at once, so that the engine can connect as soon as it starts."""
        self.spec = spec
        self._pulse = pulse
        self._ctx = zmq.Context()
        self._slots: list[Slot | None] = [None] * RELAY_SLOTS
        self._by_identity: dict[bytes, int] = {}
        self.ready: dict[str, Any] | None = None
        self._fence = Fence()
        self.on_role: Callable[[RoleOrder], None] | None = None  # whose record it is; called while running
        self.on_turn: Callable[[float, float], None] = lambda *_: None  # when, and how long it was busy

        self._front = self._ctx.socket(zmq.ROUTER)
        self._front.set_hwm(QUEUE_MESSAGES_MAX)
        self._front.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a lost gateway is an error, not silence
        self._front.setsockopt(zmq.LINGER, 500)
        self.endpoint = rpc.bind(self._front, endpoint)
        self._engine = self._ctx.socket(zmq.ROUTER)
        self._engine.set_hwm(0)  # bounded by what gateways send: their own HWM applies
        self._engine.setsockopt(zmq.LINGER, 0)
        self._engine.bind(spec.engine_in)

    # ------------------------------------------------------------ loop

    def run(self, engine_pidfd: int, stop_fd: int, on_ready: Callable[[dict[str, Any]], None]) -> str:
        """Forward until `stop_fd` is readable or the engine ends; return why ("stop" | "died")."""
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._engine, zmq.POLLIN)
        poller.register(engine_pidfd, zmq.POLLIN)
        poller.register(stop_fd, zmq.POLLIN)
        swept_s = time.monotonic()
        while True:
            events = poller.poll(POLL_MS)
            woken_s = time.monotonic()
            for ready, _ in events:
                if ready is self._front:
                    self._from_gateways()
                elif ready is self._engine:
                    self._from_engine(on_ready)
                elif ready == stop_fd:
                    return "stop"
                elif ready == engine_pidfd:
                    return "died"
            now_s = time.monotonic()
            self.on_turn(now_s, now_s - woken_s)
            if now_s - swept_s > 1.0:
                swept_s = now_s
                self._sweep(now_s)

    def announce_death(self, reason: str) -> None:
        """Tell every gateway that the engine is gone."""
        payload = wire.encode(Failure("gone", reason))
        for slot in self._slots:
            if slot is not None:
                self._reply(slot.identity, [RelayOp.DIED, payload])

    def close(self) -> None:
        """Close the sockets; what is queued gets half a second."""
        self._ctx.destroy(linger=500)

    # ------------------------------------------------------------ engine side

    def _from_engine(self, on_ready: Callable[[dict[str, Any]], None]) -> None:
        # the engine's input DEALER speaks once: its ready message
        frames = self._engine.recv_multipart()
        self.ready = msgspec.msgpack.decode(frames[1])
        for index, slot in enumerate(self._slots):
            if slot is not None:
                self._call_engine(index, "mooncake_attach_client", index, slot.outputs)
        on_ready(self.ready)

    def _call_engine(self, index: int, method: str, *arguments: Any) -> None:
        """Send a utility call of our own (call id 0: the answer goes to nobody)."""
        call = msgspec.msgpack.encode([index, 0, method, arguments])
        self._engine.send_multipart([ENGINE_IDENTITY, VLLM_UTILITY, call])

    # ------------------------------------------------------------ gateway side

    def _from_gateways(self) -> None:
        for _ in range(DRAIN_FRAMES):
            try:
                identity, operation, *frames = self._front.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                continue  # a message without an operation
            try:
                self._handle(identity, operation, frames)
            except MooncakeError as error:
                told = {"error": str(error), "operation": operation[:8].hex(), **_named(frames)}
                log.warning("relay.refused", **told)
                self._reply(identity, [RelayOp.REFUSED, wire.encode(rpc.failure_of(error))])

    def _reply(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self._front.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("relay.reply_lost", error=str(error))

    def _handle(self, identity: bytes, operation: bytes, frames: list[bytes]) -> None:
        if operation == RelayOp.HELLO:
            self._welcome(identity, frames)
            return
        index = self._by_identity.get(identity)
        if index is None:
            raise ProtocolError("say HELLO first")
        slot = self._slots[index]
        assert slot is not None
        slot.seen_s = time.monotonic()
        if operation == RelayOp.ENGINE:
            self._to_engine(index, frames)
        elif operation == RelayOp.PING:
            self._pong(identity, frames)
        elif operation == RelayOp.ROLE:
            self._take_role(slot, frames)
        elif operation == RelayOp.BYE:
            self._release(index, "bye")
        else:
            raise ProtocolError(f"unknown operation {operation!r}")

    def _to_engine(self, index: int, frames: list[bytes]) -> None:
        if len(frames) < 2 or frames[0] not in FORWARDED:
            raise ProtocolError("not an engine request")
        # rare and small: a frame that does not decode would kill the engine's input thread, an
        # unhashable request id its main loop, an unknown output its output thread
        if frames[0] == VLLM_ABORT:
            wire.decode(frames[1], list[str])
        elif frames[0] == VLLM_UTILITY:
            client_index, *_ = wire.decode(frames[1], tuple[int, int, str, list[Any]])
            if client_index != index:
                raise ProtocolError(f"a utility call for slot {client_index} from slot {index}")
        if self.ready is None:
            raise CapacityError("the engine is still loading")
        self._engine.send_multipart([ENGINE_IDENTITY, *frames])

    def _take_role(self, slot: Slot, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise ProtocolError("an order of a role carries one frame")
        order = wire.decode(frames[0], RoleOrder)
        if order.role not in ORDERED or not 0 <= order.hold_s <= HOLD_S_MAX:
            raise ProtocolError(f"role {order.role!r} for {order.hold_s} s: must be {', '.join(ORDERED)}")
        if order.term is not None and not self._fence.admits(order.term):
            log.warning("relay.late_order", role=order.role, term=order.term.number, gateway=slot.gateway_id)
            return
        log.info("relay.role", role=order.role, hold_s=order.hold_s, gateway=slot.gateway_id)
        if self.on_role is not None:
            self.on_role(order)

    def _pong(self, identity: bytes, frames: list[bytes]) -> None:
        if len(frames) != 1 or len(frames[0]) != 8:
            raise ProtocolError("a ping carries 8 bytes")
        load_bytes, load_s, fetch_bytes, fetch_s = (self._pulse.read(name) for name in MOVED)
        running, waiting, deferred = (int(self._pulse.read(name)) for name in REQUESTS)
        queues = EngineQueues(running, waiting, deferred, self._pulse.read("kv_use_ratio"))
        age_s = self._pulse.age_s(time.monotonic())
        pulse = Pulse(self.spec.epoch, age_s, load_bytes, load_s, fetch_bytes, fetch_s, queues)
        self._reply(identity, [RelayOp.PONG, frames[0], wire.encode(pulse)])

    def _welcome(self, identity: bytes, frames: list[bytes]) -> None:
        if len(frames) != 1:
            raise ProtocolError("HELLO carries one frame")
        hello = wire.decode(frames[0], Hello)
        if hello.protocol != RELAY_PROTOCOL:
            raise ProtocolError(f"relay protocol {RELAY_PROTOCOL}, gateway speaks {hello.protocol}")
        rpc.check_endpoint(hello.outputs)
        now_s = time.monotonic()
        index = self._slot_of(hello.gateway_id)
        if self._by_identity.get(identity, index) != index:
            raise ProtocolError("this connection is another gateway already")
        previous = self._slots[index]
        if previous is not None:
            self._by_identity.pop(previous.identity, None)
        self._slots[index] = Slot(hello.gateway_id, identity, hello.outputs, now_s)
        self._by_identity[identity] = index
        if self.ready is not None:  # before anything else of this gateway reaches the engine
            self._call_engine(index, "mooncake_attach_client", index, hello.outputs)
        welcome = Welcome(index, self.spec.instance_id, self.spec.epoch)
        self._reply(identity, [RelayOp.WELCOME, wire.encode(welcome)])

    def _slot_of(self, gateway_id: str) -> int:
        free = None
        for index, slot in enumerate(self._slots):
            if slot is not None and slot.gateway_id == gateway_id:
                return index
            if slot is None and free is None:
                free = index
        if free is None:
            raise CapacityError(f"{RELAY_SLOTS} gateways are connected to {self.spec.instance_id} already")
        log.info("relay.gateway_joined", gateway=gateway_id, slot=free)
        return free

    def _sweep(self, now_s: float) -> None:
        for index, slot in enumerate(self._slots):
            if slot is not None and now_s - slot.seen_s > GATEWAY_SILENT_S:
                self._release(index, f"silent for {GATEWAY_SILENT_S:g} s")

    def _release(self, index: int, reason: str) -> None:
        """Forget a gateway and abort everything it had in the engine."""
        slot = self._slots[index]
        if slot is None:
            return
        self._slots[index] = None
        self._by_identity.pop(slot.identity, None)
        log.info("relay.gateway_left", gateway=slot.gateway_id, slot=index, reason=reason)
        if self.ready is not None:
            self._call_engine(index, "mooncake_abort_client", index)


def _named(frames: list[bytes]) -> dict[str, str]:
    """Return the id of a request that a gateway sends, as log lines have it: vLLM's first field."""
    if len(frames) < 2 or frames[0] != VLLM_ADD:
        return {}
    with contextlib.suppress(MooncakeError, IndexError):  # it is refused already
        engine_id = wire.decode(bytes(wire.decode(frames[1], list[msgspec.Raw])[0]), str)
        return {"request_id": engine_id.rpartition("#")[0][:NAME_CHARS_MAX]}
    return {}


def make_stop_pipe() -> tuple[int, int]:
    """Return (readable end for the poll loop, writable end for signal handlers)."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    return readable, writable


def request_stop(writable: int) -> None:
    """Wake the poll loop; safe in a signal handler."""
    with contextlib.suppress(BlockingIOError):  # a full pipe: the loop has been told already
        os.write(writable, struct.pack("b", 1))
