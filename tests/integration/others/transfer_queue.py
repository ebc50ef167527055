"""TransferQueue's storage client on `mooncake.store`: tensors and other values, registered around each call.

Job: {"folders": [where transfer_queue lies], "master": HOST:PORT}.
"""

from typing import Any

from tests.integration.others.job import Job, answer
from tests.integration.others.shells import Shells

SHELLS = ("tensordict", "ray", "omegaconf", "hydra")
VALUES = 900
"""More than two of the client's batches, which run in threads."""


def _run(job: Job) -> dict[str, Any]:
    Shells(*SHELLS)
    import torch
    from transfer_queue.storage.clients.mooncake_client import MooncakeStoreClient

    config = {
        "local_hostname": "127.0.0.1", "metadata_server": "localhost:8080",
        "master_server_address": job["master"], "global_segment_size": 64 << 20,
        "local_buffer_size": 16 << 20, "protocol": "tcp",
    }  # fmt: skip
    writer, reader = MooncakeStoreClient(config), MooncakeStoreClient(config)
    tensors = [torch.arange(index, index + 64 + index % 7, dtype=torch.float32) for index in range(VALUES)]
    objects = [{"row": index, "text": "x" * (index % 50)} for index in range(VALUES)]
    keys = [f"field/{index}" for index in range(2 * VALUES)]
    values = [*tensors, *objects]
    metadata = writer.put(keys, values)
    shapes = [tensor.shape for tensor in tensors] + [None] * VALUES
    dtypes = [tensor.dtype for tensor in tensors] + [None] * VALUES
    got = reader.get(keys, shapes, dtypes, metadata)
    again = [tensor + 1 for tensor in tensors]
    writer.put(keys[:VALUES], again)
    newer = reader.get(keys[:VALUES], shapes[:VALUES], dtypes[:VALUES])
    reader.clear(keys)
    left = reader._store.batch_is_exist(keys)
    for client in (writer, reader):
        client.close()
    return {
        "tensors": all(torch.equal(one, back) for one, back in zip(tensors, got[:VALUES], strict=True)),
        "objects": got[VALUES:] == objects,
        "written again": all(torch.equal(one, back) for one, back in zip(again, newer, strict=True)),
        "left": sum(left),
    }


if __name__ == "__main__":
    answer(_run)
