"""What every contender of benchmarks.decide is asked: the same prompts, over the same million blocks.

Blocks are numbered. A group is a prefix of SHARED_BLOCKS and CHAINS ways to go on; a chain is held by one to
eight nodes, by the first in full and by the others to some depth: 2.7 holders a block. The first chain of
the first ASKED groups has tokens, and is asked for: in full, to its middle, or not at all (the rest of the
prompt is new, and another one each time a sample begins). The other blocks only fill the index.
Tokens come as a list that was made just before, as a tokenizer makes it: its ints are in a cache still.
"""

import gc
import random
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from benchmarks.transfer_peers.worker import Contender

NODES = 64
BLOCK_TOKENS = 128
PROMPT_TOKENS = 128_000
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
SHARED_BLOCKS = 100
CHAINS = 10
GROUP_BLOCKS = SHARED_BLOCKS + CHAINS * (PROMPT_BLOCKS - SHARED_BLOCKS)
HOLDERS_MAX = 8
ASKED = 12
VOCABULARY = 128_000
CHURN_KEYS = 64
"""Blocks of one message of a node: a prompt of 8k tokens was stored."""
SEED = 1
GOES_MAX = 400
Go = Callable[[], object]
Tokens: TypeAlias = "array[int]"


def tokens_of(seed: int) -> Tokens:
    """Return the token ids of a prompt."""
    drawn = np.random.default_rng(seed).integers(300, VOCABULARY, PROMPT_TOKENS, np.uint32)
    return array("I", drawn.tobytes())


def prompt(number: int, depth_percent: int, fresh: int) -> Tokens:
    """Return the prompt of asked chain `number`: known up to a depth, then new by `fresh`."""
    known = PROMPT_TOKENS * depth_percent // 100
    return tokens_of(number)[:known] + tokens_of(1_000_000 + fresh)[known:]


def path_of(group: int, chain: int) -> list[int]:
    """Return the numbers of a chain's blocks."""
    first = group * GROUP_BLOCKS
    own = first + SHARED_BLOCKS + chain * (PROMPT_BLOCKS - SHARED_BLOCKS)
    return [*range(first, first + SHARED_BLOCKS), *range(own, own + PROMPT_BLOCKS - SHARED_BLOCKS)]


def groups_of(blocks: int) -> int:
    """Return how many groups make about so many blocks."""
    return max(ASKED, round(blocks / GROUP_BLOCKS))


def holdings(groups: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (node, numbers of blocks from the first on) of all that is held."""
    draw = random.Random(SEED)
    for group in range(groups):
        for chain in range(CHAINS):
            path = path_of(group, chain)
            nodes = draw.sample(range(NODES), draw.randint(1, HOLDERS_MAX))
            yield nodes[0], path
            for node in nodes[1:]:
                yield node, path[: draw.randint(SHARED_BLOCKS, PROMPT_BLOCKS)]


class Decider(Contender):
    """Subclasses fill `ready`, and `ops` of CELLS in benchmarks.decide."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """`pool_bytes` is the number of blocks here."""
        super().__init__(pool_bytes, folder)
        self.groups = groups_of(pool_bytes)
        self.turn = 0

    def ready(self, op: str, prompts: list[Tokens]) -> tuple[Go, Go]:
        """Return what is timed, and what is done before each time, untimed."""
        raise NotImplementedError

    def depth(self, tokens: list[int]) -> int:
        """Return the depth, in blocks, of the best hit."""
        raise NotImplementedError

    def check(self) -> None:
        """The answers are what was put in."""
        for percent in (0, 50, 100):
            depth = self.depth(prompt(0, percent, 0).tolist())
            if depth != PROMPT_BLOCKS * percent // 100:
                raise RuntimeError(f"{percent} % of a prompt is known, {depth} blocks are found")

    def run(self, op: str, size: int, pages: int, for_s: float) -> dict[str, float]:  # noqa: ARG002
        """Ask for about `for_s` seconds, each prompt in its turn, after once that is not counted."""
        kind, _, percent = op.partition(" ")
        self.turn += 1
        prompts = [prompt(n, int(percent), self.turn * ASKED + n) for n in range(ASKED)]
        go, before = self.ready(kind, prompts)
        times: list[float] = []
        gc.collect()
        gc.disable()
        spent: list[float] = []
        for number in range(-ASKED, GOES_MAX):
            before()
            spent_s, started_s = time.process_time(), time.perf_counter()
            go()
            took_s, spent_s = time.perf_counter() - started_s, time.process_time() - spent_s
            if number < 0:
                continue
            times.append(took_s)
            spent.append(spent_s)
            if sum(times) > for_s:
                break
        gc.enable()
        median_s, p99_s = (float(one) for one in np.percentile(times, (50, 99)))
        return {
            "count": len(times),
            "seconds": sum(times),
            "median_s": median_s,
            "p99_s": p99_s,
            "cpu_s": float(np.median(spent)) * len(times),
        }
