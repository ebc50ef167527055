"""A gateway's wish, real directory and stores: a hot prefix is whole on other hosts and outlives its own."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.heat import USES_MIN, Heat
from conductor.hot_copies import HotCopies, HotMetrics
from conductor.index import PrefixIndex
from conductor.plan import Decision, Plan, RequestFacts
from kvstore.directory.messages import DirectoryReply, Locate
from mooncake.core.messages import InstanceRecord, StoreRecord
from mooncake.core.metadata_open import open_metadata
from mooncake.core.rpc import BlockingRpcClient
from tests.integration.pool_processes import WAIT_S, PoolProcesses, key, until

pytestmark = pytest.mark.integration

SIZE = 16 << 10
BLOCKS = 63
"""A rung of conductor.heat: all of them are wished for."""


def instance(node: str) -> InstanceRecord:
    return InstanceRecord(
        instance_id=f"p-{node}", role="prefill", epoch="1", endpoint="", node=node, pid=1, model="m",
        context_root="00", block_size=32, max_model_len=4096, kv_blocks=100, max_num_seqs=8,
        max_num_batched_tokens=4096, block_bytes=SIZE, vllm_version="",
    )  # fmt: skip


async def tell(metadata: str, stores: dict[str, StoreRecord], keys: list[bytes]) -> float:
    """Let a gateway plan so many requests that three hosts are worth it; return how often it was heard."""
    view, index, registry = ClusterView(), PrefixIndex(), CollectorRegistry()
    index.apply("a", b"".join(keys), b"")
    for node, record in stores.items():
        view.store_up(record)
        view.instance_up(0.0, instance(node))
        view.link_up(0.0, f"p-{node}")
        view.pulse(0.0, f"p-{node}", 0.0)
    store = open_metadata(metadata)
    hot = HotCopies(Heat(CostModel(remote_bytes_s=1e12), 8), view, index, store, HotMetrics(registry))
    facts = RequestFacts(request_id="r", prompt_len=1, max_tokens=1, keys=keys, arrival_s=0.0)
    plan = Plan(
        request_id="r", prefill="p-a", decode=None, decision=Decision.KVCACHE_CENTRIC, hit_blocks=len(keys)
    )
    for _ in range(4 * int(USES_MIN)):
        hot.planned(facts, plan)
    hot.start()
    try:
        async with asyncio.timeout(WAIT_S):
            while not (sent := registry.get_sample_value("mooncake_hot_wishes_total", {"result": "sent"})):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return sent
    finally:
        await hot.close()
        await store.close()


def holders(endpoint: str, keys: list[bytes]) -> set[tuple[str, ...]]:
    client = BlockingRpcClient(endpoint, DirectoryReply)
    try:
        found = client.call(Locate(keys), WAIT_S)
        return {tuple(sorted(found.nodes[index] for index in row)) for row in found.holders}
    finally:
        client.close()


def test_a_hot_prefix_is_copied_whole_to_the_hosts_that_prefill_and_outlives_the_one_that_had_it(tmp_path):
    pool = PoolProcesses(tmp_path)
    try:
        stores = {node: pool.store(node) for node in "abcd"}
        directory = pool.directory("d1")
        keys = [key(n) for n in range(BLOCKS)]
        pool.put(stores["a"], keys, SIZE)
        admin = pool.admin()
        pool.wait_exact(admin, BLOCKS)
        until(lambda: all(node["blocks"] is not None for node in admin.get("/segments")["segments"]))
        serving = {node: stores[node] for node in "abc"}  # d only decodes
        assert asyncio.run(tell(pool.metadata, serving, keys)) == 1
        until(lambda: holders(directory.endpoint, keys) == {("a", "b", "c")})
        pool.kill("a")
        for node in "bc":
            assert pool.read(stores[node], keys, SIZE) == keys
        assert pool.read(stores["d"], keys, SIZE) == []
    finally:
        pool.close()
