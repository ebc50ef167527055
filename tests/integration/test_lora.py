"""KV of an adapter belongs to its weights: not to its name, its path, or the base model."""

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
from tests.integration.lora_engine import BLOCK, FULL_BLOCKS

pytestmark = pytest.mark.integration

RUN_S = 240.0
"""Importing vLLM takes 30 s on two idle cores, four times that on busy ones; the rest 10 s."""
ALL = FULL_BLOCKS * BLOCK
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def asked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lora_engine.py says; none of its processes outlives this."""
    folder = tmp_path_factory.mktemp("lora")
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1", "PYTHONPATH": str(ROOT), **compiler_env(),
    }  # fmt: skip
    errors = folder / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.lora_engine", str(folder), str(model)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=env, cwd=ROOT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=RUN_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10.0)
    assert process.returncode == 0, errors.read_text()[-4000:] + out[-1000:]
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
