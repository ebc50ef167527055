"""Queue pairs that peers have us make: the owner's half of a lane. Bounded; gone with their session.

We do not see what a peer does through them, so no mark is ever set and SIEVE gives up the oldest: whoever
was using it is told by its own NIC, and connects again.

Whoever has a queue pair here is held off other memory only by the NIC's own keys of 32 bits, not by ours of
128: it is the greeting's secret that decides who gets this far.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import structlog

from mooncake.core.errors import CapacityError, MooncakeError, RequestError
from transfer.messages import QpInfo, RdmaConnect
from transfer.sieve import Sieve
from transfer.verbs.api import Nic, QueuePair

log = structlog.get_logger(__name__)


class Session(Protocol):
    """A peer's control connection. One thread serves it, and calls what `on_close` was given at its end."""

    epoch: str

    def on_close(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the connection has ended."""


class _Guest(NamedTuple):
    session: int
    pair: QueuePair


Key = tuple[str, int]
"""The initiator's epoch, and its number of the lane."""


class Guests:
    """All of them. Thread-safe."""

    def __init__(self, nics: dict[str, Nic], guests_max: int) -> None:
        """`nics`: by rail name."""
        self._nics = nics
        self._max = guests_max
        self._lock = threading.Lock()
        self._guests: dict[Key, _Guest] = {}
        self._order: Sieve[Key] = Sieve()
        self._sessions: set[int] = set()
        self._closed = False

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._guests)

    def connect(self, session: Session, request: RdmaConnect) -> QpInfo:
        """Make our end of a lane.

        Raises:
            RequestError: no such NIC.
            CapacityError: the device has no more queue pairs, or we are closing.
            PeerGone: no route.
        """
        nic = self._nics.get(request.nic)
        if nic is None:
            raise RequestError(f"there is no NIC {request.nic} here; there are: {', '.join(self._nics)}")
        number, key = id(session), (session.epoch, request.link)
        self._remove([key])  # asked again over a new connection, because the answer was lost
        while len(self._order) >= self._max:
            self._evict()
        pair = nic.queue_pair()
        try:
            pair.connect(request.qp)
            info = pair.local()
            known = self._add(key, _Guest(number, pair))
        except MooncakeError:
            pair.close()
            raise
        if not known:
            session.on_close(lambda: self._ended(number))
        return info

    def disconnect(self, session: Session, links: Sequence[int]) -> None:
        """Destroy our ends of `links`; when it returns nothing lands through them any more."""
        self._remove([(session.epoch, link) for link in links])

    def close(self) -> None:
        """Destroy all, take no more (idempotent)."""
        with self._lock:
            self._closed = True
            keys = list(self._guests)
        self._remove(keys)

    def _add(self, key: Key, guest: _Guest) -> bool:
        """Keep `guest`; return whether its session had one before."""
        with self._lock:
            if self._closed:
                raise CapacityError("this engine is closing")
            self._guests[key] = guest
            self._order.add(key)
            known = guest.session in self._sessions
            self._sessions.add(guest.session)
            return known

    def _ended(self, number: int) -> None:
        with self._lock:
            self._sessions.discard(number)
            keys = [key for key, guest in self._guests.items() if guest.session == number]
        self._remove(keys)

    def _evict(self) -> None:
        with self._lock:
            key = self._order.evict(lambda _: True)
        if key is not None:
            log.info("rdma.guest_evicted", limit=self._max)
            self._remove([key])

    def _remove(self, keys: Sequence[Key]) -> None:
        """Destroy first, forget then: nobody is told that one is gone while another thread destroys it."""
        with self._lock:
            gone = {key: guest for key in keys if (guest := self._guests.get(key))}
        for guest in gone.values():
            guest.pair.close()
        with self._lock:
            for key, guest in gone.items():
                if self._guests.get(key) is guest:
                    del self._guests[key]
                    self._order.remove(key)
