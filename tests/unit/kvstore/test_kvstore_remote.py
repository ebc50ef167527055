"""A store of another host: what was put is what is got, in any scatter, and nothing unverified."""

import asyncio
import os
import signal
from hashlib import sha256

import msgspec
import numpy as np
import pytest

from kvstore.engine.remote import Found, RemoteStore
from kvstore.store.config import StoreConfig
from mooncake.core.errors import MooncakeError, PeerError, RequestError
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
from transfer.model import Opcode

BLOCK = 96 << 10
PAGE = 32 << 10


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


@pytest.fixture(params=["shm", "tcp"])
def world(request, tmp_path, start_store):
    """(record of a store in another process, our engine, its memory)"""
    store = start_store(transfer=EngineConfig(run_dir=str(tmp_path / "e1")))
    engine = TransferEngine(EngineConfig(run_dir=str(tmp_path / "e2"), transports=(request.param,))).start()
    yield store.record, engine, engine.allocate(4 << 20)
    engine.close()


def fill(buffer, seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, buffer.size_bytes, dtype=np.uint8).tobytes()
    buffer.view[:] = data
    return data


def pages(buffer, block: int, order=(0, 1, 2)) -> list[tuple[int, int]]:
    """Block number `block` of the buffer as pages that lie far apart, in some order."""
    return [(buffer.address + (block + 8 * page) * PAGE, PAGE) for page in order]


def content(data: bytes, buffer, ranges) -> bytes:
    return b"".join(data[a - buffer.address : a - buffer.address + n] for a, n in ranges)


def test_blocks_go_there_and_come_back_whatever_their_pages(world):
    record, engine, buffer = world
    data = fill(buffer, 1)
    store = RemoteStore(engine, record, "w1")
    keys, sources = [key(i) for i in range(4)], [pages(buffer, i) for i in range(4)]
    assert store.put(keys, sources) == [True] * 4
    expected = [content(data, buffer, source) for source in sources]
    buffer.view[:] = bytes(buffer.size_bytes)
    targets = [pages(buffer, i + 4, (2, 0, 1)) for i in range(4)]
    assert store.get([*keys, key(99)], [*targets, pages(buffer, 3)]) == Found(4)
    assert [content(bytes(buffer.view), buffer, target) for target in targets] == expected


def test_the_first_block_under_a_key_stays(world):
    record, engine, buffer = world
    data = fill(buffer, 2)
    one, other = RemoteStore(engine, record, "w1"), RemoteStore(engine, record, "w2")
    assert one.put([key(1)], [pages(buffer, 0)]) == [True]
    assert other.put([key(1), key(2)], [pages(buffer, 1), pages(buffer, 2)]) == [True, True]
    target = pages(buffer, 4)
    assert one.get([key(1)], [target]) == Found(1)
    assert content(bytes(buffer.view), buffer, target) == content(data, buffer, pages(buffer, 0))


def test_what_is_not_there_is_not_found_and_not_an_error(world):
    record, engine, buffer = world
    store = RemoteStore(engine, record, "w1")
    assert store.get([key(1)], [pages(buffer, 0)]) == Found(0)
    assert store.put([], []) == []


def test_damaged_bytes_are_never_returned_and_the_store_drops_them(world):
    record, engine, buffer = world
    fill(buffer, 3)
    store = RemoteStore(engine, record, "w1")
    keys = [key(i) for i in range(3)]
    assert store.put(keys, [pages(buffer, i) for i in range(3)]) == [True] * 3
    # a stray write into the second block: the last thing put lies behind the first
    peer = engine.peer(record.transfer)
    segment = peer.info.buffers[0]
    engine.transfer(Opcode.WRITE, record.transfer, buffer.address, segment.address + BLOCK + 100, 8)
    targets = [pages(buffer, i + 4) for i in range(3)]
    assert store.get(keys, targets) == Found(1, 1)
    assert store.get(keys, targets) == Found(1)  # the store has looked for itself and dropped it


