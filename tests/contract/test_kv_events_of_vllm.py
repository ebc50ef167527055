"""What vLLM tells of its prefix cache, from its own classes to a gateway's index: nothing is made up here.

A failure means: read vllm/distributed/kv_events.py and vllm/v1/core/block_pool.py again, then gpu_blocks.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash, get_request_block_hasher, init_none_hash
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from conductor.index import PrefixIndex
from conductor.index_feed import IndexFeed
from conductor.members import cache_record
from kvstore.directory.follower import StoreFollower
from mooncake.core.keys import prompt_keys, request_root
from mooncake.core.messages import StoreRecord, gpu_node
from mooncake.worker.connector import tells_blocks
from mooncake.worker.engine import engine_arguments
from mooncake.worker.engine_core import MooncakeEngine
from mooncake.worker.gpu_blocks import GpuBlocks, LeftOut, decode_batch
from mooncake.worker.gpu_events import GpuEvents
from mooncake.worker.spec import EngineSpec
from tests.unit.conductor.make import ROOT, record, store

SIZE = 4
BLOCKS = 12
DEADLINE_S = 30.0


class Cache:
    """vLLM's own KV cache manager, of a model with one kind of attention."""

    def __init__(self) -> None:
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(SIZE, sha256)
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.manager = KVCacheManager(
            config, max_model_len=1024, scheduler_block_size=SIZE, hash_block_size=SIZE,
            enable_kv_cache_events=True,
        )  # fmt: skip
        self.running: list[Request] = []
        self.names: dict[bytes, bytes] = {}  # vLLM's hash -> our key
        self._count = 0

    def request(self, prompt: list[int], salt: str | None = None, lora: LoRARequest | None = None) -> Request:
        self._count += 1
        return Request(
            f"r{self._count}", prompt, SamplingParams(max_tokens=100), None,
            cache_salt=salt, lora_request=lora, block_hasher=self._hasher,
        )  # fmt: skip

    def start(self, prompt: list[int], salt: str | None = None, lora: LoRARequest | None = None) -> bool:
        """Prefill a prompt in one step; False if there is no room."""
        request = self.request(prompt, salt, lora)
        blocks, known, _ = self.manager.get_computed_blocks(request)
        new = len(prompt) - known
        if self.manager.allocate_slots(request, new, known, blocks) is None:
            return False
        request.num_computed_tokens = len(prompt)
        self.running.append(request)
        self._note(request)
        return True

    def decode(self, request: Request, token: int) -> None:
        request.append_output_token_ids(token)
        if self.manager.allocate_slots(request, 1) is not None:
            request.num_computed_tokens += 1
        self._note(request)

    def end(self, request: Request) -> None:
        self.running.remove(request)
        self.manager.free(request)

    def _note(self, request: Request) -> None:
        if request.lora_request is None:
            root = request_root(bytes.fromhex(ROOT), request.cache_salt, None)
            keys, _ = prompt_keys(root, list(request.all_token_ids), SIZE)
            self.names.update(zip(request.block_hashes, keys, strict=False))

    def held(self) -> set[bytes]:
        """Return our names of the blocks that vLLM would find."""
        found = self.manager.block_pool.cached_block_hash_to_block._cache
        return {self.names[name] for one in found if (name := get_block_hash(one)) in self.names}

    def batch(self) -> KVEventBatch:
        return KVEventBatch(ts=time.time(), events=self.manager.take_events())


def new_blocks() -> GpuBlocks:
    return GpuBlocks(bytes.fromhex(ROOT), SIZE, BLOCKS)


prompts = st.lists(st.integers(1, 2), min_size=1, max_size=5).map(
    lambda blocks: [block * 10 + place for block in blocks for place in range(SIZE)] + [7]
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_cache_goes_through_we_know_the_names_of_what_it_holds(data: st.DataObject) -> None:
    cache, blocks = Cache(), new_blocks()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["start", "start", "end", "decode", "reset"]))
        if action == "start":
            cache.start(data.draw(prompts), data.draw(st.sampled_from([None, None, "tenant"])))
        elif action == "end" and cache.running:
            cache.end(data.draw(st.sampled_from(cache.running)))
        elif action == "decode" and cache.running:
            cache.decode(data.draw(st.sampled_from(cache.running)), data.draw(st.integers(1, 2)))
        elif action == "reset" and not cache.running:
            assert cache.manager.reset_prefix_cache()
        blocks.apply(decode_batch(msgspec.msgpack.encode(cache.batch())))
        assert set(blocks.keys()) == cache.held()
    assert not +blocks.left_out


