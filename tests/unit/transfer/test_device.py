"""Device memory goes through a few shared pinned chunks, overlapped; none is lost or used too early."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    IntegrityError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    RequestError,
)
from tests.unit.transfer.fake_cuda import FakeCuda
from transfer import device as device_module
from transfer.device import Stager
from transfer.device_cuda import CudaDriver, load
from transfer.device_fake import DEVICE_BASE, POISON, FakeDevice
from transfer.model import Call

CHUNK = 8


def bytes_of(size: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(size))


def call(deadline_s: float = 30.0) -> Call:
    return Call(deadline_s)


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def stager(device, monkeypatch):
    monkeypatch.setattr(device_module, "SETTLE_S", 0.0)  # the fake settles when asked, or not at all
    monkeypatch.setattr(device_module, "RECHECK_S", 0.01)
    made = Stager(device, chunk_bytes=CHUNK, chunks=4)
    yield made
    device.stuck.clear()
    made.close()
    assert not device.pinned
    assert device.under_way == 0


class Collector:
    """A sink that keeps what it is given, and tells the device's diary."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.content = b""

    def __call__(self, view: memoryview, offset: int) -> None:
        assert offset == len(self.content)
        self.device.events.append(f"sink {offset}")
        self.content += bytes(view)


# ---------------------------------------------------------------- staging


@given(size=st.integers(0, 6 * CHUNK), chunks=st.integers(1, 4))
def test_every_byte_goes_out_and_comes_in_again(size, chunks):
    device = FakeDevice()
    stager = Stager(device, chunk_bytes=CHUNK, chunks=chunks)
    content, collector = bytes_of(size), Collector(device)
    stager.stage_out(device.allocate(content), size, collector, call())
    assert collector.content == content

    target = device.allocate(bytes(size))

    def source(view, offset):
        view[:] = content[offset : offset + len(view)]

    stager.stage_in(target, size, source, call())
    assert device.content(target, size) == content
    assert stager.used_chunks == 0
    stager.close()


def test_going_out_the_device_copies_the_next_chunk_while_the_network_has_this_one(device, stager):
    stager.stage_out(device.allocate(bytes(4 * CHUNK)), 4 * CHUNK, Collector(device), call())
    assert device.events == [
        "start 0", "start 1", "end 0", "sink 0",
        "start 2", "end 1", f"sink {CHUNK}",
        "start 3", "end 2", f"sink {2 * CHUNK}",
        "end 3", f"sink {3 * CHUNK}",
    ]  # fmt: skip


def test_coming_in_the_network_fills_the_next_chunk_while_the_device_copies_this_one(device, stager):
    stager.stage_in(
        device.allocate(bytes(3 * CHUNK)),
        3 * CHUNK,
        lambda view, offset: device.events.append(f"source {offset}"),
        call(),
    )
    assert device.events == [
        "source 0", "start 0",
        f"source {CHUNK}", "start 1", "end 0",
        f"source {2 * CHUNK}", "start 2", "end 1", "end 2",
    ]  # fmt: skip


def test_memory_is_pinned_when_it_is_needed_and_reused(device, stager):
    assert not device.pinned
    address = device.allocate(bytes(6 * CHUNK))
    for _ in range(3):
        stager.stage_out(address, 6 * CHUNK, lambda view, offset: None, call())
    assert len(device.pinned) == 2


@pytest.mark.parametrize("failing", [("start", 0), ("start", 1), ("start", 2), ("copy", 0), ("copy", 2)])
@pytest.mark.parametrize("way", ["stage_out", "stage_in"])
def test_a_device_that_fails_in_the_middle_leaves_no_chunk_in_use(device, stager, failing, way):
    device.failures[failing] = IntegrityError("broken")
    with pytest.raises(IntegrityError, match="broken"):
        getattr(stager, way)(device.allocate(bytes(4 * CHUNK)), 4 * CHUNK, lambda view, offset: None, call())
    assert stager.used_chunks == 0
    assert device.under_way == 0


@pytest.mark.parametrize("way", ["stage_out", "stage_in"])
def test_a_network_that_fails_in_the_middle_leaves_no_chunk_in_use(device, stager, way):
    def fail(view, offset):
        if offset:
            raise PeerGone("cut")

    with pytest.raises(PeerGone, match="cut"):
        getattr(stager, way)(device.allocate(bytes(4 * CHUNK)), 4 * CHUNK, fail, call())
    assert stager.used_chunks == 0
    assert device.under_way == 0


@pytest.mark.parametrize("way", ["stage_out", "stage_in"])
def test_a_stuck_copy_keeps_its_chunk_until_it_ends(device, stager, way):
    device.stuck.add(1)
    address = device.allocate(bytes(4 * CHUNK))
    with pytest.raises(PeerTimeout):
        getattr(stager, way)(address, 4 * CHUNK, lambda view, offset: None, call(0.05))
    assert stager.used_chunks == 1
    with pytest.raises(PeerTimeout, match="1 chunks"):
        stager.close(deadline_s=0)
    assert len(device.pinned) == len(stager._chunks)
    device.stuck.clear()
    assert stager.used_chunks == 0


