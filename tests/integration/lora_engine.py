"""A stock vLLM engine with our connector, a pool and LoRA adapters, in one process: see test_lora.py.

python lora_engine.py FOLDER MODEL    prints one JSON object: what each request hit, and its tokens
"""

import asyncio
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.model_gguf import to_bfloat16
from mooncake.worker.pulse import Pulse
from mooncake.worker.spec import EngineSpec
from tests.tiny_model import _save

BLOCK = 32
PROMPT = [5 + i % 900 for i in range(6 * BLOCK + 8)]
FULL_BLOCKS = 6
RANK = 8
SAVED_S = 30.0


def write_adapter(folder: Path, model: Path, seed: int) -> str:
    """Write a random adapter in PEFT's format."""
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, out in rows.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for side, shape in (("A", (RANK, hidden)), ("B", (out, RANK))):
                values = random.normal(0.0, 0.3, shape).astype(np.float32)
                tensors[f"{name}.lora_{side}.weight"] = to_bfloat16(values)
    _save(folder / "adapter_model.safetensors", tensors)
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(rows), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return str(folder)


class Engine:
    """The engine, its pool, and what it has been asked."""

    def __init__(self, folder: Path, model: Path) -> None:
        from vllm import LLM

        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        run_dir = folder / "run"
        run_dir.mkdir(mode=0o700)
        self.store = StoreService(
            StoreConfig(node="n", capacity_bytes=64 << 20, run_dir=str(run_dir / "store"))
        )
        record = asyncio.run_coroutine_threadsafe(self.store.start(), self.loop).result(30.0)
        spec = EngineSpec(
            instance_id="i", role="both", epoch="e", run_dir=str(run_dir), model=str(model), store=record
        )
        self.pulse = Pulse(spec.pulse_path, create=True)
        transfer = {
            "kv_connector": "MooncakeConnector", "kv_connector_module_path": "mooncake.worker.connector",
            "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "engine_id": "i",
            "kv_connector_extra_config": {"mooncake_spec": msgspec.to_builtins(spec)},
        }  # fmt: skip
        self.llm = LLM(
            model=str(model), dtype="float32", enforce_eager=True, block_size=BLOCK, max_model_len=1024,
            kv_cache_memory_bytes=64 << 20, max_num_seqs=4, enable_lora=True, max_lora_rank=RANK,
            max_loras=4, distributed_executor_backend="uni", kv_transfer_config=transfer,
        )  # fmt: skip
        self.asked: dict[str, Any] = {}
        self.saved = 0

    def ask(self, label: str, lora: tuple[str, int, str] | None = None, *, saves: bool = False) -> None:
        """Ask once, with only the pool to remember earlier prompts; `saves`: wait for new blocks there."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self.llm.reset_prefix_cache()
        before = self.pulse.snapshot()["hit_tokens"]
        (answer,) = self.llm.generate(
            [{"prompt_token_ids": PROMPT}],
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
            lora_request=LoRARequest(*lora) if lora else None,
            use_tqdm=False,
        )
        hits = self.pulse.snapshot()["hit_tokens"] - before
        self.asked[label] = {"hits": hits, "tokens": list(answer.outputs[0].token_ids)}
        self.saved += FULL_BLOCKS if saves else 0
        end_s = time.monotonic() + SAVED_S
        while self.store.node.stats().blocks < self.saved and time.monotonic() < end_s:
            time.sleep(0.01)
        self.asked[label]["blocks"] = self.store.node.stats().blocks


def main(folder: Path, model: Path) -> None:
    one, two = (write_adapter(folder / name, model, seed) for name, seed in (("one", 1), ("two", 2)))
    copy = str(shutil.copytree(one, folder / "copy"))
    engine = Engine(folder, model)
    engine.ask("base", saves=True)
    engine.ask("base again")
    engine.ask("one", ("x", 1, one), saves=True)
    engine.ask("one again", ("x", 1, one))
    engine.ask("two, of the same name", ("x", 2, two), saves=True)
    engine.ask("a copy of one, of another name", ("y", 3, copy))
    write_adapter(folder / "one", model, 9)
    engine.ask("one, changed on disk", ("x", 1, one))
    engine.ask("one, changed, again", ("x", 1, one))
    engine.ask("base at the end")
    print(json.dumps(engine.asked), flush=True)
    os._exit(0)  # vLLM's threads need no farewell


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
