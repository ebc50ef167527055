"""`mooncake.store` does what upstream's wheel (0.3.13.post1) was measured to do, call by call.

Where a test's name says that upstream differs, docs/store.md says why we do.
"""

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from kvstore.client.access import reserve_request
from kvstore.client.model import Hints
from kvstore.client.object_names import object_key
from mooncake.core.errors import MooncakeError, PeerError, RequestError
from mooncake.core.messages import STORES_PREFIX, Abandon, Reserved
from mooncake.core.metadata_open import open_metadata
from mooncake.store import (
    BufferHandle,
    MooncakeDistributedStore,
    ObjectDataType,
    ReplicaStatus,
    ReplicateConfig,
    SoftPinAction,
)
from tests.unit.dropin.conftest import MasterThread, client
from tests.unit.dropin.master_http import until

# ---------------------------------------------------------------- bytes


def test_a_put_is_read_back_and_a_second_one_answers_0_and_changes_nothing(store) -> None:
    assert store.put("a", b"hello") == 0
    assert store.put("a", b"other") == 0
    assert store.get("a") == b"hello"


def test_what_is_missing_is_empty_zero_none_or_minus_704(store, memory) -> None:
    _, address = memory(64)
    assert store.get("zz") == b""
    assert store.is_exist("zz") == 0
    assert store.get_size("zz") == -704
    assert store.remove("zz") == -704
    assert store.get_into("zz", address, 64) == -704
    assert store.get_buffer("zz") is None
    assert store.get_batch(["zz", "zy"]) == [b"", b""]
    assert store.batch_get_into(["zz"], [address], [64]) == [-704]
    assert store.get_replica_desc("zz") == []
    assert store.batch_get_replica_desc(["zz"]) == {}


def test_nothing_is_no_object_and_nameless_is_no_name(store) -> None:
    assert store.put("e", b"") == -600
    assert store.put("", b"x") == -600
    assert store.get("") == b""
    assert store.is_exist("") == 0
    assert store.upsert("e", b"") == -600


@pytest.mark.parametrize(
    "value", [bytearray(b"abc"), memoryview(b"abc"), np.frombuffer(b"abc", np.uint8), np.array([9])]
)
def test_any_buffer_is_a_value_and_all_its_bytes_count(store, value) -> None:
    assert store.put("v", value) == 0
    assert store.get("v") == bytes(memoryview(value).cast("B"))


@pytest.mark.parametrize(
    "call", [lambda s: s.put("k", "text"), lambda s: s.put(1, b"x"), lambda s: s.get(b"k")]
)
def test_wrong_types_are_type_errors(store, call) -> None:
    with pytest.raises(TypeError):
        call(store)


def test_parts_are_one_object_and_no_parts_are_none(store) -> None:
    assert store.put_parts("p", b"ab", b"", b"cd") == 0
    assert store.get("p") == b"abcd"
    assert store.put_parts("none") == 0
    assert store.is_exist("none") == 0


def test_a_batch_of_puts_answers_once(store) -> None:
    store.put("c", b"old")
    assert store.put_batch(["a", "b", "c"], [b"1", b"2", b"3"]) == 0
    assert store.get_batch(["a", "zz", "b", "c"]) == [b"1", b"", b"2", b"old"]
    assert store.put_batch([], []) == 0
    assert store.put_batch(["x", "y"], [b"1"]) == -600
    assert store.put_batch(["x", "y"], [b"1", b""]) == -600
    assert store.batch_is_exist(["x", "y", "a"]) == [0, 0, 1]


def test_an_upsert_takes_the_place_of_what_is_there(store, memory) -> None:
    data, address = memory(10)
    store.put("a", b"old")
    assert store.upsert("a", b"new value") == 0
    assert store.get("a") == b"new value"
    assert store.upsert("fresh", b"f") == 0
    assert store.get("fresh") == b"f"
    assert store.upsert_batch(["a", "fresh"], [b"x", b"y"]) == 0
    assert store.get_batch(["a", "fresh"]) == [b"x", b"y"]
    assert store.upsert_parts("a", b"p", b"q") == 0
    assert store.upsert_from("fresh", address, 5) == 0
    assert store.get_batch(["a", "fresh"]) == [b"pq", data[:5].tobytes()]
    assert store.batch_upsert_from(["a", "b"], [address, address], [3, 4]) == [0, 0]
    assert store.get("a") == data[:3].tobytes()


