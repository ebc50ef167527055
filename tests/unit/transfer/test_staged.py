"""Device memory at either end is moved through pinned chunks, whatever the transport."""

import numpy as np
import pytest

from mooncake.core.errors import MooncakeError, PeerGone
from transfer.config import EngineConfig
from transfer.device_fake import FakeDevice
from transfer.engine import TransferEngine
from transfer.model import Opcode

SIZE = (9 << 20) + 5  # more than two chunks


@pytest.fixture
def ends(tmp_path):
    """(initiator, its device, owner, its device)"""
    devices = FakeDevice(0), FakeDevice(1)
    engines = [
        TransferEngine(
            EngineConfig(run_dir=str(tmp_path / f"e{i}"), transports=("shm", "tcp")), device=d
        ).start()
        for i, d in enumerate(devices)
    ]
    yield engines[0], devices[0], engines[1], devices[1]
    for engine, device in zip(engines, devices, strict=True):
        engine.close()
        assert device.pinned == {}
        assert device.under_way == 0


def content(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_device_memory_here(ends, transport):
    here, gpu, there, _ = ends
    mine = here.register(gpu.allocate(content(1)), SIZE)
    assert mine.location == "cuda:0"  # found out from the address
    theirs = there.allocate(SIZE)
    here.transfer(Opcode.WRITE, there.name, mine.address, theirs.address, SIZE, transport=transport)
    assert bytes(theirs.view) == content(1)
    theirs.view[:] = content(2)
    here.transfer(
        Opcode.READ, there.name, mine.address + 7, theirs.address + 9, SIZE - 9, transport=transport
    )
    assert gpu.content(mine.address, SIZE) == content(1)[:7] + content(2)[9:] + content(1)[-2:]


def test_device_memory_there_and_at_both_ends(ends):
    here, gpu, there, other = ends
    mine, theirs = here.allocate(SIZE), there.register(other.allocate(content(3)), SIZE)
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, SIZE)
    assert bytes(mine.view) == content(3)
    own = here.register(gpu.allocate(content(4)), SIZE)
    here.transfer(Opcode.WRITE, there.name, own.address, theirs.address, SIZE)
    assert other.content(theirs.address, SIZE) == content(4)


def test_pages_of_host_and_device_memory_in_one_batch(ends):
    here, gpu, there, _ = ends
    device, host = here.register(gpu.allocate(content(5)), SIZE), here.allocate(SIZE)
    host.view[:] = content(6)
    theirs = there.allocate(SIZE)
    pages = [(device, 0), (host, 4096), (device, 8192), (host, 12_288)]
    here.transfer(
        Opcode.WRITE,
        there.name,
        [buffer.address + at for buffer, at in pages],
        [theirs.address + at for _, at in pages],
        [4096] * 4,
    )
    expected = b"".join((content(5) if b is device else content(6))[at : at + 4096] for b, at in pages)
    assert bytes(theirs.view[: 4 * 4096]) == expected


def test_a_copy_that_fails_is_the_error_of_its_transfer(ends):
    here, gpu, there, _ = ends
    mine, theirs = here.register(gpu.allocate(content(7)), SIZE), there.allocate(SIZE)
    gpu.failures["copy", 1] = MooncakeError("xid 31")
    with pytest.raises(MooncakeError, match="xid 31"):
        here.transfer(Opcode.WRITE, there.name, mine.address, theirs.address, SIZE)
    here.transfer(Opcode.WRITE, there.name, mine.address, theirs.address, SIZE)
    assert bytes(theirs.view) == content(7)


def test_an_owners_failing_device_costs_the_connection_and_is_tried_again(ends):
    here, _, there, other = ends
    mine, theirs = here.allocate(SIZE), there.register(other.allocate(content(8)), SIZE)
    other.failures["start", 0] = MooncakeError("xid 31")
    here.transfer(Opcode.READ, there.name, mine.address, theirs.address, SIZE)
    assert bytes(mine.view) == content(8)


def test_without_a_driver_device_memory_is_out_of_reach_and_says_so(pair):
    here, there = pair
    mine, theirs = here.register(1 << 46, 4096, "cuda:0"), there.allocate(4096)
    with pytest.raises(PeerGone, match="cuda:0"):
        here.transfer(Opcode.WRITE, there.name, mine.address, theirs.address, 4096)
