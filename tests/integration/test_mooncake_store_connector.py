"""vLLM's in-tree MooncakeStoreConnector runs on `mooncake.store` as on upstream's, unchanged."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mooncake.core.cpu import compiler_env
from tests.integration.client import GREEDY
from tests.integration.reference import random_prompt
from tests.unit.dropin.conftest import MasterThread

pytestmark = pytest.mark.integration

RUN_S = 240.0
"""Importing vLLM takes 30 s on two idle cores, four times that on busy ones; the rest 20 s."""
BLOCK = 32
PROMPTS = [random_prompt(length, 4000 + length) for length in (70, 200, 333)]
BLOCKS = sum(len(prompt) // BLOCK for prompt in PROMPTS)
"""The connector saves whole blocks of prompts."""


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What store_connector_engine.py says; its process does not outlive this."""
    arguments = {
        "model": str(model), "dtype": "float32", "block_size": BLOCK, "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512, "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }  # fmt: skip
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1", **compiler_env(),
    }  # fmt: skip
    script = Path(__file__).with_name("store_connector_engine.py")
    errors = tmp_path_factory.mktemp("connector") / "stderr"
    master = MasterThread()
    work = {
        "arguments": arguments, "prompts": PROMPTS, "params": {**GREEDY, "max_tokens": 16},
        "master": master.address, "blocks": BLOCKS,
    }  # fmt: skip
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            env=env, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(json.dumps(work), timeout=RUN_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10.0)
            master.stop()
    assert process.returncode == 0, errors.read_text()[-4000:]
    return json.loads(out)


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
