"""KV of an adapter belongs to its weights: not to its name, its path, or the base model."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine_script import run_script
from tests.integration.lora_engine import BLOCK, FULL_BLOCKS

pytestmark = pytest.mark.integration

ALL = FULL_BLOCKS * BLOCK


@pytest.fixture(scope="module")
def asked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lora_engine.py says; none of its processes outlives this."""
    folder = tmp_path_factory.mktemp("lora")
    out = run_script("lora_engine", [str(folder), str(model)], "", folder)
    return json.loads(out.splitlines()[-1])


def test_base_model_and_adapters_share_no_block(asked):
    assert asked["base"]["hits"] == asked["one"]["hits"] == 0
    assert asked["base"]["tokens"] != asked["one"]["tokens"]
    assert asked["base at the end"]["hits"] == ALL
    assert asked["base at the end"]["tokens"] == asked["base"]["tokens"]


def test_each_finds_its_own_blocks_again(asked):
    for label in ("base", "one"):
        assert asked[f"{label} again"] == {**asked[label], "hits": ALL}


def test_another_adapter_of_the_same_name_finds_nothing(asked):
    assert asked["two, of the same name"]["hits"] == 0
    assert asked["two, of the same name"]["tokens"] != asked["one"]["tokens"]


def test_the_same_weights_elsewhere_under_another_name_are_the_same_adapter(asked):
    found = asked["a copy of one, of another name"]
    assert found["hits"] == ALL
    assert found["tokens"] == asked["one"]["tokens"]


def test_an_adapter_whose_files_changed_under_the_engine_reads_and_writes_no_pool(asked):
    for label in ("one, changed on disk", "one, changed, again"):
        assert asked[label]["hits"] == 0
        assert asked[label]["tokens"] == asked["one"]["tokens"], "vLLM goes on with what it has loaded"
        assert asked[label]["blocks"] == asked["base at the end"]["blocks"] == 3 * FULL_BLOCKS
