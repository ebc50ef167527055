"""One link from the gateway to one engine start, through its relay (protocol: core.messages).

    CONNECTING --WELCOME--> UP --socket broke, DIED, REFUSED, send queue full--> LOST
    CONNECTING --CONNECT_S_MAX passed--> LOST

A link belongs to one epoch and never comes back: whoever wants to try again makes a new one. It
reads its socket through the file descriptor, many messages per wake-up: an asyncio hop per frame
costs more than decoding the frame.
"""

import asyncio
import contextlib
import contextvars
import itertools
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import zmq

from mooncake.core import rpc, wire
from mooncake.core.config import LOOPBACK
from mooncake.core.errors import CapacityError, MooncakeError, PeerGone, PeerTimeout, ProtocolError
from mooncake.core.messages import Failure, Hello, InstanceRecord, Pulse, RelayOp, RoleOrder, Welcome

if TYPE_CHECKING:  # a decision core has links too, and no vLLM
    from conductor.vllm_seam import EngineCoreOutputs, EngineCoreRequest, MsgpackDecoder, MsgpackEncoder

log = structlog.get_logger(__name__)

HELLO_RETRY_S = 1.0
"""A relay that just restarted may miss a HELLO; saying it again is harmless."""
CONNECT_S_MAX = 10.0
"""A registered relay is bound before it registers; one that stays silent this long is not there."""
SEND_QUEUE_MAX = 10_000
"""Requests and pings queued towards one relay; a full queue is a relay that does not read."""
RECEIVE_QUEUE_MAX = 100_000
"""Frames of about 20 s at 5,000 tokens/s, as in the relay."""
DRAIN_MESSAGES_MAX = 256
"""Messages read per wake-up before the rest of the event loop gets a turn."""
"""Engines of this release run on the gateway's host; the system picks a port per link."""
UTILITY_CALLS_MAX = 256
"""Utility calls (cache resets, LoRA) in flight per link."""
CLOSE_LINGER_MS = 200
"""Aborts queued at the last moment get this long to reach a relay that still lives."""

_ADD, _ABORT, _UTILITY = b"\x00", b"\x01", b"\x03"
"""vLLM's EngineCoreRequestType, as the relay has them; tests/contract compares."""


class LinkState(StrEnum):
    """Where a link stands; it only moves forward."""

    CONNECTING = "connecting"
    UP = "up"
    LOST = "lost"


class LinkEvents(Protocol):
    """What the owner of links is told, on the event loop."""

    def link_up(self, link: "Link") -> None:
        """The relay said WELCOME."""
        ...

    def link_pulse(self, link: "Link", pulse: Pulse, round_trip_s: float) -> None:
        """A PONG came back."""
        ...

    def link_outputs(self, link: "Link", outputs: "EngineCoreOutputs") -> None:
        """The engine said something; utility answers are not among it."""
        ...

    def link_lost(self, link: "Link", reason: str) -> None:
        """The link is over; it is closed already."""
        ...


