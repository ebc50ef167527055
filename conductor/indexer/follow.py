"""Follows one publisher over ZMQ: its messages, what it repeats, and whether it is there at all.

    publisher --PUB: [topic, number, events]--> SUB, one socket per connection --> Stream --> Source --> index
              <--DEALER: "repeat from N"------

A socket of ZMQ's would connect anew by itself and hide that; ours does not, so one socket is one process at
the other end. While there is none, its blocks are kept but do not count; see Stream for what happens then.
"""

import asyncio
import threading
from collections.abc import Sequence
from enum import StrEnum

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from conductor.indexer.endpoints import Network, resolve
from conductor.indexer.stream import Stream
from mooncake.core import wire
from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout
from mooncake.worker.gpu_events import (
    END_OF_REPLAY,
    QUEUE_MESSAGES_MAX,
    QUIET_S,
    REPLAY_S,
    REPLAYS_MAX,
    SEQ_BYTES,
)

log = structlog.get_logger(__name__)

CONNECT_S = 5.0
"""For a connection and ZMTP's greeting."""
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 2.0
"""Between two attempts: an engine takes a minute to start."""
HEARTBEAT_MS, SILENT_MS = 2_000, 8_000
"""ZMTP's own pings: a host that is gone without a word is noticed after this."""


class State(StrEnum):
    """Of a publisher, as a metric label."""

    CONNECTING = "connecting"  # nothing is known of it
    LIVE = "live"
    STALE = "stale"  # what is known does not count until it is heard again


class Follower:
    """Of one registration, from `start` to `close`, on one loop."""

    def __init__(
        self,
        stream: Stream,
        lock: "threading.RLock",
        context: "zmq.asyncio.Context",
        allowed: Sequence[Network],
    ) -> None:
        """`lock`: held whenever the index is changed."""
        self.stream = stream
        self.state = State.CONNECTING
        self._lock = lock
        self._context = context
        self._allowed = allowed
        self._service = stream.source.service
        self._task: asyncio.Task[None] | None = None
        with lock:
            stream.source.trust(False)

    def start(self) -> None:
        """Begin on the running loop."""
        self._task = asyncio.create_task(self._run(), name=f"follow {self._service.key}")
        self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Stop, and forget what was told (idempotent)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with self._lock:
            self.stream.source.close()

    async def _run(self) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                await self._live()
            except (MooncakeError, zmq.ZMQError) as error:
                log.debug("indexer.no_publisher", service=self._service.key, reason=str(error))
            if self.state is State.LIVE:
                self._lose()
                backoff_s = BACKOFF_S_MIN
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("indexer.died", task=task.get_name(), exc_info=error)
            self.state = State.STALE
            with self._lock:
                self.stream.source.trust(False)

    def _lose(self) -> None:
        """Count its blocks no more; without a way to ask for the last message, they can never count again."""
        self.state = State.STALE
        log.warning("indexer.publisher_lost", service=self._service.key, blocks=len(self.stream.source))
        with self._lock:
            self.stream.source.trust(False)
            if not self._service.replay_endpoint:
                self.stream.restart("it is gone, and has no replay endpoint to go on from")

    async def _live(self) -> None:
        """One connection; returns when it ends, or raises if there is none."""
        endpoint = await resolve(self._service.endpoint, "endpoint", self._allowed)
        socket = self._socket(zmq.SUB)
        monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        )
        watch = read = None
        try:
            socket.subscribe(b"")
            socket.connect(endpoint)
            await _greeted(monitor, endpoint)
            watch = asyncio.create_task(_gone(monitor))
            read = asyncio.create_task(self._read(socket))
            await asyncio.wait({watch, read}, return_when=asyncio.FIRST_COMPLETED)
            if read.done():
                read.result()
        finally:
            for task in (watch, read):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    def _socket(self, kind: int) -> "zmq.asyncio.Socket":
        socket = self._context.socket(kind)
        socket.set_hwm(QUEUE_MESSAGES_MAX)
        for option, value in (
            (zmq.LINGER, 0), (zmq.MAXMSGSIZE, wire.MESSAGE_BYTES_MAX), (zmq.RECONNECT_IVL, -1), (zmq.IPV6, 1),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS), (zmq.HEARTBEAT_TIMEOUT, SILENT_MS),
        ):  # fmt: skip
            socket.setsockopt(option, value)
        return socket

    # ------------------------------------------------------------ messages

    async def _read(self, socket: "zmq.asyncio.Socket") -> None:
        await self._begin()
        with self._lock:
            self.stream.source.trust(True)
        self.state = State.LIVE
        log.info("indexer.live", service=self._service.key, blocks=len(self.stream.source))
        asked = not self._service.replay_endpoint
        while True:
            try:
                async with asyncio.timeout(None if asked else QUIET_S):
                    frames = await socket.recv_multipart()
            except TimeoutError:
                await self._replay(self.stream.expected)  # that the last message was lost, none would show
                asked = True
                continue
            asked = not self._service.replay_endpoint
            if not self._take(frames):
                await self._fill_gap(frames)

    async def _begin(self) -> None:
        """Learn what there is, or go on where the last connection ended."""
        stream = self.stream
        if not self._service.replay_endpoint:
            return
        if not stream.fresh:
            kept = await self._replay(stream.expected - 1, first=True)
            if kept is None or not stream.goes_on(kept):
                with self._lock:
                    stream.restart("another publisher, or one that does not remember")
        await self._replay(stream.expected)

    def _take(self, frames: Sequence[bytes]) -> bool:
        with self._lock:
            return self.stream.take(frames)

    async def _fill_gap(self, frames: Sequence[bytes]) -> None:
        stream = self.stream
        stream.gaps += 1
        for _ in range(REPLAYS_MAX if self._service.replay_endpoint else 0):
            before = stream.expected
            await self._replay(before)
            if self._take(frames):
                return
            if stream.expected == before:
                break
        with self._lock:
            stream.skip_to(frames)

    async def _replay(self, start: int, first: bool = False) -> list[bytes] | None:
        """Take what the publisher still has from a message on; with `first`, only return that one."""
        socket = self._socket(zmq.DEALER)
        try:
            async with asyncio.timeout(REPLAY_S):
                socket.connect(await resolve(self._service.replay_endpoint, "replay_endpoint", self._allowed))
                await socket.send_multipart([b"", start.to_bytes(SEQ_BYTES, "big")])
                while True:
                    _, *frames = await socket.recv_multipart()
                    if len(frames) == 3 and frames[1] == END_OF_REPLAY:
                        return None
                    if first:
                        return frames
                    if not self._take(frames):
                        return None  # it has forgotten what we need
        except TimeoutError:
            log.warning("indexer.no_replay", service=self._service.key, seconds=REPLAY_S)
        except MooncakeError as error:
            log.warning("indexer.no_replay", service=self._service.key, reason=str(error))
        finally:
            socket.close(linger=0)
        return None


async def _greeted(monitor: "zmq.asyncio.Socket", endpoint: str) -> None:
    try:
        async with asyncio.timeout(CONNECT_S):
            if (await recv_monitor_message(monitor))["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
    except TimeoutError:
        raise PeerTimeout(f"{endpoint}: no publisher within {CONNECT_S:g} s") from None
    raise PeerGone(f"{endpoint}: closed")


async def _gone(monitor: "zmq.asyncio.Socket") -> None:
    while (await recv_monitor_message(monitor))["event"] != zmq.EVENT_DISCONNECTED:
        continue
