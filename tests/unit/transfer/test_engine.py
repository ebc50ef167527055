"""The engine: bytes arrive by every transport, owners decide, errors name what to do."""

import asyncio
import mmap
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    RequestError,
)
from transfer.engine import TransferEngine
from transfer.model import Buffer, Opcode
from transfer.owner import NOTES_MAX

TRANSPORTS = ("shm", "tcp")
KIB = 1024


def bytes_of(buffer: Buffer) -> np.ndarray:
    return np.frombuffer(buffer.view, np.uint8)


def fill(buffer: Buffer, seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, buffer.size_bytes, dtype=np.uint8)
    bytes_of(buffer)[:] = data
    return data.tobytes()


# ---------------------------------------------------------------- moving bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [1, 4095, 64 * KIB, 1024 * KIB + 3, 9 << 20])
def test_a_write_and_a_read_move_exactly_the_bytes_named(pair, transport, size):
    here, there = pair
    mine, theirs = here.allocate(2 * size + 8), there.allocate(size + 8)
    data = fill(mine, 1)
    before = fill(theirs, 2)
    here.transfer(Opcode.WRITE, there.name, mine.address + 3, theirs.address + 5, size, transport=transport)
    assert bytes(theirs.view) == before[:5] + data[3 : 3 + size] + before[5 + size :]
    here.transfer(
        Opcode.READ, there.name, mine.address + size + 4, theirs.address + 5, size, transport=transport
    )
    assert bytes(mine.view) == data[: size + 4] + data[3 : 3 + size] + data[2 * size + 4 :]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), op=st.sampled_from(list(Opcode)), transport=st.sampled_from(TRANSPORTS))
def test_any_scattered_batch_moves_what_a_copy_would(pair, data, op, transport):
    here, there = pair
    if not here.buffers:
        for engine in pair:
            for _ in range(2):
                engine.allocate(60_000)
    pages = data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
    order = data.draw(st.permutations(range(len(pages))))
    local, remote, at = [], [0] * len(pages), [0, 0]
    for i, size in enumerate(pages):  # on one side in order, on the other shuffled, over two buffers each
        side = i % 2
        if at[side] + size > 60_000:
            return
        local.append(here.buffers[side].address + at[side])
        at[side] += size
    at = [0, 0]
    for i in order:
        side = (i // 2) % 2
        if at[side] + pages[i] > 60_000:
            return
        remote[i] = there.buffers[side].address + at[side]
        at[side] += pages[i]
    for seed, engine in enumerate(pair):
        for buffer in engine.buffers:
            fill(buffer, seed + buffer.buffer_id)
    source = [bytes(_slice(there, a, n)) if op is Opcode.READ else bytes(_slice(here, b, n))
              for a, b, n in zip(remote, local, pages, strict=True)]  # fmt: skip
    here.transfer(op, there.name, local, remote, pages, transport=transport)
    target = [bytes(_slice(here, b, n)) if op is Opcode.READ else bytes(_slice(there, a, n))
              for a, b, n in zip(remote, local, pages, strict=True)]  # fmt: skip
    assert target == source


def _slice(engine: TransferEngine, address: int, size: int) -> memoryview:
    buffer = engine.buffer_at(address)
    assert buffer is not None
    return buffer.part(address, size)


class Tensor:
    """What the engine asks of a torch tensor (importing torch takes 10 s)."""

    def __init__(self, array: np.ndarray) -> None:
        self.device = type("device", (), {"type": "cpu"})()
        self.nbytes = array.nbytes
        self._array = array

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def is_contiguous(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["numpy", "mmap", "bytearray", "memoryview", "address", "tensor"])
def test_memory_of_any_kind_can_be_registered(pair, kind):
    here, there = pair
    theirs = there.allocate(4096)
    data = fill(theirs, 3)
    array = np.zeros(4096, np.uint8)
    memory: object = array
    if kind == "mmap":
        memory = mmap.mmap(-1, 4096)
    elif kind == "bytearray":
        memory = bytearray(4096)
    elif kind == "memoryview":
        memory = memoryview(array)
    elif kind == "tensor":
        memory = Tensor(array)
    mine = here.register(int(array.ctypes.data), 4096) if kind == "address" else here.register(memory)
    assert mine.size_bytes == 4096
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096)
    assert bytes(array if kind in ("address", "tensor") else memory) == data  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (b"read only", "writable"),
        (np.zeros((8, 8), np.uint8)[:, ::2], "contiguous"),
        (object(), "no memory"),
        (4096, "size_bytes"),
    ],
)
def test_what_is_no_writable_contiguous_memory_is_refused(make_engine, memory, words):
    with pytest.raises(RequestError, match=words):
        make_engine().register(memory)


