"""Classes on real engines: a flood of batch work leaves seats and KV to others, who pass it; all is done."""

import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import TIGHT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [TIGHT], ids=lambda setup: setup.name, indirect=True),
]

FLOOD, PROMPT, TOKENS = 10, 800, 64
"""Half of it does not fit into the KV of TIGHT, let alone beside others."""
OTHERS = 5
DONE_S = 180.0


def test_a_batch_flood_is_passed_by_others_preempts_nobody_and_is_done_in_the_end(cluster: Cluster):
    record = cluster.record("decode-0")
    room = record.kv_blocks * record.block_size
    assert room < FLOOD * (PROMPT + TOKENS) / 2, "or nothing here is tight"
    flood = [
        cluster.client.stream(
            random_prompt(PROMPT, 7000 + number), max_tokens=TOKENS, service_tier="flex", **GREEDY
        )
        for number in range(FLOOD)
    ]
    wait_until("batch work runs", lambda: any(stream.answer.tokens for stream in flood), DONE_S)
    others = [
        cluster.client.stream(random_prompt(64, 7100 + number), max_tokens=8, **GREEDY)
        for number in range(OTHERS)
    ]
    for other in others:
        other.wait_tokens(1, DONE_S)
    begun = sum(bool(stream.answer.tokens) for stream in flood)
    assert begun < FLOOD, "who came after all of the flood has its first token before the last of it"
    for other in others:
        assert len(other.result(DONE_S).tokens) == 8
    for stream in flood:
        assert len(stream.result(DONE_S).tokens) == TOKENS

    decisions = cluster.client.http.get("/mooncake/decisions").json()["decisions"]
    let_in = [one["slo_class"] for one in reversed(decisions)][-FLOOD - OTHERS :]
    assert let_in.count("default") == OTHERS
    assert let_in[-1] == "batch", "it waited in the gateway, not in the engines"
    assert cluster.metric("vllm:num_preemptions_total") == 0
    for name, count in (("batch", FLOOD), ("default", OTHERS)):
        assert cluster.metric("mooncake_ttft_seconds_count", slo_class=name) >= count
    cluster.assert_nothing_leaked(10.0)


def test_a_job_without_enough_time_is_refused_at_once_and_a_possible_one_is_done(cluster: Cluster):
    body = cluster.client.body(random_prompt(PROMPT, 7200), {"max_tokens": 16, **GREEDY})
    headers = {"x-slo-class": "batch", "x-slo-job-ms": "0.01"}
    refused = cluster.client.http.post("/v1/completions", json=body, headers=headers)
    assert refused.status_code == 429
    assert "the job cannot be done in its time" in refused.json()["error"]["message"]
    done = cluster.client.http.post(
        "/v1/completions", json=body, headers={**headers, "x-slo-job-ms": "60000"}
    )
    assert done.status_code == 200
    assert done.headers["x-slo-class"] == "batch"
    assert len(done.json()["choices"][0]["token_ids"]) == 16
