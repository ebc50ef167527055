"""Segments are fixed in size, shared, bounds-checked, and outlive close only through their views."""

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from mooncake.core.errors import ConfigError, ProtocolError, RequestError
from transfer import segment as segment_module
from transfer.segment import PAGE_BYTES, TOUCH_CHUNK_BYTES, Segment

SIZE = 16 * PAGE_BYTES


@pytest.fixture
def segment():
    made = Segment.create("unit-test", SIZE)
    yield made
    made.close()


def mapped(name: str) -> bool:
    return f"/memfd:{name}" in Path("/proc/self/maps").read_text()


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if f"/memfd:{name}" in line)
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:")) * 1024


def test_an_attached_segment_shares_its_bytes_both_ways(segment):
    other = Segment.attach(os.dup(segment.fd))
    segment.view(0, 5)[:] = b"hello"
    assert bytes(other.view(0, 5)) == b"hello"
    other.view(SIZE - 3, 3)[:] = b"end"
    assert bytes(segment.view(SIZE - 3, 3)) == b"end"
    other.close()


def test_the_array_and_the_view_are_the_same_bytes(segment):
    array = segment.array(100, 8)
    array[:] = np.arange(8, dtype=np.uint8)
    assert bytes(segment.view(100, 8)) == bytes(range(8))


def test_attaching_changes_no_content(segment):
    segment.view(PAGE_BYTES, 4)[:] = b"kept"
    Segment.attach(os.dup(segment.fd)).close()
    assert bytes(segment.view(PAGE_BYTES, 4)) == b"kept"


@pytest.mark.parametrize(("offset", "size"), [(-1, 4), (0, -1), (0, SIZE + 1), (SIZE, 1), (SIZE - 1, 2)])
def test_a_range_that_leaves_the_segment_is_refused(segment, offset, size):
    with pytest.raises(RequestError, match="leaves segment"):
        segment.view(offset, size)
    with pytest.raises(RequestError, match="leaves segment"):
        segment.array(offset, size)


def test_an_empty_range_at_the_end_is_fine(segment):
    assert segment.view(SIZE, 0).nbytes == 0


def test_nobody_can_resize_a_segment(segment):
    for size in (0, SIZE // 2, SIZE * 2):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(segment.fd, size)
    with pytest.raises(OSError, match="not permitted"):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_every_page_is_resident_before_the_first_use(segment):
    assert resident_bytes("unit-test") == SIZE


def test_progress_reaches_the_whole_size_in_chunks():
    steps = []
    size = TOUCH_CHUNK_BYTES + PAGE_BYTES
    Segment.create("progress", size, lambda done, total: steps.append((done, total))).close()
    assert steps == [(TOUCH_CHUNK_BYTES, size), (size, size)]


@pytest.mark.parametrize("size", [0, -PAGE_BYTES, PAGE_BYTES + 1])
def test_a_bad_size_is_a_configuration_error(size):
    with pytest.raises(ConfigError, match="multiple of 4096"):
        Segment.create("bad", size)


@pytest.mark.parametrize("name", ["", "x" * 300, "a\0b"])
def test_a_bad_name_is_a_configuration_error(name):
    with pytest.raises(ConfigError, match="segment name"):
        Segment.create(name, PAGE_BYTES)


def test_more_memory_than_addresses_is_a_configuration_error_and_leaks_nothing():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="smaller capacity"):
        Segment.create("huge", 1 << 60)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unsealed_memfd_is_refused_because_its_owner_could_shrink_it():
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(ProtocolError, match="not sealed"):
        Segment.attach(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)  # attach took it and closed it


def test_a_descriptor_that_is_no_memfd_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE_BYTES)
    for fd in (os.open(path, os.O_RDWR), os.open("/dev/null", os.O_RDWR)):
        with pytest.raises(ProtocolError, match="not a memfd"):
            Segment.attach(fd)


def test_close_is_idempotent_and_ends_all_access():
    segment = Segment.create("closing", PAGE_BYTES)
    segment.close()
    segment.close()
    for use in (lambda: segment.view(0, 1), lambda: segment.array(0, 1), lambda: segment.fd):
        with pytest.raises(RequestError, match="closed"):
            use()


def test_memory_goes_with_the_last_view_not_before():
    segment = Segment.create("last-view", PAGE_BYTES)
    view = segment.view(0, 4)
    view[:] = b"live"
    segment.close()
    assert mapped("last-view")
    assert bytes(view) == b"live"
    del view
    assert not mapped("last-view")


def test_a_segment_that_is_dropped_without_close_leaves_no_descriptor():
    """It would keep the memory for the life of the process."""
    before = len(os.listdir("/proc/self/fd"))
    segment = Segment.create("dropped", PAGE_BYTES)
    view = segment.view(0, 4)
    del segment
    view[:] = b"live"
    assert mapped("dropped")
    del view
    assert not mapped("dropped")
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_old_kernel_without_populate_still_touches_and_keeps_contents(monkeypatch):
    monkeypatch.setattr(segment_module, "_MADV_POPULATE_WRITE", 999)
    monkeypatch.setattr(segment_module, "_MADV_POPULATE_READ", 998)
    segment = Segment.create("old-kernel", SIZE)
    assert resident_bytes("old-kernel") == SIZE
    segment.view(0, 4)[:] = b"kept"
    other = Segment.attach(os.dup(segment.fd))
    assert bytes(other.view(0, 4)) == b"kept"
    other.close()
    segment.close()
