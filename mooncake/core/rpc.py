"""Request and reply over ZMQ with a deadline on every call.

Frames after ROUTER identity: [call id, 8 bytes][payload: one msgpack message]. A reply carries
the call's id, so late replies of timed-out calls are recognised and dropped. DEALER/ROUTER, not
REQ/REP: a lost peer never wedges the socket. Without a secret of the cluster, sockets bind loopback
or ipc only (see `check_endpoint`); with one, every tcp socket proves it (mooncake.core.curve).
"""

import asyncio
import contextlib
import itertools
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import zmq
import zmq.asyncio

from mooncake.core import wire
from mooncake.core.curve import guard_client, guard_server
from mooncake.core.errors import (
    WIRE_ERRORS,
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
)
from mooncake.core.messages import Failure
from mooncake.core.secret import SECRET_FILE_ENV, cluster_secret

log = structlog.get_logger(__name__)

IN_FLIGHT_MAX = 1024
"""Calls a server works on at once; more are refused with CapacityError, never queued unseen."""
HWM_MESSAGES = 10_000
"""ZMQ queue bound per peer; control traffic is a few hundred messages a second."""
LINGER_MS = 200
LOOPBACK_TCP = re.compile(r"tcp://(127\.0\.0\.1|localhost):(\d{1,5}|\*)")
"""IPv4 only: a ZMQ socket needs an option for [::1], and nobody needs two loopbacks."""
TCP = re.compile(r"tcp://[A-Za-z0-9._-]+:(\d{1,5}|\*)")

Handler = Callable[[Any], Awaitable[Any]]


def check_endpoint(endpoint: str) -> str:
    """Return `endpoint` if it may be used: other hosts' addresses only with a secret of the cluster.

    Raises:
        ConfigError: it is no ipc:// or tcp:// address, or not loopback and there is no secret.
    """
    if endpoint.startswith("ipc://") or LOOPBACK_TCP.fullmatch(endpoint):
        return endpoint
    if not TCP.fullmatch(endpoint):
        raise ConfigError(f"endpoint {endpoint!r}: write tcp://HOST:PORT or ipc://PATH")
    if not cluster_secret():
        raise ConfigError(
            f"endpoint {endpoint!r}: others can reach it: set {SECRET_FILE_ENV}, the same secret for the "
            "whole cluster, or use tcp://127.0.0.1:PORT"
        )
    return endpoint


