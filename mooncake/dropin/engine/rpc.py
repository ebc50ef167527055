"""`RpcInterface` of `mooncake.engine`: bytes and tensors from one process to another's callback.

On the transfer engine's own connections: framed, greeted, and with the shared secret where there is one.
Upstream's answers (measured on 0.3.13.post1) are kept where they mean something; its `*_async` calls abort
and its tensors arrive without a shape, here both work.
"""

import asyncio
import contextlib
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import msgspec
import structlog

from mooncake.core.errors import ConfigError, MooncakeError, PeerTimeout, RequestError
from mooncake.core.messages import Failure, Ok
from mooncake.core.rpc import failure_of, raise_failure
from mooncake.dropin.engine.env import EngineEnv
from mooncake.dropin.engine.start import bind_host, environment, log_to_stderr
from transfer.control import Dialer, Listener, Session
from transfer.naming import parse_address
from transfer.registry import view_at
from transfer.stream import hang_up, recv_into, recv_message, send_message, send_views, until

POST_BYTES_MAX = 1 << 30
"""One message; larger things belong into a transfer."""
DIMENSIONS_MAX = 64
THREADS = 8
POOL_MAX = 1024
TIMEOUT_S = 30

log = structlog.get_logger(__name__)


class Post(msgspec.Struct, frozen=True, array_like=True, tag="post"):
    """Heads `size_bytes` raw bytes. Answer: Ok, once the receiver's callback has returned."""

    kind: Literal["data", "tensor"]
    size_bytes: int
    dtype: str = ""
    shape: list[int] = []


class ReceivedData(dict[str, Any]):
    """What the data callback gets: upstream's dictionary {"source", "data"}, and its documented methods."""

    @property
    def source_address(self) -> str:
        """The sender's "host:port"."""
        return str(self["source"])

    @property
    def data_size(self) -> int:
        """Bytes."""
        return len(self["data"])

    def get_bytes(self) -> bytes:
        """Return the bytes."""
        return bytes(self["data"])

    def get_memory_view(self) -> memoryview:
        """Return the bytes without a copy."""
        return memoryview(self["data"])


class ReceivedTensor:
    """What the tensor callback gets: the bytes in row-major order, with type and shape."""

    def __init__(self, source: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        """`dtype` is torch's name without "torch."."""
        self.source_address = source
        self.dtype = dtype
        self.shape = list(shape)
        self._data = data

    @property
    def total_bytes(self) -> int:
        """Bytes."""
        return len(self._data)

    def get_data_size(self) -> int:
        """Return the number of bytes."""
        return len(self._data)

    def get_data_as_bytes(self) -> bytes:
        """Return the bytes."""
        return self._data

    def get_memory_view(self) -> memoryview:
        """Return the bytes without a copy."""
        return memoryview(self._data)


class _Receiver:
    """The listening half."""

    def __init__(self, address: tuple[str, int], env: EngineEnv, threads: int, timeout_s: float) -> None:
        self._turn = threading.BoundedSemaphore(threads)
        self._timeout_s = timeout_s
        self.callbacks: dict[str, Callable[[Any], Any]] = {}
        name = f"{address[0]}:{address[1]}"
        self._listener = Listener((secrets.token_hex(16), name), env.secret, {"control": self._serve})
        self._listener.bind((bind_host(address[0], env), address[1]))
        self._listener.start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self, session: Session) -> None:
        self._listener.welcome(session)
        sock = session.sock
        peer = sock.getpeername()
        source = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else session.name
        while True:
            post: Post = recv_message(sock, Post, lambda: None)  # idle connections are kept
            if not 0 <= post.size_bytes <= POST_BYTES_MAX or len(post.shape) > DIMENSIONS_MAX:
                raise RequestError(f"a message of {post.size_bytes} bytes: at most {POST_BYTES_MAX}")
            answer = self._take(sock, post, source)
            send_message(sock, answer, until(time.monotonic() + self._timeout_s, "answer"))

    def _take(self, sock: socket.socket, post: Post, source: str) -> Ok | Failure:
        if not self._turn.acquire(timeout=self._timeout_s):  # bounds the memory of half-received messages
            raise PeerTimeout("the receiver is busy")
        try:
            data = bytearray(post.size_bytes)
            recv_into(sock, memoryview(data), until(time.monotonic() + self._timeout_s, "message"))
            callback = self.callbacks.get(post.kind)
            if callback is None:
                return failure_of(RequestError(f"nobody here receives {post.kind}"))
            if post.kind == "data":
                callback(ReceivedData(source=source, data=bytes(data)))
            else:
                callback(ReceivedTensor(source, post.dtype, post.shape, bytes(data)))
        except MooncakeError:
            raise
        except Exception as error:  # noqa: BLE001 - the application's code; upstream answers 0 as well
            log.error("mooncake.engine: a receive callback failed", error=repr(error))
        finally:
            self._turn.release()
        return Ok()


