"""Which blocks were read a moment ago, for those who will not remove such. Pure."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

READS_MAX = 1 << 16
"""Blocks whose last read is remembered, 10 MB of them; the oldest is forgotten first."""


class Reads:
    """Last reads by key."""

    def __init__(self) -> None:
        """Know of none."""
        self._last: OrderedDict[bytes, float] = OrderedDict()

    def note(self, now_s: float, keys: Iterable[bytes]) -> None:
        """These were read just now."""
        last = self._last
        for key in keys:
            last[key] = now_s
            last.move_to_end(key)
        while len(last) > READS_MAX:
            last.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """This block is gone (idempotent)."""
        self._last.pop(key, None)

    def since(self, since_s: float, keys: Sequence[bytes]) -> list[bytes]:
        """Return those of `keys` that were read after `since_s`."""
        return [key for key in keys if (at_s := self._last.get(key)) is not None and at_s > since_s]