def test_a_buffer_handle_is_memory_with_size_and_address(store) -> None:
    store.put("a", b"hello")
    handle = store.get_buffer("a")
    assert isinstance(handle, BufferHandle)
    assert (handle.size(), len(handle), bytes(handle)) == (5, 5, b"hello")
    assert not memoryview(handle).readonly
    assert handle.ptr() == np.frombuffer(handle, np.uint8).ctypes.data
    assert [one and bytes(one) for one in store.batch_get_buffer(["a", "zz"])] == [b"hello", None]


def test_a_put_of_what_another_is_just_writing_answers_0_as_upstream_s(store) -> None:
    (access,) = [one for one in store._need().pool._members.stores.values() if one.near][:1]
    request = reserve_request("another", [object_key("a")], 100, Hints())
    link, room = access._client.call(request, Reserved, 30.0)
    assert room.offsets[0] >= 0
    config = config_of(preferred_segment=store.get_hostname())
    assert store.put("a", b"1", config) == 0
    assert store.is_exist("a") == 0
    access._client.tell(link, Abandon("another", room.tickets))


# ---------------------------------------------------------------- memory of the caller


def test_buffers_are_registered_once_and_may_not_overlap(store, memory) -> None:
    data, address = memory(1 << 16)
    assert store.register_buffer(address, data.nbytes) == 0
    assert store.register_buffer(address, data.nbytes) == -600
    assert store.register_buffer(address + 100, 1000) == -600
    assert store.register_buffer(address, 0) == -600
    assert store.unregister_buffer(address) == 0
    assert store.unregister_buffer(address) == -600


@pytest.mark.parametrize("registered", [True, False])
def test_memory_is_stored_and_read_into_registered_or_not(store, memory, registered) -> None:
    data, address = memory(1 << 17)
    expected = data[:100_000].tobytes()
    if registered:
        assert store.register_buffer(address, data.nbytes) == 0
    assert store.put_from("a", address, 100_000) == 0
    data[:] = 0
    assert store.get_into("a", address + 7, 100_001) == 100_000
    assert data[7:100_007].tobytes() == expected
    if registered:
        assert store.unregister_buffer(address) == 0


def test_a_target_that_is_too_small_is_minus_600_and_the_rest_is_read(store, memory) -> None:
    data, address = memory(100)
    assert store.batch_put_from(["a", "b"], [address, address + 10], [10, 20]) == [0, 0]
    assert store.get_into("a", address, 9) == -600
    target, there = memory(100)
    assert store.batch_get_into(["a", "zz", "b", "a"], [there, there, there + 10, there], [9, 9, 20, 10]) == [
        -600, -704, 20, 10,
    ]  # fmt: skip
    assert target[:30].tobytes() == data[:30].tobytes()


def test_batches_whose_lists_differ_in_length_are_minus_600_each(store, memory) -> None:
    _, address = memory(100)
    assert store.batch_put_from(["a", "b"], [address], [10]) == [-600, -600]
    assert store.batch_get_into(["a", "b"], [address, address], [10]) == [-600, -600]
    assert store.batch_put_from_multi_buffers(["a", "b"], [[address]], [[10]]) == [-600, -600]
    assert store.batch_put_from_multi_buffers(["a"], [[address, address]], [[10]]) == [-600]
    assert store.batch_put_from([], [], []) == []


def test_objects_are_gathered_from_and_scattered_to_many_buffers(store, memory) -> None:
    data, address = memory(100)
    pieces, sizes = [[address, address + 50], [address + 20]], [[10, 5], [7]]
    assert store.batch_put_from_multi_buffers(["a", "b"], pieces, sizes) == [0, 0]
    assert store.get("a") == data[:10].tobytes() + data[50:55].tobytes()
    target, there = memory(100)
    got = store.batch_get_into_multi_buffers(
        ["a", "zz", "b"], [[there, there + 30], [there], [there + 60]], [[12, 3], [9], [7]]
    )
    assert got == [15, -704, 7]
    assert target[:12].tobytes() + target[30:33].tobytes() == store.get("a")
    assert store.batch_get_into_multi_buffers(["a"], [[there]], [[10]]) == [-600]


