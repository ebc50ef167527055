"""Run inside a VM: what a verbs backend promises, seen on a real (software) device.

    python guest_verbs.py BACKEND        prints "PASS|FAIL BACKEND check seconds detail" for each check

Both ends are queue pairs of this process, on one device that talks to itself.
"""

import contextlib
import ctypes
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import numpy as np

from mooncake.core.errors import CapacityError, ConfigError, PeerGone, RequestError
from transfer.messages import QpInfo
from transfer.model import Opcode
from transfer.verbs import load
from transfer.verbs.api import Done, Nic, QueuePair, Verbs, Work, WorkStatus

BLOCK_BYTES = 128 << 10
BATCH = 100
"""12.5 MiB: 0.15 s on this device. It sends the first 8 MiB before `post` returns; then comes the middle."""
PATIENCE_S = 30.0
"""For what must happen; the device is slow where the host is busy."""
LEAK_BYTES_MAX = 32 << 10
"""2,048 dropped requests of pyverbs are 128 KiB."""

DONE, REFUSED, FLUSHED, UNREACHABLE = (
    WorkStatus.DONE,
    WorkStatus.REFUSED,
    WorkStatus.FLUSHED,
    WorkStatus.UNREACHABLE,
)


class Rig:
    """Two connected queue pairs and two registered arrays."""

    def __init__(self, nic: Nic, blocks: int) -> None:
        self.nic = nic
        rng = np.random.default_rng(7)
        self.source = rng.integers(1, 256, blocks * BLOCK_BYTES, dtype=np.uint8)  # no zero in it
        self.target = np.zeros(blocks * BLOCK_BYTES, np.uint8)
        self.here = nic.register(self.source.ctypes.data, self.source.nbytes)
        self.there = nic.register(self.target.ctypes.data, self.target.nbytes)
        self.near, self.far = nic.queue_pair(), nic.queue_pair()
        self.near.connect(self.far.local())
        self.far.connect(self.near.local())

    def work(
        self, work_id: int, op: Opcode, offset: int, size: int, remote_offset: int | None = None
    ) -> Work:
        remote = self.target.ctypes.data + (offset if remote_offset is None else remote_offset)
        local = self.source.ctypes.data + offset
        return Work(work_id, op, local, self.here.lkey, remote, self.there.rkey, size)

    def blocks(self, op: Opcode = Opcode.WRITE) -> list[Work]:
        count = len(self.source) // BLOCK_BYTES
        return [self.work(i, op, i * BLOCK_BYTES, BLOCK_BYTES) for i in range(count)]

    def close(self) -> None:
        for each in (self.near, self.far, self.here, self.there):
            each.close()


@contextlib.contextmanager
def rig(nic: Nic, blocks: int = 2) -> Iterator[Rig]:
    made = Rig(nic, blocks)
    try:
        yield made
    finally:
        made.close()


def collect(pair: QueuePair, count: int, seconds: float = PATIENCE_S) -> list[Done]:
    end_s = time.monotonic() + seconds
    done: list[Done] = []
    while len(done) < count and time.monotonic() < end_s:
        done += pair.poll(count - len(done))
    return done


def run(pair: QueuePair, works: list[Work], seconds: float = PATIENCE_S) -> list[WorkStatus]:
    pair.post(works)
    done = collect(pair, len(works), seconds)
    assert [each.work_id for each in done] == [each.work_id for each in works], done
    return [each.status for each in done]


def until(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
    end_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.01)
    return condition()


class MallInfo2(ctypes.Structure):
    """glibc's own count, exact to the byte: RSS hides small leaks in what was free before."""

    _names = (
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "used",
        "free",
        "keepcost",
    )
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def malloc_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    return int(mallinfo2().used)


# ---------------------------------------------------------------- checks: (verbs, nic) -> detail


def port_is_described(verbs: Verbs, nic: Nic) -> str:
    info = nic.info
    assert verbs.devices() == ["rxe0"]
    assert info.gid == bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1]), info
    assert (info.mtu, info.link_layer, info.name, info.port) == (4096, "ethernet", "rxe0", 1), info
    assert nic.is_up()
    return f"gid index {info.gid_index}, depth {nic.depth}"


def what_is_not_there_is_a_config_error(verbs: Verbs, nic: Nic) -> str:
    for arguments in (("mlx5_9", 1, None), ("rxe0", 9, None), ("rxe0", 1, 200), ("rxe0", 1, 9999)):
        with_error = None
        try:
            verbs.open(*arguments)
        except ConfigError as error:
            with_error = error
        assert with_error is not None, arguments
    return ""