@pytest.mark.parametrize("way", ["stage_out", "stage_in"])
def test_cancellation_ends_it_between_chunks(device, stager, way):
    mine = call()
    with pytest.raises(PeerGone, match="cancelled"):
        getattr(stager, way)(
            device.allocate(bytes(9 * CHUNK)), 9 * CHUNK, lambda view, offset: mine.cancel(), mine
        )
    assert device.events.count("end 8") == 0
    assert stager.used_chunks == 0


def test_pinned_memory_is_bounded_whatever_the_number_of_callers(device, stager):
    content = bytes_of(40 * CHUNK)
    address, most = device.allocate(content), []

    def one(_):
        collector = Collector(device)
        stager.stage_out(address, len(content), collector, call())
        target = device.allocate(bytes(len(content)))

        def source(view, offset):
            most.append(len(device.pinned))
            view[:] = content[offset : offset + len(view)]

        stager.stage_in(target, len(content), source, call())
        return collector.content == content == device.content(target, len(content))

    with ThreadPoolExecutor(9) as pool:
        assert all(pool.map(one, range(9)))
    assert max(most) <= 4
    assert stager.used_chunks == 0


@contextlib.contextmanager
def all_chunks_taken(device, stager):
    """Two callers with two chunks each, who wait in their sinks."""
    gate, inside = threading.Event(), threading.Semaphore(0)

    def hold(view, offset):
        inside.release()
        assert gate.wait(30)

    address = device.allocate(bytes(2 * CHUNK))
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(stager.stage_out, address, 2 * CHUNK, hold, call())
        try:
            assert inside.acquire(timeout=30)
            assert inside.acquire(timeout=30)
            assert stager.used_chunks == 4
            yield address, gate
        finally:
            gate.set()


def test_who_finds_no_chunk_waits_no_longer_than_its_deadline(device, stager):
    with all_chunks_taken(device, stager) as (address, _), pytest.raises(PeerTimeout, match="pinned memory"):
        stager.stage_out(address, 1, lambda view, offset: None, call(0.02))


def test_who_waits_for_a_chunk_can_be_cancelled(device, stager):
    with all_chunks_taken(device, stager) as (address, _), ThreadPoolExecutor(1) as pool:
        mine = call()
        waiting = pool.submit(stager.stage_out, address, 1, lambda view, offset: None, mine)
        mine.cancel()
        with pytest.raises(PeerGone):
            waiting.result(30)


def test_who_waits_for_a_chunk_gets_the_next_that_is_free(device, stager):
    with all_chunks_taken(device, stager) as (address, gate), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stager.stage_out, address, 1, lambda view, offset: None, call())
        gate.set()
        waiting.result(30)


def test_a_machine_that_pins_less_is_served_with_less():
    device = FakeDevice(host_bytes_max=CHUNK)
    stager = Stager(device, chunk_bytes=CHUNK, chunks=4)
    content, collector = bytes_of(5 * CHUNK), Collector(device)
    stager.stage_out(device.allocate(content), len(content), collector, call())
    assert collector.content == content
    stager.close()
    none = FakeDevice(host_bytes_max=CHUNK - 1)
    with pytest.raises(CapacityError):
        Stager(none, chunk_bytes=CHUNK).stage_out(none.allocate(b"x"), 1, collector, call())


def test_a_closed_stager_and_bad_settings_are_refused(device):
    stager = Stager(device)
    stager.close()
    stager.close()
    with pytest.raises(RequestError, match="closed"):
        stager.stage_out(device.allocate(b"x"), 1, lambda view, offset: None, call())
    for numbers in [(0, 1), (1, 0)]:
        with pytest.raises(ConfigError, match="positive"):
            Stager(device, *numbers)


# ---------------------------------------------------------------- the fake itself


def test_the_fake_shows_bytes_only_after_the_copy_was_waited_for(device):
    address = device.allocate(b"abc")
    host = device.allocate_host(3, address)
    copy = device.copy_to_host(host.address, address, 3)
    assert bytes(host.view) == bytes([POISON] * 3)
    assert copy.wait(0)
    assert bytes(host.view) == b"abc"


def test_the_fake_knows_its_addresses(device):
    address = device.allocate(b"abc")
    assert device.device_of(address + 2) == "cuda:0"
    assert device.device_of(address + 3) is None
    assert address >= DEVICE_BASE
    with pytest.raises(RequestError, match="not device memory"):
        device.copy_to_host(device.allocate_host(4, address).address, address, 4)


# ---------------------------------------------------------------- NVIDIA's driver, against a stand-in library


@pytest.fixture
def cuda():
    library = FakeCuda()
    yield library
    assert library.current == []  # no context is left in anybody's thread


