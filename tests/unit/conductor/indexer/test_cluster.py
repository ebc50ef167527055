"""Our own cluster, as its stores and engines tell it, for who asks by upstream's API."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from conductor.indexer.cluster import Cluster
from kvstore.node.changes import NodeEvents
from kvstore.node.events import EventPublisher, Snapshots
from mooncake.core.keys import prompt_keys, request_root
from mooncake.core.messages import (
    INSTANCES_PREFIX,
    STORES_PREFIX,
    Snapshot,
    SnapshotPage,
    StoreRecord,
    gpu_node,
)
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.rpc import RpcServer
from tests.unit.conductor.indexer.make import SIZE, Site
from tests.unit.conductor.make import ROOT, record

PROMPT = list(range(100, 116))


def keys_of(salt: str | None = None, root: str = ROOT) -> list[bytes]:
    return prompt_keys(request_root(bytes.fromhex(root), salt, None), PROMPT, SIZE)[0]


class Node:
    """A store, or an engine's own cache, as it speaks to followers."""

    def __init__(self, name: str, epoch: str = "e1") -> None:
        self.name, self.epoch = name, epoch
        self.keys: dict[bytes, None] = {}
        self.publisher = EventPublisher("tcp://127.0.0.1:0", name, epoch)
        self._snapshots = Snapshots(epoch)
        self._server = RpcServer("tcp://127.0.0.1:0", Snapshot, self._answer)
        self._server.start()

    def tell(self, stored: list[bytes], removed: list[bytes] | None = None) -> None:
        self.keys |= dict.fromkeys(stored)
        for key in removed or []:
            del self.keys[key]
        self.publisher.publish(NodeEvents(stored, removed or []))

    async def _answer(self, request: Snapshot) -> SnapshotPage:
        return self._snapshots.page(request.cursor, self.publisher.seq, lambda: list(self.keys))

    @property
    def endpoints(self) -> tuple[str, str]:
        return self._server.endpoint, self.publisher.endpoint

    async def close(self) -> None:
        await self._server.close()
        self.publisher.close()


class Ours:
    """Metadata, an engine's cache and a store, followed by an indexer."""

    def __init__(self) -> None:
        self.metadata = MemoryMetadata()
        self.site = Site()
        self.cluster = Cluster(self.site.indexer, self.metadata)
        self.gpu, self.store = Node(gpu_node("p0")), Node("n0")
        self.nodes = [self.gpu, self.store]

    async def start(self) -> None:
        self.cluster.start()
        await self.put_instance(self.gpu)
        endpoint, events = self.store.endpoints
        told = StoreRecord("n0", "e1", endpoint, events, "/fd", 1 << 20, 1)
        await self.metadata.put(STORES_PREFIX + "n0", msgspec.json.encode(told))

    async def put_instance(self, gpu: Node, **more: Any) -> None:
        endpoint, events = gpu.endpoints
        instance_id = gpu.name.removeprefix(gpu_node(""))
        made = record(instance_id, block_size=SIZE, epoch=gpu.epoch, **more)
        made = msgspec.structs.replace(made, gpu_endpoint=endpoint, gpu_events=events)
        await self.metadata.put(INSTANCES_PREFIX + instance_id, msgspec.json.encode(made))

    async def until(self, gpu: int, cpu: int, **more: Any) -> None:
        """Wait for what a query tells of p0, while the nodes beat."""

        async def told() -> bool:
            for node in self.nodes:
                node.publisher.heartbeat()
            found = (await self.site.query(PROMPT, **more)).get("p0", {"gpu": -1, "cpu": -1})
            return (found["gpu"], found["cpu"]) == (gpu, cpu)

        await self.site.until(told)

    async def close(self) -> None:
        await self.cluster.close()
        await self.site.close()
        for node in self.nodes:
            await node.close()
        await self.metadata.close()


@pytest.fixture
async def ours() -> AsyncIterator[Ours]:
    made = Ours()
    await made.start()
    yield made
    await made.close()


async def test_an_engine_s_cache_comes_first_and_the_pool_goes_on(ours: Ours) -> None:
    keys = keys_of()
    ours.gpu.tell(keys[:1])
    ours.store.tell(keys[:3])
    await ours.until(4, 12)
    ours.store.tell([], keys[2:3])
    await ours.until(4, 8)
    _, answer = await ours.site.send("/query", {"model": "m", "block_size": SIZE, "token_ids": PROMPT})
    assert answer["default"]["p0"] == {"longest_matched": 8, "GPU": 4, "CPU": 8, "DISK": 0, "DP": {"0": 4}}


async def test_a_tenant_s_salt_is_part_of_our_names_too(ours: Ours) -> None:
    ours.gpu.tell(keys_of("s"))
    await ours.until(16, 16, cache_salt="s")
    await ours.until(0, 0)


async def test_our_names_can_be_asked_for_by_their_first_eight_bytes(ours: Ours) -> None:
    keys = keys_of()
    ours.gpu.tell(keys)
    await ours.until(16, 16)
    names = [int.from_bytes(key[:8], "little") for key in keys]
    wish = {"model": "m", "block_size": SIZE, "seq_hashes": names}
    _, answer = await ours.site.send("/query_by_hash", wish)
    assert answer["default"]["p0"]["longest_matched"] == 16


async def test_an_engine_that_leaves_or_starts_anew_takes_its_blocks_along(ours: Ours) -> None:
    ours.gpu.tell(keys_of())
    await ours.until(16, 16)
    again = Node(gpu_node("p0"), "e2")
    ours.nodes.append(again)
    await ours.put_instance(again)
    await ours.until(0, 0)
    again.tell(keys_of()[:1])
    await ours.until(4, 4)
    await ours.metadata.delete(INSTANCES_PREFIX + "p0")
    await ours.until(-1, -1)


async def test_a_store_that_leaves_takes_its_blocks_along(ours: Ours) -> None:
    ours.store.tell(keys_of())
    await ours.until(0, 16)
    await ours.metadata.delete(STORES_PREFIX + "n0")
    await ours.until(0, 0)


async def test_an_engine_that_names_its_blocks_otherwise_is_left_out(ours: Ours) -> None:
    await ours.until(0, 0)
    other = Node(gpu_node("p1"))
    ours.nodes.append(other)
    await ours.put_instance(other, context_root="bb" * 32)
    ours.gpu.tell(keys_of())
    await ours.until(16, 16)
    assert set(await ours.site.query(PROMPT)) == {"p0"}


async def test_an_engine_that_is_draining_takes_no_requests(ours: Ours) -> None:
    await ours.until(0, 0)
    await ours.put_instance(ours.gpu, role="draining")
    await ours.until(-1, -1)
    await ours.put_instance(ours.gpu)
    await ours.until(0, 0)


async def test_others_cannot_register_into_our_context(ours: Ours) -> None:
    await ours.until(0, 0)
    wish = {
        "endpoint": "tcp://127.0.0.1:9", "type": "vLLM", "modelname": "m", "instance_id": "x",
        "block_size": SIZE, "dp_rank": 0,
    }  # fmt: skip
    status, answer = await ours.site.send("/register", wish)
    assert (status, answer["reason"]) == (400, "invalid_registration")
    _, view = await ours.site.send("/global_view")
    assert view["contexts"][0]["hash_profile"] == {"strategy": "mooncake", "root_digest": ROOT}
