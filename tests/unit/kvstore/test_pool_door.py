"""The short way in: the same answers as over ZMQ, in order, and a lost store is an error at once."""

import asyncio
import errno
import os
import signal
import socket
import struct
import threading
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from kvstore.engine.door import DoorClient
from kvstore.node.finding import ELSEWHERE, INLINE, find
from kvstore.node.node import Node
from kvstore.store.door import Door
from mooncake.core import wire
from mooncake.core.errors import CapacityError, PeerGone, PeerTimeout, ProtocolError, RequestError
from mooncake.core.messages import Commit, Committed, Find, Findings, Ok, Release, Reserve, Reserved, Stats

SIZE = 5000
PATIENCE_S = 20.0


def key(number: int) -> bytes:
    return sha256(b"door %d" % number).digest()


def rows(findings: Findings) -> tuple[list[int], list[int]]:
    return np.frombuffer(findings.offsets, "<i8").tolist(), np.frombuffer(findings.sizes, "<i8").tolist()


@pytest.fixture
def door(shared_store):
    client = DoorClient(shared_store.record.door)
    yield client
    client.close()


def put(door: DoorClient, *numbers: int) -> Reserved:
    room = door.call(Reserve("w", [key(n) for n in numbers], SIZE), PATIENCE_S)
    sums = [bytes([n % 256]) * 16 for n in numbers]
    assert door.call(Commit(room.tickets, sums), PATIENCE_S) == Committed([True] * len(numbers))
    return room


def test_keys_are_found_in_any_order_with_gaps_and_twice(door):
    room = put(door, 1, 2)
    found = door.call(Find(key(2) + key(99) + key(1) + key(2), 5.0), PATIENCE_S)
    offsets, sizes = rows(found)
    assert sizes == [SIZE, 0, SIZE, SIZE]
    assert offsets == [room.offsets[1], ELSEWHERE, room.offsets[0], room.offsets[1]]
    assert found.checksums == b"\x02" * 16 + bytes(16) + b"\x01" * 16 + b"\x02" * 16
    leases = door.call(Stats(), PATIENCE_S).leases
    assert door.call(Release(found.lease_id), PATIENCE_S) == Ok()
    assert door.call(Stats(), PATIENCE_S).leases == leases - 1


def test_small_objects_come_with_the_answer_and_are_not_leased():
    memory = memoryview(bytes(range(256)) * 4096)
    node = Node(1 << 20)
    for n, size in ((1, 100), (2, 5000), (3, 200)):
        node.commit(0, node.reserve(0, "w", [key(n)], size).tickets, [bytes(16)])
    before = node.stats()
    order: list[bytes] = []
    node.policy.touch = lambda key: order.append(key)

    def ask(lease_s: float, *numbers: int) -> Findings:
        request = Find(b"".join(map(key, numbers)), lease_s, 200)
        return find(node, 1.0, request, None, lambda at, size: memory[at : at + size])

    found = ask(9.0, 3, 9, 2, 1)
    offsets, sizes = rows(found)
    assert sizes == [200, 0, 5000, 100]
    assert offsets[0] == offsets[3] == INLINE
    places = [node.block_of(key(n)).offset for n in (3, 1)]
    assert found.data == bytes(memory[places[0] :][:200]) + bytes(memory[places[1] :][:100])
    assert found.lease_id
    assert node.stats().leases == 1
    assert order == [key(3), key(1)], "they were used"
    assert node.drop(1.0, [key(3), key(1)]) == 2
    assert node.stats().used_bytes < before.used_bytes, "not leased: their room is free at once"
    node.release(1.0, found.lease_id)
    assert ask(9.0, 3).lease_id == 0


def test_a_look_takes_no_lease_and_counts_as_no_use(door):
    put(door, 11)
    before = door.call(Stats(), PATIENCE_S)
    assert door.call(Find(key(11) + key(12)), PATIENCE_S).lease_id == 0
    after = door.call(Stats(), PATIENCE_S)
    assert (after.hits, after.misses, after.leases) == (before.hits, before.misses, before.leases)


def test_what_is_told_is_done_before_what_is_asked_next(door):
    put(door, 21)
    for _ in range(20):
        found = door.call(Find(key(21), 30.0), PATIENCE_S)
        door.tell(Release(found.lease_id))
    assert door.call(Stats(), PATIENCE_S).leases == 0


