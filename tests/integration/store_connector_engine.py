"""A vLLM engine with vLLM's own MooncakeStoreConnector on `mooncake.store`: a job on stdin, JSON on stdout.

Input: {"arguments": {...of LLM}, "prompts": [[ids]], "params": {...of SamplingParams}, "master": HOST:PORT}.
The prompts are answered three times; in between the engine forgets what it has computed, and before the
third time everything is removed from the pool.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAVE_S = 60.0
STEP_S = 0.02
SEGMENT = "64MB"


def _engine(work: dict[str, Any], folder: str) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    path = Path(folder, "mooncake.json")
    settings = {
        "metadata_server": "P2PHANDSHAKE", "master_server_address": work["master"], "protocol": "tcp",
        "device_name": "", "global_segment_size": SEGMENT, "local_buffer_size": "16MB",
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    os.environ["MOONCAKE_CONFIG_PATH"] = str(path)
    config = KVTransferConfig(
        kv_connector="MooncakeStoreConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"load_async": True},
    )
    return LLM(kv_transfer_config=config, **work["arguments"])


def _generate(llm: Any, work: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(**work["params"]), use_tqdm=False)
    return [
        {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
        for output in outputs
    ]


def _store() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker.store


def _names() -> list[str]:
    calls = _store()._need()
    return sorted(calls.pool.names())


def _wait_for_saves(expected: int) -> list[str]:
    end_s = time.monotonic() + SAVE_S
    while len(names := _names()) < expected and time.monotonic() < end_s:
        time.sleep(STEP_S)
    return names


def _run(work: dict[str, Any], folder: str) -> dict[str, Any]:
    llm = _engine(work, folder)
    first = _generate(llm, work)
    names = _wait_for_saves(work["blocks"])
    copies = _store().batch_get_replica_desc(names)
    tiers = [copy.is_memory_replica() for each in copies.values() for copy in each]
    assert llm.reset_prefix_cache()
    second = _generate(llm, work)
    assert llm.reset_prefix_cache()
    removed = _store().remove_all(force=True)
    third = _generate(llm, work)
    return {
        "first": first,
        "second": second,
        "third": third,
        "names": names,
        "tiers": tiers,
        "removed": removed,
    }


def main() -> None:
    """Answer the one request on stdin."""
    work = json.load(sys.stdin)
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout: keep it for the answer
    with tempfile.TemporaryDirectory() as folder, os.fdopen(answers_fd, "w") as out:
        json.dump(_run(work, folder), out)
    sys.stderr.flush()
    os._exit(0)  # no engine threads to wait for


if __name__ == "__main__":
    main()
