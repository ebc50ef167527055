"""Connections between engines: the owner's listener, and the initiator's view of a peer.

One thread per connection, blocking. A connection says in its greeting what it carries: "control" (messages
of transfer.messages, one answer each), "data" (transfer.tcp) or "memory" (transfer.shm).
"""

import errno
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from mooncake.core.errors import (
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)
from mooncake.core.messages import Failure, Ok
from mooncake.core.rpc import failure_of, raise_failure
from transfer.fdpass import peer_uid
from transfer.greeting import greet, receive, welcome
from transfer.messages import (
    Ask,
    Describe,
    Fence,
    Hello,
    Notify,
    Ping,
    RdmaConnect,
    RdmaConnected,
    RdmaDisconnect,
    SegmentInfo,
    Told,
    Welcome,
)
from transfer.stream import connect, hang_up, recv_message, send_message, tune, until

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 4096
"""Threads of an owner: 4 data, 1 control, 1 memory connection of some hundreds of peers."""
BACKLOG = 128
GREETING_S = 5.0
"""Whoever connects has to have introduced itself by then."""
ACCEPT_PAUSE_S = 0.05
"""Between attempts while this process is out of file descriptors."""

Request = Describe | Ping | Notify | Ask | Fence | RdmaConnect | RdmaDisconnect
Answer = Ok | SegmentInfo | Told | RdmaConnected | Failure


class Session:
    """One accepted connection, greeted."""

    def __init__(self, sock: socket.socket, hello: Hello) -> None:
        """`sock` is closed by the listener when `serve` returns."""
        self.sock = sock
        self.epoch = hello.epoch
        self.name = hello.name
        self.link = hello.link
        self.ended = threading.Event()
        self._callbacks: list[Callable[[], None]] = []

    def on_close(self, callback: Callable[[], None]) -> None:
        """Have `callback` called by the connection's own thread once it has ended."""
        self._callbacks.append(callback)

    def run_callbacks(self) -> None:
        """Only for the listener."""
        for callback in self._callbacks:
            callback()
        self.ended.set()


Serve = Callable[[Session], None]
Handle = Callable[[Session, Any], Any]


