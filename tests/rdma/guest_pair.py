"""Run inside two VMs at the ends of one cable: the two backends talk to each other over a network.

    python guest_pair.py server pyverbs     |     python guest_pair.py client ibverbs SERVER_ADDRESS

The client prints "PASS|FAIL pair check seconds detail"; the server does as it is told, over TCP.
"""

import socket
import subprocess
import sys
import time
from typing import BinaryIO

import msgspec
import numpy as np

from tests.rdma.guest_verbs import DONE, FLUSHED, UNREACHABLE, collect, until
from transfer.messages import QpInfo
from transfer.model import Opcode
from transfer.verbs import load
from transfer.verbs.api import Nic, QueuePair, Work

TCP_PORT = 7471
BLOCK_BYTES = 64 << 10
BLOCKS = 32
SIZE_BYTES = BLOCK_BYTES * BLOCKS
TIMEOUT_S = 100.0
SILENT_S = 8.0
"""The server stays that long without a word of goodbye."""


class Answer(msgspec.Struct):
    """From the server."""

    qp: QpInfo
    address: int
    rkey: int


class Hash(msgspec.Struct):
    """From the server: the sum of its memory, weighted so that order matters."""

    total: int


def weighted(array: np.ndarray) -> int:
    return int(np.dot(array.astype(np.int64), np.arange(1, len(array) + 1)))


def opened(backend: str) -> Nic:
    loaded = load(backend)
    assert loaded.verbs is not None, loaded.reason
    return loaded.verbs.open("rxe0")


def server(backend: str) -> None:
    nic = opened(backend)
    target = np.zeros(SIZE_BYTES, np.uint8)
    memory = nic.register(target.ctypes.data, SIZE_BYTES)
    with socket.create_server(("0.0.0.0", TCP_PORT)) as listener:
        listener.settimeout(TIMEOUT_S)
        print("listening", flush=True)
        link = listener.accept()[0]
    link.settimeout(TIMEOUT_S)
    pairs = []
    with link, link.makefile("rwb") as stream:
        for line in stream:
            if line == b"hash\n":
                answer = msgspec.json.encode(Hash(weighted(target)))
            elif line == b"unplug\n":
                # Another MAC: what the peer sends is dropped without a word, as by a dead machine. (With the
                # link down, this VM's end of the cable would push back instead and stall the peer's NIC.)
                subprocess.run(["ip", "link", "set", "eth0", "address", "52:54:00:00:00:77"], check=True)
                time.sleep(SILENT_S)
                return
            else:
                pair = nic.queue_pair()
                pairs.append(pair)
                pair.connect(msgspec.json.decode(line, type=QpInfo))
                answer = msgspec.json.encode(Answer(pair.local(), target.ctypes.data, memory.rkey))
            stream.write(answer + b"\n")
            stream.flush()


class Client:
    """The initiator, with its memory of SIZE_BYTES."""

    def __init__(self, nic: Nic, stream: BinaryIO) -> None:
        self.nic = nic
        self.stream = stream
        self.mine = np.random.default_rng(3).integers(1, 256, SIZE_BYTES, dtype=np.uint8)
        self.memory = nic.register(self.mine.ctypes.data, SIZE_BYTES)

    def ask(self, line: bytes) -> bytes:
        self.stream.write(line + b"\n")
        self.stream.flush()
        return self.stream.readline() if line != b"unplug" else b""

    def pair(self) -> tuple[QueuePair, Answer]:
        pair = self.nic.queue_pair()
        answer = msgspec.json.decode(self.ask(msgspec.json.encode(pair.local())), type=Answer)
        pair.connect(answer.qp)
        return pair, answer

    def blocks(self, op: Opcode, answer: Answer) -> list[Work]:
        local, lkey = self.mine.ctypes.data, self.memory.lkey
        return [
            Work(i, op, local + at, lkey, answer.address + at, answer.rkey, BLOCK_BYTES)
            for i, at in enumerate(range(0, SIZE_BYTES, BLOCK_BYTES))
        ]


def bytes_cross_between_two_machines(client: Client) -> str:
    pair, answer = client.pair()
    rates = []
    before = client.mine.copy()
    for op in (Opcode.WRITE, Opcode.READ):
        if op is Opcode.READ:
            hashed = msgspec.json.decode(client.ask(b"hash"), type=Hash)
            assert hashed.total == weighted(before)  # it is there
            client.mine[:] = 0
        started_s = time.monotonic()
        pair.post(client.blocks(op, answer))
        done = collect(pair, BLOCKS)
        rates.append(f"{op.name} {SIZE_BYTES / 1e6 / (time.monotonic() - started_s):.1f} MB/s")
        assert [each.status for each in done] == [DONE] * BLOCKS, done
    assert np.array_equal(client.mine, before)  # and came back
    pair.close()
    return ", ".join(rates)


def closing_our_queue_pair_ends_a_read(client: Client) -> str:
    pair, answer = client.pair()
    client.mine[:] = 0
    pair.post(client.blocks(Opcode.READ, answer))
    collect(pair, 2)
    pair.close()
    after = client.mine.copy()
    moved = np.count_nonzero(after) // BLOCK_BYTES
    assert moved < BLOCKS, "it was not in the middle"
    assert not until(lambda: pair.poll(BLOCKS) != [], 1.0)
    assert np.array_equal(client.mine, after)
    return f"{moved} of {BLOCKS} moved"


def a_dead_machine_is_unreachable_within_two_seconds(client: Client) -> str:
    pair, answer = client.pair()
    pair.post(client.blocks(Opcode.WRITE, answer)[:2])
    assert [each.status for each in collect(pair, 2)] == [DONE, DONE]
    client.ask(b"unplug")
    time.sleep(1.0)  # nobody can tell us that it is dead; by then it is
    started_s = time.monotonic()
    pair.post(client.blocks(Opcode.WRITE, answer)[:8])
    done = collect(pair, 8)
    took_s = time.monotonic() - started_s
    assert [each.status for each in done] == [UNREACHABLE] + [FLUSHED] * 7, done
    assert took_s < 2, took_s
    pair.close()
    return f"{took_s:.2f} s"


CHECKS = (
    bytes_cross_between_two_machines,
    closing_our_queue_pair_ends_a_read,
    a_dead_machine_is_unreachable_within_two_seconds,
)


def connect(address: str) -> socket.socket:
    """The other machine may still be starting."""
    made: list[socket.socket] = []

    def attempt() -> bool:
        try:
            made.append(socket.create_connection((address, TCP_PORT), timeout=TIMEOUT_S))
        except OSError:
            time.sleep(0.2)
        return bool(made)

    assert until(attempt, TIMEOUT_S), f"no server at {address}"
    return made[0]


def client(backend: str, address: str) -> None:
    nic = opened(backend)
    with connect(address) as link, link.makefile("rwb") as stream:
        initiator = Client(nic, stream)
        for check in CHECKS:
            started_s = time.monotonic()
            detail = check(initiator)
            print("PASS pair", check.__name__, f"{time.monotonic() - started_s:.2f}s", detail, flush=True)


if __name__ == "__main__":
    {"server": server, "client": client}[sys.argv[1]](*sys.argv[2:])
