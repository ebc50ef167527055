"""TCP transport, the fallback everywhere: a few connections per peer, bytes straight to registered memory.

A lane is one connection, used by one thread at a time. The thread keeps WINDOW frames under way, so that
the owner always has work, and needs no second thread: only small things wait in the other direction.
"""

import itertools
import ssl
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from mooncake.core.errors import (
    MooncakeError,
    PeerGone,
    ProtocolError,
    RequestError,
)
from mooncake.core.messages import Ok
from transfer.control import Dialer, Remote
from transfer.messages import BufferInfo, Fence
from transfer.model import Buffer, Call, Failure, Opcode, Slice
from transfer.stream import hang_up, recv_into, recv_soon, recv_views, send_now, send_views
from transfer.tcp_wire import ANSWER, DONE, ENTRIES_MAX, MAGIC, REQUEST, decode_answer, encode_request

FRAME_BYTES = 4 << 20
"""Payload of one frame of ours. 256 KiB pages in 4 MiB frames: as fast as any size measured."""
SOON_BYTES = 64 << 10
"""Answers to requests of that size are worth looking for before sleeping."""
WINDOW = 2
"""Frames under way on a lane: one is being answered while the next arrives."""
FENCE_S = 2.0
"""How long a broken lane's owner is asked to confirm that it has stopped writing."""
IDLE_LANES_MAX = 4

Frame = list[Slice]


class Lane:
    """One data connection."""

    def __init__(self, sock: Any, link: int, what: str) -> None:
        """Greeted; `what` names the peer in messages."""
        self.sock = sock
        self.link = link
        self.what = what
        self.uncertain = False  # a WRITE is under way: the owner may hold bytes that it has not written yet
        self._plain = not isinstance(sock, ssl.SSLSocket)
        self._answer = memoryview(bytearray(ANSWER.size))

    def run(
        self, op: Opcode, slices: Sequence[Slice], call: Call
    ) -> tuple[list[Failure], MooncakeError | None]:
        """Move `slices`; return the failures, and the error that broke the lane, if one did."""
        if len(slices) == 1 and slices[0].size_bytes <= FRAME_BYTES and self._plain:
            return self._run_one(op, slices[0], call)
        failures: list[Failure] = []
        pending: deque[Frame] = deque()
        frames = frames_of(slices)

        def check() -> None:
            call.check(self.what)

        call.add_waker(self._wake)
        try:
            for frame in frames:
                pending.append(frame)
                self._send(op, frame, check)
                if len(pending) >= WINDOW:
                    failures += self._receive(op, pending[0], check)
                    pending.popleft()
            while pending:
                failures += self._receive(op, pending[0], check)
                pending.popleft()
        except MooncakeError as broken:
            error = self._explain(op, call, broken)
            unfinished = itertools.chain.from_iterable(itertools.chain(pending, frames))
            failures += [Failure(piece, error) for piece in unfinished]
            return failures, error
        finally:
            call.remove_waker(self._wake)
        return failures, None

    def _run_one(self, op: Opcode, piece: Slice, call: Call) -> tuple[list[Failure], MooncakeError | None]:
        """Do the same for one slice that fits a frame, with half the work."""

        def check() -> None:
            call.check(self.what)

        size = piece.size_bytes
        head = REQUEST.pack(MAGIC, op, 0, 1, 1, size, piece.theirs.key, piece.remote, size)
        call.add_waker(self._wake)
        try:
            if op is Opcode.READ:
                send_now(self.sock, (head,), REQUEST.size, check)
            else:
                send_now(self.sock, (head, piece.mine.part(piece.local, size)), REQUEST.size + size, check)
            return self._receive(op, [piece], check, soon=size <= SOON_BYTES), None
        except MooncakeError as broken:
            error = self._explain(op, call, broken)
            return [Failure(piece, error)], error
        finally:
            call.remove_waker(self._wake)

    def _explain(self, op: Opcode, call: Call, broken: MooncakeError) -> MooncakeError:
        """Note what the broken lane leaves behind; return what to tell the caller."""
        self.uncertain = op is Opcode.WRITE
        # the waker hung up: say so instead of "closed by the peer"
        return PeerGone(f"{self.what}: cancelled") if call.cancelled else broken

    def _wake(self) -> None:
        hang_up(self.sock)

    def _send(self, op: Opcode, frame: Frame, check: Any) -> None:
        head = encode_request(op, [(piece.theirs.key, piece.remote, piece.size_bytes) for piece in frame])
        if op is Opcode.READ:
            send_views(self.sock, [head], check)
        else:
            send_views(
                self.sock, [head, *(piece.mine.part(piece.local, piece.size_bytes) for piece in frame)], check
            )

    def _receive(self, op: Opcode, frame: Frame, check: Any, *, soon: bool = False) -> list[Failure]:
        (recv_soon if soon else recv_into)(self.sock, self._answer, check)
        all_done, payload = decode_answer(bytes(self._answer), len(frame))
        done, failures = frame, []
        if not all_done:
            statuses = bytearray(len(frame))
            recv_into(self.sock, memoryview(statuses), check)
            done = [piece for piece, status in zip(frame, statuses, strict=True) if status == DONE]
            failures = [
                Failure(piece, RequestError(f"{self.what} refused {piece.remote:#x}+{piece.size_bytes}"))
                for piece, status in zip(frame, statuses, strict=True)
                if status != DONE
            ]
        if payload != (sum(piece.size_bytes for piece in done) if op is Opcode.READ else 0):
            raise ProtocolError(f"{self.what} answers with {payload} bytes")
        if op is Opcode.READ:
            recv_views(self.sock, [piece.mine.part(piece.local, piece.size_bytes) for piece in done], check)
        return failures

    def close(self) -> None:
        """End the connection."""
        hang_up(self.sock)
        self.sock.close()


