"""Complete blocks: where they lie, who reads them, and which give way to others. Pure.

What is hit, pinned, grouped or over its quota is the policy's to know (kvstore.node.pins); the shelf tells it
of every use and evicts what it names. A lease on one block of a group holds the whole group. Only unleased
blocks are evicted; one that is dropped while it is leased is hidden now and freed when its last lease ends.
"""

import math
from collections.abc import Callable, Sequence

from kvstore.limits import EVICTIONS_PER_KEY_MAX, NodeLimits
from kvstore.node.ages import AgeHistogram
from kvstore.node.allocator import OffsetAllocator, aligned
from kvstore.node.blocks import Entry
from kvstore.node.changes import Changes
from kvstore.node.leases import Leases
from kvstore.node.pins import Guarded
from kvstore.node.reads import Reads
from kvstore.table import Table

AHEAD_MAX = 1_024
"""Blocks evicted ahead at a time, a millisecond or two: the store has callers. The rest goes next."""


class Shelf:
    """The segment and what is complete in it. Who calls it has done what is due (`tick`)."""

    def __init__(self, capacity_bytes: int, limits: NodeLimits, policy: Guarded, table: Table | None) -> None:
        """Start empty."""
        self.allocator = OffsetAllocator(capacity_bytes)
        self.policy = policy
        self.blocks: dict[bytes, Entry] = {}
        self.leases = Leases(limits, policy, self.blocks)
        self.reads = Reads()
        self.changes = Changes()
        self.table = table
        """Where readers of the host look for complete blocks."""
        self.ages = AgeHistogram()  # of evicted ones
        self.evictions = self.evicted_bytes = self.eviction_attempts = self.eviction_successes = 0
        self._second = 0

    def tick(self, now_s: float) -> None:
        """End what is due."""
        self.policy.tick(now_s)
        if self.leases.due_s <= now_s:
            self.free(self.leases.expire(now_s))

    def free(self, entries: Sequence[Entry]) -> None:
        """Give back the room of blocks that are gone and that nobody reads any more."""
        for entry in entries:
            self.allocator.free(entry.offset, entry.size_bytes)

    # ------------------------------------------------------------ blocks come and go

    def show(self, now_s: float, key: bytes, offset: int, size_bytes: int, checksum: bytes) -> None:
        """Make a written block visible, in the place of another one if there is one.

        The policy is to be told of it by the caller, who knows what it goes with.
        """
        if now_s >= self._second + 1:
            self._second = math.floor(now_s)
        replaces = key in self.blocks
        if replaces:
            self._let_go(key)
        else:
            self.changes.note(key, stored=True)
        self.blocks[key] = Entry(offset, size_bytes, checksum, self._second)
        if self.table is not None:
            show = self.table.replace if replaces else self.table.add
            show(key, offset, size_bytes, checksum)

    def drop(self, key: bytes) -> None:
        """Remove a block at once."""
        if self.table is not None:
            self.table.remove(key)
        self.changes.note(key, stored=False)
        self._let_go(key)

    def _let_go(self, key: bytes) -> None:
        """Forget a block; who holds it reads on."""
        entry = self.blocks.pop(key)
        self.reads.forget(key)
        if not self.leases.hide(key):
            self.policy.bulk.remove(key)
            self.allocator.free(entry.offset, entry.size_bytes)
        self.policy.bulk.forget(key)

    # ------------------------------------------------------------ blocks give way

    def place(self, now_s: float, size_bytes: int) -> int | None:
        """Return the offset of a new range, after evicting what is needed; None = no room."""
        if (offset := self.allocator.allocate(size_bytes)) is not None:
            return offset
        policy = self.policy.bulk
        budget = EVICTIONS_PER_KEY_MAX
        self.eviction_attempts += 1
        while (offset := self.allocator.allocate(size_bytes)) is None:
            if self.allocator.free_bytes + policy.held_bytes < size_bytes:
                return None  # hopeless: evicting would only cost hits
            victims = policy.victims(size_bytes)[:budget]
            if not victims:
                return None
            budget -= len(victims)
            self._evict(now_s, victims)
        self.eviction_successes += 1
        return offset

    def make_way(self, now_s: float, tenant: str, more_bytes: int) -> bool:
        """Return whether `more_bytes` of a tenant fit, after it gave what its strict quota asks for."""
        need_bytes = self.policy.tenants.excess_bytes(tenant, more_bytes)
        if not need_bytes:
            return True
        victims = self.policy.victims_of(tenant, need_bytes)[:EVICTIONS_PER_KEY_MAX]
        self.eviction_attempts += 1
        if sum(aligned(self.blocks[key].size_bytes) for key in victims) < need_bytes:
            return False
        self._evict(now_s, victims)
        self.eviction_successes += 1
        return not self.policy.tenants.excess_bytes(tenant, more_bytes)  # companions may be another tenant's

    def evict_ahead(
        self, now_s: float, above_bytes: int, down_to_bytes: int, may_go: Callable[[bytes], bool] | None
    ) -> int:
        """If more than `above_bytes` are in use, evict until `down_to_bytes` are, AHEAD_MAX blocks at most.

        Args:
            now_s: see kvstore.node.node.
            above_bytes: in use, from where on something is done.
            down_to_bytes: less than that.
            may_go: asked for each block: one that has no copy on the SSD yet had better wait. None: all may.

        Returns:
            How many were evicted.
        """
        used_bytes = self.allocator.used_bytes
        if used_bytes <= above_bytes:
            return 0
        victims = self.policy.bulk.victims(used_bytes - down_to_bytes)[:AHEAD_MAX]
        chosen = [key for key in victims if may_go is None or may_go(key)]
        self._evict(now_s, chosen)
        self.eviction_attempts += bool(chosen)
        self.eviction_successes += bool(chosen)
        return len(chosen)

    def _evict(self, now_s: float, keys: Sequence[bytes]) -> None:
        for key in keys:
            entry = self.blocks[key]
            self.ages.add(max(0.0, now_s - entry.since_s))
            self.evicted_bytes += aligned(entry.size_bytes)
            self.drop(key)
        self.evictions += len(keys)
