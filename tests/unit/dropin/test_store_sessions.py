"""Ranges, sessions and segments of `mooncake.store`; codes as measured on upstream's wheel."""

from tests.unit.dropin.test_store import config_of


def test_parts_of_held_objects_are_read(store, memory) -> None:
    data, address = memory(200)
    store.batch_put_from(["o", "o2"], [address, address + 100], [100, 50])
    target, there = memory(400)
    keys, pointers = ["o", "zz", "o2"], [[there, there + 100], [there], [there + 300]]
    sizes, offsets = [[5, 6], [3], [4]], [[10, 20], [0], [1]]
    assert store.batch_get_into_multi_buffer_ranges(keys, pointers, sizes, offsets) == [-600, -600, -600]
    assert store.batch_get_session_start(keys) == [0, -704, 0]
    assert store.batch_get_into_multi_buffer_ranges(keys, pointers, sizes, offsets) == [11, -600, 4]
    assert target[:5].tobytes() == data[10:15].tobytes()
    assert target[100:106].tobytes() == data[20:26].tobytes()
    assert target[300:304].tobytes() == data[101:105].tobytes()
    read = store.batch_get_into_multi_buffer_ranges
    assert read(["o"], [[there]], [[50]], [[60]]) == [-600]
    assert read(["o"], [[there]], [[50, 1]], [[60]]) == [-600]
    assert read(["o"], [[there]], [[5]], [[-1]]) == [-600]
    assert store.batch_get_session_end(keys) == 0
    assert read(["o"], [[there]], [[5]], [[10]]) == [-600]


def test_a_session_reads_one_version_whatever_happens_meanwhile(store, memory) -> None:
    store.put("o", b"old")
    target, there = memory(3)
    assert store.batch_get_session_start(["o"]) == [0]
    store.upsert("o", b"new")
    assert store.batch_get_into_multi_buffer_ranges(["o"], [[there]], [[3]], [[0]]) == [3]
    assert target.tobytes() == b"old"
    store.batch_get_session_end(["o"])


def test_parts_of_objects_go_to_offsets_of_buffers_without_a_session(store, memory) -> None:
    data, address = memory(200)
    store.batch_put_from(["o", "o2"], [address, address + 100], [100, 50])
    target, there = memory(300)
    got = store.get_into_ranges(
        [there, there + 200],
        [["o", "o2"], ["o", "zz"]],
        [[[0, 10], [20]], [[0], [5]]],
        [[[0, 50], [3]], [[7], [0]]],
        [[[5, 6], [4]], [[3], [1]]],
    )
    assert got == [[[5, 6], [4]], [[3], [-704]]]
    assert target[:5].tobytes() == data[:5].tobytes()
    assert target[10:16].tobytes() == data[50:56].tobytes()
    assert target[20:24].tobytes() == data[103:107].tobytes()
    assert target[200:203].tobytes() == data[7:10].tobytes()
    assert store.get_into_ranges([there], [["o"]], [[[0]]], [[[90]]], [[[20]]]) == [[[-600]]]


def test_an_object_is_written_in_parts_and_visible_at_the_end(store, memory) -> None:
    data, address = memory(100)
    store.put("o", b"1")
    assert store.batch_put_session_start(["n1", "n2", "o"], [30, 20, 100]) == [0, 0, -705]
    assert (store.is_exist("n1"), store.get("n1")) == (0, b"")
    write = store.batch_put_from_multi_buffer_ranges
    assert write(["n1", "n2"], [[address, address + 10], [address]], [[10, 20], [20]], [[0, 10], [0]]) == [
        30,
        20,
    ]
    assert write(["n1"], [[address]], [[10]], [[25]]) == [-600]
    assert write(["zz"], [[address]], [[10]], [[0]]) == [-600]
    assert store.batch_put_session_end(["n1", "zz"]) == [0, -600]
    assert store.get("n1") == data[:30].tobytes()
    assert store.batch_put_session_revoke(["n2", "zz"]) == [0, -600]
    assert store.is_exist("n2") == 0
    assert store.batch_put_session_end(["n1", "n2"]) == [-600, -600]


def test_sessions_that_cannot_begin(store) -> None:
    assert store.batch_put_session_start(["n"], []) == [-600]
    assert store.batch_put_session_start(["n"], [0]) == [-600]
    assert store.batch_put_session_start(["n"], [5]) == [0]
    assert store.batch_put_session_start(["n"], [5]) == [-600]
    assert store.batch_put_session_start(["m"], [17 << 30]) == [-200]
    assert store.batch_put_session_revoke(["n"]) == [0]


def test_copies_are_cleared_unless_just_read(store) -> None:
    store.put_batch(["a", "b", "c"], [b"1"] * 3)
    store.get("b")
    assert store.batch_replica_clear(["a", "b", "zz"]) == ["a"]
    assert store.batch_replica_clear(["c"], "nobody:1") == []
    assert store.batch_replica_clear(["c"], store.get_hostname()) == ["c"]
    assert store.batch_is_exist(["a", "b", "c"]) == [0, 1, 0]


def test_more_memory_is_mounted_and_taken_back(join) -> None:
    store = join(0, tenant_id="mounting")
    answer = store.allocate_and_mount_segment(8 << 20)
    (segment,) = answer["segment_ids"]
    assert (answer["ret"], answer["allocated_size"]) == (0, 8 << 20)
    while segment not in store._need().pool.nodes:
        pass
    assert store.put("a", b"1", config_of(preferred_segment=segment)) == 0
    assert len(store.get_replica_desc("a")) == 1
    assert store.unmount_and_free_segment([segment]) == 0
    assert store.unmount_segment([segment]) == -1
    assert store.unmount_segment([]) == 0
    assert store.unmount_local_disk_segment() == 0
    assert store.allocate_and_mount_segment(0) == {"ret": -1, "segment_ids": [], "allocated_size": 0}