def write_and_read_move_the_bytes(verbs: Verbs, nic: Nic) -> str:
    with rig(nic, 16) as r:
        assert run(r.near, r.blocks()) == [DONE] * 16
        assert np.array_equal(r.source, r.target)
        wanted = r.target[::-1].copy()
        r.target[:] = wanted
        assert run(r.near, r.blocks(Opcode.READ)) == [DONE] * 16
        assert np.array_equal(r.source, wanted)
        return f"{r.source.nbytes} bytes each way"


def unaligned_ranges_move_and_touch_nothing_else(verbs: Verbs, nic: Nic) -> str:
    with rig(nic, 4) as r:
        works, expected = [], r.target.copy()
        for i, (offset, size, remote) in enumerate([(1, 1, 3), (4095, 2, 8191), (12345, 70001, 200001)]):
            works.append(r.work(i, Opcode.WRITE, offset, size, remote))
            expected[remote : remote + size] = r.source[offset : offset + size]
        assert run(r.near, works) == [DONE] * len(works)
        assert np.array_equal(r.target, expected)
        part = nic.register(r.target.ctypes.data + 333, 777)  # registration need not be aligned either
        work = Work(
            9, Opcode.WRITE, r.source.ctypes.data, r.here.lkey, r.target.ctypes.data + 333, part.rkey, 777
        )
        assert run(r.near, [work]) == [DONE]
        expected[333:1110] = r.source[:777]
        assert np.array_equal(r.target, expected)
        part.close()
    return ""


def shared_memory_can_be_registered(verbs: Verbs, nic: Nic) -> str:
    with rig(nic) as r:
        fd = os.memfd_create("pool")
        os.ftruncate(fd, 1 << 20)
        pool, other = mmap.mmap(fd, 1 << 20), mmap.mmap(fd, 1 << 20)
        first_byte = ctypes.c_char.from_buffer(pool)
        address = ctypes.addressof(first_byte)
        memory = nic.register(address, 1 << 20)
        work = Work(1, Opcode.WRITE, r.source.ctypes.data, r.here.lkey, address + 4097, memory.rkey, 100_000)
        assert run(r.near, [work]) == [DONE]
        assert other[4097:104_097] == r.source[:100_000].tobytes()  # seen by the other mapping
        memory.close()
        del first_byte
        pool.close()
        other.close()
        os.close(fd)
    return ""


def what_is_not_writable_memory_is_refused(verbs: Verbs, nic: Nic) -> str:
    fd = os.memfd_create("read-only")
    os.ftruncate(fd, 4096)
    constant = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
    read_only = np.frombuffer(constant, np.uint8).ctypes.data
    for address, size in ((0x10_0000_0000, 4096), (read_only, 4096), (0, 4096), (read_only, 0)):
        refused = False
        try:
            nic.register(address, size)
        except RequestError:
            refused = True
        assert refused, (address, size)
    os.close(fd)
    return ""


def no_dma_buf_is_a_capacity_error(verbs: Verbs, nic: Nic) -> str:
    fd = os.memfd_create("no dma-buf")
    os.ftruncate(fd, 4096)
    try:
        nic.register_dmabuf(fd, 0, 1 << 40, 4096)
    except CapacityError as error:
        return str(error)
    finally:
        os.close(fd)
    raise AssertionError("registered")


def a_wrong_key_is_refused(verbs: Verbs, nic: Nic) -> str:
    for op in Opcode:
        with rig(nic) as r:
            before = r.source.copy()
            good = r.work(0, op, 0, 4096)
            bad = Work(1, op, good.local, good.lkey, good.remote, good.rkey ^ 0x5A00, 4096)
            after = r.work(2, op, 4096, 4096)
            r.near.post([bad, after])
            done = collect(r.near, 2)
            assert [each.status for each in done] == [REFUSED, FLUSHED], done
            assert not r.target.any()
            assert np.array_equal(r.source, before)
    return done[0].detail


def out_of_range_is_refused(verbs: Verbs, nic: Nic) -> str:
    for op in Opcode:
        with rig(nic) as r:
            before = r.source.copy()
            assert run(r.near, [r.work(0, op, 0, 4096, r.target.nbytes - 4095)]) == [REFUSED]
            assert not r.target.any()
            assert np.array_equal(r.source, before)
    return ""


