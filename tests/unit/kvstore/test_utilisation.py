"""A full node uses its memory: KV blocks of several sizes, put, used and evicted over and over."""

from random import Random

import pytest

from kvstore.node.node import Node

KIB = 1024
MIB = 1024 * KIB
CAPACITY = 1024 * MIB
ROUNDS = 3
"""How often the whole memory is written anew."""
TOKEN_BYTES = 96 * KIB
"""A tail of n tokens takes n times as much; 32 of them are a block of 3 MiB."""
MIXES: dict[str, tuple[int | None, ...]] = {  # None: a tail of any number of tokens
    "one model": (3 * MIB,),
    "one small model": (576 * KIB,),
    "a model and one of half its size": (3 * MIB, 3 * MIB // 2),
    "a small model and a draft model": (576 * KIB, 40 * KIB),
    "three models": (3 * MIB, 576 * KIB, 40 * KIB),
    "a model, one of ten blocks is a tail": (*(3 * MIB,) * 9, None),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("seed", [1, 2])
def test_a_node_that_is_full_uses_95_percent_of_its_memory(mix, seed):
    random = Random(seed)
    node = Node(CAPACITY)
    put_bytes, keys, shares = 0, [], []
    while put_bytes < ROUNDS * CAPACITY:
        size = random.choice(mix) or random.randrange(1, 32) * TOKEN_BYTES
        names = [random.randbytes(32) for _ in range(random.randrange(1, 9))]
        got = node.reserve(0.0, "w", names, size)
        assert min(got.offsets) >= 0, "there is always something to evict"
        node.commit(0.0, got.tickets, [bytes(16)] * len(names))
        node.drain_events()
        keys = keys[-500:] + names
        if random.random() < 0.3:  # hits make the order of eviction another one than that of memory
            node.release(0.0, node.acquire(0.0, [random.choice(keys)], 1.0).lease_id)
        put_bytes += size * len(names)
        if put_bytes > 2 * CAPACITY:
            shares.append(node.stats().used_bytes / CAPACITY)
    assert sum(shares) / len(shares) >= 0.95
