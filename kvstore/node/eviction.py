"""Which block to give up first. Pure: a policy sees only evictable blocks (complete, not leased).

The node removes a block from the policy while it is leased and inserts it again afterwards, so a
policy never has to skip anything and a lease counts as a use at its end. What a policy has learnt
about a block (how often it was used, where it stands in its prompt) outlives `remove` and ends with
`forget`, which the owner calls when the block itself is gone.

    Lru          least recently used first
    Lfu          least often used first, of those the least recently used
    LengthAware  as Lfu, but of those used equally often the deepest in its prompt first
    TailLru      first the ends of prompts that are quick to recompute, then as Lru

Hit rates on traces: `python -m benchmarks.eviction`. Bytes per block were
measured with CPython 3.11 on 100,000 blocks, without the key: freshly filled to much used.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from kvstore.limits import LEASED_BLOCKS_MAX
from mooncake.core.errors import ConfigError

REMEMBERED_MAX = LEASED_BLOCKS_MAX
"""Removed blocks that a policy remembers: as many as can be leased. The oldest memory goes first."""
STALE_MIN = 64
"""Superseded heap entries that are always tolerated: a sweep costs as much as the heap is long."""
OLDEST_MAX = 1_024
"""Kept apart by Lru. To find the oldest entry of a dict is a walk over the gaps of removed ones, a
millisecond for a million: once for so many victims."""
TAIL_BUDGET_BLOCKS, TAIL_NEXT_BLOCKS = 256, 192
"""Of `tail` when it is chosen by name: 8,192 tokens, a second of prefill for a 70B model on eight A800
(FAST'25, Figure 14), and 6,144 tokens, what a turn of its traces adds; in blocks of 32 tokens."""


class EvictionPolicy(Protocol):
    """Orders evictable blocks. Every key is inserted at most once before it is removed."""

    @property
    def held_bytes(self) -> int:
        """Sum of sizes of all blocks that `victims` could return."""

    def insert(self, key: bytes, size_bytes: int, depth: int | None = None, below: int | None = None) -> None:
        """Begin to hold `key`; this counts as a use.

        Args:
            key: the block.
            size_bytes: what its eviction gives.
            depth: blocks before it in its prompt; a key commits to its prefix, so this never changes.
            below: blocks after it in the prompt of this use. None: unknown, what was known stands.
        """

    def touch(self, key: bytes, below: int | None = None) -> None:
        """Count a use of a held key; `below` as in insert."""

    def remove(self, key: bytes) -> None:
        """Stop holding `key`: it was leased, dropped or evicted."""

    def forget(self, key: bytes) -> None:
        """Drop what is remembered of a removed `key`: the block is gone. Unknown keys are fine."""

    def victims(self, need_bytes: int) -> list[bytes]:
        """Return keys to give up first, as few as sum up to `need_bytes`; fewer bytes only if it holds less.

        The keys stay held until `remove`.
        """

    def size_of(self, key: bytes) -> int:
        """Return the size a held key was inserted with."""

    def __contains__(self, key: bytes) -> bool: ...

    def __len__(self) -> int: ...


class Lru:
    """Least recently used first. O(1) amortised; 50 to 110 bytes per block."""

    def __init__(self) -> None:
        """Start empty."""
        # a plain dict, in the order of use: an OrderedDict takes twice the memory
        self._sizes: dict[bytes, int] = {}
        self._oldest: OrderedDict[bytes, int] = OrderedDict()  # what _sizes begins with
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """See EvictionPolicy."""
        return self._held_bytes

    def insert(
        self,
        key: bytes,
        size_bytes: int,
        depth: int | None = None,  # noqa: ARG002 - recency alone decides
        below: int | None = None,  # noqa: ARG002
    ) -> None:
        """See EvictionPolicy."""
        assert key not in self._sizes, "inserted twice"
        self._sizes[key] = size_bytes
        self._held_bytes += size_bytes

    def touch(self, key: bytes, below: int | None = None) -> None:  # noqa: ARG002 - recency alone decides
        """See EvictionPolicy."""
        self._sizes[key] = self._sizes.pop(key)
        if key in self._oldest:
            del self._oldest[key]

    def remove(self, key: bytes) -> None:
        """See EvictionPolicy."""
        self._held_bytes -= self._sizes.pop(key)
        if key in self._oldest:
            del self._oldest[key]

    def forget(self, key: bytes) -> None:
        """See EvictionPolicy: nothing outlives `remove`."""

    def victims(self, need_bytes: int) -> list[bytes]:
        """See EvictionPolicy."""
        keys = _first(self._oldest, need_bytes)
        if keys is None and len(self._oldest) < len(self._sizes):
            self._oldest = OrderedDict(itertools.islice(self._sizes.items(), OLDEST_MAX))
            if len(self._oldest) == len(self._sizes):
                self._sizes = dict(self._oldest)  # few are left of many: an end to the gaps
            keys = _first(self._oldest, need_bytes) or _first(self._sizes, need_bytes)
        return list(self._sizes) if keys is None else keys

    def size_of(self, key: bytes) -> int:
        """See EvictionPolicy."""
        return self._sizes[key]

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)