class _Sender:
    """The calling half: connections are kept for the next message to the same target."""

    def __init__(self, env: EngineEnv, pool: int, timeout_s: float) -> None:
        self._dialer = Dialer((secrets.token_hex(16), "rpc-client"), env.secret)
        self._timeout_s = timeout_s
        self._pool = pool
        self._lock = threading.Lock()
        self._idle: dict[str, deque[socket.socket]] = {}
        self._closed = False
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mooncake-rpc")

    def send(self, target: str, post: Post, data: memoryview) -> None:
        end_s = time.monotonic() + self._timeout_s
        sock = self._connection(target, end_s)
        try:
            check = until(end_s, target)
            send_message(sock, post, check)
            send_views(sock, [data], check)
            answer = recv_message(sock, Ok | Failure, check)
        except BaseException:
            _close(sock)
            raise
        with self._lock:
            idle = self._idle.setdefault(target, deque())
            keep = not self._closed and sum(map(len, self._idle.values())) < self._pool
            if keep:
                idle.append(sock)
        if not keep:
            _close(sock)
        raise_failure(answer, target)

    def _connection(self, target: str, end_s: float) -> socket.socket:
        while True:
            with self._lock:
                idle = self._idle.get(target)
                sock = idle.pop() if idle else None
                if not idle:
                    self._idle.pop(target, None)
            if sock is None:
                return self._dialer.dial(parse_address(target), "control", end_s - time.monotonic())
            try:
                sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return sock  # nothing to read: it is open
            except OSError as error:
                log.debug("rpc connection broke", target=target, error=repr(error))
            _close(sock)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle = [sock for socks in self._idle.values() for sock in socks]
            self._idle.clear()
        for sock in idle:
            _close(sock)
        self.threads.shutdown(wait=False)


