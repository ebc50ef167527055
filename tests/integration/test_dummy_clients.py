"""Dummy clients beside a real one, as processes: the objects of other hosts, and what a killed one leaves."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake.core.errors import PeerError
from mooncake.dropin.store.types import RPC_FAIL
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
from tests.integration.pool_processes import WAIT_S, PoolProcesses, content, key, until
from tests.integration.ports import lasting_port

pytestmark = pytest.mark.integration

FAR = "far"
SIZE = 3 << 20
"""More than comes with an answer."""
SHARED = "memfd:mooncake-dummy"
DUMMY = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup_dummy(1 << 20, 1 << 20, sys.argv[1]) == 0
assert store.alloc_from_mem_pool(1 << 20)
assert store.put("by-the-dummy", b"x" * (1 << 20)) == 0
assert len(store.get("by-the-dummy")) == 1 << 20
print("ready", flush=True)
sys.stdin.read()
"""


class Host(PoolProcesses):
    """A real client, and a store as if on another host: nobody here can attach to its memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = lasting_port()
        self.address = f"127.0.0.1:{self.port}"
        record = self.store(FAR)
        for path in (Path(record.fd_path), Path(record.door)):
            path.rename(f"{path}.hidden")

    def real(self) -> None:
        """Start the real client; return once it serves."""
        flags = {
            "host": "127.0.0.1", "port": self.port, "global_segment_size": "64MB",
            "master_server_address": self.metadata,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        self._spawn("real", [sys.executable, "-m", "mooncake.dropin.client.command", *words])
        until(lambda: self._answers() or self._check_lives())

    def _answers(self) -> bool:
        probe = MooncakeDistributedStore()
        try:
            return probe.setup_dummy(0, 0, self.address) == 0
        finally:
            probe.close()

    def _check_lives(self) -> None:
        assert self._processes["real"].poll() is None, self.log_tail("real")

    def shared_maps(self) -> int:
        """How much memory of dummies the real client has mapped."""
        return Path(f"/proc/{self._processes['real'].pid}/maps").read_text().count(SHARED)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    try:
        host.real()
        yield host
    finally:
        host.close()


@pytest.fixture
def dummy(host: Host) -> Iterator[MooncakeDistributedStore]:
    store = MooncakeDistributedStore()
    assert store.setup_dummy(1 << 20, 1 << 20, host.address) == 0
    until(lambda: len(store._calls.pool.nodes) == 2)
    yield store
    store.close()


def on_far() -> ReplicateConfig:
    config = ReplicateConfig()
    config.preferred_segment = FAR
    return config


def test_objects_of_another_host_are_put_and_read_through_the_real_client(
    host: Host, dummy: MooncakeDistributedStore
) -> None:
    objects = {f"k{number}": content(key(number), size) for number, size in enumerate((1, 100, SIZE, SIZE))}
    for name, data in objects.items():
        assert dummy.put(name, data, on_far()) == 0
        assert {place.node for place in dummy._calls.pool.places([name])[0]} == {FAR}
    other = MooncakeDistributedStore()
    assert other.setup_dummy(1 << 20, 1 << 20, host.address) == 0
    try:
        assert other.get_batch(list(objects)) == list(objects.values())
        pool = other.alloc_from_mem_pool(SIZE)
        assert other.get_into("k3", pool, SIZE) == SIZE
        assert ctypes.string_at(pool, SIZE) == objects["k3"]
        assert other.remove("k3", force=True) == 0
        assert dummy.is_exist("k3") == 0
    finally:
        other.close()


def test_a_killed_real_client_is_an_error_and_never_a_miss_and_a_new_one_serves_the_same_dummies(
    host: Host, dummy: MooncakeDistributedStore
) -> None:
    data = content(key(1), SIZE)
    pool = dummy.alloc_from_mem_pool(SIZE)
    assert dummy.put("here", data) == 0
    assert dummy.put("there", data, on_far()) == 0
    host.kill("real")
    until(lambda: dummy.health_check() == 2)
    for name in ("there", "none"):
        assert dummy.is_exist(name) == RPC_FAIL
        assert dummy.get_size(name) == RPC_FAIL
        assert dummy.get_into(name, pool, SIZE) == RPC_FAIL
        assert dummy.remove(name, force=True) == RPC_FAIL
        with pytest.raises(PeerError):
            dummy.get(name)
    assert dummy.put("new", data) == RPC_FAIL
    assert dummy.put_from("new", pool, SIZE) == RPC_FAIL
    assert dummy.remove_all(force=True) == RPC_FAIL
    host.real()
    until(lambda: dummy.health_check() == 0)
    assert until(lambda: dummy.get("there")) == data
    until(lambda: dummy.put("again", data) == 0)
    assert until(lambda: dummy.get_into("again", pool, SIZE)) == SIZE
    until(lambda: dummy.get_into("there", pool, SIZE) == SIZE)
    assert ctypes.string_at(pool, SIZE) == data


def test_a_stopped_real_client_costs_a_deadline_and_is_an_error(
    host: Host, dummy: MooncakeDistributedStore
) -> None:
    assert dummy.put("k", b"x" * 100) == 0
    host.signal("real", signal.SIGSTOP)
    try:
        assert dummy.put("new", b"x" * 100, on_far()) == RPC_FAIL
        with pytest.raises(PeerError):
            dummy.get("none")
    finally:
        host.signal("real", signal.SIGCONT)
    until(lambda: dummy.put("after", b"x" * 100, on_far()) == 0)
    assert until(lambda: dummy.get("k")) == b"x" * 100


def test_a_killed_dummy_leaves_no_memory_and_its_objects_stay(
    host: Host, dummy: MooncakeDistributedStore
) -> None:
    before = host.shared_maps()
    with subprocess.Popen(
        [sys.executable, "-c", DUMMY, host.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        assert host.shared_maps() > before
        os.kill(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)
    until(lambda: host.shared_maps() == before)
    assert dummy.get("by-the-dummy") == b"x" * (1 << 20)
    assert dummy.put("next", b"y" * 100, on_far()) == 0
