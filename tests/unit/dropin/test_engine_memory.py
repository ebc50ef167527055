import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import CapacityError, PeerTimeout
from mooncake.dropin.engine import memory as engine_memory
from mooncake.dropin.engine.memory import CLASS_BYTES_MIN, SLAB_BYTES, SMALL_BYTES_MAX, ManagedBuffers
from transfer.model import Buffer


class Memory:
    """Registered memory by numbers only."""

    def __init__(self) -> None:
        self.given: list[Buffer] = []
        self.released: list[Buffer] = []
        self.busy = False
        self._next = 1 << 40

    def allocate(self, size_bytes: int) -> Buffer:
        buffer = Buffer(len(self.given), self._next, size_bytes, "cpu:0", b"", None)
        self._next += size_bytes
        self.given.append(buffer)
        return buffer

    def release(self, buffer: Buffer) -> None:
        if self.busy:
            raise PeerTimeout("in use")
        self.released.append(buffer)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def managed(memory: Memory) -> ManagedBuffers:
    return ManagedBuffers(memory.allocate, memory.release)


@given(st.lists(st.tuples(st.integers(0, 3 << 20), st.booleans()), max_size=60))
@settings(max_examples=50)
def test_buffers_in_use_never_overlap_and_lie_in_registered_memory(steps: list[tuple[int, bool]]) -> None:
    memory = Memory()
    managed = ManagedBuffers(memory.allocate, memory.release)
    live: dict[int, int] = {}
    for size_bytes, free in steps:
        if free and live:
            address = min(live)
            assert managed.free(address)
            del live[address]
        address = managed.allocate(size_bytes)
        assert not any(
            address < other + size and other < address + size_bytes for other, size in live.items()
        )
        held = [b for b in memory.given if b not in memory.released]
        assert any(b.address <= address and address + size_bytes <= b.end for b in held)
        live[address] = size_bytes


def test_a_freed_small_buffer_is_the_next_of_its_size(managed: ManagedBuffers) -> None:
    address = managed.allocate(1000)
    assert managed.free(address)
    assert managed.allocate(2000) == address


def test_small_buffers_share_a_slab(memory: Memory, managed: ManagedBuffers) -> None:
    for _ in range(SLAB_BYTES // CLASS_BYTES_MIN):
        managed.allocate(1)
    assert len(memory.given) == 1
    managed.allocate(1)
    assert len(memory.given) == 2


def test_a_large_buffer_is_given_back(memory: Memory, managed: ManagedBuffers) -> None:
    address = managed.allocate(SMALL_BYTES_MAX + 1)
    assert managed.free(address)
    assert [buffer.address for buffer in memory.released] == [address]


def test_a_large_buffer_that_a_peer_uses_stays_in_use(memory: Memory, managed: ManagedBuffers) -> None:
    address = managed.allocate(SMALL_BYTES_MAX + 1)
    memory.busy = True
    with pytest.raises(PeerTimeout):
        managed.free(address)
    memory.busy = False
    assert managed.free(address)


def test_what_is_not_in_use_cannot_be_freed(managed: ManagedBuffers) -> None:
    address = managed.allocate(10)
    assert not managed.free(address + 1)
    assert managed.free(address)
    assert not managed.free(address)


def test_managed_buffers_are_bounded(managed: ManagedBuffers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_memory, "MANAGED_MAX", 1)
    address = managed.allocate(10)
    with pytest.raises(CapacityError):
        managed.allocate(10)
    managed.free(address)
    assert managed.allocate(10)
