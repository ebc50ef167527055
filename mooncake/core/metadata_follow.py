"""A consistent view of one prefix of the metadata store that outlives the store.

`follow(store, prefix)` yields Up, Changed and Removed; whoever applies them in order always holds
what the store holds, whatever was missed: it lists again after compaction or a restart of the
store. A restarted store is empty until its clients are back, so keys missing there are kept for a
grace: members do not blink because their directory did (the data plane must not depend on it).
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import msgspec
import structlog

from mooncake.core.errors import MooncakeError
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_messages import MetaChange, MetaEntry

log = structlog.get_logger(__name__)

GRACE_S = 5.0
"""After a restart of the store: Registration (ttl 2 s) is back within ttl/3 plus its back-off cap."""
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 2.0


class Up(msgspec.Struct, frozen=True):
    """`key` is new."""

    key: str
    value: bytes


class Changed(msgspec.Struct, frozen=True):
    """`key` has another value."""

    key: str
    value: bytes


class Removed(msgspec.Struct, frozen=True):
    """`key` is gone; `value` is the last one known."""

    key: str
    value: bytes


Event = Up | Changed | Removed


class View:
    """Pure: what is known of a prefix. Turns listings and changes into events."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        """`grace_s`: how long keys survive that a restarted store does not list."""
        self.entries: dict[str, bytes] = {}
        self.epoch = ""
        self.revision = 0
        self._grace_s = grace_s
        self._missing: dict[str, float] = {}  # key -> when it is given up

    def on_list(self, now_s: float, epoch: str, revision: int, listed: list[MetaEntry]) -> list[Event]:
        """Take a whole listing; return what differs."""
        restarted = bool(self.epoch) and epoch != self.epoch
        self.epoch, self.revision = epoch, revision
        there = {entry.key: entry.value for entry in listed}
        events: list[Event] = []
        for key in [key for key in self.entries if key not in there]:
            if restarted:
                self._missing.setdefault(key, now_s + self._grace_s)
            elif key not in self._missing:  # its grace is not over yet
                events += self._set(key, None)
        for key, value in there.items():
            events += self._set(key, value)
        return events

    def on_changes(self, revision: int, changes: list[MetaChange]) -> list[Event]:
        """Take changes in order up to `revision`; return events."""
        self.revision = revision
        events: list[Event] = []
        for change in changes:
            events += self._set(change.key, change.value)
        return events

    def tick(self, now_s: float) -> list[Event]:
        """Give up keys whose grace is over."""
        events: list[Event] = []
        for key in [key for key, end_s in self._missing.items() if end_s <= now_s]:
            events += self._set(key, None)
        return events

    def _set(self, key: str, value: bytes | None) -> list[Event]:
        self._missing.pop(key, None)
        if value is None:
            old = self.entries.pop(key, None)
            return [] if old is None else [Removed(key, old)]
        old = self.entries.get(key)
        self.entries[key] = value
        if old is None:
            return [Up(key, value)]
        return [] if old == value else [Changed(key, value)]


class Follower:
    """Async iterator of events; never raises because of the store, waits for it instead.

    `entries` is the view after the events handed out so far plus those still waiting;
    `connected` says whether the store answered last time; `synced` is set at the first listing.
    """

    def __init__(
        self,
        store: MetadataStore,
        prefix: str,
        grace_s: float = GRACE_S,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing happens before the first `async for`."""
        self._store = store
        self._prefix = prefix
        self._view = View(grace_s)
        self._clock_s = clock_s
        self._ready: deque[Event] = deque()
        self._batches: AsyncIterator[list[Event]] | None = None
        self.connected = False
        self.synced = asyncio.Event()

    @property
    def entries(self) -> dict[str, bytes]:
        """Key to value, as last heard of."""
        return self._view.entries

    def __aiter__(self) -> "Follower":
        return self

    async def __anext__(self) -> Event:
        if self._batches is None:
            self._batches = self._follow()
        while not self._ready:
            self._ready.extend(await anext(self._batches))
        return self._ready.popleft()

    async def _follow(self) -> AsyncIterator[list[Event]]:
        view = self._view
        wait_s = BACKOFF_S_MIN
        list_first = True
        while True:
            try:
                if list_first:
                    listing = await self._store.get(self._prefix)
                    events = view.on_list(self._clock_s(), listing.epoch, listing.revision, listing.entries)
                    list_first, wait_s = False, self._heard()
                    self.synced.set()
                    yield events
                async for batch in self._store.watch(self._prefix, view.revision, view.epoch):
                    wait_s = self._heard()
                    if list_first := batch.compacted:
                        break
                    yield view.on_changes(batch.revision, batch.changes) + view.tick(self._clock_s())
            except MooncakeError as error:
                if self.connected:  # whether the store is away, its client says
                    log.debug("metadata.watch_lost", prefix=self._prefix, error=str(error))
                self.connected = False
                yield view.tick(self._clock_s())
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, BACKOFF_S_MAX)

    def _heard(self) -> float:
        self.connected = True
        return BACKOFF_S_MIN


def follow(store: MetadataStore, prefix: str, grace_s: float = GRACE_S) -> Follower:
    """Return an async iterator of Up, Changed and Removed under `prefix`."""
    return Follower(store, prefix, grace_s)
