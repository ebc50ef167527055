"""Contexts that are kept in the pool while an agent's tools run: which, where, for how long. Pure.

A context is kept where its prompt was computed: soft pins on the blocks that lie there (kvstore.node.pins),
which a store gives up last, and first once their time is over. So pins have a budget, SHARE_MAX of a store's
memory, in which blocks of several contexts count once; when it is full, what is worth least goes first:

    seconds to compute it anew * chance that the next turn comes / blocks

When the next turn of a program is over, its longer context takes the place of the one it went on with, or
none does if it called no tool. What nobody goes on with ends by itself, here and in the store.
"""

import heapq
from collections.abc import Iterable

import msgspec

SHARE_MAX = 0.5
"""Of a store's memory: the rest stays a cache for everybody else."""
TURN_S_MAX = 600.0
"""A turn takes no longer, from its plan to its last token; else its context is any other block again."""
GRACE_S = 30.0
"""Stores hold on so much longer: what they let go by themselves is given up before all else, what they are
told to let go counts as just used."""
BLOCKS_MAX = 262_144
"""Remembered of all contexts, those of several counted each time: 8 M tokens in blocks of 32, about 40 MB."""


class Order(msgspec.Struct, frozen=True):
    """For the store of `node`: pin `keys` for ttl_s; 0 = unpin them."""

    node: str
    keys: list[bytes]
    ttl_s: float


class Context(msgspec.Struct, frozen=True):
    """What a turn of program `run` leaves on `node`. value_s: what it is expected to save."""

    run: str
    node: str
    keys: tuple[bytes, ...]
    value_s: float
    ttl_s: float

    @property
    def worth(self) -> float:
        """Seconds per block."""
        return self.value_s / len(self.keys)


class Keeps:
    """Costs O(blocks of the context), and of those that are given up for it."""

    def __init__(self, share_max: float = SHARE_MAX, blocks_max: int = BLOCKS_MAX) -> None:
        """Nothing is kept."""
        self._share_max = share_max
        self._blocks_max = blocks_max
        self._kept: dict[int, Context] = {}  # by number, in the order they came
        self._until: dict[int, float] = {}
        self._ends: list[tuple[float, int]] = []  # a heap; with numbers that are gone
        self._runs: dict[str, list[int]] = {}
        self._nodes: dict[str, dict[bytes, int]] = {}  # how many contexts have a block
        self._blocks = 0
        self._number = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def total(self) -> int:
        """Blocks that are kept on all nodes, those of several contexts counted each time."""
        return self._blocks

    def blocks(self, node: str) -> int:
        """Return how many are kept there."""
        return len(self._nodes.get(node, ()))

    def turn_over(
        self, now_s: float, run: str, keys: tuple[bytes, ...], left: Context | None, room: int
    ) -> list[Order]:
        """A turn with the prompt `keys` is over and leaves `left`; return what stores have to hear.

        Args:
            now_s: the time.
            run: the turn's program.
            keys: of its prompt: what it went on with is kept no more.
            left: what it leaves, None = nothing worth keeping.
            room: blocks that the store of `left` has room for.
        """
        freed = self._expire(now_s)
        gone = [number for number in self._runs.get(run, ()) if _begins(keys, self._kept[number].keys)]
        freed += [self._drop(number) for number in gone]
        orders = []
        if left is not None and left.keys:
            victims = self._make_room(left, int(room * self._share_max))
            if victims is not None:
                freed += victims
                self._add(now_s, left)
                orders.append(Order(left.node, list(left.keys), left.ttl_s + GRACE_S))
        return [*self._unpinned(freed), *orders]

    def turn_came(self, now_s: float, run: str, keys: tuple[bytes, ...]) -> list[Order]:
        """A turn with the prompt `keys` is planned: what it goes on with stays until it is over."""
        orders = self.tick(now_s)
        for number in self._runs.get(run, ()):
            one = self._kept[number]
            if _begins(keys, one.keys):
                self._ends_at(now_s + TURN_S_MAX, number)
                orders.append(Order(one.node, list(one.keys), TURN_S_MAX + GRACE_S))
        return orders

    def tick(self, now_s: float) -> list[Order]:
        """Give up what nobody has gone on with in time."""
        return self._unpinned(self._expire(now_s))

    def node_gone(self, node: str) -> None:
        """Its store is no more, and with it what was kept there."""
        for number in [number for number, one in self._kept.items() if one.node == node]:
            self._drop(number)

    # ------------------------------------------------------------ inside

    def _make_room(self, new: Context, room: int) -> list[Context] | None:
        """Give up what is worth less than `new` until that fits; None = it does not, and all stays."""
        there = self._nodes.get(new.node, {})
        missing = sum(key not in there for key in new.keys)
        over = len(there) + missing - room
        beyond = self._blocks + len(new.keys) - self._blocks_max
        if over <= 0 and beyond <= 0:
            return []
        if missing > room or len(new.keys) > self._blocks_max:
            return None
        lesser = [(one.worth, number) for number, one in self._kept.items() if one.worth < new.worth]
        victims: list[int] = []
        for _, number in sorted(lesser):
            one = self._kept[number]
            if over > 0 and one.node == new.node:
                over -= len(one.keys)  # what it shares is counted too: then the next newcomer makes room
            elif beyond <= 0:
                continue
            beyond -= len(one.keys)
            victims.append(number)
            if over <= 0 and beyond <= 0:
                break
        if over > 0 or beyond > 0:
            return None
        return [self._drop(number) for number in victims]

    def _add(self, now_s: float, one: Context) -> None:
        self._number += 1
        self._kept[self._number] = one
        self._runs.setdefault(one.run, []).append(self._number)
        self._ends_at(now_s + one.ttl_s, self._number)
        uses = self._nodes.setdefault(one.node, {})
        for key in one.keys:
            uses[key] = uses.get(key, 0) + 1
        self._blocks += len(one.keys)

    def _ends_at(self, end_s: float, number: int) -> None:
        self._until[number] = end_s
        heapq.heappush(self._ends, (end_s, number))

    def _drop(self, number: int) -> Context:
        one = self._kept.pop(number)
        del self._until[number]
        of_run = self._runs[one.run]
        of_run.remove(number)
        if not of_run:
            del self._runs[one.run]
        uses = self._nodes[one.node]
        for key in one.keys:
            if uses[key] == 1:
                del uses[key]
            else:
                uses[key] -= 1
        self._blocks -= len(one.keys)
        return one

    def _expire(self, now_s: float) -> list[Context]:
        freed = []
        while self._ends and self._ends[0][0] <= now_s:
            end_s, number = heapq.heappop(self._ends)
            if self._until.get(number) == end_s:  # else it is gone, or awaited
                freed.append(self._drop(number))
        return freed

    def _unpinned(self, freed: Iterable[Context]) -> list[Order]:
        """Return orders for those blocks that no other context keeps."""
        gone: dict[str, dict[bytes, None]] = {}
        for one in freed:
            uses = self._nodes[one.node]
            gone.setdefault(one.node, {}).update(dict.fromkeys(key for key in one.keys if key not in uses))
        return [Order(node, list(keys), 0.0) for node, keys in gone.items() if keys]


def _begins(keys: tuple[bytes, ...], start: tuple[bytes, ...]) -> bool:
    """Whether `keys` go on with `start`: a key commits to all before it."""
    return len(start) <= len(keys) and keys[len(start) - 1] == start[-1]