def _first(order: dict[bytes, int], need_bytes: int) -> list[bytes] | None:
    """Return the first keys of `order` whose sizes sum up to `need_bytes`; None: all of them do not."""
    keys: list[bytes] = []
    if need_bytes <= 0:
        return keys
    for key, size_bytes in order.items():
        keys.append(key)
        need_bytes -= size_bytes
        if need_bytes <= 0:
            return keys
    return None


_Fact = TypeVar("_Fact")


class _Memory(Generic[_Fact]):
    """What is known of removed blocks, until they are inserted again or forgotten; bounded."""

    def __init__(self) -> None:
        self._facts: OrderedDict[bytes, _Fact] = OrderedDict()

    def keep(self, key: bytes, fact: _Fact) -> None:
        self._facts[key] = fact
        if len(self._facts) > REMEMBERED_MAX:
            self._facts.popitem(last=False)

    def take(self, key: bytes) -> _Fact | None:
        return self._facts.pop(key, None)


_Entry = tuple[int, int, int, bytes, int]
"""(uses, -depth or 0, number of the last use, key, size_bytes): the smallest goes first."""


class Lfu:
    """Least often used first, ties by age. O(log n) amortised; 170 to 390 bytes per block.

    A use is an insert or a touch. Counts never fade: a block that was popular once stays until
    everything else was used as often.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._held: dict[bytes, _Entry] = {}
        self._heap: list[_Entry] = []  # holds superseded entries too: those not in _held any more
        self._away: _Memory[_Entry] = _Memory()
        self._clock = itertools.count()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """See EvictionPolicy."""
        return self._held_bytes

    def insert(
        self,
        key: bytes,
        size_bytes: int,
        depth: int | None = None,
        below: int | None = None,  # noqa: ARG002 - not what this policy goes by
    ) -> None:
        """See EvictionPolicy."""
        assert key not in self._held, "inserted twice"
        known = self._away.take(key)
        uses, order = (known[0], known[1]) if known is not None else (0, 0)
        self._place(key, size_bytes, uses + 1, order if depth is None else self._order(depth))
        self._held_bytes += size_bytes

    def touch(self, key: bytes, below: int | None = None) -> None:  # noqa: ARG002
        """See EvictionPolicy."""
        uses, order, _, _, size_bytes = self._held[key]
        self._place(key, size_bytes, uses + 1, order)

    def remove(self, key: bytes) -> None:
        """See EvictionPolicy."""
        entry = self._held.pop(key)
        self._away.keep(key, entry)
        self._held_bytes -= entry[4]
        self._sweep()

    def forget(self, key: bytes) -> None:
        """See EvictionPolicy."""
        self._away.take(key)

    def victims(self, need_bytes: int) -> list[bytes]:
        """See EvictionPolicy."""
        chosen: list[_Entry] = []
        while need_bytes > 0 and self._heap:
            entry = heapq.heappop(self._heap)
            if self._held.get(entry[3]) is entry:
                chosen.append(entry)
                need_bytes -= entry[4]
        for entry in chosen:
            heapq.heappush(self._heap, entry)
        return [entry[3] for entry in chosen]

    def size_of(self, key: bytes) -> int:
        """See EvictionPolicy."""
        return self._held[key][4]

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def _order(self, depth: int) -> int:  # noqa: ARG002 - LengthAware's
        """Return what decides among blocks used equally often, before their age does."""
        return 0

    def _place(self, key: bytes, size_bytes: int, uses: int, order: int) -> None:
        entry = (uses, order, next(self._clock), key, size_bytes)
        self._held[key] = entry
        heapq.heappush(self._heap, entry)
        self._sweep()

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._held) + STALE_MIN:
            self._heap = list(self._held.values())
            heapq.heapify(self._heap)


class LengthAware(Lfu):
    """As Lfu, but of blocks used equally often the deepest first: it helps the fewest prompts.

    The LengthAwareCache of the Mooncake paper (arXiv 2407.00079, Table 1), which leaves the
    direction open; shallow first hits less at every size. Unknown depths count as 0.
    """

    def _order(self, depth: int) -> int:
        return -depth


class TailLru:
    """First the ends of prompts that are quick to recompute, then as Lru. 90 to 210 bytes per block.

    Tail-Optimized LRU ("Tail-Optimized Caching for LLM Inference", NeurIPS 2025, arXiv 2510.15152).
    A conversation of L blocks whose next turn brings Q more misses its time to first token only if
    more than `budget_blocks` are not cached. So its first L + Q - budget blocks are needed, and
    the rest can go without harm. What remains is freed least recently used first, in both halves.
    Here L + Q - budget is reckoned per block: a block can go if fewer than budget - Q blocks
    stood `below` it. Prompts share blocks, so the longest known prompt through a block decides.
    Without hints it is Lru.
    """

    def __init__(self, budget_blocks: int, next_blocks: int = 0) -> None:
        """Start empty.

        Args:
            budget_blocks: what prefill computes within the objective for the time to first token.
            next_blocks: Q, what a turn adds to its conversation, as expected.

        Raises:
            ConfigError: a negative number.
        """
        if budget_blocks < 0 or next_blocks < 0:
            raise ConfigError(f"budget_blocks={budget_blocks}, next_blocks={next_blocks}: must be at least 0")
        self._slack_blocks = max(0, budget_blocks - next_blocks)
        self._spare, self._needed = Lru(), Lru()
        self._below: dict[bytes, int] = {}  # of held blocks, where known
        self._away: _Memory[int] = _Memory()

    @property
    def held_bytes(self) -> int:
        """See EvictionPolicy."""
        return self._spare.held_bytes + self._needed.held_bytes

    def insert(
        self,
        key: bytes,
        size_bytes: int,
        depth: int | None = None,  # noqa: ARG002 - the end of the prompt counts, not its beginning
        below: int | None = None,
    ) -> None:
        """See EvictionPolicy."""
        assert key not in self, "inserted twice"
        known = self._away.take(key)
        if known is not None:
            self._below[key] = known
        self._half(key, below).insert(key, size_bytes)

    def touch(self, key: bytes, below: int | None = None) -> None:
        """See EvictionPolicy."""
        old = self._holder(key)
        size_bytes = old.size_of(key)
        old.remove(key)
        self._half(key, below).insert(key, size_bytes)

    def remove(self, key: bytes) -> None:
        """See EvictionPolicy."""
        self._holder(key).remove(key)
        if (below := self._below.pop(key, None)) is not None:
            self._away.keep(key, below)

    def forget(self, key: bytes) -> None:
        """See EvictionPolicy."""
        self._away.take(key)

    def victims(self, need_bytes: int) -> list[bytes]:
        """See EvictionPolicy."""
        keys = self._spare.victims(need_bytes)
        need_bytes -= sum(map(self._spare.size_of, keys))
        return keys + self._needed.victims(need_bytes)

    def size_of(self, key: bytes) -> int:
        """See EvictionPolicy."""
        return self._holder(key).size_of(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._spare or key in self._needed

    def __len__(self) -> int:
        return len(self._spare) + len(self._needed)

    def _holder(self, key: bytes) -> Lru:
        return self._spare if key in self._spare else self._needed

    def _half(self, key: bytes, below: int | None) -> Lru:
        """Return where `key` belongs, having learnt that `below` blocks follow it."""
        known = self._below.get(key)
        if below is not None and (known is None or below > known):
            self._below[key] = known = below
        return self._needed if known is None or known >= self._slack_blocks else self._spare


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "length": LengthAware,
    "tail": lambda: TailLru(TAIL_BUDGET_BLOCKS, TAIL_NEXT_BLOCKS),
}
"""By the names of the setting `eviction` (core.config.EVICTIONS)."""
