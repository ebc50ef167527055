"""vLLM's encoder cache connectors: that over `mooncake.store`, and what moves the other by `mooncake.engine`.

Job: {"folders": [], "config": {...of MOONCAKE_CONFIG_PATH}, "scratch": a folder}. Both are vLLM's classes, of
the installed version, without an engine around them: that would take a multimodal model.
"""

import json
import os
from pathlib import Path
from typing import Any

from tests.integration.others.job import Job, answer

ROWS, WIDTH = 24, 96


def _specs(tensors: dict[str, Any]) -> dict[str, Any]:
    from vllm.distributed.ec_transfer.ec_connector.mooncake_store_embedding.data import TensorSpec

    return {
        name: TensorSpec(tuple(tensor.shape), str(tensor.dtype), tensor.nbytes)
        for name, tensor in tensors.items()
    }


def _backend() -> Any:
    from vllm.distributed.ec_transfer.ec_connector.mooncake_store_embedding.backend import (
        MooncakeEmbeddingStoreBackend,
    )
    from vllm.distributed.ec_transfer.ec_connector.mooncake_store_embedding.store_client import (
        create_mooncake_embedding_store_client,
    )

    client = create_mooncake_embedding_store_client(read_buffer_bytes=1 << 16)
    return MooncakeEmbeddingStoreBackend(
        client, "namespace", max_pending_items=64, max_pending_bytes=64 << 20
    )


def _store() -> dict[str, Any]:
    """One worker publishes what it has encoded, another resolves its inputs with it."""
    import torch

    kinds = (torch.float32, torch.float16, torch.bfloat16)
    tensors = {f"image-{index}": torch.randn(ROWS + index, WIDTH).to(kinds[index % 3]) for index in range(12)}
    specs = _specs(tensors)
    writer, reader = _backend(), _backend()
    before = writer.resolve_inputs(specs, {}, "cpu")
    for _ in range(2):  # the second time they are there
        for name, tensor in tensors.items():
            writer.save_output(name, tensor)
    futures = [future for future, _ in writer._pending.values()]
    for future in futures:
        future.result(30.0)
    cache: dict[str, Any] = {}
    wanted = {**specs, "never-seen": specs["image-0"]}
    loaded = reader.resolve_inputs(wanted, cache, "cpu")
    other = {"image-0": specs["image-1"]}  # of another shape than what is stored
    answers = {
        "before": len(before), "loaded": loaded == set(tensors),
        "same": all(torch.equal(tensors[name], cache[name]) for name in tensors),
        "other shape": len(reader.resolve_inputs(other, {}, "cpu")),
    }  # fmt: skip
    for backend in (writer, reader):
        backend.shutdown()
    return answers


def _transfer() -> dict[str, Any]:
    """A producer pushes views of one encoder batch into a consumer's memory."""
    import torch
    from vllm.distributed.ec_transfer.ec_connector.mooncake.transfer import MooncakeTransfer

    batch, target = torch.randn(4, WIDTH), torch.zeros(4, WIDTH)
    producer, consumer = (MooncakeTransfer("127.0.0.1", "tcp") for _ in range(2))
    registered = consumer.register_memory(target)
    views = [batch[row] for row in range(4)]
    acquired = producer.acquire_sources(views)
    again = producer.acquire_sources(views[:1])
    places = [target[row].data_ptr() for row in (3, 2, 1, 0)]
    lengths = [view.nbytes for view in views]
    producer.write(consumer.local_session(), [view.data_ptr() for view in views], places, lengths)
    try:
        producer.write("127.0.0.1:1", acquired[:1], places[:1], lengths[:1])
        refused = False
    except RuntimeError:
        refused = True
    answers = {
        "registered": registered, "same": torch.equal(target.flip(0), batch), "refused": refused,
        "released": [producer.release_sources(again), producer.release_sources(acquired)],
        "unregistered": consumer.unregister_memory(target),
    }  # fmt: skip
    for one in (producer, consumer):
        one.close()
    return answers


def _run(job: Job) -> dict[str, Any]:
    path = Path(job["scratch"], "mooncake.json")
    path.write_text(json.dumps(job["config"]))
    os.environ["MOONCAKE_CONFIG_PATH"] = str(path)
    return {"store": _store(), "transfer": _transfer()}


if __name__ == "__main__":
    answer(_run)
