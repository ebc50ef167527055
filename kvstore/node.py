"""A store node as a pure state machine: (now_s, request) -> reply, plus events (DESIGN 2.2, 5, 6).

A block is *writing* (reserved, has a ticket) -> *complete* (visible, immutable) -> *gone*.
Where its memory is:

    reserve --> writing --commit--> complete --evict or drop--> free
                   |                   '--drop while leased--> hidden --last lease ends--> free
                   '--abandon or write deadline--> quarantine --QUARANTINE_S--> free

A lost writer may be stopped, not dead, and write late; a range it may still hit rests in quarantine
before it is used again. Only complete, unleased blocks are evicted. Ids (leases, tickets) carry the
node's epoch, so those of an earlier start are recognised by both sides (`id_base`).

No clock here: `now_s` is any monotonic time; every call first does what has become due.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import sha256

import msgspec

from kvstore.allocator import OffsetAllocator
from kvstore.eviction import EvictionPolicy, Lru
from kvstore.limits import EVICTIONS_PER_KEY_MAX, WRITER_CHARS_MAX, NodeLimits
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import Acquired, Block, Committed, Reserved, StoreStats

CHECKSUM_BYTES = 16
PRESENT = -1
"""In Reserved.offsets (wire contract): already complete, or being written by somebody."""
FULL = -2
"""In Reserved.offsets (wire contract): no room."""
ID_BITS = 40
"""Ids of one epoch: 2**40, a million a second for twelve days."""


def id_base(epoch: str) -> int:
    """Return the first id of `epoch`; its ids are those with the same value above ID_BITS."""
    return (int.from_bytes(sha256(epoch.encode()).digest()[:4], "little") >> 10) + 1 << ID_BITS


class NodeEvents(msgspec.Struct, frozen=True):
    """Net changes of the complete set since the last drain; no key is in both."""

    stored: list[bytes]
    removed: list[bytes]


class _Entry(msgspec.Struct, gc=False):
    """A block that was committed; `hidden` once dropped while `leases` > 0."""

    key: bytes
    block: Block
    leases: int = 0
    hidden: bool = False


class _Write(msgspec.Struct, frozen=True, gc=False):
    ticket: int
    writer: str
    key: bytes
    offset: int
    size_bytes: int
    expires_s: float


class _Lease(msgspec.Struct, frozen=True):
    entries: list[_Entry]
    expires_s: float


class Node:
    """Owns the truth about one segment of `capacity_bytes`. Not thread-safe: one loop drives it."""

    def __init__(
        self,
        capacity_bytes: int,
        limits: NodeLimits | None = None,
        policy: EvictionPolicy | None = None,
        first_id: int = 1,
    ) -> None:
        """Start empty.

        Args:
            capacity_bytes: multiple of 4096.
            limits: see kvstore.limits.
            policy: eviction order, LRU by default.
            first_id: `id_base(epoch)` in production.
        """
        self.limits = limits or NodeLimits()
        self._allocator = OffsetAllocator(capacity_bytes)
        self._policy: EvictionPolicy = policy if policy is not None else Lru()
        self._ids = itertools.count(first_id)
        self._now_s = -math.inf
        self._complete: dict[bytes, _Entry] = {}
        self._writes: OrderedDict[int, _Write] = OrderedDict()  # by ticket, oldest first
        self._writing: dict[bytes, int] = {}  # key -> ticket
        self._leases: dict[int, _Lease] = {}
        self._lease_heap: list[tuple[float, int]] = []  # may hold released leases
        self._leased_blocks = 0
        self._quarantine: deque[tuple[float, int]] = deque()  # (until_s, offset), ascending
        self._pending: dict[bytes, bool] = {}  # net change per key: stored or removed
        self.quarantined_bytes = 0
        self.hits = self.misses = self.evictions = self.checksum_failures = self.commits = 0

    # ------------------------------------------------------------ readers

    def acquire(self, now_s: float, keys: Sequence[bytes], lease_s: float) -> Acquired:
        """Lease the longest complete prefix of `keys` for `lease_s` (at most limits.lease_s_max).

        Raises:
            RequestError: malformed keys or lease_s.
            CapacityError: too many leases.
        """
        self.tick(now_s)
        self._check_keys(keys)
        entries = self._prefix(keys)
        reply = self._lease(entries, lease_s)
        self.hits += len(entries)
        self.misses += len(keys) - len(entries)
        return reply

    def first_writing(self, now_s: float, keys: Sequence[bytes]) -> bytes | None:
        """Return the key that ends the complete prefix, if it is being written; else None."""
        self.tick(now_s)
        self._check_keys(keys)
        for key in keys:
            if key not in self._complete:
                return key if key in self._writing else None
        return None

    def is_writing(self, key: bytes) -> bool:
        """Return whether `key` is reserved and neither committed nor given up."""
        return key in self._writing

    def release(self, now_s: float, lease_id: int) -> None:
        """End a lease; unknown and expired ones are fine."""
        self.tick(now_s)
        self._end_lease(lease_id)

    # ------------------------------------------------------------ writers

    def reserve(self, now_s: float, writer: str, keys: Sequence[bytes], size_bytes: int) -> Reserved:
        """Allocate `size_bytes` for each key, evicting as needed.

        Raises:
            RequestError: malformed keys or writer; a size that could never fit.
        """
        self.tick(now_s)
        self._check_keys(keys)
        _check_writer(writer)
        if not 0 < size_bytes <= self._allocator.capacity_bytes:
            raise RequestError(f"size_bytes={size_bytes}: must be 1 to {self._allocator.capacity_bytes}")
        offsets, tickets, full = [], [], False
        for key in keys:
            ticket, offset = 0, PRESENT
            if (entry := self._complete.get(key)) is not None:
                if not entry.leases:
                    self._policy.touch(key)
            elif key not in self._writing:
                found = None if full else self._place(size_bytes)
                # once one did not fit, the others of this request will not either
                full = found is None
                offset = FULL if found is None else found
                if found is not None:
                    ticket = next(self._ids)
                    expires_s = self._now_s + self.limits.write_s
                    write = _Write(ticket, writer, key, found, size_bytes, expires_s)
                    self._writes[ticket] = write
                    self._writing[key] = ticket
            offsets.append(offset)
            tickets.append(ticket)
        return Reserved(offsets, tickets)

    def commit(self, now_s: float, tickets: Sequence[int], checksums: Sequence[bytes]) -> Committed:
        """Make written blocks visible. A ticket that is unknown, expired or used gives False.

        Raises:
            RequestError: not one 16-byte checksum per ticket; nothing is committed then.
        """
        self.tick(now_s)
        self._check_count(tickets)
        if len(tickets) != len(checksums) or any(len(c) != CHECKSUM_BYTES for c in checksums):
            raise RequestError(f"commit needs one checksum of {CHECKSUM_BYTES} bytes per ticket")
        done, entries = [], []
        for ticket, checksum in zip(tickets, checksums, strict=True):
            write = self._writes.pop(ticket, None)
            done.append(write is not None)
            if write is None:
                continue
            del self._writing[write.key]
            entry = _Entry(write.key, Block(write.offset, write.size_bytes, checksum))
            self._complete[write.key] = entry
            self._note(write.key, stored=True)
            entries.append(entry)
        self._hold(entries)
        self.commits += len(entries)
        return Committed(done)

    def abandon(self, now_s: float, writer: str, tickets: Sequence[int]) -> None:
        """Give up `tickets` of `writer`, or all of them if none are named; others' are left alone.

        Raises:
            RequestError: malformed writer, too many tickets.
        """
        self.tick(now_s)
        _check_writer(writer)
        self._check_count(tickets)
        for ticket in list(tickets) or list(self._writes):
            write = self._writes.get(ticket)
            if write is not None and write.writer == writer:
                self._give_up(write)

    # ------------------------------------------------------------ bad and unwanted blocks

    def lease_for_check(self, now_s: float, key: bytes, lease_s: float) -> Acquired:
        """Hold one block in place while it is re-hashed; counts neither hit nor miss. Raises as acquire."""
        self.tick(now_s)
        self._check_keys([key])
        return self._lease(self._prefix([key]), lease_s)

    def hold(self, now_s: float, keys: Sequence[bytes], lease_s: float) -> tuple[int, list[bytes]]:
        """Keep those of `keys` that are complete in place for `lease_s`; counts neither hit nor miss.

        Returns:
            (lease, 0 if none is complete; the keys it holds, in order)

        Raises:
            RequestError, CapacityError: as acquire.
        """
        self.tick(now_s)
        self._check_keys(keys)
        entries = [entry for key in keys if (entry := self._complete.get(key))]
        return self._lease(entries, lease_s).lease_id, [entry.key for entry in entries]

    def drop_bad(self, now_s: float, key: bytes, block: Block) -> None:
        """Drop `key` if it still is that `block`, whose bytes were found to be wrong."""
        self.tick(now_s)
        entry = self._complete.get(key)
        if entry is not None and entry.block == block:
            self.checksum_failures += 1
            self._drop(entry)

    def drop(self, now_s: float, keys: Sequence[bytes]) -> int:
        """Remove complete blocks at once; leased ones are hidden now and freed later. Returns how many.

        Raises:
            RequestError: malformed keys.
        """
        self.tick(now_s)
        self._check_keys(keys)
        entries = [entry for key in dict.fromkeys(keys) if (entry := self._complete.get(key))]
        for entry in entries:
            self._drop(entry)
        return len(entries)

    # ------------------------------------------------------------ time, events, numbers

    def tick(self, now_s: float) -> None:
        """Do what is due: leases end, writes without commit enter quarantine, quarantine ends."""
        self._now_s = now_s = max(now_s, self._now_s)
        while self._lease_heap and self._lease_heap[0][0] <= now_s:
            self._end_lease(heapq.heappop(self._lease_heap)[1])
        while self._writes and (write := next(iter(self._writes.values()))).expires_s <= now_s:
            self._give_up(write)
        while self._quarantine and self._quarantine[0][0] <= now_s:
            offset = self._quarantine.popleft()[1]
            self.quarantined_bytes -= self._allocator.size_of(offset)
            self._allocator.free(offset)

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
        entry = self._complete.get(key)
        return entry.block if entry else None

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
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            checksum_failures=self.checksum_failures,
            commits=self.commits,
        )

    # ------------------------------------------------------------ inside

    def _prefix(self, keys: Sequence[bytes]) -> list[_Entry]:
        entries = []
        for key in keys:
            entry = self._complete.get(key)
            if entry is None:
                break
            entries.append(entry)
        return entries

    def _lease(self, entries: list[_Entry], lease_s: float) -> Acquired:
        if not (math.isfinite(lease_s) and lease_s > 0):
            raise RequestError(f"lease_s={lease_s}: must be positive")
        if not entries:
            return Acquired(0, [])
        room = self.limits.leased_blocks_max - self._leased_blocks
        if len(self._leases) >= self.limits.leases_max or len(entries) > room:
            raise CapacityError(f"{len(self._leases)} leases on {self._leased_blocks} blocks: no more here")
        lease_id = next(self._ids)
        expires_s = self._now_s + min(lease_s, self.limits.lease_s_max)
        self._leases[lease_id] = _Lease(entries, expires_s)
        if len(self._lease_heap) > 2 * self.limits.leases_max:  # released ones: sweep them out
            self._lease_heap = [(lease.expires_s, known) for known, lease in self._leases.items()]
            heapq.heapify(self._lease_heap)
        else:
            heapq.heappush(self._lease_heap, (expires_s, lease_id))
        self._leased_blocks += len(entries)
        for entry in entries:
            if not entry.leases:
                self._policy.remove(entry.key)
            entry.leases += 1
        return Acquired(lease_id, [entry.block for entry in entries])

    def _end_lease(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        self._leased_blocks -= len(lease.entries)
        free_again = []
        for entry in lease.entries:
            entry.leases -= 1
            if entry.leases:
                continue
            if entry.hidden:
                self._allocator.free(entry.block.offset)
            else:
                free_again.append(entry)
        self._hold(free_again)

    def _hold(self, entries: list[_Entry]) -> None:
        """Make blocks evictable, the end of a prefix first: it is useless without its beginning."""
        for entry in reversed(entries):
            self._policy.insert(entry.key, self._allocator.size_of(entry.block.offset))

    def _place(self, size_bytes: int) -> int | None:
        """Return an offset, after evicting what is needed; None = no room."""
        if len(self._writes) >= self.limits.writes_max:
            return None
        budget = EVICTIONS_PER_KEY_MAX
        while (offset := self._allocator.allocate(size_bytes)) is None:
            if self._allocator.free_bytes + self._policy.held_bytes < size_bytes:
                return None  # hopeless: evicting would only cost hits
            victims = self._policy.victims(size_bytes)[:budget]
            if not victims:
                return None
            budget -= len(victims)
            for key in victims:
                self._drop(self._complete[key])
            self.evictions += len(victims)
        return offset

    def _drop(self, entry: _Entry) -> None:
        del self._complete[entry.key]
        self._note(entry.key, stored=False)
        if entry.leases:
            entry.hidden = True
        else:
            self._policy.remove(entry.key)
            self._allocator.free(entry.block.offset)
        self._policy.forget(entry.key)

    def _give_up(self, write: _Write) -> None:
        del self._writes[write.ticket]
        del self._writing[write.key]
        self._quarantine.append((self._now_s + self.limits.quarantine_s, write.offset))
        self.quarantined_bytes += self._allocator.size_of(write.offset)

    def _note(self, key: bytes, *, stored: bool) -> None:
        # a key that came and went (or went and came) since the last drain has no net change
        if key in self._pending:
            del self._pending[key]
        else:
            self._pending[key] = stored

    def _check_count(self, items: Sequence[object]) -> None:
        if len(items) > self.limits.keys_max:
            raise RequestError(f"{len(items)} keys in one request: at most {self.limits.keys_max}")

    def _check_keys(self, keys: Sequence[bytes]) -> None:
        self._check_count(keys)
        for key in keys:
            if len(key) != KEY_BYTES:
                raise RequestError(f"a key has {KEY_BYTES} bytes, not {len(key)}")


def _check_writer(writer: str) -> None:
    if not 0 < len(writer) <= WRITER_CHARS_MAX:
        raise RequestError(f"writer has {len(writer)} characters: must be 1 to {WRITER_CHARS_MAX}")
