"""Memory that is given to the pool besides the first segment; codes are as measured on upstream's wheel."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake.dropin.store import settings
from mooncake.store import MooncakeDistributedStore
from tests.unit.dropin.conftest import MasterThread
from tests.unit.dropin.test_store import config_of

MIB = 1 << 20
REFUSED = {"ret": -1, "segment_ids": []}


@pytest.fixture
def file() -> Iterator[Path]:
    """8 MiB in shared memory."""
    path = Path(f"/dev/shm/mooncake-test-{uuid.uuid4().hex}")
    path.write_bytes(bytes(8 * MIB))
    yield path
    path.unlink(missing_ok=True)


def mounted(store: MooncakeDistributedStore, path: Path, size: int = 4 * MIB, offset: int = 0) -> str:
    """Mount; return the segment when this client may use it."""
    answer = store.mount_segment(str(path), size, offset)
    assert answer["ret"] == 0
    (segment,) = answer["segment_ids"]
    while segment not in store._need().pool.nodes:
        pass
    return segment


def test_memory_of_a_file_holds_objects_until_it_is_unmounted(join, file) -> None:
    store, other = join(0, tenant_id="file"), join(0, tenant_id="file")
    segment = mounted(store, file, offset=4 * MIB)
    value = b"in the file" * 10_000
    assert store.put("k", value, config_of(preferred_segment=segment)) == 0
    assert value in file.read_bytes()[4 * MIB :]
    assert not any(file.read_bytes()[: 4 * MIB])
    while other.get("k") != value:
        pass
    assert store.unmount_segment([segment]) == 0
    while other.is_exist("k"):
        pass
    assert other.get("k") == b""
    assert store.unmount_segment([segment]) == -1


def test_small_objects_and_batches_work_in_a_file_too(join, file, memory) -> None:
    store = join(0, tenant_id="file-batch")
    mounted(store, file)
    _, address = memory(200_000)
    assert store.put_batch(["a", "b"], [b"1", b"2" * 100_000]) == 0
    assert store.batch_get_into(["a", "b"], [address, address + 10], [10, 100_000]) == [1, 100_000]
    assert store.upsert("a", b"one") == 0
    assert store.get_batch(["a", "b"]) == [b"one", b"2" * 100_000]
    assert store.remove_all(force=True) == 2


@pytest.mark.parametrize(
    ("size", "offset"),
    [(16 * MIB, 0), (4 * MIB, 5), (4 * MIB, 5 * MIB), (1000, 0), (-4096, 0), (4096, -4096)],
)
def test_a_range_that_the_file_has_not_is_refused(join, file, size, offset) -> None:
    store = join(0, tenant_id="refused")
    assert store.mount_segment(str(file), size, offset) == REFUSED


@pytest.mark.parametrize("path", ["", "/nowhere/at/all", "/dev", "a\0b"])
def test_what_is_no_file_is_refused(join, path) -> None:
    store = join(0, tenant_id="refused")
    assert store.mount_segment(path, 4 * MIB) == REFUSED


def test_no_bytes_are_mounted_at_once_and_before_setup_nothing_is(join, file) -> None:
    store = join(0, tenant_id="none")
    assert store.mount_segment(str(file), 0) == {"ret": 0, "segment_ids": []}
    assert MooncakeDistributedStore().mount_segment(str(file), 4 * MIB) == REFUSED
    assert MooncakeDistributedStore().unmount_segment(["x"]) == -600


def test_bytes_of_a_file_are_one_segment_s_at_a_time(join, file) -> None:
    store, other = join(0, tenant_id="one"), join(0, tenant_id="one")
    segment = mounted(store, file)
    assert store.mount_segment(str(file), 4 * MIB, 2 * MIB) == REFUSED
    assert other.mount_segment(str(file), 4 * MIB) == REFUSED
    second = mounted(other, file, offset=4 * MIB)
    assert store.unmount_segment([segment]) == 0
    again = mounted(store, file)
    assert store.unmount_segment([second]) == -1
    assert (store.unmount_segment([again]), other.unmount_segment([second])) == (0, 0)


def test_for_its_grace_period_a_segment_is_read_and_takes_nothing_more(join, file, monkeypatch) -> None:
    over: list[threading.Timer] = []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: over.append(timer))
    store, other = join(0, tenant_id="grace"), join(0, tenant_id="grace")
    segment = mounted(store, file)
    assert store.put("k", b"1") == 0
    while other.get("k") != b"1":
        pass
    assert store.unmount_segment([segment], grace_period_seconds=3600) == 0
    assert (other.get("k"), other.is_exist("k"), store.get("k")) == (b"1", 1, b"1")
    assert (other.put("new", b"2"), store.put("new", b"2")) == (-200, -200)
    assert store.unmount_segment([segment]) == -1
    (timer,) = over
    assert timer.interval == 3600
    timer.function(*timer.args)
    while other.is_exist("k"):
        pass
    assert store.get("k") == b""
    with pytest.raises(TypeError):
        store.unmount_segment([], -1)


def test_a_client_that_closes_ends_what_is_in_its_grace_period(join, file) -> None:
    store, late = join(0, tenant_id="closing"), join(0, tenant_id="closing")
    segment = mounted(store, file)
    assert store.put("k", b"1") == 0
    assert store.unmount_and_free_segment([segment], 3600) == 0
    store.close()
    while late.is_exist("k"):
        pass
    assert late.mount_segment(str(file), 4 * MIB)["ret"] == 0


def test_copies_of_one_segment_are_cleared_and_the_others_stay(join) -> None:
    store, other = join("4MB", tenant_id="clear"), join("4MB", tenant_id="clear")
    while len(store._need().pool.nodes) < 2:
        pass
    names = [store.get_hostname(), other.get_hostname()]
    both = config_of(replica_num=2, preferred_segments=names)
    assert store.put_batch(["a", "b"], [b"1", b"2"], both) == 0
    assert store.batch_replica_clear(["a", "missing"], other.get_hostname()) == ["a"]
    left = {key: len(copies) for key, copies in store.batch_get_replica_desc(["a", "b"]).items()}
    assert left == {"a": 1, "b": 2}
    assert store.batch_replica_clear(["b"]) == []  # it was just looked at
    assert other.batch_replica_clear(["b"]) == ["b"]
    assert (store.get("a"), store.get("b")) == (b"1", b"")


def test_init_all_is_a_short_setup(monkeypatch) -> None:
    master = MasterThread()
    monkeypatch.setattr(settings, "MASTER", master.address)
    store = MooncakeDistributedStore()
    try:
        assert store.init_all("tcp", "", 4 * MIB) == 0
        assert (store.put("k", b"1"), store.get("k")) == (0, b"1")
        assert store.init_all("tcp", "", 4 * MIB) == -600
        assert MooncakeDistributedStore().init_all("smoke signals", "", 4 * MIB) == -600
    finally:
        store.close()
        master.stop()
