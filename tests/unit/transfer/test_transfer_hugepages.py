"""A large segment gets the best pages there are, says which and why, and works the same on all of them."""

import asyncio
import os
import re
from pathlib import Path

import numpy as np
import pytest

from mooncake.core.errors import ConfigError, ProtocolError
from tests.unit.huge import more_huge_pages
from transfer import hugepages
from transfer.fdpass import FdServer, fetch_segment
from transfer.file import FileIO
from transfer.file_disk import DirectFile
from transfer.hugepages import create_segment, free_huge_bytes
from transfer.model import Opcode
from transfer.segment import HUGE_PAGE_BYTES, PAGE_BYTES, Pages, Segment

pytestmark = pytest.mark.serial
SIZE = 2 * HUGE_PAGE_BYTES


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that says of itself what the test wants."""
    monkeypatch.setattr(hugepages, "POOL", tmp_path / "pool")
    monkeypatch.setattr(hugepages, "SHMEM_ENABLED", tmp_path / "shmem_enabled")

    def says(free: int | None, promised: int = 0, shmem: str | None = "always [advise] never") -> None:
        if free is not None:
            (tmp_path / "pool").mkdir(exist_ok=True)
            (tmp_path / "pool" / "free_hugepages").write_text(f"{free}\n")
            (tmp_path / "pool" / "resv_hugepages").write_text(f"{promised}\n")
        if shmem is not None:
            (tmp_path / "shmem_enabled").write_text(f"{shmem}\n")

    return says


@pytest.fixture
def made(monkeypatch):
    """made(mode, size_bytes) makes a segment; it returns which pages the one log line names, and why."""
    lines = []

    class Log:
        def info(self, event, **fields):
            lines.append((event, fields))

    def make(mode: str, size_bytes: int = SIZE) -> tuple[str, str]:
        monkeypatch.setattr(hugepages, "log", Log())
        create_segment("choice", size_bytes, mode).close()
        ((event, fields),) = lines
        assert (event, fields["size_bytes"]) == ("segment.pages", size_bytes)
        return fields["pages"], fields["why"]

    return make


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(("free", "promised"), [(0, 0), (1, 0), (4, 3), (None, 0)])
def test_without_enough_huge_pages_auto_takes_transparent_ones_and_says_why(machine, made, free, promised):
    machine(free, promised)
    pages, why = made("auto")
    assert pages == "transparent"
    assert "4 MiB are wanted" in why
    assert "vm.nr_hugepages" in why


@pytest.mark.parametrize("shmem", ["always advise [never]", "advise [deny] force", None])
def test_where_the_kernel_allows_no_transparent_ones_auto_takes_plain_ones(machine, made, shmem):
    machine(0, shmem=shmem)
    pages, why = made("auto")
    assert pages == "plain"
    assert "shmem_enabled allows no transparent ones" in why


@pytest.mark.parametrize("shmem", ["[always] never", "[within_size]", "[advise]", "deny [force]"])
def test_every_setting_with_which_advice_counts_is_known(machine, made, shmem):
    machine(0, shmem=shmem)
    assert made("auto")[0] == "transparent"


def test_a_size_of_no_whole_huge_pages_is_told_not_rounded(machine, made):
    machine(1000)
    pages, why = made("auto", SIZE + PAGE_BYTES)
    assert pages == "transparent"
    assert "no whole pages of 2 MiB" in why
    with pytest.raises(ConfigError, match="no whole pages"):
        create_segment("odd", SIZE + PAGE_BYTES, "require")


def test_pages_that_somebody_else_took_first_are_no_error(machine, made, monkeypatch):
    machine(1000)
    create = Segment.create

    def taken(name, size_bytes, progress=None, *, pages):
        if pages is Pages.HUGETLB:
            raise ConfigError("segment of 4194304 bytes: Cannot allocate memory")
        return create(name, size_bytes, progress, pages=pages)

    monkeypatch.setattr(hugepages.Segment, "create", taken)
    pages, why = made("auto")
    assert pages == "transparent"
    assert "Cannot allocate memory" in why


def test_more_huge_pages_than_there_are_is_a_configuration_error_and_leaks_nothing():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="smaller capacity"):
        Segment.create("gone", 1 << 45, pages=Pages.HUGETLB)
    assert len(os.listdir("/proc/self/fd")) == before


def test_off_asks_for_nothing(machine, made):
    machine(1000)
    assert made("off") == ("plain", "hugepages=off")


def test_require_without_huge_pages_is_a_configuration_error_that_says_what_to_do(machine):
    machine(1)
    with pytest.raises(ConfigError, match=r"hugepages=require: 2 MiB .* 4 MiB are wanted .*vm\.nr_hugepages"):
        create_segment("required", SIZE, "require")


@pytest.mark.parametrize("mode", ["", "on", "AUTO"])
def test_another_word_is_refused(mode):
    with pytest.raises(ConfigError, match="one of auto, off, require"):
        create_segment("word", SIZE, mode)


def test_a_huge_segment_of_an_odd_size_is_refused():
    with pytest.raises(ConfigError, match="multiple of 2097152"):
        Segment.create("odd", HUGE_PAGE_BYTES + PAGE_BYTES, pages=Pages.HUGETLB)


# ---------------------------------------------------------------- the real ones


@pytest.fixture
def segment():
    with more_huge_pages(SIZE // HUGE_PAGE_BYTES):
        made = create_segment("hugetlb-test", SIZE, "require")
        yield made
        made.close()


def page_kib(name: str) -> int:
    """The size of the pages behind this process's mapping of a memfd."""
    smaps = Path("/proc/self/smaps").read_text()
    return int(re.search(rf"/memfd:{name}.*?KernelPageSize: +(\d+) kB", smaps, re.DOTALL)[1])


