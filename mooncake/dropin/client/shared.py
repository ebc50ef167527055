"""A dummy client's side: shared memory of its own, and an engine that lives in the real client.

`RelayEngine` has the calls of transfer.engine.TransferEngine that the pool's client makes.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import structlog

from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout, ProtocolError, RequestError
from mooncake.core.messages import Ok
from mooncake.dropin.client.line import Ask, Hello, Line, Move, Share, Told, Withdraw
from mooncake.dropin.client.relay import Invitation, new_session
from transfer.memory import check_mapped
from transfer.model import Buffer, Opcode
from transfer.registry import Registry
from transfer.segment import PAGE_BYTES, Segment

CONNECT_S = 5.0
DEADLINE_S = 30.0
IDLE_MAX = 4
"""Connections that are kept for the next calls."""
INVITATION_BYTES_MAX = 4096
SLACK_S = 0.5
"""The real client's own deadline comes first: it knows better why."""

log = structlog.get_logger(__name__)


def find_relay(address: tuple[str, int], end_s: float) -> str:
    """Return the unix socket of the real client that listens at `address`.

    Raises:
        PeerGone, PeerTimeout: nobody does; ProtocolError: something else does.
    """
    data = b""
    try:
        with socket.create_connection(address, max(end_s - time.monotonic(), 1e-3)) as one:
            while not data.endswith(b"\n") and len(data) < INVITATION_BYTES_MAX:
                one.settimeout(max(end_s - time.monotonic(), 1e-3))
                more = one.recv(INVITATION_BYTES_MAX)
                if not more:
                    break
                data += more
    except TimeoutError:
        raise PeerTimeout(f"mooncake_client at {address[0]}:{address[1]} does not answer") from None
    except OSError as error:
        raise PeerGone(f"no mooncake_client at {address[0]}:{address[1]}: {error}: start it") from error
    try:
        return msgspec.json.decode(data, type=Invitation).socket
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"{address[0]}:{address[1]} is no mooncake_client: {error}") from error