class Link:
    """Call `start` and `tick` on the event loop; every send is non-blocking and bounded."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        record: InstanceRecord,
        gateway_id: str,
        events: LinkEvents,
        *,
        address: str = LOOPBACK,
        relink: bool = False,
        reads: bool = True,
    ) -> None:
        """Nothing is sent before `start`.

        Args:
            context: shared by all links of the process.
            record: whom to connect to.
            gateway_id: the same in all links of this gateway: it keeps its slot at the relay.
            events: who is told.
            address: of this host, where the engine sends its tokens.
            relink: an earlier link to the same epoch was lost, and what it sent may still run
                there, so the relay is told to abort that first.
            reads: whether what the engine says is wanted, its statistics included: reading imports vLLM.
        """
        self.record = record
        self.instance_id = record.instance_id
        self.state = LinkState.CONNECTING
        self.slot = -1
        self.heard_s = 0.0
        self._gateway_id = gateway_id
        self._events = events
        self._relink = relink
        self._reads = reads
        self._welcomes_due = 2 if relink else 1  # the BYE between two HELLOs gives up the first slot
        self._began_s = 0.0
        self._hello_s = 0.0
        self._draining: list[zmq.Socket[bytes]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        # callbacks inherit context variables, and with them the request_id of whose task happened to send or
        # to lose the link before: what a link does by itself, and logs, is of no request
        self._no_request = contextvars.Context()
        self._codec: tuple[MsgpackEncoder, MsgpackDecoder] | None = None  # since it was needed
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
        self._socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MAX)
        self._socket.setsockopt(zmq.LINGER, CLOSE_LINGER_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        # the engine itself connects here with its tokens; they never pass the relay
        self._outputs = context.socket(zmq.PULL)
        self._outputs.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MAX)
        self._outputs.setsockopt(zmq.LINGER, 0)
        self._outputs_endpoint = rpc.bind(self._outputs, f"tcp://{address}:*")

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Connect and say HELLO."""
        self._no_request.run(self._start)

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._loop.add_reader(self._monitor.fileno(), self._on_monitor)
        self._loop.add_reader(self._outputs.fileno(), self._drain_outputs)
        self._began_s = time.monotonic()
        rpc.connect(self._socket, self.record.endpoint)
        if self._relink:  # one connection, so the relay sees these in order
            self._say_hello(self._began_s)
            self._send(RelayOp.BYE)
        self._say_hello(self._began_s)
        # a ZMQ descriptor only signals again once its socket was read until empty
        self._on_monitor()
        self._drain()
        self._drain_outputs()

    def tick(self, now_s: float) -> None:
        """Call every PULSE_S: pings, or repeats HELLO, or gives up connecting."""
        if self.state is LinkState.UP:
            self._send(RelayOp.PING, time.monotonic_ns().to_bytes(8, "little"))
        elif self.state is LinkState.CONNECTING:
            if now_s - self._began_s > CONNECT_S_MAX:
                self.lose(f"no welcome from {self.record.endpoint} within {CONNECT_S_MAX:g} s")
            elif now_s - self._hello_s >= HELLO_RETRY_S:
                self._say_hello(now_s)
        # descriptors are edge-triggered: this bounds how long a missed edge can matter
        self._drain()
        self._drain_outputs()

    def close(self) -> None:
        """Leave in good order: the relay aborts what is left of this gateway."""
        if self.state is LinkState.UP:
            self._send(RelayOp.BYE)
        if self.state is not LinkState.LOST:
            self._end("closed")

    def lose(self, reason: str) -> None:
        """Declare the link lost and tell the owner, once."""
        if self.state is LinkState.LOST:
            return
        self._end(reason)
        self._events.link_lost(self, reason)

    def _end(self, reason: str) -> None:
        self.state = LinkState.LOST
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_reader(self._monitor.fileno())
            self._loop.remove_reader(self._outputs.fileno())
        self._outputs.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(PeerGone(f"{self.instance_id}: {reason}"))
        self._calls.clear()

    # ------------------------------------------------------------ towards the engine

    def add(self, request: "EngineCoreRequest") -> None:
        """Send one leg. A failure to send loses the link, which the owner hears about."""
        self._send(RelayOp.ENGINE, _ADD, *self._encode(request))

    def abort(self, engine_ids: Sequence[str]) -> None:
        """Abort legs; unknown ids are fine."""
        if self.state is LinkState.UP:
            self._send(RelayOp.ENGINE, _ABORT, *self._encode(list(engine_ids)))

    def take_role(self, order: RoleOrder) -> None:
        """Order the relay to register with another role; its new record is the answer."""
        if self.state is LinkState.UP:
            self._send(RelayOp.ROLE, wire.encode(order))

    async def call(self, method: str, *args: Any, deadline_s: float) -> Any:
        """Return what the engine's utility `method` returns.

        Raises:
            PeerGone: the link is not up, or ended meanwhile.
            PeerTimeout: no answer within `deadline_s`.
            CapacityError: too many calls in flight.
            ProtocolError: the engine says that the call failed.
        """
        if self.state is not LinkState.UP:
            raise PeerGone(f"{self.instance_id}: no link")
        if len(self._calls) >= UTILITY_CALLS_MAX:
            raise CapacityError(f"{UTILITY_CALLS_MAX} utility calls in flight to {self.instance_id}")
        call_id = next(self._call_ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._send(RelayOp.ENGINE, _UTILITY, *self._encode((self.slot, call_id, method, args)))
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            raise PeerTimeout(f"{self.instance_id}: no answer to {method} in {deadline_s:g} s") from None
        finally:
            self._calls.pop(call_id, None)

    def _say_hello(self, now_s: float) -> None:
        self._hello_s = now_s
        self._send(RelayOp.HELLO, wire.encode(Hello(self._gateway_id, self._outputs_endpoint)))

    def _send(self, *frames: Any) -> None:
        if self.state is LinkState.LOST:
            return
        assert self._loop is not None
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            # not here: the caller may be in the middle of a machine's commands
            why = f"{SEND_QUEUE_MAX} messages wait to be sent"
            self._loop.call_soon(self.lose, why, context=self._no_request)
            return
        # a send may swallow the edge that announces input
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._drain, context=self._no_request)

    # ------------------------------------------------------------ from the engine

    def _on_monitor(self) -> None:
        try:
            while True:
                self._monitor.recv_multipart(zmq.NOBLOCK)
                if self.state is LinkState.UP:
                    self._drain_outputs()  # tokens that arrived before the end still count
                    self.lose("connection broke")
                    return
        except zmq.Again:
            return

    def _drain(self) -> None:
        self._drain_socket(self._socket, self._receive, self._drain)

    def _drain_outputs(self) -> None:
        self._drain_socket(self._outputs, self._take_outputs, self._drain_outputs)

    def _drain_socket(
        self, socket: "zmq.Socket[bytes]", take: Callable[[list[bytes]], None], again: Callable[[], None]
    ) -> None:
        """Read until empty, at most DRAIN_MESSAGES_MAX; `again` comes back for the rest."""
        if socket in self._draining:
            return
        self._draining.append(socket)
        try:
            for _ in range(DRAIN_MESSAGES_MAX):
                if self.state is LinkState.LOST:
                    return
                take(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return
        except MooncakeError as error:
            self.lose(str(error))
            return
        finally:
            self._draining.remove(socket)
        assert self._loop is not None
        self._loop.call_soon(again)

    def _codecs(self) -> "tuple[MsgpackEncoder, MsgpackDecoder]":
        if self._codec is None:
            from conductor.vllm_seam import EngineCoreOutputs, MsgpackDecoder, MsgpackEncoder

            self._codec = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        return self._codec

    def _encode(self, message: Any) -> Sequence[Any]:
        return self._codecs()[0].encode(message)

    def _take_outputs(self, frames: list[bytes]) -> None:
        if not self._reads:
            return  # statistics, which an engine sends to any of its clients
        try:
            outputs = self._codecs()[1].decode(frames)
        except Exception as error:  # msgspec, torch and numpy all have a say here
            raise ProtocolError(f"undecodable engine output: {type(error).__name__}: {error}") from error
        if outputs.utility_output is not None:
            self._answer(outputs.utility_output)
        else:
            self._events.link_outputs(self, outputs)

    def _receive(self, frames: list[bytes]) -> None:
        operation = frames[0]
        self.heard_s = time.monotonic()
        if operation == RelayOp.PONG and len(frames) == 3:
            sent_ns = int.from_bytes(frames[1], "little")
            round_trip_s = (time.monotonic_ns() - sent_ns) / 1e9
            self._events.link_pulse(self, wire.decode(frames[2], Pulse), round_trip_s)
        elif operation == RelayOp.WELCOME and len(frames) == 2:
            self._welcome(wire.decode(frames[1], Welcome))
        elif operation in (RelayOp.REFUSED, RelayOp.DIED) and len(frames) == 2:
            self._drain_outputs()  # tokens that arrived before the end still count
            self._refused(operation, wire.decode(frames[1], Failure))
        else:
            raise ProtocolError(f"unexpected frame {operation!r} of {len(frames)} from {self.instance_id}")

    def _welcome(self, welcome: Welcome) -> None:
        if welcome.epoch != self.record.epoch or welcome.instance_id != self.instance_id:
            raise ProtocolError(
                f"{self.record.endpoint} is {welcome.instance_id} epoch {welcome.epoch}, "
                f"not {self.instance_id} epoch {self.record.epoch}"
            )
        self.slot = welcome.slot
        self._welcomes_due -= 1
        if self._welcomes_due <= 0 and self.state is LinkState.CONNECTING:
            self.state = LinkState.UP
            self._events.link_up(self)

    def _refused(self, operation: bytes, failure: Failure) -> None:
        if operation == RelayOp.REFUSED and self.state is LinkState.CONNECTING:
            log.warning("link.refused", instance=self.instance_id, reason=failure.message)
            return  # HELLO is said again until CONNECT_S_MAX
        # after WELCOME a refusal means that the relay no longer knows us: nothing in flight is safe
        raise PeerGone(f"{self.instance_id}: {failure.message}")

    def _answer(self, output: Any) -> None:
        future = self._calls.get(output.call_id)
        if future is None or future.done():
            return
        if output.failure_message is not None:
            future.set_exception(ProtocolError(f"{self.instance_id}: {output.failure_message}"))
        else:
            with contextlib.suppress(asyncio.InvalidStateError):
                future.set_result(output.result.result if output.result is not None else None)
