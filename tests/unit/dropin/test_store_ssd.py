"""setup(enable_ssd_offload=True) puts a tier below the client's segment; its files outlive the process."""

import contextlib
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.ssd.layout import Geometry
from mooncake.core.errors import ConfigError
from mooncake.dropin.store.offload import ENDS_BYTES, LIMIT_ENV, PATH, PATH_ENV, Offload, segment_bytes_of
from mooncake.dropin.store.settings import Settings
from mooncake.store import MooncakeDistributedStore

from .conftest import MasterThread, client
from .master_http import ask_json, numbers, until

MB = 1 << 20
TIER_BYTES = 48 * MB


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for tiers of TIER_BYTES."""
    monkeypatch.setenv(LIMIT_ENV, str(TIER_BYTES))
    return tmp_path


def joined(master: MasterThread, disk: Path, segment: int = 8 * MB, **more) -> MooncakeDistributedStore:
    return client(master, segment, enable_ssd_offload=True, ssd_offload_path=str(disk), **more)


def value(n: int, size: int = MB) -> bytes:
    return bytes([n + 1]) * size


def kinds(store: MooncakeDistributedStore, key: str) -> list[bool]:
    """Return for each copy whether it is on a disk."""
    return [one.is_local_disk_replica() for one in store.get_replica_desc(key)]


# ---------------------------------------------------------------- what it is for


def test_more_than_the_memory_holds_is_kept_on_disk_and_read_back(master, disk) -> None:
    store = joined(master, disk)
    with contextlib.closing(store):
        for n in range(24):  # three times the memory
            key = f"k{n}"
            assert store.put(key, value(n)) == 0
            if n % 4 == 3:
                until(lambda: waits_for_disk(store) == 0)
        assert [store.is_exist(f"k{n}") for n in range(24)] == [1] * 24
        cold = next(f"k{n}" for n in range(24) if kinds(store, f"k{n}") == [True])
        (copy,) = store.get_replica_desc(cold)
        assert copy.get_disk_descriptor().object_size == MB
        for n in range(24):
            assert store.get(f"k{n}") == value(n)
        until(lambda: kinds(store, "k23") == [False])


def waits_for_disk(store: MooncakeDistributedStore) -> int:
    """Return how many bytes only memory has, having said that all of it is old enough."""
    tiering = store._calls.started.background._service.tiering
    tiering.behind.limits = type(tiering.behind.limits)(age_s=0.0)
    return tiering.behind.waiting_bytes + sum(b.size_bytes for b in tiering.behind._copying.values())


def test_the_next_process_with_the_same_path_serves_what_the_last_one_had(master, disk) -> None:
    first = joined(master, disk)
    assert first.put_batch(["a", "b"], [value(0), value(1)]) == 0
    first.remove("b", force=True)
    first.close()
    second = joined(master, disk)
    with contextlib.closing(second):
        assert second.batch_is_exist(["a", "b", "c"]) == [1, 0, 0]
        assert kinds(second, "a") == [True]
        assert second.get_size("a") == MB
        assert second.get("a") == value(0)


def test_an_unmounted_disk_takes_what_only_it_has_and_gives_it_back_at_the_next_start(master, disk) -> None:
    joined(master, disk).close()  # a tier that is there already
    first = joined(master, disk)
    first.put("a", value(0))
    first.close()
    store = joined(master, disk)
    with contextlib.closing(store):
        store.put("b", value(1))
        assert kinds(store, "a") == [True]
        assert store.unmount_local_disk_segment() == 0
        assert store.batch_is_exist(["a", "b"]) == [0, 1]
        assert store.get("a") == b""
        assert store.get("b") == value(1)
        assert store.unmount_local_disk_segment() == 0, "it is gone already"
        assert store.put("c", value(2)) == 0
    third = joined(master, disk)
    with contextlib.closing(third):
        assert third.batch_is_exist(["a", "b", "c"]) == [1, 1, 0]


def test_without_a_disk_there_is_nothing_to_unmount(store) -> None:
    assert store.unmount_local_disk_segment() == 0
    assert MooncakeDistributedStore().unmount_local_disk_segment() == -600


def test_clients_that_share_a_path_have_tiers_of_their_own(master, disk) -> None:
    stores = [joined(master, disk) for _ in range(2)]
    try:
        homes = sorted(path.name for path in disk.iterdir() if path.is_dir())
        assert homes == ["tier-0", "tier-1"]
        assert all(store.put(f"of {n}", value(n)) == 0 for n, store in enumerate(stores))
    finally:
        for store in stores:
            store.close()
    again = [joined(master, disk) for _ in range(2)]
    try:
        assert again[0].batch_is_exist(["of 0", "of 1"]) == [1, 1]
        assert sorted(path.name for path in disk.iterdir() if path.is_dir()) == homes
    finally:
        for store in again:
            store.close()


def test_a_tier_keeps_its_size_whatever_the_limit_says_later(master, disk, monkeypatch) -> None:
    joined(master, disk).close()
    file = disk / "tier-0" / "objects"
    size = file.stat().st_size
    assert TIER_BYTES // 2 < size <= TIER_BYTES
    monkeypatch.setenv(LIMIT_ENV, str(2 * TIER_BYTES))
    joined(master, disk).close()
    assert file.stat().st_size == size


# ---------------------------------------------------------------- who says so


def test_the_environment_names_the_place_if_setup_does_not(master, disk, monkeypatch) -> None:
    monkeypatch.setenv(PATH_ENV, str(disk))
    client(master).close()
    assert not list(disk.iterdir()), "a place alone is no wish"
    client(master, enable_ssd_offload="true").close()
    assert (disk / "tier-0" / "objects").exists()


def test_a_client_without_a_segment_has_no_tier(master, disk) -> None:
    joined(master, disk, segment=0).close()
    assert not list(disk.iterdir())


@pytest.mark.parametrize("path", ["missing", "file", "readonly"])
def test_a_path_that_is_no_directory_to_write_to_refuses_the_setup(master, disk, path) -> None:
    (disk / "file").write_text("")
    (disk / "readonly").mkdir(mode=0o500)
    if path == "readonly" and os.access(disk / path, os.W_OK):
        path = "missing"  # root may write anywhere
    store = MooncakeDistributedStore()
    config = {
        "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "global_segment_size": 8 * MB,
        "master_server_addr": master.address,
        "enable_ssd_offload": True, "ssd_offload_path": str(disk / path),
    }  # fmt: skip
    assert store.setup(config) == -1
    assert store.is_exist("a") == -600


@pytest.mark.parametrize(
    ("values", "env", "named"),
    [
        ({"ssd_offload_path": "relative"}, {}, "ssd_offload_path"),
        ({}, {PATH_ENV: "relative"}, PATH_ENV),
        ({}, {LIMIT_ENV: "10GB"}, LIMIT_ENV),
        ({}, {LIMIT_ENV: "1000"}, LIMIT_ENV),
        ({"enable_ssd_offload": "perhaps"}, {}, "enable_ssd_offload"),
    ],
)
def test_settings_that_make_no_sense_are_named(values, env, named, monkeypatch) -> None:
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    wanted = {"local_hostname": "h", "metadata_server": "m", "enable_ssd_offload": True}
    with pytest.raises(ConfigError, match=named):
        Settings.of({**wanted, **values})


def test_nothing_said_is_no_tier_and_no_path_said_is_upstream_s() -> None:
    assert Offload.of(False, "", {}) is None
    assert Offload.of(True, "", {}) == Offload(PATH, True)
    assert Offload.of(True, "/a", {PATH_ENV: "/b", LIMIT_ENV: "100000000"}) == Offload(
        "/a", True, 100_000_000
    )


# ---------------------------------------------------------------- sizes


@given(st.integers(3 * MB + ENDS_BYTES, 1 << 44))
def test_a_tier_is_divided_alike_when_it_is_made_and_when_it_is_found(capacity_bytes) -> None:
    made = Geometry.of(capacity_bytes, segment_bytes_of(capacity_bytes))
    assert made.file_bytes <= capacity_bytes
    assert Geometry.of(made.file_bytes, segment_bytes_of(made.file_bytes)) == made


def test_without_a_limit_a_tier_takes_a_part_of_what_is_free(tmp_path) -> None:
    disk = os.statvfs(tmp_path)
    with Offload(str(tmp_path), True).tier() as config:
        assert 0 < config.capacity_bytes <= 0.6 * disk.f_bavail * disk.f_frsize


def test_a_place_that_another_process_has_is_passed_over_until_it_is_free(tmp_path) -> None:
    offload = Offload(str(tmp_path), True, TIER_BYTES)
    with offload.tier() as first, offload.tier() as second:
        assert [Path(one.path).name for one in (first, second)] == ["tier-0", "tier-1"]
    with offload.tier() as third:
        assert third.path == first.path


# ---------------------------------------------------------------- what operators see, and promotion


def filled(master, disk) -> MooncakeDistributedStore:
    """Return a client whose 8 MB hold eight objects, with eight older ones on the disk alone."""
    store = joined(master, disk)
    for n in range(16):
        assert store.put(f"k{n}", value(n)) == 0
        if n % 4 == 3:
            until(lambda: waits_for_disk(store) == 0)
    return store


def test_the_master_shows_disks_and_what_came_from_them(disk) -> None:
    master = MasterThread()
    store = filled(master, disk)
    try:
        cold = next(f"k{n}" for n in range(16) if kinds(store, f"k{n}") == [True])
        found = ask_json(master, f"/batch_query_keys?keys={cold}")[1]["data"][cold]
        assert found["values"] is None
        assert [copy["size_"] for copy in found["local_disk_values"]] == [MB]
        before = numbers(master)
        assert before["master_total_file_capacity_bytes"] > TIER_BYTES // 2
        assert before["file_cache_nums_"] >= 8
        assert store.get(cold) == value(int(cold[1:]))
        until(lambda: numbers(master)["file_cache_hit_nums_"] == before["file_cache_hit_nums_"] + 1)
        assert numbers(master)["file_cache_hit_bytes_total"] >= MB
    finally:
        store.close()
        master.stop()


@pytest.mark.parametrize(
    ("flags", "stays"),
    [({}, True), ({"promotion_on_hit": False}, False), ({"promotion_admission_threshold": 2}, False)],
)
def test_what_one_read_brought_from_the_disk_stays_in_memory_or_goes_first(disk, flags, stays) -> None:
    master = MasterThread(**flags)
    store = filled(master, disk)
    try:
        cold = next(f"k{n}" for n in range(16) if kinds(store, f"k{n}") == [True])
        assert store.get(cold) == value(int(cold[1:]))
        until(lambda: kinds(store, cold) == [False])
        assert store.put("one more", value(99)) == 0
        assert store.get("one more") == value(99)
        assert (kinds(store, cold) == [False]) is stays
        assert store.get(cold) == value(int(cold[1:])), "from where it is now"
    finally:
        store.close()
        master.stop()
