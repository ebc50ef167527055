"""Engines find each other by name in a real etcd, which each test starts on loopback and ends."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake.core.errors import PeerError, RequestError
from mooncake.engine import TransferEngine
from tests.integration.cluster import free_port, wait_until
from transfer.naming import Directory, EtcdStore, Record, naming_of

ETCD = shutil.which("etcd")
READY_S = 30.0
CALL_S = 5.0
FIRST = Record("127.0.0.1:15001", "a" * 32)
SECOND = Record("127.0.0.1:15002", "b" * 32)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(ETCD is None, reason="no etcd here: install the package etcd-server"),
]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The client port of a fresh single-node etcd."""
    folder = tmp_path_factory.mktemp("etcd")
    port, peer_port = free_port(), free_port()
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(
            [
                str(ETCD), "--name=test", f"--data-dir={folder / 'data'}",
                f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=test={peer}",
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("ETCD_")},
        )  # fmt: skip
    try:
        store = EtcdStore([("127.0.0.1", port)])

        def healthy() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                store.put("ready", b"yes", CALL_S)
            except PeerError:
                return False
            return True

        wait_until("etcd is ready", healthy, READY_S)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10.0)


def test_a_name_is_published_replaced_and_withdrawn_by_its_own_start_only(etcd: int) -> None:
    names = naming_of(f"etcd://127.0.0.1:{etcd}")
    names.publish("node", FIRST, CALL_S)
    names.publish("node", SECOND, CALL_S)
    names.withdraw("node", FIRST, CALL_S)
    assert names.resolve("node", CALL_S) == SECOND.address
    names.withdraw("node", SECOND, CALL_S)
    names.withdraw("node", SECOND, CALL_S)
    with pytest.raises(RequestError, match="no engine has published the name 'node'"):
        names.resolve("node", CALL_S)


@pytest.mark.parametrize("value", [b"", b"\0\xff", b"x" * 4096])
def test_any_bytes_come_back(etcd: int, value: bytes) -> None:
    store = EtcdStore([("localhost", etcd)])
    store.put("any", value, CALL_S)
    assert store.get("any", CALL_S) == value


def test_the_next_endpoint_answers_when_the_first_is_down(etcd: int) -> None:
    names = Directory(EtcdStore([("127.0.0.1", free_port()), ("127.0.0.1", etcd)]))
    names.publish("second", FIRST, CALL_S)
    assert names.resolve("second", CALL_S) == FIRST.address


def test_two_engines_move_bytes_by_their_names(etcd: int) -> None:
    metadata = f"etcd://127.0.0.1:{etcd}"
    here, there = TransferEngine(), TransferEngine()
    try:
        assert here.initialize("127.0.0.1:17001", metadata, "tcp", "") == 0
        assert there.initialize("127.0.0.1:17002", metadata, "tcp", "") == 0
        source, target = np.full(4096, 7, np.uint8), np.zeros(4096, np.uint8)
        assert here.register_memory(source.ctypes.data, source.nbytes) == 0
        assert there.register_memory(target.ctypes.data, target.nbytes) == 0
        first = here.get_first_buffer_address("127.0.0.1:17002")
        assert first == target.ctypes.data
        assert here.transfer_sync_write("127.0.0.1:17002", source.ctypes.data, first, 100) == 0
        assert bytes(target[99:101]) == b"\7\0"
    finally:
        here.close()
        there.close()
    with pytest.raises(RequestError):
        naming_of(metadata).resolve("127.0.0.1:17001", CALL_S)
