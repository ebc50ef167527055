"""An object takes the place of another one in one step: no reader finds neither, or a mixture."""

import asyncio
import itertools
import threading

import pytest

from kvstore.client.model import Outcome
from kvstore.node.contract import PRESENT
from kvstore.ssd.model import SsdConfig
from kvstore.store.service import StoreService
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Commit, DropKeys, Reserve
from tests.unit.kvstore.test_kvstore_node import SIZE, SUM, key, keys, make, put
from tests.unit.kvstore.test_kvstore_tiering import SIZE as BLOCK
from tests.unit.kvstore.test_kvstore_tiering import World, config, content, world
from tests.unit.kvstore.test_kvstore_tiering import key as block_key
from tests.unit.kvstore.test_pool import PATIENCE_S, distant, open_pool, outcomes, start_node

__all__ = ["open_pool", "start_node", "world"]  # fixtures
OTHER = b"t" * 16


# ---------------------------------------------------------------- in a node


def replace(node, number: int, now_s: float = 0.0) -> int:
    reserved = node.reserve(now_s, "w", keys(number), SIZE, replace=True)
    assert node.commit(now_s, reserved.tickets, [OTHER]).done == [True]
    return reserved.offsets[0]


def test_what_is_being_replaced_is_read_until_the_commit():
    node = make()
    (old,) = put(node, 1)
    reserved = node.reserve(0.0, "w", keys(1), SIZE, replace=True)
    assert node.block_of(key(1)).offset == old
    node.commit(0.0, reserved.tickets, [OTHER])
    assert (node.block_of(key(1)).offset, node.block_of(key(1)).checksum) == (reserved.offsets[0], OTHER)
    assert node.stats().used_bytes == SIZE


def test_who_has_leased_the_old_bytes_reads_them_until_it_lets_go():
    node = make(blocks=2)
    put(node, 1)
    lease = node.acquire(0.0, keys(1), 10.0)
    new = replace(node, 1)
    assert lease.blocks[0].offset != new
    assert node.stats().used_bytes == 2 * SIZE  # so nobody else is given that memory
    assert node.acquire(0.0, keys(1), 10.0).blocks[0].offset == new
    node.release(0.0, lease.lease_id)
    assert node.stats().used_bytes == SIZE


def test_a_replacement_is_no_change_of_what_the_node_has():
    node = make()
    put(node, 1)
    node.drain_events()
    replace(node, 1)
    assert node.drain_events().stored == node.drain_events().removed == []
    assert node.stats().blocks == 1


def test_a_replacement_that_is_given_up_leaves_the_old_bytes():
    node = make()
    put(node, 1)
    reserved = node.reserve(0.0, "w", keys(1), SIZE, replace=True)
    node.abandon(0.0, "w", reserved.tickets)
    assert node.block_of(key(1)).checksum == SUM


def test_one_writes_at_a_time():
    node = make()
    put(node, 1)
    node.reserve(0.0, "w", keys(1), SIZE, replace=True)
    assert node.reserve(0.0, "v", keys(1), SIZE, replace=True).offsets == [PRESENT]


def test_replacing_what_is_not_there_puts_it():
    node = make()
    replace(node, 1)
    assert node.drain_events().stored == keys(1)


# ---------------------------------------------------------------- in the pool

ROUNDS = 60


@pytest.mark.parametrize("how", ["here", "elsewhere"])
@pytest.mark.parametrize("size", [100, 100_000])
def test_a_reader_always_finds_one_of_the_two(start_node, open_pool, how, size):
    records = [start_node(name).record for name in ("n1", "n2")]
    if how == "elsewhere":
        records = [distant(record) for record in records]
    writer, reader = open_pool(*records), open_pool(*records)
    values = [bytes([number]) * size for number in range(ROUNDS)]
    writer.put(["x"], [values[0]], preferred=["n2"], deadline_s=PATIENCE_S)
    done, found = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            found.extend(reader.get(["x"], deadline_s=PATIENCE_S))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for value in values:
            (result,) = writer.put(["x"], [value], replace=True, deadline_s=PATIENCE_S)
            assert (result.outcome, result.nodes) == (Outcome.DONE, ("n2",))
            assert writer.get(["x"], deadline_s=PATIENCE_S) == [value]
    finally:
        done.set()
        thread.join()
    assert found
    assert set(found) <= set(values)


def test_on_another_store_the_new_one_comes_before_the_old_ones_go(start_node, open_pool):
    pool = open_pool(*(start_node(name).record for name in ("n1", "n2", "n3")))
    pool.put(["x"], [b"old"], replicas=2, preferred=["n1", "n2"], deadline_s=PATIENCE_S)
    (result,) = pool.put(["x"], [b"new"], replace=True, preferred=["n3"], deadline_s=PATIENCE_S)
    assert (result.outcome, result.nodes) == (Outcome.DONE, ("n3",))
    assert [place.node for place in pool.places(["x"])[0]] == ["n3"]
    assert pool.get(["x"], deadline_s=PATIENCE_S) == [b"new"]


