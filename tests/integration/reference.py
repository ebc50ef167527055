"""What stock vLLM answers: one subprocess for the whole test session (see reference_engine.py)."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mooncake.core.config import STEP_TOKENS
from mooncake.core.cpu import compiler_env
from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK

LENGTHS = [
    50, 63, 64, 65, 96, 127, 128, 200, 256, 300, 333, 448,
    512, 640, 777, 1000, 1024, 1300, 1600, 2047, 2048, 2500, 3100, 4000,
]  # fmt: skip
"""Around block and chunk boundaries: shorter, equal and longer by one token."""
TOKENS = 32
DTYPES = ("float32", "bfloat16")
REFERENCE_S = 300.0
_FIRST_TOKEN, _VOCAB = 3, 1000  # no special tokens

Job = dict[str, Any]


def random_prompt(length: int, seed: int) -> list[int]:
    """Return `length` token ids; same seed, same prompt."""
    return random.Random(seed).choices(range(_FIRST_TOKEN, _VOCAB), k=length)


def greedy_jobs() -> list[Job]:
    """Return the jobs of the plain parity tests."""
    params = {**GREEDY, "max_tokens": TOKENS}
    return [{"prompt": random_prompt(n, 1000 + n), "params": params} for n in LENGTHS]


STOPS = ["on", "ti", "re", "er"]
"""The pairs that come most often: one is in any 32 tokens. vLLM takes four at most."""
VOWELS = ["a", "e", "i", "o"]
"""Certain to come once `min_tokens` lets them count."""

SAMPLED: dict[str, dict[str, Any]] = {
    "seed": {"temperature": 1.0, "seed": 7, "ignore_eos": True},
    "seed, top_p, top_k": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 8, "ignore_eos": True},
    "frequency and presence": {**GREEDY, "frequency_penalty": 0.9, "presence_penalty": 0.7},
    "repetition": {**GREEDY, "repetition_penalty": 1.3},
    "stop": {**GREEDY, "stop": STOPS},
    "stop kept, min_tokens": {
        **GREEDY, "stop": VOWELS, "include_stop_str_in_output": True, "min_tokens": 20,
    },
    "logprobs": {**GREEDY, "logprobs": 2},
    "logit_bias": {**GREEDY, "logit_bias": {"100": 5.0, "200": -100.0}},
    "regex": {"temperature": 0.0, "structured_outputs": {"regex": r"([a-z]{2,5} ){12}[0-9]{3}"}},
    "one token": {**GREEDY, "max_tokens": 1},
}  # fmt: skip
"""Every way in which tokens are chosen that must survive the hand-over."""


def sampled_jobs() -> dict[str, Job]:
    """Return name -> job."""
    return {
        name: {"prompt": random_prompt(150 + 37 * i, 2000 + i), "params": {"max_tokens": TOKENS, **params}}
        for i, (name, params) in enumerate(SAMPLED.items())
    }


class Reference:
    """Starts at once, in the background; answers are there when they are asked for."""

    def __init__(self, model: Path) -> None:
        env = {
            **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            **compiler_env(),
        }  # fmt: skip
        groups = [[job] for job in (*greedy_jobs(), *sampled_jobs().values())]
        engines = [{"arguments": _arguments(model, dtype), "groups": groups} for dtype in DTYPES]
        core = max(os.sched_getaffinity(0))
        # files, not pipes: it works while nobody reads
        self._files = [tempfile.TemporaryFile("w+") for _ in range(3)]  # noqa: SIM115 - closed by close
        work, out, err = self._files
        json.dump({"core": core, "engines": engines}, work)
        work.seek(0)
        script = Path(__file__).with_name("reference_engine.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=work, stdout=out, stderr=err, env=env
        )
        self._answers: dict[str, list[list[dict[str, Any]]]] = {}

    def _wait(self) -> None:
        code = self._process.wait(REFERENCE_S)
        _, out, err = self._files
        out.seek(0)
        err.seek(0)
        assert code == 0, err.read()
        self._answers = dict(zip(DTYPES, json.load(out), strict=True))

    def greedy(self, dtype: str) -> list[dict[str, Any]]:
        """Return the answers to `greedy_jobs`, each computed alone and cold."""
        if not self._answers:
            self._wait()
        return [group[0] for group in self._answers[dtype][: len(LENGTHS)]]

    def sampled(self, dtype: str) -> dict[str, dict[str, Any]]:
        """Return the answers to `sampled_jobs`."""
        if not self._answers:
            self._wait()
        answers = [group[0] for group in self._answers[dtype][len(LENGTHS) :]]
        return dict(zip(sampled_jobs(), answers, strict=True))

    def close(self) -> None:
        """End the subprocess."""
        self._process.kill()
        self._process.wait(10.0)
        for file in self._files:
            file.close()


def _arguments(model: Path, dtype: str) -> dict[str, Any]:
    return {
        "model": str(model), "dtype": dtype, "block_size": BLOCK, "kv_cache_memory_bytes": 256 << 20,
        "max_num_seqs": 16, "max_num_batched_tokens": STEP_TOKENS, "enforce_eager": True,
        "distributed_executor_backend": "uni", "prefix_caching_hash_algo": "sha256",
    }  # fmt: skip
