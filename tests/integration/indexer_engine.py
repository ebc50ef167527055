"""A stock vLLM engine that tells an indexer of its blocks: see test_indexer.py.

python indexer_engine.py FOLDER MODEL URL PORTS    prints one JSON object: what queries of each prompt find
"""

import json
import os
import sys
import time
import urllib.request
from array import array
from pathlib import Path
from typing import Any

import msgspec

from conductor.indexer.hashes import VllmV1, low64
from tests.integration.lora_engine import RANK, write_adapter

BLOCK = 32
BLOCKS = 3
FOUND_S = 60.0
PROFILE = {"strategy": "vllm_v1", "algorithm": "sha256", "index_projection": "low64_be"}
ASKS = {"plain": ("", ""), "salted": ("", "tenant"), "adapter": ("x", ""), "both": ("x", "tenant")}


def tokens_of(number: int) -> list[int]:
    """Return another prompt of BLOCKS full blocks and some more tokens."""
    return [5 + (number * 131 + at * 7) % 900 for at in range(BLOCKS * BLOCK + 8)]


def send(url: str, body: dict[str, Any], packed: bool = False) -> dict[str, Any]:
    """Return the answer to a request."""
    data = msgspec.msgpack.encode(body) if packed else json.dumps(body).encode()
    kind = "application/msgpack" if packed else "application/json"
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": kind}), timeout=30.0
    ) as got:
        answer = got.read()
    return msgspec.msgpack.decode(answer) if packed else json.loads(answer)


def main(folder: Path, model: Path, url: str, port: int, replay_port: int) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config.kv_events import KVEventsConfig
    from vllm.lora.request import LoRARequest

    adapter = write_adapter(folder / "adapter", model, 1)
    endpoint, replay = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{replay_port}"
    events = KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=endpoint.replace("127.0.0.1", "*"),
        replay_endpoint=replay.replace("127.0.0.1", "*"),
    )
    llm = LLM(
        model=str(model), dtype="float32", enforce_eager=True, block_size=BLOCK, max_model_len=512,
        kv_cache_memory_bytes=32 << 20, max_num_seqs=4, enable_lora=True, max_lora_rank=RANK, max_loras=1,
        distributed_executor_backend="uni", kv_events_config=events,
    )  # fmt: skip
    registered = send(
        f"{url}/register",
        {
            "endpoint": endpoint, "replay_endpoint": replay, "type": "vLLM", "modelname": "tiny",
            "instance_id": "vllm-0", "block_size": BLOCK, "dp_rank": 0, "hash_profile": PROFILE,
        },
        packed=True,
    )  # fmt: skip
    found: dict[str, Any] = {"registered": registered}
    for number, (label, (lora, salt)) in enumerate(ASKS.items()):
        prompt: dict[str, Any] = {"prompt_token_ids": tokens_of(number)}
        if salt:
            prompt["cache_salt"] = salt
        llm.generate(
            [prompt],
            SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
            lora_request=LoRARequest(lora, 1, adapter) if lora else None,
            use_tqdm=False,
        )
        found[label] = asked(url, number, lora, salt, adapter)
    print(json.dumps(found), flush=True)
    os._exit(0)  # vLLM's threads need no farewell


def asked(url: str, number: int, lora: str, salt: str, path: str) -> dict[str, int]:
    """Return how many tokens each way to ask finds."""
    context = {"model": "tiny", "block_size": BLOCK, "lora_name": lora}
    tokens = array("i", tokens_of(number))
    query = {**context, "token_ids": tokens.tobytes(), "cache_salt": salt or None}
    end_s = time.monotonic() + FOUND_S
    while True:
        by_tokens = longest(send(f"{url}/query", query, packed=True))
        if by_tokens == BLOCKS * BLOCK or time.monotonic() > end_s:
            break
        time.sleep(0.05)
    forms = VllmV1("sha256", lora_path=path).forms(lora, salt or None)
    made = [VllmV1("sha256").digests(None, tokens.tobytes(), BLOCK, *form) for form in forms]
    hashed = [
        longest(send(f"{url}/query_by_hash", {**context, "seq_hashes": list(map(low64, one))}))
        for one in made
    ]
    return {
        "by tokens": by_tokens,
        "as text": longest(send(f"{url}/query", {**query, "token_ids": tokens.tolist()})),
        "another salt": longest(send(f"{url}/query", {**query, "cache_salt": "z"}, packed=True)),
        "tagged hashes": hashed[0],
        "bare hashes": hashed[-1],
    }


def longest(answer: dict[str, Any]) -> int:
    """Return what the one instance has; -1 if it is not known."""
    hits = answer["instances"].get("vllm-0") if "instances" in answer else None
    return -1 if hits is None else int(hits["longest_matched"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
