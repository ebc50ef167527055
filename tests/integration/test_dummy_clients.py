"""Dummy clients beside a real one, as processes: the objects of other hosts, and what a killed one leaves."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.leader.admin_http import TOKEN_ENV
from mooncake.core.errors import PeerError
from mooncake.core.secret import SECRET_ENV
from mooncake.dropin.store.types import RPC_FAIL
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
from tests.integration.hosts import HERE, SECRET, THERE, no_second_host, second_host
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


# ---------------------------------------------------------------- two hosts

WHY_NOT = no_second_host()
if sys.prefix.startswith("/tmp/"):  # a second host has an empty /tmp
    WHY_NOT = WHY_NOT or f"programs of a second host need a Python outside of /tmp, not {sys.prefix}"
TOKEN = "a token of an operator"
ALONE = 'mount -t tmpfs tmpfs /tmp && exec "$@"'
"""Nothing of what this host has in /tmp, its stores' sockets above all, is to be seen there."""
READER = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup_dummy(1 << 20, 1 << 20, sys.argv[1]) == 0
data = store.get("here")
assert store.put("there", data[::-1]) == 0
print(len(data), flush=True)
"""


class Processes(PoolProcesses):
    """Programs of two hosts."""

    def __init__(self, folder: Path, space: str) -> None:
        super().__init__(folder, metadata="none")
        self._space = space

    def start(self, name: str, words: list[str], before: Sequence[str] = (), **kwargs) -> subprocess.Popen:
        return self._spawn(name, [*before, sys.executable, *words], **kwargs)

    @property
    def there(self) -> list[str]:
        """What makes a program one of the other host."""
        return ["ip", "netns", "exec", self._space, "unshare", "--mount", "sh", "-c", ALONE, "sh"]

    def beside(self, name: str) -> list[str]:
        """What makes a program one of the host of another."""
        return ["nsenter", "--target", str(self._processes[name].pid), "--mount", "--net"]


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_dummies_need_no_secret_to_use_what_two_hosts_have(
    tmp_path: Path,
) -> None:
    port, data = lasting_port(), content(key(7), SIZE)
    bare = dict(os.environ)
    with second_host() as space, contextlib.ExitStack() as stack:
        processes = Processes(tmp_path, space)
        stack.callback(processes.close)
        armed = {**bare, SECRET_ENV: SECRET, TOKEN_ENV: TOKEN}
        master = ["-m", "mooncake.dropin.master.command", f"--rpc_address={HERE}", f"--rpc_port={port}"]
        processes.start("master", [*master, "--metrics_port=0"], env=armed)
        ports = {HERE: lasting_port(), THERE: lasting_port()}
        until(lambda: _listens(HERE, port))
        for host in (HERE, THERE):
            flags = [f"--host={host}", f"--port={ports[host]}", f"--master_server_address={HERE}:{port}"]
            words = ["-m", "mooncake.dropin.client.command", *flags, "--global_segment_size=64MB"]
            processes.start(f"real-{host}", words, processes.there if host == THERE else (), env=armed)
        dummy = MooncakeDistributedStore()
        stack.callback(dummy.close)
        until(lambda: dummy.setup_dummy(1 << 20, 1 << 20, f"127.0.0.1:{ports[HERE]}") == 0)
        until(lambda: len(dummy._calls.pool.nodes) == 2)
        near = sorted(store.near for store in dummy._calls.pool._members.stores.values())
        assert near == [False, True]
        assert dummy.put("here", data) == 0
        address = f"127.0.0.1:{ports[THERE]}"
        beside = processes.beside(f"real-{THERE}")
        reader = processes.start("reader", ["-c", READER, address], beside, env=bare, stdout=subprocess.PIPE)
        assert reader.stdout
        said = reader.stdout.readline()
        assert said == b"%d\n" % SIZE, processes.log_tail("reader")
        assert dummy.get("there") == data[::-1]


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
