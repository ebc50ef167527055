"""ai-dynamo-runtime's Rust bindings: block hashes of a list of tokens, then RadixTree.find_matches.

Its tree answers with the depth of every worker; choosing among them is its router's business, which needs a
running cluster: not timed here, in its favour. Events are fed as its own publisher spells them.
"""

import json
import random
from pathlib import Path

from dynamo.llm import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]

from benchmarks.decide_peers.base import (
    ASKED,
    BLOCK_TOKENS,
    SEED,
    Decider,
    Go,
    Tokens,
    holdings,
    path_of,
    tokens_of,
)


class Tree:
    """A RadixTree with numbered blocks."""

    def __init__(self, groups: int) -> None:
        """Filled."""
        draw = random.Random(SEED + 1)
        self.tree = RadixTree()
        self.event = 0
        self.local: dict[int, int] = {}
        for group in range(ASKED):
            hashes = compute_block_hash_for_seq(tokens_of(group).tolist(), BLOCK_TOKENS)
            self.local.update(zip(path_of(group, 0), hashes, strict=True))
        for node, path in holdings(groups):
            for number in path:
                if number not in self.local:
                    self.local[number] = draw.getrandbits(64)
            self.store(node, path)

    def store(self, node: int, path: list[int]) -> None:
        """`node` holds the blocks of `path` from the first on."""
        blocks = [{"block_hash": number + 1, "tokens_hash": self.local[number]} for number in path]
        self.apply(node, {"stored": {"parent_hash": None, "blocks": blocks}})

    def apply(self, node: int, data: dict[str, object]) -> None:
        """Send an event."""
        self.event += 1
        event = {"event_id": self.event, "dp_rank": 0, "data": data}
        self.tree.apply_event(node, json.dumps(event).encode())


class Dynamo(Decider):
    """HASH, MATCH, and DECIDE for both."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Decider."""
        super().__init__(pool_bytes, folder)
        self.index = Tree(self.groups)

    def depth(self, tokens: list[int]) -> int:
        """See Decider."""
        scores = self.index.tree.find_matches(compute_block_hash_for_seq(tokens, BLOCK_TOKENS)).scores
        return max(scores.values(), default=0)

    def ready(self, op: str, prompts: list[Tokens]) -> tuple[Go, Go]:
        """See Decider."""
        tree, turn = self.index.tree, 0
        tokens: list[int] = []
        hashes: list[int] = []

        def before() -> None:
            nonlocal turn, tokens, hashes
            turn = (turn + 1) % ASKED
            tokens = prompts[turn].tolist()
            if op == "MATCH":
                hashes = compute_block_hash_for_seq(tokens, BLOCK_TOKENS)

        if op == "HASH":
            return lambda: compute_block_hash_for_seq(tokens, BLOCK_TOKENS), before
        if op == "MATCH":
            return lambda: tree.find_matches(hashes).scores, before
        return lambda: tree.find_matches(compute_block_hash_for_seq(tokens, BLOCK_TOKENS)).scores, before
