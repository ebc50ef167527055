"""Queue pairs of the initiator: made on demand, pooled, bounded.

A *lane* is one connected queue pair to one start of one peer over one route. A run leases it, uses it alone,
and gives it back idle, or drops it after an error. Dropping is the fence: our end is destroyed first, then
the owner is asked to destroy its end; when it has answered, nothing that was posted can land any more.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from mooncake.core.errors import CapacityError, MooncakeError, PeerError, PeerGone
from mooncake.core.messages import Ok
from transfer.messages import RdmaConnect, RdmaConnected, RdmaDisconnect
from transfer.model import Call, Peer
from transfer.rdma.config import BURST, CONNECT_S, FENCE_S, WINDOW_BYTES, Meter
from transfer.rdma.routes import Route
from transfer.sieve import Sieve
from transfer.verbs.api import Done, Nic, QueuePair, Work

log = structlog.get_logger(__name__)


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Part of slice number `at` of a run."""

    at: int
    local: int
    remote: int
    size_bytes: int


class Lane:
    """One queue pair, and an exact count of what is in flight on it: the library's queues are not trusted."""

    def __init__(self, link: int, peer: Peer, route: Route, qp: QueuePair, depth: int) -> None:
        """Made by Lanes.lease."""
        self.link = link
        self.peer = peer
        self.epoch = peer.info.epoch
        self.route = route
        self.path = route.path(peer.info.name)
        self.qp = qp
        self.proven = False
        """Has carried something. One that has and then fails may merely have been evicted by the owner."""
        self.doomed = False
        """Set by others: whoever uses it must drop it."""
        self.queue: deque[Piece] = deque()
        self.flying: dict[int, Piece] = {}
        self.torn: list[Piece] = []
        """Posted, and nobody knows what became of it: may land until the lane is dropped."""
        self.left_bytes = 0
        """Queued or in flight: the lane's share of its NIC's load."""
        self.began_s = self.moved_s = 0.0
        self.moved_bytes = 0
        self._flying_bytes = 0
        self._depth = depth
        self._numbers = itertools.count()

    def load(self, pieces: Sequence[Piece], now_s: float) -> None:
        """Begin a round with `pieces`."""
        self.queue.extend(pieces)
        self.left_bytes = sum(piece.size_bytes for piece in pieces)
        self.moved_bytes = 0
        self.began_s = self.moved_s = now_s

    def feed(self, work_of: Callable[[Route, int, Piece], Work]) -> None:
        """Post what the window allows, at most one burst.

        Raises:
            PeerGone: the queue pair is unusable; what was to be posted counts as in flight.
        """
        works: list[Work] = []
        while self.queue and len(works) < BURST and len(self.flying) < self._depth:
            if self.flying and self._flying_bytes + self.queue[0].size_bytes > WINDOW_BYTES:
                break
            piece = self.queue.popleft()
            number = next(self._numbers)
            self.flying[number] = piece
            self._flying_bytes += piece.size_bytes
            works.append(work_of(self.route, number, piece))
        if works:
            self.qp.post(works)

    def landed(self, done: Done) -> Piece:
        """Account for a completion and return its piece."""
        piece = self.flying.pop(done.work_id)
        self._flying_bytes -= piece.size_bytes
        self.left_bytes -= piece.size_bytes
        return piece

    def tear(self) -> None:
        """Destroy our end: what was in flight is torn now, what was not yet posted stays queued."""
        self.qp.close()
        self.torn += self.flying.values()
        self.flying.clear()

    def unload(self) -> list[Piece]:
        """Return what was not posted, and forget it."""
        left = list(self.queue)
        self.queue.clear()
        self.left_bytes = 0
        return left