def test_a_huge_segment_is_of_huge_pages_zero_and_all_there(segment):
    assert page_kib("hugetlb-test") == 2048
    assert segment.size_bytes == SIZE
    assert not segment.array(0, SIZE).any()
    segment.view(SIZE - 3, 3)[:] = b"end"
    assert bytes(segment.view(SIZE - 3, 3)) == b"end"


def test_a_huge_segment_is_sealed_and_an_attached_one_shares_it(segment):
    for size in (0, SIZE - HUGE_PAGE_BYTES, SIZE + HUGE_PAGE_BYTES):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(segment.fd, size)
    other = Segment.attach(os.dup(segment.fd))
    segment.view(0, 5)[:] = b"hello"
    assert bytes(other.view(0, 5)) == b"hello"
    other.touch()
    other.close()


def test_an_unsealed_huge_memfd_is_refused_like_any_other():
    with more_huge_pages(1):
        fd = os.memfd_create("unsealed", os.MFD_HUGETLB | os.MFD_HUGE_2MB | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, HUGE_PAGE_BYTES)
        with pytest.raises(ProtocolError, match="not sealed"):
            Segment.attach(fd)


async def test_a_huge_segment_travels_through_a_socket(segment, tmp_path):
    server = FdServer(tmp_path / "run" / "store.sock", segment)
    server.start()
    fetched = await asyncio.to_thread(fetch_segment, server.path, 5.0)
    fetched.view(7, 3)[:] = b"abc"
    assert bytes(segment.view(7, 3)) == b"abc"
    fetched.close()
    await server.close()


def test_a_disk_writes_and_reads_a_huge_segment_directly(segment, tmp_path):
    data = np.random.default_rng(1).integers(0, 256, HUGE_PAGE_BYTES, dtype=np.uint8)
    segment.array(0, HUGE_PAGE_BYTES)[:] = data
    file = DirectFile.open(str(tmp_path / "tier"), write=True, create=True, size_bytes=HUGE_PAGE_BYTES)
    io = FileIO(threads=1)
    try:
        out = [(0, segment.view(0, HUGE_PAGE_BYTES))]
        back = [(0, segment.view(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES))]
        assert not io.submit(Opcode.WRITE, file, out).wait()
        assert not io.submit(Opcode.READ, file, back).wait()
    finally:
        io.close()
        file.close()
    assert np.array_equal(segment.array(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES), data)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_engines_read_and_write_a_registered_huge_segment(segment, pair, transport):
    here, there = pair
    theirs, mine = there.register(segment), here.allocate(HUGE_PAGE_BYTES)
    data = np.random.default_rng(2).integers(0, 256, HUGE_PAGE_BYTES, dtype=np.uint8).tobytes()
    mine.view[:] = data
    at = theirs.address + PAGE_BYTES  # over the border of two huge pages
    here.transfer(Opcode.WRITE, there.name, mine.address, at, HUGE_PAGE_BYTES, transport=transport)
    assert bytes(segment.view(PAGE_BYTES, HUGE_PAGE_BYTES)) == data
    mine.view[:] = bytes(HUGE_PAGE_BYTES)
    here.transfer(Opcode.READ, there.name, mine.address, at, HUGE_PAGE_BYTES, transport=transport)
    assert bytes(mine.view) == data


def test_huge_pages_go_back_to_the_machine_with_the_segment():
    with more_huge_pages(2):
        before = free_huge_bytes()
        segment = create_segment("returned", SIZE, "auto")
        assert free_huge_bytes() == before - SIZE
        segment.close()
        assert free_huge_bytes() == before