def test_what_is_told_is_done_soon_without_any_call(door, shared_store):
    put(door, 22)
    other = DoorClient(shared_store.record.door)
    for _ in range(3):  # the first one starts what sends them, the others may find it at work
        found = door.call(Find(key(22), 30.0), PATIENCE_S)
        door.tell(Release(found.lease_id))
        end_s = time.monotonic() + PATIENCE_S
        while other.call(Stats(), PATIENCE_S).leases:
            assert time.monotonic() < end_s
    other.close()


def test_what_was_told_is_sent_at_the_end(shared_store):
    door, other = DoorClient(shared_store.record.door), DoorClient(shared_store.record.door)
    put(door, 23)
    held = [door.call(Find(key(23), 30.0), PATIENCE_S).lease_id for _ in range(100)]
    for lease_id in held:  # more than are kept back
        door.tell(Release(lease_id))
    door.close()
    end_s = time.monotonic() + PATIENCE_S
    while other.call(Stats(), PATIENCE_S).leases:
        assert time.monotonic() < end_s
    other.close()


def test_the_store_s_refusals_arrive_as_what_they_are_and_the_connection_stays_good(door):
    with pytest.raises(RequestError, match="no list of keys"):
        door.call(Find(b"short"), PATIENCE_S)
    with pytest.raises(RequestError, match="lease_s"):
        door.call(Find(key(1), float("nan")), PATIENCE_S)
    put(door, 31)


