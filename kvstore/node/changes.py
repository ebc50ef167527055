"""Which blocks came and went since somebody was told last. Pure."""

import msgspec


class NodeEvents(msgspec.Struct, frozen=True):
    """Net changes of the complete set since the last drain; no key is in both."""

    stored: list[bytes]
    removed: list[bytes]


class Changes:
    """Net changes by key."""

    def __init__(self) -> None:
        """Nothing has changed."""
        self._pending: dict[bytes, bool] = {}  # stored or removed

    def __len__(self) -> int:
        return len(self._pending)

    def note(self, key: bytes, *, stored: bool) -> None:
        """A block is complete now, or gone."""
        # a key that came and went (or went and came) since the last drain has no net change
        if key in self._pending:
            del self._pending[key]
        else:
            self._pending[key] = stored

    def drain(self) -> NodeEvents:
        """Return the net changes and forget them."""
        pending, self._pending = self._pending, {}
        stored = [key for key, now_stored in pending.items() if now_stored]
        return NodeEvents(stored, [key for key, now_stored in pending.items() if not now_stored])
