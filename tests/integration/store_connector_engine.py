"""vLLM engines with vLLM's own MooncakeStoreConnector on `mooncake.store`: a job on stdin, JSON on stdout.

Input: {"arguments": {...of LLM}, "prompts": [[ids]], "params": {...of SamplingParams},
"pools": [{"config": {...of MOONCAKE_CONFIG_PATH}, "metrics": URL of the master's}]}.
vLLM is imported once; every engine is a fork, one after the other, with a pool of its own.

An engine answers the prompts three times. In between it forgets what it has computed; before the third time
everything is removed from the pool. The first time they come one by one, each after the blocks of the one
before are on an SSD, if the pool has one: what is evicted from a small memory is not lost then.
"""

import json
import logging
import os
import sys
import tempfile
import time
import traceback
import urllib.request
from pathlib import Path
from typing import Any, TextIO

from mooncake.core.process import set_parent_death_signal

SAVE_S = 90.0
STEP_S = 0.05
WORKER = "vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.worker"
TIERS = "Mooncake load tier summary"


def _engine(work: dict[str, Any], config: dict[str, Any], folder: str) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    path = Path(folder, "mooncake.json")
    path.write_text(json.dumps(config))
    os.environ["MOONCAKE_CONFIG_PATH"] = str(path)
    transfer = KVTransferConfig(
        kv_connector="MooncakeStoreConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"load_async": True},
    )
    return LLM(kv_transfer_config=transfer, **work["arguments"])


class _Tiers(logging.Handler):
    """Adds up what vLLM logs of the tiers its blocks have come from."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"memory": 0, "disk": 0, "unknown": 0, "failed": 0}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith(TIERS):
            assert isinstance(record.args, tuple)
            _, _, memory, disk, unknown, _, failed, _ = record.args
            for name, more in (("memory", memory), ("disk", disk), ("unknown", unknown), ("failed", failed)):
                self.counts[name] += more


def _listen() -> _Tiers:
    """Hear vLLM's log of the tiers; to be called once there is an engine, which sets all logging anew."""
    logger, tiers = logging.getLogger(WORKER), _Tiers()
    logger.setLevel(logging.INFO)
    logger.addHandler(tiers)
    return tiers


def _metrics(url: str) -> dict[str, float]:
    """Return the master's metrics that have no labels."""
    with urllib.request.urlopen(url + "/metrics", timeout=SAVE_S) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in pairs}


def _generate(llm: Any, work: dict[str, Any], prompts: list[list[int]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, SamplingParams(**work["params"]), use_tqdm=False)
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


def _wait_for(count: int, url: str, on_ssd: bool) -> None:
    """Return once so many blocks are saved, or on the SSD; the test says what is missing, if they are not."""
    end_s = time.monotonic() + SAVE_S
    while time.monotonic() < end_s:
        if (int(_metrics(url)["file_cache_nums_"]) if on_ssd else len(_names())) >= count:
            return
        time.sleep(STEP_S)


def _run(work: dict[str, Any], pool: dict[str, Any], folder: str) -> dict[str, Any]:
    os.environ["VLLM_MOONCAKE_STORE_TIER_LOG"] = "1"
    llm = _engine(work, pool["config"], folder)
    tiers, url = _listen(), pool["metrics"]
    has_ssd = _metrics(url)["master_total_file_capacity_bytes"] > 0
    first, blocks = [], 0
    block_size = work["arguments"]["block_size"]
    for prompt in work["prompts"]:
        first += _generate(llm, work, [prompt])
        blocks += len(prompt) // block_size
        _wait_for(blocks, url, has_ssd)
    names = _names()
    copies = _store().batch_get_replica_desc(names)
    before = _metrics(url)
    assert llm.reset_prefix_cache()
    second = _generate(llm, work, work["prompts"])
    after, loaded = _metrics(url), dict(tiers.counts)
    assert llm.reset_prefix_cache()
    removed = _store().remove_all(force=True)
    third = _generate(llm, work, work["prompts"])
    return {
        "first": first, "second": second, "third": third, "names": names, "removed": removed,
        "in_memory": [any(copy.is_memory_replica() for copy in copies[name]) for name in names],
        "before": before, "after": after, "loaded": loaded,
    }  # fmt: skip


def _child(work: dict[str, Any], pool: dict[str, Any], out: TextIO) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            json.dump(_run(work, pool, folder), out)
        out.flush()
    except BaseException:  # noqa: BLE001 - told by stderr, never back into the parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)  # no engine threads to wait for


def _fork(work: dict[str, Any], pool: dict[str, Any]) -> Any:
    mine, theirs = os.pipe()
    parent = os.getpid()
    if os.fork() == 0:
        set_parent_death_signal(parent)
        os.close(mine)
        _child(work, pool, os.fdopen(theirs, "w"))
    os.close(theirs)
    with os.fdopen(mine) as answers:
        text = answers.read()
    os.wait()
    if not text:
        raise SystemExit("an engine has ended: see above")
    return json.loads(text)


def main() -> None:
    """Answer the one request on stdin."""
    work = json.load(sys.stdin)
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout: keep it for the answer
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker

    assert vllm.v1.worker.cpu_worker is not None
    with os.fdopen(answers_fd, "w") as out:
        json.dump([_fork(work, pool) for pool in work["pools"]], out)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
