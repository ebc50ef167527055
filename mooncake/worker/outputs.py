"""Where the engine's outputs go: one PUSH socket per gateway slot, straight to that gateway.

Tokens do not pass the relay (a second hop cost as much CPU per token as the gateway's own part).
The relay tells the engine which gateway owns which slot; a gateway that is gone or hopelessly
behind must never block the engine, so every send is non-blocking and a full queue ends the slot.
Runs in the engine's output thread only.
"""

from collections.abc import Sequence
from typing import Any

import structlog
import zmq

from mooncake.core.errors import ConfigError
from mooncake.core.rpc import check_endpoint, connect

log = structlog.get_logger(__name__)

QUEUE_MESSAGES_MAX = 100_000
"""Per gateway: about 20 s of frames at 5,000 steps/s; a gateway that far behind is cut off."""
LINGER_MS = 1000


class Attach:
    """Queue item: `endpoint` takes the outputs of `slot` from here on; None = nobody does."""

    __slots__ = ("endpoint", "slot")

    def __init__(self, slot: int, endpoint: str | None) -> None:
        """Travels through the engine's output queue, so it keeps its place among outputs."""
        self.slot, self.endpoint = slot, endpoint


class OutputRouter:
    """Sockets by slot."""

    def __init__(self) -> None:
        """No gateway is attached yet."""
        self._ctx = zmq.Context()
        self._sockets: dict[int, tuple[str, zmq.Socket[bytes]]] = {}

    def attach(self, item: Attach) -> None:
        """Connect, or disconnect, one slot. The same endpoint again keeps its connection."""
        current = self._sockets.get(item.slot)
        if current is not None and current[0] == item.endpoint:
            return
        if current is not None:
            current[1].close(LINGER_MS)
            del self._sockets[item.slot]
        if item.endpoint is None:
            return
        socket = self._ctx.socket(zmq.PUSH)
        try:
            socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES_MAX)
            connect(socket, check_endpoint(item.endpoint))
        except (zmq.ZMQError, ConfigError) as error:
            socket.close(0)
            log.error("outputs.cannot_connect", slot=item.slot, endpoint=item.endpoint, error=str(error))
            return
        self._sockets[item.slot] = (item.endpoint, socket)

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        """Send one message to a slot's gateway; nobody there = nobody wants it."""
        current = self._sockets.get(slot)
        if current is None:
            return
        try:
            current[1].send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            log.error("outputs.cut_off", slot=slot, endpoint=current[0], messages=QUEUE_MESSAGES_MAX)
            self.attach(Attach(slot, None))

    def close(self) -> None:
        """Close all sockets; what is queued gets LINGER_MS."""
        for _, socket in self._sockets.values():
            socket.close(LINGER_MS)
        self._sockets.clear()
        self._ctx.term()
