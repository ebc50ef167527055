"""LMDeploy's KV connector on `mooncake.store`, and its migration between engines on `mooncake.engine`.

Job: {"folders": [where lmdeploy lies], "master": HOST:PORT, "scratch": a folder}. The connector asks whether
its tensors are on a GPU and for CUDA events: that is patched, as is the list of RDMA devices.
"""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.integration.others.job import Job, answer
from tests.integration.others.shells import Shells

BLOCKS, BLOCK_TOKENS, ROWS, ROW_BYTES = 8, 16, 3, 1024
WAIT_S = 30.0


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def _worker(job: Job) -> Any:
    from lmdeploy.pytorch.kv_connector.mooncake.store.worker import MooncakeStoreWorker

    file = Path(job["scratch"], "lmdeploy.json")
    settings = {
        "metadata_server": "P2PHANDSHAKE", "master_server_address": job["master"], "protocol": "tcp",
        "device_name": "", "global_segment_size": 32 << 20, "local_buffer_size": 16 << 20,
    }  # fmt: skip
    file.write_text(json.dumps(settings))
    transfer = SimpleNamespace(
        kv_role="kv_both",
        kv_connector_extra_config={"mooncake_config_path": str(file), "model_name": "model"},
    )
    cache = SimpleNamespace(
        kv_transfer_config=transfer, states_shapes=[], window_size=-1, block_size=BLOCK_TOKENS,
        num_gpu_blocks=BLOCKS,
    )  # fmt: skip
    worker = MooncakeStoreWorker(cache)
    worker._start_lookup_server = lambda: None  # ty: its scheduler's side is not here
    return worker


def _rows(seed: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, ROW_BYTES)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(ROWS)]


def _finish(worker: Any, field: str) -> Any:
    end_s = time.monotonic() + WAIT_S
    while not getattr(output := worker.get_finished(), field):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return output


def _connector(job: Job) -> dict[str, Any]:
    import torch
    from lmdeploy.pytorch.kv_connector.mooncake.store import data

    hashes = [bytes([index]) * 32 for index in range(4)]
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(torch.cuda, "Event", _Event),
    ):
        saver, loader = _worker(job), _worker(job)
        source, target = _rows(1), _rows(2)
        saver.register_kv_caches({"k": source})
        loader.register_kv_caches({"k": target})
        before = loader.lookup(4 * BLOCK_TOKENS, hashes)
        fields = {"request_id": 1, "start_block": 0, "block_hashes": tuple(hashes[:3])}
        save = data.MooncakeStoreSaveRequest(
            save_id=1, block_ids=(0, 1, 2), logical_block_ids=(0, 1, 2), **fields
        )
        load = _load_request(data, hashes)
        saver.start_save_kv(SimpleNamespace(save_requests=[save], load_requests=[]))
        _finish(saver, "completed_save_ids")
        found = loader.lookup(4 * BLOCK_TOKENS, hashes)
        loader.start_load_kv(SimpleNamespace(save_requests=[], load_requests=[load]))
        output = _finish(loader, "finished_receiving")
    answers = {
        "lookup": [before, found],
        "same": all(torch.equal(one[:3], back[5:8]) for one, back in zip(source, target, strict=True)),
        "invalid": sorted(output.invalid_block_ids),
    }
    for worker in (saver, loader):
        worker.shutdown()
    return answers


def _load_request(data: Any, hashes: list[bytes]) -> Any:
    """Load three saved blocks into others, and one that nobody has saved."""
    return data.MooncakeStoreLoadRequest(request_id=2, block_ids=(5, 6, 7, 4), block_hashes=tuple(hashes))


def _migration() -> dict[str, Any]:
    """Two engines read from each other through the backend that LMDeploy registers."""
    import torch
    from lmdeploy.pytorch.disagg.backend import mooncake
    from lmdeploy.pytorch.disagg.conn.protocol import MigrationProtocol
    from lmdeploy.pytorch.disagg.messages import AssignmentInstruct, DistServeRegisterMRMessage

    memory = [torch.full((4096,), index, dtype=torch.uint8) for index in range(2)]
    backends = []
    with (
        mock.patch.object(mooncake, "get_rdma_nics", return_value=["none_0"]),
        mock.patch.object(mooncake, "get_local_ip_by_remote", return_value="127.0.0.1"),
    ):
        for own, other in (("a", "b"), ("b", "a")):
            backend = mooncake.MooncakeBackend()
            request = SimpleNamespace(
                rank=0, local_engine_config=None, remote_engine_config=None, local_engine_id=own,
                remote_engine_id=other,
            )  # fmt: skip
            backend.p2p_initialize(request)
            backends.append(backend)
    for backend, other, part in zip(backends, ("b", "a"), memory, strict=True):
        region = DistServeRegisterMRMessage(
            protocol=MigrationProtocol.RDMA, remote_engine_id=other, mr_key=7, addr=part.data_ptr(),
            offset=0, length=part.numel(),
        )  # fmt: skip
        backend.register_memory_region(region)
    for backend, other, remote in zip(backends, ("b", "a"), reversed(backends), strict=True):
        info = remote.endpoint_info("a" if other == "b" else "b", MigrationProtocol.RDMA)
        backend.p2p_connect(other, SimpleNamespace(endpoint_info=json.dumps(info)))
    step = AssignmentInstruct(mr_key=7, target_offset=0, source_offset=1024, length=2048)
    asyncio.run(backends[0].p2p_migrate(SimpleNamespace(remote_engine_id="b", batch=[step])))
    read = memory[0].tolist()
    return {"read": read == [0] * 1024 + [1] * 2048 + [0] * 1024}


def _run(job: Job) -> dict[str, Any]:
    Shells("mmengine", "ray", "dlslime", "fire", "shortuuid", "peft")
    return {"connector": _connector(job), "migration": _migration()}


if __name__ == "__main__":
    answer(_run)
