"""A simulated host: the production store node, its egress link, and what it tells the Conductor.

Blocks have no bytes here, so each takes the smallest place a node has and the capacity is scaled with it.
A host that breaks down loses its blocks and what it was sending; it comes back empty, in another epoch.
"""

from collections.abc import Callable, Sequence

from benchmarks.sim.timeline import Link
from kvstore.limits import LEASE_S_MAX
from kvstore.node.allocator import ALIGN_BYTES
from kvstore.node.contract import CHECKSUM_BYTES, id_base
from kvstore.node.eviction import POLICIES
from kvstore.node.node import HARD_PIN_RATIO, Node
from kvstore.node.pins import Guarded
from kvstore.node.tags import PLAIN, Tags

CHECKSUM = bytes(CHECKSUM_BYTES)

Tell = Callable[[Sequence[bytes], Sequence[bytes]], None]
"""Hears which blocks came and which went."""


class Host:
    """`node` None = no store: nothing is ever found here."""

    def __init__(self, name: str, capacity_blocks: int, eviction: str, egress_bytes_s: float) -> None:
        """Start empty. `eviction` is a name of kvstore.node.eviction."""
        self.name = name
        self.tell: Tell | None = None
        self.lives = 1
        self.up = True
        self._eviction = eviction
        self._tagged = eviction != "lru"  # only the others ask how deep a block stands
        self.capacity_blocks = capacity_blocks
        self._egress_bytes_s = egress_bytes_s
        self._empty()

    def _empty(self) -> None:
        size_bytes = self.capacity_blocks * ALIGN_BYTES
        policy = Guarded(int(size_bytes * HARD_PIN_RATIO), POLICIES[self._eviction])
        # ids of another life are not to be taken for ours
        self.node = Node(size_bytes, policy=policy, first_id=id_base(self.epoch)) if size_bytes else None
        self.egress = Link(self._egress_bytes_s)
        self.arriving: dict[bytes, float] = {}  # blocks under way to here, and when they arrive

    @property
    def epoch(self) -> str:
        """Of this life."""
        return str(self.lives)

    def lose(self) -> None:
        """Break down."""
        self.up = False
        self.restart()

    def restart(self) -> None:
        """Lose everything; who had a part in it finds that `lives` has changed."""
        self.lives += 1
        self._empty()

    def keys(self) -> list[bytes]:
        """Return all blocks."""
        return [] if self.node is None else self.node.complete_keys()

    def lease(self, now_s: float, keys: Sequence[bytes]) -> tuple[int, int]:
        """Lease the longest held prefix; return (lease, blocks)."""
        if self.node is None or not self.up:
            return 0, 0
        got = self.node.acquire(now_s, keys, LEASE_S_MAX)
        self._tell()
        return got.lease_id, len(got.blocks)

    def release(self, now_s: float, lease: int) -> None:
        """End a lease; one of an earlier life is fine."""
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
        if self.node is None or not self.up or not keys:
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
            if self.tell is not None:
                self.tell(events.stored, events.removed)
