"""Who reads which block, and until when. Pure.

A leased block is not in the eviction policy; it comes back, as a use, when its last lease ends. A lease
on one block of a group holds the whole group, as far as the bounds allow.
"""

import heapq
import math
from collections.abc import Mapping, Sequence

import msgspec

from kvstore.limits import NodeLimits
from kvstore.node.allocator import aligned
from kvstore.node.blocks import Entry, Held
from kvstore.node.pins import Guarded
from mooncake.core.errors import CapacityError, RequestError


class _Lease(msgspec.Struct, frozen=True):
    blocks: list[Held]
    expires_s: float


class Leases:
    """The leases of one node."""

    def __init__(self, limits: NodeLimits, policy: Guarded, complete: Mapping[bytes, Entry]) -> None:
        """Start empty; `complete` is the node's, and looked at when a group is leased."""
        self.limits = limits
        self.blocks = 0  # sum over all leases
        self._policy = policy
        self._complete = complete
        self.held: dict[bytes, Held] = {}  # leased and visible
        self._leases: dict[int, _Lease] = {}
        self._heap: list[tuple[float, int]] = []  # may hold released leases

    def __len__(self) -> int:
        return len(self._leases)

    def check(self, lease_s: float, blocks: int) -> None:
        """Pass if so many blocks can be leased for so long.

        Raises:
            RequestError: lease_s makes no sense.
            CapacityError: too many leases.
        """
        if not (math.isfinite(lease_s) and lease_s > 0):
            raise RequestError(f"lease_s={lease_s}: must be positive")
        room = self.limits.leased_blocks_max - self.blocks
        if blocks and (len(self._leases) >= self.limits.leases_max or blocks > room):
            raise CapacityError(f"{len(self._leases)} leases on {self.blocks} blocks: no more here")

    def begin(
        self,
        now_s: float,
        lease_id: int,
        keys: Sequence[bytes],
        entries: Sequence[Entry],
        lease_s: float,
        below: int,
    ) -> None:
        """Lease `entries`, which belong to the first of `keys`; `below` keys come after the first one.

        Args:
            now_s: see kvstore.node.node.
            lease_id: new.
            keys: see above; in prefix order, if `below` is not -1.
            entries: at least one, after `check`.
            lease_s: cut to the limit.
            below: -1 = unknown.
        """
        blocks = self._take(keys, entries, below)
        if self._policy.has_groups:
            known = dict.fromkeys(keys[: len(entries)])
            group = dict.fromkeys(other for key in known for other in self._policy.companions(key))
            others = [key for key in group if key not in known]
            if len(others) <= self.limits.leased_blocks_max - self.blocks - len(blocks):
                blocks += self._take(others, [self._complete[key] for key in others], -1)
        self.blocks += len(blocks)
        expires_s = now_s + min(lease_s, self.limits.lease_s_max)
        self._leases[lease_id] = _Lease(blocks, expires_s)
        if len(self._heap) > 2 * self.limits.leases_max:  # released ones: sweep them out
            self._heap = [(lease.expires_s, known_id) for known_id, lease in self._leases.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (expires_s, lease_id))

    def end(self, lease_id: int) -> list[Entry]:
        """End a lease, if there is one; return the dropped blocks that nobody reads any more."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return []
        self.blocks -= len(lease.blocks)
        policy = self._policy.bulk
        unread = []
        for held in reversed(lease.blocks):  # the end of a prefix first, see Node.commit
            held.leases -= 1
            if held.leases:
                continue
            if held.hidden:
                unread.append(held.entry)
                continue
            del self.held[held.key]
            below = held.below if held.below >= 0 else None
            policy.insert(held.key, aligned(held.entry.size_bytes), None, below)
        return unread

    @property
    def due_s(self) -> float:
        """When `expire` may have something to do."""
        return self._heap[0][0] if self._heap else math.inf

    def expire(self, now_s: float) -> list[Entry]:
        """End what is due; returns as `end`."""
        unread = []
        while self._heap and self._heap[0][0] <= now_s:
            unread += self.end(heapq.heappop(self._heap)[1])
        return unread

    def hide(self, key: bytes) -> bool:
        """Say that `key` is dropped; return whether somebody still reads its block."""
        held = self.held.pop(key, None)
        if held is None:
            return False
        held.hidden = True
        return True

    def _take(self, keys: Sequence[bytes], entries: Sequence[Entry], below: int) -> list[Held]:
        blocks = []
        policy = self._policy.bulk
        for key, entry in zip(keys, entries, strict=False):
            held = self.held.get(key)
            if held is None:
                policy.remove(key)
                held = self.held[key] = Held(key, entry, 1, False, below)
            else:
                held.leases += 1
                held.below = max(held.below, below)
            blocks.append(held)
            below -= 1
        return blocks
