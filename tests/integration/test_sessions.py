"""A program's context outlives a tool's pause under memory pressure, and its next turn may be appended."""

from typing import Any

import httpx
import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK, Cluster, Setup, wait_until
from tests.integration.reference import random_prompt

SMALL_POOL = Setup("fp32 small pool", flags=("--pool-size=8MiB", "--tbt-slo-s=60"))
pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [SMALL_POOL], ids=lambda setup: setup.name, indirect=True),
]

CONTEXT = 20
"""Blocks of the first turn."""
QUEUED = 10
"""Prompts that wait for the prefill instance, of LONG blocks each: seconds of work."""
LONG = 60
TOLD_S = 60.0
AGENT = {"x-program-id": "run-1", "x-cache-ttl-s": "500"}


def complete(cluster: Cluster, prompt: list[int], headers: dict[str, str] | None = None) -> dict[str, Any]:
    body = {
        "model": cluster.client.model,
        "prompt": prompt,
        "max_tokens": 4,
        "return_token_ids": True,
        **GREEDY,
    }
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers or {}, timeout=120.0)
    return dict(answer.raise_for_status().json())


def cached(answer: dict[str, Any]) -> int:
    return int((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def tokens(answer: dict[str, Any]) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def told(cluster: Cluster) -> float:
    return cluster.metric("mooncake_keep_orders_total", result="sent")


def decisions(cluster: Cluster, kind: str) -> float:
    return cluster.metric("mooncake_decisions_total", kind=kind)


def prompts_waiting(cluster: Cluster) -> int:
    return sum(row["load"]["prefill_requests"] for row in cluster.view()["instances"])


def test_the_context_of_a_program_stays_while_its_tool_runs_and_a_strangers_goes(cluster: Cluster):
    first, stranger = random_prompt(CONTEXT * BLOCK + 5, 8100), random_prompt(CONTEXT * BLOCK + 5, 8101)
    before = told(cluster)
    complete(cluster, first, AGENT)
    complete(cluster, stranger)
    wait_until("the store is told", lambda: told(cluster) > before, TOLD_S)
    room = (8 << 20) // cluster.record("prefill-0").block_bytes
    for number in range(2 * room // CONTEXT + 1):  # twice what the pool has room for
        complete(cluster, random_prompt(CONTEXT * BLOCK, 8200 + number))
    cluster.forget_locally()
    assert cached(complete(cluster, stranger)) < CONTEXT * BLOCK
    again = complete(cluster, [*first, *random_prompt(40, 8102)], AGENT)
    assert cached(again) >= CONTEXT * BLOCK


def test_a_next_turn_is_appended_where_it_is_decoded_when_prompts_queue_with_the_same_answer(
    cluster: Cluster,
):
    first = random_prompt(CONTEXT * BLOCK + 5, 8300)
    turn = [*first, *random_prompt(40, 8301)]
    complete(cluster, first, AGENT)
    plain = complete(cluster, turn)
    appended = decisions(cluster, "appended")
    streams = [
        cluster.client.stream(random_prompt(LONG * BLOCK, 8400 + number), max_tokens=2, **GREEDY)
        for number in range(QUEUED + 2)
    ]
    wait_until("prompts queue", lambda: prompts_waiting(cluster) >= QUEUED, TOLD_S, every_s=0.01)
    answer = complete(cluster, turn, AGENT)
    for stream in streams:
        stream.result()
    assert decisions(cluster, "appended") == appended + 1
    assert tokens(answer) == tokens(plain)
