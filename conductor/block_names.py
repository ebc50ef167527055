"""A prompt's block keys cut down to what the index looks at, for the way to a decision core. Pure."""

from collections.abc import Sequence
from typing import overload

import numpy as np

from mooncake.core.errors import ProtocolError
from mooncake.core.keys import KEY_BYTES, short_names

NAME_BYTES = 8
"""keys.NAME_BITS of each key."""


def names_of(keys: Sequence[bytes]) -> bytes:
    """Return NAME_BYTES for each key, in order; makes keys that are made when they are looked at."""
    return short_names(b"".join(keys[:])).tobytes()


class BlockNames(Sequence[bytes]):
    """Stands for the keys of which only names are known: of their length, and of their names.

    Equal where names are; good for an index, and for nothing that needs whole keys.
    """

    __slots__ = ("_keys",)

    def __init__(self, names: bytes) -> None:
        """Take what `names_of` gave.

        Raises:
            ProtocolError: it is not a whole number of names.
        """
        if len(names) % NAME_BYTES:
            raise ProtocolError(f"{len(names)} bytes are not a whole number of {NAME_BYTES}-byte names")
        padded = np.zeros((len(names) // NAME_BYTES, KEY_BYTES // NAME_BYTES), "<u8")
        padded[:, 0] = np.frombuffer(names, "<u8")
        self._keys = padded.tobytes()

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        """Return 32 bytes per block, as keys have."""
        keys = self._keys
        if isinstance(at, slice):
            return [keys[one * KEY_BYTES : (one + 1) * KEY_BYTES] for one in range(len(self))[at]]
        one = range(len(self))[at]
        return keys[one * KEY_BYTES : (one + 1) * KEY_BYTES]
