"""One run: cut the slices, spread them over lanes, watch them land, try the rest elsewhere.

    todo --plan--> pieces per route --lease--> lanes --drive--> landed | refused | torn --fence--> todo

A round ends when every lane is empty or broken. Pieces of a broken lane go back to `todo` once its fence
is up; without a fence a READ may be repeated (our end is destroyed, nothing lands here), a WRITE may not:
it is handed back as failed.
"""

import time
from collections.abc import Sequence

from mooncake.core.errors import MooncakeError, PeerError, PeerGone, PeerTimeout, RequestError
from transfer.model import Call, Failure, Opcode, Peer, Slice
from transfer.rdma.config import (
    ATTEMPTS,
    FENCE_S,
    GIVES_UP_S,
    NAP_S,
    NAP_S_MAX,
    POLL_MAX,
    SPINS,
    STALL_S,
    Meter,
)
from transfer.rdma.lanes import Lane, Lanes, Piece
from transfer.rdma.memory import Registration
from transfer.rdma.paths import Paths
from transfer.rdma.routes import Route, choose
from transfer.slicing import cut, spread
from transfer.verbs.api import Done, Work, WorkStatus

Group = list[list[Route]]


class Clock:
    """The time and how to let it pass; tests have another."""

    def now_s(self) -> float:
        """Return a monotonic time."""
        return time.monotonic()

    def nap(self, nap_s: float) -> None:
        """Give the core away."""
        time.sleep(nap_s)


