"""Two vLLM engines joined by vLLM's own MooncakeConnector, and a stock one: jobs on stdin, JSON on stdout.

Input: {"arguments": {...of LLM}, "prompts": [[ids]], "params": {...of SamplingParams}}. The stock engine
answers the prompts; the producer prefills them; the consumer answers them with the KV that the connector
moves over `mooncake.engine`. vLLM is imported once; every engine is a fork.

The connector is patched in one place: it asks torch for the index of the accelerator, and there is none.
"""

import json
import os
import select
import socket
import sys
import time
import traceback
from typing import Any, TextIO

from mooncake.core.process import set_parent_death_signal

STEP_S = 0.01
REGISTER_S = 60.0
ROLES = ("stock", "kv_producer", "kv_consumer")
PRODUCER = "producer"


def _make_engine(role: str, arguments: dict[str, Any], bootstrap: str) -> Any:
    import torch
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if role == "stock":
        return LLM(**arguments)
    torch.accelerator.current_device_index = lambda: 0  # the one call that needs a GPU
    config = KVTransferConfig(
        kv_connector="MooncakeConnector",
        kv_role=role,
        engine_id=PRODUCER if role == "kv_producer" else "consumer",
        kv_connector_extra_config={"mooncake_protocol": "tcp", "bootstrap_server_address": bootstrap},
    )
    return LLM(kv_transfer_config=config, **arguments)


def _generate(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    params = [
        SamplingParams(**job["params"], extra_args={"kv_transfer_params": kv} if kv else None)
        for kv in job.get("kv") or [None] * len(prompts)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
        for output in outputs
    ]


def _moved() -> dict[str, float]:
    """Return the bytes that the connector's transfer engine has moved, by transport and direction."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engine = get_kv_transfer_group().connector_worker.engine.get_engine().engine
    return {f"{transport} {op}": size for (transport, _, op), size in engine.metrics.counts().bytes.items()}


def _serve(role: str, channel: socket.socket, arguments: dict[str, Any], bootstrap: str) -> None:
    """Answer jobs, one JSON line each, until the channel ends; step in between: the connector needs that."""
    llm = _make_engine(role, arguments, bootstrap)
    lines = channel.makefile("rw")
    _say(lines, "ready")
    while True:
        if not select.select([channel], [], [], STEP_S)[0]:
            llm.llm_engine.step()
            continue
        line = lines.readline()
        if not line:
            return
        job = json.loads(line)
        _say(lines, _moved() if job == "moved" else _generate(llm, job))


def _say(lines: TextIO, value: Any) -> None:
    lines.write(json.dumps(value) + "\n")
    lines.flush()


def _fork(role: str, arguments: dict[str, Any], bootstrap: str) -> TextIO:
    mine, theirs = socket.socketpair()
    parent = os.getpid()
    if os.fork() == 0:
        try:
            set_parent_death_signal(parent)
            mine.close()
            _serve(role, theirs, arguments, bootstrap)
        except BaseException:  # noqa: BLE001 - told by stderr, never back into the parent's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)  # no engine threads to wait for
    theirs.close()
    return mine.makefile("rw")


def _hear(lines: TextIO) -> Any:
    line = lines.readline()
    if not line:
        raise SystemExit("an engine has ended: see above")
    return json.loads(line)


def _ask(lines: TextIO, job: Any) -> Any:
    _say(lines, job)
    return _hear(lines)


def _run(work: dict[str, Any]) -> dict[str, Any]:
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_utils import MooncakeBootstrapServer

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    engines = [_fork(role, work["arguments"], f"127.0.0.1:{port}") for role in ROLES]
    server = MooncakeBootstrapServer("127.0.0.1", port)  # after the forks: it has threads
    server.start()
    for engine in engines:
        assert _hear(engine) == "ready"
    stock, producer, consumer = engines
    end_s = time.monotonic() + REGISTER_S
    while not server.workers:
        assert time.monotonic() < end_s, "the producer did not register"
        time.sleep(STEP_S)
    ids = [f"transfer-{index}" for index in range(len(work["prompts"]))]
    send = [{"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": each} for each in ids]
    receive = [
        {
            "do_remote_decode": False, "do_remote_prefill": True, "transfer_id": each,
            "remote_engine_id": PRODUCER, "remote_bootstrap_addr": f"http://127.0.0.1:{port}",
        }
        for each in ids
    ]  # fmt: skip
    job = {"prompts": work["prompts"], "params": work["params"]}
    return {
        "stock": _ask(stock, job),
        "prefilled": _ask(producer, {**job, "params": {**work["params"], "max_tokens": 1}, "kv": send}),
        "decoded": _ask(consumer, {**job, "kv": receive}),
        "moved": _ask(producer, "moved"),
    }


def main() -> None:
    """Answer the one request on stdin."""
    work = json.load(sys.stdin)
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to stdout: keep it for the answer
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker

    assert vllm.v1.worker.cpu_worker is not None
    with os.fdopen(answers_fd, "w") as out:
        json.dump(_run(work), out)
    sys.stderr.flush()
    os._exit(0)  # engines end with us


if __name__ == "__main__":
    main()