def test_what_finds_no_room_leaves_the_old_bytes(start_node, open_pool):
    pool = open_pool(start_node("n1", capacity_bytes=1 << 20).record)
    pool.put(["x"], [b"old"], deadline_s=PATIENCE_S)
    (result,) = pool.put(["x"], [bytes(2 << 20)], replace=True, deadline_s=PATIENCE_S)
    assert not result.ok
    assert pool.get(["x"], deadline_s=PATIENCE_S) == [b"old"]


def test_two_that_replace_at_once_leave_one_of_theirs_whole(start_node, open_pool):
    record = start_node("n1").record
    pools = [open_pool(record) for _ in range(2)]
    values = [bytes([number]) * 200_000 for number in range(2)]
    results = []

    def write(at: int) -> None:
        for _ in range(10):
            results.extend(pools[at].put(["x"], [values[at]], replace=True, deadline_s=PATIENCE_S))

    threads = [threading.Thread(target=write, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes(results) == [Outcome.DONE] * 20
    assert pools[0].get(["x"], deadline_s=PATIENCE_S)[0] in values


# ---------------------------------------------------------------- with an SSD below


async def put_other(store: World, number: int) -> bytes:
    """Replace the block `number` by other bytes."""
    name, data = block_key(number), content(number + 1000)
    got = await store.service.requests.handle(Reserve("w", [name], BLOCK, replace=True))
    store.service._segment.view(got.offsets[0], BLOCK)[:] = data
    checksum = block_checksum(name, data)
    assert (await store.service.requests.handle(Commit(got.tickets, [checksum]))).done == [True]
    return checksum


async def test_the_ssd_forgets_what_was_replaced_and_gets_the_new(world):
    await world.put(1)
    await world.copied(1)
    checksum = await put_other(world, 1)
    header = world.service.tiering.tier.find(block_key(1))
    assert header is None or header.checksum == checksum
    await world.copied(1)
    assert world.service.tiering.tier.find(block_key(1)).checksum == checksum


async def test_after_a_restart_the_new_one_is_found(tmp_path):
    service = StoreService(config(tmp_path))
    await service.start()
    store = World(service)
    await store.put(1)
    await store.copied(1)
    checksum = await put_other(store, 1)
    await store.copied(1)
    await service.close()
    service = StoreService(config(tmp_path))
    await service.start()
    assert service.tiering.tier.find(block_key(1)).checksum == checksum
    await service.close()


def test_a_put_of_what_only_the_ssd_has_leaves_it(tmp_path, start_node, open_pool):
    ssd = SsdConfig(
        node="n1",
        path=str(tmp_path / "ssd"),
        capacity_bytes=16 << 20,
        segment_bytes=1 << 20,
        object_bytes=BLOCK,
    )
    store = start_node("n1", ssd=ssd, ssd_age_s=0.0, capacity_bytes=8 * BLOCK)
    pool = open_pool(store.record)
    names = [f"{number}" for number in range(8)]
    values = [content(number) for number in range(8)]
    assert outcomes(pool.put(names, values, deadline_s=PATIENCE_S)) == [Outcome.DONE] * 8
    while pool.stats("n1").ssd_blocks < 8:
        pass
    fresh = itertools.count(100)
    while any(place.in_memory for (place,) in pool.places(names)):  # others push them out
        number = next(fresh)
        pool.put([f"{number}"], [content(number)], deadline_s=PATIENCE_S)
    assert all(result.ok for result in pool.put(names, [bytes(BLOCK)] * 8, deadline_s=PATIENCE_S))
    assert [found(pool, name) for name in names] == values
    (replaced,) = pool.put(names[:1], [b"new"], replace=True, deadline_s=PATIENCE_S)
    assert replaced.outcome is Outcome.DONE
    assert found(pool, names[0]) == b"new"


def found(pool, name: str) -> bytes | None:
    """Read it, as often as a busy disk asks for."""
    values = (pool.get([name], deadline_s=PATIENCE_S)[0] for _ in range(100))
    return next((value for value in values if value is not None), None)


async def test_what_is_dropped_while_it_is_copied_is_not_on_the_ssd_afterwards(world, monkeypatch):
    tiering = world.service.tiering
    begun, go_on = threading.Event(), threading.Event()
    write = tiering._write

    def slow(puts):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return write(puts)

    monkeypatch.setattr(tiering, "_write", slow)
    await world.put(1)
    assert await asyncio.to_thread(begun.wait, PATIENCE_S)
    await world.service.requests.handle(DropKeys([block_key(1)]))
    go_on.set()
    await world.copied()
    assert block_key(1) not in tiering.tier
