"""Which store nodes hold which blocks: soft state built from node events (DESIGN 2.2, 5.7).

Dicts from a block's short name to an int bitmask of nodes. Masks are shared objects (a cluster has
few distinct ones), so a block costs an int and a dict slot: 70 bytes at a million blocks. Two keys of one
name would be taken for one another here, and only here: engines load by whole keys. There are several dicts
because one of a million stops the gateway for a tenth of a second when it grows.

A node that restarts or leaves takes a fresh bit: its old bit is masked out at once and swept out
of the dict only when several are dead, bit by bit (`sweep`), so a restart never stops the gateway for
a whole scan.
Losing this index costs hit rate, never correctness: engines look into the pool for themselves.
"""

from collections.abc import Sequence
from itertools import islice, repeat

import msgspec

from mooncake.core.keys import block_names, names_of

LOOK_KEYS = 32
LOOK_KEYS_MAX = 128
"""Looked up at first, then twice as many each time up to 128: keys are made as they are looked up, and most
prompts end to be known long before they end."""
BLOCKS_MAX = 4_000_000
"""About 0.3 GB of index; at 32 tokens a block, 128 M cached tokens, the size of a large cluster."""
SHARD_BLOCKS = 1 << 16
"""Of one dict, at most twice as many: it grows within milliseconds."""
SPARSE_BYTES = 68
"""Of a dict per block; beyond, it is copied. A dict that blocks come to and leave grows to 84 to 120, full of
holes; a fresh one takes 30 to 60. With 32 of a name that makes 100 at most."""
CHECKED_KEYS = 1_024
"""Stored between two looks at how large dicts are: a look takes as long as storing some ten keys."""
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


class PrefixIndex:
    """Block key -> bitmask of store nodes. Bounded; oldest keys are dropped first, and counted."""

    def __init__(self, blocks_max: int = BLOCKS_MAX, dead_bits_max: int = DEAD_BITS_MAX) -> None:
        """Keep at most `blocks_max` keys; beyond, the oldest go (counted in `stats`)."""
        assert blocks_max >= 1
        self._dead_bits_max = dead_bits_max
        self._blocks_max = blocks_max
        shards = 1 << max(0, (blocks_max // SHARD_BLOCKS).bit_length() - 1)
        self._shards: list[dict[int, int]] = [{} for _ in range(shards)]  # name -> holders, by its low bits
        self._low = shards - 1
        self._unchecked = 0  # keys stored since dicts were looked at
        self._masks: dict[int, int] = {}
        self._bits: dict[str, int] = {}  # node -> its bit, as a mask
        self._nodes: dict[int, str] = {}  # bit -> node
        self._live = 0
        self._dead = 0
        self._sweeping = 0  # the dead bits that the sweep under way takes out
        self._unswept: list[int] = []
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
        stored_names, removed_names = block_names(stored).tolist(), block_names(removed).tolist()
        bit = self._bit(node)
        shards, low, masks, live = self._shards, self._low, self._masks, self._live
        if len(masks) > SHARED_MASKS_MAX:
            masks.clear()
        for name in stored_names:
            holders = shards[name & low]
            mask = (holders.get(name, 0) & live) | bit
            holders[name] = masks.setdefault(mask, mask)
        for name in removed_names:
            holders = shards[name & low]
            mask = holders.get(name, 0) & live & ~bit
            if mask:
                holders[name] = masks.setdefault(mask, mask)
            else:
                holders.pop(name, None)
        if self._blocks() > self._blocks_max:
            self._drop_oldest()
        self._unchecked += len(stored_names) + len(removed_names)
        if self._unchecked >= CHECKED_KEYS:
            self._unchecked = 0
            self._tighten()
        if self._sweeping:
            self.sweep(SWEPT_PER_KEY * (len(stored_names) + len(removed_names)))

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
            self._unswept = [name for holders in self._shards for name in holders]
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
        depth, look = 0, LOOK_KEYS
        while current and depth < len(keys):
            masks = self._look_up(keys[depth : depth + look])
            # in the order of their first blocks, so at each `current` is what holds all blocks up to there
            for mask in dict.fromkeys(masks):
                left = current & ~mask
                if left:
                    self._note(hits, left, depth + masks.index(mask))
                    current &= mask
                    if not current:
                        return hits
            depth += len(masks)
            look = min(2 * look, LOOK_KEYS_MAX)
        self._note(hits, current, depth)
        return hits

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Return the nodes that hold one block, by bit."""
        mask = self._look_up([key])[0] & self._live
        return tuple(node for bit, node in self._nodes.items() if mask & bit)

    @property
    def sweeping(self) -> bool:
        """Whether there are dead bits to sweep out now."""
        return bool(self._sweeping)

    def sweep(self, keys_max: int) -> None:
        """Take dead bits out of at most `keys_max` keys; nothing if no sweep is under way."""
        shards, masks, live, unswept = self._shards, self._masks, self._live, self._unswept
        for _ in range(min(keys_max, len(unswept))):
            name = unswept.pop()
            holders = shards[name & self._low]
            mask = holders.get(name, 0)
            if not mask & live:
                holders.pop(name, None)
            elif mask & ~live:
                holders[name] = masks.setdefault(mask & live, mask & live)
        if self._sweeping and not unswept:
            # what was written meanwhile was written without dead bits
            self._dead &= ~self._sweeping
            self._sweeping = 0
            self._sweeps += 1

    def stats(self) -> IndexStats:
        """Return gauges and counters."""
        return IndexStats(self._blocks(), len(self._bits), self._dropped, self._sweeps)

    def _look_up(self, keys: Sequence[bytes]) -> list[int]:
        names = names_of(keys)
        shards = map(self._shards.__getitem__, (names & self._low).tolist())
        return list(map(dict.get, shards, names.tolist(), repeat(0)))

    def _blocks(self) -> int:
        return sum(map(len, self._shards))

    def _tighten(self) -> None:
        for at, holders in enumerate(self._shards):
            if holders.__sizeof__() > SPARSE_BYTES * (len(holders) + CHECKED_KEYS):
                self._shards[at] = dict(holders)

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
        count = max(self._blocks() - self._blocks_max, self._blocks_max // DROP_FRACTION)
        share = -(-count // len(self._shards))  # names are spread evenly, so all are about as old
        for holders in self._shards:
            for name in list(islice(holders, share)):
                del holders[name]
                self._dropped += 1
