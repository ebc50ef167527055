"""Host memory by address: MooncakeHostMemAllocator, the C functions of LMCache, NUMA binding."""

import ctypes
import errno
import os
import threading
from pathlib import Path

import pytest

from mooncake.core.errors import CapacityError, RequestError
from mooncake.dropin.store import hostmem
from mooncake.dropin.store.hostmem import (
    MooncakeHostMemAllocator,
    bind_to_numa_node,
    get_alloc_func_addr,
    get_free_func_addr,
)
from mooncake.store import MooncakeDistributedStore


def test_memory_is_whole_zeroed_pages_that_a_store_can_use(store: MooncakeDistributedStore) -> None:
    allocator = MooncakeHostMemAllocator()
    at = allocator.alloc(5000)
    assert at % 4096 == 0
    assert ctypes.string_at(at, 5000) == bytes(5000)
    assert store.register_buffer(at, 5000) == 0
    ctypes.memmove(at, b"hello", 5)
    assert store.put_from("k", at, 5) == 0
    assert store.get("k") == b"hello"
    assert store.unregister_buffer(at) == 0
    assert allocator.free(at) == 0


def test_memory_outlives_the_allocator_and_any_other_frees_it_once() -> None:
    at = MooncakeHostMemAllocator().alloc(4096)
    ctypes.memset(at, 1, 4096)
    other = MooncakeHostMemAllocator()
    assert [other.free(at + 1), other.free(at), other.free(at), other.free(0)] == [-1, 0, -1, -1]


@pytest.mark.parametrize(("size", "error"), [(0, RequestError), (-1, RequestError), (1 << 60, CapacityError)])
def test_sizes_that_cannot_be_are_refused(size: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="alloc"):
        MooncakeHostMemAllocator().alloc(size)


def test_the_c_functions_give_pages_and_take_them_back() -> None:
    alloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(get_alloc_func_addr())
    free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(get_free_func_addr())
    at = alloc(10_000)
    assert at % 4096 == 0
    ctypes.memset(at, 7, 10_000)
    free(at)


def in_a_thread(work) -> set[int]:
    """Return the cores of a thread that has done `work`; the test's own thread stays as it is."""
    cores: list[set[int]] = []
    thread = threading.Thread(target=lambda: (work(), cores.append(os.sched_getaffinity(0))))
    thread.start()
    thread.join()
    return cores[0]


def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: str) -> list[int]:
    """Pretend that node 1 has these cores; return the nodes whose memory is preferred."""
    preferred: list[int] = []
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text(f"{cores}\n")
    monkeypatch.setattr(hostmem, "NODES", tmp_path)
    monkeypatch.setattr(hostmem, "_prefer_memory_of", preferred.append)
    return preferred


def test_a_thread_is_bound_to_the_cores_of_its_node(tmp_path, monkeypatch) -> None:
    mine = min(os.sched_getaffinity(0))
    preferred = machine(tmp_path, monkeypatch, f"{mine},100000-100003")
    assert in_a_thread(lambda: bind_to_numa_node(1)) == {mine}
    assert preferred == [1]


@pytest.mark.parametrize(("cores", "node"), [("100000", 1), ("", 1), ("0", 99), ("0", -1)])
def test_a_node_that_cannot_be_had_changes_nothing(tmp_path, monkeypatch, cores: str, node: int) -> None:
    preferred = machine(tmp_path, monkeypatch, cores)
    assert in_a_thread(lambda: bind_to_numa_node(node)) == os.sched_getaffinity(0)
    assert not preferred


def test_memory_of_a_node_is_preferred_where_the_system_lets_us() -> None:
    if not (hostmem.NODES / "node0").exists():
        pytest.skip("no NUMA information")
    errors: list[OSError] = []

    def prefer() -> None:
        try:
            hostmem._prefer_memory_of(0)
        except OSError as error:
            errors.append(error)

    in_a_thread(prefer)
    assert all(error.errno in (errno.EPERM, errno.ENOSYS) for error in errors)


def test_memory_of_a_node_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match="memory policy"):
        hostmem._prefer_memory_of(900)
