"""Weights between processes' memories on `mooncake.engine`: checkpoint-engine's P2P store, verl's engine.

Job: {"folders": [where checkpoint_engine lies, where verl lies]}. Patched: what they ask about GPUs and Ray.
"""

import asyncio
import os
import queue
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.integration.others.job import Job, answer
from tests.integration.others.shells import Shells, bare_package

BUCKET_BYTES = 4096
WAIT_S = 60.0


def _checkpoint_engine() -> dict[str, Any]:
    """One rank reads the named tensors that another has registered."""
    import torch
    from checkpoint_engine import p2p_store

    devices = SimpleNamespace(
        device_module=SimpleNamespace(device_count=lambda: 1), rdma_device=lambda rank: "",
        transfer_engine_protocol="rdma",
    )  # fmt: skip
    tensors = {f"layer.{index}": torch.full((100 + index,), float(index)) for index in range(5)}
    with mock.patch.object(p2p_store, "get_ip", return_value="127.0.0.1"):
        owner, reader = p2p_store.P2PStore(devices), p2p_store.P2PStore(devices)
    owner.register_named_tensors(tensors)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    reader.register_named_tensors(targets)
    places = [[one.data_ptr() for one in each.values()] for each in (targets, tensors)]
    reader.batch_transfer_sync_read(owner.addr, *places, [tensor.nbytes for tensor in tensors.values()])
    ended = [owner.unregister_named_tensors(list(tensors)), reader.unregister_named_tensors(["layer.0"])]
    return {"same": all(torch.equal(tensors[name], targets[name]) for name in tensors), "ended": ended}


class _Group:
    """What verl's process group sends objects with; the ranks are tasks of this process."""

    def __init__(self, boxes: list["queue.Queue[Any]"]) -> None:
        self._boxes = boxes

    def send_obj(self, value: Any, rank: int) -> None:
        self._boxes[rank].put(value)

    def recv_obj(self, rank: int) -> Any:
        return self._boxes[rank + 1].get(timeout=WAIT_S)


def _verl() -> dict[str, Any]:
    """The trainer's weights go to a rollout worker, bucket by bucket."""
    import torch
    from verl.checkpoint_engine import mooncake_checkpoint_engine as module

    device = SimpleNamespace(
        device_count=lambda: 1, set_device=lambda rank: None, synchronize=lambda: None,
        empty_cache=lambda: None,
    )  # fmt: skip
    weights = {f"w{index}": torch.full((500 + index,), float(index)) for index in range(9)}
    got: dict[str, Any] = {}
    with (
        mock.patch.object(module, "get_torch_device", return_value=device),
        mock.patch.object(module.ray.util, "get_node_ip_address", return_value="127.0.0.1", create=True),
    ):
        engines = [
            module.MooncakeCheckpointEngine(BUCKET_BYTES, device="cpu", rollout_dtype=torch.float32)
            for _ in range(2)
        ]
        boxes: list[queue.Queue[Any]] = [queue.Queue() for _ in engines]
        info = {"session_id": engines[0].session_id, "ptr": engines[0].buf.data_ptr()}
        for rank, engine in enumerate(engines):
            engine.rank, engine.world_size, engine.store = rank, 2, _Group(boxes)
            engine.buffer_info = info if rank else None

        async def receive() -> None:
            async for name, tensor in engines[1].receive_weights():
                got[name] = tensor.clone()

        def receive_all() -> None:
            asyncio.run(receive())

        async def both() -> None:
            receiving = asyncio.create_task(asyncio.to_thread(receive_all))
            await engines[0].send_weights(iter(weights.items()))
            await receiving

        asyncio.run(asyncio.wait_for(both(), WAIT_S))
    return {"same": all(torch.equal(weights[name], got[name]) for name in weights), "count": len(got)}


def _run(_: Job) -> dict[str, Any]:
    os.environ["RANK"] = "0"
    for name in ("verl", "verl.checkpoint_engine", "vllm"):
        bare_package(name)
    Shells("loguru", "ray", "verl.utils", "verl.checkpoint_engine.base", "vllm.distributed")
    return {"checkpoint-engine": _checkpoint_engine(), "verl": _verl()}


if __name__ == "__main__":
    answer(_run)
