"""Dummy clients: light ones beside the host's real client, in one process here (real ones: integration)."""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mooncake.dropin.client.dummy as dummy_module
from kvstore.client.local import LocalStore
from kvstore.client.remote import DistantStore
from mooncake.core.errors import PeerError
from mooncake.dropin.client.command import ClientOptions, RealClient
from mooncake.dropin.store.types import (
    INTERNAL,
    INVALID_PARAMS,
    OBJECT_HAS_LEASE,
    OBJECT_NOT_FOUND,
    RPC_FAIL,
)
from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from .conftest import PATIENCE_S, MasterThread, client

POOL_BYTES = 16 << 20
BIG = 3 << 20
"""More than comes with an answer: it goes through shared memory."""


def until(condition) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def start_real(master: MasterThread, **flags) -> RealClient:
    given = {"port": 0, "global_segment_size": "16MB", "master_server_address": master.address}
    real = RealClient(ClientOptions(**{**given, **flags}))
    real.start()
    return real


@pytest.fixture(scope="module")
def far(master: MasterThread) -> Iterator[MooncakeDistributedStore]:
    """A client with a segment that nobody can attach to: as if it were on another host."""
    store = client(master, 32 << 20)
    (record,) = store._calls.pool.records
    for path in (Path(record.fd_path), Path(record.door)):
        path.rename(f"{path}.hidden")
    yield store
    store.close()


@pytest.fixture(scope="module")
def real(master: MasterThread, far: MooncakeDistributedStore) -> Iterator[RealClient]:
    real = start_real(master)
    yield real
    real.close()


@pytest.fixture
def make_dummy(real: RealClient) -> Iterator:
    stores = []

    def make(address: str = "") -> MooncakeDistributedStore:
        stores.append(MooncakeDistributedStore())
        assert stores[-1].setup_dummy(POOL_BYTES, POOL_BYTES, address or f"127.0.0.1:{real.port}") == 0
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def dummy(make_dummy, far: MooncakeDistributedStore) -> MooncakeDistributedStore:
    store = make_dummy()
    until(lambda: len(store._calls.pool.nodes) == 2)
    store.remove_all(force=True)
    return store


def on(store: MooncakeDistributedStore) -> ReplicateConfig:
    config = ReplicateConfig()
    config.preferred_segment = store.get_hostname()
    return config


def test_a_dummy_maps_its_hosts_store_and_reaches_others_through_the_real_client(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore, real: RealClient
) -> None:
    kinds = {store.record.transfer: type(store) for store in dummy._calls.pool._members.stores.values()}
    assert sorted(kinds.values(), key=str) == sorted([LocalStore, DistantStore], key=str)
    assert dummy.health_check() == 0
    assert dummy.get_hostname() == ""


@pytest.mark.parametrize("size", [100, BIG])
def test_what_a_dummy_puts_others_get_and_the_other_way_round(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore, size: int
) -> None:
    here, there, theirs = (os.urandom(size) for _ in range(3))
    assert dummy.put("here", here) == 0
    assert dummy.put("there", there, on(far)) == 0
    assert far.put("theirs", theirs, on(far)) == 0
    for store in (dummy, far):
        assert store.get_batch(["here", "there", "theirs", "none"]) == [here, there, theirs, b""]
        assert store.batch_is_exist(["here", "there", "theirs", "none"]) == [1, 1, 1, 0]
        assert store.get_size("there") == size
    assert [desc.get_memory_descriptor() for desc in dummy.get_replica_desc("there")]


@pytest.mark.parametrize("light", [True, False])
def test_what_another_host_has_just_stored_is_there(
    master: MasterThread, dummy: MooncakeDistributedStore, far: MooncakeDistributedStore, light: bool
) -> None:
    reader = dummy if light else client(master, 0)
    try:
        until(lambda: len(reader._calls.pool.nodes) == 2)
        until(lambda: reader._calls.pool.directories)
        for number in range(20):  # a directory alone knows one in five in time
            assert far.put(f"k{number}", b"x" * 100, on(far)) == 0
            assert reader.get(f"k{number}") == b"x" * 100
            assert far.put(f"e{number}", b"x" * 100, on(far)) == 0
            assert reader.is_exist(f"e{number}") == 1
            assert reader.put(f"e{number}", b"y" * 100) == 0
            assert reader.get(f"e{number}") == b"x" * 100
    finally:
        if not light:
            reader.close()


def test_removing_reaches_other_hosts_and_keeps_what_was_just_read(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore
) -> None:
    assert far.put("k", b"x" * 100, on(far)) == 0
    assert dummy.get("k") == b"x" * 100
    assert dummy.remove("k") == OBJECT_HAS_LEASE
    assert dummy.remove("k", force=True) == 0
    assert far.is_exist("k") == 0
    assert dummy.remove("k") == OBJECT_NOT_FOUND
    assert far.put_batch(["p1", "p2", "q"], [b"1", b"2", b"3"], on(far)) == 0
    assert dummy.remove_by_regex("^p") == 2
    assert dummy.remove_all(force=True) == 1


def test_memory_of_the_pool_takes_and_gives_objects_of_other_hosts_without_a_stage(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore
) -> None:
    source, target = dummy.alloc_from_mem_pool(BIG), dummy.alloc_from_mem_pool(BIG)
    assert source
    assert target
    data = os.urandom(BIG)
    ctypes.memmove(source, data, BIG)
    assert dummy.register_buffer(source, BIG) == 0
    assert dummy.put_from("k", source, BIG, on(far)) == 0
    assert far.get("k") == data
    assert dummy.get_into("k", target, BIG) == BIG
    assert ctypes.string_at(target, BIG) == data
    assert dummy._calls.pool._members._stage._buffer is None
    assert dummy.unregister_buffer(source) == 0


