"""Stores copy from each other: by a hint, by an order, in pieces, and nothing that is not right."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256

import msgspec
import numpy as np
import pytest

from kvstore.limits import NodeLimits
from kvstore.store import pulls as pulls_module
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.errors import NotLeader, RequestError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import (
    STORES_PREFIX,
    Acquire,
    Commit,
    DropKeys,
    HandOver,
    ListNames,
    Pull,
    Release,
    Reserve,
    Term,
)
from mooncake.core.metadata_memory import MemoryMetadata
from transfer.config import EngineConfig

SIZE = 64 << 10
WAIT_S = 10.0


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def content(number: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8).tobytes()


class Store:
    """A store in this process, asked directly."""

    def __init__(self, service: StoreService) -> None:
        self.service = service
        self.node = service.config.node

    async def ask(self, request):
        return await self.service.requests.handle(request)

    async def put(self, *numbers: int, size: int = SIZE, name: bytes = b"") -> None:
        for number in numbers:
            got = await self.ask(Reserve("w", [key(number)], size))
            assert got.tickets[0], f"no room for {number}"
            self.service._segment.view(got.offsets[0], size)[:] = content(number, size)
            checksum = block_checksum(key(number), content(number, size))
            assert (await self.ask(Commit(got.tickets, [checksum], [name] if name else []))).done == [True]

    async def get(self, *numbers: int, source: str = "", wait_s: float = WAIT_S) -> int:
        """Return how many of the prefix are served, all of them right."""
        got = await self.ask(Acquire([key(n) for n in numbers], 5.0, wait_s, source))
        for number, block in zip(numbers, got.blocks, strict=False):
            view = self.service._segment.view(block.offset, block.size_bytes)
            assert bytes(view) == content(number, block.size_bytes)
        await self.ask(Release(got.lease_id))
        return len(got.blocks)

    @property
    def stats(self):
        return self.service.pulls.stats

    def damage(self, number: int) -> None:
        block = self.service.node.block_of(key(number))
        self.service._segment.view(block.offset, 1)[0] ^= 0xFF


async def until(holds) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)


@asynccontextmanager
async def stores(tmp_path, *names: str, capacity_bytes: int = 4 << 20, alone: bool = False):
    """Stores of one pool that know each other."""
    async with AsyncExitStack() as stack:
        metadata = MemoryMetadata()
        stack.push_async_callback(metadata.close)
        opened = []
        for name in names:
            run_dir = tmp_path / name
            config = StoreConfig(
                node=name,
                capacity_bytes=capacity_bytes,
                run_dir=str(run_dir),
                transfer=EngineConfig(run_dir=str(run_dir / "engine"), transports=("tcp",)),
            )
            service = StoreService(config, metadata=None if alone else metadata)
            record = await service.start()
            stack.push_async_callback(service.close)
            await metadata.put(STORES_PREFIX + name, msgspec.json.encode(record))
            opened.append(Store(service))
        peers = [] if alone else [store.service.requests.outside._peers for store in opened]
        await until(lambda: all(len(each.nodes) == len(names) - 1 for each in peers))
        yield opened


def run(test):
    """Let a test be a coroutine of stores."""

    def wrapped(tmp_path):
        asyncio.run(asyncio.wait_for(test(tmp_path), 60.0))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@run
async def test_a_reader_gets_the_prefix_that_another_store_has(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(6))
        assert await b.get(*range(8)) == 0, "without a hint nothing is looked for"
        assert await b.get(*range(8), source="a") == 6
        assert await b.get(*range(8)) == 6, "they are here now"
        assert (b.stats.blocks, b.stats.bytes, b.stats.failures) == (6, 6 * SIZE, 0)


@run
async def test_names_go_with_copies(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(0, 1)
        await a.put(2, name=b"two")
        assert await b.get(0, source="a") == 1
        assert (await b.ask(ListNames())).names == []
        assert (await b.ask(Pull([key(1), key(2)], "a", WAIT_S))).held == [True, True]
        page = await b.ask(ListNames())
        assert (page.names, page.keys) == ([b"two"], key(2))
        await b.ask(DropKeys([key(2)]))
        assert (await b.ask(ListNames())).names == []
        assert (await a.ask(ListNames())).names == [b"two"]


@run
async def test_what_is_here_already_is_not_copied_again(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(6))
        await b.put(0, 1, 4)
        assert await b.get(*range(6), source="a") == 6
        assert b.stats.blocks == 3


@run
async def test_the_answer_says_how_much_came_from_elsewhere_and_how_long_that_took(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(6))
        await b.put(0, 1)
        keys = [key(n) for n in range(6)]
        first = await b.ask(Acquire(keys, 1.0, WAIT_S, "a"))
        again = await b.ask(Acquire(keys, 1.0, WAIT_S, "a"))
        assert first.fetched_bytes == 4 * SIZE
        assert 0 < first.fetch_s <= WAIT_S + 60
        assert (len(again.blocks), again.fetched_bytes) == (6, 0)


@run
async def test_readers_that_want_the_same_share_one_copy(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(8))
        found = await asyncio.gather(*(b.get(*range(8), source="a") for _ in range(5)))
        assert found == [8] * 5
        assert b.stats.blocks == 8


@run
async def test_a_long_prefix_survives_its_own_copying_into_a_store_that_was_full(tmp_path):
    async with stores(tmp_path, "a", "b", capacity_bytes=16 * SIZE) as (a, b):
        await b.put(*range(100, 116))
        await a.put(*range(16))
        pulls_module.PIECE_BYTES, old = 2 * SIZE, pulls_module.PIECE_BYTES
        try:
            assert await b.get(*range(16), source="a") == 16
        finally:
            pulls_module.PIECE_BYTES = old


@run
async def test_a_reader_goes_on_with_what_came_within_its_time(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(4))
        assert await b.get(*range(4), source="a", wait_s=0.0) == 0, "only begun"
        assert await b.get(*range(4), source="a") == 4
        assert b.stats.pulls == 1, "the second reader waited for the first one's copy"


@run
async def test_damaged_blocks_end_the_prefix_and_their_owner_drops_them(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(4))
        a.damage(2)
        assert await b.get(*range(4), source="a") == 2
        assert b.stats.bad == 1
        await until(lambda: a.service.node.block_of(key(2)) is None)


@run
async def test_an_unknown_or_dead_source_is_a_miss(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(0)
        assert await b.get(0, source="nobody") == 0
        await a.service.close()
        assert await b.get(0, source="a") == 0
        assert b.stats.failures == 2


@run
async def test_an_order_copies_keys_in_any_order_and_says_what_is_here(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(0, 2, 3)
        await b.put(4)
        keys = [key(n) for n in (3, 1, 0, 4, 2)]
        assert (await b.ask(Pull(keys, "a", WAIT_S))).held == [True, False, True, True, True]
        assert await b.get(2, 3) == 2


@run
async def test_blocks_of_several_sizes_come_in_one_pull(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(0, size=SIZE)
        await a.put(1, size=4096)
        await a.put(2, size=100)
        assert await b.get(0, 1, 2, source="a") == 3


@run
async def test_dropped_keys_are_gone_and_counted(tmp_path):
    async with stores(tmp_path, "a") as (a,):
        await a.put(0, 1)
        assert (await a.ask(DropKeys([key(0), key(7)]))).dropped == 1
        assert await a.get(1, 0) == 1


@run
async def test_orders_of_a_leader_whose_term_is_over_are_refused(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(0)
        await b.put(1)
        assert (await b.ask(Pull([key(0)], "a", WAIT_S, Term("life", 5, "new")))).held == [True]
        for late in (
            DropKeys([key(1)], Term("life", 4, "old")),
            Pull([key(0)], "a", 0.0, Term("life", 4, "old")),
        ):
            with pytest.raises(NotLeader, match="old"):
                await b.ask(late)
        assert await b.get(1) == 1


@run
async def test_what_makes_no_sense_is_refused(tmp_path):
    async with stores(tmp_path, "a") as (a,):
        for request in (
            Pull([key(0)], "a", 1.0),
            Pull([b"short"], "b", 1.0),
            Pull([key(0)], "b", float("nan")),
            DropKeys([b"short"]),
        ):
            with pytest.raises(RequestError):
                await a.ask(request)


@run
async def test_a_store_without_the_others_says_so(tmp_path):
    async with stores(tmp_path, "a", alone=True) as (a,):
        with pytest.raises(RequestError, match="--transfer"):
            await a.ask(Pull([key(0)], "b", 1.0))
        await a.put(0)
        assert await a.get(0, source="b") == 1


@run
async def test_no_room_here_leaves_what_fits_and_nothing_in_writing(tmp_path):
    async with stores(tmp_path, "a", "b", capacity_bytes=8 * SIZE) as (a, b):
        await a.put(*range(8))
        await b.put(*range(100, 105))
        held, _ = b.service.node.hold(b.service._clock(), [key(n) for n in range(100, 105)], 60.0)
        assert await b.get(*range(8), source="a") == 3
        assert b.service.node.stats().writing == 0
        b.service.node.release(b.service._clock(), held)


def test_limits_are_what_the_node_allows():
    assert NodeLimits().lease_s_max >= pulls_module.PULL_S_MAX + pulls_module.LINGER_S


@run
async def test_blocks_are_handed_over_while_nobody_waits(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(4))
        await a.ask(HandOver([key(n) for n in range(4)], "b"))
        await until(lambda: b.service.node.stats().blocks == 4)
        assert await b.get(*range(4)) == 4
        await until(lambda: a.stats.handed_over == 4)


@run
async def test_a_reader_waits_for_what_is_being_handed_over(tmp_path):
    async with stores(tmp_path, "a", "b") as (a, b):
        await a.put(*range(8))
        await a.ask(HandOver([key(n) for n in range(8)], "b"))
        assert await b.get(*range(8), source="a") == 8
        assert b.stats.blocks == 8, "each was copied once"


@run
async def test_a_hand_over_to_nobody_is_counted_and_harms_nothing(tmp_path):
    async with stores(tmp_path, "a") as (a,):
        await a.put(0)
        await a.ask(HandOver([key(0)], "gone"))
        assert a.stats.handovers_failed == 1
        assert await a.get(0) == 1
