"""SGLang's HiCache storage class on `mooncake.store`, and its transfer engine on `mooncake.engine`.

Job: {"folders": [where sglang lies], "master": HOST:PORT, "metrics_port": of the master, "scratch": a folder,
"client": HOST:PORT of a `mooncake_client`, if there is one}.
Real are SGLang's storage class, its configuration, its environment, its transfer engine and its own test of
the store; its pools of host memory, which need a device, are replaced by `Pages`.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.integration.others.job import Job, answer
from tests.integration.others.shells import Shells, bare_package

PAGES = 8
ENTRY_BYTES = 3000
STORE = "sglang.srt.mem_cache.storage.mooncake_store"
BARE = ("sglang.srt", "sglang.srt.distributed", "sglang.srt.utils")
"""Packages whose own imports are all of SGLang; older versions need those of the last one."""
SHELLS = (
    "orjson", "IPython", "torchvision", "triton", "zmq",
    "sglang.srt.observability", "sglang.srt.metrics", "sglang.srt.mem_cache.memory_pool_host",
    "sglang.srt.mem_cache.pool_host", "sglang.srt.mem_cache.hybrid_cache", "sglang.srt.runtime_context",
    "sglang.srt.distributed.parallel_state",
)  # fmt: skip


class Pages:
    """A pool of host memory as SGLang's storage classes see it: pages of some entries each."""

    layout = "page_first"
    page_size = 1

    def __init__(self, entries: int, seed: int, pages: int = PAGES) -> None:
        """All bytes differ with `seed`."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        shape = (pages, entries, ENTRY_BYTES)
        self.kv_buffer = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.size, self.size_per_token = pages, entries * ENTRY_BYTES

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        rows = [self.kv_buffer[int(index)] for index in indices]
        places = [entry.data_ptr() for row in rows for entry in row]
        return places, [ENTRY_BYTES] * len(places)

    def get_ksize_per_token(self) -> int:
        return self.kv_buffer[0].numel()

    def same(self, other: "Pages", count: int = PAGES) -> bool:
        import torch

        return torch.equal(self.kv_buffer[:count], other.kv_buffer[:count])


class Stores:
    """Makes SGLang's storage objects; each is one rank's."""

    def __init__(self, module: Any) -> None:
        """`module`: mooncake_store."""
        self._module = module
        self._fields = module.HiCacheStorageConfig.__dataclass_fields__
        self._kept: list[Any] = []  # a store that is let go takes its part of the pool with it

    def config(self, is_mla: bool, extra: dict[str, Any] | None, rank: int = 0, ranks: int = 1) -> Any:
        values = {
            "tp_rank": rank, "tp_size": ranks, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
            "attn_cp_size": 1, "is_mla_model": is_mla, "enable_storage_metrics": False,
            "is_page_first_layout": True, "model_name": "org/model", "extra_config": extra,
        }  # fmt: skip
        known = {name: value for name, value in values.items() if name in self._fields}
        return self._module.HiCacheStorageConfig(**known)

    def make(self, pages: Pages, is_mla: bool = False, extra: dict[str, Any] | None = None) -> Any:
        store = self._module.MooncakeStore(self.config(is_mla, extra))
        store.register_mem_pool_host(pages)
        self._kept.append(store)
        return store


def _settings(job: Job) -> dict[str, Any]:
    return {
        "master_server_address": job["master"], "master_metrics_port": job["metrics_port"],
        "metadata_server": "P2PHANDSHAKE", "protocol": "tcp", "device_name": "",
        "global_segment_size": str(16 << 20),
    }  # fmt: skip


def _environment(job: Job) -> None:
    os.environ.update(
        MOONCAKE_MASTER=job["master"], MOONCAKE_PROTOCOL="tcp", MOONCAKE_DEVICE="",
        MOONCAKE_TE_META_DATA_SERVER="P2PHANDSHAKE", MOONCAKE_GLOBAL_SEGMENT_SIZE=str(64 << 20),
    )  # fmt: skip


def _own_tests(module: Any) -> list[str]:
    """Run the test that SGLang ships for its class, as its `__main__` does; return what has passed."""
    test = importlib.import_module(f"{STORE}.test_mooncake_store")
    stores = Stores(module)
    test.test_single_operation()
    passed = ["single"]
    for is_mla, rank, ranks in ((False, 0, 1), (True, 0, 1), (False, 1, 4), (True, 3, 8)):
        test.test_batch_operation(stores.config(is_mla, None, rank, ranks))
        passed.append(f"{'mla' if is_mla else 'mha'} {rank}/{ranks}")
    return passed


def _configs(stores: Stores, job: Job) -> dict[str, Any]:
    """Write with the settings of the environment; read with those of a file and of extra_config."""
    import torch

    rows = torch.arange(PAGES)
    keys = [f"config-{index}" for index in range(PAGES)]
    source = Pages(2, seed=1)
    answers: dict[str, Any] = {"environment": all(stores.make(source).batch_set_v1(keys, rows))}
    file = Path(job["scratch"], "sglang.json")
    file.write_text(json.dumps(_settings(job)))
    os.environ["SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"] = str(file)
    for name, extra in (("file", None), ("extra_config", {**_settings(job), "check_server": True})):
        target = Pages(2, seed=2)
        got = stores.make(target, extra=extra).batch_get_v1(keys, rows)
        answers[name] = [all(got), target.same(source)]
    del os.environ["SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"]
    return answers


def _prefixes(stores: Stores) -> dict[str, Any]:
    """How many pages of a prefix are there; what is there already is not written again."""
    import torch

    source, target = Pages(2, seed=3), Pages(2, seed=4)
    store, reader = stores.make(source), stores.make(target)
    keys = [f"prefix-{index}" for index in range(PAGES)]
    before = reader.batch_exists(keys)
    first = store.batch_set_v1(keys[:3], torch.arange(3))
    some = reader.batch_exists(keys)
    everything = store.batch_set_v1(keys, torch.arange(PAGES))
    got = reader.batch_get_v1([*keys[:2], "prefix-missing"], torch.arange(3))
    same = target.same(source, 2)
    whole = reader.batch_exists(keys)
    store.store.remove_all(force=True)
    return {
        "exists": [before, some, whole, reader.batch_exists(keys)],
        "set": [all(first), all(everything)], "got": got, "same": same,
    }  # fmt: skip


def _layer_first(stores: Stores) -> list[Any]:
    """MLA pages in one piece per layer: the multi-buffer calls; with groups, a config for every key."""
    import torch

    source, target = Pages(4, seed=5), Pages(4, seed=6)
    keys = [f"layers-{index}" for index in range(PAGES)]
    store = stores.make(source, is_mla=True, extra={"enable_group_semantics": True})
    done = store.batch_set_v1(keys, torch.arange(PAGES))
    reader = stores.make(target, is_mla=True)
    got = reader.batch_get_v1(keys, torch.arange(PAGES))
    return [all(done), all(got), target.same(source)]


def _side_pools(module: Any, stores: Stores) -> dict[str, Any]:
    """The v2 calls: pages of several pools in one go, as hybrid models need them."""
    import torch

    def transfers(pages: Pages, store: Any) -> list[Any]:
        store.register_mem_host_pool_v2(pages, module.PoolName.INDEXER)
        rows = torch.arange(PAGES)
        return [module.PoolTransfer(name=module.PoolName.INDEXER, keys=keys, host_indices=rows)]

    keys = [f"hybrid-{index}" for index in range(PAGES)]
    kv, side, kv_back, side_back = Pages(1, seed=7), Pages(1, seed=8), Pages(1, seed=9), Pages(1, seed=10)
    store, reader = stores.make(kv, is_mla=True), stores.make(kv_back, is_mla=True)
    writes, reads = transfers(side, store), transfers(side_back, reader)
    store.batch_set_v1(keys, torch.arange(PAGES))
    missing = reader.batch_exists_v2(keys, reads).kv_hit_pages
    done = store.batch_set_v2(writes)
    hits = reader.batch_exists_v2(keys, reads)
    got = reader.batch_get_v2(reads)
    return {
        "missing": missing, "set": all(done[module.PoolName.INDEXER]), "hits": hits.kv_hit_pages,
        "got": all(got[module.PoolName.INDEXER]), "same": side_back.same(side),
    }  # fmt: skip


def _embeddings(job: Job) -> dict[str, Any]:
    """SGLang's cache of image embeddings."""
    module = importlib.import_module(f"{STORE}.mooncake_embedding_store")
    source, target = Pages(2, seed=11), Pages(2, seed=12)
    store = module.MooncakeEmbeddingStore()
    for pages in (source, target):
        store.register_buffer(pages.kv_buffer)
    places, sizes = source.get_page_buffer_meta(range(PAGES))
    back, _ = target.get_page_buffer_meta(range(PAGES))
    hashes = [f"image-{index}" for index in range(len(places))]
    put = store.batch_put(hashes, places, sizes)
    return {
        "put": all(put), "exist": store.batch_is_exist([*hashes[:1], "no-image"]),
        "got": store.batch_get(["no-image", *hashes], [back[0], *back], [sizes[0], *sizes]),
        "same": target.same(source),
    }  # fmt: skip


