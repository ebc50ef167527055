"""SIEVE: which of the held things to give up when a bounded pool is full. Pure.

Zhang et al., "SIEVE is Simpler than LRU" (NSDI 2024): keys stand in the order of their arrival, a use only
sets a mark, and a hand walks from the oldest to the newest, takes marks away and evicts the first unmarked
key it meets. Upstream's endpoint store uses it for queue pairs as well: a use costs nothing.
"""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Sieve(Generic[K]):
    """Keys and their marks. A list: pools hold hundreds, and an eviction comes with a connection (ms)."""

    def __init__(self) -> None:
        """Start empty."""
        self._keys: list[K] = []  # oldest first
        self._used: dict[K, bool] = {}
        self._hand = 0

    def add(self, key: K) -> None:
        """Begin to hold `key`, which is not held, as the newest, unmarked."""
        assert key not in self._used, "added twice"
        self._keys.append(key)
        self._used[key] = False

    def touch(self, key: K) -> None:
        """Mark a held key as used."""
        assert key in self._used, "not held"
        self._used[key] = True

    def remove(self, key: K) -> None:
        """Stop holding `key` (idempotent)."""
        if self._used.pop(key, None) is None:
            return
        at = self._keys.index(key)
        del self._keys[at]
        if at < self._hand:
            self._hand -= 1
        self._hand %= len(self._keys) or 1  # behind the newest comes the oldest, not who comes next

    def evict(self, allowed: Callable[[K], bool]) -> K | None:
        """Stop holding one key and return it; None if no key is `allowed` to go.

        Keys that are not allowed to go keep their marks.
        """
        for _ in range(2 * len(self._keys)):  # the first round takes the marks away, the second must find
            key = self._keys[self._hand]
            if allowed(key) and not self._used[key]:
                self.remove(key)
                return key
            if allowed(key):
                self._used[key] = False
            self._hand = (self._hand + 1) % len(self._keys)
        return None

    def __contains__(self, key: K) -> bool:
        return key in self._used

    def __len__(self) -> int:
        return len(self._keys)