def test_metadata_comes_before_its_data(store, memory) -> None:
    data, address = memory(10)
    head, there = memory(4)
    assert store.put_from_with_metadata("a", address, there, 10, 4) == 0
    assert store.get("a") == head.tobytes() + data.tobytes()


@pytest.mark.parametrize("address", [0, 8, 1 << 46])
def test_a_wrong_address_is_a_code_and_no_crash_as_upstream_s(store, address) -> None:
    store.put("a", b"1")
    assert store.put_from("b", address, 100) == -600
    assert store.get_into("a", address, 100) == -600
    assert store.register_buffer(address, 100) == -600
    assert store.is_exist("b") == 0


# ---------------------------------------------------------------- looking and removing


def test_what_was_read_a_moment_ago_is_minus_706_unless_forced(store) -> None:
    reads = {
        "get": store.get, "exist": store.is_exist, "size": store.get_size, "desc": store.get_replica_desc,
        "many": lambda key: store.batch_is_exist([key]),
    }  # fmt: skip
    for name, read in reads.items():
        store.put(name, b"1")
        read(name)
        assert store.remove(name) == -706
        assert store.get(name) == b"1"
        assert store.remove(name, force=True) == 0
        assert store.remove(name, True) == -704


def test_what_another_client_has_just_read_stays_unless_forced(store, join) -> None:
    other = join(0)
    while store.put("a", b"1") == 0:
        while other.get("a") != b"1":  # it learns of the segment in a moment
            pass
        if (code := store.remove("a")) == -706:
            break
        assert code == 0  # its read is told within 50 ms
    assert store.remove_all() == 0
    assert store.batch_replica_clear(["a"]) == []
    assert (other.get("a"), store.remove("a", force=True), other.get("a")) == (b"1", 0, b"")


def test_what_was_only_written_is_removed(store) -> None:
    store.put("a", b"1")
    assert store.remove("a") == 0
    store.put_batch(["a", "b"], [b"1", b"2"])
    store.get("b")
    assert store.batch_remove(["a", "zz", "b"]) == [0, -704, -706]
    assert store.batch_remove(["b", "a"], True) == [0, -704]


def test_a_lease_ends_by_itself() -> None:
    master = MasterThread(default_kv_lease_ttl=1)
    store = client(master)
    try:
        store.put("a", b"1")
        store.get("a")
        until(lambda: store.remove("a") != -706)
        assert store.is_exist("a") == 0
    finally:
        store.close()
        master.stop()


def test_names_are_removed_by_regular_expression(store) -> None:
    store.put_batch(["rx0", "rx1", "rx2", "abcdef"], [b"1"] * 4)
    assert store.remove_by_regex("^rx[01]$") == 2
    assert store.batch_is_exist(["rx0", "rx1", "rx2"]) == [0, 0, 1]
    assert store.remove_by_regex("^rx") == 0
    assert store.remove_by_regex("^rx", True) == 1
    assert store.remove_by_regex("cd") == 1
    assert store.remove_by_regex("[") == -600


def test_remove_all_counts_and_spares_what_was_just_read(store) -> None:
    store.put_batch(["a", "b", "c"], [b"1"] * 3)
    store.get("b")
    assert store.remove_all() == 2
    assert store.remove_all(force=True) == 1
    assert store.remove_all() == 0


def test_copies_are_described(store) -> None:
    store.put("a", b"hello")
    (copy,) = store.get_replica_desc("a")
    assert copy.status is ReplicaStatus.COMPLETE
    assert (copy.is_memory_replica(), copy.is_disk_replica(), copy.is_local_disk_replica()) == (
        True,
        False,
        False,
    )
    where = copy.get_memory_descriptor().buffer_descriptor
    assert where.size == 5
    assert where.buffer_address > 0
    assert where.transport_endpoint.startswith("127.0.0.1:")
    with pytest.raises(MooncakeError, match="Expected DiskDescriptor"):
        copy.get_disk_descriptor()
    assert [len(copies) for copies in store.batch_get_replica_desc(["a", "zz"]).values()] == [1]


