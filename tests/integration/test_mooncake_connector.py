"""vLLM's in-tree MooncakeConnector runs on `mooncake.engine` as on upstream's, between two real engines."""

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

pytestmark = pytest.mark.integration

RUN_S = 240.0
"""Importing vLLM takes 30 s on two idle cores, four times that on busy ones; the rest 20 s."""
BLOCK = 32
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4
"""4 layers, K and V, 2 heads of 64 numbers, float32: tests.tiny_model."""
PROMPTS = [random_prompt(length, 3000 + length) for length in (70, 200, 333)]


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the three engines of connector_engines.py say; none of their processes outlives this."""
    arguments = {
        "model": str(model), "dtype": "float32", "block_size": BLOCK, "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512, "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }  # fmt: skip
    work = {"arguments": arguments, "prompts": PROMPTS, "params": {**GREEDY, "max_tokens": 24}}
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1", **compiler_env(),
    }  # fmt: skip
    script = Path(__file__).with_name("connector_engines.py")
    errors = tmp_path_factory.mktemp("connector") / "stderr"
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
    assert process.returncode == 0, errors.read_text()[-4000:]
    return json.loads(out)


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
