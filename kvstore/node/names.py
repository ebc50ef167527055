"""What the objects of one store are called, for those whose writers want them listed. Pure.

A key is a hash: whoever lists or removes by pattern needs the names. They are told with the commit and
forgotten with the last copy in any tier of this store. They go with a copy, to another store and to the SSD.
"""

from collections.abc import Callable, Sequence

from mooncake.core.errors import RequestError
from mooncake.core.messages import NamesPage

NAME_BYTES_MAX = 8_192
"""Blocks take memory in steps of 4096 bytes: names cost a few times what they name at most, mostly 3 %."""
PAGE_NAMES_MAX = 8_192
PAGE_BYTES_MAX = 2 << 20
"""One message; the last name may go beyond."""
CHECK_MIN = 1_024
"""So many names before the first look for those whose objects came and went unnoticed."""


class Names:
    """Names by key, numbered in the order in which they came."""

    def __init__(self, is_there: Callable[[bytes], bool]) -> None:
        """`is_there`: whether this store has an object in any tier."""
        self._is_there = is_there
        self._names: dict[bytes, tuple[int, bytes]] = {}  # ascending numbers
        self._last = 0
        self._check_at = CHECK_MIN

    def __len__(self) -> int:
        return len(self._names)

    @staticmethod
    def check(names: Sequence[bytes], count: int) -> None:
        """Pass if `names` are none, or one for each of `count`.

        Raises:
            RequestError: they are not, or one is too long.
        """
        if names and len(names) != count:
            raise RequestError(f"{len(names)} names for {count} objects")
        longest = max(map(len, names), default=0)
        if longest > NAME_BYTES_MAX:
            raise RequestError(f"a name of {longest} bytes: at most {NAME_BYTES_MAX}")

    def add(self, key: bytes, name: bytes) -> None:
        """Call the object `key`, which is there, `name`."""
        self._names.pop(key, None)
        self._last += 1
        self._names[key] = (self._last, name)
        if len(self._names) >= self._check_at:
            # an object that came and went within one turn of the store's loop is no change to anybody
            self._names = {one: named for one, named in self._names.items() if self._is_there(one)}
            self._check_at = max(CHECK_MIN, 2 * len(self._names))

    def of(self, key: bytes) -> bytes:
        """Return what the object `key` is called, b"" if it has no name."""
        named = self._names.get(key)
        return named[1] if named else b""

    def forget(self, keys: Sequence[bytes]) -> None:
        """These objects are gone."""
        if self._names:
            for key in keys:
                self._names.pop(key, None)

    def page(self, after: int) -> NamesPage:
        """Return keys and names that came after number `after`, 0 = all; see NamesPage."""
        keys: list[bytes] = []
        names: list[bytes] = []
        used = 0
        for key, (number, name) in self._names.items():
            if number <= after or not self._is_there(key):
                continue
            keys.append(key)
            names.append(name)
            used += len(name)
            if len(keys) >= PAGE_NAMES_MAX or used >= PAGE_BYTES_MAX:
                return NamesPage(b"".join(keys), names, number)
        return NamesPage(b"".join(keys), names, 0)