class Lanes:
    """The pool. SIEVE chooses among idle lanes which one to give up when it is full."""

    def __init__(self, nics: dict[str, Nic], lanes_max: int, depth_max: int, meter: Meter) -> None:
        """Begin empty.

        Args:
            nics: by rail name.
            lanes_max: leased, idle and being made.
            depth_max: works in flight on one.
            meter: see Meter.
        """
        self._nics = nics
        self._max = lanes_max
        self._depth_max = depth_max
        self._meter = meter
        self._links = itertools.count(1)
        self._changed = threading.Condition()
        self._sieve: Sieve[int] = Sieve()
        self._lanes: dict[int, Lane] = {}
        self._idle: dict[tuple[str, Route], list[Lane]] = {}
        self._making = 0
        self._closed = False

    def __len__(self) -> int:
        """Return how many queue pairs there are."""
        return len(self._lanes)

    def left_bytes(self, rail: str) -> int:
        """Return what is queued or in flight on one of our NICs."""
        with self._changed:
            return sum(lane.left_bytes for lane in self._lanes.values() if lane.route.local == rail)

    def lease(self, peer: Peer, route: Route, call: Call, *, wait: bool) -> Lane | None:
        """Return a lane for the caller alone: an idle one, else a new one in a free or evicted place.

        Args:
            peer: whom to reach.
            route: by which NICs.
            call: bounds the wait and the connecting.
            wait: if all places are taken by leased lanes, wait for one; otherwise None is returned.
                Only a caller that holds no lane may wait, or two could wait for each other.

        Raises:
            PeerError: cannot be connected now (also: no time left).
        """
        victim = None
        with self._changed:
            while True:
                if self._closed:
                    raise PeerGone("the rdma transport is closed")
                if lane := self._take(peer, route):
                    return lane
                if len(self._lanes) + self._making < self._max:
                    break
                evicted = self._sieve.evict(self._is_idle)
                if evicted is not None:
                    victim = self._lanes[evicted]
                    self._remove(victim)
                    break
                if not wait:
                    return None
                self._wait(call)
            self._making += 1
        made = None
        try:
            if victim:
                self._meter(victim.path, "evicted", 0, 0.0)
                self.drop([victim])
            made = self._connect(peer, route, call)
        finally:
            with self._changed:
                self._making -= 1
                if made:
                    made.doomed = self._closed
                    self._lanes[made.link] = made
                    self._sieve.add(made.link)
                self._changed.notify_all()
        return made

    def give_back(self, lane: Lane) -> None:
        """End a lease; the lane has nothing queued or in flight."""
        assert not lane.queue
        assert not lane.flying
        with self._changed:
            if not lane.doomed:
                self._idle.setdefault((lane.epoch, lane.route), []).append(lane)
                self._changed.notify_all()
        if lane.doomed:
            self.drop([lane])

    def idle(self, matches: Callable[[Lane], bool]) -> list[Lane]:
        """Take the idle lanes that match out of the pool; the caller drops them."""
        with self._changed:
            found = [lane for lanes in self._idle.values() for lane in lanes if matches(lane)]
            for lane in found:
                self._remove(lane)
        return found

    def drop(self, lanes: Sequence[Lane]) -> MooncakeError | None:
        """Destroy `lanes`, all to one peer, at both ends.

        Returns:
            None if it is a fence: the owner has destroyed its ends. Otherwise why that is not known.
        """
        if not lanes:
            return None
        self._destroy(lanes)
        return _tell(lanes[0].peer, [lane.link for lane in lanes])

    def forget(self, epoch: str) -> None:
        """Drop the idle lanes to one start of a peer; those in use are dropped by their runs, at once."""
        with self._changed:
            for lane in self._lanes.values():
                lane.doomed |= lane.epoch == epoch
        self.drop(self.idle(lambda lane: lane.epoch == epoch))

    def close(self, deadline_s: float) -> bool:
        """Destroy our ends and wait for the runs to drop theirs; return whether all have.

        The owners' ends of idle lanes go with the control connections, which are closed next.
        """
        with self._changed:
            self._closed = True
            for lane in self._lanes.values():
                lane.doomed = True
            self._changed.notify_all()
        self._destroy(self.idle(lambda _: True))
        with self._changed:
            return self._changed.wait_for(lambda: not self._lanes and not self._making, deadline_s)

    def _destroy(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            lane.qp.close()
        with self._changed:
            for lane in lanes:
                self._remove(lane)
            self._changed.notify_all()

    def _take(self, peer: Peer, route: Route) -> Lane | None:
        key = (peer.info.epoch, route)
        lanes = self._idle.get(key)
        if not lanes:
            return None
        lane = lanes.pop()
        if not lanes:
            del self._idle[key]
        self._sieve.touch(lane.link)
        return lane

    def _remove(self, lane: Lane) -> None:
        """Forget `lane` wherever it is (idempotent)."""
        self._sieve.remove(lane.link)
        self._lanes.pop(lane.link, None)
        key = (lane.epoch, lane.route)
        lanes = [other for other in self._idle.get(key, []) if other is not lane]
        if lanes:
            self._idle[key] = lanes
        else:
            self._idle.pop(key, None)

    def _is_idle(self, link: int) -> bool:
        lane = self._lanes[link]
        return lane in self._idle.get((lane.epoch, lane.route), [])

    def _wait(self, call: Call) -> None:
        """Wait for a change of the pool.

        Raises:
            PeerError: `call` has no time left.
        """
        call.check("waiting for an rdma endpoint")

        def wake() -> None:
            with self._changed:
                self._changed.notify_all()

        call.add_waker(wake)
        try:
            self._changed.wait(call.left_s())
        finally:
            call.remove_waker(wake)
        call.check("waiting for an rdma endpoint")

    def _connect(self, peer: Peer, route: Route, call: Call) -> Lane:
        began_s = time.monotonic()
        nic = self._nics[route.local]
        call.check(f"connecting {route.path(peer.info.name)}")
        if not nic.is_up():
            raise PeerGone(f"{route.local}: the port is down")
        link = next(self._links)
        depth = min(self._depth_max, nic.depth)
        try:
            lane = Lane(link, peer, route, nic.queue_pair(), depth)
        except CapacityError as error:
            raise PeerGone(f"{route.local}: {error}") from error
        owner_has_it = False
        try:
            request = RdmaConnect(link=link, nic=route.remote, qp=lane.qp.local())
            answer = peer.ask(request, RdmaConnected, min(CONNECT_S, call.left_s()))
            owner_has_it = True
            lane.qp.connect(answer.qp)
        except MooncakeError as error:
            lane.qp.close()
            if owner_has_it:
                _tell(peer, [link])
            if isinstance(error, PeerError):
                raise
            raise PeerGone(f"{lane.path}: {error}") from error
        self._meter(lane.path, "connected", 0, time.monotonic() - began_s)
        return lane


def _tell(peer: Peer, links: list[int]) -> MooncakeError | None:
    """Have the owner destroy its ends of `links`; return why that is not known to have happened."""
    try:
        answer: Any = peer.ask(RdmaDisconnect(links=links), Ok, FENCE_S)
    except MooncakeError as error:
        log.info("rdma.not_fenced", peer=peer.info.name, links=links, error=str(error), bound_s=FENCE_S)
        return error
    assert isinstance(answer, Ok)
    return None
