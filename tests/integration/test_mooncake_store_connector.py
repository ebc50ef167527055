"""vLLM's in-tree MooncakeStoreConnector runs on `mooncake.store` as on upstream's, unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.client import GREEDY
from tests.integration.engine_script import engine_arguments, run_script
from tests.integration.reference import random_prompt
from tests.unit.dropin.conftest import MasterThread

pytestmark = pytest.mark.integration

BLOCK = 32
PROMPTS = [random_prompt(length, 4000 + length) for length in (70, 200, 333)]
BLOCKS = sum(len(prompt) // BLOCK for prompt in PROMPTS)
"""The connector saves whole blocks of prompts."""


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What store_connector_engine.py says; its process does not outlive this."""
    master = MasterThread()
    work = {
        "arguments": engine_arguments(model, BLOCK), "prompts": PROMPTS,
        "params": {**GREEDY, "max_tokens": 16}, "master": master.address, "blocks": BLOCKS,
    }  # fmt: skip
    try:
        folder = tmp_path_factory.mktemp("connector")
        return json.loads(run_script("store_connector_engine", [], json.dumps(work), folder))
    finally:
        master.stop()


def tokens(answers: dict[str, Any], turn: str) -> list[list[int]]:
    return [answer["tokens"] for answer in answers[turn]]


def test_the_second_time_the_whole_blocks_come_from_the_pool_and_the_answers_are_equal(
    answers: dict[str, Any],
) -> None:
    assert [answer["cached"] for answer in answers["first"]] == [0] * len(PROMPTS)
    assert [answer["cached"] for answer in answers["second"]] == [
        len(prompt) // BLOCK * BLOCK for prompt in PROMPTS
    ]
    assert tokens(answers, "second") == tokens(answers, "first")
    assert all(
        len(set(each)) > 6 for each in tokens(answers, "first")
    )  # wrong KV could not hide in repetition


def test_every_block_is_one_named_object_in_memory(answers: dict[str, Any]) -> None:
    assert len(answers["names"]) == len(set(answers["names"])) >= BLOCKS
    assert answers["tiers"] == [True] * len(answers["names"])


def test_what_was_removed_is_computed_again(answers: dict[str, Any]) -> None:
    assert answers["removed"] >= BLOCKS
    assert [answer["cached"] for answer in answers["third"]] == [0] * len(PROMPTS)
    assert tokens(answers, "third") == tokens(answers, "first")
