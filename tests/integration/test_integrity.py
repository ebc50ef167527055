"""Bytes in the pool are damaged behind its back: clients get right tokens, the damage is counted and gone.

The test maps the pool's segment as an engine does and writes into it. Engines forget their own
caches first, so that what they use really comes from the pool.
"""

from collections.abc import Callable

import pytest

from mooncake.core.keys import block_checksum
from mooncake.core.messages import Block
from tests.integration.client import GREEDY
from tests.integration.cluster import Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import FP32, FP32_LAYERWISE
from transfer.fdpass import fetch_segment
from transfer.segment import Segment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [FP32, FP32_LAYERWISE], ids=lambda setup: setup.name, indirect=True),
]

LENGTH = 32 * 9 + 17
"""Nine full blocks and a tail."""

Damage = Callable[[Segment, list[Block], list[Block]], list[int]]
"""Damages blocks of a prompt (the second list is another prompt's); returns which are bad now."""


def view(segment: Segment, block: Block) -> memoryview:
    return segment.view(block.offset, block.size_bytes)


def flip_one_byte(segment: Segment, mine: list[Block], other: list[Block]) -> list[int]:
    view(segment, mine[4])[12345] ^= 0x01
    return [4]


def swap_two_blocks(segment: Segment, mine: list[Block], other: list[Block]) -> list[int]:
    one, two = view(segment, mine[2]), view(segment, mine[6])
    one[:], two[:] = bytes(two), bytes(one)
    return [2, 6]


def put_stale_content(segment: Segment, mine: list[Block], other: list[Block]) -> list[int]:
    view(segment, mine[0])[:] = view(segment, other[0])
    return [0]


def tear_a_write(segment: Segment, mine: list[Block], other: list[Block]) -> list[int]:
    size = mine[8].size_bytes
    view(segment, mine[8])[size // 2 :] = bytes(size - size // 2)
    return [8]


def damage_every_block(segment: Segment, mine: list[Block], other: list[Block]) -> list[int]:
    for block in mine:
        view(segment, block)[0] ^= 0x80
    return list(range(len(mine)))


DAMAGES = [flip_one_byte, swap_two_blocks, put_stale_content, tear_a_write, damage_every_block]


def is_sound(segment: Segment, key: bytes, block: Block) -> bool:
    return block_checksum(key, view(segment, block)) == block.checksum


def failures(cluster: Cluster) -> tuple[float, int]:
    """Return how often engines, and the store itself, found wrong bytes."""
    engines = sum(cluster.counters(name)["bad_blocks"] for name in cluster.states())
    return engines, cluster.store_stats().checksum_failures


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_blocks_are_recomputed_counted_and_dropped(cluster: Cluster, damage: Damage):
    seed = 5000 + DAMAGES.index(damage)
    prompt, other = random_prompt(LENGTH, seed), random_prompt(LENGTH, seed + 100)
    wanted = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    cluster.client.complete(other, max_tokens=1, **GREEDY)
    keys, _ = cluster.keys(prompt)
    other_keys, _ = cluster.keys(other)
    mine, others = cluster.blocks(keys).blocks, cluster.blocks(other_keys).blocks
    assert len(mine) == len(others) == len(keys) == 9
    cluster.forget_locally()
    seen, dropped = failures(cluster)
    segment = fetch_segment(cluster.store_record().fd_path, 5.0)
    try:
        assert all(is_sound(segment, key, block) for key, block in zip(keys, mine, strict=True))
        bad = damage(segment, mine, others)
        assert all(not is_sound(segment, keys[i], mine[i]) for i in bad)

        answer = cluster.client.complete(prompt, max_tokens=24, **GREEDY)

        assert answer.outcome == wanted.outcome
        wait_until("the store dropped them", lambda: failures(cluster)[1] - dropped == len(bad), 3.0)
        assert failures(cluster)[0] - seen >= len(bad)
        assert answer.cached < wanted.usage["prompt_tokens"]
        # what is in the pool now is right again, and used
        cluster.forget_locally()
        again = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
        assert again.outcome == wanted.outcome
        now = cluster.blocks(keys).blocks
        assert all(is_sound(segment, key, block) for key, block in zip(keys, now, strict=False))
        assert len(now) == len(keys), "recomputed blocks are saved again"
        assert failures(cluster)[1] - dropped == len(bad)
    finally:
        segment.close()
    cluster.assert_nothing_leaked()


def test_a_damaged_tail_is_found_by_decode(cluster: Cluster):
    prompt = random_prompt(LENGTH, 5050)
    wanted = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    keys, tail = cluster.keys(prompt)
    assert tail is not None
    (*_, block) = cluster.blocks([*keys, tail]).blocks
    cluster.forget_locally()
    seen = cluster.counters("decode-0")["bad_blocks"]
    segment = fetch_segment(cluster.store_record().fd_path, 5.0)
    try:
        view(segment, block)[777] ^= 0x10
        assert not is_sound(segment, tail, block)
        answer = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    finally:
        segment.close()
    assert answer.outcome == wanted.outcome
    assert cluster.counters("decode-0")["bad_blocks"] == seen + 1
    wait_until("dropped", lambda: len(cluster.blocks([*keys, tail]).blocks) == len(keys), 3.0)
    cluster.assert_nothing_leaked()