class Listener:
    """Accepts, greets and serves the connections of other engines."""

    def __init__(
        self,
        me: tuple[str, str],
        secret: bytes,
        serve: dict[str, Serve],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Build it, `bind`, then `start`.

        Args:
            me: (epoch, name) of this engine.
            secret: shared by all engines, b"" = none.
            serve: by purpose of the greeting; returns when the connection is at its end.
            tls: for TCP connections; unix sockets never leave the host.
        """
        self.me = me
        self._secret = secret
        self._serve = serve
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._open: dict[int, tuple[socket.socket, threading.Thread]] = {}
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def bind(self, address: tuple[str, int] | Path) -> Any:
        """Listen at (host, port) or at a unix path; return the socket's own name.

        Raises:
            ConfigError: the address is in use or not ours.
        """
        if isinstance(address, Path):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(str(address) if isinstance(address, Path) else address)
            if isinstance(address, Path):
                address.chmod(0o600)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigError(f"cannot listen at {address}: {error}") from error
        self._sockets.append(sock)
        return sock.getsockname()

    def start(self) -> None:
        """Begin to accept."""
        for sock in self._sockets:
            thread = threading.Thread(target=self._accept, args=(sock,), name="transfer-accept", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """End every connection and wait for their threads (idempotent)."""
        self._closing.set()
        for sock in self._sockets:
            hang_up(sock)
        for thread in self._threads:
            thread.join(GREETING_S)
        with self._lock:
            left = list(self._open.values())
        for sock, _ in left:
            hang_up(sock)
        for _, thread in left:
            if thread is not threading.current_thread():
                thread.join(GREETING_S)
        for sock in self._sockets:
            sock.close()

    def _accept(self, listening: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listening.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    log.warning("transfer.out_of_descriptors", hint="raise ulimit -n")
                self._closing.wait(ACCEPT_PAUSE_S)
                continue
            thread = threading.Thread(target=self._run, args=(sock,), name="transfer-serve", daemon=True)
            with self._lock:
                full = len(self._open) >= CONNECTIONS_MAX
                if not full:
                    self._open[id(sock)] = (sock, thread)
            if full:
                log.warning("transfer.too_many_connections", limit=CONNECTIONS_MAX)
                sock.close()
            else:
                thread.start()

    def _run(self, raw: socket.socket) -> None:
        sock, session = raw, None
        try:
            if raw.family == socket.AF_UNIX:
                if peer_uid(raw) != os.getuid():
                    raise ConfigError(f"refused a process of user {peer_uid(raw)}")
            elif self._tls:
                raw.settimeout(GREETING_S)
                sock = self._tls.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
                with self._lock:
                    self._open[id(raw)] = (sock, threading.current_thread())  # what close has to hang up
                sock.do_handshake()
            tune(sock)
            check = until(time.monotonic() + GREETING_S, "greeting")
            hello = receive(sock, self._secret, check)
            serve = self._serve.get(hello.purpose)
            if serve is None:
                raise ProtocolError(f"no {hello.purpose} connections here")
            session = Session(sock, hello)
            serve(session)
        except (MooncakeError, OSError) as error:
            if not self._closing.is_set() and not isinstance(error, PeerGone):
                log.info("transfer.connection_ended", reason=str(error))
        finally:
            if session:
                session.run_callbacks()
            with self._lock:
                self._open.pop(id(raw), None)
            hang_up(sock)
            sock.close()

    def welcome(self, session: Session) -> None:
        """Tell the initiator that it may begin; `serve` calls this once it is ready."""
        welcome(session.sock, self.me, until(time.monotonic() + GREETING_S, "greeting"))


def serve_control(session: Session, handlers: dict[type, Handle]) -> None:
    """Answer control messages until the connection ends.

    Raises:
        PeerGone: it has.
        ProtocolError: the peer sends something else.
    """
    while True:
        message = recv_message(session.sock, Request, _never)
        try:
            handle = handlers.get(type(message))
            if handle is None:
                raise RequestError(f"{type(message).__name__} is not served here")
            answer = handle(session, message)
        except MooncakeError as error:
            answer = failure_of(error)
        send_message(session.sock, answer, until(time.monotonic() + GREETING_S, "answer"))


def _never() -> None:
    """An idle control connection may stay silent; keep-alive and close end it."""


class Dialer:
    """Makes greeted connections to other engines."""

    def __init__(self, me: tuple[str, str], secret: bytes, tls: ssl.SSLContext | None = None) -> None:
        """`me` is (epoch, name) of this engine; `tls` is used for TCP."""
        self.me = me
        self._secret = secret
        self._tls = tls

    def dial(
        self, address: tuple[str, int] | str, purpose: str, deadline_s: float, link: int = 0, epoch: str = ""
    ) -> socket.socket:
        """Return a connection to the engine at `address` (host and port, or a unix path).

        Args:
            address: where it listens.
            purpose: what the connection will carry, see Hello.
            deadline_s: for all of it.
            link: our number of the connection.
            epoch: refuse another start of the engine than this one; "" = any.

        Raises:
            PeerTimeout, PeerGone: nobody there, or another start of it; ConfigError: not let in;
            ProtocolError: no engine.
        """
        end_s = time.monotonic() + deadline_s
        sock = connect(address, deadline_s)
        try:
            if self._tls and not isinstance(address, str):
                sock = self._tls.wrap_socket(sock, server_hostname=address[0])
            tune(sock, buffers=purpose == "data")
            told = greet(sock, purpose, self.me, link, self._secret, until(end_s, f"greeting {address}"))
            _same_start(told, epoch)
        except OSError as error:
            hang_up(sock)
            sock.close()
            raise PeerGone(f"{address}: {error}") from error
        except BaseException:
            hang_up(sock)
            sock.close()
            raise
        return sock


def _same_start(told: Welcome, epoch: str) -> None:
    if epoch and told.epoch != epoch:
        raise PeerGone(f"{told.name} has been restarted")


class Remote:
    """A peer engine: its description, and one control connection that is made anew when it broke."""

    def __init__(self, name: str, address: tuple[str, int], dialer: Dialer) -> None:
        """Call `refresh` before anything else."""
        self.name = name
        self.address = address
        self.info: SegmentInfo
        self._dialer = dialer
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None

    def ask(self, message: Any, kind: type[Any], deadline_s: float) -> Any:
        """See model.Peer.

        Raises:
            PeerTimeout, PeerGone: no answer; ConfigError: not let in; what the peer refuses with.
        """
        end_s = time.monotonic() + deadline_s
        if not self._lock.acquire(timeout=deadline_s):
            raise PeerTimeout(f"{self.name}: its control connection is busy")
        try:
            fresh = self._sock is None
            try:
                return self._ask(message, kind, end_s)
            except PeerGone:
                if fresh:
                    raise
            return self._ask(message, kind, end_s)  # the old connection had broken: once more on a new one
        finally:
            self._lock.release()

    def _ask(self, message: Any, kind: type[Any], end_s: float) -> Any:
        check = until(end_s, self.name)
        try:
            if self._sock is None:
                self._sock = self._dialer.dial(self.address, "control", end_s - time.monotonic())
            send_message(self._sock, message, check)
            answer = recv_message(self._sock, kind | Failure, check)
        except MooncakeError:
            self.hang_up()
            raise
        return raise_failure(answer, self.name)

    def refresh(self, deadline_s: float) -> SegmentInfo:
        """Ask the peer for its present description.

        Raises:
            PeerError: no answer; ConfigError: not let in.
        """
        self.info = self.ask(Describe(), SegmentInfo, deadline_s)
        return self.info

    def hang_up(self) -> None:
        """Close the control connection; the next `ask` makes another."""
        sock, self._sock = self._sock, None
        if sock:
            hang_up(sock)
            sock.close()
