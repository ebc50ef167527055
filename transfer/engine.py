"""The transfer engine: register memory, move bytes between it and other engines' memory.

One object per process. `submit` cuts a batch into parts, gives each to the best transport that reaches
both buffers, and moves what failed on a broken link to the next one. Transports block; every peer has
threads of its own, so a stopped peer delays nobody else (DESIGN 7).
"""

import time
from collections.abc import Iterable, Sequence
from typing import Self

from mooncake.core.errors import (
    CapacityError,
    MooncakeError,
    RequestError,
)
from mooncake.core.messages import Ok
from transfer.batch import Batch, divide
from transfer.config import EngineConfig
from transfer.device import DeviceMemory
from transfer.dispatch import Dispatcher
from transfer.health import PathState
from transfer.messages import Ask, BufferInfo, Notify, Ping, Told
from transfer.metrics import TransferCollector
from transfer.model import Buffer, Call, Opcode, Slice
from transfer.owner import Owner
from transfer.peers import PeerTable, RemotePeer, Route
from transfer.shm import PIECE_BYTES, copy_one
from transfer.verbs.api import Verbs

NOTE_BYTES_MAX = 1 << 20
BATCHES_MAX = 16_384
"""Under way at once; upstream's vLLM connector has some hundreds."""
PART_BYTES = 1 << 20
"""Less is not worth a second thread: handing it over costs 50 us, moving it over TCP 300."""
CONNECT_S = 5.0
DEADLINE_S = 30.0


