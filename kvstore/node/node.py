"""A store node as a pure state machine: (now_s, request) -> reply, plus events (DESIGN 2.2, 5, 6).

A block is *writing* (reserved, has a ticket) -> *complete* (visible, immutable) -> *gone*.
Where its memory is:

    reserve --> writing --commit--> complete --evict or drop--> free
                   |                   '--drop while leased--> hidden --last lease ends--> free
                   '--abandon or write deadline--> quarantine --QUARANTINE_S--> free

What is hit, pinned, grouped or over its quota is the policy's to know (kvstore.node.pins); the node tells it
of every use and evicts what it names. A lease on one block of a group holds the whole group.

A lost writer may be stopped, not dead, and write late; a range it may still hit rests in quarantine
before it is used again. Only complete, unleased blocks are evicted. Ids (leases, tickets) carry the
node's epoch, so those of an earlier start are recognised by both sides (`id_base`).

No clock here: `now_s` is any monotonic time; every call first does what has become due.
"""

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from hashlib import sha256

import msgspec

from kvstore.limits import (
    EVICTIONS_PER_KEY_MAX,
    GRANT_SHARE_MAX,
    WRITER_CHARS_MAX,
    NodeLimits,
    check_count,
    check_keys,
)
from kvstore.node.ages import AgeHistogram
from kvstore.node.allocator import OffsetAllocator, aligned
from kvstore.node.blocks import Entry, Write
from kvstore.node.leases import Leases
from kvstore.node.pins import PLAIN, Guarded, Tags, TenantUse, check_pin_s
from kvstore.node.reads import Reads
from kvstore.table import Table
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import Acquired, Block, Committed, Reserved, StoreStats

CHECKSUM_BYTES = 16
PRESENT = -1
"""In Reserved.offsets (wire contract): already complete, or being written by somebody."""
FULL = -2
"""In Reserved.offsets (wire contract): no room."""
OVER_QUOTA = -3
"""In Reserved.offsets (wire contract): beyond the tenant's strict quota."""
QUOTA_USED_UP = "the tenant's quota is used up"
"""In the reason of such a refusal, by which callers tell it from others."""
AHEAD_MAX = 1_024
"""Blocks evicted ahead at a time, a millisecond or two: the store has callers. The rest goes next."""
ID_BITS = 40
"""Ids of one epoch: 2**40, a million a second for twelve days."""
SIZES_MAX = 64
"""Block sizes whose number is stored once for all blocks, not 32 bytes each: those of so many models."""
HARD_PIN_RATIO = 0.5
"""Of the segment: the other half stays a cache, whatever is pinned."""


def id_base(epoch: str) -> int:
    """Return the first id of `epoch`; its ids are those with the same value above ID_BITS."""
    return (int.from_bytes(sha256(epoch.encode()).digest()[:4], "little") >> 10) + 1 << ID_BITS


