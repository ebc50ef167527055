"""Which prefixes many ask for, and on how many nodes each is worth having (paper 1.2: hot blocks). Pure.

A fetch leaves a copy where it went, so demand spreads a prefix by itself, one late request per node. What
that cannot do is be there before: for a burst, for a node that has just come, after one has died. So the
prefixes that were found in the pool are counted, and those that are asked for often get standing wishes.

Counted are the blocks that end a *rung*: depths a quarter apart, so that a prompt of a thousand blocks costs
some thirty counters and what is shared is cut at most a fifth too short. A counter fades with time; it says
how often a prefix was used in the last minutes. One of k copies serves a k-th of that, and saves a fetch
each time, or what computing it would take if that is less; it costs one fetch. So

    copies = uses / USES_MIN * min(1, seconds to compute / seconds to fetch)

rises at once and falls when half of it would do: a prefix at the edge is not wished for and dropped in turns.
Wishes end by not being said again (`conductor.hot_copies`), so a gateway that dies leaves none behind.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import exp

import msgspec

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex

MEMORY_S = 300.0
"""A use counts e-fold less after this. With a minute, what is asked for three times a minute was not there
when everybody came at once; on the public traces neither finds anything to copy."""
USES_MIN = 3.0
"""Uses in MEMORY_S that a copy is expected to serve: fewer, and the room it takes is worth more to others."""
LINGER = 0.5
"""Part of the uses that would ask for a copy at which it is given up."""
COPIES_MIN = 2
"""Fewer are no wish: the block is there already."""
RUNG = 4
"""Each rung is deeper than the last by a quarter, at least by one block."""
DEPTH_MAX = 8_192
"""Blocks of a prompt that are looked at: a million tokens in blocks of 128."""
HEADS_MAX = 32_768
"""Counters: at 30 a prompt and 10 prompts a second, all of the last two minutes. About 10 MB."""
KEYS_MAX = 32_768
"""Wished for at a time: 32 shared prompts of 32k tokens in blocks of 32; half of what a directory takes."""

SHARE_MAX = 4
"""Hot copies may take so much of a node's memory: a quarter."""
ROUND_S = 2.0
"""Distance of two steps: a burst lasts tens of seconds, a step takes milliseconds."""
TTL_S = 60.0
"""A wish that is not said again ends after this; it is said again a few times as often."""


class Wish(msgspec.Struct, frozen=True):
    """Each of `keys`, which follow on each other and on `parent` (b"" = none), on so many nodes."""

    keys: tuple[bytes, ...]
    copies: int
    size_bytes: int
    parent: bytes
    ranks: int = 1  # that share each block, and size_bytes


class _Head:
    """One rung of a prefix: `keys` are its own, those of shallower rungs have theirs."""

    __slots__ = ("at_s", "copies", "depth", "keys", "parent", "shape", "uses")

    def __init__(self, now_s: float, parent: bytes, depth: int) -> None:
        self.parent = parent
        self.depth = depth
        self.shape = (0, 0, 1)  # bytes and tokens of a block, and how many ranks share it
        self.uses = 0.0
        self.at_s = now_s
        self.copies = 0
        self.keys: tuple[bytes, ...] = ()  # kept once it is warm

    def uses_at(self, now_s: float) -> float:
        return self.uses * exp(min(0.0, self.at_s - now_s) / MEMORY_S)