def frames_of(slices: Sequence[Slice]) -> Iterator[Frame]:
    """Yield `slices`, in order, in frames of at most FRAME_BYTES; longer ones are cut."""
    frame: Frame = []
    room = FRAME_BYTES
    for piece in slices:
        start = 0
        while start < piece.size_bytes:
            if room == 0 or len(frame) == ENTRIES_MAX:
                yield frame
                frame, room = [], FRAME_BYTES
            size = min(piece.size_bytes - start, room)
            frame.append(piece if size == piece.size_bytes else piece.part(start, size))
            start, room = start + size, room - size
    if frame:
        yield frame


class Lanes:
    """The connections to one peer; at most `limit`, each given to one caller at a time."""

    def __init__(self, peer: Remote, dialer: Dialer, limit: int, links: Iterator[int]) -> None:
        """Connections are made when they are wanted."""
        self._peer = peer
        self._epoch = peer.info.epoch
        self._dialer = dialer
        self._limit = limit
        self._links = links
        self._changed = threading.Condition()
        self._idle: list[Lane] = []
        self._made = 0
        self._closed = False

    def lease(self, call: Call) -> Lane:
        """Return an idle or new lane; give it back or discard it.

        Raises:
            PeerError: no lane in time, or the peer does not take connections.
        """
        with self._changed:
            while not self._idle and self._made >= self._limit:
                if not self._changed.wait(min(0.25, call.left_s() or 0.001)):
                    call.check(f"{self._peer.name}: all {self._limit} connections are busy")
            if self._closed:
                raise PeerGone(f"{self._peer.name}: closed")
            if self._idle:
                return self._idle.pop()
            self._made += 1
        try:
            link = next(self._links)
            left_s = call.left_s()
            if not left_s:
                call.check(self._peer.name)
            sock = self._dialer.dial(self._peer.address, "data", left_s, link, self._epoch)
        except BaseException:
            self._drop()
            raise
        return Lane(sock, link, self._peer.name)

    def give_back(self, lane: Lane) -> None:
        """Return a lane that works."""
        with self._changed:
            if not self._closed:
                self._idle.append(lane)
                self._changed.notify()
                return
        lane.close()

    def discard(self, lane: Lane) -> None:
        """Close a broken lane; after a WRITE, have the owner confirm that it has stopped.

        Raises:
            PeerError: the owner did not confirm within FENCE_S.
        """
        lane.close()
        self._drop()
        if lane.uncertain:
            self._peer.ask(Fence(lane.link), Ok, FENCE_S)

    def _drop(self) -> None:
        with self._changed:
            self._made -= 1
            self._changed.notify()

    def close(self) -> None:
        """Close the idle lanes and refuse new leases."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for lane in idle:
            lane.close()


class TcpTransport:
    """model.Transport over data connections."""

    name = "tcp"
    judges_itself = False

    def __init__(self, dialer: Dialer, connections: int = 4) -> None:
        """`connections` per peer."""
        self._dialer = dialer
        self._connections = connections
        self._links = itertools.count(1)
        self._lock = threading.Lock()
        self._lanes: dict[tuple[str, str], Lanes] = {}

    def register(self, buffer: Buffer) -> None:
        """Nothing to do: the owner's side looks buffers up."""

    def unregister(self, buffer: Buffer, deadline_s: float) -> None:
        """Nothing to do: the owner's side counts its uses in the registry."""

    def describe(self, info: dict[str, Any]) -> None:
        """Nothing to add: every engine listens."""

    def reaches(self, _peer: Any, mine: Buffer, theirs: BufferInfo) -> bool:
        """Host memory with a key we know."""
        return mine.view is not None and bool(theirs.key)

    def lanes(self, _peer: Any) -> int:
        """Return the number of connections."""
        return self._connections

    def run(self, peer: Any, op: Opcode, slices: Sequence[Slice], call: Call) -> list[Failure]:
        """See model.Transport."""
        lanes = self._lanes_of(peer)
        try:
            lane = lanes.lease(call)
        except MooncakeError as error:
            return [Failure(piece, error) for piece in slices]
        failures, broken = lane.run(op, slices, call)
        if broken is None:
            lanes.give_back(lane)
            return failures
        try:
            lanes.discard(lane)
        except MooncakeError as unconfirmed:
            # the owner is away: it finds the connection closed when it wakes, and drops what it holds then
            doubt = type(broken)(
                f"{broken}; the owner did not confirm that it stopped writing: {unconfirmed}"
            )
            return [Failure(f.slice, doubt) if f.error is broken else f for f in failures]
        return failures

    def _lanes_of(self, peer: Any) -> Lanes:
        key = (peer.name, peer.info.epoch)
        with self._lock:
            lanes = self._lanes.get(key)
            if lanes is None:
                lanes = self._lanes[key] = Lanes(peer, self._dialer, self._connections, self._links)
            return lanes

    def forget(self, peer: Any) -> None:
        """See model.Transport."""
        with self._lock:
            gone = [self._lanes.pop(key) for key in list(self._lanes) if key[0] == peer.name]
        for lanes in gone:
            lanes.close()

    def close(self) -> None:
        """See model.Transport."""
        with self._lock:
            every, self._lanes = list(self._lanes.values()), {}
        for lanes in every:
            lanes.close()