# ---------------------------------------------------------------- how objects are kept


def test_the_fields_of_a_config_and_what_they_are_at_first() -> None:
    config = ReplicateConfig()
    assert {name: getattr(config, name) for name in sorted(dir(config)) if not name.startswith("_")} == {
        "data_type": ObjectDataType.UNKNOWN, "dfs_replica_num": 0, "group_ids": None, "nof_replica_num": 0,
        "prefer_alloc_in_same_node": False, "preferred_nof_segments": [], "preferred_segment": "",
        "preferred_segments": [], "replica_num": 1, "soft_pin_action": SoftPinAction.PRESERVE,
        "soft_pin_ttl_ms": None, "with_hard_pin": False, "with_soft_pin": False,
    }  # fmt: skip
    assert str(config) == (
        "ReplicateConfig: { replica_num: 1, nof_replica_num: 0, dfs_replica_num: 0, "
        "soft_pin_action: PRESERVE, soft_pin_ttl_ms: default, with_hard_pin: 0, "
        "preferred_segments: [], preferred_nof_segments: [], "
        "prefer_alloc_in_same_node: 0, data_type: UNKNOWN }"
    )
    config.with_soft_pin = True
    assert config.soft_pin_action is SoftPinAction.ENABLE


def config_of(**fields) -> ReplicateConfig:
    config = ReplicateConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def test_more_copies_than_segments_are_as_many_as_there_are(store) -> None:
    assert store.put("a", b"x", config_of(replica_num=2)) == 0
    assert store.put("b", b"x", config=config_of(replica_num=99)) == 0
    assert store.put("c", b"x", config_of(replica_num=0)) == -600


def test_copies_go_to_different_segments_and_to_the_preferred_one_first(store, join) -> None:
    other = join()
    until(lambda: len(store._need().pool.nodes) >= 2)
    assert store.put("a", b"x", config_of(replica_num=2)) == 0
    assert len(store.get_replica_desc("a")) == 2
    assert store.put("b", b"x", config_of(preferred_segment=other.get_hostname())) == 0
    (copy,) = store.get_replica_desc("b")
    (there,) = [
        each for each in store._need().pool.records if str(other.get_hostname().split(":")[1]) in each.node
    ]
    assert copy.get_memory_descriptor().buffer_descriptor.transport_endpoint == there.transfer
    assert store.put("c", b"x", config_of(preferred_segment="nowhere:1")) == 0


def test_pins_and_groups_are_taken(store) -> None:
    assert store.put("a", b"x", config_of(with_hard_pin=True)) == 0
    assert store.remove("a") == 0
    assert store.put("b", b"x", config_of(soft_pin_action=SoftPinAction.ENABLE, soft_pin_ttl_ms=5000)) == 0
    assert store.put("c", b"x", config_of(group_ids=["g"])) == 0
    assert store.put_batch(["d", "e"], [b"1", b"2"], config_of(group_ids=["g"])) == -600
    assert store.put_batch(["d", "e"], [b"1", b"2"], config_of(group_ids=["g", "h"])) == 0
    assert store.get_batch(["d", "e"]) == [b"1", b"2"]


def test_a_hard_pin_outlives_pressure_and_the_rest_makes_room_where_upstream_s_puts_fail(join) -> None:
    store = join("8MB", tenant_id="pressed")
    elsewhere = config_of(preferred_segment=store.get_hostname())
    pinned = config_of(preferred_segment=store.get_hostname(), with_hard_pin=True)
    assert store.put("pinned", b"p" * (1 << 20), pinned) == 0
    codes = [store.put(f"fill{n}", bytes([n]) * (1 << 20), elsewhere) for n in range(20)]
    assert codes == [0] * 20
    assert store.get("pinned") == b"p" * (1 << 20)
    assert store.get("fill19") == bytes([19]) * (1 << 20)


