"""Peers that die, stop, lie or babble: an error within the deadline, never a hang, never a stray byte."""

import contextlib
import itertools
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncake.core import wire
from mooncake.core.errors import MooncakeError, PeerError, PeerGone, PeerTimeout, RequestError
from transfer.engine import TransferEngine
from transfer.messages import VERSION, Challenge, Hello, Proof, Welcome
from transfer.model import Opcode
from transfer.stream import recv_message, send_message
from transfer.tcp import FENCE_S
from transfer.tcp_wire import ANSWER, REQUEST, encode_request

OWNER = """
import sys
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
with TransferEngine(EngineConfig(run_dir=sys.argv[1])) as engine:
    buffer = engine.allocate(64 << 20)
    print("ready", engine.name, buffer.address, flush=True)
    sys.stdin.read()
"""
SIZE = 64 << 20


class Owner:
    """An engine in a process of its own."""

    def __init__(self, folder) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        line = next(line for line in self.process.stdout if line.startswith("ready"))  # others are logs
        _, self.name, address = line.split()
        self.address = int(address)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def owner(tmp_path):
    owner = Owner(tmp_path / "owner")
    yield owner
    owner.close()


def start_reads(engine: TransferEngine, owner: Owner, transport: str, deadline_s: float = 20.0):
    """Begin more than can be done before the next line runs."""
    mine = engine.allocate(SIZE)
    engine.transfer(Opcode.WRITE, owner.name, mine.address, owner.address, 4096, transport=transport)
    return [
        engine.submit(
            Opcode.WRITE,
            owner.name,
            [mine.address],
            [owner.address],
            [SIZE],
            deadline_s=deadline_s,
            transport=transport,
        )
        for _ in range(8)
    ]


@pytest.mark.chaos
def test_a_killed_peer_is_noticed_long_before_the_deadline(make_engine, owner):
    batches = start_reads(make_engine(), owner, "tcp")
    start_s = time.monotonic()
    owner.process.send_signal(signal.SIGKILL)
    assert all(batch.wait() for batch in batches)
    assert time.monotonic() - start_s < 15
    assert any(isinstance(error, PeerError) for batch in batches for error in batch.errors.values())


@pytest.mark.chaos
def test_a_killed_peers_shared_memory_stays_readable_until_it_is_noticed(make_engine, owner):
    engine = make_engine()
    mine = engine.allocate(4096)
    engine.transfer(Opcode.READ, owner.name, mine.address, owner.address, 4096, transport="shm")
    owner.process.kill()
    owner.process.wait()
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:  # never a crash: the memory lives as long as our mapping
        try:
            engine.transfer(Opcode.READ, owner.name, mine.address, owner.address, 4096, deadline_s=2.0)
        except PeerError:
            break
    else:
        pytest.fail("the death was never noticed")


@pytest.mark.chaos
def test_a_stopped_peer_costs_the_deadline_and_not_more_than_the_fence(make_engine, owner):
    engine = make_engine()
    batches = start_reads(engine, owner, "tcp", deadline_s=1.0)
    owner.process.send_signal(signal.SIGSTOP)
    try:
        assert all(batch.wait() for batch in batches)
        late = [batch for batch in batches if batch.errors]
        assert late
        for batch in late:
            with pytest.raises(PeerError):
                batch.check()
        with pytest.raises(PeerError):
            engine.probe(owner.name, deadline_s=0.3)
        start_s = time.monotonic()
        with pytest.raises(PeerError):
            engine.transfer(
                Opcode.READ,
                owner.name,
                engine.buffers[0].address,
                owner.address,
                4096,
                deadline_s=1.0,
                transport="tcp",
            )
        assert time.monotonic() - start_s < 1.0 + FENCE_S + 3
    finally:
        owner.process.send_signal(signal.SIGCONT)
    assert engine.probe(owner.name, deadline_s=20.0) < 20


@pytest.mark.chaos
def test_a_stopped_peer_does_not_delay_another(make_engine, owner):
    engine, other = make_engine(), make_engine()
    theirs = other.allocate(4096)
    mine = engine.allocate(4096)
    batches = start_reads(engine, owner, "tcp", deadline_s=5.0)
    owner.process.send_signal(signal.SIGSTOP)
    try:
        for transport in ("shm", "tcp"):
            engine.transfer(
                Opcode.READ,
                other.name,
                mine.address,
                theirs.address,
                4096,
                deadline_s=3.0,
                transport=transport,
            )
        assert not all(batch.done() for batch in batches)
    finally:
        for batch in batches:
            batch.cancel()
        owner.process.send_signal(signal.SIGCONT)
    assert all(batch.wait(20) for batch in batches)