def test_blocks_of_an_adapter_are_left_out_and_those_of_the_model_are_not() -> None:
    cache, blocks = Cache(), new_blocks()
    cache.start([1] * 9, lora=LoRARequest("adapter", 1, "/somewhere"))
    cache.start([1] * 9)
    blocks.apply(decode_batch(msgspec.msgpack.encode(cache.batch())))
    assert blocks.keys() == prompt_keys(bytes.fromhex(ROOT), [1] * 9, SIZE)[0]
    assert +blocks.left_out == {LeftOut.LORA: 2}


def test_the_array_encoding_of_the_same_fields_is_read_alike() -> None:
    cache = Cache()
    cache.start([1] * 9, "tenant")
    cache.start([2] * 9)
    events = cache.batch().events
    assert all(isinstance(event, BlockStored) for event in events)
    arrays = [
        ["BlockStored", *(getattr(event, name) for name in event.__struct_fields__)] for event in events
    ]
    by_map, by_array = new_blocks(), new_blocks()
    by_map.apply(decode_batch(msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=events))))
    by_array.apply(decode_batch(msgspec.msgpack.encode([1.0, arrays, 0])))
    assert by_map.keys() == by_array.keys()
    assert len(by_map) == 4


# ---------------------------------------------------------------- switched on and off


