"""The owner's side of data connections: every access is checked, then bytes go straight to the buffer."""

import socket
import ssl
import threading
import time

from mooncake.core.errors import PeerTimeout, RequestError
from mooncake.core.messages import Ok
from transfer.control import Listener, Session
from transfer.messages import Fence
from transfer.model import Buffer, Call, Opcode
from transfer.registry import Registry
from transfer.staged import Devices
from transfer.stream import (
    SPIN_S,
    Check,
    Stall,
    hang_up,
    recv_into,
    recv_soon,
    recv_views,
    send_now,
    send_views,
    tune,
)
from transfer.tcp_wire import (
    ALL_DONE,
    ANSWER,
    DONE,
    FRAME_BYTES_MAX,
    MAGIC,
    REFUSED,
    REQUEST,
    Entry,
    decode_head,
    decode_table,
    encode_answer,
    table_bytes,
)

STALL_S = 10.0
"""An initiator that stops in the middle of a frame for this long loses its connection."""
DRAIN_BYTES = 256 << 10
ONE_WRITTEN = ANSWER.pack(MAGIC, ALL_DONE, 0, 0, 1, 0)
FENCE_S = 5.0
"""A serving thread that was hung up on ends within a tick; more means a stopped machine."""


class DataServer:
    """Serves READ and WRITE frames on the registered buffers."""

    def __init__(self, registry: Registry, devices: Devices) -> None:
        """`registry` decides what a key opens; `devices` move device memory."""
        self._registry = registry
        self._devices = devices
        self._lock = threading.Lock()
        self._links: dict[tuple[str, int], Session] = {}

    def serve(self, listener: Listener, session: Session) -> None:
        """Serve one connection to its end.

        Raises:
            PeerError: the end.
        """
        key = (session.epoch, session.link)
        with self._lock:
            if key in self._links:
                raise RequestError(f"link {session.link} of {session.name} is open already")
            self._links[key] = session
        session.on_close(lambda: self._forget(key))
        tune(session.sock, buffers=True)
        listener.welcome(session)  # from here on the link can be fenced
        head = memoryview(bytearray(REQUEST.size))
        stall = Stall(f"{session.name}: half a request", STALL_S)
        plain = not isinstance(session.sock, ssl.SSLSocket)
        receive = recv_into
        while True:
            answered_s = time.perf_counter()
            receive(session.sock, head, _idle)
            # small requests in quick succession: the next one is worth looking for before sleeping
            soon = plain and time.perf_counter() - answered_s < SPIN_S
            receive = recv_soon if soon else recv_into
            stall.begin()
            if not (plain and self._serve_one(session.sock, head, stall)):
                self._serve_frame(session, head, stall)

    def fence(self, session: Session, message: Fence) -> Ok:
        """End one data connection of this initiator; see messages.Fence.

        Raises:
            PeerTimeout: it still might write.
        """
        with self._lock:
            doomed = self._links.get((session.epoch, message.link))
        if doomed:
            hang_up(doomed.sock)
            if not doomed.ended.wait(FENCE_S):
                raise PeerTimeout(f"link {message.link} has not ended within {FENCE_S:g} s")
        return Ok()

    def hang_up_all(self) -> None:
        """End every data connection: whoever holds a buffer in use lets go."""
        with self._lock:
            sessions = list(self._links.values())
        for session in sessions:
            hang_up(session.sock)

    def _forget(self, key: tuple[str, int]) -> None:
        with self._lock:
            self._links.pop(key, None)

    def _serve_one(self, sock: socket.socket, head: memoryview, check: Check) -> bool:
        """Serve the usual request, one entry that may be touched, in half the time; False = it is another."""
        magic, op, zero, keys, count, payload, key, address, size = REQUEST.unpack(head)
        buffer = self._registry.by_key(key)
        if (
            (magic, zero, keys, count, payload) != (MAGIC, 0, 1, 1, size)
            or op > Opcode.WRITE
            or size > FRAME_BYTES_MAX
            or buffer is None
            or buffer.view is None
            or address < buffer.address
            or address + size > buffer.end
        ):
            return False
        try:
            self._registry.take(buffer)
        except RequestError:
            return False
        try:
            view = buffer.part(address, size)
            if op == Opcode.READ:
                send_now(sock, (ANSWER.pack(MAGIC, ALL_DONE, 0, 0, 1, size), view), ANSWER.size + size, check)
            else:
                recv_into(sock, view, check)
        finally:
            self._registry.give(buffer)
        if op == Opcode.WRITE:
            send_now(sock, (ONE_WRITTEN,), ANSWER.size, check)
        return True

    def _serve_frame(self, session: Session, head: memoryview, check: Check) -> None:
        op, keys, count, payload, first = decode_head(bytes(head))
        entries = [first]
        if count > 1:
            table = bytearray(table_bytes(keys, count))
            recv_into(session.sock, memoryview(table), check)
            entries = decode_table(table, keys, payload)
        opened = [self._open(entry) for entry in entries]
        distinct = list({id(buffer): buffer for buffer in opened if buffer}.values())
        try:
            self._registry.take(*distinct)
        except RequestError:  # one of them is going: say no to all, the initiator asks again or gives up
            opened, distinct = [None] * len(entries), []
        try:
            answer = self._move(session, op, entries, opened, check)
        finally:
            self._registry.give(*distinct)
        if op is Opcode.WRITE:
            send_views(session.sock, answer, check)

    def _move(
        self, session: Session, op: Opcode, entries: list[Entry], opened: list[Buffer | None], check: Check
    ) -> list[bytes]:
        """Move the payload; return what is left to send."""
        statuses = bytes(DONE if buffer else REFUSED for buffer in opened)
        pairs = list(zip(entries, opened, strict=True))
        plain = all(buffer is None or buffer.view is not None for buffer in opened)
        if op is Opcode.READ:
            answer = encode_answer(statuses, sum(entry[2] for entry, buffer in pairs if buffer))
            if plain:
                views = [buffer.part(entry[1], entry[2]) for entry, buffer in pairs if buffer]
                send_views(session.sock, [answer, *views], check)
                return []
            send_views(session.sock, [answer], check)
        if op is Opcode.WRITE and plain and all(opened):
            recv_views(session.sock, [b.part(e[1], e[2]) for e, b in pairs if b], check)
        else:
            for entry, buffer in pairs:
                self._move_one(session, op, entry, buffer, check)
        return [] if op is Opcode.READ else [encode_answer(statuses, 0)]

    def _move_one(
        self, session: Session, op: Opcode, entry: Entry, buffer: Buffer | None, check: Check
    ) -> None:
        """Move one entry that needs more than a plain send or receive."""
        _, address, size = entry

        def send(view: memoryview, _offset: int = 0) -> None:
            send_views(session.sock, [view], check)

        def receive(view: memoryview, _offset: int = 0) -> None:
            recv_into(session.sock, view, check)

        if buffer is None:
            if op is Opcode.WRITE:
                _drain(session, size, check)
        elif buffer.view is not None:
            (send if op is Opcode.READ else receive)(buffer.part(address, size))
        else:
            stager = self._devices.stager()
            if stager is None:
                raise RequestError(f"{buffer.location}: no driver here")
            if op is Opcode.READ:
                stager.stage_out(address, size, send, Call(STALL_S))
            else:
                stager.stage_in(address, size, receive, Call(STALL_S))

    def _open(self, entry: Entry) -> Buffer | None:
        """Return the buffer that the entry may touch."""
        key, address, size = entry
        buffer = self._registry.by_key(key)
        if buffer is None or address < buffer.address or address + size > buffer.end:
            return None
        return buffer if buffer.view is not None or self._devices.stager() else None


def _drain(session: Session, size_bytes: int, check: Check) -> None:
    scratch = memoryview(bytearray(min(size_bytes, DRAIN_BYTES)))
    while size_bytes:
        part = scratch[: min(size_bytes, len(scratch))]
        recv_into(session.sock, part, check)
        size_bytes -= len(part)


def _idle() -> None:
    """Between frames an initiator may be silent as long as it likes."""