@pytest.fixture
def driver(cuda):
    return CudaDriver(cuda)


def test_bytes_go_through_the_driver_both_ways(cuda, driver):
    content = bytes_of(50)
    address = cuda.device_allocate(50, 1)
    stager, back = Stager(driver, chunk_bytes=CHUNK), []

    def source(view, offset):
        view[:] = content[offset : offset + len(view)]

    stager.stage_in(address, 50, source, call())
    cuda.not_ready = 3
    stager.stage_out(address, 50, lambda view, offset: back.append(bytes(view)), call())
    assert b"".join(back) == bytes(cuda.device_memory[address][0]) == content
    stager.close()
    driver.close()
    assert not cuda.pinned
    assert not cuda.handles
    assert cuda.retained == {41: 0}  # the other GPU was never touched


def test_the_driver_tells_device_memory_from_host_memory(cuda, driver):
    address = cuda.device_allocate(10, 1)
    assert driver.device_of(address + 9) == "cuda:1"
    assert driver.device_of(0x1234) is None
    assert driver.device_of(driver.allocate_host(4, address).address) is None
    with pytest.raises(RequestError, match="0x1234 is not"):
        driver.copy_to_host(0, 0x1234, 1)


@pytest.mark.parametrize(
    ("name", "code", "kind"),
    [
        ("cuDevicePrimaryCtxRetain", 2, CapacityError),
        ("cuStreamCreate", 2, CapacityError),
        ("cuMemHostAlloc", 2, CapacityError),
        ("cuEventCreate", 700, MooncakeError),
        ("cuMemcpyDtoHAsync_v2", 1, RequestError),
        ("cuEventRecord", 700, MooncakeError),
        ("cuEventQuery", 214, IntegrityError),
        ("cuPointerGetAttribute", 4, MooncakeError),
        ("cuCtxPushCurrent_v2", 4, MooncakeError),
    ],
)
def test_every_code_of_the_driver_becomes_an_error_in_its_words(cuda, driver, name, code, kind):
    address = cuda.device_allocate(10, 0)
    cuda.codes[name] = code
    stager = Stager(driver, chunk_bytes=CHUNK)
    with pytest.raises(MooncakeError, match=f"{name}: CUDA error {code}: words for {code}") as caught:
        stager.stage_out(address, 10, lambda view, offset: None, call())
    assert type(caught.value) is kind
    cuda.codes.clear()
    stager.close()
    driver.close()
    assert not cuda.handles
    assert not cuda.pinned
    assert set(cuda.retained.values()) <= {0}


def test_a_copy_that_cannot_be_watched_has_ended_before_the_error_is_raised(cuda, driver):
    address = cuda.device_allocate(10, 0)
    host = driver.allocate_host(10, address)
    cuda.codes["cuEventRecord"] = 700
    with pytest.raises(MooncakeError, match="cuEventRecord"):
        driver.copy_to_host(host.address, address, 10)
    assert cuda.calls.index("cuStreamSynchronize") > cuda.calls.index("cuEventRecord")


def test_an_unfinished_copy_is_not_done_after_the_timeout_and_may_be_asked_again(cuda, driver):
    address = cuda.device_allocate(10, 0)
    copy = driver.copy_to_host(driver.allocate_host(10, address).address, address, 10)
    cuda.not_ready = 10**9
    assert not copy.wait(0)
    assert not copy.wait(0.001)
    cuda.not_ready = 0
    assert copy.wait(0)
    assert copy.wait(0)


def test_a_dmabuf_covers_whole_pages_and_names_the_offset(cuda, driver):
    address = cuda.device_allocate(3 * 4096, 0)
    assert driver.export_dmabuf(address + 100, 4096) == (77, 100)
    assert cuda.exported == (address, 2 * 4096)
    for code in (1, 801):
        cuda.codes["cuMemGetHandleForAddressRange"] = code
        assert driver.export_dmabuf(address, 4096) is None
    cuda.codes["cuMemGetHandleForAddressRange"] = 700
    with pytest.raises(MooncakeError, match="700"):
        driver.export_dmabuf(address, 4096)


def test_an_older_driver_exports_nothing_and_works_otherwise():
    cuda = FakeCuda(without=("cuMemGetHandleForAddressRange",))
    driver = CudaDriver(cuda)
    assert driver.export_dmabuf(cuda.device_allocate(4096, 0), 4096) is None


def test_an_error_that_the_driver_cannot_name_keeps_its_number(cuda, driver):
    assert "999: unknown error" in str(driver.error("cuInit", 999))


def test_a_machine_without_a_driver_or_a_gpu_has_no_device():
    assert load("libno-such-driver.so.1") is None
    assert load("libc.so.6") is None  # a library without the functions
    with pytest.raises(MooncakeError, match="100: words for 100"):
        CudaDriver(FakeCuda(gpus=0))
    with pytest.raises(AttributeError):
        CudaDriver(FakeCuda(without=("cuEventQuery",)))
