"""The real client's side: dummy clients of this host reach other hosts' stores through its engine.

Stores of this host they use themselves, by shared memory (kvstore.client.local). For the rest they name
ranges of memory that they share with this process; its engine moves the bytes. What a dummy has here ends
with the connection on which it follows: a dummy that is killed leaves nothing.

Two sockets: TCP at the port that upstream's users know, which says in one line of JSON where the other one
is; and that one, a unix socket in a private directory, for processes of the same user.
"""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mooncake.core.config import is_loopback
from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerGone,
    ProtocolError,
    RequestError,
)
from mooncake.core.messages import Ok, StoreRecord
from mooncake.core.rpc import failure_of
from mooncake.dropin.client.counters import BATCH_GET, BATCH_PUT, Counters
from mooncake.dropin.client.line import (
    Ask,
    Hello,
    Line,
    Move,
    Neighbours,
    Request,
    Share,
    Told,
    Welcome,
    Withdraw,
)
from transfer.engine import TransferEngine
from transfer.fdpass import peer_uid
from transfer.model import Buffer, Opcode
from transfer.segment import Segment

PORT = 50_052
LOOPBACK = "127.0.0.1"
CONNECTIONS_MAX = 1024
"""Threads here; a dummy has one, and one more per thread of its own that is inside a call."""
BACKLOG = 64
REGIONS_MAX = 256
"""Of one dummy: its stage, what it allocated, and objects too large for the stage while they move."""
PAUSE_S = 0.1
"""After a failed accept: out of descriptors."""
LOOK_EVERY_S = 1.0
"""How soon `close` is noticed by what waits for news."""
SEND_S = 5.0
"""A dummy that reads nothing for so long, is stopped: it is hung up on, and connects anew."""
CALL_S_MAX = 60.0
RELEASE_S = 10.0
"""For transfers that are under way when a dummy ends."""
CLOSE_S = 5.0

log = structlog.get_logger(__name__)


class Invitation(msgspec.Struct, frozen=True):
    """What the TCP port says."""

    socket: str


class Neighbourhood(msgspec.Struct, frozen=True):
    """What a relay has to be told: the real client's engine, and who it knows."""

    engine: TransferEngine
    welcome: Welcome
    stores: Callable[[], list[StoreRecord]]
    directories: Callable[[], Mapping[str, str]]
    changed: threading.Event
    """Set whenever one of them is another; nobody else clears it."""

    def now(self) -> Neighbours:
        """Return who is in the pool now."""
        return Neighbours(self.stores(), dict(self.directories()))


