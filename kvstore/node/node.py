"""A store node as a pure state machine: (now_s, request) -> reply, plus events (DESIGN 2.2, 5, 6).

A block is *writing* (reserved, has a ticket; kvstore.node.writing) -> *complete* (visible, immutable;
kvstore.node.shelf) -> *gone*.
Where its memory is:

    reserve --> writing --commit--> complete --evict or drop--> free
                   |                   '--drop while leased--> hidden --last lease ends--> free
                   '--abandon or write deadline--> quarantine --QUARANTINE_S--> free

Ids (leases, tickets) carry the node's epoch, so those of an earlier start are recognised by both sides
(kvstore.node.contract).

No clock here: `now_s` is any monotonic time; every call first does what has become due.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from kvstore.limits import GRANT_SHARE_MAX, WRITER_CHARS_MAX, NodeLimits, check_count, check_keys
from kvstore.node.allocator import aligned
from kvstore.node.blocks import Entry, Write
from kvstore.node.changes import NodeEvents
from kvstore.node.contract import CHECKSUM_BYTES, FULL, OVER_QUOTA, PRESENT
from kvstore.node.pins import Guarded
from kvstore.node.shelf import Shelf
from kvstore.node.tags import PLAIN, Tags, check_pin_s
from kvstore.node.tenants import TenantUse
from kvstore.node.writing import Writing
from kvstore.table import Table
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import Acquired, Block, Committed, Reserved, StoreStats

SIZES_MAX = 64
"""Block sizes whose number is stored once for all blocks, not 32 bytes each: those of so many models."""
HARD_PIN_RATIO = 0.5
"""Of the segment: the other half stays a cache, whatever is pinned."""


class Node:
    """Owns the truth about one segment of `capacity_bytes`. Not thread-safe: one loop drives it."""

    def __init__(
        self,
        capacity_bytes: int,
        limits: NodeLimits | None = None,
        policy: Guarded | None = None,
        first_id: int = 1,
        table: Table | None = None,
    ) -> None:
        """Start empty.

        Args:
            capacity_bytes: multiple of 4096.
            limits: see kvstore.limits.
            policy: eviction order; by default LRU, and hard pins up to HARD_PIN_RATIO.
            first_id: `id_base(epoch)` in production.
            table: where readers of the host look for complete blocks.
        """
        self.limits = limits or NodeLimits()
        self.policy = policy if policy is not None else Guarded(int(capacity_bytes * HARD_PIN_RATIO))
        self.shelf = Shelf(capacity_bytes, self.limits, self.policy, table)
        self.writing = Writing(self.limits, self.shelf.allocator)
        self._complete, self._leases = self.shelf.blocks, self.shelf.leases
        self._ids = itertools.count(first_id)
        self._now_s = -math.inf
        self.below: Callable[[bytes], bool] = lambda _: False  # whether a slower tier has a block
        self.retired = False  # then nothing more is taken, and what is there is read as ever
        self._sizes: dict[int, int] = {}
        self.hits = self.misses = self.commits = self.pins_refused = 0
        self.drops = self.checksum_failures = 0  # why blocks went that were not evicted
        self.puts_begun = self.puts_refused = self._fills_discarded = 0

    # ------------------------------------------------------------ readers

    def acquire(self, now_s: float, keys: Sequence[bytes], lease_s: float) -> Acquired:
        """Lease the longest complete prefix of `keys` for `lease_s` (at most limits.lease_s_max).

        Raises:
            RequestError: malformed keys or lease_s.
            CapacityError: too many leases.
        """
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        entries = self._prefix(keys)
        reply = self._lease(keys, entries, lease_s, len(keys) - 1)
        self.hits += len(entries)
        self.misses += len(keys) - len(entries)
        return reply

    def first_writing(self, now_s: float, keys: Sequence[bytes]) -> bytes | None:
        """Return the key that ends the complete prefix, if it is being written; else None."""
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        for key in keys:
            if key not in self._complete:
                return key if key in self.writing else None
        return None

    def key_in_writing(self, ticket: int) -> bytes | None:
        """Return the key that `ticket` was given for, if it can still be committed."""
        return self.writing.key_of(ticket)

    def is_writing(self, key: bytes) -> bool:
        """Return whether `key` is reserved and neither committed nor given up."""
        return key in self.writing

    def release(self, now_s: float, lease_id: int) -> None:
        """End a lease; unknown and expired ones are fine."""
        self.tick(now_s)
        self.shelf.free(self._leases.end(lease_id))

    # ------------------------------------------------------------ writers

    def reserve(
        self,
        now_s: float,
        writer: str,
        keys: Sequence[bytes],
        size_bytes: int,
        tags: Tags = PLAIN,
        *,
        replace: bool = False,
        keep: bool = False,
    ) -> Reserved:
        """Allocate `size_bytes` for each key, evicting as needed.

        `tags` hold for the blocks once they are committed; pins also for those that are there already. With
        `replace` a block that is there is no reason to allocate nothing: the commit takes its place. With
        `keep` a block that is only `below` is there.

        Raises:
            RequestError: malformed keys, writer or tags; a size that could never fit.
        """
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        _check_writer(writer)
        tags.check()
        capacity_bytes = self.shelf.allocator.capacity_bytes
        if not 0 < size_bytes <= capacity_bytes:
            raise RequestError(f"size_bytes={size_bytes}: must be 1 to {capacity_bytes}")
        size_bytes = self._shared_size(size_bytes)
        expires_s = self._now_s + self.limits.write_s
        offsets, tickets, full = [], [], False
        depth, below = (None, None) if tags.depth < 0 else (tags.depth, len(keys) - 1)
        policy = self.policy.bulk if tags is PLAIN else self.policy  # a pin may be given on the way
        for at, key in enumerate(keys):
            ticket, offset = 0, PRESENT
            if depth is not None:
                depth, below = tags.depth + at, len(keys) - 1 - at
            if not replace and (entry := self._complete.get(key)) is not None:
                if key not in self._leases.held:
                    policy.touch(key, below)
                if tags is not PLAIN:
                    self._pin(key, entry.size_bytes, tags)
            elif key in self.writing or (keep and not replace and self.below(key)):
                pass
            elif not self._makes_way(tags.tenant, size_bytes):
                offset = OVER_QUOTA
            else:
                found = None if full else self._place(size_bytes)
                # once one did not fit, the others of this request will not either
                full = found is None
                offset = FULL if found is None else found
                if found is not None:
                    ticket = next(self._ids)
                    self.writing.begin(
                        Write(ticket, writer, key, found, size_bytes, expires_s, tags, depth, below)
                    )
            offsets.append(offset)
            tickets.append(ticket)
        self.puts_begun += len(keys)
        self.puts_refused += tickets.count(0)
        return Reserved(offsets, tickets)

    def commit(self, now_s: float, tickets: Sequence[int], checksums: Sequence[bytes]) -> Committed:
        """Make written blocks visible. A ticket that is unknown, expired or used gives False.

        Raises:
            RequestError: not one 16-byte checksum per ticket; nothing is committed then.
        """
        self.tick(now_s)
        check_count(tickets, self.limits.keys_max)
        if len(tickets) != len(checksums) or any(len(c) != CHECKSUM_BYTES for c in checksums):
            raise RequestError(f"commit needs one checksum of {CHECKSUM_BYTES} bytes per ticket")
        done, written = [], []
        for ticket, checksum in zip(tickets, checksums, strict=True):
            write = self.writing.end(ticket)
            done.append(write is not None)
            if write is not None:
                self.shelf.show(self._now_s, write.key, write.offset, write.size_bytes, checksum)
                written.append(write)
        # the end of a prefix first: it is useless without its beginning
        for write in reversed(written):
            if write.tags is not PLAIN:
                self._admit(write.key, write.size_bytes, write.tags)
            self.policy.bulk.insert(write.key, aligned(write.size_bytes), write.depth, write.below)
        self.commits += len(written)
        return Committed(done)

    def grant(
        self, now_s: float, writer: str, size_bytes: int, count: int, count_max: int
    ) -> tuple[list[int], list[int]]:
        """Allocate room for objects that get their keys when they are complete.

        Args:
            now_s: see the module.
            writer: whose it is.
            size_bytes: of each.
            count: for these others are evicted.
            count_max: beyond `count` only what is free and not needed soon.

        Returns:
            Offsets and tickets of `count` to `count_max`, or none at all.

        Raises:
            RequestError: malformed writer or sizes.
        """
        self.tick(now_s)
        _check_writer(writer)
        allocator, writing = self.shelf.allocator, self.writing
        capacity = allocator.capacity_bytes
        if not 0 < size_bytes <= capacity or not 0 < count <= count_max <= self.limits.keys_max:
            raise RequestError(f"{count} to {count_max} times {size_bytes} bytes: they could never fit")
        size = aligned(size_bytes)
        spare = capacity // GRANT_SHARE_MAX - writing.granted_bytes
        spare = min(spare, allocator.free_bytes - capacity // 8)
        wanted = max(count, min(count_max, spare // size))
        offsets: list[int] = []
        while len(offsets) < min(wanted, writing.grants_left):
            more = len(offsets) >= count
            offset = allocator.allocate(size_bytes) if more else self._place(size_bytes)
            if offset is None:
                break
            offsets.append(offset)
        if len(offsets) < count:
            for offset in offsets:
                allocator.free(offset, size_bytes)
            return [], []
        size_bytes = self._shared_size(size_bytes)
        tickets = list(itertools.islice(self._ids, len(offsets)))
        expires_s = self._now_s + self.limits.write_s
        for ticket, offset in zip(tickets, offsets, strict=True):
            writing.grant(Write(ticket, writer, b"", offset, size_bytes, expires_s, PLAIN, None, None))
        return offsets, tickets

    def give_back(self, writer: str, tickets: Sequence[int]) -> None:
        """Take back granted room in which its writer writes no more; others' is left alone."""
        self.writing.give_back(writer, tickets)

    def fill(self, ticket: int, key: bytes, checksum: bytes) -> bool:
        """Make an object in granted room visible; False: the ticket is over, or somebody else has the key.

        Nothing that is due is done before: what was written in time counts.

        Raises:
            RequestError: a malformed key or checksum.
        """
        if len(key) != KEY_BYTES or len(checksum) != CHECKSUM_BYTES:
            raise RequestError("a key or a checksum of an odd size")
        self.puts_begun += 1
        room = self.writing.end_grant(ticket)
        if room is None:
            self._fills_discarded += 1
            return False
        if key in self._complete or key in self.writing or self.below(key):
            self.shelf.allocator.free(room.offset, room.size_bytes)
            self.puts_refused += 1
            return False
        self.shelf.show(self._now_s, key, room.offset, room.size_bytes, checksum)
        self.policy.bulk.insert(key, aligned(room.size_bytes))
        self.commits += 1
        return True

    def abandon(self, now_s: float, writer: str, tickets: Sequence[int]) -> None:
        """Give up `tickets` of `writer`, or all of them if none are named; others' are left alone.

        Raises:
            RequestError: malformed writer, too many tickets.
        """
        self.tick(now_s)
        _check_writer(writer)
        check_count(tickets, self.limits.keys_max)
        self.writing.abandon(self._now_s, writer, tickets)

    # ------------------------------------------------------------ pins and quotas

    def pin(self, now_s: float, keys: Sequence[bytes], ttl_s: float) -> int:
        """Pin those of `keys` that are complete; return how many are as it was asked for.

        Args:
            now_s: see the module.
            keys: any.
            ttl_s: until they have not been hit for that long; infinity: until they are unpinned; 0: unpin.

        Raises:
            RequestError: malformed keys or ttl_s.
        """
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        check_pin_s(ttl_s)
        done = 0
        for key in keys:
            entry = self._complete.get(key)
            if entry is None:
                continue
            if ttl_s:
                hard = math.isinf(ttl_s)
                done += self._pin(key, entry.size_bytes, Tags(soft_pin_s=0 if hard else ttl_s, hard_pin=hard))
            else:
                self.policy.unpin(key)
                done += 1
        return done

    def set_quota(
        self, now_s: float, tenant: str, quota_bytes: int | None, *, strict: bool = False
    ) -> TenantUse:
        """Give a tenant a share, None ends it; `strict`: a wall, see kvstore.node.tenants; return its use.

        Raises:
            RequestError: no name, or a negative quota.
            CapacityError: too many quotas.
        """
        self.tick(now_s)
        Tags(tenant).check()
        if not tenant:
            raise RequestError("a quota needs the name of a tenant")
        self.policy.set_quota(tenant, quota_bytes, strict=strict)
        return self.policy.tenants.use(tenant)

    # ------------------------------------------------------------ room kept free

    def evict_ahead(
        self, now_s: float, above_bytes: int, down_to_bytes: int, may_go: Callable[[bytes], bool] | None
    ) -> int:
        """See Shelf."""
        self.tick(now_s)
        return self.shelf.evict_ahead(self._now_s, above_bytes, down_to_bytes, may_go)

    # ------------------------------------------------------------ bad and unwanted blocks

    def lease_for_check(self, now_s: float, key: bytes, lease_s: float) -> Acquired:
        """Hold one block in place while it is re-hashed; counts neither hit nor miss. Raises as acquire."""
        self.tick(now_s)
        check_keys([key])
        return self._lease([key], self._prefix([key]), lease_s)

    def hold(self, now_s: float, keys: Sequence[bytes], lease_s: float) -> tuple[int, list[bytes]]:
        """Keep those of `keys` that are complete in place for `lease_s`; counts neither hit nor miss.

        Returns:
            (lease, 0 if none is complete; the keys it holds, in order)

        Raises:
            RequestError, CapacityError: as acquire.
        """
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        found = [key for key in keys if key in self._complete]
        return self._lease(found, self._prefix(found), lease_s).lease_id, found

    def used(self, now_s: float, keys: Sequence[bytes], misses: int) -> None:
        """Count hits, which need no lease any more, and misses, of readers that looked by themselves."""
        self.tick(now_s)
        check_count(keys, self.limits.keys_max)
        self.hits += len(keys)
        self.misses += max(0, misses)
        self.note_reads([key for key in keys if key in self._complete])
        self.touch(keys)

    def note_reads(self, keys: Sequence[bytes]) -> None:
        """Remember that somebody has just read these, which are complete: see `read_within`."""
        self.shelf.reads.note(self._now_s, keys)

    def read_within(self, now_s: float, keys: Sequence[bytes], read_s: float) -> list[bytes]:
        """Return those of `keys` that were read in the last `read_s`; as many as are remembered.

        Raises:
            RequestError: read_s makes no sense.
        """
        self.tick(now_s)
        if not read_s >= 0:
            raise RequestError(f"unless_read_s={read_s}: must not be negative")
        return self.shelf.reads.since(self._now_s - read_s, keys)

    def pass_through(self, keys: Sequence[bytes], reads: int) -> None:
        """Give complete blocks up first, until they were read `reads` times."""
        for key in keys:
            entry = self._complete.get(key)
            if entry is not None and key not in self._leases.held:
                self.policy.pass_through(key, aligned(entry.size_bytes), reads)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of complete blocks that needs no lease: it is over already."""
        for key in keys:
            if key in self._complete and key not in self._leases.held:
                self.policy.touch(key)

    def drop_bad(self, now_s: float, key: bytes, block: Block) -> None:
        """Drop `key` if it still is that `block` of lease_for_check, whose bytes were found to be wrong."""
        self.tick(now_s)
        entry = self._complete.get(key)
        if entry is not None and entry == block:
            self.checksum_failures += 1
            self.shelf.drop(key)

    def drop(self, now_s: float, keys: Sequence[bytes]) -> int:
        """Remove complete blocks at once; leased ones are hidden now and freed later. Returns how many.

        Raises:
            RequestError: malformed keys.
        """
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        found = [key for key in dict.fromkeys(keys) if key in self._complete]
        for key in found:
            self.shelf.drop(key)
        self.drops += len(found)
        return len(found)

    # ------------------------------------------------------------ time, events, numbers

    def tick(self, now_s: float) -> None:
        """Do what is due: leases end, writes without commit enter quarantine, quarantine ends."""
        self._now_s = now_s = max(now_s, self._now_s)
        self.shelf.tick(now_s)
        self.writing.tick(now_s)

    def drain_events(self) -> NodeEvents:
        """Return the net changes since the last drain and forget them."""
        return self.shelf.changes.drain()

    @property
    def has_events(self) -> bool:
        """Whether `drain_events` would return anything."""
        return len(self.shelf.changes) > 0

    def block_of(self, key: bytes) -> Block | None:
        """Return the visible block under `key`; counts neither hit nor miss."""
        return self._complete.get(key)

    def complete_keys(self) -> list[bytes]:
        """Return every visible key, in commit order."""
        return list(self._complete)

    def stats(self) -> StoreStats:
        """Return counters since start and gauges now."""
        shelf = self.shelf
        return StoreStats(
            capacity_bytes=shelf.allocator.capacity_bytes,
            used_bytes=shelf.allocator.used_bytes,
            blocks=len(self._complete),
            writing=len(self.writing),
            leases=len(self._leases),
            evicted_bytes=shelf.evicted_bytes,
            eviction_attempts=shelf.eviction_attempts,
            eviction_successes=shelf.eviction_successes,
            puts_begun=self.puts_begun,
            puts_refused=self.puts_refused,
            puts_discarded=self.writing.given_up + self._fills_discarded,
            drops=self.drops,
            soft_pins=self.policy.soft_pins,
            tenants=self.policy.tenants.strict_use(),
            granted_bytes=self.writing.granted_bytes,
            hits=self.hits,
            misses=self.misses,
            evictions=shelf.evictions,
            checksum_failures=self.checksum_failures,
            commits=self.commits,
            hard_pinned_bytes=self.policy.hard_bytes,
            soft_pinned_bytes=self.policy.soft_bytes,
        )

    # ------------------------------------------------------------ inside

    def _prefix(self, keys: Sequence[bytes]) -> list[Entry]:
        entries = []
        for key in keys:
            entry = self._complete.get(key)
            if entry is None:
                break
            entries.append(entry)
        return entries

    def _lease(
        self, keys: Sequence[bytes], entries: list[Entry], lease_s: float, below: int = -1
    ) -> Acquired:
        self._leases.check(lease_s, len(entries))
        if not entries:
            return Acquired(0, [])
        lease_id = next(self._ids)
        self._leases.begin(self._now_s, lease_id, keys, entries, lease_s, below)
        return Acquired(lease_id, list[Block](entries))

    def _admit(self, key: bytes, size_bytes: int, tags: Tags) -> None:
        if tags.tenant or tags.group:
            self.policy.admit(key, aligned(size_bytes), tags.tenant or None, tags.group or None)
        self._pin(key, size_bytes, tags)

    def _pin(self, key: bytes, size_bytes: int, tags: Tags) -> bool:
        """Pin as the tags say, if there is room for it; a block is cached all the same."""
        try:
            if tags.hard_pin:
                self.policy.pin_hard(key, aligned(size_bytes))
            elif tags.soft_pin_s:
                self.policy.pin_soft(key, aligned(size_bytes), tags.soft_pin_s)
        except CapacityError:
            self.pins_refused += 1
            return False
        return True

    def _shared_size(self, size_bytes: int) -> int:
        if len(self._sizes) < SIZES_MAX:
            return self._sizes.setdefault(size_bytes, size_bytes)
        return self._sizes.get(size_bytes, size_bytes)

    def _place(self, size_bytes: int) -> int | None:
        """Return an offset, after evicting what is needed; None = no room."""
        return None if self.retired or self.writing.is_full else self.shelf.place(self._now_s, size_bytes)

    def _makes_way(self, tenant: str, size_bytes: int) -> bool:
        """Return whether `tenant` may write a block, after it gave what its strict quota asks for."""
        if not tenant:
            return True
        return self.shelf.make_way(self._now_s, tenant, aligned(size_bytes) + self.writing.bytes_of(tenant))


def _check_writer(writer: str) -> None:
    if not 0 < len(writer) <= WRITER_CHARS_MAX:
        raise RequestError(f"writer has {len(writer)} characters: must be 1 to {WRITER_CHARS_MAX}")
