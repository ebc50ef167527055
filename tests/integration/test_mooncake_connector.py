"""vLLM's in-tree MooncakeConnector runs on `mooncake.engine` as on upstream's, between two real engines."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.client import GREEDY
from tests.integration.engine_script import engine_arguments, run_script
from tests.integration.reference import random_prompt

pytestmark = pytest.mark.integration

BLOCK = 32
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4
"""4 layers, K and V, 2 heads of 64 numbers, float32: tests.tiny_model."""
PROMPTS = [random_prompt(length, 3000 + length) for length in (70, 200, 333)]


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the three engines of connector_engines.py say; none of their processes outlives this."""
    work = {
        "arguments": engine_arguments(model, BLOCK), "prompts": PROMPTS,
        "params": {**GREEDY, "max_tokens": 24},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("connector")
    return json.loads(run_script("connector_engines", [], json.dumps(work), folder))


def test_a_request_prefilled_on_one_engine_is_continued_exactly_on_the_other(answers: dict[str, Any]) -> None:
    tokens = [answer["tokens"] for answer in answers["decoded"]]
    assert tokens == [answer["tokens"] for answer in answers["stock"]]
    assert all(len(set(each)) > 10 for each in tokens)  # a wrong cache could not hide in repetition


def test_the_decoding_engine_computes_no_part_of_the_prompt(answers: dict[str, Any]) -> None:
    assert [answer["cached"] for answer in answers["decoded"]] == [len(prompt) for prompt in PROMPTS]
    assert [answer["cached"] for answer in answers["stock"]] == [0] * len(PROMPTS)


def test_every_block_of_the_prompts_goes_through_our_engine_once(answers: dict[str, Any]) -> None:
    blocks = sum(-(-len(prompt) // BLOCK) for prompt in PROMPTS)
    assert answers["moved"] == {"tcp write": blocks * BLOCK * TOKEN_BYTES}
