"""Files: any range by O_DIRECT or without, errors by name, and memory that is the caller's when settled."""

import asyncio
import errno
import itertools
import mmap
import os
import resource
import threading
from contextlib import contextmanager
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    IntegrityError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    RequestError,
)
from transfer import file_disk
from transfer.file import FileIO
from transfer.file_disk import BLOCK_BYTES, BOUNCE_BYTES, Bounce, DirectFile, address_of, disk_error
from transfer.model import Opcode

READ, WRITE = Opcode.READ, Opcode.WRITE
FILE_BYTES = 5 * BLOCK_BYTES


def memory(size: int, shift: int = 0) -> memoryview:
    """`size` bytes that begin `shift` after a page's start."""
    return memoryview(mmap.mmap(-1, size + shift))[shift : shift + size]


def filled(content: bytes, shift: int = 0) -> memoryview:
    view = memory(len(content), shift)
    view[:] = content
    return view


def pattern(size: int) -> bytes:
    return (b"".join(i.to_bytes(4, "little") for i in range(size // 4 + 1)))[:size]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def limit(kind: int, soft: int):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


class Gate:
    """Stands for a disk: every access waits in it until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.offsets: list[int] = []

    def move(self, op, offset, views, bounce) -> None:
        self.offsets.append(offset)
        self.entered.release()
        assert self.opened.wait(30)

    def await_entered(self) -> None:
        assert self.entered.acquire(timeout=30)


@pytest.fixture
def file(tmp_path):
    made = DirectFile.open(str(tmp_path / "file"), write=True, create=True, size_bytes=FILE_BYTES)
    yield made
    made.close()


@pytest.fixture
def direct(file):
    if not file.direct:
        pytest.skip("the file system of tmp_path refuses O_DIRECT")
    return file


@pytest.fixture
def io():
    made = FileIO(threads=4)
    yield made
    made.close()


@pytest.fixture
def stuck(file, monkeypatch):
    """One thread, and a disk that answers nothing until the gate opens."""
    gate = Gate()
    monkeypatch.setattr(file, "move", gate.move)
    io = FileIO(threads=1)
    yield io, file, gate
    gate.opened.set()
    io.close()


# ---------------------------------------------------------------- bytes


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return (str(folder / str(i)) for i in itertools.count())


accesses = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE]),
        st.integers(0, 3 * BLOCK_BYTES) | st.sampled_from([0, BLOCK_BYTES, 2 * BLOCK_BYTES]),
        st.lists(st.integers(1, 3 * BLOCK_BYTES) | st.just(BLOCK_BYTES), min_size=1, max_size=3),
        st.sampled_from([0, 1, 64, 512]),  # how far the memory is off its page
    ),
    max_size=6,
)


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=60, deadline=None)
@given(accesses=accesses)
def test_any_access_does_what_it_would_do_to_a_string_of_bytes(paths, direct, accesses):
    path = next(paths)
    file, bounce = DirectFile.open(path, write=True, create=True, direct=direct), Bounce()
    model = bytearray()
    with only_aligned_accesses(file):
        play(file, model, bounce, accesses)
    assert file.size_bytes == len(model)
    file.close()
    with open(path, "rb") as stream:
        assert stream.read() == model


@contextmanager
def only_aligned_accesses(file):
    """ext4 quietly serves unaligned O_DIRECT by the page cache; others refuse it."""

    def checked(real, fd, views, offset):
        if fd == file._direct_fd:
            assert offset % file.block_bytes == 0
            assert all(view.nbytes % file.block_bytes == 0 for view in views)
            assert all(address_of(view) % file.memory_align_bytes == 0 for view in views)
        return real(fd, views, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", partial(checked, os.preadv))
        patch.setattr(os, "pwritev", partial(checked, os.pwritev))
        yield


def play(file, model, bounce, accesses):
    for number, (op, offset, sizes, shift) in enumerate(accesses):
        views, total = [memory(size, shift) for size in sizes], sum(sizes)
        if op is WRITE:
            for index, view in enumerate(views):
                view[:] = bytes([number * 8 + index + 1]) * len(view)
            file.move(op, offset, views, bounce)
            model.extend(bytes(max(0, offset + total - len(model))))
            model[offset : offset + total] = b"".join(views)
        elif offset + total <= len(model):
            file.move(op, offset, views, bounce)
            assert b"".join(views) == model[offset : offset + total]
        else:
            with pytest.raises(RequestError, match="leaves"):
                file.move(op, offset, views, bounce)


@pytest.mark.parametrize("shift", [0, 64])
def test_a_range_larger_than_the_bounce_buffer_is_whole(file, shift):
    content, bounce = pattern(BOUNCE_BYTES * 2 + 777), Bounce()
    file.move(WRITE, 100, [filled(content, shift)], bounce)
    back = memory(len(content), shift)
    file.move(READ, 100, [back], bounce)
    assert back == content


def test_neighbours_that_share_a_block_lose_nothing_to_each_other(direct, io):
    sizes = [1000, 3096, 5000, 17, 4079, 3288]
    ends = list(itertools.accumulate(sizes))
    content = pattern(ends[-1])
    for _ in range(20):
        requests = [(e - n, filled(content[e - n : e], 64)) for e, n in zip(ends, sizes, strict=True)]
        io.transfer(WRITE, direct, requests)
        back = memory(len(content))
        io.transfer(READ, direct, [(0, back)])
        assert back == content
        io.transfer(WRITE, direct, [(0, memory(FILE_BYTES))])


def test_one_request_gathers_and_scatters_more_pages_than_a_system_call_takes(file, io):
    pages = file_disk.IOV_MAX + 10
    content = pattern(pages * BLOCK_BYTES)
    whole, back = filled(content), memory(len(content))

    def cut(view):
        return [view[i : i + BLOCK_BYTES] for i in range(0, len(view), BLOCK_BYTES)]

    io.transfer(WRITE, file, [(0, cut(whole))])
    io.transfer(READ, file, [(0, cut(back)[::-1])])
    assert b"".join(cut(back)[::-1]) == content


def test_aligned_accesses_leave_the_page_cache_alone(direct, io, monkeypatch):
    monkeypatch.setattr(direct, "_fd", -1)  # the buffered descriptor: an error if it is used
    content = pattern(FILE_BYTES)
    io.transfer(WRITE, direct, [(0, filled(content))])
    back = memory(FILE_BYTES - 2, 64)
    io.transfer(READ, direct, [(1, back)])  # over-read through the bounce buffer, direct too
    assert back == content[1:-1]
    monkeypatch.undo()


@pytest.mark.parametrize("step", [1, 512, BLOCK_BYTES])
def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch, step):
    file = DirectFile.open(str(tmp_path / "short"), write=True, create=True, direct=step == BLOCK_BYTES)
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:step]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, [views[0][:step]], offset))
    content = pattern(2 * BLOCK_BYTES)
    source, back = filled(content), memory(2 * BLOCK_BYTES)
    file.move(WRITE, 0, [source[:BLOCK_BYTES], source[BLOCK_BYTES:]], Bounce())
    file.move(READ, 0, [back[:BLOCK_BYTES], back[BLOCK_BYTES:]], Bounce())
    assert back == content
    file.close()


def test_a_file_system_that_refuses_o_direct_is_served_by_the_page_cache_and_says_so():
    with capture_logs() as logs:
        file = DirectFile.open("/proc/version")
    assert not file.direct
    assert [(line["event"], line["path"]) for line in logs] == [("file.not_direct", "/proc/version")]
    back = memory(5)
    file.move(READ, 0, [back], Bounce())
    assert back == b"Linux"
    file.close()


@pytest.mark.parametrize("op", [READ, WRITE])
def test_a_refusal_in_the_middle_turns_to_the_page_cache(direct, monkeypatch, op):
    def refuse_direct(fd, views, offset, real):
        if fd == direct._direct_fd:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", partial(refuse_direct, real=os.preadv))
    monkeypatch.setattr(os, "pwritev", partial(refuse_direct, real=os.pwritev))
    view = filled(b"x" * BLOCK_BYTES)
    direct.move(op, 0, [view], Bounce())
    assert not direct.direct
    with open(direct.path, "rb") as stream:
        assert stream.read(BLOCK_BYTES) == view


def test_a_new_file_owns_its_space_and_is_kept_by_sync(file):
    assert file.size_bytes == FILE_BYTES
    assert os.stat(file.path).st_blocks * 512 >= FILE_BYTES
    file.sync()


# ---------------------------------------------------------------- errors


def test_bad_paths_are_refused_by_name(tmp_path, file):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RequestError, match=r"none: No such file"):
        DirectFile.open(str(tmp_path / "none"))
    with pytest.raises(RequestError, match="not a regular file"):
        DirectFile.open(str(tmp_path))
    with pytest.raises(RequestError, match="directory"):
        DirectFile.open(str(tmp_path), write=True)
    with pytest.raises(RequestError, match="not a regular file"):
        DirectFile.open(str(tmp_path / "fifo"))
    with pytest.raises(RequestError, match="exists"):
        DirectFile.open(file.path, write=True, create=True)
    with pytest.raises(RequestError, match="write=True"):
        DirectFile.open(str(tmp_path / "new"), create=True)
    assert os.path.getsize(file.path) == FILE_BYTES
    assert not (tmp_path / "new").exists()


def test_reading_past_the_end_names_the_file_and_its_end(file, io):
    with pytest.raises(RequestError, match=rf"leaves .*file, which ends at {FILE_BYTES}"):
        io.transfer(READ, file, [(FILE_BYTES - BLOCK_BYTES, memory(2 * BLOCK_BYTES))])
    with pytest.raises(RequestError, match="leaves"):
        io.transfer(READ, file, [(FILE_BYTES + 5, memory(1))])


def test_only_the_bad_request_of_a_batch_fails(file, io):
    content = pattern(BLOCK_BYTES)
    io.transfer(WRITE, file, [(0, filled(content))])
    back = [memory(BLOCK_BYTES) for _ in range(3)]
    errors = io.submit(READ, file, [(0, back[0]), (FILE_BYTES, back[1]), (0, back[2])]).wait()
    assert list(errors) == [1]
    assert back[0] == back[2] == content


def test_a_full_disk_is_a_capacity_error_and_leaves_no_half_made_file(file, tmp_path, io):
    before = open_descriptors()
    with limit(resource.RLIMIT_FSIZE, FILE_BYTES):
        with pytest.raises(CapacityError, match="write"):
            io.transfer(WRITE, file, [(FILE_BYTES, memory(BLOCK_BYTES))])
        with pytest.raises(CapacityError, match="open"):
            DirectFile.open(str(tmp_path / "big"), write=True, create=True, size_bytes=2 * FILE_BYTES)
    assert not (tmp_path / "big").exists()
    assert open_descriptors() == before


@pytest.mark.parametrize("free", [0, 1])
def test_no_descriptor_left_is_a_capacity_error(file, free):
    lowest = os.dup(0)
    os.close(lowest)
    before = open_descriptors()
    with limit(resource.RLIMIT_NOFILE, lowest + free), pytest.raises(CapacityError, match="open"):
        DirectFile.open(file.path)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, CapacityError),
        (errno.EDQUOT, CapacityError),
        (errno.EIO, IntegrityError),
        (errno.EROFS, ConfigError),
        (errno.EACCES, RequestError),
        (errno.ENODEV, MooncakeError),
    ],
)
def test_errors_of_the_disk_are_of_our_tree_and_name_the_range(file, monkeypatch, number, kind):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(MooncakeError, match=rf"read {file.path} at 4096\+4096: ") as caught:
        file.move(READ, BLOCK_BYTES, [memory(BLOCK_BYTES)], Bounce())
    assert type(caught.value) is kind
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(kind, match="sync"):
        file.sync()


def test_an_error_without_a_number_keeps_its_words():
    assert "strange" in str(disk_error(OSError("strange"), "open x"))


def test_bad_requests_are_refused_before_any_is_taken(file, io):
    for offset, view in [(-1, memory(1)), (0, memoryview(b"")), (2**63 - 1, memory(1)), (0, [])]:
        with pytest.raises(RequestError, match="not a range"):
            io.submit(WRITE, file, [(0, memory(1)), (offset, view)])
    with pytest.raises(RequestError, match="contiguous"):
        io.submit(WRITE, file, [(0, memory(8)[::2])])
    with pytest.raises(RequestError, match="read-only memory"):
        io.submit(READ, file, [(0, memoryview(b"const"))])
    reader = DirectFile.open(file.path)
    with pytest.raises(RequestError, match="reading only"):
        io.submit(WRITE, reader, [(0, memory(1))])
    reader.close()
    assert io.in_flight_bytes == 0


def test_memory_that_its_owner_has_taken_back_fails_the_request(file):
    view = memory(8)
    view.release()
    with pytest.raises(RequestError, match="released"):
        file.move(READ, 0, [view], Bounce())


@pytest.mark.parametrize(("threads", "size"), [(0, 1), (257, 1), (1, 0)])
def test_bad_settings_stop_the_start(threads, size):
    with pytest.raises(ConfigError, match="file io"):
        FileIO(threads=threads, in_flight_bytes_max=size)


# ---------------------------------------------------------------- the pool


def test_work_in_flight_is_bounded_and_a_refused_batch_takes_nothing(stuck):
    io, file, gate = stuck
    io.in_flight_bytes_max = 100
    first = io.submit(READ, file, [(0, memory(60))])
    with pytest.raises(CapacityError, match="60 in flight"):
        io.submit(READ, file, [(0, memory(20)), (0, memory(21))])
    second = io.submit(READ, file, [(0, memory(40))])
    gate.opened.set()
    assert first.wait() == second.wait() == {}
    assert io.in_flight_bytes == 0
    io.submit(READ, file, [(0, memory(100))]).wait()


def test_cancel_stops_what_has_not_begun_and_wait_waits_for_the_rest(stuck):
    io, file, gate = stuck
    views = [memory(10) for _ in range(3)]
    batch = io.submit(READ, file, list(enumerate(views)))
    gate.await_entered()
    batch.cancel()
    batch.cancel()
    assert not batch.done()
    assert [address_of(view) for view in batch.unsettled] == [address_of(views[0])]
    gate.opened.set()
    errors = batch.wait()
    assert {index: type(error) for index, error in errors.items()} == {1: PeerGone, 2: PeerGone}
    assert gate.offsets == [0]
    assert batch.done()
    assert batch.unsettled == []
    assert io.in_flight_bytes == 0


def test_a_batch_that_was_cancelled_in_the_queue_is_settled_at_once(stuck):
    io, file, gate = stuck
    io.submit(READ, file, [(0, memory(1))])
    gate.await_entered()
    batch = io.submit(READ, file, [(1, memory(1))])
    batch.cancel()
    assert isinstance(batch.wait(0)[0], PeerGone)
    gate.opened.set()


def test_a_stuck_disk_keeps_the_memory_beyond_the_deadline(stuck):
    io, file, gate = stuck
    views = [memory(10), memory(10)]
    batch = io.submit(READ, file, list(enumerate(views)), deadline_s=0.02)
    gate.await_entered()
    with pytest.raises(PeerTimeout, match=rf"not settled.* {address_of(views[0]):#x}\+10 "):
        batch.wait()
    assert not batch.done()
    gate.opened.set()
    errors = batch.wait(30)
    assert list(errors) == [1]
    assert isinstance(errors[1], PeerTimeout)
    assert gate.offsets == [0]


def test_a_request_whose_deadline_passed_in_the_queue_never_begins(stuck):
    io, file, gate = stuck
    first = io.submit(READ, file, [(0, memory(1))])
    gate.await_entered()
    late = io.submit(READ, file, [(1, memory(1))], deadline_s=0)
    gate.opened.set()
    assert first.wait() == {}
    assert isinstance(late.wait(30)[0], PeerTimeout)
    assert gate.offsets == [0]


def test_what_waits_behind_a_stuck_disk_is_given_up_at_its_deadline(stuck):
    io, file, gate = stuck
    io.submit(READ, file, [(0, memory(1))])
    gate.await_entered()
    assert isinstance(io.submit(READ, file, [(1, memory(1))], deadline_s=0.02).wait()[0], PeerTimeout)


async def test_an_event_loop_gives_up_what_waits_behind_a_stuck_disk_at_its_deadline(stuck):
    io, file, gate = stuck
    io.submit(READ, file, [(0, memory(1))])
    await asyncio.to_thread(gate.await_entered)
    batch = io.submit(READ, file, [(1, memory(1))], deadline_s=0.02)
    assert isinstance((await batch.finished())[0], PeerTimeout)


def test_waiting_for_less_than_the_deadline_drops_nothing(stuck):
    io, file, gate = stuck
    batch = io.submit(READ, file, [(0, memory(1)), (1, memory(1))])
    with pytest.raises(PeerTimeout):
        batch.wait(0)
    gate.opened.set()
    assert batch.wait() == {}


def test_an_empty_batch_is_settled(file, io):
    assert io.submit(READ, file, []).wait(0) == {}


async def test_an_event_loop_can_wait_for_a_batch(file, io):
    content = pattern(FILE_BYTES)
    assert await io.submit(WRITE, file, [(0, filled(content))]).finished() == {}
    back = memory(FILE_BYTES)
    batch = io.submit(READ, file, [(0, back), (FILE_BYTES, memory(1))])
    assert list(await batch.finished()) == [1]
    assert list(await batch.finished()) == [1]
    assert back == content


async def test_an_event_loop_sees_the_deadline_and_may_wait_again(stuck):
    io, file, gate = stuck
    batch = io.submit(READ, file, [(0, memory(1)), (1, memory(1))], deadline_s=0.5)
    await asyncio.to_thread(gate.await_entered)
    with pytest.raises(PeerTimeout, match="not settled"):
        await batch.finished()
    gate.opened.set()
    assert list(await batch.finished(30)) == [1]


async def test_cancelling_the_awaiting_task_leaves_the_batch_to_be_waited_for(stuck):
    io, file, gate = stuck
    batch = io.submit(READ, file, [(0, memory(1))])
    task = asyncio.create_task(batch.finished())
    await asyncio.to_thread(gate.await_entered)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not batch.done()
    gate.opened.set()
    assert batch.wait() == {}


def test_every_thread_ends_at_close(file):
    before = set(threading.enumerate())
    io = FileIO(threads=7)
    io.transfer(WRITE, file, [(0, memory(1))])
    assert len(set(threading.enumerate()) - before) == 7
    io.close()
    io.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RequestError, match="io is closed"):
        io.submit(READ, file, [(0, memory(1))])


def test_close_drops_the_queue_and_tells_of_a_stuck_disk(stuck):
    io, file, gate = stuck
    begun = io.submit(READ, file, [(0, memory(1))])
    gate.await_entered()
    queued = io.submit(READ, file, [(1, memory(1))])
    with pytest.raises(PeerTimeout, match="1 file io threads"):
        io.close(deadline_s=0)
    assert isinstance(queued.wait(0)[0], PeerGone)
    assert not begun.done()
    gate.opened.set()
    assert begun.wait() == {}


def test_a_closed_file_serves_what_it_has_taken_and_then_gives_its_descriptors_back(stuck):
    io, file, gate = stuck
    before = open_descriptors()
    batch = io.submit(READ, file, [(0, memory(1))])
    gate.await_entered()
    file.close()
    file.close()
    assert open_descriptors() == before
    with pytest.raises(RequestError, match="is closed"):
        io.submit(READ, file, [(0, memory(1))])
    with pytest.raises(RequestError, match="is closed"):
        file.sync()
    gate.opened.set()
    assert batch.wait() == {}
    assert open_descriptors() == before - (2 if file.direct else 1)
    assert io.in_flight_bytes == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_a_thread_leaves_no_batch_hanging(file, monkeypatch):
    monkeypatch.setattr(file, "move", lambda *_: {}["bug"])
    io = FileIO(threads=1)
    batch = io.submit(READ, file, [(0, memory(1))])
    assert "a thread died" in str(batch.wait()[0])
    io.close()
