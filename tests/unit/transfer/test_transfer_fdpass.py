"""The memfd travels only between processes of one user, through a private socket, within a deadline."""

import asyncio
import os
import socket
import stat
import threading
import time

import pytest

from mooncake.core.errors import ConfigError, PeerGone, PeerTimeout, ProtocolError
from transfer import fdpass
from transfer.fdpass import FdServer, fetch_segment, private_dir
from transfer.segment import Segment

SIZE = 8 * 4096


@pytest.fixture
async def served(tmp_path):
    segment = Segment.create("epoch-1", SIZE)
    server = FdServer(tmp_path / "run" / "store.sock", segment)
    server.start()
    yield server, segment
    await server.close()
    segment.close()


async def fetch(path, deadline_s=2.0):
    return await asyncio.to_thread(fetch_segment, path, deadline_s)


async def test_a_fetched_segment_is_the_servers_memory_and_carries_its_name(served):
    server, segment = served
    fetched = await fetch(server.path)
    segment.view(0, 3)[:] = b"abc"
    assert (fetched.name, fetched.size_bytes) == ("epoch-1", SIZE)
    assert bytes(fetched.view(0, 3)) == b"abc"
    fetched.close()


async def test_many_peers_fetch_one_after_another_without_leaking_descriptors(served):
    server, _ = served
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        (await fetch(server.path)).close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_the_socket_is_private_and_goes_at_close(served):
    server, _ = served
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.path.parent.stat().st_mode) == 0o700
    await server.close()
    assert not server.path.exists()


async def test_another_user_gets_no_descriptor(served, monkeypatch):
    server, _ = served

    def seen_uid(_):  # the server looks from the loop's thread, the client from its own
        return os.getuid() + (threading.current_thread() is threading.main_thread())

    monkeypatch.setattr(fdpass, "peer_uid", seen_uid)
    with pytest.raises(PeerGone, match="without a descriptor"):
        await fetch(server.path)


async def test_a_server_of_another_user_is_not_trusted(served, monkeypatch):
    server, _ = served
    monkeypatch.setattr(fdpass, "peer_uid", lambda _: os.getuid() + 1)
    with pytest.raises(ProtocolError, match="served by user"):
        await fetch(server.path)


async def test_a_peer_that_connects_and_leaves_does_not_stop_the_server(served):
    server, _ = served
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.connect(str(server.path))
    (await fetch(server.path)).close()


def test_peer_uid_is_the_kernels_word():
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert fdpass.peer_uid(left) == os.getuid()


def test_a_missing_server_is_gone_at_once(tmp_path):
    with pytest.raises(PeerGone, match="No such file"):
        fetch_segment(tmp_path / "none.sock", 1.0)


def test_a_silent_server_costs_no_more_than_the_deadline(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen(1)
        start_s = time.monotonic()
        with pytest.raises(PeerTimeout, match="no segment within"):
            fetch_segment(tmp_path / "silent.sock", 0.1)
        assert time.monotonic() - start_s < 5.0


@pytest.mark.parametrize("message", [b"garbage", fdpass.wire.encode(fdpass.Handover("x", SIZE * 2))])
def test_a_wrong_announcement_is_a_protocol_error_and_leaks_nothing(tmp_path, message):
    segment = Segment.create("liar", SIZE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as liar:
        liar.bind(str(tmp_path / "liar.sock"))
        liar.listen(1)

        def lie():
            connection, _ = liar.accept()
            with connection:
                socket.send_fds(connection, [message], [segment.fd])

        before = len(os.listdir("/proc/self/fd"))
        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(ProtocolError):
            fetch_segment(tmp_path / "liar.sock", 2.0)
        thread.join()
        assert len(os.listdir("/proc/self/fd")) == before
    segment.close()


async def test_a_dead_servers_socket_file_is_replaced(tmp_path):
    path = private_dir(tmp_path / "run") / "store.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
        dead.listen(1)
    segment = Segment.create("second", SIZE)
    server = FdServer(path, segment)
    server.start()
    (await fetch(path)).close()
    await server.close()
    segment.close()


async def test_a_living_servers_socket_is_never_taken_over(served):
    server, segment = served
    with pytest.raises(ConfigError, match="living process"):
        FdServer(server.path, segment)
    (await fetch(server.path)).close()


async def test_close_leaves_a_successors_socket_alone(served, tmp_path):
    server, segment = served
    server.path.rename(server.path.with_suffix(".old"))
    successor = FdServer(server.path, segment)
    await server.close()
    assert successor.path.exists()
    await successor.close()


def test_a_run_dir_open_to_others_is_refused(tmp_path):
    directory = tmp_path / "open"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        private_dir(directory)


def test_a_socket_path_beyond_the_kernels_limit_names_the_setting(tmp_path):
    segment = Segment.create("long", SIZE)
    with pytest.raises(ConfigError, match="shorten run_dir"):
        FdServer(tmp_path / ("x" * 120) / "s.sock", segment)
    segment.close()
