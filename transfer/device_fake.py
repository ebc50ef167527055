"""A device without hardware, for tests: as asynchronous and as unforgiving as a real one allows.

Its addresses are no addresses of this process. A copy's bytes move only when somebody has waited for
it: whoever reads a chunk too early finds POISON, whoever reuses one too early copies the wrong bytes.
"""

import ctypes
import mmap
import threading

import numpy as np

from mooncake.core.errors import CapacityError, MooncakeError, RequestError
from transfer.device import HostMemory

DEVICE_BASE = 0x7F00_0000_0000_0000
"""No user address on x86-64 or arm64: touching it would be a crash, not a wrong result."""
POISON = 0xEE


class FakeCopy:
    """See DeviceCopy."""

    def __init__(self, device: "FakeDevice", number: int, target: memoryview, source: memoryview) -> None:
        """Copy number `number` of `device`, counted from 0."""
        self._device = device
        self._number = number
        self._target = target
        self._source = source
        self._ended = False

    def wait(self, timeout_s: float) -> bool:  # noqa: ARG002
        """See DeviceCopy; a copy in `stuck` is not waited for."""
        with self._device.lock:
            if self._number in self._device.stuck:
                return False
            if not self._ended:
                self._ended = True
                self._device.events.append(f"end {self._number}")
                self._device.under_way -= 1
                error = self._device.failures.get(("copy", self._number))
                if error is not None:
                    raise error
                self._target[:] = self._source
            return True


class FakeDevice:
    """See DeviceMemory."""

    def __init__(self, ordinal: int = 0, host_bytes_max: int = 1 << 30) -> None:
        """Device "cuda:`ordinal`", where at most `host_bytes_max` can be pinned."""
        self.location = f"cuda:{ordinal}"
        self.host_bytes_max = host_bytes_max
        self.lock = threading.RLock()
        self.events: list[str] = []
        """What happened: "start 0", "end 0", ...; tests add their own."""
        self.failures: dict[tuple[str, int], MooncakeError] = {}
        """("start" | "copy", number of the copy) -> raised there."""
        self.stuck: set[int] = set()
        """Numbers of copies that do not end; take one out and it does."""
        self.under_way = 0
        self.pinned: dict[int, HostMemory] = {}
        self._memory: dict[int, memoryview] = {}
        self._copies = 0
        self._next = DEVICE_BASE

    def allocate(self, content: bytes) -> int:
        """Return the address of new device memory that holds `content`."""
        with self.lock:
            address = self._next
            self._next += len(content) + mmap.PAGESIZE
            self._memory[address] = memoryview(bytearray(content))
            return address

    def content(self, address: int, size_bytes: int) -> bytes:
        """Return the device's bytes."""
        with self.lock:
            return bytes(self._find(address, size_bytes))

    def _find(self, address: int, size_bytes: int) -> memoryview:
        for base, memory in self._memory.items():
            if base <= address and address + size_bytes <= base + memory.nbytes:
                return memory[address - base : address - base + size_bytes]
        raise RequestError(f"{address:#x}+{size_bytes} is not device memory")

    def device_of(self, address: int) -> str | None:
        """See DeviceMemory."""
        with self.lock:
            inside = any(base <= address < base + memory.nbytes for base, memory in self._memory.items())
        return self.location if inside else None

    def allocate_host(self, size_bytes: int, near: int) -> HostMemory:
        """See DeviceMemory."""
        with self.lock:
            self._find(near, 1)
            if size_bytes + sum(memory.view.nbytes for memory in self.pinned.values()) > self.host_bytes_max:
                raise CapacityError(f"cannot pin {size_bytes} bytes")
            view = memoryview(mmap.mmap(-1, size_bytes))
            memory = HostMemory(ctypes.addressof(ctypes.c_char.from_buffer(view)), view)
            self.pinned[memory.address] = memory
            return memory

    def free_host(self, memory: HostMemory) -> None:
        """See DeviceMemory."""
        with self.lock:
            del self.pinned[memory.address]

    def copy_to_host(self, host: int, device: int, size_bytes: int) -> FakeCopy:
        """See DeviceMemory."""
        with self.lock:
            target = self.pinned[host].view[:size_bytes]
            copy = self._start(target, self._find(device, size_bytes))
            np.frombuffer(target, np.uint8).fill(POISON)
            return copy

    def copy_from_host(self, device: int, host: int, size_bytes: int) -> FakeCopy:
        """See DeviceMemory."""
        with self.lock:
            return self._start(self._find(device, size_bytes), self.pinned[host].view[:size_bytes])

    def _start(self, target: memoryview, source: memoryview) -> FakeCopy:
        number, self._copies = self._copies, self._copies + 1
        error = self.failures.get(("start", number))
        if error is not None:
            raise error
        self.events.append(f"start {number}")
        self.under_way += 1
        return FakeCopy(self, number, target, source)

    def export_dmabuf(self, address: int, size_bytes: int) -> tuple[int, int] | None:  # noqa: ARG002
        """See DeviceMemory: it has none."""
        return None

    def close(self) -> None:
        """See DeviceMemory."""
