"""Memory and SSD as one pool: what was evicted or outlived its processes is served again, verified."""

import asyncio
import os
import signal
import threading
from hashlib import sha256

import msgspec
import numpy as np
import pytest

from kvstore.engine.client import PoolClient
from kvstore.limits import NodeLimits
from kvstore.ssd.model import SsdConfig
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Acquire, Commit, DropKeys, ListNames, Reserve

SIZE = 64 << 10
MEMORY = 8 * SIZE


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def content(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


def config(tmp_path, **settings) -> StoreConfig:
    ssd = SsdConfig(
        node="n1",
        path=str(tmp_path / "ssd"),
        capacity_bytes=settings.pop("ssd_bytes", 16 << 20),
        segment_bytes=1 << 20,
        object_bytes=SIZE,
    )
    run_dir = str(tmp_path / "run")
    return StoreConfig(node="n1", capacity_bytes=MEMORY, run_dir=run_dir, ssd=ssd, ssd_age_s=0.0, **settings)


class World:
    """A store in this process, asked directly."""

    def __init__(self, service: StoreService) -> None:
        self.service = service

    async def put(self, *numbers: int, name: bytes = b"") -> None:
        for number in numbers:
            got = await self.service.requests.handle(Reserve("w", [key(number)], SIZE))
            assert got.tickets[0], f"no room for {number}"
            self.service._segment.view(got.offsets[0], SIZE)[:] = content(number)
            checksum = block_checksum(key(number), content(number))
            commit = Commit(got.tickets, [checksum], [name] if name else [])
            assert (await self.service.requests.handle(commit)).done == [True]

    async def get(self, *numbers: int) -> int:
        """Return how many of the prefix are served, all of them right."""
        got = await self.service.requests.handle(Acquire([key(n) for n in numbers], 5.0, 1.0))
        for number, block in zip(numbers, got.blocks, strict=False):
            assert bytes(self.service._segment.view(block.offset, SIZE)) == content(number)
        self.service.node.release(self.service._clock(), got.lease_id)
        return len(got.blocks)

    async def copied(self, *numbers: int) -> None:
        """Wait until the SSD has these and no copy holds a block in place."""
        tier = self.service.tiering.tier
        async with asyncio.timeout(20):
            while not all(key(n) in tier for n in numbers) or self.service.node.stats().leases:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@pytest.fixture
async def world(tmp_path):
    service = StoreService(config(tmp_path))
    await service.start()
    yield World(service)
    await service.close()


async def test_what_memory_evicted_comes_back_from_the_ssd(world):
    await world.put(*range(8))
    await world.copied(*range(8))
    await world.put(*range(8, 14))
    await world.copied(*range(8, 14))
    assert world.service.node.shelf.evictions == 6
    for number in range(14):
        assert await world.get(number) == 1
    assert world.service.tiering.tier.stats().hits > 0


async def test_a_prefix_that_lies_in_both_is_served_whole_without_evicting_itself(world):
    await world.put(*range(6))
    await world.copied(*range(6))
    await world.put(*range(100, 105))  # pushes some of the first out
    await world.copied(*range(100, 105))
    assert await world.get(*range(6)) == 6
    assert await world.get(*range(6), 999) == 6


async def test_to_the_outside_a_block_is_there_as_long_as_either_tier_has_it(world):
    published: set[bytes] = set()

    def watch(events) -> None:
        for one in events.stored:
            published.add(one)
        for one in events.removed:
            published.discard(one)

    world.service.requests.events.publish = watch
    await world.put(*range(8))
    await world.copied(*range(8))
    await world.put(*range(8, 12))
    world.service.requests.flush()
    assert published == {key(number) for number in range(12)}
    assert set(world.service.tiering.keys()) == published
    await world.copied(*range(8, 12))
    world.service.tiering.tier.remove([key(number) for number in range(12)])
    world.service.requests.flush()
    assert published == set(world.service.node.complete_keys())


async def test_a_store_without_a_free_lease_copies_later_and_lives(tmp_path):
    service = StoreService(config(tmp_path), NodeLimits(leases_max=1))
    await service.start()
    world = World(service)
    try:
        await world.put(1, 2)
        held = await service.requests.handle(Acquire([key(1)], 5.0))
        async with asyncio.timeout(20):
            while service.tiering.behind.given_up == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not service._beat.done()
        service.node.release(service._clock(), held.lease_id)
        await world.put(3)
        await world.copied(3)
    finally:
        await service.close()


async def test_wrong_bytes_on_the_ssd_are_no_hit(world, tmp_path):
    await world.put(*range(8))
    await world.copied(*range(8))
    await world.put(*range(8, 16))
    await world.copied(*range(8, 16))  # no copy is under way: everything can be evicted
    (file,) = [path for path in (tmp_path / "ssd").iterdir() if path.stat().st_size > 1 << 20]
    raw = bytearray(file.read_bytes())
    for number in range(8):
        at = raw.find(content(number)[:64])
        assert at >= 0
        raw[at + 100] ^= 1
    with file.open("r+b") as out:
        out.write(raw)
    os.sync()
    assert [await world.get(number) for number in range(8)] == [0] * 8
    assert world.service.tiering.tier.stats().corrupt == 8


async def test_kv_is_served_after_a_restart(tmp_path):
    first = StoreService(config(tmp_path))
    await first.start()
    await World(first).put(*range(6))
    await first.close()  # copies what only memory had
    again = StoreService(config(tmp_path))
    await again.start()
    try:
        assert set(again.tiering.keys()) == {key(number) for number in range(6)}
        assert await World(again).get(*range(6)) == 6
    finally:
        await again.close()


async def test_a_store_that_is_to_go_saves_everything_at_once_and_serves_on(tmp_path):
    service = StoreService(msgspec.structs.replace(config(tmp_path), ssd_age_s=3600.0))
    await service.start()
    try:
        world = World(service)
        await world.put(*range(6))
        await service.save(lambda: True)
        assert service.unsaved == 6, "it had to stop at once"
        await service.save(lambda: False)
        assert service.unsaved == 0
        assert all(key(number) in service.tiering.tier for number in range(6))
        assert await world.get(*range(6)) == 6
    finally:
        await service.close()


class Slow:
    """A disk whose writes wait, for each block, until it may be written."""

    def __init__(self, service: StoreService, monkeypatch: pytest.MonkeyPatch) -> None:
        tier = service.tiering.tier
        self._write = tier.put_many
        self._may = {key(number): threading.Event() for number in range(10)}
        self.begun: list[bytes] = []
        monkeypatch.setattr(tier, "put_many", self._put_many)

    def _put_many(self, puts):
        for put in puts:
            self.begun.append(put.key)
            assert self._may[put.key].wait(20)
        return self._write(puts)

    async def until_begun(self, number: int) -> None:
        async with asyncio.timeout(20):
            while key(number) not in self.begun:  # noqa: ASYNC110 - other thread
                await asyncio.sleep(0.005)

    def go_on(self, *numbers: int) -> None:
        for number in numbers:
            self._may[key(number)].set()


@pytest.fixture
async def slow(tmp_path, monkeypatch):
    service = StoreService(msgspec.structs.replace(config(tmp_path), ssd_age_s=3600.0))
    await service.start()
    one = Slow(service, monkeypatch)
    yield service, one
    one.go_on(*range(10))
    await service.close()


async def test_what_is_being_written_counts_as_unsaved_and_is_waited_for_whoever_began_it(slow):
    service, disk = slow
    behind = service.tiering.behind
    await World(service).put(1)
    behind.limits = msgspec.structs.replace(behind.limits, age_s=0.0)
    await disk.until_begun(1)  # by the store's own beat
    stop = asyncio.Event()
    saving = asyncio.create_task(service.save(stop.is_set))
    await asyncio.wait((saving,), timeout=0.3)
    assert not saving.done()
    assert service.unsaved == 1
    stop.set()
    await asyncio.wait_for(saving, 20)
    disk.go_on(1)
    await asyncio.wait_for(service.save(lambda: False), 20)
    assert service.unsaved == 0
    assert key(1) in service.tiering.tier


async def test_a_save_is_done_when_all_is_written_though_the_beat_takes_batches_meanwhile(slow):
    service, disk = slow
    behind = service.tiering.behind
    await World(service).put(1, 2)
    behind.limits = msgspec.structs.replace(behind.limits, batch_bytes=SIZE)
    saving = asyncio.create_task(service.save(lambda: False))
    await disk.until_begun(1)
    behind.limits = msgspec.structs.replace(behind.limits, age_s=0.0)  # the second is due for the beat, too
    service.tiering.tick()
    await asyncio.sleep(0)
    disk.go_on(1)
    await disk.until_begun(2)
    await asyncio.wait((saving,), timeout=0.3)
    assert not saving.done()
    assert service.unsaved == 1
    disk.go_on(2)
    await asyncio.wait_for(saving, 20)
    assert service.unsaved == 0
    assert disk.begun == [key(1), key(2)]
    assert all(key(number) in service.tiering.tier for number in (1, 2))


async def names_of(service: StoreService) -> list[bytes]:
    return (await service.requests.handle(ListNames())).names


async def test_names_outlive_a_restart_and_go_with_their_objects(tmp_path):
    first = StoreService(config(tmp_path))
    await first.start()
    world = World(first)
    await world.put(1, name=b"one")
    await world.put(2, name=b"two")
    await world.put(3)
    await world.copied(1, 2, 3)
    await world.put(4, name=b"four")
    await first.close()
    again = StoreService(config(tmp_path))
    await again.start()
    try:
        assert sorted(await names_of(again)) == [b"four", b"one", b"two"]
        assert await World(again).get(2) == 1  # in memory again
        assert sorted(await names_of(again)) == [b"four", b"one", b"two"]
        await again.requests.handle(DropKeys([key(2), key(4)]))
        assert await names_of(again) == [b"one"]
    finally:
        await again.close()


@pytest.mark.chaos
def test_kv_is_served_after_every_process_of_the_host_was_killed(tmp_path, start_store):
    """Through the real client: put, kill -9 the store, start another on the same disk, get."""
    settings = config(tmp_path)
    fields = {name: getattr(settings, name) for name in ("ssd", "ssd_age_s", "capacity_bytes")}
    store = start_store(**fields)
    client = PoolClient(store.record, "w")
    keys = [key(number) for number in range(4)]
    slots = client.reserve(keys, SIZE)
    for number, slot in enumerate(slots):
        slot.view[:] = content(number)
    sums = [block_checksum(key(number), content(number)) for number in range(4)]
    assert client.commit([slot.ticket for slot in slots], sums) == [True] * 4
    deadline = 200
    while _file_has(tmp_path / "ssd", content(3)[:64]) is False and deadline:
        deadline -= 1
        signal.sigtimedwait([], 0.05)
    client.close()
    store.kill()
    again = start_store(**fields)
    reader = PoolClient(again.record, "r")
    lease = reader.acquire(keys, 5.0, wait_s=1.0)
    assert len(lease) == 4
    assert all(lease.verify(index) for index in range(4))
    assert [bytes(view) for view in lease.views] == [content(number) for number in range(4)]
    reader.close()


def _file_has(folder, needle: bytes) -> bool:
    return any(needle in path.read_bytes() for path in folder.iterdir() if path.stat().st_size > 1 << 20)
