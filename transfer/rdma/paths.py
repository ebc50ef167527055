"""Health of every route, and which ones a copy may take now."""

import functools
import threading
import time
from collections.abc import Callable, Collection

import structlog

from mooncake.core.errors import ConfigError
from transfer.health import Health, PathState
from transfer.messages import BufferInfo, NicInfo
from transfer.model import Buffer, Peer
from transfer.rdma.config import Meter
from transfer.rdma.routes import Places, Route, near_and_far, rail_name, tiers
from transfer.topology import Topology

log = structlog.get_logger(__name__)

KNOWN_MAX = 4096
"""Answers of `tiers` that are kept (40 us each to find): starts of peers times pairs of locations."""


class Paths:
    """Routes by topology and health. Thread-safe."""

    def __init__(
        self,
        nics: dict[str, NicInfo],
        places: Places,
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nics`: ours, by rail name; `places`: where they are, or what the configuration says instead."""
        self._nics = nics
        self._places = places
        self._meter = meter
        self._clock = clock
        self._lock = threading.Lock()
        self._health = Health()
        self._known: dict[tuple[str, str, tuple[str, ...], str, tuple[str, ...]], list[list[Route]]] = {}

    def tiers(
        self, peer: Peer, mine: Buffer, rails: Collection[str], theirs: BufferInfo
    ) -> list[list[Route]]:
        """Return the routes between two buffers, best first, whatever their health.

        Args:
            peer: the owner of `theirs`.
            mine: our buffer.
            rails: ours on which it is registered.
            theirs: the peer's buffer.
        """
        key = (peer.info.epoch, mine.location, tuple(rails), theirs.location, tuple(theirs.rkeys))
        if (known := self._known.get(key)) is not None:
            return known
        remote = {rail_name(info): info for info in peer.info.nics}
        there = [rail for rail in theirs.rkeys if rail in remote]
        found = tiers(
            near_and_far(self._places, mine.location, rails),
            near_and_far(_places_of(peer.info.topology), theirs.location, there),
            lambda route: self._nics[route.local].link_layer == remote[route.remote].link_layer,
        )
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[key] = found
        return found

    def admits(self, path: str) -> bool:
        """Return whether `path` would be usable."""
        with self._lock:
            return self._health.admits(path, self._clock())

    def usable(self, path: str) -> bool:
        """Return whether `path` may be used; whoever gets True tells the outcome."""
        with self._lock:
            return self._health.usable(path, self._clock())

    def failed(self, path: str, *, fatal: bool) -> None:
        """Tell that `path` failed; `fatal`: one such failure is enough."""
        with self._lock:
            quarantined = self._health.failed(path, self._clock(), fatal)
        if quarantined:
            self._meter(path, "quarantined", 0, 0.0)
            log.warning("rdma.quarantined", path=path)

    def succeeded(self, path: str) -> None:
        """Tell that `path` worked."""
        with self._lock:
            self._health.succeeded(path, self._clock())

    def states(self) -> dict[str, PathState]:
        """Return the state of every path that ever failed, for metrics."""
        with self._lock:
            return self._health.states(self._clock())


@functools.lru_cache(maxsize=256)
def _places_of(topology: str) -> Topology:
    """Read a peer's matrix. A wrong one costs it the choice of NICs, not the transfer."""
    try:
        return Topology.parse(topology) if topology else Topology({})
    except ConfigError as error:
        log.warning("rdma.peer_topology", error=str(error))
        return Topology({})
