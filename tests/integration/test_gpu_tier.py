"""The Conductor knows what engines' own caches hold, from vLLM's events, and sends prompts back to them."""

from typing import Any

import httpx
import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK, Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import AGGREGATED

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [AGGREGATED], ids=lambda setup: setup.name, indirect=True),
]

FULL = 20
TOLD_S = 30.0


def last_decision(cluster: Cluster) -> dict[str, Any]:
    """Return why the last request went where it went."""
    answer = httpx.get(f"{cluster.url}/mooncake/decisions", timeout=10.0).raise_for_status()
    return dict(answer.json()["decisions"][0])


def known(cluster: Cluster, instance_id: str) -> float:
    return cluster.metric("mooncake_gpu_blocks_known", instance_id=instance_id)


def is_exact(cluster: Cluster) -> bool:
    return cluster.metric("mooncake_index_mode", mode="exact") == 1


def test_a_prompt_goes_back_to_the_engine_whose_own_cache_has_it_and_nothing_is_loaded(cluster: Cluster):
    prompt = random_prompt(FULL * BLOCK + 5, 7100)
    # both are idle, so that a stream goes to the first and what comes meanwhile to the second
    stream = cluster.client.stream(random_prompt(40, 7101), max_tokens=4000, **GREEDY)
    stream.wait_tokens(1)
    before = known(cluster, "both-1")
    first = cluster.client.complete(prompt, max_tokens=4, **GREEDY)
    assert last_decision(cluster)["decode"] == "both-1"
    stream.hang_up()
    cluster.assert_nothing_leaked(10.0)  # both are idle again: by load alone the first would be next
    wait_until("the blocks are known", lambda: known(cluster, "both-1") >= before + FULL, TOLD_S)
    wait_until("the index is in step with all", lambda: is_exact(cluster), TOLD_S)

    loaded = cluster.counters("both-1")["load_blocks"]
    again = cluster.client.complete(prompt, max_tokens=4, **GREEDY)
    decision = last_decision(cluster)
    options = {option["instance"]: option for option in decision["prefills"]}
    assert decision["decode"] == "both-1"
    assert (options["both-1"]["hit_blocks"], options["both-1"]["gpu_blocks"]) == (FULL, FULL)
    # the pool has the blocks for either of them, but loading takes time
    assert (options["both-0"]["hit_blocks"], options["both-0"]["gpu_blocks"]) == (FULL, 0)
    assert options["both-1"]["work_s"] < options["both-0"]["work_s"]
    assert again.cached == FULL * BLOCK
    assert cluster.counters("both-1")["load_blocks"] == loaded
    assert again.outcome == first.outcome


def test_what_an_engine_forgets_is_not_expected_of_it(cluster: Cluster):
    prompt = random_prompt(FULL * BLOCK + 5, 7110)
    cluster.client.complete(prompt, max_tokens=4, **GREEDY)
    chosen = last_decision(cluster)["decode"]
    wait_until("the blocks are known", lambda: known(cluster, chosen) >= FULL, TOLD_S)
    cluster.forget_locally()
    cluster.client.complete(random_prompt(BLOCK + 1, 7111), max_tokens=4, **GREEDY)
    other = last_decision(cluster)["decode"]  # vLLM tells of it with the next step of that engine
    wait_until("the engine's cache is known to be empty", lambda: known(cluster, other) == 1, TOLD_S)
