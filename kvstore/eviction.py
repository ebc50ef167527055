"""Which block to give up first. Pure: a policy sees only evictable blocks (complete, not leased).

The node removes a block from the policy while it is leased and inserts it again afterwards, so a
policy never has to skip anything and a lease counts as a use at its end.
"""

from collections import OrderedDict
from typing import Protocol


class EvictionPolicy(Protocol):
    """Orders evictable blocks. Every key is inserted at most once before it is removed."""

    @property
    def held_bytes(self) -> int:
        """Sum of sizes of all held blocks."""

    def insert(self, key: bytes, size_bytes: int) -> None:
        """Begin to hold `key`; this counts as a use."""

    def touch(self, key: bytes) -> None:
        """Count a use of a held key."""

    def remove(self, key: bytes) -> None:
        """Stop holding `key`: it was leased, dropped or evicted."""

    def victims(self, need_bytes: int) -> list[bytes]:
        """Return keys to give up first, as few as sum up to `need_bytes`; fewer bytes only if it holds less.

        The keys stay held until `remove`.
        """

    def __contains__(self, key: bytes) -> bool: ...

    def __len__(self) -> int: ...


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        """Start empty."""
        # OrderedDict, not dict: the oldest of a dict costs a walk over all deleted entries
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """See EvictionPolicy."""
        return self._held_bytes

    def insert(self, key: bytes, size_bytes: int) -> None:
        """See EvictionPolicy."""
        assert key not in self._sizes, "inserted twice"
        self._sizes[key] = size_bytes
        self._held_bytes += size_bytes

    def touch(self, key: bytes) -> None:
        """See EvictionPolicy."""
        self._sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        """See EvictionPolicy."""
        self._held_bytes -= self._sizes.pop(key)

    def victims(self, need_bytes: int) -> list[bytes]:
        """See EvictionPolicy."""
        keys: list[bytes] = []
        for key, size_bytes in self._sizes.items():
            if need_bytes <= 0:
                break
            keys.append(key)
            need_bytes -= size_bytes
        return keys

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)