class TransferEngine(Owner):
    """See the module. Every method may be called from any thread; `close` it, or use it as a context."""

    def __init__(
        self,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
        verbs: Verbs | None = None,
        device: DeviceMemory | None = None,
    ) -> None:
        """See Owner."""
        super().__init__(config, verbs, device)
        self._in_flight: set[Batch] = set()
        self._in_flight_bytes = 0
        self._calls: set[Call] = set()

    def start(self) -> Self:
        """See Owner."""
        super().start()
        self._peers = PeerTable(self._dialer)
        self._dispatcher = Dispatcher(self._transports, self.metrics)
        return self

    def _end_transfers(self) -> None:
        with self._lock:
            under_way = list(self._in_flight)
        for call in list(self._calls):
            call.cancel()
        for batch in under_way:
            batch.cancel()
        for batch in under_way:
            batch.wait()

    def _hang_up(self) -> None:
        for peer in self._peers.take_all():
            peer.close()

    def collector(self) -> TransferCollector:
        """Return mooncake_transfer_* of this engine, for a Prometheus registry."""
        rdma = self._rdma

        def states() -> dict[str, PathState]:
            return self._dispatcher.states() | (rdma.states() if rdma else {})

        return TransferCollector(self.metrics, states)

    # ------------------------------------------------------------ peers

    def peer(self, name: str, deadline_s: float = CONNECT_S) -> RemotePeer:
        """Return the engine called `name` ("host:port"), connected and described.

        Raises:
            PeerTimeout, PeerGone: nobody there; ConfigError: a bad name or another secret;
            ProtocolError: something else listens there.
        """
        self._check_open()
        known = self._peers.get(name)
        if known:
            return known
        peer, old = self._peers.open(name, deadline_s)
        if old:
            self._drop(old)
        return peer

    def forget(self, name: str) -> None:
        """Close every connection to `name`; the next transfer opens it anew."""
        peer = self._peers.get(name)
        if peer:
            self._drop(peer)
            peer.stale = True

    def _drop(self, peer: RemotePeer) -> None:
        for transport in self._transports.values():
            transport.forget(peer)
        peer.hang_up()

    def probe(self, name: str, deadline_s: float = CONNECT_S) -> float:
        """Return the seconds that `name` took to answer; raises as `peer`."""
        peer = self.peer(name, deadline_s)
        start_s = time.monotonic()
        peer.ask(Ping(), Ok, deadline_s)
        return time.monotonic() - start_s

    def notify(self, name: str, title: str, text: str, deadline_s: float = CONNECT_S) -> None:
        """Put (title, text) into the notifications of `name`.

        Raises:
            CapacityError: it does not fetch them; RequestError: too long; as `peer`.
        """
        if len(title) + len(text) > NOTE_BYTES_MAX:
            raise RequestError(f"a notification of over {NOTE_BYTES_MAX} characters")
        self.peer(name, deadline_s).ask(Notify(title, text), Ok, deadline_s)

    def ask(self, name: str, service: str, body: bytes, deadline_s: float = CONNECT_S) -> bytes:
        """Return what the application behind `service` at `name` answers to `body`.

        Raises:
            RequestError: nobody serves it there; whatever the application raises; as `peer`.
        """
        told: Told = self.peer(name, deadline_s).ask(Ask(service, body), Told, deadline_s)
        return told.body

    # ------------------------------------------------------------ transfers

    def submit(
        self,
        op: Opcode,
        name: str,
        local: Sequence[int],
        remote: Sequence[int],
        lengths: Sequence[int],
        *,
        deadline_s: float = DEADLINE_S,
        transport: str = "",
    ) -> Batch:
        """Begin to move `lengths[i]` bytes between `local[i]` here and `remote[i]` in `name`, for every i.

        Args:
            op: READ = remote to local, WRITE = local to remote.
            name: the peer.
            local: addresses inside registered buffers, each range within one.
            remote: addresses in the peer's address space, each range within one of its buffers.
            lengths: bytes.
            deadline_s: for the whole batch.
            transport: take this one where it reaches, "" = the best.

        Raises:
            RequestError: a range is not registered (nothing is moved then); CapacityError: too much
            is under way; as `peer`.
        """
        batch, peer, parts = self._prepare(op, name, local, remote, lengths, deadline_s, transport)
        for chosen, part in parts:
            peer.threads.submit(self._dispatcher.run_part, batch, peer, part, chosen)
        return batch

    def transfer(
        self,
        op: Opcode,
        name: str,
        local: int | Sequence[int],
        remote: int | Sequence[int],
        lengths: int | Sequence[int],
        *,
        deadline_s: float = DEADLINE_S,
        transport: str = "",
    ) -> None:
        """Do the same and wait; single numbers are fine.

        Raises:
            As `submit`; the first transfer's error; PeerTimeout: the deadline passed.
        """
        here, there, sizes = _column(local), _column(remote), _column(lengths)
        if len(here) == len(there) == len(sizes) == 1:
            start_s = time.monotonic()
            if self._transfer_one(op, name, here[0], there[0], sizes[0], deadline_s, transport):
                return
            deadline_s -= time.monotonic() - start_s
        batch, peer, parts = self._prepare(op, name, here, there, sizes, deadline_s, transport)
        for chosen, part in parts[1:]:
            peer.threads.submit(self._dispatcher.run_part, batch, peer, part, chosen)
        if parts:  # one part in this thread: a hand-over costs more than a small transfer
            self._dispatcher.run_part(batch, peer, parts[0][1], parts[0][0])
        if not batch.wait():
            batch.cancel()
        batch.check()

    def _transfer_one(
        self, op: Opcode, name: str, local: int, remote: int, size_bytes: int, deadline_s: float, hint: str
    ) -> bool:
        """Try the usual case, one range to a healthy peer by one lane, in a third of the time.

        Returns:
            False: anything unusual, or it failed; the whole procedure has to do it (again: both ways of
            moving bytes are idempotent).
        """
        self._check_open()
        peer = self._peers.get(name)
        if peer is None or peer.doubted or size_bytes <= 0:
            return False
        route = peer.route
        if route is None or not route.fits(local, remote, size_bytes, hint):
            route = peer.route = self._find_route(peer, local, remote, size_bytes, hint)
            if route is None:
                return False
        mine = route.mine
        registry = self._registry
        with registry.lock:
            if mine.retired:
                peer.route = None
                return False
            mine.uses += 1
        try:
            if route.mapping is not None and size_bytes <= PIECE_BYTES:
                start_s = time.monotonic()
                done = copy_one(op, route.link, route.mapping, local, remote, size_bytes)
                if done:
                    self.metrics.single("shm", name, op, size_bytes, time.monotonic() - start_s)
            else:
                done = self._run_alone(op, peer, route, local, remote, size_bytes, deadline_s)
        finally:
            registry.give(mine)
        if not done:
            peer.route = None
        return done

    def _find_route(
        self, peer: RemotePeer, local: int, remote: int, size_bytes: int, hint: str
    ) -> Route | None:
        """Return the way of one range, None if anything about it needs the whole procedure."""
        mine, theirs = self._registry.find(local, size_bytes), peer.find(remote, size_bytes)
        if mine is None or theirs is None:
            return None
        piece = Slice(0, local, remote, size_bytes, mine, theirs)
        name = next(iter(self._dispatcher.by_transport(peer, [piece], (), hint)))
        if not name:
            return None
        route = Route(mine, theirs, theirs.address + theirs.size_bytes, hint, name)
        if name == "shm" and mine.view is not None and peer.info.epoch != self.epoch:
            try:
                route.link, route.mapping = self._shm.attach(peer, theirs)
            except MooncakeError:
                return None
        return route

    def _run_alone(
        self,
        op: Opcode,
        peer: RemotePeer,
        route: Route,
        local: int,
        remote: int,
        size_bytes: int,
        deadline_s: float,
    ) -> bool:
        """Move one range by one run of its transport; False: several lanes would be better, or it failed."""
        if size_bytes >= 2 * PART_BYTES and self._transports[route.name].lanes(peer) > 1:
            return False
        call = Call(deadline_s)
        self._calls.add(call)  # so that `close` can end it; how many there are is bounded by threads
        try:
            piece = Slice(0, local, remote, size_bytes, route.mine, route.theirs)
            return not self._closed and self._dispatcher.run_one(op, peer, route.name, piece, call)
        finally:
            self._calls.discard(call)

    def view(self, name: str, address: int, size_bytes: int) -> memoryview:
        """Return a same-host peer's bytes read-only, without a copy; its owner may change them.

        Raises:
            RequestError: no such buffer, or it is not shared memory; as `peer`.
        """
        peer = self.peer(name)
        theirs = self._find(peer, address, size_bytes)
        if theirs.shm is None or not self._shm_reaches(peer, theirs):
            raise RequestError(f"{name}: {address:#x} is not shared memory of this host: transfer it")
        return self._shm.view(peer, theirs, address, size_bytes)

    def _prepare(
        self,
        op: Opcode,
        name: str,
        local: Sequence[int],
        remote: Sequence[int],
        lengths: Sequence[int],
        deadline_s: float,
        hint: str,
    ) -> tuple[Batch, RemotePeer, list[tuple[str, list[Slice]]]]:
        """Check everything, charge it, and cut it into parts: (transport to begin with, slices)."""
        if not len(local) == len(remote) == len(lengths):
            raise RequestError(
                f"{len(local)} local and {len(remote)} remote addresses, {len(lengths)} lengths"
            )
        call = Call(deadline_s)
        peer = self.peer(name, min(deadline_s, CONNECT_S))
        slices = self._slices(peer, local, remote, lengths)
        size_bytes = sum(piece.size_bytes for piece in slices)
        batch = Batch(op, size_bytes, len(lengths), call)
        used = list({piece.mine.buffer_id: piece.mine for piece in slices}.values())
        self._registry.take(*used)
        try:
            self._charge(batch)
        except MooncakeError:
            self._registry.give(*used)
            raise
        batch.on_settled(lambda: self._settled(batch, used))
        parts: list[tuple[str, list[Slice]]] = []
        for chosen, group in self._dispatcher.by_transport(peer, slices, (), hint).items():
            lanes = self._transports[chosen].lanes(peer) if chosen else 1
            if lanes > 1 and size_bytes >= 2 * PART_BYTES:
                lanes = min(lanes, sum(piece.size_bytes for piece in group) // PART_BYTES)
                parts += [(chosen, part) for part in divide(group, lanes)]
            else:
                parts.append((chosen, group))
        batch.begin(len(parts))
        return batch, peer, parts

    def _slices(
        self, peer: RemotePeer, local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]
    ) -> list[Slice]:
        slices: list[Slice] = []
        mine: Buffer | None = None
        theirs: BufferInfo | None = None
        low = high = first = last = 0  # bounds of `mine` and of `theirs`
        for index, (here, there, size) in enumerate(zip(local, remote, lengths, strict=True)):
            if size <= 0:
                if size == 0:
                    continue
                raise RequestError(f"transfer {index}: {size} bytes")
            if mine is None or here < low or here + size > high:
                mine = self._registry.find(here, size)
                if mine is None:
                    raise RequestError(f"transfer {index}: {here:#x}+{size} is not registered here")
                low, high = mine.address, mine.end
            if theirs is None or there < first or there + size > last:
                theirs = self._find(peer, there, size)
                first, last = theirs.address, theirs.address + theirs.size_bytes
            slices.append(Slice(index, here, there, size, mine, theirs))
        return slices

    def _find(self, peer: RemotePeer, address: int, size_bytes: int) -> BufferInfo:
        """Return the peer's buffer; ask it once more if we know of none."""
        found = peer.find(address, size_bytes)
        if found is None:
            peer.refresh(CONNECT_S)
            found = peer.find(address, size_bytes)
        if found is None:
            raise RequestError(f"{peer.name} has registered no buffer that holds {address:#x}+{size_bytes}")
        return found

    def _charge(self, batch: Batch) -> None:
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            if len(self._in_flight) >= BATCHES_MAX or (
                self._in_flight and self._in_flight_bytes + batch.size_bytes > self.config.in_flight_bytes_max
            ):
                raise CapacityError(
                    f"{len(self._in_flight)} batches, {self._in_flight_bytes} bytes are under way: wait"
                )
            self._in_flight.add(batch)
            self._in_flight_bytes += batch.size_bytes

    def _settled(self, batch: Batch, used: Iterable[Buffer]) -> None:
        self._registry.give(*used)
        with self._lock:
            self._in_flight.discard(batch)
            self._in_flight_bytes -= batch.size_bytes

    def _shm_reaches(self, peer: RemotePeer, theirs: BufferInfo) -> bool:
        return bool(theirs.key) and peer.info.host == self._host


def _column(numbers: int | Sequence[int]) -> Sequence[int]:
    return [numbers] if isinstance(numbers, int) else numbers
