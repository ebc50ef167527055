"""Four times what fits: every request gets an answer, and nothing of it stays."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.integration.client import ANSWER_S, GREEDY
from tests.integration.cluster import Cluster
from tests.integration.reference import random_prompt
from tests.integration.setups import FP32

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [FP32], ids=lambda setup: setup.name, indirect=True),
]

FITS, SENT = 8, 32
PROMPT, TOKENS = 2000, 4


def predicted_work_s(cluster: Cluster) -> float:
    """Return what the Conductor takes a prompt of ours for, taught by a few."""
    for number in range(4):
        cluster.client.complete(random_prompt(PROMPT, 9300 + number), max_tokens=2, **GREEDY)
    decisions = httpx.get(f"{cluster.url}/mooncake/decisions", timeout=10.0).json()["decisions"]
    return float(decisions[0]["prefills"][0]["work_s"])


def test_a_burst_of_four_times_what_fits_is_answered_whole_and_leaves_nothing_behind(cluster: Cluster):
    known = random_prompt(PROMPT, 9400)
    before = cluster.client.complete(known, max_tokens=TOKENS, **GREEDY)
    objective = {"x-slo-ttft-ms": f"{FITS * predicted_work_s(cluster) * 1000:.0f}"}

    def ask(number: int) -> httpx.Response:
        body = cluster.client.body(random_prompt(PROMPT, 9500 + number), {"max_tokens": TOKENS, **GREEDY})
        body["stream"] = number % 2 == 0
        return http.post("/v1/completions", json=body, headers=objective)

    limits = httpx.Limits(max_connections=SENT)
    with (
        httpx.Client(base_url=cluster.url, timeout=ANSWER_S, limits=limits) as http,
        ThreadPoolExecutor(SENT) as pool,
    ):
        answers = list(pool.map(ask, range(SENT)))

    served = [one for one in answers if one.status_code == 200]
    refused = [one for one in answers if one.status_code != 200]
    assert served
    assert refused
    assert all("[DONE]" in one.text or one.json()["choices"][0]["finish_reason"] for one in served)
    assert {one.status_code for one in refused} <= {429, 503}
    assert all(1 <= int(one.headers["retry-after"]) <= 30 for one in refused)
    assert all(one.json()["error"]["message"] for one in refused)

    cluster.assert_nothing_leaked(10.0)
    assert cluster.metric("mooncake_requests_waiting") == 0
    assert cluster.metric("vllm:num_requests_waiting") == 0
    assert cluster.client.complete(known, max_tokens=TOKENS, **GREEDY).outcome == before.outcome