def test_threads_do_not_get_each_other_s_answers(door):
    numbers = range(100, 108)
    room = put(door, *numbers)
    wrong: list[int] = []

    def look(n: int) -> None:
        for _ in range(50):
            offsets, _ = rows(door.call(Find(key(n)), PATIENCE_S))
            if offsets != [room.offsets[n - 100]]:
                wrong.append(n)

    threads = [threading.Thread(target=look, args=(n,)) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_big_batch_passes_in_pieces(door):
    blob = b"".join(key(n) for n in range(16_384))
    offsets, sizes = rows(door.call(Find(blob), PATIENCE_S))
    assert len(offsets) == len(sizes) == 16_384
    with pytest.raises(RequestError, match="at most"):
        door.call(Find(blob + key(1)), PATIENCE_S)


def test_a_stopped_store_is_a_timeout_and_a_dead_one_is_gone(start_store):
    store = start_store()
    door = DoorClient(store.record.door)
    put(door, 1)
    store.signal(signal.SIGSTOP)
    with pytest.raises(PeerTimeout):
        door.call(Stats(), 0.1)
    store.signal(signal.SIGCONT)
    assert door.call(Stats(), PATIENCE_S).commits == 1
    store.kill()
    for _ in range(2):
        with pytest.raises(PeerGone):
            door.call(Stats(), PATIENCE_S)


@pytest.mark.parametrize("words", [b"\xff" * 4096, struct.pack("<II", 3, 1) + b"abc", b"\x01"])
def test_nonsense_harms_nobody_else(shared_store, door, words):
    with socket.socket(socket.AF_UNIX) as rude:
        rude.settimeout(PATIENCE_S)
        rude.connect(shared_store.record.door)
        rude.sendall(words)
        assert door.call(Stats(), PATIENCE_S)
        rude.shutdown(socket.SHUT_WR)
        while rude.recv(4096):
            pass


def test_the_socket_file_goes_with_the_store(start_store):
    store = start_store()
    door = DoorClient(store.record.door)
    assert door.call(Stats(), PATIENCE_S).blocks == 0
    assert Path(store.record.door).stat().st_mode & 0o777 == 0o600
    assert store.stop() == 0
    assert not Path(store.record.door).exists()
    door.close()


async def test_a_call_that_waits_keeps_its_place_and_others_pass(tmp_path):
    let = asyncio.Event()
    seen: list[str] = []

    async def later(request):
        await let.wait()
        seen.append("later")
        return Ok()

    def now(request):
        if isinstance(request, Stats):
            return None
        seen.append("now")
        return Ok()

    server = Door(str(tmp_path / "door"), now, later)
    server.start()
    slow, quick = DoorClient(server.path.as_posix()), DoorClient(server.path.as_posix())
    waiting = asyncio.create_task(asyncio.to_thread(slow.call, Stats(), PATIENCE_S))
    assert await asyncio.to_thread(quick.call, Release(1), PATIENCE_S) == Ok()
    assert not waiting.done()
    let.set()
    assert await waiting == Ok()
    assert seen == ["now", "later"]
    assert await asyncio.to_thread(slow.call, Release(1), PATIENCE_S) == Ok()
    let.clear()
    waiting = asyncio.create_task(asyncio.to_thread(slow.call, Stats(), PATIENCE_S))
    await asyncio.to_thread(quick.call, Release(1), PATIENCE_S)
    await server.close()
    with pytest.raises(PeerGone):
        await waiting
    slow.close()
    with pytest.raises(PeerGone):
        slow.call(Stats(), PATIENCE_S)
    quick.close()


async def test_a_handler_s_bug_is_an_answer_and_the_door_stays_open(tmp_path):
    def now(request):
        raise ZeroDivisionError

    server = Door(str(tmp_path / "door"), now, None)
    server.start()
    client = DoorClient(server.path.as_posix())
    from mooncake.core.errors import MooncakeError

    for _ in range(2):
        with pytest.raises(MooncakeError, match="ZeroDivisionError"):
            await asyncio.to_thread(client.call, Stats(), PATIENCE_S)
    client.close()
    await server.close()


def test_an_answer_that_is_none_is_a_protocol_error(tmp_path):
    path = str(tmp_path / "fake")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve(answer: bytes) -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(4096)
                caller.sendall(answer)

        body = wire.encode(Ok())
        for answer in (struct.pack("<II", 1, 1) + b"x", struct.pack("<II", len(body), 1) + body + b"more"):
            thread = threading.Thread(target=serve, args=(answer,))
            thread.start()
            client = DoorClient(path)
            with pytest.raises(ProtocolError):
                client.call(Stats(), PATIENCE_S)
            thread.join()
            client.close()


def test_find_counts_leases_and_refuses_like_acquire():
    from kvstore.limits import NodeLimits

    node = Node(1 << 20, NodeLimits(leases_max=1))
    room = node.reserve(0, "w", [key(1)], SIZE)
    node.commit(0, room.tickets, [bytes(16)])
    blob = key(1) + key(2)

    def ask(lease_s: float) -> Findings:
        return find(node, 1.0, Find(blob, lease_s), lambda k: 77 * (k == key(2)), None)

    first = ask(1.0)
    assert rows(first) == ([room.offsets[0], ELSEWHERE], [SIZE, 77])
    assert (node.hits, node.misses) == (1, 1)
    with pytest.raises(CapacityError):
        ask(1.0)
    node.release(1.0, first.lease_id)
    assert ask(1.0).lease_id


def test_callers_beyond_the_bound_are_turned_away_not_left_waiting(tmp_path, monkeypatch):
    from kvstore.store import door as pool_door

    monkeypatch.setattr(pool_door, "CONNECTIONS_MAX", 1)

    async def go() -> None:
        server = Door(str(tmp_path / "door"), lambda request: Ok(), None)
        server.start()
        first, second = DoorClient(str(server.path)), DoorClient(str(server.path))
        assert await asyncio.to_thread(first.call, Stats(), PATIENCE_S) == Ok()
        with pytest.raises(PeerGone):
            await asyncio.to_thread(second.call, Stats(), PATIENCE_S)
        first.close()
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                await asyncio.to_thread(second.call, Stats(), PATIENCE_S)
                break
            except PeerGone:
                assert time.monotonic() < end_s
        second.close()
        await server.close()

    asyncio.run(go())
    assert os.listdir(tmp_path) == []


def test_a_store_without_descriptors_lets_callers_in_when_it_has_some_again(tmp_path):
    class Full:
        """The door's socket while every descriptor is in use, which one look finds out."""

        def __init__(self, real: socket.socket) -> None:
            self.fileno, self.close, self._real = real.fileno, real.close, real
            self.looks = 0

        def accept(self):
            self.looks += 1
            if self.looks == 1:
                raise OSError(errno.EMFILE, "no descriptor")
            return self._real.accept()

    async def go() -> None:
        server = Door(str(tmp_path / "door"), lambda request: Ok(), None)
        full = server._socket = Full(server._socket)
        server.start()
        client = DoorClient(str(server.path))
        call = asyncio.create_task(asyncio.to_thread(client.call, Stats(), PATIENCE_S))
        while not full.looks:  # noqa: ASYNC110 - the door's own task is none that could be awaited
            await asyncio.sleep(0)
        assert not asyncio.get_running_loop().remove_reader(full), "meanwhile it looks for nobody"
        assert await call == Ok()
        assert full.looks == 2
        client.close()
        await server.close()

    asyncio.run(go())