class RpcInterface:
    """Upstream's class; one object may be server, client or both. Methods may be called from any thread."""

    def __init__(self) -> None:
        """Open nothing."""
        log_to_stderr()
        self._listen: tuple[str, int, float] | None = None  # address, threads, timeout
        self._receiver: _Receiver | None = None
        self._sender: _Sender | None = None
        self._callbacks: dict[str, Callable[[Any], Any]] = {}
        self._stopped = threading.Event()

    def __del__(self) -> None:
        """End with the object."""
        self.stop_server()
        if self._sender:
            self._sender.close()

    def initialize(
        self,
        listen_address: str = "",
        thread_count: int = 0,
        timeout_seconds: int = TIMEOUT_S,
        pool_size: int = 100,
    ) -> bool:
        """Prepare to send, and with a `listen_address` to receive."""
        if listen_address and not self.initialize_server(
            listen_address, thread_count or THREADS, timeout_seconds
        ):
            return False
        return self.initialize_client(pool_size, timeout_seconds)

    def initialize_client(self, pool_size: int = 100, timeout_seconds: int = TIMEOUT_S) -> bool:
        """Prepare to send; at most `pool_size` connections are kept, a call takes at most the time-out."""
        try:
            sender = _Sender(environment(), min(max(pool_size, 1), POOL_MAX), max(timeout_seconds, 1))
        except ConfigError as error:
            log.error("mooncake.engine: rpc client", reason=str(error))
            return False
        if self._sender:
            self._sender.close()
        self._sender = sender
        return True

    def initialize_server(
        self, listen_address: str, thread_count: int = THREADS, timeout_seconds: int = TIMEOUT_S
    ) -> bool:
        """Remember where to listen; `start_server` or `start_server_async` does it."""
        self._listen = (listen_address, min(max(thread_count, 1), POOL_MAX), max(timeout_seconds, 1))
        return True

    def start_server_async(self) -> bool:
        """Listen in the background; False (and a line in the log): not possible, or already done."""
        if self._listen is None or self._receiver is not None:
            log.error("mooncake.engine: rpc server", reason="call initialize_server first, and start it once")
            return False
        address, threads, timeout_s = self._listen
        try:
            self._receiver = _Receiver(parse_address(address), environment(), threads, timeout_s)
        except MooncakeError as error:
            log.error("mooncake.engine: rpc server", reason=str(error))
            return False
        self._receiver.callbacks = self._callbacks
        self._stopped.clear()
        return True

    def start_server(self) -> bool:
        """Listen until `stop_server` is called by another thread; False at once: not possible."""
        if not self.start_server_async():
            return False
        self._stopped.wait()
        return True

    def stop_server(self) -> None:
        """End every connection (idempotent)."""
        receiver, self._receiver = self._receiver, None
        if receiver:
            receiver.close()
        self._stopped.set()

    def set_data_receive_callback(self, arg0: Callable[[ReceivedData], Any], /) -> None:
        """Have `arg0` called with every message; the sender waits for its end."""
        self._callbacks["data"] = arg0

    def set_tensor_receive_callback(self, arg0: Callable[[ReceivedTensor], Any], /) -> None:
        """Have `arg0` called with every tensor; the sender waits for its end."""
        self._callbacks["tensor"] = arg0

    def send_data(self, target_address: str, data: bytes) -> int:
        """Send bytes; 0 = the receiver's callback has seen them, -1 = not known."""
        if not isinstance(data, bytes):
            raise TypeError(f"Object of type {type(data).__name__!r} is not an instance of 'bytes'")
        return self._send(target_address, Post("data", len(data)), memoryview(data))

    def send_tensor(self, target_address: str, tensor: Any) -> int:
        """Send a torch tensor; 0 = the receiver's callback has seen it, -1 = not known, or no tensor."""
        if not hasattr(tensor, "data_ptr"):
            log.error("mooncake.engine: send_tensor", reason=f"{type(tensor).__name__} is no torch tensor")
            return -1
        tensor = tensor.detach().cpu().contiguous()
        size_bytes = int(tensor.nbytes)
        data = view_at(int(tensor.data_ptr()), size_bytes) if size_bytes else memoryview(b"")
        dtype = str(tensor.dtype).removeprefix("torch.")
        return self._send(target_address, Post("tensor", size_bytes, dtype, list(tensor.shape)), data)

    def send_data_async(
        self, target_address: str, data: bytes, loop: asyncio.AbstractEventLoop
    ) -> "asyncio.Future[int]":
        """As `send_data`, awaitable on `loop`."""
        return self._in_thread(loop, self.send_data, target_address, data)

    def send_tensor_async(
        self, target_address: str, tensor: Any, loop: asyncio.AbstractEventLoop
    ) -> "asyncio.Future[int]":
        """As `send_tensor`, awaitable on `loop`."""
        return self._in_thread(loop, self.send_tensor, target_address, tensor)

    def _in_thread(
        self, loop: asyncio.AbstractEventLoop, send: Callable[[str, Any], int], target: str, what: Any
    ) -> "asyncio.Future[int]":
        return loop.run_in_executor(self._sender.threads if self._sender else None, send, target, what)

    def _send(self, target: str, post: Post, data: memoryview) -> int:
        try:
            if self._sender is None:
                raise RequestError("call initialize or initialize_client first")
            if post.size_bytes > POST_BYTES_MAX:
                raise RequestError(f"a message of {post.size_bytes} bytes: at most {POST_BYTES_MAX}")
            self._sender.send(target, post, data)
        except MooncakeError as error:
            log.error("mooncake.engine: rpc send failed", target=target, reason=str(error))
            return -1
        return 0


CoroRPCInterface = RpcInterface
"""Upstream's other name of it."""


def create_rpc_client(local_rank: int = 0, world_size: int = 1) -> RpcInterface:  # noqa: ARG001 - upstream's
    """Return an interface that can send."""
    client = RpcInterface()
    client.initialize_client()
    return client


def create_rpc_server(local_rank: int = 0, world_size: int = 1) -> RpcInterface:  # noqa: ARG001 - upstream's
    """Return an interface; `initialize_server` says where it listens."""
    return RpcInterface()


def _close(sock: socket.socket) -> None:
    hang_up(sock)
    with contextlib.suppress(OSError):
        sock.close()
