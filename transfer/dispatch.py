"""Which transport carries which slices, and where they go when it fails.

The order is that of the configuration (shm, rdma, tcp); a path that failed is left for a while and taken up
again by trials (transfer.health). Whatever fails on a broken link is moved by another transport, within
the deadline and a bounded number of attempts; what an owner refused is final.
"""

import threading
import time
from collections.abc import Mapping

import structlog

from mooncake.core.errors import MooncakeError, PeerError, PeerGone
from transfer.batch import Batch
from transfer.health import Health, PathState, rank
from transfer.messages import BufferInfo
from transfer.metrics import TransferMetrics
from transfer.model import Buffer, Call, Failure, Opcode, Slice, Transport
from transfer.peers import RemotePeer

log = structlog.get_logger(__name__)

ATTEMPTS_MAX = 4
"""Runs of one slice: its own transport twice (a stale connection), then the others."""
TRIES_PER_TRANSPORT = 2


class Dispatcher:
    """Moves parts of batches; called from many threads."""

    def __init__(self, transports: Mapping[str, Transport], metrics: TransferMetrics) -> None:
        """`transports` in order of preference."""
        self._transports = transports
        self._metrics = metrics
        self._lock = threading.Lock()
        self._health = Health()

    def states(self) -> dict[str, PathState]:
        """Return the state of every path that ever failed."""
        with self._lock:
            return self._health.states(time.monotonic())

    def by_transport(
        self, peer: RemotePeer, slices: list[Slice], tried: tuple[str, ...], hint: str
    ) -> dict[str, list[Slice]]:
        """Group `slices` by the transport to use now; "" = none reaches."""
        groups: dict[str, list[Slice]] = {}
        chosen: dict[tuple[int, int], list[Slice]] = {}
        mine: Buffer | None = None
        theirs: BufferInfo | None = None
        group: list[Slice] = []
        for piece in slices:
            if piece.mine is not mine or piece.theirs is not theirs:
                mine, theirs = piece.mine, piece.theirs
                pair = (mine.buffer_id, theirs.buffer_id)
                if pair not in chosen:
                    chosen[pair] = groups.setdefault(self._choose(peer, piece, tried, hint), [])
                group = chosen[pair]
            group.append(piece)
        return groups

    def _choose(self, peer: RemotePeer, piece: Slice, tried: tuple[str, ...], hint: str) -> str:
        """Return the transport for one pair of buffers: the least tried first, among those the healthy."""
        reaching = [
            name
            for name, transport in self._transports.items()
            if tried.count(name) < TRIES_PER_TRANSPORT and transport.reaches(peer, piece.mine, piece.theirs)
        ]
        if len(reaching) > 1 and (peer.doubted or tried):
            with self._lock:
                ranked = rank([f"{n}/{peer.name}" for n in reaching], self._health, time.monotonic(), hint)
            reaching = sorted((path.partition("/")[0] for path in ranked), key=tried.count)
        elif hint in reaching:
            return hint
        return reaching[0] if reaching else ""

    def run_one(self, op: Opcode, peer: RemotePeer, name: str, piece: Slice, call: Call) -> bool:
        """Move one slice by the transport `name`; return whether that worked, else nothing is decided."""
        token = self._metrics.begin(name, peer.name, piece.size_bytes)
        start_s = time.monotonic()
        failures = self._transports[name].run(peer, op, [piece], call)
        moved_bytes = 0 if failures else piece.size_bytes
        self._metrics.end(token, op, moved_bytes, time.monotonic() - start_s)
        return not failures

    def run_part(self, batch: Batch, peer: RemotePeer, slices: list[Slice], chosen: str) -> None:
        """Move one part of a batch to its end; never raises."""
        try:
            self._move(batch, peer, slices, (), chosen)
        except Exception as error:
            log.exception("transfer.bug", peer=peer.name)
            batch.fail([Failure(piece, MooncakeError(f"internal error: {error!r}")) for piece in slices])
        finally:
            batch.part_ended()

    def _move(
        self, batch: Batch, peer: RemotePeer, slices: list[Slice], tried: tuple[str, ...], chosen: str
    ) -> None:
        """Move `slices` by the transport `chosen`, and what fails on its way by the next ones."""
        if not chosen:
            error = PeerGone(
                f"{peer.name}: no transport of {list(self._transports)} reaches "
                f"{slices[0].theirs.location} memory there from {slices[0].mine.location} here"
            )
            batch.fail([Failure(piece, error) for piece in slices])
            return
        self._metrics.chose(chosen, "failover" if tried else "health" if peer.doubted else "best")
        failures = self._attempt(batch, peer, chosen, slices)
        if not failures:
            return
        again = [f for f in failures if f.error.retryable]
        batch.fail([f for f in failures if f not in again])
        tried = (*tried, chosen)
        if not again or batch.call.left_s() == 0 or len(tried) >= ATTEMPTS_MAX:
            batch.fail(again)
            return
        for name, group in self.by_transport(peer, [f.slice for f in again], tried, "").items():
            if not name:  # nothing else reaches: what went wrong says more than that
                batch.fail([f for f in again if f.slice in group])
                peer.stale = True
                continue
            if name == chosen:
                self._metrics.retried(name, peer.name)
            else:
                self._metrics.failed_over(chosen, name)
            self._move(batch, peer, group, tried, name)

    def _attempt(self, batch: Batch, peer: RemotePeer, name: str, group: list[Slice]) -> list[Failure]:
        """Run `group` over one transport, and remember how it went."""
        size_bytes = sum(piece.size_bytes for piece in group)
        start_s = time.monotonic()
        counts = True
        if peer.doubted:
            with self._lock:  # takes the trial, if the path is on one and nobody else has it
                counts = self._health.usable(f"{name}/{peer.name}", start_s)
        self._metrics.began(name, peer.name, size_bytes)
        failures = self._transports[name].run(peer, batch.op, group, batch.call)
        now_s = time.monotonic()
        failed_bytes = sum(failure.slice.size_bytes for failure in failures) if failures else 0
        self._metrics.moved(name, peer.name, batch.op, size_bytes - failed_bytes, now_s - start_s)
        if failures:
            self._metrics.failed(name, peer.name, batch.op, failed_bytes, failures[0].error.code)
        if (failures or (peer.doubted and counts)) and not self._transports[name].judges_itself:
            self._judge(batch, peer, name, failures, start_s)
        return failures

    def _judge(
        self, batch: Batch, peer: RemotePeer, name: str, failures: list[Failure], start_s: float
    ) -> None:
        """Tell the health of paths how an attempt went; a deadline of the caller's says nothing about it."""
        path, now_s = f"{name}/{peer.name}", time.monotonic()
        broken = any(isinstance(failure.error, PeerError) for failure in failures)
        with self._lock:
            if broken and batch.call.left_s():
                if self._health.failed(path, now_s, began_s=start_s):
                    log.warning("transfer.path_quarantined", path=path, reason=str(failures[0].error))
                peer.doubted = True
                peer.route = None
            elif not broken:
                if self._health.succeeded(path, now_s, began_s=start_s):
                    log.info("transfer.path_back", path=path)
                states = (self._health.state(f"{n}/{peer.name}", now_s) for n in self._transports)
                peer.doubted = any(state is not PathState.USABLE for state in states)