def test_there_is_no_pool_of_no_bytes_and_none_without_a_real_client(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore
) -> None:
    assert dummy.alloc_from_mem_pool(0) == 0
    assert dummy.alloc_from_mem_pool(-1) == 0
    assert far.alloc_from_mem_pool(100) == 0
    assert MooncakeDistributedStore().alloc_from_mem_pool(100) == 0


def test_memory_of_the_caller_is_used_registered_or_not(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore, memory
) -> None:
    array, address = memory(BIG)
    into, place = memory(BIG)
    assert dummy.put_from("a", address, BIG, on(far)) == 0
    assert dummy.register_buffer(address, BIG) == 0
    assert dummy.register_buffer(address, BIG) == INVALID_PARAMS
    assert dummy.put_from("b", address, BIG, on(far)) == 0
    assert dummy.batch_get_into(["a", "b", "none"], [place] * 3, [BIG] * 3) == [BIG, BIG, OBJECT_NOT_FOUND]
    assert (into == array).all()
    assert dummy.unregister_buffer(address) == 0
    assert dummy.unregister_buffer(address) == INVALID_PARAMS


def test_sessions_and_parts_work_as_in_any_client(
    dummy: MooncakeDistributedStore, far: MooncakeDistributedStore, memory
) -> None:
    array, address = memory(1000)
    assert dummy.batch_put_session_start(["s"], [1000], on(far)) == [0]
    assert dummy.batch_put_from_multi_buffer_ranges(["s"], [[address]], [[1000]], [[0]]) == [1000]
    assert dummy.batch_put_session_end(["s"]) == [0]
    assert far.get("s") == array.tobytes()
    assert dummy.put_parts("p", b"ab", b"cd") == 0
    assert dummy.upsert("p", b"ef") == 0
    assert dummy.get("p") == b"ef"


def test_a_dummy_gives_no_memory(dummy: MooncakeDistributedStore) -> None:
    assert dummy.allocate_and_mount_segment(POOL_BYTES)["ret"] == INTERNAL
    assert dummy.unmount_segment(["none"]) == INTERNAL


def test_closing_leaves_nothing_in_the_real_client(make_dummy, real: RealClient) -> None:
    buffers = len(real.started.engine.buffers)
    stores = [make_dummy(), make_dummy()]
    assert real.relay.dummies == 2
    assert all(store.alloc_from_mem_pool(1 << 20) for store in stores)
    assert len(real.started.engine.buffers) == buffers + 2
    for store in stores:
        assert store.close() == 0
    until(lambda: not real.relay.dummies and len(real.started.engine.buffers) == buffers)
    assert stores[0].put("k", b"x") == INVALID_PARAMS


def test_a_call_that_is_under_way_at_the_end_still_has_its_memory(make_dummy) -> None:
    store = make_dummy()
    address = store.alloc_from_mem_pool(BIG)
    ctypes.memset(address, 7, BIG)
    calls = store._calls
    assert store.close() == 0
    assert bytes(calls.memory(address, BIG)) == b"\7" * BIG


def test_setting_up_twice_changes_nothing(make_dummy, real: RealClient) -> None:
    store = make_dummy()
    calls = store._calls
    assert store.setup_dummy(POOL_BYTES, POOL_BYTES, f"127.0.0.1:{real.port}") == 0
    assert store._calls is calls


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1:x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    assert MooncakeDistributedStore().setup_dummy(POOL_BYTES, POOL_BYTES, address) == INVALID_PARAMS


def test_without_a_real_client_there_is_no_dummy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dummy_module, "SETUP_S", 0.0)
    assert MooncakeDistributedStore().setup_dummy(POOL_BYTES, POOL_BYTES, "127.0.0.1:1") == INTERNAL


def test_while_the_real_client_is_away_every_call_is_an_error_and_then_it_works_again(memory) -> None:
    with contextlib.ExitStack() as stack:
        master = MasterThread()
        stack.callback(master.stop)
        real = start_real(master)
        port = real.port
        store = MooncakeDistributedStore()
        stack.callback(store.close)
        assert store.setup_dummy(POOL_BYTES, POOL_BYTES, f"127.0.0.1:{port}") == 0
        pool = store.alloc_from_mem_pool(BIG)
        assert store.put("k", b"x" * 100) == 0
        real.close()
        until(lambda: store.health_check() == 2)
        _, address = memory(100)
        assert store.put("new", b"x") == RPC_FAIL
        assert store.is_exist("k") == RPC_FAIL
        assert store.batch_is_exist(["k", "none"]) == [RPC_FAIL] * 2
        assert store.get_size("none") == RPC_FAIL
        assert store.get_into("none", address, 100) == RPC_FAIL
        assert store.remove("none") == RPC_FAIL
        assert store.remove_all(force=True) == RPC_FAIL
        assert store.put_from("new", pool, 100) == RPC_FAIL
        assert store.alloc_from_mem_pool(100) == 0
        with pytest.raises(PeerError):
            store.get("none")
        stack.callback(start_real(master, port=port).close)
        until(lambda: store.health_check() == 0)
        until(lambda: store.put("again", b"y" * 100) == 0)
        assert store.get("again") == b"y" * 100
        assert store.get_into("again", pool, BIG) == 100
