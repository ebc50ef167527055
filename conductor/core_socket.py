"""A ZMQ socket on an event loop without a hop per message: read when it can be read, many at a time.

The file descriptor of a ZMQ socket signals an edge, so it is read until empty, and looked at after sending.
"""

import asyncio
import contextvars
from collections.abc import Callable, Sequence

import zmq

from mooncake.core import wire

QUEUE_MAX = 10_000
"""Messages towards one peer: a second and more of the busiest gateway's."""
DRAIN_MAX = 256
"""Messages read before the rest of the loop gets a turn."""


class CoreSocket:
    """Over a ROUTER or a DEALER; `take` gets the frames of each message, and must not raise."""

    def __init__(self, kind: int, take: Callable[[list[bytes]], None], linger_ms: int = 0) -> None:
        """`kind`: zmq.ROUTER or zmq.DEALER. Bind or connect `socket`, then `start`.

        `linger_ms`: how long `close` may wait for what is not sent yet; the loop stands still for it.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.set_hwm(QUEUE_MAX)
        self._linger_ms = linger_ms
        self.socket.setsockopt(zmq.MAXMSGSIZE, wire.MESSAGE_BYTES_MAX)
        self._take = take
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False

    def start(self) -> None:
        """Begin to read, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self.drain)
        self.drain()

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send, or return False: nobody reads there any more."""
        if self._loop is None:
            return False
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:  # full, or a peer that is gone
            return False
        if int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # a send may swallow the edge
            # what it brings, and logs, is not only of the request whose task sends (see conductor.links)
            self._loop.call_soon(self.drain, context=contextvars.Context())
        return True

    def drain(self) -> None:
        """Read what is there; call it now and then, lest a missed edge matters."""
        if self._draining or self._loop is None:
            return
        self._draining = True
        try:
            for _ in range(DRAIN_MAX):
                if self.socket.closed:
                    return  # by what was said before
                self._take(self.socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return
        finally:
            self._draining = False
        asyncio.get_running_loop().call_soon(self.drain)

    def close(self) -> None:
        """End (idempotent)."""
        if self._loop is not None:
            self._loop.remove_reader(self.socket.fileno())
            self._loop = None
        self._context.destroy(linger=self._linger_ms)