def _transfer_engine() -> dict[str, Any]:
    """Prefill's engine writes pages into decode's, by session ids, as SGLang's disaggregation does."""
    module = importlib.import_module("sglang.srt.distributed.device_communicators.mooncake_transfer_engine")
    source, target = Pages(2, seed=13), Pages(2, seed=14)
    prefill, decode = (module.MooncakeTransferEngine("127.0.0.1", gpu_id=0) for _ in range(2))
    places, sizes = source.get_page_buffer_meta(range(PAGES))
    back, _ = target.get_page_buffer_meta(range(PAGES))
    registered = [
        prefill.batch_register([source.kv_buffer.data_ptr()], [source.kv_buffer.numel()]),
        decode.batch_register([target.kv_buffer.data_ptr()], [target.kv_buffer.numel()]),
    ]
    session = decode.get_session_id()
    wrote = prefill.batch_transfer_sync(session, places, back, sizes)
    same = target.same(source)
    probe = prefill.send_probe(session) if hasattr(prefill, "send_probe") else 0
    single = prefill.transfer_sync(session, places[0], back[1], sizes[0])
    outside = prefill.transfer_sync(session, places[0], 4096, sizes[0])
    gone = prefill.batch_transfer_sync("127.0.0.1:1", places, back, sizes)
    ends = decode.batch_deregister([target.kv_buffer.data_ptr()])
    return {
        "registered": registered, "wrote": wrote, "same": same, "probe": probe, "single": single,
        "outside": outside < 0, "gone": gone < 0, "ends": ends,
    }  # fmt: skip