class NodeEvents(msgspec.Struct, frozen=True):
    """Net changes of the complete set since the last drain; no key is in both."""

    stored: list[bytes]
    removed: list[bytes]


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
        self._allocator = OffsetAllocator(capacity_bytes)
        self.policy = policy if policy is not None else Guarded(int(capacity_bytes * HARD_PIN_RATIO))
        self._ids = itertools.count(first_id)
        self._now_s = -math.inf
        self._complete: dict[bytes, Entry] = {}
        self._leases = Leases(self.limits, self.policy, self._complete)
        self._writes: OrderedDict[int, Write] = OrderedDict()  # by ticket, oldest first
        self._writing: dict[bytes, int] = {}  # key -> ticket
        self._granted: OrderedDict[int, Write] = OrderedDict()  # by ticket, oldest first; without a key
        self.granted_bytes = 0
        self._quarantine: deque[tuple[float, int, int]] = deque()  # (until_s, offset, size), ascending
        self._pending: dict[bytes, bool] = {}  # net change per key: stored or removed
        self._reads = Reads()
        self.quarantined_bytes = 0
        self.below: Callable[[bytes], bool] = lambda _: False  # whether a slower tier has a block
        self.retired = False  # then nothing more is taken, and what is there is read as ever
        self.table = table
        self._second = 0
        self._sizes: dict[int, int] = {}
        self.hits = self.misses = self.commits = self.pins_refused = 0
        self.evictions = self.drops = self.checksum_failures = 0  # why blocks went
        self.evicted_bytes = self.eviction_attempts = self.eviction_successes = 0
        self.puts_begun = self.puts_refused = self.puts_discarded = 0
        self._writing_of: dict[str, int] = {}  # bytes in writing for tenants
        self.ages = AgeHistogram()  # of evicted ones

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
                return key if key in self._writing else None
        return None

    def key_in_writing(self, ticket: int) -> bytes | None:
        """Return the key that `ticket` was given for, if it can still be committed."""
        write = self._writes.get(ticket)
        return write.key if write else None

    def is_writing(self, key: bytes) -> bool:
        """Return whether `key` is reserved and neither committed nor given up."""
        return key in self._writing

    def release(self, now_s: float, lease_id: int) -> None:
        """End a lease; unknown and expired ones are fine."""
        self.tick(now_s)
        self._free(self._leases.end(lease_id))

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
        if not 0 < size_bytes <= self._allocator.capacity_bytes:
            raise RequestError(f"size_bytes={size_bytes}: must be 1 to {self._allocator.capacity_bytes}")
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
            elif key in self._writing or (keep and not replace and self.below(key)):
                pass
            elif not self._makes_way(tags.tenant, size_bytes):
                offset = OVER_QUOTA
            else:
                found = None if full else self._place(size_bytes)
                # once one did not fit, the others of this request will not either
                full = found is None
                offset = FULL if found is None else found
                if found is not None:
                    self._note_writing(tags.tenant, 1, size_bytes)
                    ticket = next(self._ids)
                    self._writes[ticket] = Write(
                        ticket, writer, key, found, size_bytes, expires_s, tags, depth, below
                    )
                    self._writing[key] = ticket
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
        if self._now_s >= self._second + 1:
            self._second = math.floor(self._now_s)
        done, written = [], []
        for ticket, checksum in zip(tickets, checksums, strict=True):
            write = self._writes.pop(ticket, None)
            done.append(write is not None)
            if write is None:
                continue
            del self._writing[write.key]
            replaces = write.key in self._complete
            if replaces:
                self._free_old(write.key)
            self._note_writing(write.tags.tenant, -1, write.size_bytes)
            self._complete[write.key] = Entry(write.offset, write.size_bytes, checksum, self._second)
            if self.table is not None:
                show = self.table.replace if replaces else self.table.add
                show(write.key, write.offset, write.size_bytes, checksum)
            if not replaces:
                self._note(write.key, stored=True)
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
        capacity = self._allocator.capacity_bytes
        if not 0 < size_bytes <= capacity or not 0 < count <= count_max <= self.limits.keys_max:
            raise RequestError(f"{count} to {count_max} times {size_bytes} bytes: they could never fit")
        size = aligned(size_bytes)
        spare = capacity // GRANT_SHARE_MAX - self.granted_bytes
        spare = min(spare, self._allocator.free_bytes - capacity // 8)
        wanted = max(count, min(count_max, spare // size))
        offsets: list[int] = []
        while len(offsets) < wanted and len(self._granted) + len(offsets) < self.limits.writes_max:
            more = len(offsets) >= count
            offset = self._allocator.allocate(size_bytes) if more else self._place(size_bytes)
            if offset is None:
                break
            offsets.append(offset)
        if len(offsets) < count:
            for offset in offsets:
                self._allocator.free(offset, size_bytes)
            return [], []
        size_bytes = self._shared_size(size_bytes)
        tickets = list(itertools.islice(self._ids, len(offsets)))
        expires_s = self._now_s + self.limits.write_s
        for ticket, offset in zip(tickets, offsets, strict=True):
            self._granted[ticket] = Write(
                ticket, writer, b"", offset, size_bytes, expires_s, PLAIN, None, None
            )
        self.granted_bytes += size * len(offsets)
        return offsets, tickets

    def give_back(self, writer: str, tickets: Sequence[int]) -> None:
        """Take back granted room in which its writer writes no more; others' is left alone."""
        for ticket in tickets:
            grant = self._granted.get(ticket)
            if grant is not None and grant.writer == writer:
                self._end_grant(grant)
                self._allocator.free(grant.offset, grant.size_bytes)

    def fill(self, ticket: int, key: bytes, checksum: bytes) -> bool:
        """Make an object in granted room visible; False: the ticket is over, or somebody else has the key.

        Nothing that is due is done before: what was written in time counts.

        Raises:
            RequestError: a malformed key or checksum.
        """
        if len(key) != KEY_BYTES or len(checksum) != CHECKSUM_BYTES:
            raise RequestError("a key or a checksum of an odd size")
        self.puts_begun += 1
        grant = self._granted.get(ticket)
        if grant is None:
            self.puts_discarded += 1
            return False
        self._end_grant(grant)
        offset, size_bytes = grant.offset, grant.size_bytes
        if key in self._complete or key in self._writing or self.below(key):
            self._allocator.free(offset, size_bytes)
            self.puts_refused += 1
            return False
        if self._now_s >= self._second + 1:
            self._second = math.floor(self._now_s)
        self._complete[key] = Entry(offset, size_bytes, checksum, self._second)
        if self.table is not None:
            self.table.add(key, offset, size_bytes, checksum)
        self._note(key, stored=True)
        self.policy.bulk.insert(key, aligned(size_bytes))
        self.commits += 1
        return True

    def _end_grant(self, grant: Write) -> None:
        del self._granted[grant.ticket]
        self.granted_bytes -= aligned(grant.size_bytes)

    def _rest(self, write: Write) -> None:
        """Use the room of a writer again only when nothing can come there any more."""
        self._quarantine.append((self._now_s + self.limits.quarantine_s, write.offset, write.size_bytes))
        self.quarantined_bytes += aligned(write.size_bytes)

    def abandon(self, now_s: float, writer: str, tickets: Sequence[int]) -> None:
        """Give up `tickets` of `writer`, or all of them if none are named; others' are left alone.

        Raises:
            RequestError: malformed writer, too many tickets.
        """
        self.tick(now_s)
        _check_writer(writer)
        check_count(tickets, self.limits.keys_max)
        for ticket in list(tickets) or list(self._writes):
            write = self._writes.get(ticket)
            if write is not None and write.writer == writer:
                self._give_up(write)
        for ticket in list(tickets) or list(self._granted):
            grant = self._granted.get(ticket)
            if grant is not None and grant.writer == writer:
                self._end_grant(grant)
                self._rest(grant)

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
        """Give a tenant a share, None ends it; `strict`: a wall; see kvstore.node.pins. Returns what it has.

        Raises:
            RequestError: no name, or a negative quota.
            CapacityError: too many quotas.
        """
        self.tick(now_s)
        Tags(tenant).check()
        if not tenant:
            raise RequestError("a quota needs the name of a tenant")
        self.policy.set_quota(tenant, quota_bytes, strict=strict)
        return self.policy.use(tenant)

    # ------------------------------------------------------------ room kept free

    def evict_ahead(
        self, now_s: float, above_bytes: int, down_to_bytes: int, may_go: Callable[[bytes], bool] | None
    ) -> int:
        """If more than `above_bytes` are in use, evict until `down_to_bytes` are, AHEAD_MAX blocks at most.

        Args:
            now_s: see the module.
            above_bytes: in use, from where on something is done.
            down_to_bytes: less than that.
            may_go: asked for each block: one that has no copy on the SSD yet had better wait. None: all may.

        Returns:
            How many were evicted.
        """
        self.tick(now_s)
        used_bytes = self._allocator.used_bytes
        if used_bytes <= above_bytes:
            return 0
        victims = self.policy.bulk.victims(used_bytes - down_to_bytes)[:AHEAD_MAX]
        chosen = [key for key in victims if may_go is None or may_go(key)]
        self._evict(chosen)
        self.eviction_attempts += bool(chosen)
        self.eviction_successes += bool(chosen)
        return len(chosen)

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
        self._reads.note(self._now_s, keys)

    def read_within(self, now_s: float, keys: Sequence[bytes], read_s: float) -> list[bytes]:
        """Return those of `keys` that were read in the last `read_s`; as many as are remembered.

        Raises:
            RequestError: read_s makes no sense.
        """
        self.tick(now_s)
        if not read_s >= 0:
            raise RequestError(f"unless_read_s={read_s}: must not be negative")
        return self._reads.since(self._now_s - read_s, keys)

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
            self._drop(key)

    def drop(self, now_s: float, keys: Sequence[bytes]) -> int:
        """Remove complete blocks at once; leased ones are hidden now and freed later. Returns how many.

        Raises:
            RequestError: malformed keys.
        """
        self.tick(now_s)
        check_keys(keys, self.limits.keys_max)
        found = [key for key in dict.fromkeys(keys) if key in self._complete]
        for key in found:
            self._drop(key)
        self.drops += len(found)
        return len(found)

    # ------------------------------------------------------------ time, events, numbers

    def tick(self, now_s: float) -> None:
        """Do what is due: leases end, writes without commit enter quarantine, quarantine ends."""
        self._now_s = now_s = max(now_s, self._now_s)
        self.policy.tick(now_s)
        if self._leases.due_s <= now_s:
            self._free(self._leases.expire(now_s))
        while self._writes and (write := next(iter(self._writes.values()))).expires_s <= now_s:
            self._give_up(write)
        while self._granted and (grant := next(iter(self._granted.values()))).expires_s <= now_s:
            self._end_grant(grant)
            self._rest(grant)
        while self._quarantine and self._quarantine[0][0] <= now_s:
            _, offset, size_bytes = self._quarantine.popleft()
            self.quarantined_bytes -= aligned(size_bytes)
            self._allocator.free(offset, size_bytes)

    def drain_events(self) -> NodeEvents:
        """Return the net changes since the last drain and forget them."""
        pending, self._pending = self._pending, {}
        stored = [key for key, now_stored in pending.items() if now_stored]
        return NodeEvents(stored, [key for key, now_stored in pending.items() if not now_stored])

    @property
    def has_events(self) -> bool:
        """Whether `drain_events` would return anything."""
        return bool(self._pending)

    def block_of(self, key: bytes) -> Block | None:
        """Return the visible block under `key`; counts neither hit nor miss."""
        return self._complete.get(key)

    def complete_keys(self) -> list[bytes]:
        """Return every visible key, in commit order."""
        return list(self._complete)

    def stats(self) -> StoreStats:
        """Return counters since start and gauges now."""
        return StoreStats(
            capacity_bytes=self._allocator.capacity_bytes,
            used_bytes=self._allocator.used_bytes,
            blocks=len(self._complete),
            writing=len(self._writes),
            leases=len(self._leases),
            evicted_bytes=self.evicted_bytes,
            eviction_attempts=self.eviction_attempts,
            eviction_successes=self.eviction_successes,
            puts_begun=self.puts_begun,
            puts_refused=self.puts_refused,
            puts_discarded=self.puts_discarded,
            drops=self.drops,
            soft_pins=self.policy.soft_pins,
            tenants=self.policy.strict_use(),
            granted_bytes=self.granted_bytes,
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
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

    def _free(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._allocator.free(entry.offset, entry.size_bytes)

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
        if self.retired or len(self._writes) >= self.limits.writes_max:
            return None
        if (offset := self._allocator.allocate(size_bytes)) is not None:
            return offset
        policy = self.policy.bulk
        budget = EVICTIONS_PER_KEY_MAX
        self.eviction_attempts += 1
        while (offset := self._allocator.allocate(size_bytes)) is None:
            if self._allocator.free_bytes + policy.held_bytes < size_bytes:
                return None  # hopeless: evicting would only cost hits
            victims = policy.victims(size_bytes)[:budget]
            if not victims:
                return None
            budget -= len(victims)
            self._evict(victims)
        self.eviction_successes += 1
        return offset

    def _makes_way(self, tenant: str, size_bytes: int) -> bool:
        """Return whether `tenant` may write a block, after it gave what its strict quota asks for."""
        if not tenant:
            return True
        more_bytes = aligned(size_bytes) + self._writing_of.get(tenant, 0)
        need_bytes = self.policy.excess_bytes(tenant, more_bytes)
        if not need_bytes:
            return True
        victims = self.policy.victims_of(tenant, need_bytes)[:EVICTIONS_PER_KEY_MAX]
        self.eviction_attempts += 1
        if sum(aligned(self._complete[key].size_bytes) for key in victims) < need_bytes:
            return False
        self._evict(victims)
        self.eviction_successes += 1
        return not self.policy.excess_bytes(tenant, more_bytes)  # companions may be another tenant's

    def _note_writing(self, tenant: str, count: int, size_bytes: int) -> None:
        """Count blocks in writing: a quota is charged when they are complete, and must hold until then."""
        if tenant:
            self._writing_of[tenant] = self._writing_of.get(tenant, 0) + count * aligned(size_bytes)
            if not self._writing_of[tenant]:
                del self._writing_of[tenant]

    def _evict(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            entry = self._complete[key]
            self.ages.add(max(0.0, self._now_s - entry.since_s))
            self.evicted_bytes += aligned(entry.size_bytes)
            self._drop(key)
        self.evictions += len(keys)

    def _drop(self, key: bytes) -> None:
        entry = self._complete.pop(key)
        if self.table is not None:
            self.table.remove(key)
        self._note(key, stored=False)
        self._reads.forget(key)
        if not self._leases.hide(key):
            self.policy.bulk.remove(key)
            self._allocator.free(entry.offset, entry.size_bytes)
        self.policy.bulk.forget(key)

    def _free_old(self, key: bytes) -> None:
        """Let go of a block in whose place another one comes; who holds it reads on."""
        entry = self._complete.pop(key)
        self._reads.forget(key)
        if not self._leases.hide(key):
            self.policy.bulk.remove(key)
            self._allocator.free(entry.offset, entry.size_bytes)
        self.policy.bulk.forget(key)

    def _give_up(self, write: Write) -> None:
        del self._writes[write.ticket]
        del self._writing[write.key]
        self._note_writing(write.tags.tenant, -1, write.size_bytes)
        self.puts_discarded += 1
        self._rest(write)

    def _note(self, key: bytes, *, stored: bool) -> None:
        # a key that came and went (or went and came) since the last drain has no net change
        if key in self._pending:
            del self._pending[key]
        else:
            self._pending[key] = stored


def _check_writer(writer: str) -> None:
    if not 0 < len(writer) <= WRITER_CHARS_MAX:
        raise RequestError(f"writer has {len(writer)} characters: must be 1 to {WRITER_CHARS_MAX}")
