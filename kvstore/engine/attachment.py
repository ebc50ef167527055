"""The one link of a client to its host's store, through the store's deaths and restarts.

The first call that gets no answer says `lost`: from then on `live` raises at once (the breaker), while one
background thread looks for the store, also for a restarted one, and attaches again.
"""

import threading
from collections.abc import Callable

import structlog

from kvstore.engine.link import StoreLink
from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout, ProtocolError
from mooncake.core.messages import Stats, StoreRecord, StoreStats

log = structlog.get_logger(__name__)

ATTACH_S = 5.0
"""Wait for the memory's descriptor at the start of an engine, which takes longer anyway."""
PROBE_S = 1.0
"""Wait of the background thread for a sign of life."""
RETRY_S = 1.0
"""Pause between two looks for a lost store."""

Resolve = Callable[[], StoreRecord | None]


class Attachment:
    """What is attached now, if anything. Thread-safe."""

    def __init__(self, record: StoreRecord, resolve: Resolve | None, *, touch: bool, attach_s: float) -> None:
        """Attach; a store that cannot be reached now is looked for in the background. Args: see PoolClient.

        Raises:
            ProtocolError: what answers is not a store of ours.
        """
        self.node = record.node
        self._resolve = resolve
        self._touch = touch
        self._fd_path = record.fd_path
        self._lock = threading.Lock()
        self.link: StoreLink | None = None
        """The store that was attached last."""
        self.is_up = False
        """Whether calls are being sent; False = they fail at once."""
        self._closing = threading.Event()
        self._reviver: threading.Thread | None = None
        try:
            self._use(StoreLink.attach(record.fd_path, attach_s, touch=touch))
        except ProtocolError:
            raise
        except MooncakeError as error:
            self.lost(None, error)

    def live(self) -> StoreLink:
        """Return the link to send a call on.

        Raises:
            PeerTimeout: the store is known to be gone.
        """
        link = self.link
        if not self.is_up or link is None:
            raise PeerTimeout(f"store {self.node} does not answer; it is looked for every {RETRY_S:g} s")
        return link

    def is_live(self, link: StoreLink) -> bool:
        """Whether calls are being sent on this very link."""
        return self.is_up and link is self.link

    def reattach(self, record: StoreRecord, deadline_s: float) -> None:
        """Attach to `record`'s store now, unless it is attached already; raises as StoreLink.attach."""
        link = self._attach(record.fd_path, deadline_s)
        self._fd_path = record.fd_path
        if link is not None:
            self._use(link)

    def lost(self, link: StoreLink | None, error: MooncakeError) -> None:
        """Open the breaker and start to look for the store, once."""
        with self._lock:
            looking = self._reviver is not None and self._reviver.is_alive() and not self.is_up
            if link is not self.link or self._closing.is_set() or looking:
                return
            self.is_up = False
            self._reviver = threading.Thread(target=self._revive, name="pool-revive", daemon=True)
            self._reviver.start()
        log.warning("pool.lost", node=self.node, error=str(error))

    def close(self) -> None:
        """Stop (idempotent); views that are in use stay valid."""
        self._closing.set()
        with self._lock:
            reviver, self.is_up = self._reviver, False
        if reviver is not None:
            reviver.join()
        if self.link is not None:
            self.link.close()

    def _attach(self, fd_path: str, deadline_s: float) -> StoreLink | None:
        """Return a link to another epoch than the one that is attached; None: it is that one."""
        epoch = self.link.record.epoch if self.link else ""
        return StoreLink.attach(fd_path, deadline_s, touch=self._touch, unless_epoch=epoch)

    def _use(self, link: StoreLink | None) -> None:
        assert link is not None
        with self._lock:
            old, self.link = self.link, link
            self.is_up = not self._closing.is_set()
        if old is not None:
            old.close()
        log.info("pool.attached", node=link.record.node, epoch=link.record.epoch)

    def _revive(self) -> None:
        """Look for the store until it answers; the first look is at once: it may have been a hiccup."""
        while not self._closing.is_set():
            try:
                self._look()
            except (MooncakeError, OSError, ValueError) as error:  # `resolve` is not ours
                log.debug("pool.still_lost", node=self.node, error=str(error))
            else:
                return
            self._closing.wait(RETRY_S)

    def _look(self) -> None:
        link = self.link
        try:
            found = self._attach(self._fd_path, PROBE_S)
        except PeerGone:
            record = self._resolve() if self._resolve else None
            if record is None or record.fd_path == self._fd_path:
                raise
            found = self._attach(record.fd_path, PROBE_S)
            self._fd_path = record.fd_path
        if found is not None:
            self._use(found)
            return
        assert link is not None
        link.finish(link.begin(Stats()), PROBE_S, StoreStats)  # the same start: does it answer again?
        with self._lock:
            self.is_up = not self._closing.is_set()
        log.info("pool.answers_again", node=self.node)
