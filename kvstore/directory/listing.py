"""A copy of a directory's table, for what takes too long on its loop: pages for people, and counts. Pure."""

import heapq
from collections import Counter
from collections.abc import Iterator

import msgspec

from mooncake.core.keys import KEY_BYTES

COUNT_STEP = 65_536
"""Masks counted by one call into C, which lets no other thread run: 3 ms."""


class Listing(msgspec.Struct, frozen=True):
    """`masks[i]` are the holders of `numbers[i]`; those without a bit of `wanted` do not count."""

    numbers: list[int]
    masks: list[int]
    wanted: int

    def page(self, limit: int, prefix: bytes = b"", after: bytes = b"") -> list[bytes]:
        """Return at most `limit` keys in order, that begin with `prefix` and come after the key `after`."""
        return heapq.nsmallest(limit, self._keys(prefix, after))

    def replica_counts(self) -> dict[int, int]:
        """Return how many keys have 1, 2, ... holders."""
        by_mask: Counter[int] = Counter()
        for start in range(0, len(self.masks), COUNT_STEP):
            by_mask.update(self.masks[start : start + COUNT_STEP])
        counts: Counter[int] = Counter()
        for mask, blocks in by_mask.items():
            if holders := (mask & self.wanted).bit_count():
                counts[holders] += blocks
        return dict(counts)

    def _keys(self, prefix: bytes, after: bytes) -> Iterator[bytes]:
        low_bits = (1 << 8 * len(prefix)) - 1  # a key's first byte is its number's lowest
        wanted, first = self.wanted, int.from_bytes(prefix, "little")
        for number, mask in zip(self.numbers, self.masks, strict=True):
            if mask & wanted and number & low_bits == first:
                key = number.to_bytes(KEY_BYTES, "little")
                if key > after:
                    yield key