class Relay:
    """Serves dummy clients, from `start` to `close`."""

    def __init__(self, around: Neighbourhood, port: int = PORT, host: str = LOOPBACK) -> None:
        """Nothing is bound before `start`; `port` 0 = any.

        Raises:
            ConfigError: `host` is no address of this host alone.
        """
        if not is_loopback(host):
            raise ConfigError(f"the port for dummy clients listens on loopback, not on {host!r}")
        self.port = port
        self.counters = Counters()
        self._host = host
        self._around = around
        self._sessions: dict[str, _Session] = {}
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._dir = ""
        self._doors: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the port is in use.
        """
        tcp = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        self._doors.append(tcp)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind((self._host, self.port))
            tcp.listen(BACKLOG)
        except (OSError, OverflowError) as error:
            tcp.close()
            raise ConfigError(f"port={self.port} for dummy clients: {error}") from error
        self.port = tcp.getsockname()[1]
        self._dir = tempfile.mkdtemp(prefix="mooncake-client-")
        path = str(Path(self._dir) / "relay.sock")
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._doors.append(unix)
        unix.bind(path)
        unix.listen(BACKLOG)
        invitation = msgspec.json.encode(Invitation(path)) + b"\n"
        for name, work in (
            ("relay-port", lambda: self._accept(tcp, lambda caller: self._invite(caller, invitation))),
            ("relay-door", lambda: self._accept(unix, self._let_in)),
            ("relay-news", self._tell_news),
        ):
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Hang up on everybody (idempotent)."""
        self._closing.set()
        self._around.changed.set()  # wakes who waits for news
        for door in self._doors:
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)  # wakes its accept
            door.close()
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.close()
        for thread in self._threads:
            thread.join(CLOSE_S)
        for session in list(self._sessions.values()):
            session.end(self._around.engine)
        if self._dir:
            shutil.rmtree(self._dir, ignore_errors=True)

    @property
    def dummies(self) -> int:
        """How many dummy clients there are."""
        return len(self._sessions)

    # ------------------------------------------------------------ doors

    def _accept(self, door: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        while not self._closing.is_set():
            try:
                caller, _ = door.accept()
            except OSError as error:
                if self._closing.wait(PAUSE_S):  # else: out of descriptors, or the caller has left
                    return
                log.warning("relay.not_accepted", error=str(error))
                continue
            serve(caller)

    @staticmethod
    def _invite(caller: socket.socket, invitation: bytes) -> None:
        with caller, contextlib.suppress(OSError):
            caller.sendall(invitation)  # one small packet into an empty buffer: it never blocks

    def _let_in(self, caller: socket.socket) -> None:
        with self._lock:
            full = len(self._lines) >= CONNECTIONS_MAX
        if full or peer_uid(caller) != os.getuid():
            log.warning("relay.refused", full=full)
            caller.close()
            return
        line = Line(caller)
        with self._lock:
            self._lines.add(line)
        threading.Thread(target=self._serve, args=(line,), name="relay", daemon=True).start()

    # ------------------------------------------------------------ one connection

    def _serve(self, line: Line) -> None:
        try:
            hello, fd = line.receive(Hello, time.monotonic() + SEND_S)
            _drop(fd)
            if hello.follow:
                self._serve_follower(line, hello.session)
            else:
                self._serve_caller(line, hello.session)
        except MooncakeError as error:
            log.debug("relay.hung_up", reason=str(error))
        finally:
            line.close()
            with self._lock:
                self._lines.discard(line)

    def _serve_follower(self, line: Line, name: str) -> None:
        session = _Session(line)
        with self._lock:
            if name in self._sessions:
                raise ProtocolError("this session is followed already")
            session.sending.acquire()  # news wait for the welcome
            self._sessions[name] = session
        try:
            try:
                line.send(self._around.welcome, time.monotonic() + SEND_S)
                line.send(self._around.now(), time.monotonic() + SEND_S)
            finally:
                session.sending.release()
            line.receive(Request)  # nothing comes: this waits for its end
        finally:
            with self._lock:
                self._sessions.pop(name, None)
            session.end(self._around.engine)

    def _serve_caller(self, line: Line, name: str) -> None:
        line.send(Ok(), time.monotonic() + SEND_S)
        while True:
            request, fd = line.receive(Request)
            try:
                session = self._sessions.get(name)
                if session is None:
                    raise PeerGone("no such session")
                answer: Any = self._answer(session, request, fd)
            except MooncakeError as error:
                answer = failure_of(error)
            line.send(answer, time.monotonic() + SEND_S)

    def _answer(self, session: "_Session", request: Any, fd: int | None) -> Any:
        engine = self._around.engine
        if isinstance(request, Share) and fd is not None:
            session.share(engine, request, Segment.attach(fd, "dummy", touch=False))
            return Ok()
        _drop(fd)
        match request:
            case Ask():
                begun_s, left_s = time.perf_counter(), min(request.deadline_s, CALL_S_MAX)
                try:
                    return Told(engine.ask(request.name, request.service, request.body, left_s))
                finally:
                    self.counters.note("RelayAsk", time.perf_counter() - begun_s)
            case Move():
                self._move(session, request)
            case Withdraw():
                session.withdraw(engine, request.address)
            case _:
                raise ProtocolError(f"{type(request).__name__} is no call")
        return Ok()

    def _move(self, session: "_Session", request: Move) -> None:
        if not len(request.local) == len(request.remote) == len(request.sizes):
            raise RequestError("addresses and sizes of different numbers")
        op = Opcode(request.op) if request.op in (Opcode.READ, Opcode.WRITE) else None
        if op is None:
            raise ProtocolError(f"opcode {request.op}")
        local = [session.place(at, size) for at, size in zip(request.local, request.sizes, strict=True)]
        begun_s, left_s = time.perf_counter(), min(request.deadline_s, CALL_S_MAX)
        self._around.engine.transfer(
            op, request.name, local, request.remote, request.sizes, deadline_s=left_s
        )
        kind = BATCH_GET if op is Opcode.READ else BATCH_PUT
        past_s = time.perf_counter() - begun_s
        self.counters.note("RelayMove", past_s, transfer=kind, size_bytes=sum(request.sizes))

    # ------------------------------------------------------------ news

    def _tell_news(self) -> None:
        known = self._around.now()
        changed = self._around.changed
        while not self._closing.is_set():
            changed.wait(LOOK_EVERY_S)
            changed.clear()
            now = self._around.now()
            if now == known:
                continue
            known = now
            for session in list(self._sessions.values()):
                try:
                    session.send(now)
                except MooncakeError as error:
                    log.info("relay.follower_lost", reason=str(error))
                    session.line.close()


class _Session:
    """What one dummy has here."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.sending = threading.Lock()
        self._lock = threading.Lock()
        self._regions: dict[int, tuple[Buffer, int]] = {}  # by the dummy's address
        self._ended = False

    def send(self, message: Any) -> None:
        with self.sending:
            self.line.send(message, time.monotonic() + SEND_S)

    def share(self, engine: TransferEngine, request: Share, segment: Segment) -> None:
        if request.size_bytes != segment.size_bytes:
            segment.close()
            raise ProtocolError(f"{request.size_bytes} bytes announced, {segment.size_bytes} sent")
        with self._lock:
            if self._ended or request.address in self._regions or len(self._regions) >= REGIONS_MAX:
                segment.close()
                raise CapacityError(f"{len(self._regions)} ranges of memory are shared: use fewer")
            self._regions[request.address] = (engine.register(segment), request.size_bytes)

    def withdraw(self, engine: TransferEngine, address: int) -> None:
        with self._lock:
            found = self._regions.pop(address, None)
        if found is None:
            raise RequestError(f"nothing is shared at {address:#x}")
        engine.unregister(found[0], RELEASE_S)

    def place(self, address: int, size_bytes: int) -> int:
        """Return where the dummy's memory lies in this process."""
        for start, (buffer, length) in list(self._regions.items()):
            if start <= address and address + size_bytes <= start + length:
                return buffer.address + address - start
        raise RequestError(f"{address:#x}+{size_bytes} is not shared")

    def end(self, engine: TransferEngine) -> None:
        with self._lock:
            self._ended = True
            regions, self._regions = self._regions, {}
        for buffer, _ in regions.values():
            try:
                engine.unregister(buffer, RELEASE_S)
            except MooncakeError as error:
                log.warning("relay.not_released", reason=str(error))


def _drop(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def new_session() -> str:
    """Return a name that no other dummy has, and that nobody guesses."""
    return secrets.token_hex(16)