@pytest.mark.chaos
def test_a_cancelled_batch_settles_soon_and_its_memory_is_let_go(make_engine, owner):
    engine = make_engine()
    batches = start_reads(engine, owner, "tcp")
    for batch in batches:
        batch.cancel()
    assert all(batch.wait(15) for batch in batches)
    assert any("cancelled" in str(error) for batch in batches for error in batch.errors.values())
    for buffer in engine.buffers:
        engine.unregister(buffer, 5.0)


def test_after_a_cancelled_write_has_settled_the_owner_writes_nothing_more(make_engine):
    here, there = make_engine(), make_engine()
    mine, theirs = here.allocate(SIZE), there.allocate(SIZE)
    mine.view[:] = b"\1" * SIZE
    target = np.frombuffer(theirs.view, np.uint8)
    for _ in range(4):
        batch = here.submit(
            Opcode.WRITE, there.name, [mine.address], [theirs.address], [SIZE], transport="tcp"
        )
        batch.cancel()
        assert batch.wait(15)
        target[:] = 0
        threading.Event().wait(0.05)
        assert not target.any()


# ---------------------------------------------------------------- initiators that lie or babble


class Raw:
    """A hand-made data connection."""

    def __init__(self, engine: TransferEngine, purpose: str = "data", link: int = 1) -> None:
        self.sock = socket.create_connection(("127.0.0.1", engine.port), timeout=10)
        send_message(self.sock, Hello(VERSION, purpose, "f" * 32, "raw", link, bytes(16)), lambda: None)
        self.expect(Challenge)
        send_message(self.sock, Proof(b""), lambda: None)
        self.expect(Welcome)

    def expect(self, kind):
        return recv_message(self.sock, kind, lambda: None)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def is_closed_by_the_owner(self) -> bool:
        self.sock.settimeout(10)
        with contextlib.suppress(ConnectionError):
            return self.sock.recv(1) == b""
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.sock.close()


def still_works(engine: TransferEngine, make_engine) -> None:
    other = make_engine()
    mine, theirs = other.allocate(4096), engine.allocate(4096)
    other.transfer(Opcode.READ, engine.name, mine.address, theirs.address, 4096, transport="tcp")


@pytest.mark.parametrize("op", list(Opcode))
def test_only_the_granted_range_is_reached(make_engine, op):
    engine = make_engine()
    whole = np.zeros(3 * 4096, np.uint8)
    whole[:] = 7
    middle = engine.register(whole[4096:8192])
    start = middle.address
    with Raw(engine) as raw:
        for key, address, size in (
            (middle.key, start - 1, 2),
            (middle.key, start + 4095, 2),
            (middle.key, start, 4097),
            (middle.key, start - 4096, 4096),
            (middle.key, 2**64 - 8, 16),
            (middle.key, 0, 8),
            (bytes(16), start, 8),
            (middle.key[::-1], start, 8),
        ):
            raw.sock.sendall(encode_request(op, [(key, address, size)]) + (b"\1" * size if op else b""))
            assert raw.read(ANSWER.size + 1)[-1] == 1
        raw.sock.sendall(encode_request(op, [(middle.key, start, 4)]) + (b"\2" * 4 if op else b""))
        assert raw.read(ANSWER.size)[4] == 0  # the connection still serves
    assert (whole[:4096] == 7).all()
    assert (whole[8192:] == 7).all()
    assert (whole[4096:4100] == (2 if op else 7)).all()
    assert (whole[4100:8192] == 7).all()


def test_overlapping_entries_stay_inside(make_engine):
    engine = make_engine()
    buffer = engine.register(np.zeros(4096, np.uint8))
    with Raw(engine) as raw:
        raw.sock.sendall(
            encode_request(
                Opcode.WRITE, [(buffer.key, buffer.address, 8), (buffer.key, buffer.address + 4, 8)]
            )
            + b"\1" * 8
            + b"\2" * 8
        )
        raw.read(ANSWER.size)
    assert bytes(buffer.view[:13]) == b"\1" * 4 + b"\2" * 8 + b"\0"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        bytes(REQUEST.size),
        b"\xff" * 200,
        struct.pack("<IBBHIQ", 0x314B434D, 1, 0, 1, 1, 1 << 60).ljust(REQUEST.size, b"\0"),
        struct.pack("<IBBHIQ", 0x314B434D, 0, 0, 9, 5, 10).ljust(REQUEST.size, b"\0"),
    ],
    ids=["http", "zeros", "ones", "huge", "more keys than entries"],
)
def test_garbage_ends_its_connection_only(make_engine, garbage):
    engine = make_engine()
    with Raw(engine) as raw:
        raw.sock.sendall(garbage)
        assert raw.is_closed_by_the_owner()
    still_works(engine, make_engine)