def _standalone(module: Any, stores: Stores, job: Job) -> list[Any]:
    """A light client of the host's `mooncake_client`: pages in memory that both see."""
    import torch

    class Allocated(Pages):
        def __init__(self, entries: int, seed: int) -> None:
            super().__init__(entries, seed)
            plain = self.kv_buffer
            self.allocator = module.MooncakeHostTensorAllocator()
            self.kv_buffer = self.allocator.allocate(tuple(plain.shape), torch.uint8)
            self.kv_buffer.copy_(plain)

    extra = {"client_server_address": job["client"], "standalone_storage": True}
    keys = [f"dummy-{index}" for index in range(PAGES)]
    made = []
    for seed in (15, 16):
        pages = Allocated(2, seed)
        config = stores.config(False, extra)
        store = module.MooncakeStore(config, pages)
        store.register_mem_pool_host(pages)
        made.append((pages, store))
    (source, writer), (target, reader) = made
    done = writer.batch_set_v1(keys, torch.arange(PAGES))
    got = reader.batch_get_v1(keys, torch.arange(PAGES))
    return [all(done), all(got), target.same(source)]


def _scenes(module: Any, job: Job) -> Iterator[tuple[str, Callable[[], Any]]]:
    stores = Stores(module)
    yield "configs", lambda: _configs(stores, job)
    yield "prefixes", lambda: _prefixes(stores)
    yield "engine", _transfer_engine
    if hasattr(module.MooncakeStore, "batch_set_v2"):  # versions since then
        yield "own tests", lambda: _own_tests(module)  # older ones do not fit their class
        yield "layer first", lambda: _layer_first(stores)
        yield "side pools", lambda: _side_pools(module, stores)
        yield "embeddings", lambda: _embeddings(job)
    if job.get("client"):
        yield "standalone", lambda: _standalone(module, stores, job)


def _run(job: Job) -> dict[str, Any]:
    folder = bare_package("sglang")
    is_new = folder.joinpath("srt/utils/network.py").exists()
    for name in BARE if is_new else BARE[:-1]:
        bare_package(name)
    Shells(*SHELLS)
    _environment(job)
    module = importlib.import_module(f"{STORE}.mooncake_store")
    return {name: scene() for name, scene in _scenes(module, job)}


if __name__ == "__main__":
    answer(_run)
