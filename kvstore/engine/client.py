"""The pool as an engine sees it: threads, no event loop, and never a wait without an end.

A store that is dead, slow or restarting makes the pool a *miss*: calls raise a PeerError and the
engine computes. The first call that gets no answer pays its deadline; from then on every call fails
at once until the store is found again (kvstore.engine.attachment). So no engine step is slowed by a dead
store twice. Bytes never pass through the store: the client copies to and from the shared segment itself,
see transfer.copy.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kvstore.engine.attachment import ATTACH_S, Attachment, Resolve
from kvstore.engine.link import Call, Lease, Slot, StoreLink
from kvstore.engine.orphans import Orphans
from kvstore.limits import LEASE_S_MAX, WRITE_S_MAX
from mooncake.core.errors import MooncakeError, PeerError, PeerGone, PeerTimeout, ProtocolError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import (
    Abandon,
    Acquire,
    Acquired,
    Block,
    Commit,
    Committed,
    HandOver,
    Ok,
    Pin,
    Pinned,
    Release,
    ReportBad,
    Reserve,
    Reserved,
    Stats,
    StoreRecord,
    StoreStats,
)

DEADLINE_S = 0.2
"""Default wait for an answer: round trips take 0.5 ms, so this is a store in trouble, and an engine
step that is lengthened once by 0.2 s is still within any time-between-tokens objective's outliers."""
LOOK_S = 0.2
"""Distance of looks at a store that was asked to wait: each is a connection, 50 us."""


