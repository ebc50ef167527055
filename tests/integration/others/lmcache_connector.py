"""LMCache's remote backend and lookup client on `mooncake.store`, its transfer channel on `mooncake.engine`.

Job: {"folders": [where lmcache lies], "master": HOST:PORT}. All of LMCache's own is real: what its connector
factory makes for mooncakestore://, the host memory it stores from and reads into, its lookup by tokens.
"""

import asyncio
import importlib
import socket
import sys
import threading
import time
from typing import Any

from tests.integration.others.job import Job, answer
from tests.integration.others.shells import Shells

SHELLS = ("aiofile", "nvtx", "cufile")
LAYERS, CHUNK, HEADS, HEAD_SIZE = 2, 16, 2, 8
TOKENS = [7 * index % 1000 for index in range(4 * CHUNK)]
PART_BYTES = 4096
CHANNEL_S = 30.0


def _settings(job: Job, style: str) -> dict[str, Any]:
    """The keys of LMCache's documentation: with its prefix (newer), and without."""
    mine = {
        "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "tcp",
        "global_segment_size": 32 << 20, "local_buffer_size": 16 << 20,
    }  # fmt: skip
    if style == "prefixed":
        keys = {**mine, "master_server_addr": job["master"], "rdma_devices": ""}
        return {f"mooncake_{key}": value for key, value in keys.items()}
    return {**mine, "master_server_address": job["master"], "device_name": "", "transfer_timeout": 30}


class Cache:
    """One LMCache worker: host memory, and a remote backend made by its factory."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, master: str, settings: dict[str, Any], with_meta: bool
    ) -> None:
        """`with_meta`: a chunk carries its shape, or all chunks have the same."""
        import torch
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.remote_backend import RemoteBackend

        self.config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK, remote_url=f"mooncakestore://{master}/", remote_serde="naive",
            max_local_cpu_size=0.05, extra_config={**settings, "save_chunk_meta": with_meta},
        )  # fmt: skip
        self.metadata = LMCacheMetadata(
            model_name="org/model", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
            kv_dtype=torch.float16, kv_shape=(LAYERS, 2, CHUNK, HEADS, HEAD_SIZE), chunk_size=CHUNK,
        )  # fmt: skip
        self.memory = LocalCPUBackend(self.config, self.metadata)
        self.remote = RemoteBackend(self.config, self.metadata, loop, self.memory)
        assert self.remote.connection is not None, "see LMCache's warning above"

    def chunk(self, seed: int) -> Any:
        import torch

        made = self.memory.allocate(self.metadata.get_shapes(), self.metadata.get_dtypes())
        generator = torch.Generator().manual_seed(seed)
        made.raw_tensor.copy_(
            torch.randint(0, 256, made.raw_tensor.shape, dtype=torch.uint8, generator=generator)
        )
        return made


def _keys(cache: Cache) -> list[Any]:
    """The keys of four chunks of tokens."""
    from lmcache.v1.token_database import ChunkedTokenDatabase

    database = ChunkedTokenDatabase(cache.config, cache.metadata)
    return [key for _, _, key in database.process_tokens(TOKENS)]


def _same(one: Any, other: Any) -> bool:
    import torch

    return other is not None and torch.equal(one.raw_tensor, other.raw_tensor)


def _backend(job: Job, loop: asyncio.AbstractEventLoop, style: str, with_meta: bool) -> dict[str, Any]:
    """One worker stores three of four chunks, another reads all four."""
    settings = _settings(job, style)
    writer, reader = (Cache(loop, job["master"], settings, with_meta) for _ in range(2))
    keys = _keys(writer)
    chunks = [writer.chunk(seed) for seed in range(4)]
    before = reader.remote.batched_contains(keys)
    writer.remote.batched_submit_put_task(keys[:2], chunks[:2])
    writer.remote.submit_put_task(keys[2], chunks[2])
    _wait(lambda: reader.remote.batched_contains(keys) == 3)
    got = reader.remote.batched_get_blocking(keys)
    answers = {
        "contains": [before, reader.remote.batched_contains(keys)],
        "got": [_same(chunk, back) for chunk, back in zip(chunks, got, strict=True)],
        "missing": got[3] is None,
        "lookup": _lookup(job, writer),
    }
    writer.remote.connection.getWrappedConnector().store.remove_all(force=True)
    answers["removed"] = [reader.remote.contains(key) for key in keys] == [0] * 4
    for chunk in (*chunks, *got[:3]):
        chunk.ref_count_down()
    for one in (writer, reader):
        one.remote.close()
    return answers


def _lookup(job: Job, cache: Cache) -> Any:
    """How many of the tokens are in the pool, asked by LMCache's scheduler side."""
    from lmcache.v1.lookup_client.mooncake_lookup_client import MooncakeLookupClient

    client = MooncakeLookupClient(cache.config, cache.metadata, job["master"])
    found = client.lookup(TOKENS)
    client.store.close()
    return found


