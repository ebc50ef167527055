"""ai-dynamo-runtime's RadixTree, by itself: python dynamo.py BLOCKS BLOCK_SIZE FOR_S. Prints JSON.

Its bindings take tokens as a list and hash them in Rust; there is no HTTP API of it to compare with. Its tree
has no salts, adapters or contexts: those are its caller's business.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from dynamo.llm import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]

from benchmarks.indexer_peers.work import ASKED, LENGTHS, chains_of, holdings, timed, tokens_of


def main() -> None:
    """See the module."""
    blocks, size, for_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    tree, spent_s, held = RadixTree(), 0.0, 0
    local: dict[int, list[int]] = {}
    for event, (chain, node, count) in enumerate(holdings(chains_of(blocks, size), size)):
        if chain not in local:
            local = {chain: compute_block_hash_for_seq(tokens_of(chain).tolist(), size)}
        known = [
            {"block_hash": (chain << 32) + at + 1, "tokens_hash": one}
            for at, one in enumerate(local[chain][:count])
        ]
        told = {"event_id": event, "dp_rank": 0, "data": {"stored": {"parent_hash": None, "blocks": known}}}
        body = json.dumps(told).encode()
        started_s = time.process_time()
        tree.apply_event(node, body)
        spent_s += time.process_time() - started_s
        held += count
    found: dict[str, Any] = {"store_us_per_block": 1e6 * spent_s / held}
    prompts = [tokens_of(number) for number in range(ASKED)]
    for length in LENGTHS:
        lists = [one[:length].tolist() for one in prompts]

        def ask(number: int, lists: list[list[int]] = lists) -> Any:
            return tree.find_matches(compute_block_hash_for_seq(lists[number], size)).scores

        assert max(ask(0).values()) == length // size
        found[str(length)] = timed(ask, for_s)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