def test_an_address_that_is_not_ours_is_refused_not_crashed_on(make_engine):
    engine = make_engine()
    private = mmap.mmap(-1, 8192, prot=mmap.PROT_READ)
    readonly = np.frombuffer(private, np.uint8).ctypes.data
    for address in (4096, 1 << 46, int(readonly)):
        with pytest.raises(RequestError, match="not writable memory"):
            engine.register(address, 4096)


def test_the_best_transport_is_taken_and_counted(pair):
    here, there = pair
    mine, shared = here.allocate(4096), there.allocate(4096)
    private = there.register(np.zeros(4096, np.uint8))
    here.transfer(Opcode.READ, there.name, mine.address, shared.address, 4096)
    here.transfer(Opcode.READ, there.name, mine.address, private.address, 100)
    here.transfer(Opcode.WRITE, there.name, mine.address, shared.address, 10, transport="tcp")
    registry = CollectorRegistry()
    registry.register(here.collector())
    text = generate_latest(registry).decode()
    for op, size, transport in (("read", 4096, "shm"), ("read", 100, "tcp"), ("write", 10, "tcp")):
        labels = f'{{link="{there.name}",op="{op}",transport="{transport}"}}'
        assert f"mooncake_transfer_bytes_total{labels} {size}.0" in text


def test_an_engine_reaches_itself_by_its_own_name(make_engine):
    engine = make_engine()
    one, other = engine.allocate(4096), engine.register(np.zeros(4096, np.uint8))
    data = fill(one, 4)
    engine.transfer(Opcode.WRITE, engine.name, one.address, other.address, 4096)
    assert bytes(other.view) == data


def test_a_same_host_reader_looks_without_a_copy(pair):
    here, there = pair
    theirs = there.allocate(8192)
    view = here.view(there.name, theirs.address + 10, 100)
    bytes_of(theirs)[10:13] = [1, 2, 3]
    assert bytes(view[:3]) == b"\1\2\3"
    assert view.readonly
    private = there.register(np.zeros(4096, np.uint8))
    with pytest.raises(RequestError, match="not shared memory"):
        here.view(there.name, private.address, 1)


def test_buffers_registered_later_are_found(pair):
    here, there = pair
    mine, first = here.allocate(4096), there.allocate(4096)
    here.transfer(Opcode.READ, there.name, mine.address, first.address, 1)
    second = there.allocate(4096)
    here.transfer(Opcode.READ, there.name, mine.address, second.address, 1)


def test_nothing_to_move_is_done(pair):
    here, there = pair
    batch = here.submit(Opcode.READ, there.name, [], [], [])
    assert batch.done()
    here.transfer(Opcode.READ, there.name, [1], [1], [0])


async def test_batches_can_be_polled_waited_for_and_awaited(pair):
    here, there = pair
    mine, theirs = here.allocate(1 << 20), there.allocate(1 << 20)
    data = fill(theirs, 5)
    batch = here.submit(Opcode.READ, there.name, [mine.address], [theirs.address], [1 << 20], transport="tcp")
    assert await asyncio.wait_for(batch.finished(), 30)
    assert batch.done()
    assert batch.wait(0)
    batch.check()
    assert bytes(mine.view) == data