def test_a_full_store_says_so_block_by_block(world):
    record, engine, buffer = world
    store = RemoteStore(engine, record, "w1")
    size = 3 << 20
    sources = [[(buffer.address, size)], [(buffer.address, size)], [(buffer.address, size)]]
    assert store.put([key(i) for i in range(3)], sources) == [True, True, False]


@pytest.mark.parametrize(
    ("sources", "words"),
    [([[(1, 4096)], [(1, 8192)]], "sources of"), ([[(1, 4096)]], "2 keys, 1 sources")],
)
def test_sources_of_different_sizes_are_refused(world, sources, words):
    record, engine, _ = world
    with pytest.raises(RequestError, match=words):
        RemoteStore(engine, record, "w1").put([key(1), key(2)], sources)


def test_a_target_of_the_wrong_size_is_refused_and_the_lease_given_back(world):
    record, engine, buffer = world
    store = RemoteStore(engine, record, "w1")
    assert store.put([key(1)], [pages(buffer, 0)]) == [True]
    with pytest.raises(RequestError, match="does not fit"):
        store.get([key(1)], [[(buffer.address, PAGE)]])
    assert store.get([key(1)], [pages(buffer, 4)]) == Found(1)


def test_memory_that_is_not_registered_is_refused_and_nothing_stays_reserved(world):
    record, engine, buffer = world
    store = RemoteStore(engine, record, "w1")
    with pytest.raises(RequestError, match="not registered"):
        store.put([key(1)], [[(12345, BLOCK)]])
    assert store.get([key(1)], [pages(buffer, 0)]) == Found(0)


def test_a_dead_store_is_an_error_within_the_deadline_never_a_wrong_byte(world):
    record, engine, buffer = world
    store = RemoteStore(engine, record, "w1")
    assert store.put([key(1)], [pages(buffer, 0)]) == [True]
    os.kill(record.pid, signal.SIGKILL)

    def read_until_noticed() -> None:
        for _ in range(50):  # until the kernel has taken the socket down
            store.get([key(1)], [pages(buffer, 4)], deadline_s=2.0)

    with pytest.raises(PeerError):
        read_until_noticed()
    with pytest.raises(PeerError):
        store.put([key(2)], [pages(buffer, 1)], deadline_s=2.0)


def test_the_record_of_an_earlier_start_is_recognised(world):
    record, engine, buffer = world
    assert RemoteStore(engine, record, "w1").put([key(1)], [pages(buffer, 0)]) == [True]
    old = RemoteStore(engine, msgspec.structs.replace(record, epoch="before"), "w1")
    with pytest.raises(PeerError, match="restarted"):
        old.get([key(1)], [pages(buffer, 4)])
    with pytest.raises(PeerError, match="restarted"):
        old.put([key(2)], [pages(buffer, 0)])


def test_a_store_without_a_transfer_address_is_refused_by_name(world):
    record, engine, _ = world
    with pytest.raises(RequestError, match="n1 is not open"):
        RemoteStore(engine, msgspec.structs.replace(record, transfer=""), "w1")


def test_nonsense_to_the_service_is_an_error_and_harms_nobody(world):
    record, engine, buffer = world
    for body in (b"", b"\x91\xa3foo", b"\xff" * 100):
        with pytest.raises(MooncakeError):
            engine.ask(record.transfer, "store", body)
    with pytest.raises(RequestError, match="serves no 'shop'"):
        engine.ask(record.transfer, "shop", b"")
    assert RemoteStore(engine, record, "w1").put([key(1)], [pages(buffer, 0)]) == [True]


async def test_the_service_closes_with_its_engine(tmp_path):
    from kvstore.store.service import StoreService

    config = StoreConfig(
        node="n1",
        capacity_bytes=1 << 20,
        run_dir=str(tmp_path),
        transfer=EngineConfig(run_dir=str(tmp_path / "e")),
    )
    service = StoreService(config)
    record = await service.start()
    with TransferEngine(EngineConfig(run_dir=str(tmp_path / "f"))) as engine:
        await asyncio.to_thread(engine.probe, record.transfer)
        await service.close()
        with pytest.raises(PeerError):
            await asyncio.to_thread(engine.probe, record.transfer, 1.0)
