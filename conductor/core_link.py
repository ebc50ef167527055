"""A gateway's connection to the decision core that leads: finds it, joins it, and notices when it is gone.

    no leader --record in the metadata store--> joining --Joined--> joined
    joined --NotLeader, silence, another leader's record--> joining

Joining means to hand in all that the gateway has in flight, so it is right after any loss, and repeated until
it is answered. What comes from a term before the latest one seen is refused (election.Fence).
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog
import zmq

from conductor.cluster import PULSE_S, TICK_LATE_S
from conductor.core_messages import (
    CORE_KEY,
    NUMBER_BYTES,
    Answer,
    Checked,
    FromCore,
    FromGateway,
    Join,
    Joined,
    NotLeader,
    Ping,
    Pong,
    Waiting,
)
from conductor.core_socket import CoreSocket
from conductor.metrics import GatewayMetrics
from mooncake.core import rpc, wire
from mooncake.core.election import Fence, LeaderRecord
from mooncake.core.errors import MooncakeError
from mooncake.core.messages import Term
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_follow import Removed, follow

log = structlog.get_logger(__name__)

SILENT_S = 1.0
"""Four pings without an answer: as long as a takeover takes anyway. A question finds out sooner."""
_OF_A_TERM = Joined | Waiting | Answer | Checked | Pong


class CoreLinkEvents(Protocol):
    """Who uses the link."""

    def in_flight(self) -> Join:
        """Return what is handed in."""
        ...

    def core_joined(self, term: Term) -> None:
        """Questions can be asked."""
        ...

    def core_lost(self, reason: str) -> None:
        """What was asked will not be answered."""
        ...

    def core_said(self, number: int, message: FromCore) -> None:
        """An answer of the term joined."""
        ...


class CoreLink:
    """On one event loop: `start`, `tick` every PULSE_S, `close`."""

    def __init__(
        self,
        metadata: MetadataStore,
        events: CoreLinkEvents,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing happens before `start`."""
        self.term: Term | None = None
        """Of the core that we have joined."""
        self.away = "no core has been found yet"
        self.address = ""
        self.heard_s = 0.0
        """When the core joined said anything."""
        self._metadata = metadata
        self._events = events
        self._metrics = metrics
        self._clock = clock
        self._fence = Fence()
        self._socket: CoreSocket | None = None
        self._handed_in = False
        self._join_s = 0.0
        self._tick_s = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for the leader."""
        self._task = asyncio.create_task(self._follow(), name="core link")

    async def close(self) -> None:
        """End (idempotent)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._disconnect()

    def send(self, number: int, message: FromGateway) -> bool:
        """Send to the core that we have joined, or are joining; False: it would not be heard."""
        if self._socket is None or not self._handed_in:
            return False
        return self._socket.send([number.to_bytes(NUMBER_BYTES, "little"), wire.encode(message)])

    def tick(self, now_s: float) -> None:
        """Ping, judge silence, join again."""
        late = now_s - self._tick_s - PULSE_S > TICK_LATE_S
        self._tick_s = now_s
        if self._socket is None:
            return
        self._socket.drain()  # a missed edge must not look like silence
        if self.term is None:
            if now_s - self._join_s >= PULSE_S:
                self._join()
            return
        if late:
            self.heard_s = now_s  # we did not listen
        if now_s - self.heard_s > SILENT_S:
            self.lose(f"the core at {self.address} is silent")
        elif not self.send(0, Ping()):
            self.lose(f"the core at {self.address} does not read")

    def lose(self, reason: str) -> None:
        """Take the core for gone; it is joined again when it answers."""
        if self.term is None:
            return
        self.term, self.away = None, reason
        self._handed_in = False
        self._events.core_lost(reason)

    # ------------------------------------------------------------ who leads

    async def _follow(self) -> None:
        async for event in follow(self._metadata, CORE_KEY):
            if event.key != CORE_KEY or isinstance(event, Removed):
                continue  # who led may do so still; who does not, says so
            try:
                address = msgspec.json.decode(event.value, type=LeaderRecord).address
                self._connect(address)
            except (msgspec.MsgspecError, MooncakeError) as error:
                log.error("gateway.bad_core", key=CORE_KEY, error=str(error))

    def _connect(self, address: str) -> None:
        self.lose("another core leads")
        self._disconnect()
        self._socket = CoreSocket(zmq.DEALER, self._take)
        self.address = address
        try:
            rpc.connect(self._socket.socket, address)
        except zmq.ZMQError as error:
            self._disconnect()
            log.error("gateway.bad_core", address=address, error=str(error))
            return
        self._socket.start()
        self._join()

    def _disconnect(self) -> None:
        self.term, self._handed_in = None, False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _join(self) -> None:
        assert self._socket is not None
        self._join_s = self._clock()
        in_flight = self._events.in_flight()
        self._handed_in = True
        self._handed_in = self.send(0, in_flight)

    # ------------------------------------------------------------ what it says

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 2 or len(frames[0]) != NUMBER_BYTES:
            log.warning("gateway.core_bad_frames", frames=len(frames))
            return
        try:
            message: FromCore = wire.decode(frames[1], FromCore)  # type: ignore[arg-type]  # a union
        except MooncakeError as error:
            log.warning("gateway.core_bad_message", error=str(error))
            return
        if isinstance(message, NotLeader):
            self.lose("the core leads no more")
            return
        if isinstance(message, _OF_A_TERM) and not self._admits(message):
            return
        self.heard_s = self._clock()
        if isinstance(message, Joined):
            if self.term != message.term:
                self.term, self.away = message.term, ""
                self._events.core_joined(message.term)
        elif not isinstance(message, Pong):
            self._events.core_said(int.from_bytes(frames[0], "little"), message)

    def _admits(self, message: Joined | Waiting | Answer | Checked | Pong) -> bool:
        """Refuse what comes from an earlier term, or from one that we have not joined."""
        admitted = self._fence.admits(message.term)
        if admitted and (isinstance(message, Joined) or message.term == self.term):
            return True
        self._metrics.core_refused.inc()
        if not admitted:
            self.lose("the core is one of an earlier term")
        return False