class PoolClient:
    """One engine's access to its host's store. Thread-safe."""

    def __init__(
        self,
        record: StoreRecord,
        writer: str,
        resolve: Resolve | None = None,
        *,
        touch: bool = True,
        attach_s: float = ATTACH_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """Attach, and give up what an earlier start of `writer` left in writing.

        A store that cannot be reached now is looked for in the background; calls fail until then.

        Args:
            record: a store on this host.
            writer: this engine's name; the same after a restart, or unique: both work.
            resolve: asked for the store's record when nobody serves at the known fd_path any more;
                called in the background thread, may raise MooncakeError.
            touch: fill this process's page tables at once; False for a client that copies nothing.
            attach_s: longest wait for the store, in seconds.
            deadline_s: longest wait of one call that names no other, in seconds.

        Raises:
            ProtocolError: what answers is not a store of ours.
        """
        self._writer = writer
        self._deadline_s = deadline_s
        self._node = record.node
        self._orphans = Orphans()
        self._looked_s = 0.0
        self._store = Attachment(record, resolve, touch=touch, attach_s=attach_s)
        if self._store.link is not None:
            self._abandon_earlier()

    @property
    def attached(self) -> bool:
        """Whether calls are being sent; False = they fail at once."""
        return self._store.is_up

    @property
    def link(self) -> StoreLink | None:
        """The store that was attached last."""
        return self._store.link

    @property
    def record(self) -> StoreRecord | None:
        """The record of the store that was attached last."""
        return self.link.record if self.link else None

    # ------------------------------------------------------------ reading

    def begin_acquire(
        self, keys: Sequence[bytes], lease_s: float, wait_s: float = 0.0, source: str = ""
    ) -> Call:
        """Ask for a lease on the longest complete prefix of `keys`.

        Args:
            keys: 32 bytes each, in prefix order.
            lease_s: how long the bytes must stay; at most LEASE_S_MAX.
            wait_s: let the store wait (at most its WAIT_S_MAX) for blocks in writing, and (at most its
                PULL_WAIT_S_MAX) for those that it fetches from `source`.
            source: node whose store has what this one may lack; "" = none.

        Raises:
            PeerError: the store is known to be gone.
            CapacityError: too many calls in flight.
        """
        keys = list(keys)
        return self._begin(
            Acquire(keys, min(lease_s, LEASE_S_MAX), wait_s, source), keys=keys, wait_s=wait_s, leases=True
        )

    def finish_acquired(self, call: Call, deadline_s: float | None = None) -> Acquired:
        """Return the store's answer as it is; bytes by `view`. The lease must be released.

        Args:
            call: of begin_acquire.
            deadline_s: longest wait from now; by default the client's, and the call's wait_s.

        Raises:
            PeerTimeout: no answer within the deadline, or the store went down meanwhile.
            PeerError: the store is gone, restarted, or answers nonsense.
            CapacityError: the store has too many leases.
            RequestError: malformed keys.
        """
        reply: Acquired = self._finish(call, deadline_s, Acquired)
        with self._ours(call.link, Release(reply.lease_id)):
            call.link.check_acquired(reply, len(call.keys))
        return reply

    def finish_acquire(self, call: Call, lease_s: float, deadline_s: float | None = None) -> Lease:
        """Return the answer as a Lease with views; `lease_s` as asked for. Raises as finish_acquired."""
        reply = self.finish_acquired(call, deadline_s)
        view = call.link.segment.view
        try:
            views = [view(block.offset, block.size_bytes).toreadonly() for block in reply.blocks]
        except MooncakeError as error:  # the link was replaced and closed at this very moment
            raise PeerGone(f"store {self._node}: {error}") from error
        found = call.keys[: len(views)]
        return Lease(reply.lease_id, found, reply.blocks, views, call.began_s + min(lease_s, LEASE_S_MAX))

    def acquire(
        self, keys: Sequence[bytes], lease_s: float, wait_s: float = 0.0, deadline_s: float | None = None
    ) -> Lease:
        """`begin_acquire` and `finish_acquire` in one."""
        return self.finish_acquire(self.begin_acquire(keys, lease_s, wait_s), lease_s, deadline_s)

    def release(self, lease_id: int) -> None:
        """Give a lease back, without waiting; one of a lost or earlier store is already over.

        Raises:
            CapacityError: too many calls in flight; the lease then ends by its term.
        """
        link = self.link
        if self.attached and link is not None and link.is_mine(lease_id):
            with contextlib.suppress(PeerGone):
                link.send(Release(lease_id))

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """Return bytes of the segment that is attached now, writable, without a copy.

        Raises:
            PeerGone: none is attached.
            RequestError: the range leaves the segment.
        """
        link = self.link
        if link is None:
            raise PeerGone(f"store {self._node}: not attached yet")
        return link.segment.view(offset, size_bytes)

    def verify(self, key: bytes, block: Block) -> bool:
        """Return whether the bytes of `block` are what was committed under `key`; raises as `view`."""
        return block_checksum(key, self.view(block.offset, block.size_bytes)) == block.checksum

    def report_bad(self, keys: Sequence[bytes]) -> None:
        """Tell the store that these blocks failed verification, without waiting.

        Raises:
            PeerError, CapacityError: as begin_acquire.
        """
        self._store.live().send(ReportBad(list(keys)))

    # ------------------------------------------------------------ writing

    def begin_reserve(
        self,
        keys: Sequence[bytes],
        size_bytes: int,
        *,
        tenant: str = "",
        group: str = "",
        depth: int = -1,
        soft_pin_s: float = 0.0,
        hard_pin: bool = False,
    ) -> Call:
        """Ask for room for blocks; raises as begin_acquire.

        Args:
            keys: 32 bytes each.
            size_bytes: of each block.
            tenant: who pays for the blocks, see kvstore.node.tags; "" = nobody.
            group: they go together with others of that name; "" = none.
            depth: of keys[0] in its prompt, the others follow it; -1 = unknown.
            soft_pin_s: keep them until they have not been hit for so long; 0 = no pin.
            hard_pin: keep them until `unpin`.
        """
        keys = list(keys)
        hints = (tenant, group, depth, soft_pin_s, hard_pin)
        return self._begin(Reserve(self._writer, keys, size_bytes, *hints), keys=keys, size_bytes=size_bytes)

    def finish_reserve(self, call: Call, deadline_s: float | None = None) -> list[Slot | None]:
        """Return one Slot per key, None where there is nothing to write.

        None: the block is already there, being written, or the store is full.
        Raises as finish_acquired.
        """
        reply: Reserved = self._finish(call, deadline_s, Reserved)
        with self._ours(call.link, Abandon(self._writer, [ticket for ticket in reply.tickets if ticket])):
            call.link.check_reserved(reply, len(call.keys), call.size_bytes)
        expires_s = call.began_s + WRITE_S_MAX
        view = call.link.segment.view
        try:
            return [
                Slot(key, offset, ticket, view(offset, call.size_bytes), expires_s) if offset >= 0 else None
                for key, offset, ticket in zip(call.keys, reply.offsets, reply.tickets, strict=True)
            ]
        except MooncakeError as error:
            raise PeerGone(f"store {self._node}: {error}") from error

    def reserve(
        self,
        keys: Sequence[bytes],
        size_bytes: int,
        deadline_s: float | None = None,
        *,
        tenant: str = "",
        group: str = "",
        depth: int = -1,
        soft_pin_s: float = 0.0,
        hard_pin: bool = False,
    ) -> list[Slot | None]:
        """`begin_reserve` and `finish_reserve` in one."""
        call = self.begin_reserve(
            keys,
            size_bytes,
            tenant=tenant,
            group=group,
            depth=depth,
            soft_pin_s=soft_pin_s,
            hard_pin=hard_pin,
        )
        return self.finish_reserve(call, deadline_s)

    def commit(
        self, tickets: Sequence[int], checksums: Sequence[bytes], deadline_s: float | None = None
    ) -> list[bool]:
        """Make written blocks visible; block_checksum(key, view) each. False: it came too late.

        Raises as finish_acquired. After a PeerTimeout the blocks may or may not be visible.
        """
        call = self._begin(Commit(list(tickets), list(checksums)))
        reply: Committed = self._finish(call, deadline_s, Committed)
        if len(reply.done) != len(tickets):
            raise ProtocolError(f"store {self._node}: {len(reply.done)} results for {len(tickets)} tickets")
        return reply.done

    def hand_over(self, keys: Sequence[bytes], target: str) -> None:
        """Let the store of node `target` copy these blocks, without waiting; raises as report_bad."""
        self._store.live().send(HandOver(list(keys), target))

    def abandon(self, tickets: Sequence[int]) -> None:
        """Give up some tickets, without waiting; raises as report_bad."""
        if tickets:  # an empty list would mean all
            self._store.live().send(Abandon(self._writer, list(tickets)))

    def abandon_all(self) -> None:
        """Give up everything this writer has in writing, without waiting; raises as report_bad."""
        self._store.live().send(Abandon(self._writer, []))

    # ------------------------------------------------------------ what is kept

    def pin(self, keys: Sequence[bytes], ttl_s: float = math.inf, deadline_s: float | None = None) -> int:
        """Keep blocks until they have not been hit for `ttl_s`, or until `unpin`; return how many are kept.

        Blocks that the store does not have, or has no room to pin, are not. Raises as finish_acquired.
        """
        reply: Pinned = self._finish(self._begin(Pin(list(keys), ttl_s)), deadline_s, Pinned)
        return reply.pinned

    def unpin(self, keys: Sequence[bytes], deadline_s: float | None = None) -> int:
        """End the pins of blocks; return how many of them the store has. Raises as finish_acquired."""
        return self.pin(keys, 0.0, deadline_s)

    # ------------------------------------------------------------ any call

    def call(self, request: Any, kind: type[Any], deadline_s: float | None = None) -> tuple[StoreLink, Any]:
        """Return the answer to any request, a `kind`, and the link that its ids and offsets belong to.

        It waits for the answer on the store's short way in, where there is one: for callers that have
        nothing else to do meanwhile. Raises as finish_acquired.
        """
        link = self._store.live()
        try:
            return link, link.ask(request, self._deadline_s if deadline_s is None else deadline_s, kind)
        except PeerError as error:
            self._store.lost(link, error)
            raise

    def tell(self, link: StoreLink, request: Any) -> None:
        """Send what needs no answer, such as a Release, to the store that `link` leads to.

        A store that is lost or restarted is not told: what it gave is over.
        """
        if self._store.is_live(link):
            with contextlib.suppress(PeerError):
                link.tell(request)

    def poll(self, call: Call) -> bool:
        """Return whether `finish_` would return at once, be it with an error. Never waits.

        A store that was asked to wait is looked at meanwhile: its death must not cost the whole wait.
        """
        if call.link.poll(call.call_id) or not self._store.is_live(call.link):
            return True
        now_s = time.monotonic()
        if not call.wait_s or now_s - max(call.began_s, self._looked_s) < LOOK_S:
            return False
        self._looked_s = now_s
        if not call.link.is_served:
            self._store.lost(call.link, PeerGone("nobody serves its socket any more"))
        return not self._store.is_live(call.link)

    def forget(self, call: Call) -> None:
        """Drop interest in an answer. One that is overdue counts as a timeout of the store.

        A lease that comes with it later is given back.
        """
        overdue = time.monotonic() - call.began_s > self._deadline_s + call.wait_s
        if overdue and not call.link.poll(call.call_id):
            self._store.lost(call.link, PeerTimeout("an answer that was given up"))
        if not (call.leases and self._orphans.adopt(call)):
            call.link.forget(call.call_id)

    def stats(self, deadline_s: float | None = None) -> StoreStats:
        """Return the store's counters; raises as finish_acquired."""
        stats: StoreStats = self._finish(self._begin(Stats()), deadline_s, StoreStats)
        return stats

    def reattach(self, record: StoreRecord, deadline_s: float = ATTACH_S) -> None:
        """Attach to `record`'s store now, unless that epoch is attached already.

        The old memory is unmapped when its last view is dropped.

        Raises:
            PeerError: it cannot be reached; the client stays as it was.
        """
        self._store.reattach(record, deadline_s)

    def close(self) -> None:
        """Stop (idempotent); views that are in use stay valid."""
        self._orphans.close()
        self._store.close()

    # ------------------------------------------------------------ inside

    def _abandon_earlier(self) -> None:
        """Give up what an earlier start left, before the first call: the short way would overtake it."""
        with contextlib.suppress(PeerError):
            if self.record is not None and self.record.door:
                self.call(Abandon(self._writer, []), Ok)
            else:
                self.abandon_all()

    def _begin(self, request: Any, **known: Any) -> Call:
        link = self._store.live()
        return Call(link, link.begin(request), time.monotonic(), **known)

    def _finish(self, call: Call, deadline_s: float | None, kind: type[Any]) -> Any:
        if deadline_s is None:
            deadline_s = self._deadline_s + call.wait_s
        # a call that was under way when the store was lost must not pay the deadline once more
        wait_s = deadline_s if self._store.is_live(call.link) else 0.0
        try:
            return call.link.finish(call.call_id, wait_s, kind)
        except PeerTimeout as error:
            if wait_s > 0:
                self._store.lost(call.link, error)
            raise

    @contextlib.contextmanager
    def _ours(self, link: StoreLink, undo: Release | Abandon) -> Iterator[None]:
        """Leave `link` for good when its answer is of another epoch or nonsense."""
        try:
            yield
        except PeerError as error:
            with contextlib.suppress(MooncakeError):
                link.send(undo)  # what the store behind that address just gave us would lie idle
            self._store.lost(link, error)
            raise