# ---------------------------------------------------------------- who may touch what


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranges_that_are_not_registered_are_refused_and_nothing_moves(pair, transport):
    here, there = pair
    mine, theirs = here.allocate(4096), there.allocate(4096)
    fill(mine, 6)
    before = fill(theirs, 7)
    for local, remote, size, words in (
        (mine.address, theirs.address + 1, 4096, "no buffer that holds"),
        (mine.address, theirs.end, 1, "no buffer that holds"),
        (mine.address + 1, theirs.address, 4096, "not registered here"),
        (12345, theirs.address, 1, "not registered here"),
        (mine.address, theirs.address, -1, "transfer 0"),
    ):
        with pytest.raises(RequestError, match=words):
            here.transfer(Opcode.WRITE, there.name, local, remote, size, transport=transport)
    with pytest.raises(RequestError, match="2 lengths"):
        here.submit(Opcode.WRITE, there.name, [mine.address], [theirs.address], [1, 2])
    assert bytes(theirs.view) == before


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_the_key_nothing_moves_and_with_it_all_does(make_engine, transport):
    here, there = make_engine(), make_engine(open_buffers=False)
    mine, theirs = here.allocate(4096), there.allocate(4096)
    data = fill(theirs, 8)
    peer = here.peer(there.name)
    with pytest.raises(PeerGone, match="no transport"):
        here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, transport=transport)
    peer.learn(theirs.buffer_id, b"guessed key 16 b")
    with pytest.raises(RequestError):
        here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, transport=transport)
    assert not any(mine.view)
    here.forget(there.name)
    here.peer(there.name).learn(**there.grant(theirs))
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, transport=transport)
    assert bytes(mine.view) == data


def test_a_refused_entry_costs_itself_and_nothing_else(make_engine):
    here, there = make_engine(transports=("tcp",)), make_engine()
    mine = here.allocate(300)
    theirs = [there.allocate(4096) for _ in range(3)]
    data = [fill(buffer, i) for i, buffer in enumerate(theirs)]
    peer = here.peer(there.name)
    peer.learn(theirs[1].buffer_id, bytes(16))
    for op in (Opcode.READ, Opcode.WRITE):
        batch = here.submit(
            op, there.name, [mine.address + 100 * i for i in range(3)], [b.address for b in theirs], [100] * 3
        )
        assert batch.wait(30)
        assert list(batch.errors) == [1]
        assert isinstance(batch.errors[1], RequestError)
        assert bytes(mine.view[:300]) == data[0][:100] + bytes(100) + data[2][:100]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_unregistered_memory_is_out_of_reach_at_once_also_for_who_has_used_it(pair, transport):
    here, there = pair
    mine, theirs = here.allocate(4096), there.allocate(4096)
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, transport=transport)
    memory = bytes_of(theirs)
    there.unregister(theirs)
    fill(mine, 9)
    with pytest.raises(MooncakeError):
        here.transfer(Opcode.WRITE, there.name, mine.address, theirs.address, 4096, transport=transport)
    assert not memory.any()
    with pytest.raises(RequestError, match="no buffer is registered"):
        there.unregister(theirs)


def test_taking_memory_back_waits_for_copies_that_are_under_way(pair):
    here, there = pair
    mine, theirs = here.allocate(4096), there.allocate(4096)
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 1, transport="shm")
    peer = here.peer(there.name)
    link = here._shm._link(peer)
    info = peer.find(theirs.address, 1)
    mapping = link.mapping(info)
    assert link.take(mapping)  # a copy that does not end
    with pytest.raises(PeerTimeout, match="has not let go"):
        there.unregister(theirs, 0.2)
    assert not link.take(mapping)
    with pytest.raises(PeerGone, match="taken the memory back"):
        link.mapping(info)
    link.give(mapping)
    there.unregister(theirs, 10.0)


def test_local_memory_in_use_is_not_let_go(pair, monkeypatch):
    monkeypatch.setattr("transfer.owner.LAST_RESORT_S", 0.0)
    here, _ = pair
    mine = here.allocate(4096)
    here._registry.take(mine)
    with pytest.raises(PeerTimeout, match="under way"):
        here.unregister(mine, 0.0)
    here._registry.give(mine)
    here.unregister(mine, 1.0)


# ---------------------------------------------------------------- names, secrets, settings


def test_a_peer_that_is_not_there_is_named_at_once(make_engine):
    engine, gone = make_engine(), make_engine()
    name = gone.name
    gone.close()
    with pytest.raises(PeerGone, match=name):
        engine.peer(name)
    for bad in ("", "x", "host:", "host:99999", "host:-1", "host:²"):
        with pytest.raises(ConfigError, match="host:port"):
            engine.peer(bad)


