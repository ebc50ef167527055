"""Which store nodes hold which blocks: soft state built from node events (DESIGN 2.2)."""

from collections.abc import Sequence


class PrefixIndex:
    """Block key -> bitmask of store nodes."""

    def __init__(self, blocks_max: int = 4_000_000) -> None:
        """Keep at most `blocks_max` keys; beyond, the oldest go (counted in `dropped`)."""

    def apply(self, node: str, stored: bytes, removed: bytes) -> None:
        """Apply one StoreEvents message (also a snapshot page: stored=page.keys, removed=b"").

        Raises:
            ProtocolError: a blob is not a whole number of 32-byte keys.
        """

    def reset(self, node: str) -> None:
        """The node restarted empty, or a gap was seen: forget what it held (before a snapshot)."""

    def drop(self, node: str) -> None:
        """The node is gone for good."""

    def longest_prefix(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Return node -> number of leading `keys` it holds; nodes with none are left out."""
        raise NotImplementedError
