"""Bytes that an index takes for each block, in a process of its own: filled, and after blocks came and went.

Blocks come by CHUNK_BLOCKS, each chunk to two or three nodes (2.7 in the mean, as in benchmarks.decide), and
leave in the order they came; a chunk's names are made again when it leaves: only the index remembers any.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.decide_peers.base import NODES, SEED

CHUNK_BLOCKS = 1_000
PAGE_BYTES = 4_096
Change = Callable[[int, int, random.Random], None]
"""Takes the number of a chunk, a node, and what draws the chunk's names."""


def resident_bytes() -> int:
    """Return what this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def nodes_of(chunk: int) -> list[int]:
    """Return who holds a chunk."""
    return random.Random(chunk).sample(range(NODES), 2 if chunk % 10 < 3 else 3)


def measure(store: Change, remove: Change, blocks: int, churned: int) -> dict[str, float]:
    """Return bytes per block: filled, the most seen since, and in the end."""

    def change(what: Change, chunk: int) -> None:
        for node in nodes_of(chunk):
            what(chunk, node, random.Random(SEED + chunk))

    chunks = blocks // CHUNK_BLOCKS
    empty = resident_bytes()
    for chunk in range(chunks):
        change(store, chunk)
    seen = [resident_bytes()]
    for chunk in range(chunks, chunks + churned // CHUNK_BLOCKS):
        change(store, chunk)
        change(remove, chunk - chunks)
        seen.append(resident_bytes())
    filled, most, end = ((one - empty) / blocks for one in (seen[0], max(seen), seen[-1]))
    return {"filled": filled, "most": most, "end": end}


def ours() -> tuple[Change, Change]:
    """Return what changes a PrefixIndex."""
    from conductor.index import PrefixIndex
    from mooncake.core.keys import KEY_BYTES

    index = PrefixIndex()

    def store(_: int, node: int, draw: random.Random) -> None:
        index.apply(f"n{node:02}", draw.randbytes(CHUNK_BLOCKS * KEY_BYTES), b"")

    def remove(_: int, node: int, draw: random.Random) -> None:
        index.apply(f"n{node:02}", b"", draw.randbytes(CHUNK_BLOCKS * KEY_BYTES))

    return store, remove


def dynamo() -> tuple[Change, Change]:
    """Return what changes a RadixTree."""
    from dynamo.llm import RadixTree  # type: ignore[import-not-found]

    tree = RadixTree()
    events = iter(range(1, 1 << 62))

    def apply(node: int, data: dict[str, object]) -> None:
        event = {"event_id": next(events), "dp_rank": 0, "data": data}
        tree.apply_event(node, json.dumps(event).encode())

    def store(chunk: int, node: int, draw: random.Random) -> None:
        first = chunk * CHUNK_BLOCKS + 1
        blocks = [{"block_hash": first + n, "tokens_hash": draw.getrandbits(64)} for n in range(CHUNK_BLOCKS)]
        apply(node, {"stored": {"parent_hash": None, "blocks": blocks}})

    def remove(chunk: int, node: int, _: random.Random) -> None:
        first = chunk * CHUNK_BLOCKS + 1
        apply(node, {"removed": {"block_hashes": list(range(first, first + CHUNK_BLOCKS))}})

    return store, remove


def main() -> None:
    """Arguments: ours or dynamo, blocks, blocks that come and go."""
    kind, blocks, churned = sys.argv[1:]
    made = {"ours": ours, "dynamo": dynamo}[kind]()
    print(json.dumps(measure(*made, int(blocks), int(churned))))
