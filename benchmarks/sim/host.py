"""A simulated host: the production store node, its egress link, and what it tells the Conductor's index.

Blocks have no bytes here, so each takes the smallest place a node has and the capacity is scaled with it.
Events of the node reach the index at once: in production it takes them milliseconds.
"""

from collections.abc import Sequence

from benchmarks.sim.timeline import Link
from conductor.index import PrefixIndex
from kvstore.limits import LEASE_S_MAX
from kvstore.node.allocator import ALIGN_BYTES
from kvstore.node.eviction import POLICIES
from kvstore.node.node import CHECKSUM_BYTES, HARD_PIN_RATIO, Node
from kvstore.node.pins import PLAIN, Guarded, Tags

CHECKSUM = bytes(CHECKSUM_BYTES)


class Host:
    """`node` None = no store: nothing is ever found here."""

    def __init__(
        self, name: str, capacity_blocks: int, eviction: str, egress: Link, index: PrefixIndex
    ) -> None:
        """Start empty. `eviction` is a name of kvstore.node.eviction."""
        self.name = name
        self.egress = egress
        self._index = index
        self._tagged = eviction != "lru"  # only the others ask how deep a block stands
        size_bytes = capacity_blocks * ALIGN_BYTES
        policy = Guarded(int(size_bytes * HARD_PIN_RATIO), POLICIES[eviction])
        self.node = Node(size_bytes, policy=policy) if capacity_blocks else None
        self.arriving: dict[bytes, float] = {}  # blocks under way to here, and when they arrive

    def lease(self, now_s: float, keys: Sequence[bytes]) -> tuple[int, int]:
        """Lease the longest held prefix; return (lease, blocks)."""
        if self.node is None:
            return 0, 0
        got = self.node.acquire(now_s, keys, LEASE_S_MAX)
        self._tell()
        return got.lease_id, len(got.blocks)

    def release(self, now_s: float, lease: int) -> None:
        """End a lease."""
        if self.node is not None and lease:
            self.node.release(now_s, lease)

    def held(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first `keys` it holds; counts as no use."""
        if self.node is None:
            return 0
        found = 0
        while found < len(keys) and self.node.block_of(keys[found]) is not None:
            found += 1
        return found

    def store(self, now_s: float, keys: Sequence[bytes], depth: int) -> None:
        """Take blocks in that stand at `depth` of their prompt; as many of the first as find room."""
        if self.node is None or not keys:
            return
        tags = Tags(depth=depth) if self._tagged else PLAIN
        reserved = self.node.reserve(now_s, self.name, keys, ALIGN_BYTES, tags)
        tickets = [ticket for ticket in reserved.tickets if ticket]
        self.node.commit(now_s, tickets, [CHECKSUM] * len(tickets))
        self._tell()

    def _tell(self) -> None:
        assert self.node is not None
        if self.node.has_events:
            events = self.node.drain_events()
            self._index.apply(self.name, b"".join(events.stored), b"".join(events.removed))