def test_a_restarted_peer_is_another_one(make_engine):
    here, there = make_engine(), make_engine()
    mine, theirs = here.allocate(4096), there.allocate(4096)
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 1)
    there.close()
    again = make_engine(port=there.port)
    fresh = again.allocate(4096)
    data = fill(fresh, 10)
    if not fresh.address <= theirs.address < fresh.address + 4096:  # the system may give the same place again
        with pytest.raises(MooncakeError):
            here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 1)
    here.transfer(Opcode.READ, again.name, mine.address, fresh.address, 4096)
    assert bytes(mine.view) == data


def test_an_engine_with_another_secret_gets_nothing(make_engine):
    owner = make_engine(secret=b"0123456789abcdef")
    for secret in (b"", b"fedcba9876543210"):
        with pytest.raises(ConfigError, match="secret"):
            make_engine(secret=secret).peer(owner.name)
    assert make_engine(secret=b"0123456789abcdef").probe(owner.name) >= 0


def test_an_initiator_does_not_trust_an_owner_without_the_secret(make_engine):
    with pytest.raises(ConfigError, match="secret"):
        make_engine(secret=b"0123456789abcdef").peer(make_engine().name)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"host": "0.0.0.0"}, "set a secret"),
        ({"host": "10.1.2.3"}, "set a secret"),
        ({"secret": b"short"}, "at least 16"),
        ({"port": 70_000}, "port 70000"),
        ({"transports": ("carrier pigeon",)}, "carrier pigeon"),
        ({"tcp_connections": 0}, "tcp_connections 0"),
        ({"slice_bytes": 1}, "slice_bytes"),
    ],
)
def test_bad_settings_are_named(make_engine, setting, words):
    with pytest.raises(ConfigError, match=words):
        make_engine(**setting)


def test_an_address_in_use_is_named(make_engine):
    with pytest.raises(ConfigError, match="cannot listen"):
        make_engine(port=make_engine().port)


# ---------------------------------------------------------------- bounds, endings


def test_notifications_arrive_in_order_and_are_bounded(pair):
    here, there = pair
    here.notify(there.name, "a", "1")
    here.notify(there.name, "b", "2")
    assert there.notifications() == [("a", "1"), ("b", "2")]
    assert there.notifications() == []
    there._notes.extend([("", "")] * NOTES_MAX)
    with pytest.raises(CapacityError, match="wait to be fetched"):
        here.notify(there.name, "c", "3")
    with pytest.raises(RequestError, match="notification"):
        here.notify(there.name, "d", "x" * (1 << 21))


def test_work_under_way_is_bounded(make_engine):
    here, there = make_engine(in_flight_bytes_max=4096), make_engine()
    mine, theirs = here.allocate(8192), there.allocate(8192)
    here._in_flight_bytes, held = 4000, object()
    here._in_flight.add(held)
    with pytest.raises(CapacityError, match="under way"):
        here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 97)
    assert mine.uses == 0
    here._in_flight.clear()
    here._in_flight_bytes = 0
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 8192)  # alone, anything may run


def test_misuse_is_an_error_never_a_crash(make_engine, tmp_path):
    engine = TransferEngine()
    for call in (
        lambda: engine.peer("127.0.0.1:1"),
        lambda: engine.transfer(Opcode.READ, "127.0.0.1:1", 1, 1, 1),
        lambda: engine.allocate(4096),
    ):
        with pytest.raises(RequestError, match="start"):
            call()
    engine.close()
    closed = make_engine()
    with pytest.raises(RequestError, match="starts once"):
        closed.start()
    closed.close()
    closed.close()
    with pytest.raises(RequestError, match="closed"):
        closed.peer("127.0.0.1:1")
    with pytest.raises(RequestError, match="closed"):
        closed.allocate(4096)


def test_close_leaves_no_thread_and_no_socket(make_engine):
    before = set(threading.enumerate())
    here, there = make_engine(), make_engine()
    mine, theirs = here.allocate(4096), there.allocate(4096)
    for transport in TRANSPORTS:
        here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 1, transport=transport)
    path = here._unix_path
    assert path.is_socket()
    here.close()
    there.close()
    left = [t for t in threading.enumerate() if t not in before]
    for thread in left:
        thread.join(5)
    assert [t.name for t in left if t.is_alive()] == []
    assert not path.exists()