def a_closed_memory_is_refused(verbs: Verbs, nic: Nic) -> str:
    with rig(nic) as r:
        keys = r.there.lkey, r.there.rkey
        r.there.close()
        r.there.close()
        assert (r.there.lkey, r.there.rkey) == keys  # plain numbers
        assert run(r.near, [r.work(0, Opcode.WRITE, 0, 4096)]) == [REFUSED]
    return ""


def a_closed_remote_queue_pair_is_unreachable_within_two_seconds(verbs: Verbs, nic: Nic) -> str:
    with rig(nic, BATCH) as r:
        r.near.post(r.blocks())
        seen = collect(r.near, 4)
        r.far.close()
        started_s = time.monotonic()
        r.near.post([r.work(100 + i, Opcode.READ, i * 64, 64) for i in range(4)])
        seen += collect(r.near, BATCH + 4 - len(seen))
        took_s = time.monotonic() - started_s
        statuses = [each.status for each in seen]
        good = statuses.count(DONE)
        assert len(statuses) == BATCH + 4, len(statuses)
        assert statuses[:good] == [DONE] * good
        assert statuses[good:] == [UNREACHABLE] + [FLUSHED] * (BATCH + 3 - good), statuses
        assert took_s < 2, took_s
        return f"{good} done, first failure after {took_s:.2f} s: {seen[good].detail}"


def closing_our_queue_pair_is_a_fence(verbs: Verbs, nic: Nic) -> str:
    """With WRITE; a READ from oneself is over when `post` returns (guest_pair.py has the READ)."""
    with rig(nic, BATCH) as r:
        r.near.post(r.blocks())
        seen = len(collect(r.near, 4))
        r.near.close()
        after = r.target.copy()
        moved = np.count_nonzero(after) // BLOCK_BYTES
        assert moved < BATCH, "it was not in the middle"
        assert not until(lambda: r.near.poll(BATCH) != [], 0.3)  # the rest never completes
        assert np.array_equal(r.target, after)
        refused = False
        try:
            r.near.post([r.work(0, Opcode.WRITE, 0, 8)])
        except PeerGone:
            refused = True
        assert refused
        return f"{moved} of {BATCH} moved, {BATCH - seen} never completed"


def late_bytes(nic: Nic, stop: Callable[[Rig], None], first: WorkStatus) -> str:
    with rig(nic, BATCH) as r:
        r.near.post(r.blocks())
        seen = len(collect(r.near, 4))
        stop(r)
        r.target[:] = 0
        statuses = [each.status for each in collect(r.near, BATCH - seen)]
        assert len(statuses) == BATCH - seen
        good = statuses.count(DONE)
        assert statuses[good:] == [first] + [FLUSHED] * (len(statuses) - good - 1), statuses
        assert not r.target.any()
        return f"{len(statuses) - good} of {BATCH} stopped, no late byte"


def closing_the_target_queue_pair_is_a_fence(verbs: Verbs, nic: Nic) -> str:
    return late_bytes(nic, lambda r: r.far.close(), UNREACHABLE)


def closing_the_target_memory_is_a_fence(verbs: Verbs, nic: Nic) -> str:
    return late_bytes(nic, lambda r: r.there.close(), REFUSED)


def closing_from_another_thread_ends_a_busy_lane(verbs: Verbs, nic: Nic) -> str:
    said = ""
    for _ in range(5):
        with rig(nic) as r:
            lane = Lane(r)
            assert lane.busy.wait(PATIENCE_S)
            r.near.close()
            lane.closed.set()
            lane.join(PATIENCE_S)
            assert not lane.is_alive()
            said = lane.said
            assert "closed" in said, said
    return said


class Lane(threading.Thread):
    """Posts and polls until it is told that its queue pair is closed."""

    def __init__(self, r: Rig) -> None:
        super().__init__(daemon=True)
        self.rig = r
        self.said = ""
        self.busy, self.closed = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        works = [self.rig.work(i, Opcode.WRITE, i * 64, 64) for i in range(16)]
        try:
            while True:
                self.rig.near.post(works)
                self.busy.set()
                got = 0
                while got < len(works) and not self.closed.is_set():
                    got += len(self.rig.near.poll(len(works)))
        except PeerGone as error:
            self.said = str(error)


