"""Programs that use vLLM run in a process group of their own, which never outlives its test."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooncake.core.cpu import compiler_env

RUN_S = 240.0
"""Importing vLLM takes 30 s on two idle cores, four times that on busy ones; the rest 20 s."""
ROOT = Path(__file__).parents[2]
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1", "PYTHONPATH": str(ROOT),
}  # fmt: skip


def engine_arguments(model: Path, block_size: int) -> dict[str, Any]:
    """Return arguments of vllm.LLM for a small engine in one process."""
    return {
        "model": str(model), "dtype": "float32", "block_size": block_size, "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512, "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }  # fmt: skip


def run_script(name: str, arguments: Sequence[str], given: str, folder: Path, run_s: float = RUN_S) -> str:
    """Run tests.integration.NAME; return what it prints. Fails with its errors, which `folder` keeps."""
    errors = folder / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", f"tests.integration.{name}", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT,
            env={**os.environ, **ENV, **compiler_env()}, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(given, timeout=run_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10.0)
    assert process.returncode == 0, errors.read_text()[-4000:] + out[-1000:]
    return out
