"""One leader among candidates, over any MetadataStore.

The leader is who put `key` while it was absent, under a lease of its own; nobody writes it again.
So the key's revision names the term and grows from leader to leader: the fencing number.

Nobody acts as leader on hearsay. A term counts from the moment a lease was asked for until
`ttl_s` less MARGIN after the last keep-alive was *sent*: the store, which counts from when it heard
it, cannot have given the key to another by then. A store that comes back empty (`epoch` changed)
knows nothing of the leader before; therefore nobody acts before knowing this life of the store for
`ttl_s`. Both hold while clocks run at rates that differ by less than MARGIN and all candidates have
the same `ttl_s`. Against a leader that sleeps between its look at the clock and its deed, receivers
use `Fence`.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable

import msgspec
import structlog

from mooncake.core.errors import MooncakeError, PeerError
from mooncake.core.messages import Term
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_messages import MetaEntries

log = structlog.get_logger(__name__)

TTL_S = 2.0
"""As of a Registration: a dead leader is replaced within 3 s."""
BEATS = 3
"""Keep-alives per time to live: one may be lost."""
MARGIN = 0.1
"""Part of a lease that its holder does not use: clocks do not run equally fast."""
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 2.0
CLOSE_S = 0.5
"""A store that is there answers in milliseconds; else the lease ends by itself."""
LIVES_MAX = 64
"""Lives of the store that a Fence remembers as over; one restart a day for two months."""


class LeaderRecord(msgspec.Struct, frozen=True):
    """Value of the key. The lease makes it unique: a restarted process is another candidate."""

    candidate: str
    address: str = ""
    lease_id: int = 0


class Fence:
    """Pure: kept by whoever takes orders of leaders; refuses those of leaders that are over."""

    def __init__(self) -> None:
        self._life, self._number = "", 0
        self._over: deque[str] = deque(maxlen=LIVES_MAX)

    def admits(self, term: Term) -> bool:
        """Return whether an order given in `term` may be followed; it ends all earlier terms."""
        if term.life in self._over:
            return False
        if term.life != self._life:
            if self._life:
                self._over.append(self._life)
            self._life, self._number = term.life, term.number
        if term.number < self._number:
            return False
        self._number = term.number
        return True


class Look(msgspec.Struct, frozen=True):
    """List the key, then `on_listing`."""


class Grant(msgspec.Struct, frozen=True):
    """Get a lease, then `on_lease`."""


class Claim(msgspec.Struct, frozen=True):
    """Put the key if it is absent, then `on_claim`."""

    lease_id: int
    value: bytes


class Keep(msgspec.Struct, frozen=True):
    """Keep the lease alive, then `on_kept`."""

    lease_id: int


class Rest(msgspec.Struct, frozen=True):
    """Nothing to do until `until_s`, or until the key changes, then `on_change`."""

    until_s: float


Step = Look | Grant | Claim | Keep | Rest


class Candidate:
    """Pure: one candidate's knowledge. `next` says what to do, the `on_` methods what came of it."""

    def __init__(self, name: str, address: str = "", ttl_s: float = TTL_S) -> None:
        """`address` is for those who look for the leader."""
        self.name = name
        self.ttl_s = ttl_s
        self.holder: LeaderRecord | None = None
        """Who holds the key, as last seen; maybe ourselves."""
        self.life = ""
        self.revision = 0
        self.term: Term | None = None
        """What we won, whether or not we may act; see `leads`."""
        self.acts_from_s = math.inf
        self.acts_until_s = -math.inf
        self._address = address
        self._lease_id = 0
        self._beat_s = 0.0
        self._known = False

    @property
    def lease_id(self) -> int:
        """The lease that should be revoked when we go; 0 = none."""
        return self._lease_id

    def leads(self, now_s: float) -> Term | None:
        """Return our term if we may act as leader now."""
        return self.term if self.acts_from_s <= now_s < self.acts_until_s else None

    def next(self, now_s: float) -> Step:
        """Return what to do now."""
        if self.term and now_s >= self._beat_s:
            return Keep(self._lease_id)
        if not self._known:
            return Look()
        if self.term:
            return Rest(self._beat_s)
        if self.holder:
            return Rest(math.inf)
        if not self._lease_id or now_s >= self.acts_until_s:
            return Grant()
        record = LeaderRecord(self.name, self._address, self._lease_id)
        return Claim(self._lease_id, msgspec.json.encode(record))

    def on_listing(self, now_s: float, key: str, listing: MetaEntries) -> None:
        """Take a listing of `key` (and of keys that begin with it)."""
        if listing.epoch != self.life:
            self.life = listing.epoch
            self.acts_from_s = now_s + self.ttl_s
        self.revision = listing.revision
        self._known = True
        found = [entry for entry in listing.entries if entry.key == key]
        self.holder = _decode(found[0].value) if found else None
        if self.holder and self._lease_id and self.holder.lease_id == self._lease_id:
            self.term = Term(self.life, found[0].revision, self.name)
        elif self.holder or self.term:  # another one's, or somebody removed ours
            self._drop()

    def on_lease(self, sent_s: float, lease_id: int) -> None:
        """Take a new lease that was asked for at `sent_s`."""
        self._lease_id = lease_id
        self._extend(sent_s)

    def on_claim(self) -> None:
        """Look who won: the answer may even have been lost."""
        self._known = False

    def on_kept(self, sent_s: float, alive: bool) -> None:
        """Take the answer to a keep-alive that was sent at `sent_s`."""
        self._known = False
        if alive:
            self._extend(sent_s)
        else:
            self._drop()

    def on_change(self) -> None:
        """The key changed, or may have."""
        self._known = False

    def resign(self) -> None:
        """Act no longer."""
        self._drop()
        self._known = False

    def _extend(self, sent_s: float) -> None:
        self.acts_until_s = sent_s + self.ttl_s * (1 - MARGIN)
        self._beat_s = sent_s + self.ttl_s / BEATS

    def _drop(self) -> None:
        self.term, self._lease_id, self.acts_until_s = None, 0, -math.inf