class RelayEngine:
    """See the module. Thread-safe. Every call fails at once while there is no real client."""

    name = ""

    def __init__(self) -> None:
        """Know no real client; `lead` says where it is."""
        self._path = ""
        self._session = ""
        self._idle: deque[tuple[str, Line]] = deque()
        self._registry = Registry()  # of memory that is shared
        self._private = Registry()
        self._segments: dict[int, Segment] = {}
        self._shared_in: dict[int, str] = {}  # the session, by address
        self._sharing = threading.Lock()
        self._closed = False

    # ------------------------------------------------------------ the real client

    def lead(self, path: str, end_s: float) -> Line:
        """Use the real client behind `path` from now on; return the connection to follow it by.

        Raises:
            PeerError: it is not there.
        """
        session = new_session()
        follower = Line.open(path, end_s)
        try:
            follower.send(Hello(session, follow=True), end_s)
        except MooncakeError:
            follower.close()
            raise
        self._path, self._session = path, session
        self._drop_idle()
        return follower

    def share_all(self, end_s: float) -> None:
        """Share with the real client what is shared memory here; after its welcome."""
        with self._sharing:
            for address, segment in self._segments.items():
                if self._shared_in.get(address) != self._session:
                    self._share(address, segment, end_s)

    def lost(self) -> None:
        """The real client is gone."""
        self._session = ""
        self._drop_idle()

    @property
    def is_led(self) -> bool:
        """Whether there is a real client."""
        return bool(self._session)

    def close(self) -> None:
        """Hang up (idempotent). Memory stays mapped while this object is there: calls may be under way."""
        self._closed = True
        self.lost()

    def _drop_idle(self) -> None:
        while True:
            try:
                self._idle.popleft()[1].close()
            except IndexError:
                return

    def _call(self, request: object, kind: type, end_s: float, fd: int | None = None) -> object:
        session = self._session
        if not session or self._closed:
            raise PeerGone("mooncake_client is away: it is looked for")
        line = self._take(session, end_s)
        try:
            answer = line.call(request, kind, end_s + SLACK_S, fd)
        except BaseException:
            line.close()  # a late answer would be taken for that of the next call
            raise
        self._give(session, line)
        return answer

    def _take(self, session: str, end_s: float) -> Line:
        while True:
            try:
                known, line = self._idle.pop()
            except IndexError:
                break
            if known == session:
                return line
            line.close()
        line = Line.open(self._path, end_s)
        try:
            line.call(Hello(session, follow=False), Ok, end_s)
        except MooncakeError:
            line.close()
            raise
        return line

    def _give(self, session: str, line: Line) -> None:
        if session != self._session or self._closed or len(self._idle) >= IDLE_MAX:
            line.close()
        else:
            self._idle.append((session, line))

    # ------------------------------------------------------------ memory

    def allocate(self, size_bytes: int, location: str = "cpu:0") -> Buffer:
        """Return fresh shared memory, touched.

        Raises:
            RequestError: no size; ConfigError: the machine has not that much; PeerError: as `ask`.
        """
        if size_bytes <= 0:
            raise RequestError(f"allocate({size_bytes}): a positive number of bytes")
        segment = Segment.create("mooncake-dummy", size_bytes + -size_bytes % PAGE_BYTES)
        address = int(segment.array(0, 1).__array_interface__["data"][0])
        with self._sharing:
            self._share(address, segment, time.monotonic() + CONNECT_S)
            self._segments[address] = segment
        return self._registry.add(address, size_bytes, location, segment)

    def _share(self, address: int, segment: Segment, end_s: float) -> None:
        session = self._session
        self._call(Share(address, segment.size_bytes), Ok, end_s, segment.fd)
        self._shared_in[address] = session

    def register(self, memory: int, size_bytes: int) -> Buffer:
        """Remember memory of this process; bytes of other hosts do not go straight there for it.

        Raises:
            RequestError: it is not mapped, or overlaps what is registered.
        """
        shared = self._registry.find(memory, size_bytes)
        if shared is None:
            check_mapped(memory, size_bytes)
        return self._private.add(memory, size_bytes)

    def unregister(self, buffer: Buffer, deadline_s: float = DEADLINE_S) -> None:
        """End `register`, or free what `allocate` gave; raises RequestError, PeerTimeout."""
        if buffer in list(self._private):
            self._private.hide(buffer)
            self._private.retire(buffer, deadline_s)
            return
        self._registry.hide(buffer)
        self._registry.retire(buffer, deadline_s)
        with self._sharing:
            segment = self._segments.pop(buffer.address, None)
            self._shared_in.pop(buffer.address, None)
        if segment is not None:
            try:
                self._call(Withdraw(buffer.address), Ok, time.monotonic() + deadline_s)
            except MooncakeError as error:
                log.info("mooncake.store: memory not withdrawn", reason=str(error))
            segment.close()

    def buffer_at(self, address: int) -> Buffer | None:
        """Return the shared memory that holds `address`."""
        return self._registry.find(address, 1)

    # ------------------------------------------------------------ other hosts

    def ask(self, name: str, service: str, body: bytes, deadline_s: float = CONNECT_S) -> bytes:
        """As TransferEngine.ask; PeerGone also when the real client is away."""
        end_s = time.monotonic() + deadline_s
        told = self._call(Ask(name, service, body, deadline_s), Told, end_s)
        assert isinstance(told, Told)
        return told.body

    def transfer(
        self,
        op: Opcode,
        name: str,
        local: Sequence[int],
        remote: Sequence[int],
        lengths: Sequence[int],
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """As TransferEngine.transfer, for shared memory of this process."""
        end_s = time.monotonic() + deadline_s
        self._call(Move(op, name, list(local), list(remote), list(lengths), deadline_s), Ok, end_s)

    def forget(self, name: str) -> None:
        """Nothing: the connections are the real client's, which knows itself when to drop them."""