class Mover:
    """State of one run. Used by one thread."""

    def __init__(
        self,
        peer: Peer,
        op: Opcode,
        slices: Sequence[Slice],
        call: Call,
        registrations: dict[int, Registration],
        lanes: Lanes,
        paths: Paths,
        slice_bytes: int,
        meter: Meter,
        clock: Clock,
    ) -> None:
        """Cut `slices`.

        Args:
            peer: their owner.
            op: direction.
            slices: what to move.
            call: deadline and cancellation.
            registrations: of the local buffers, by number.
            lanes: the pool.
            paths: routes and their health.
            slice_bytes: longest piece, but for a merged rest.
            meter: see Meter.
            clock: of the polling loop.
        """
        self._peer, self._op, self._slices, self._call = peer, op, slices, call
        self._registrations, self._lanes, self._paths = registrations, lanes, paths
        self._meter, self._clock = meter, clock
        self._errors: dict[int, MooncakeError] = {}
        self._refused: set[int] = set()  # numbers of remote buffers
        self._avoid: dict[Route, bool] = {}  # failed in this run -> a fresh lane may still do
        self._active: list[Lane] = []  # leased, and being driven
        self._broken: list[Lane] = []  # our end is destroyed, the owner's not yet
        self._why: MooncakeError = PeerGone(f"{peer.info.name}: no usable rdma path")
        self._groups = self._grouped()
        self._todo = [
            Piece(at, item.local + offset, item.remote + offset, size)
            for at, item in enumerate(slices)
            for offset, size in cut(item.size_bytes, slice_bytes)
        ]

    def run(self) -> list[Failure]:
        """Move all; see Transport.run."""
        try:
            self._rounds()
        except BaseException:  # a bug or an interrupt: still nothing may stay in flight
            self._end(list(self._active))
            raise
        for piece in self._todo:
            self._errors.setdefault(piece.at, self._reason())
        return [Failure(self._slices[at], error) for at, error in sorted(self._errors.items())]

    def _rounds(self) -> None:
        attempts = 0
        while self._todo and attempts < ATTEMPTS and self._call.left_s():
            plan = self._plan()
            if not plan:
                return
            if attempts:
                for route, pieces in plan.items():
                    size_bytes = sum(piece.size_bytes for piece in pieces)
                    self._meter(route.path(self._peer.info.name), "retried", size_bytes, 0.0)
            if self._lease(plan):
                self._drive()
                attempts += self._end_round()
            else:
                attempts += 1

    def _end(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            lane.tear()
        self._lanes.drop([*lanes, *self._broken])

    def _reason(self) -> MooncakeError:
        try:
            self._call.check(f"rdma to {self._peer.info.name}")
        except PeerError as error:
            return error
        return self._why

    # ------------------------------------------------------------ planning

    def _grouped(self) -> list[Group]:
        """Return for every slice its routes; equal ones are the same object."""
        known: dict[tuple[str, tuple[str, ...], str, tuple[str, ...]], Group] = {}
        result = []
        for item in self._slices:
            rails = self._registrations[item.mine.buffer_id].lkeys
            key = (item.mine.location, tuple(rails), item.theirs.location, tuple(item.theirs.rkeys))
            if key not in known:
                known[key] = self._paths.tiers(self._peer, item.mine, rails, item.theirs)
            result.append(known[key])
        return result

    def _plan(self) -> dict[Route, list[Piece]]:
        """Share out what is to do: to the best usable routes of each piece, the least loaded NIC first."""
        by_group: dict[int, list[Piece]] = {}
        for piece in self._todo:
            by_group.setdefault(id(self._groups[piece.at]), []).append(piece)
        self._todo = []
        plan: dict[Route, list[Piece]] = {}
        loads: dict[str, int] = {}
        for pieces in by_group.values():
            group = self._groups[pieces[0].at]
            routes = choose(group, self._may_take) or choose(group, self._may_take_again)
            if not routes:
                self._todo += pieces
                continue
            for route in routes:
                loads.setdefault(route.local, self._lanes.left_bytes(route.local))
            chosen = spread([piece.size_bytes for piece in pieces], [loads[route.local] for route in routes])
            for piece, at in zip(pieces, chosen, strict=True):
                plan.setdefault(routes[at], []).append(piece)
                loads[routes[at].local] += piece.size_bytes
        return plan

    def _may_take(self, route: Route) -> bool:
        return route not in self._avoid and self._paths.admits(route.path(self._peer.info.name))

    def _may_take_again(self, route: Route) -> bool:
        return self._avoid.get(route, False) and self._paths.admits(route.path(self._peer.info.name))

    def _lease(self, plan: dict[Route, list[Piece]]) -> bool:
        """Get a lane for each planned route and load it; what gets none stays to do for the next round.

        Returns:
            Whether there is any.
        """
        for route, pieces in plan.items():
            path = route.path(self._peer.info.name)
            lane = None
            try:
                lane = self._lanes.lease(self._peer, route, self._call, wait=not self._active)
            except PeerError as failure:
                self._why = failure
                self._avoid[route] = False
                if self._call.left_s():  # else it was not the path's fault
                    self._paths.failed(path, fatal=False)
            if lane and not self._paths.usable(path):  # on trial, and somebody else is trying
                self._avoid[route] = False
                self._lanes.give_back(lane)
                lane = None
            if lane is None:
                self._todo += pieces
                continue
            lane.load(pieces, self._clock.now_s())
            self._active.append(lane)
        return bool(self._active)

    # ------------------------------------------------------------ moving

    def _drive(self) -> None:
        """Post and poll until every lane is empty, broken, or out of time."""
        quiet = 0
        while self._active:
            news = False
            in_time = self._call.left_s()
            for lane in list(self._active):
                if in_time:
                    news |= self._step(lane)
                else:
                    self._stop(lane)
            quiet = 0 if news else quiet + 1
            if quiet > SPINS:
                self._clock.nap(min(NAP_S_MAX, NAP_S * (quiet - SPINS)))

    def _step(self, lane: Lane) -> bool:
        """Post, poll, account; return whether anything happened."""
        if lane.doomed:
            self._break(lane, PeerGone(f"{lane.path}: dropped"), blame=False)
            return True
        try:
            lane.feed(self._work)
            done = lane.qp.poll(POLL_MAX)
        except PeerGone as gone:
            self._break(lane, gone)
            return True
        now_s = self._clock.now_s()
        if not done:
            if now_s - lane.moved_s <= STALL_S:
                return False
            self._break(lane, PeerTimeout(f"{lane.path}: no completion for {STALL_S} s"))
            return True
        lane.moved_s = now_s
        bad = [item for item in done if not self._settle(lane, item)]
        if bad:
            refused = bad[0].status is WorkStatus.REFUSED
            error = PeerGone(f"{lane.path}: {bad[0].status.value} {bad[0].detail}")
            self._break(lane, error, blame=not refused)
        elif not lane.queue and not lane.flying:
            self._finish(lane)
        return True

    def _settle(self, lane: Lane, done: Done) -> bool:
        """Account for one completion; return whether it is a success."""
        piece = lane.landed(done)
        match done.status:
            case WorkStatus.DONE:
                lane.proven = True
                lane.moved_bytes += piece.size_bytes
                return True
            case WorkStatus.REFUSED:
                self._refused.add(self._slices[piece.at].theirs.buffer_id)
                self._todo.append(piece)
            case _:
                lane.torn.append(
                    piece
                )  # also if flushed: it may have been sent before, and only the answer lost
        return False

    def _work(self, route: Route, number: int, piece: Piece) -> Work:
        item = self._slices[piece.at]
        lkey = self._registrations[item.mine.buffer_id].lkeys[route.local]
        rkey = item.theirs.rkeys[route.remote]
        return Work(number, self._op, piece.local, lkey, piece.remote, rkey, piece.size_bytes)

    def _finish(self, lane: Lane) -> None:
        self._active.remove(lane)
        self._paths.succeeded(lane.path)
        self._count(lane)
        self._lanes.give_back(lane)

    def _stop(self, lane: Lane) -> None:
        """There is no time left."""
        if lane.flying:
            late = not self._call.cancelled and not lane.moved_bytes
            hung = late and self._clock.now_s() - lane.began_s > GIVES_UP_S
            self._break(lane, PeerTimeout(f"{lane.path}: deadline passed"), blame=hung)
        else:
            self._active.remove(lane)
            self._todo += lane.unload()
            self._count(lane)
            self._lanes.give_back(lane)

    def _break(self, lane: Lane, error: MooncakeError, *, blame: bool = True) -> None:
        """Destroy our end of `lane`; with `blame` its path is at fault, and other idle lanes on it go too."""
        lane.tear()
        self._active.remove(lane)
        self._todo += lane.unload()
        self._broken.append(lane)
        self._count(lane)
        if not blame:
            return
        self._why = error
        self._avoid[lane.route] = lane.proven
        self._meter(lane.path, "failed", sum(piece.size_bytes for piece in lane.torn), 0.0)
        self._paths.failed(lane.path, fatal=not lane.proven)
        key = (lane.epoch, lane.route)
        self._broken += self._lanes.idle(lambda other: (other.epoch, other.route) == key)

    def _count(self, lane: Lane) -> None:
        if lane.moved_bytes:
            self._meter(lane.path, "moved", lane.moved_bytes, self._clock.now_s() - lane.began_s)

    def _end_round(self) -> bool:
        """Fence the broken lanes and decide what becomes of their pieces; return whether a path broke."""
        broken, self._broken = self._broken, []
        if not broken:
            return False
        unfenced = self._lanes.drop(broken)
        for piece in [piece for lane in broken for piece in lane.torn]:
            if unfenced and self._op is Opcode.WRITE:
                why = (
                    f"{self._reason()}; the owner did not confirm within {FENCE_S} s that nothing lands later"
                )
                kind = PeerGone if isinstance(unfenced, PeerGone) else PeerTimeout
                self._errors.setdefault(piece.at, kind(f"{why}: {unfenced}"))
            else:
                self._todo.append(piece)
        for piece in self._todo:
            item = self._slices[piece.at]
            if item.theirs.buffer_id in self._refused:
                # a process that was killed refuses too, for a moment: only one that answers has refused
                where = f"{self._peer.info.name}, buffer {item.theirs.buffer_id} at {piece.remote:#x}"
                gone = unfenced and PeerGone(f"{where}: {unfenced}")
                self._errors.setdefault(
                    piece.at, gone or RequestError(f"{where}: access refused: wrong key, or unregistered")
                )
        self._todo = [piece for piece in self._todo if piece.at not in self._errors]
        return any(lane.route in self._avoid for lane in broken)