class Election:
    """A candidate with a store and a clock: takes part from `start` to `close`."""

    def __init__(
        self,
        store: MetadataStore,
        key: str,
        name: str,
        address: str = "",
        ttl_s: float = TTL_S,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` must differ between candidates; all have one `ttl_s` (etcd: 2 s at least)."""
        self._store = store
        self._key = key
        self._clock_s = clock_s
        self._candidate = Candidate(name, address, ttl_s)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def term(self) -> Term | None:
        """Our term if we may act as leader at this moment; ask again before each deed."""
        return self._candidate.leads(self._clock_s())

    @property
    def leader(self) -> LeaderRecord | None:
        """Who leads, as far as we know."""
        return self._candidate.holder

    def start(self) -> None:
        """Begin on the running event loop."""
        self._task = asyncio.create_task(self._run(), name=f"election {self._key}")

    async def wait_leading(self) -> Term:
        """Return once we lead; bound it with asyncio.timeout."""
        while (term := self.term) is None:
            await self._wait_change(self._candidate.acts_from_s)
        return term

    async def wait_over(self, term: Term) -> None:
        """Return once we may no longer act in `term`, whether or not the store told us."""
        while self.term == term:
            await self._wait_change(self._candidate.acts_until_s)

    async def close(self) -> None:
        """Resign: another can lead at once. Waits at most CLOSE_S for the store."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        lease_id = self._candidate.lease_id
        self._candidate.resign()
        self._notify()
        if lease_id:
            await self._revoke(lease_id)

    async def _revoke(self, lease_id: int) -> None:
        """Give a lease back that nobody will keep; else it ends by itself."""
        with contextlib.suppress(MooncakeError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._store.revoke(lease_id)

    async def _run(self) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            before = self._candidate.term
            try:
                await self._perform(self._candidate.next(self._clock_s()))
                backoff_s = BACKOFF_S_MIN
            except MooncakeError as error:
                if backoff_s == BACKOFF_S_MIN:
                    say = log.debug if isinstance(error, PeerError) else log.warning  # its client tells it
                    say("election.failed", key=self._key, error=str(error))
                self._candidate.on_change()
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_S_MAX)
            if self._candidate.term != before:
                log.info("election.term", key=self._key, ours=self._candidate.term, held_by=self.leader)
            self._notify()

    async def _perform(self, step: Step) -> None:
        candidate, store, sent_s = self._candidate, self._store, self._clock_s()
        held = candidate.lease_id
        match step:
            case Look():
                listing = await store.get(self._key)
                candidate.on_listing(self._clock_s(), self._key, listing)
            case Grant():
                candidate.on_lease(sent_s, await store.grant(candidate.ttl_s))
            case Claim(lease_id, value):
                await store.put(self._key, value, lease_id, if_revision=0)
                candidate.on_claim()
            case Keep(lease_id):
                candidate.on_kept(sent_s, await store.keep_alive(lease_id))
            case Rest(until_s):
                if candidate.term:
                    await asyncio.sleep(max(0.0, until_s - sent_s))
                else:
                    await self._watch()
                    candidate.on_change()
        if held and held != candidate.lease_id and not isinstance(step, Keep):  # which found that it is over
            await self._revoke(held)

    async def _watch(self) -> None:
        """Return when the key has changed, or the store cannot tell."""
        candidate = self._candidate
        watching = self._store.watch(self._key, candidate.revision, candidate.life)
        async with contextlib.aclosing(watching):  # type: ignore[type-var]
            async for batch in watching:
                if batch.compacted or any(change.key == self._key for change in batch.changes):
                    return

    async def _wait_change(self, until_s: float) -> None:
        """Wait for a step of ours, or until a time that is still to come."""
        rest_s = until_s - self._clock_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rest_s if 0 < rest_s < math.inf else None):
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # waiters of the old one wake, later ones wait anew


def _decode(value: bytes) -> LeaderRecord:
    try:
        return msgspec.json.decode(value, type=LeaderRecord)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return LeaderRecord("unknown")  # somebody else's all the same