def test_tenants_have_names_of_their_own(store, join) -> None:
    other = join(0, tenant_id="t2")
    assert store.put("a", b"1") == 0
    assert other.get("a") == b""
    assert other.put("a", b"2") == 0
    assert other.remove_all(force=True) == 1
    assert store.get("a") == b"1"


# ---------------------------------------------------------------- setup, close, death


@pytest.mark.parametrize(
    "settings",
    [
        {"local_hostname": ""}, {"metadata_server": ""}, {"global_segment_size": "50%"},
        {"global_segment_size": -1}, {"protocol": "xyz"}, {"master_server_addr": "redis://x"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_minus_600(master, settings) -> None:
    store = MooncakeDistributedStore()
    config = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "master_server_addr": master.address,
    }
    assert store.setup({**config, **settings}) == -600
    assert store.setup({name: value for name, value in config.items() if name == "local_hostname"}) == -600
    assert store.setup({}) == -600


def test_settings_by_position_by_name_and_in_a_dict_mean_the_same(master) -> None:
    store = MooncakeDistributedStore()
    host = "127.0.0.1"
    assert store.setup(host, "P2PHANDSHAKE", 8 << 20, 1 << 20, "tcp", "", master.address) == 0
    first = store.get_hostname()
    config = {
        "local_hostname": host, "metadata_server": "P2PHANDSHAKE", "global_segment_size": "8MB",
        "local_buffer_size": "1 mb", "protocol": "tcp", "rdma_devices": "",
        "master_server_addr": master.address, "nonsense": "1",
    }  # fmt: skip
    assert store.setup(config) == 0
    assert store.setup(config=config) == 0
    assert store.get_hostname() == first
    assert store.close() == 0


def test_nobody_at_the_master_s_address_is_minus_1() -> None:
    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 1 << 20, "tcp", "", "127.0.0.1:1") == -1


def test_a_client_without_a_segment_uses_those_of_others(store, join) -> None:
    other = join(0)
    assert other.put("a", b"1") == 0
    assert store.get("a") == b"1"
    host, port = other.get_hostname().split(":")
    assert host == "127.0.0.1"
    assert 0 < int(port) < 65536
    assert other.health_check() == 0


def test_without_any_segment_a_put_is_minus_200_and_a_get_a_miss() -> None:
    master = MasterThread()
    store = client(master, 0)
    try:
        assert store.put("a", b"1") == -200
        assert (store.get("a"), store.is_exist("a"), store.get_size("a"), store.remove("a")) == (
            b"",
            0,
            -704,
            -704,
        )
        master.stop()
        assert (store.put("a", b"1"), store.is_exist("a"), store.batch_is_exist(["a"])) == (
            -900,
            -900,
            [-900],
        )
        assert (store.get_size("a"), store.remove("a"), store.remove_all(), store.remove_by_regex("x")) == (
            -900,
        ) * 4
        with pytest.raises(PeerError):  # upstream: b"", as if there were nothing
            store.get("a")
        assert store.health_check() == 2
    finally:
        store.close()
        master.stop()


def test_what_live_segments_hold_is_used_while_the_master_is_dead_where_upstream_fails() -> None:
    master = MasterThread()
    store, other = client(master), client(master, 0)
    try:
        assert store.put("a", b"1") == 0
        master.stop()
        assert store.health_check() == 2
        assert (other.get("a"), other.put("b", b"2"), store.get("b")) == (b"1", 0, b"2")
        assert (store.is_exist("zz"), store.get("zz"), store.remove("b", True)) == (0, b"", 0)
    finally:
        store.close()
        other.close()
        master.stop()


CODES = {
    "put": ("k", b"v"), "put_batch": (["k"], [b"v"]), "put_parts": ("k", b"v"), "upsert": ("k", b"v"),
    "upsert_batch": (["k"], [b"v"]), "upsert_parts": ("k", b"v"), "put_from": ("k", 1, 1),
    "upsert_from": ("k", 1, 1), "put_from_with_metadata": ("k", 1, 1, 1, 1), "get_into": ("k", 1, 1),
    "register_buffer": (1, 1), "unregister_buffer": (1,), "is_exist": ("k",), "get_size": ("k",),
    "remove": ("k",), "remove_by_regex": ("k",), "remove_all": (),
}  # fmt: skip
LISTS = {
    "batch_put_from": (["k"], [1], [1]), "batch_upsert_from": (["k"], [1], [1]),
    "batch_put_from_multi_buffers": (["k"], [[1]], [[1]]), "batch_get_into": (["k"], [1], [1]),
    "batch_get_into_multi_buffers": (["k"], [[1]], [[1]]), "batch_is_exist": (["k"],),
    "batch_remove": (["k"],),
}  # fmt: skip
RAISING = {
    "get": ("k",), "get_batch": (["k"],), "get_buffer": ("k",), "batch_get_buffer": (["k"],),
    "get_replica_desc": ("k",), "batch_get_replica_desc": (["k"],),
}  # fmt: skip


@pytest.mark.parametrize("closed", [False, True])
def test_before_setup_and_after_close_calls_are_errors_where_upstream_s_process_ends(join, closed) -> None:
    store = join(0) if closed else MooncakeDistributedStore()
    if closed:
        assert store.close() == 0
    assert {name: getattr(store, name)(*args) for name, args in CODES.items()} == dict.fromkeys(CODES, -600)
    assert {name: getattr(store, name)(*args) for name, args in LISTS.items()} == {
        name: [-600] for name in LISTS
    }
    for name, args in RAISING.items():
        with pytest.raises(RequestError, match="setup"):
            getattr(store, name)(*args)
    assert (store.get_hostname(), store.health_check(), store.close()) == ("", 1, 0)
    assert store.get_offload_rpc_read_count() == 0


def test_a_closed_client_s_segment_leaves_with_what_is_in_it(store, join) -> None:
    other = join("8MB", tenant_id="leaver")
    assert other.put("a", b"1", config_of(preferred_segment=other.get_hostname())) == 0
    late = join(0, tenant_id="leaver")
    assert late.get("a") == b"1"
    other.close()
    assert late.is_exist("a") <= 0  # gone, or nobody can tell for a moment
    until(lambda: late.is_exist("a") == 0)
    assert late.get("a") == b""


OWNER = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", sys.argv[1], tenant_id="victim") == 0
assert store.put_batch(["a", "b"], [b"1" * 100_000, b"2"]) == 0
print("ready", flush=True)
sys.stdin.read()
"""


async def end_registrations(address: str) -> None:
    """What their leases would do in time."""
    metadata = open_metadata(f"tcp://{address}")
    for entry in (await metadata.get(STORES_PREFIX)).entries:
        await metadata.delete(entry.key)
    await metadata.close()


def test_what_a_killed_process_held_is_an_error_then_a_miss_and_never_other_bytes(memory) -> None:
    master = MasterThread(client_ttl=300.0)  # as long as the test needs to look at what is left
    store = client(master, 0, tenant_id="victim")
    command = [sys.executable, "-c", OWNER, master.address]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "ready\n"
        until(lambda: store.batch_is_exist(["a", "b"]) == [1, 1])
        assert store.get("a") == b"1" * 100_000
        owner.kill()
        owner.wait(30)
        _, address = memory(200_000)
        assert (store.is_exist("a"), store.get_size("b")) == (-900, -900)
        assert store.batch_get_into(["a", "zz"], [address] * 2, [200_000] * 2) == [-900, -900]
        assert store.put("c", b"3") < 0
        with pytest.raises(PeerError):
            store.get("a")
        asyncio.run(end_registrations(master.address))
        while store.is_exist("a"):
            pass
        assert (store.get("a"), store.get_size("b"), store.put("c", b"3")) == (b"", -704, -200)
    finally:
        owner.kill()
        owner.communicate()
        store.close()
        master.stop()


def test_a_program_that_forgets_to_close_ends_all_the_same(master) -> None:
    program = f"""
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", "{master.address}") == 0
assert store.put("left", b"1") == 0
print(store.get("left"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "b'1'\n"), done.stderr[-2000:]
