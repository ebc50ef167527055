"""Where a new block goes: preferred nodes, then near the writer, then where there is room. Pure.

Room is compared between two nodes that the key itself names (its bytes are a hash): the power of two
choices without a random number. Everybody who places the same key on the same view decides alike, and
no view, however old, sends everybody to the one node that was emptiest. What this placer gave out is
counted against a node until the node's next report.

A full node is a fair choice: it evicts its oldest block. Only draining nodes, and those smaller than
the block, are none.
"""

from collections.abc import Sequence

import msgspec

from kvstore.node.allocator import aligned
from mooncake.core.errors import RequestError

LOW_FREE_RATIO = 0.05
"""Below this a node near the writer is no better than one further away: it would evict for each block."""
COPIES_MAX = 16
"""Replicas of one block; beyond a few a hot block is served from the readers' own hosts anyway."""


class Room(msgspec.Struct, frozen=True):
    """What a node reports of itself; nodes of equal, non-empty `locality` are near each other."""

    node: str
    capacity_bytes: int
    free_bytes: int
    locality: str = ""


class Choice(msgspec.Struct, frozen=True):
    """Distinct nodes, best first; `missing` copies found no node."""

    nodes: tuple[str, ...]
    missing: int


class Placer:
    """The nodes of one cluster, and what has been given out since they reported."""

    def __init__(self) -> None:
        """Know no node."""
        self._rooms: dict[str, Room] = {}
        self._given_bytes: dict[str, int] = {}
        self._draining: dict[str, None] = {}

    def update(self, room: Room) -> None:
        """Take a node's report; it replaces what was counted against it."""
        self._rooms[room.node] = room
        self._given_bytes[room.node] = 0

    def leave(self, node: str) -> None:
        """Forget a node's room (idempotent); if it was draining, it will be when it comes back."""
        self._rooms.pop(node, None)
        self._given_bytes.pop(node, None)

    def drain(self, node: str, on: bool = True) -> None:
        """Place nothing on `node` any more; or again."""
        if on:
            self._draining[node] = None
        else:
            self._draining.pop(node, None)

    def choose(
        self,
        key: bytes,
        size_bytes: int,
        copies: int = 1,
        *,
        preferred: Sequence[str] = (),
        near: str = "",
        exclude: Sequence[str] = (),
    ) -> Choice:
        """Return nodes for `copies` replicas of one block.

        Args:
            key: the block's key; 16 bytes of it decide between equals.
            size_bytes: of the block.
            copies: replicas on distinct nodes.
            preferred: nodes to use first, in this order (the decode node of a hand-over).
            near: locality of the writer; it draws the first replica that is not preferred.
            exclude: nodes that hold it already, or have just failed.

        Raises:
            RequestError: sizes or counts that make no sense.
        """
        if size_bytes <= 0 or not 0 < copies <= COPIES_MAX:
            raise RequestError(f"{copies} copies of {size_bytes} bytes: 1 to {COPIES_MAX} of at least 1")
        fit = [node for node in self._rooms if self.takes(node, size_bytes) and node not in exclude]
        chosen = [node for node in dict.fromkeys(preferred) if node in fit][:copies]
        fit = [node for node in fit if node not in chosen]
        close = [node for node in fit if near and self._is_near(node, near)]
        while fit and len(chosen) < copies:
            node = self._freer_of_two(key, len(chosen), close or fit)
            close = []
            fit.remove(node)
            chosen.append(node)
        for node in chosen:
            self._given_bytes[node] += aligned(size_bytes)
        return Choice(tuple(chosen), copies - len(chosen))

    def takes(self, node: str, size_bytes: int) -> bool:
        """Return whether a block may be placed there."""
        room = self._rooms.get(node)
        return room is not None and room.capacity_bytes >= size_bytes and node not in self._draining

    def free_ratio(self, node: str) -> float:
        """Return the share of a known node that is free, less what was given out since."""
        room = self._rooms[node]
        return max(0, room.free_bytes - self._given_bytes[node]) / room.capacity_bytes

    def _is_near(self, node: str, near: str) -> bool:
        return self._rooms[node].locality == near and self.free_ratio(node) >= LOW_FREE_RATIO

    def _freer_of_two(self, key: bytes, turn: int, nodes: list[str]) -> str:
        if len(nodes) == 1:
            return nodes[0]
        number = int.from_bytes(key[:16], "little") >> turn
        rest, first = divmod(number, len(nodes))
        second = rest % (len(nodes) - 1)
        second += second >= first  # another one than the first
        a, b = nodes[first], nodes[second]
        return b if self.free_ratio(b) > self.free_ratio(a) else a