def _wait(done: Any) -> None:
    end_s = time.monotonic() + CHANNEL_S
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def _channel() -> dict[str, Any]:
    """Two workers of LMCache's peer-to-peer mode: one reads the other's host memory."""
    import torch
    from lmcache.v1.distributed.internal_api import L1MemoryDesc

    module = importlib.import_module("lmcache.v1.distributed.transfer_channel.impl.mooncake_te_impl")
    memory = [torch.full((8 * PART_BYTES,), value, dtype=torch.uint8) for value in (1, 2)]
    memory[1][: 4 * PART_BYTES] = torch.arange(4 * PART_BYTES) % 251
    urls = []
    for _ in memory:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            urls.append(f"127.0.0.1:{probe.getsockname()[1]}")
    contexts = [
        module.create_mooncake_te_transfer_channel_context(
            L1MemoryDesc(ptr=part.data_ptr(), size=part.numel(), align_bytes=PART_BYTES), url, url
        )
        for part, url in zip(memory, urls, strict=True)
    ]
    client = contexts[0].get_transfer_channel_client(urls[1])
    here = contexts[0].get_transfer_channel_address([(6 * PART_BYTES, PART_BYTES), (0, PART_BYTES)])
    there = contexts[1].get_transfer_channel_address([(PART_BYTES, PART_BYTES), (0, PART_BYTES)])
    task = client.submit_read(here, there)
    results: list[Any] = []

    def finished() -> bool:
        results.append(client.query_read_status(task))
        return bool(results[-1].finished)

    _wait(finished)
    same = [
        torch.equal(memory[0][at : at + PART_BYTES], memory[1][of : of + PART_BYTES])
        for at, of in ((6 * PART_BYTES, PART_BYTES), (0, 0))
    ]
    untouched = bool((memory[0][PART_BYTES : 6 * PART_BYTES] == 1).all())
    for context in contexts:
        context.close()
    return {"succeeded": list(results[-1].succeeded_mask), "same": same, "untouched": untouched}


def _run(job: Job) -> dict[str, Any]:
    Shells(*SHELLS, instead=["transformers"])  # it has a tokenizer of its own at hand, for text
    sys.modules["vllm"] = None  # type: ignore[assignment]  # absent: LMCache has a hash function of its own
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    connector = importlib.import_module("lmcache.v1.storage_backend.connector.mooncakestore_connector")
    prefixed = "prefixed" if hasattr(connector, "setup_mooncake_store") else "plain"  # since 0.4.3
    answers = {
        "zero copy": _backend(job, loop, prefixed, with_meta=False),
        "with shapes": _backend(job, loop, "plain", with_meta=True),
    }
    if importlib.util.find_spec("lmcache.v1.distributed.transfer_channel"):  # since 0.5
        answers["channel"] = _channel()
    return answers


if __name__ == "__main__":
    answer(_run)