_LINKS = itertools.count(10)


@pytest.fixture
def fuzzed(make_engine):
    return make_engine()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=300), greeted=st.booleans())
def test_no_bytes_bring_an_engine_down(fuzzed, data, greeted):
    engine = fuzzed
    if greeted:
        with Raw(engine, link=next(_LINKS)) as raw:
            raw.sock.sendall(data)
    else:
        with socket.create_connection(("127.0.0.1", engine.port), timeout=10) as sock:
            sock.sendall(data)
    with Raw(engine, link=next(_LINKS)):
        pass  # it still greets


@pytest.mark.parametrize("cut", [1, 20, REQUEST.size, REQUEST.size + 100])
def test_half_a_request_and_silence_is_given_up_after_a_bound(make_engine, monkeypatch, cut):
    monkeypatch.setattr("transfer.tcp_server.STALL_S", 0.3)
    engine = make_engine()
    buffer = engine.register(np.zeros(4096, np.uint8))
    with Raw(engine) as raw:
        whole = encode_request(Opcode.WRITE, [(buffer.key, buffer.address, 4096)]) + b"\1" * 4096
        raw.sock.sendall(whole[:cut])
        raw.sock.shutdown(socket.SHUT_WR)  # half closed
        assert raw.is_closed_by_the_owner()
    engine.unregister(buffer, 5.0)
    assert not any(buffer.view[max(0, cut - REQUEST.size) :])


def test_a_buffer_held_by_a_stalled_writer_can_be_taken_back(make_engine):
    engine = make_engine()
    buffer = engine.register(np.zeros(4096, np.uint8))
    with Raw(engine) as raw:
        raw.sock.sendall(encode_request(Opcode.WRITE, [(buffer.key, buffer.address, 4096)]) + b"\1" * 10)
        while not buffer.uses:
            time.sleep(0.001)
        engine.unregister(buffer, 0.2)
        with contextlib.suppress(OSError):
            raw.sock.sendall(b"\1" * 4086)
        assert raw.is_closed_by_the_owner()
    assert bytes(buffer.owner[10:]) == bytes(4086)


def test_a_silent_visitor_is_shown_out(make_engine, monkeypatch):
    monkeypatch.setattr("transfer.control.GREETING_S", 0.3)
    engine = make_engine()
    with socket.create_connection(("127.0.0.1", engine.port), timeout=10) as sock:
        while sock.recv(4096):
            pass
    still_works(engine, make_engine)


def test_an_owner_that_babbles_is_an_error(make_engine):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def babble() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    with sock:
                        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello hello hello hello")

        threading.Thread(target=babble, daemon=True).start()
        with pytest.raises(MooncakeError):
            make_engine().peer(f"127.0.0.1:{server.getsockname()[1]}", deadline_s=5.0)


def test_an_owner_that_says_nothing_costs_the_deadline(make_engine):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(PeerTimeout):
        make_engine().peer(f"127.0.0.1:{server.getsockname()[1]}", deadline_s=0.5)


def test_an_engine_of_another_version_is_named(make_engine):
    engine = make_engine()
    with socket.create_connection(("127.0.0.1", engine.port), timeout=10) as sock:
        send_message(sock, Hello(VERSION + 1, "control", "f" * 32, "new", 0, bytes(16)), lambda: None)
        answer = sock.recv(4096)
    assert b"version" in answer


def test_out_of_descriptors_is_an_error_and_passes(make_engine):
    here, there = make_engine(), make_engine()
    mine, theirs = here.allocate(4096), there.allocate(4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(PeerError):
            here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, deadline_s=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, deadline_s=20.0)


def test_the_wire_codec_refuses_what_it_does_not_know():
    with pytest.raises(MooncakeError):
        wire.decode(b"\x91\xa3foo", Hello)


def test_requests_to_a_gone_peer_fail_at_once_not_at_the_deadline(make_engine):
    here, there = make_engine(), make_engine()
    mine, theirs = here.allocate(4096), there.allocate(4096)
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096)
    there.close()
    start_s = time.monotonic()

    def read_until_noticed() -> None:
        while True:  # mapped memory outlives its owner until the end of the connection is seen
            here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096, deadline_s=60.0)

    with pytest.raises((PeerGone, RequestError)):
        read_until_noticed()
    assert time.monotonic() - start_s < 20