def bind(socket: zmq.Socket[Any], endpoint: str) -> str:
    """Bind and return the concrete endpoint (a tcp port of 0 or * is chosen by the system)."""
    check_endpoint(endpoint)
    if endpoint.startswith("ipc://"):
        socket.bind(endpoint)
        return endpoint
    host, port = endpoint.rsplit(":", 1)
    guard_server(socket, endpoint)
    socket.bind(f"{host}:*" if port in ("0", "*") else endpoint)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def connect(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Connect, proving the cluster's secret if there is one; lazy, as ZMQ is."""
    guard_client(socket, endpoint)
    socket.connect(endpoint)


def remove_socket_file(endpoint: str) -> None:
    """Remove the file of an ipc endpoint that nobody serves any more: ZMQ leaves it behind."""
    if endpoint.startswith("ipc://"):
        Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


def failure_of(error: MooncakeError) -> Failure:
    """Return `error` in its wire form."""
    return Failure(error.code, str(error))


def raise_failure(reply: Any, peer: str) -> Any:
    """Return `reply`, or raise the error it carries."""
    if isinstance(reply, Failure):
        raise WIRE_ERRORS.get(reply.code, MooncakeError)(f"{peer}: {reply.message}")
    return reply


class RpcServer:
    """Serves one union of request types. Used as an async context or with start/close."""

    def __init__(self, endpoint: str, request_type: Any, handler: Handler) -> None:
        """Bind at once, so that `endpoint` is known before the first await."""
        self._ctx = zmq.asyncio.Context()
        self._socket = self._ctx.socket(zmq.ROUTER)
        self._socket.set_hwm(HWM_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MESSAGE_BYTES_MAX)
        try:
            self.endpoint = bind(self._socket, endpoint)
        except Exception:
            self._ctx.destroy(linger=0)
            raise
        self._request_type = request_type
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve on the running event loop."""
        self._loop_task = asyncio.create_task(self._serve(), name=f"rpc {self.endpoint}")

    async def close(self) -> None:
        """Stop serving; calls in progress are cancelled."""
        tasks = [*self._tasks, *([self._loop_task] if self._loop_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._ctx.destroy(linger=LINGER_MS)
        remove_socket_file(self.endpoint)

    async def _serve(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                log.warning("rpc.bad_frames", endpoint=self.endpoint, frames=len(frames))
                continue
            if len(self._tasks) >= IN_FLIGHT_MAX:
                error = CapacityError(f"{IN_FLIGHT_MAX} calls in progress at {self.endpoint}")
                await self._send(frames[0], frames[1], wire.encode(failure_of(error)))
                continue
            task = asyncio.create_task(self._answer(*frames))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, identity: bytes, call_id: bytes, payload: bytes) -> None:
        try:
            reply = wire.encode(await self._handler(wire.decode(payload, self._request_type)))
        except MooncakeError as error:
            reply = wire.encode(failure_of(error))
        except Exception as error:
            log.exception("rpc.handler_failed", endpoint=self.endpoint)
            reply = wire.encode(Failure("internal", f"{type(error).__name__}: {error}"))
        await self._send(identity, call_id, reply)

    async def _send(self, identity: bytes, call_id: bytes, reply: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the caller is gone: nobody waits for this
            await self._socket.send_multipart([identity, call_id, reply])


class RpcClient:
    """Asyncio client of one server. Calls run concurrently; each has a deadline."""

    def __init__(self, endpoint: str, reply_type: Any) -> None:
        """Connecting is lazy in ZMQ: a missing server shows as PeerTimeout of a call."""
        self.endpoint = endpoint
        self._reply_type = reply_type
        self._ctx = zmq.asyncio.Context()
        self._socket = self._ctx.socket(zmq.DEALER)
        self._socket.set_hwm(HWM_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        connect(self._socket, endpoint)
        self._ids = itertools.count(1)
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def call(self, request: Any, deadline_s: float) -> Any:
        """Return the reply to `request`.

        Raises:
            PeerTimeout: no reply within `deadline_s`.
            CapacityError: too many calls in flight here, or at the server.
            MooncakeError: whatever the server answered as a failure.
        """
        if len(self._waiting) >= IN_FLIGHT_MAX:
            raise CapacityError(f"{IN_FLIGHT_MAX} calls in flight to {self.endpoint}")
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read(), name=f"rpc client {self.endpoint}")
        call_id = next(self._ids).to_bytes(8, "little")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        try:
            async with asyncio.timeout(deadline_s):
                await self._socket.send_multipart([call_id, wire.encode(request)])
                payload = await future
        except TimeoutError:
            raise PeerTimeout(
                f"{self.endpoint}: no answer to {type(request).__name__} within {deadline_s:g} s"
            ) from None
        finally:
            self._waiting.pop(call_id, None)
        return raise_failure(wire.decode(payload, self._reply_type), self.endpoint)

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) == 2 and (future := self._waiting.get(frames[0])) and not future.done():
                future.set_result(frames[1])

    async def close(self) -> None:
        """Stop; calls in flight end by their deadline or cancellation."""
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._ctx.destroy(linger=0)


class BlockingRpcClient:
    """Client for threads without a loop (the engine's scheduler step). Thread-safe.

    `begin` sends and returns an id, `poll` looks without waiting, `finish` waits with a deadline:
    a caller can overlap the round trip with its own work.
    """

    def __init__(self, endpoint: str, reply_type: Any) -> None:
        """See RpcClient: connecting is lazy."""
        self.endpoint = endpoint
        self._reply_type = reply_type
        self._ctx = zmq.Context()
        self._socket = self._ctx.socket(zmq.DEALER)
        self._socket.set_hwm(HWM_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        connect(self._socket, endpoint)
        self._ids = itertools.count(1)
        self._replies: dict[bytes, bytes | None] = {}
        self._lock = threading.Lock()

    def begin(self, request: Any) -> bytes:
        """Send `request`; the id must be given to `finish` or `forget`.

        Raises:
            CapacityError: too many calls in flight, or the socket's queue is full.
            PeerGone: this client was closed.
        """
        payload = wire.encode(request)
        with self._lock:
            if len(self._replies) >= IN_FLIGHT_MAX:
                raise CapacityError(f"{IN_FLIGHT_MAX} calls in flight to {self.endpoint}")
            call_id = next(self._ids).to_bytes(8, "little")
            try:
                self._socket.send_multipart([call_id, payload], zmq.NOBLOCK)
            except zmq.Again:
                raise CapacityError(f"send queue to {self.endpoint} is full") from None
            except zmq.ZMQError as error:
                raise PeerGone(f"{self.endpoint}: closed meanwhile ({error})") from error
            self._replies[call_id] = None
        return call_id

    def poll(self, call_id: bytes) -> bool:
        """Return whether the reply to `call_id` is here; never waits. A closed client never has it."""
        with self._lock:
            try:
                self._drain(0)
            except PeerGone:
                return False
            return self._replies.get(call_id) is not None

    def finish(self, call_id: bytes, deadline_s: float) -> Any:
        """Return the reply, waiting at most `deadline_s`; raises as RpcClient.call, and as `begin`."""
        end_s = time.monotonic() + deadline_s
        try:
            while True:
                with self._lock:
                    rest_ms = max(0, int((end_s - time.monotonic()) * 1000))
                    # short slices: another thread may be waiting for its own reply
                    self._drain(min(rest_ms, 20))
                    payload = self._replies.get(call_id)
                if payload is not None:
                    break
                if time.monotonic() >= end_s:
                    raise PeerTimeout(f"{self.endpoint}: no answer within {deadline_s:g} s")
        finally:
            self.forget(call_id)
        return raise_failure(wire.decode(payload, self._reply_type), self.endpoint)

    def call(self, request: Any, deadline_s: float) -> Any:
        """`begin` and `finish` in one."""
        return self.finish(self.begin(request), deadline_s)

    def forget(self, call_id: bytes) -> None:
        """Drop interest in a reply."""
        with self._lock:
            self._replies.pop(call_id, None)

    def _drain(self, wait_ms: int) -> None:
        while True:
            try:
                if not self._socket.poll(wait_ms):
                    return
                frames = self._socket.recv_multipart()
            except zmq.ZMQError as error:  # another thread has closed the client
                raise PeerGone(f"{self.endpoint}: closed meanwhile ({error})") from error
            if len(frames) != 2:
                raise ProtocolError(f"{self.endpoint}: {len(frames)} frames instead of 2")
            if frames[0] in self._replies:
                self._replies[frames[0]] = frames[1]
            wait_ms = 0

    def close(self) -> None:
        """Close the socket."""
        with self._lock:
            self._ctx.destroy(linger=0)
