"""What indexes of benchmarks.indexer are filled with and asked; by the standard library, as peers lack ours.

CHAINS prompts of CHAIN_TOKENS; each is held in full by one node, and by up to seven others to some depth: 2.7
holders a block. Asked are the first tokens of some of them, which are known to the end.
"""

import random
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

NODES = 64
CHAIN_TOKENS = 131_072
LENGTHS = (8_192, 32_768, 131_072)
ASKED = 8
HOLDERS_MAX = 8
VOCABULARY = 1 << 17
SEED = 1


def tokens_of(chain: int) -> "array[int]":
    """Return the tokens of a prompt."""
    data = array("i", random.Random(SEED + chain).randbytes(4 * CHAIN_TOKENS))
    return array("i", [one & (VOCABULARY - 1) for one in data])


def chains_of(blocks: int, block_size: int) -> int:
    """Return how many prompts make about so many blocks."""
    return max(ASKED, round(blocks * block_size / CHAIN_TOKENS))


def holdings(chains: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (chain, node, blocks from the first on)."""
    draw = random.Random(SEED)
    count = CHAIN_TOKENS // block_size
    for chain in range(chains):
        nodes = draw.sample(range(NODES), draw.randint(1, HOLDERS_MAX))
        yield chain, nodes[0], count
        for node in nodes[1:]:
            yield chain, node, draw.randint(count // 8, count)


def timed(go: Callable[[int], Any], for_s: float) -> dict[str, float]:
    """Call `go` with the numbers of prompts in turn; return microseconds of wall and of CPU, medians."""
    walls, cpus = [], []
    for number in range(ASKED):
        go(number)
    end_s, number = time.perf_counter() + for_s, 0
    while time.perf_counter() < end_s or number < ASKED:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        go(number % ASKED)
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.process_time() - cpu_s)
        number += 1
    return {
        "p50_us": 1e6 * statistics.median(walls),
        "cpu_us": 1e6 * statistics.mean(cpus),
        "count": number,
    }
