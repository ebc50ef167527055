"""What was computed once is not computed again: by the same engine, by another, by its successor."""

import os
import signal

import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK, Cluster
from tests.integration.reference import random_prompt
from tests.integration.setups import FP32

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [FP32], ids=lambda setup: setup.name, indirect=True),
]

PREFIX, REST = 40 * BLOCK, 70


def computed_tokens(cluster: Cluster) -> float:
    """Return the prompt tokens that engines had to compute for clients so far."""
    return cluster.metric("vllm:prompt_tokens_by_source_total", source="local_compute")


def pool_hits(cluster: Cluster) -> float:
    """Return the prompt tokens that the prefill engine took from the pool."""
    return cluster.counters("prefill-0")["hit_tokens"]


def test_a_second_request_recomputes_only_what_is_new(cluster: Cluster):
    prefix = random_prompt(PREFIX, 6000)
    first, second = prefix + random_prompt(REST, 6001), prefix + random_prompt(REST, 6002)
    assert cluster.client.complete(first, max_tokens=4, **GREEDY).cached == 0
    computed = computed_tokens(cluster)
    answer = cluster.client.complete(second, max_tokens=4, **GREEDY)
    assert answer.cached == PREFIX
    assert answer.usage["prompt_tokens"] == PREFIX + REST
    assert computed_tokens(cluster) - computed == REST
    cluster.assert_nothing_leaked()


def test_the_pool_serves_an_engine_that_has_forgotten(cluster: Cluster):
    prompt = random_prompt(PREFIX + REST, 6010)
    first = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    cluster.forget_locally()
    hits = pool_hits(cluster)
    second = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    full = len(prompt) // BLOCK * BLOCK
    assert second.cached == full
    assert pool_hits(cluster) - hits == full
    assert second.outcome == first.outcome


def test_the_pool_outlives_the_prefill_engine(cluster: Cluster):
    prompt = random_prompt(PREFIX + REST, 6020)
    first = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    epoch = cluster.epochs()["prefill-0"]
    os.killpg(cluster.worker_pid("prefill-0"), signal.SIGKILL)
    cluster.wait_restarted("prefill-0", epoch)
    assert pool_hits(cluster) == 0, "a new engine with new counters"
    answer = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    full = len(prompt) // BLOCK * BLOCK
    assert answer.outcome == first.outcome
    assert answer.cached == full
    assert pool_hits(cluster) == full
    assert cluster.counters("prefill-0")["load_blocks"] == full // BLOCK
    cluster.assert_nothing_leaked()


def test_the_next_turn_of_a_conversation_hits_what_was_decoded(cluster: Cluster):
    prompt = random_prompt(5 * BLOCK, 6030)
    first = cluster.client.complete(prompt, max_tokens=3 * BLOCK, **GREEDY)
    cluster.forget_locally()
    turn = [*prompt, *first.tokens, *random_prompt(20, 6031)]
    answer = cluster.client.complete(turn, max_tokens=4, **GREEDY)
    # the last decoded token's KV was never computed: its block is not full
    assert answer.cached == (len(prompt) + len(first.tokens) - 1) // BLOCK * BLOCK


def test_tenants_do_not_share_blocks(cluster: Cluster):
    prompt = random_prompt(PREFIX + REST, 6040)
    plain = cluster.client.complete(prompt, max_tokens=16, **GREEDY)
    for salt in ("tenant a", "tenant b"):
        assert cluster.client.complete(prompt, max_tokens=16, cache_salt=salt, **GREEDY).cached == 0
    cluster.forget_locally()
    for salt in ("tenant a", "tenant b"):
        again = cluster.client.complete(prompt, max_tokens=16, cache_salt=salt, **GREEDY)
        assert again.cached == len(prompt) // BLOCK * BLOCK
        assert again.outcome == plain.outcome
    stranger = cluster.client.complete(prompt, max_tokens=16, cache_salt="tenant c", **GREEDY)
    assert stranger.cached == 0
    keys = [cluster.keys(prompt, salt)[0] for salt in (None, "tenant a", "tenant b", "tenant c")]
    offsets = [tuple(block.offset for block in cluster.blocks(chain).blocks) for chain in keys]
    assert len({*offsets}) == len(keys)
    assert all(len(chain) == len(prompt) // BLOCK for chain in offsets)