class Heat:
    """Counts planned requests; `step` says what should be where. Bounded by HEADS_MAX and KEYS_MAX."""

    def __init__(self, cost: CostModel, copies_max: int) -> None:
        """`copies_max`: of any prefix; below 2, nothing is ever wished for."""
        self._cost = cost
        self._copies_max = copies_max
        self._heads: dict[bytes, _Head] = {}  # least recently used first
        self._warm: dict[bytes, _Head] = {}
        self._keys = 0  # kept by the warm ones
        self._uses, self._used_s = 0.0, 0.0  # of any prefix, fading as a counter does

    def change(self, copies_max: int) -> None:
        """Wish for at most so many copies from now on; what was counted stays."""
        self._copies_max = copies_max

    def planned(
        self,
        now_s: float,
        keys: Sequence[bytes],
        hit_blocks: int,
        block_bytes: int,
        block_tokens: int,
        ranks: int = 1,
    ) -> None:
        """A request is going to use the first `hit_blocks` of its `keys` from the pool."""
        if self._copies_max < COPIES_MIN or hit_blocks <= 0 or block_bytes <= 0:
            return
        self._uses = self._uses_at(now_s) + 1
        self._used_s = now_s
        rungs = _rungs(min(hit_blocks, len(keys)))
        heads = self._heads
        for number in range(len(rungs) - 1, -1, -1):  # deepest first: what is forgotten first is deep, too
            key = keys[rungs[number] - 1]
            head = heads.pop(key, None)
            if head is None:
                parent = keys[rungs[number - 1] - 1] if number else b""
                head = _Head(now_s, parent, rungs[number])
            head.uses = head.uses_at(now_s) + 1
            head.at_s = now_s
            head.shape = block_bytes, block_tokens, ranks
            heads[key] = head
        begin = 0
        for depth in rungs:
            key = keys[depth - 1]
            head = heads[key]
            if key not in self._warm and head.uses >= USES_MIN:
                if self._keys + depth - begin > 2 * KEYS_MAX:
                    break  # until others have cooled down
                head.keys = tuple(keys[begin:depth])
                self._keys += depth - begin
                self._warm[key] = head
            begin = depth
        while len(heads) > HEADS_MAX:
            oldest = next(iter(heads))
            if oldest in self._warm:
                self._cool(oldest)
            del heads[oldest]

    def step(self, now_s: float, nodes: int, keys_max: int = KEYS_MAX) -> list[Wish]:
        """Return every wish there is now, shallow ones first; others there were are no more.

        Args:
            now_s: the time.
            nodes: that could have a copy.
            keys_max: that each of them has room for.
        """
        ceiling = min(nodes, self._copies_max)
        asked: dict[bytes, int] = {}
        for key, head in sorted(self._warm.items(), key=lambda item: (-item[1].depth, item[0])):
            worth = head.uses_at(now_s) / USES_MIN * self._worth(head)
            head.copies = min(max(head.copies, int(worth)), int(worth / LINGER))
            copies = max(min(head.copies, ceiling), asked.get(key, 0))
            if copies >= COPIES_MIN:
                asked[key] = copies
                if head.parent in self._warm:  # a deep block is no use without those before it
                    asked[head.parent] = max(copies, asked.get(head.parent, 0))
            elif worth < LINGER:
                self._cool(key)
        return self._wishes(now_s, asked, min(keys_max, KEYS_MAX))

    def top_share(self, now_s: float) -> float:
        """Return which part of the uses began with the block that most of them began with; 0: too few."""
        first = (head.uses_at(now_s) for head in self._warm.values() if head.depth == 1)
        return max(first, default=0.0) / max(USES_MIN, self._uses_at(now_s))

    def _uses_at(self, now_s: float) -> float:
        return self._uses * exp(min(0.0, self._used_s - now_s) / MEMORY_S)

    @property
    def counted(self) -> int:
        """Prefixes that are counted now."""
        return len(self._heads)

    @property
    def kept(self) -> int:
        """Keys that are remembered now."""
        return self._keys

    def _worth(self, head: _Head) -> float:
        """Return what a copy saves per use, in fetches of it."""
        size_bytes, tokens, _ = head.shape
        fetch_s = self._cost.transfer_s(head.depth * size_bytes, remote=True)
        # the rest of the prompt is computed in any case, with all that a step costs by itself
        compute_s = self._cost.prefill_s(head.depth * tokens, 0) - self._cost.prefill_s(0, 0)
        return min(1.0, compute_s / fetch_s)

    def _wishes(self, now_s: float, asked: dict[bytes, int], keys_max: int) -> list[Wish]:
        """Take the most used as far as there is room, and put what follows on each other into one wish."""
        warm = self._warm
        order = sorted(asked, key=lambda key: (-warm[key].uses_at(now_s), warm[key].depth, key))
        chosen: dict[bytes, int] = {}
        children: dict[bytes, int] = {}
        for key in order:
            head = warm[key]
            if len(head.keys) <= keys_max and (not head.parent or head.parent in chosen):
                chosen[key] = asked[key]
                children[head.parent] = children.get(head.parent, 0) + 1
                keys_max -= len(head.keys)
        found: dict[bytes, tuple[_Head, list[bytes]]] = {}  # by the last key so far
        for key in sorted(chosen, key=lambda key: (warm[key].depth, key)):
            head = warm[key]
            if children[head.parent] == 1 and chosen.get(head.parent) == chosen[key]:
                first, keys = found.pop(head.parent)
            else:
                first, keys = head, []
            keys += head.keys
            found[key] = first, keys
        wishes = [
            Wish(tuple(keys), chosen[last], first.shape[0], first.parent, first.shape[2])
            for last, (first, keys) in found.items()
        ]
        depths = {last: first.depth for last, (first, _) in found.items()}
        return sorted(wishes, key=lambda wish: (depths[wish.keys[-1]], wish.keys[0]))

    def _cool(self, key: bytes) -> None:
        head = self._warm.pop(key)
        self._keys -= len(head.keys)
        head.keys, head.copies = (), 0


def candidates(cluster: ClusterView) -> list[str]:
    """Return the hosts where prompts are computed and whose stores copy from others."""
    hosts = [record.node for record, _ in cluster.alive() if record.role in {"prefill", "both"}]
    return [node for node in dict.fromkeys(hosts) if cluster.is_open(node)]


def placed(wishes: Sequence[Wish], nodes: Sequence[str], index: PrefixIndex) -> list[tuple[Wish, list[str]]]:
    """Return the wishes of one `step`, each with `nodes` in the order in which they should have copies.

    First who has most of it, then who has, or gets, what comes before it. Gateways that know the same order
    alike; prefixes that nobody has begin at different nodes.
    """
    taken: dict[bytes, list[str]] = {}
    found = []
    for wish in wishes:
        depths = index.longest_prefix(wish.keys)
        before = taken.get(wish.parent, [])

        def rank(
            node: str, wish: Wish = wish, depths: dict[str, int] = depths, before: list[str] = before
        ) -> tuple[int, bool, bytes]:
            draw = blake2b(node.encode(), key=wish.keys[0][:64], digest_size=16).digest()
            return -depths.get(node, 0), node not in before, draw

        order = sorted(nodes, key=rank)
        taken[wish.keys[-1]] = order[: wish.copies]
        found.append((wish, order))
    return found


def _rungs(depth: int) -> list[int]:
    """Return the depths up to `depth` that are counted."""
    found, rung = [], 1
    while rung <= min(depth, DEPTH_MAX):
        found.append(rung)
        rung += max(1, rung // RUNG)
    return found