def parsed(*flags: str, store: StoreRecord | None = None) -> tuple[EngineSpec, SimpleNamespace]:
    """Our spec, and the part of vLLM's configuration that counts, as its own parser makes it of our flags."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    spec = EngineSpec(
        instance_id="p0",
        role="both",
        epoch="e",
        run_dir="/tmp/x",
        model="m",
        store=store,
        vllm_args=list(flags),
    )
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(engine_arguments(spec))
    made = AsyncEngineArgs.from_cli_args(args)
    caching = SimpleNamespace(enable_prefix_caching=made.enable_prefix_caching is not False)
    return spec, SimpleNamespace(kv_events_config=made.kv_events_config, cache_config=caching)


def test_an_engine_with_a_pool_tells_its_relay() -> None:
    spec, config = parsed(store=store("n0"))
    assert (config.kv_events_config.publisher, config.kv_events_config.topic) == ("zmq", "")
    assert config.kv_events_config.replay_endpoint == spec.kv_replay
    assert tells_blocks(config, spec)


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-enable-prefix-caching"],
        ['--kv-events-config={"enable_kv_cache_events": false}'],
        ['--kv-events-config={"enable_kv_cache_events": true, "endpoint": "tcp://*:5557"}'],  # the user's own
    ],
)
def test_without_a_prefix_cache_and_with_the_user_s_own_settings_nothing_is_told(flags: list[str]) -> None:
    spec, config = parsed(*flags, store=store("n0"))
    assert not tells_blocks(config, spec)


def test_without_a_pool_nothing_is_told() -> None:
    spec, config = parsed()
    assert not tells_blocks(config, spec)


def test_a_client_cannot_have_cached_blocks_told_again_which_would_count_as_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert '"kv_cache_report_mode"' in inspect.getsource(Request.__init__)
    monkeypatch.setattr(EngineCoreProc, "preprocess_add_request", lambda _, request: (request, 0))
    engine = object.__new__(MooncakeEngine)
    request = Request("r", [1], SamplingParams(extra_args={"kv_cache_report_mode": "full", "x": 1}), None)
    engine.preprocess_add_request(request)
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == {"x": 1}


# ---------------------------------------------------------------- over sockets


class Site:
    """vLLM's publisher, our relay's part, and a gateway's follower with its index."""

    def __init__(self, folder: Path, buffer_steps: int) -> None:
        self.cache = Cache()
        spec = EngineSpec(
            instance_id="p0", role="prefill", epoch="e1", run_dir=str(folder), model="m", block_size=SIZE
        )
        self.publisher = ZmqEventPublisher(0, spec.kv_events, spec.kv_replay, buffer_steps=buffer_steps)
        self.events = GpuEvents(spec, new_blocks(), "127.0.0.1")
        self.events.start()
        self.index = PrefixIndex()
        self.feed = IndexFeed(self.index)
        endpoint, told = self.events.endpoints
        self.record = msgspec.structs.replace(record("p0"), gpu_endpoint=endpoint, gpu_events=told)
        self.follower = StoreFollower(cache_record(self.record), self.feed, stale_s=DEADLINE_S).start()

    def publish(self) -> None:
        self.publisher.publish(self.cache.batch())

    def lose(self) -> None:
        """A batch that no subscriber gets, but that vLLM keeps."""
        seq = next(self.publisher._seq_gen)
        payload = msgspec.msgpack.encode(self.cache.batch())
        self.publisher._buffer.append((seq, payload))

    def known(self, prompt: list[int]) -> int:
        keys, _ = prompt_keys(bytes.fromhex(ROOT), prompt, SIZE)
        return self.index.longest_prefix(keys).get(gpu_node("p0"), 0)

    async def until(self, what: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not what():  # noqa: ASYNC110 -- vLLM publishes from a thread
                await asyncio.sleep(0.01)

    async def settle(self) -> None:
        """Until the relay hears vLLM; what came before, which it has asked for, is no gap to be tested."""
        self.cache.start([9] * 5)
        self.publish()
        await self.until(lambda: self.known([9] * 5) == 1)

    async def close(self) -> None:
        await self.follower.close()
        await self.feed.close()
        await self.events.close()
        self.publisher.shutdown()


@pytest.fixture
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    made = Site(tmp_path, getattr(request, "param", 100))
    await made.settle()
    yield made
    await made.close()


async def test_a_gateway_s_index_learns_what_the_engine_caches_and_gives_up(site: Site) -> None:
    site.cache.start([1] * 9)
    site.publish()
    await site.until(lambda: site.known([1] * 9) == 2)
    for request in list(site.cache.running):
        site.cache.end(request)
    assert site.cache.start([2] * 44)  # every block of the cache
    site.publish()
    await site.until(lambda: site.known([2] * 44) == 11)
    assert site.known([1] * 9) == 0
    assert site.feed.told(gpu_node("p0")) == len(site.events.reader.blocks) == 11


async def test_a_message_that_was_lost_is_repeated(site: Site) -> None:
    site.cache.start([1] * 9)
    site.lose()
    site.cache.start([*[1] * 8, *[2] * 5])
    site.publish()
    await site.until(lambda: site.known([*[1] * 8, *[2] * 5]) == 3)
    reader = site.events.reader
    assert (reader.gaps, reader.lost, site.known([9] * 5)) == (1, 0, 1)


@pytest.mark.parametrize("site", [1], indirect=True)
async def test_what_vllm_cannot_repeat_costs_all_that_was_known_until_it_is_stored_again(site: Site) -> None:
    site.cache.start([1] * 9)
    site.lose()
    site.cache.start([3] * 9)
    site.lose()  # the first is not kept any more
    site.cache.start([2] * 9)
    site.publish()
    await site.until(lambda: site.known([2] * 9) == 2)
    reader = site.events.reader
    assert (reader.lost, site.known([9] * 5), site.known([1] * 9)) == (1, 0, 0)


async def test_a_gateway_that_comes_later_gets_what_is_there(site: Site) -> None:
    index = PrefixIndex()
    feed = IndexFeed(index)
    follower = StoreFollower(cache_record(site.record), feed, stale_s=DEADLINE_S).start()
    await follower.wait_live(DEADLINE_S)
    await site.until(lambda: feed.in_step(gpu_node("p0")))
    assert index.longest_prefix(prompt_keys(bytes.fromhex(ROOT), [9] * 5, SIZE)[0]) == {gpu_node("p0"): 1}
    await follower.close()
    await feed.close()