def a_new_queue_pair_works_after_a_failure(verbs: Verbs, nic: Nic) -> str:
    with rig(nic) as r:
        bad = Work(1, Opcode.WRITE, r.source.ctypes.data, r.here.lkey, r.target.ctypes.data, 1, 64)
        assert run(r.near, [bad]) == [REFUSED]
        assert run(r.near, [r.work(2, Opcode.WRITE, 0, 64)]) == [FLUSHED]
        r.near.close()
        r.far.close()
        r.near, r.far = nic.queue_pair(), nic.queue_pair()
        r.near.connect(r.far.local())
        r.far.connect(r.near.local())
        assert run(r.near, [r.work(3, Opcode.WRITE, 0, 64)]) == [DONE]
    return ""


def no_route_and_nonsense_are_peer_gone(verbs: Verbs, nic: Nic) -> str:
    near = nic.queue_pair()
    good = near.local()
    nowhere = bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1])
    said = []
    for changes in ({"gid": nowhere}, {"gid": b"short"}, {"qpn": 1 << 24}, {"psn": -1}, {"lid": 1 << 16}):
        fields = {name: getattr(good, name) for name in good.__struct_fields__} | changes
        try:
            near.connect(QpInfo(**fields))
        except PeerGone as error:
            said.append(str(error))
    near.close()
    assert len(said) == 5, said
    return said[0]


def work_and_queue_pairs_leave_no_memory_behind(verbs: Verbs, nic: Nic) -> str:
    def many(r: Rig, batches: int) -> None:
        works = [r.work(i, Opcode.WRITE, i * 8, 8) for i in range(nic.depth)]
        for _ in range(batches):
            assert run(r.near, works) == [DONE] * nic.depth

    with rig(nic) as r:
        many(r, 4)
        before = malloc_bytes()
        many(r, 16)
        grown_work = malloc_bytes() - before
    nic.queue_pair().close()
    before = malloc_bytes()
    for _ in range(16):
        nic.queue_pair().close()
    grown_pairs = malloc_bytes() - before
    detail = f"{16 * nic.depth} works: {grown_work} bytes, 16 queue pairs: {grown_pairs} bytes"
    assert max(grown_work, grown_pairs) < LEAK_BYTES_MAX, detail
    return detail


def the_memlock_limit_is_a_capacity_error(verbs: Verbs, nic: Nic) -> str:
    """In a child that is nobody and may lock 64 KiB."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
            os.setuid(65534)
            block = np.zeros(1 << 20, np.uint8)
            verbs.open("rxe0").register(block.ctypes.data, block.nbytes)
        except CapacityError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert "memlock" in said, said
    return said


def an_unplugged_port_is_not_up(verbs: Verbs, nic: Nic) -> str:
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    try:
        assert until(lambda: not nic.is_up(), 10)
    finally:
        subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
    assert until(nic.is_up, 10)
    return ""


CHECKS = (
    port_is_described,
    what_is_not_there_is_a_config_error,
    write_and_read_move_the_bytes,
    unaligned_ranges_move_and_touch_nothing_else,
    shared_memory_can_be_registered,
    what_is_not_writable_memory_is_refused,
    no_dma_buf_is_a_capacity_error,
    a_wrong_key_is_refused,
    out_of_range_is_refused,
    a_closed_memory_is_refused,
    a_closed_remote_queue_pair_is_unreachable_within_two_seconds,
    closing_our_queue_pair_is_a_fence,
    closing_the_target_queue_pair_is_a_fence,
    closing_the_target_memory_is_a_fence,
    closing_from_another_thread_ends_a_busy_lane,
    a_new_queue_pair_works_after_a_failure,
    no_route_and_nonsense_are_peer_gone,
    work_and_queue_pairs_leave_no_memory_behind,
    the_memlock_limit_is_a_capacity_error,
    an_unplugged_port_is_not_up,
)


def main(backend: str) -> int:
    loaded = load(backend)
    assert loaded.verbs is not None, loaded.reason
    nic = loaded.verbs.open("rxe0")
    failed = 0
    for check in CHECKS:
        started_s = time.monotonic()
        try:
            verdict, detail = "PASS", check(loaded.verbs, nic)
        except Exception:  # noqa: BLE001 - whatever it is, the other checks go on and the host is told
            verdict, detail = "FAIL", traceback.format_exc().strip().replace("\n", " | ")
            failed += 1
        print(verdict, backend, check.__name__, f"{time.monotonic() - started_s:.2f}s", detail, flush=True)
    nic.close()
    nic.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
