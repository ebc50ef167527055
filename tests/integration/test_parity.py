"""What a client gets through prefill and decode is what one stock vLLM engine would have said.

Same dtype, block size, chunk size and thread count on both sides; each prompt alone and cold unless
a test says otherwise. fp32 and bf16 must be equal token for token.
"""

from typing import Any

import pytest

from tests.integration.client import Answer
from tests.integration.cluster import BLOCK, Cluster
from tests.integration.reference import LENGTHS, TOKENS, Reference, greedy_jobs, sampled_jobs
from tests.integration.setups import (
    AGGREGATED,
    BF16,
    BF16_LAYERWISE,
    FIRST_TOKEN,
    FP32,
    FP32_LAYERWISE,
)

pytestmark = pytest.mark.integration

DISAGGREGATED = [FP32, FP32_LAYERWISE, BF16, BF16_LAYERWISE]
FEW = slice(0, None, 4)


def names(setups):
    return [setup.name for setup in setups]


def unequal(answers: list[Answer], expected: list[dict[str, Any]]) -> list[str]:
    """Return a line per prompt whose tokens differ."""
    return [
        f"{length} tokens: {answer.tokens} instead of {wanted['tokens']}"
        for length, answer, wanted in zip(LENGTHS, answers, expected, strict=True)
        if answer.tokens != wanted["tokens"]
    ]


def test_greedy_answers_of_the_reference_vary(reference: Reference):
    for dtype in ("float32", "bfloat16"):
        answers = [tuple(answer["tokens"]) for answer in reference.greedy(dtype)]
        assert len(set(answers)) == len(LENGTHS)
        assert all(len(answer) == TOKENS and len(set(answer)) > TOKENS // 2 for answer in answers)


@pytest.mark.parametrize("cluster", DISAGGREGATED, ids=names(DISAGGREGATED), indirect=True)
class TestDisaggregated:
    def test_greedy_tokens_equal_one_stock_engine(self, cluster: Cluster, reference: Reference):
        expected = reference.greedy(cluster.setup.dtype)
        cluster.forget_locally()
        decode = cluster.counters("decode-0")
        answers = [cluster.client.complete(job["prompt"], **job["params"]) for job in greedy_jobs()]
        assert not unequal(answers, expected)
        loaded = cluster.counters("decode-0")["load_blocks"] - decode["load_blocks"]
        # decode computed none of it: every block, tails included, came over the pool. But a layerwise
        # load must leave one token to compute, and a tail of one token is then not loaded
        left = 1 if cluster.setup.load_mode == "layerwise" else 0
        assert loaded == sum(-(-(length - left) // BLOCK) for length in LENGTHS)

    def test_greedy_tokens_stay_equal_when_decode_is_batched(self, cluster: Cluster, reference: Reference):
        jobs, expected = greedy_jobs(), reference.greedy(cluster.setup.dtype)
        for job in jobs:  # prompts are known: what is batched is decoding
            cluster.client.complete(job["prompt"], **{**job["params"], "max_tokens": 1})
        answers = []
        for start in range(0, len(jobs), 12):
            answers += cluster.client.complete_all(jobs[start : start + 12])
        assert not unequal(answers, expected)


@pytest.mark.parametrize("cluster", [FP32, BF16], ids=names([FP32, BF16]), indirect=True)
@pytest.mark.parametrize("name", sampled_jobs())
def test_sampling_settings_survive_the_handover(cluster: Cluster, reference: Reference, name: str):
    job, expected = sampled_jobs()[name], reference.sampled(cluster.setup.dtype)[name]
    answer = cluster.client.complete(job["prompt"], **job["params"])
    assert answer.outcome == (expected["tokens"], expected["text"], expected["finish"])
    if "stop" in job["params"]:
        assert answer.finish == "stop", "no stop string came: the case proves nothing"
    if "logprobs" in job["params"]:
        assert answer.logprobs == pytest.approx(expected["logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    "cluster", [AGGREGATED, FIRST_TOKEN], ids=names([AGGREGATED, FIRST_TOKEN]), indirect=True
)
class TestOtherModes:
    def test_greedy_tokens_equal_one_stock_engine(self, cluster: Cluster, reference: Reference):
        expected = reference.greedy(cluster.setup.dtype)[FEW]
        jobs = greedy_jobs()[FEW]
        answers = [cluster.client.complete(job["prompt"], **job["params"]) for job in jobs]
        assert [answer.tokens for answer in answers] == [wanted["tokens"] for wanted in expected]

    def test_sampling_settings_hold(self, cluster: Cluster, reference: Reference):
        expected = reference.sampled(cluster.setup.dtype)
        for name, job in sampled_jobs().items():
            answer = cluster.client.complete(job["prompt"], **job["params"])
            wanted = expected[name]
            assert answer.outcome == (wanted["tokens"], wanted["text"], wanted["finish"]), name
