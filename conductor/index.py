"""Which store nodes hold which blocks: soft state built from node events (DESIGN 2.2, 5.7).

One dict from a block's whole key to an int bitmask of nodes. Its hash is a 64-bit digest of the
key and its equality compares all 32 bytes, so two keys can never be taken for one another. Masks
are shared objects (a cluster has few distinct ones), so a block costs its key and a dict slot.

A node that restarts or leaves takes a fresh bit: its old bit is masked out at once and swept out
of the dict only when several are dead, bit by bit (`sweep`), so a restart never stops the gateway for
a whole scan.
Losing this index costs hit rate, never correctness: engines look into the pool for themselves.
"""

from collections.abc import Sequence
from itertools import islice

import msgspec

from mooncake.core.errors import ProtocolError
from mooncake.core.keys import KEY_BYTES

BLOCKS_MAX = 4_000_000
"""About 0.5 GB of index; at 32 tokens a block, 128 M cached tokens, the size of a large cluster."""
DROP_FRACTION = 16
"""When full, the oldest 1/16 goes in one pass: deleting a dict's first entry one by one would
rescan the holes left by the ones before it."""
DEAD_BITS_MAX = 8
"""Restarts before dead bits are swept: masks stay within a machine word, a sweep stays rare."""
SWEPT_PER_KEY = 2
"""Keys swept for each key applied: whatever else calls `sweep`, one ends before the next is due."""
SHARED_MASKS_MAX = 65_536
"""Distinct holder sets remembered for sharing; beyond this, sharing starts afresh."""


class IndexStats(msgspec.Struct, frozen=True):
    """Gauges now, counters since start. `blocks` includes blocks of nodes not yet swept."""

    blocks: int
    nodes: int
    dropped: int
    sweeps: int


def _split(blob: bytes) -> list[bytes]:
    if len(blob) % KEY_BYTES:
        raise ProtocolError(f"blob of {len(blob)} bytes is not a whole number of {KEY_BYTES}-byte keys")
    return [blob[start : start + KEY_BYTES] for start in range(0, len(blob), KEY_BYTES)]


class PrefixIndex:
    """Block key -> bitmask of store nodes. Bounded; oldest keys are dropped first, and counted."""

    def __init__(self, blocks_max: int = BLOCKS_MAX, dead_bits_max: int = DEAD_BITS_MAX) -> None:
        """Keep at most `blocks_max` keys; beyond, the oldest go (counted in `stats`)."""
        assert blocks_max >= 1
        self._dead_bits_max = dead_bits_max
        self._blocks_max = blocks_max
        self._holders: dict[bytes, int] = {}
        self._masks: dict[int, int] = {}
        self._bits: dict[str, int] = {}  # node -> its bit, as a mask
        self._nodes: dict[int, str] = {}  # bit -> node
        self._live = 0
        self._dead = 0
        self._sweeping = 0  # the dead bits that the sweep under way takes out
        self._unswept: list[bytes] = []
        self._dropped = 0
        self._sweeps = 0

    def apply(self, node: str, stored: bytes, removed: bytes) -> None:
        """Apply one StoreEvents message (also a snapshot page: stored=page.keys, removed=b"").

        Args:
            node: the store node that speaks.
            stored: blob of 32-byte keys it now holds.
            removed: blob of 32-byte keys it no longer holds; applied after `stored`.

        Raises:
            ProtocolError: a blob is not a whole number of 32-byte keys; nothing was applied.
        """
        stored_keys, removed_keys = _split(stored), _split(removed)
        bit = self._bit(node)
        holders, masks, live = self._holders, self._masks, self._live
        if len(masks) > SHARED_MASKS_MAX:
            masks.clear()
        for key in stored_keys:
            mask = (holders.get(key, 0) & live) | bit
            holders[key] = masks.setdefault(mask, mask)
        for key in removed_keys:
            mask = holders.get(key, 0) & live & ~bit
            if mask:
                holders[key] = masks.setdefault(mask, mask)
            else:
                holders.pop(key, None)
        if len(holders) > self._blocks_max:
            self._drop_oldest()
        if self._sweeping:
            self.sweep(SWEPT_PER_KEY * (len(stored_keys) + len(removed_keys)))

    def reset(self, node: str) -> None:
        """Forget what a node held: it restarted empty, or a snapshot follows a gap."""
        bit = self._bits.pop(node, 0)
        if not bit:
            return
        del self._nodes[bit]
        self._live &= ~bit
        self._dead |= bit
        if self._dead.bit_count() >= self._dead_bits_max and not self._sweeping:
            self._sweeping = self._dead
            self._unswept = list(self._holders)
            self.sweep(0)

    def drop(self, node: str) -> None:
        """Forget a node that is gone for good."""
        self.reset(node)

    def longest_prefix(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Return node -> number of leading `keys` it holds; nodes with none are left out.

        Exact also where eviction left holes: a node stops counting at its first missing block.
        The order of the result is deepest last, then by bit: the same for the same events.
        """
        hits: dict[str, int] = {}
        current = self._live
        get = self._holders.get
        depth = 0
        for key in keys:
            here = get(key, 0)
            if here != current:
                left = current & ~here
                if left:
                    self._note(hits, left, depth)
                    current &= here
                    if not current:
                        return hits
            depth += 1
        self._note(hits, current, depth)
        return hits

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Return the nodes that hold one block, by bit."""
        mask = self._holders.get(key, 0) & self._live
        return tuple(node for bit, node in self._nodes.items() if mask & bit)

    @property
    def sweeping(self) -> bool:
        """Whether there are dead bits to sweep out now."""
        return bool(self._sweeping)

    def sweep(self, keys_max: int) -> None:
        """Take dead bits out of at most `keys_max` keys; nothing if no sweep is under way."""
        holders, masks, live, unswept = self._holders, self._masks, self._live, self._unswept
        for _ in range(min(keys_max, len(unswept))):
            key = unswept.pop()
            mask = holders.get(key, 0)
            if not mask & live:
                holders.pop(key, None)
            elif mask & ~live:
                holders[key] = masks.setdefault(mask & live, mask & live)
        if self._sweeping and not unswept:
            # what was written meanwhile was written without dead bits
            self._dead &= ~self._sweeping
            self._sweeping = 0
            self._sweeps += 1

    def stats(self) -> IndexStats:
        """Return gauges and counters."""
        return IndexStats(len(self._holders), len(self._bits), self._dropped, self._sweeps)

    def _bit(self, node: str) -> int:
        bit = self._bits.get(node)
        if bit is None:
            used = self._live | self._dead
            bit = ~used & (used + 1)  # lowest bit that is neither live nor waiting for a sweep
            self._bits[node] = bit
            self._nodes[bit] = node
            self._live |= bit
        return bit

    def _note(self, hits: dict[str, int], mask: int, depth: int) -> None:
        if not depth:
            return
        while mask:
            bit = mask & -mask
            hits[self._nodes[bit]] = depth
            mask ^= bit

    def _drop_oldest(self) -> None:
        count = max(len(self._holders) - self._blocks_max, self._blocks_max // DROP_FRACTION)
        for key in list(islice(self._holders, count)):
            del self._holders[key]
        self._dropped += count
