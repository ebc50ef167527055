"""The buffers of this engine: found by address, by number, by capability; counted while in use.

A buffer that is in use is never let go: `retire` first stops new uses, then waits for the running ones.
"""

import bisect
import ctypes
import itertools
import secrets
import threading
import time
from collections.abc import Iterator

from mooncake.core.errors import CapacityError, PeerTimeout, RequestError
from transfer.model import KEY_BYTES, Buffer

BUFFERS_MAX = 65_536
"""A vLLM worker registers two buffers per layer: some hundreds."""
ADDRESS_MAX = 1 << 64
HOST_LOCATIONS = ("cpu", "*")


def is_host(location: str) -> bool:
    """Return whether the host can address memory at `location` ("cpu:0", "*")."""
    return location.partition(":")[0] in HOST_LOCATIONS


def view_at(address: int, size_bytes: int) -> memoryview:
    """Return the process's own memory at `address` as writable bytes. The caller vouches for it."""
    return memoryview((ctypes.c_ubyte * size_bytes).from_address(address)).cast("B")


class Registry:
    """Registered buffers, which never overlap. Look-ups take no lock: the tables are replaced as a whole."""

    def __init__(self) -> None:
        """Empty."""
        self.lock = threading.Lock()  # of Buffer.uses and Buffer.retired too
        self._lock = threading.Condition(self.lock)
        self._table: tuple[list[int], list[Buffer]] = ([], [])
        self._by_key: dict[bytes, Buffer] = {}
        self._ids = itertools.count(1)
        self.version = 0

    def __iter__(self) -> Iterator[Buffer]:
        """Yield the buffers in order of address."""
        return iter(self._table[1])

    def add(self, address: int, size_bytes: int, location: str = "*", owner: object = None) -> Buffer:
        """Register a range.

        Raises:
            RequestError: no such range, or it overlaps a registered one.
            CapacityError: too many buffers.
        """
        if address <= 0 or size_bytes <= 0 or address + size_bytes > ADDRESS_MAX:
            raise RequestError(f"no memory at {address:#x}+{size_bytes}")
        view = view_at(address, size_bytes) if is_host(location) else None
        with self._lock:
            starts, buffers = self._table
            if len(buffers) >= BUFFERS_MAX:
                raise CapacityError(f"{BUFFERS_MAX} buffers are registered: register fewer, larger ones")
            at = bisect.bisect_right(starts, address)
            for other in buffers[max(0, at - 1) : at + 1]:
                if address < other.end and other.address < address + size_bytes:
                    raise RequestError(
                        f"{address:#x}+{size_bytes} overlaps registered {other.address:#x}+{other.size_bytes}"
                    )
            key = secrets.token_bytes(KEY_BYTES)
            buffer = Buffer(next(self._ids), address, size_bytes, location, key, view, owner)
            self._table = (
                [*starts[:at], address, *starts[at:]],
                [*buffers[:at], buffer, *buffers[at:]],
            )
            self._by_key[key] = buffer
            self.version += 1
        return buffer

    def find(self, address: int, size_bytes: int) -> Buffer | None:
        """Return the buffer that holds all of the range."""
        starts, buffers = self._table
        at = bisect.bisect_right(starts, address) - 1
        if at < 0:
            return None
        buffer = buffers[at]
        return buffer if address + size_bytes <= buffer.end else None

    def by_key(self, key: bytes) -> Buffer | None:
        """Return the buffer that this capability opens."""
        return self._by_key.get(key)

    def take(self, *buffers: Buffer) -> None:
        """Keep `buffers` (each once) from being let go, until `give`.

        Raises:
            RequestError: one of them is being unregistered; none is kept then.
        """
        with self._lock:
            for buffer in buffers:
                if buffer.retired:
                    raise RequestError(f"buffer {buffer.address:#x} is being unregistered")
            for buffer in buffers:
                buffer.uses += 1

    def give(self, *buffers: Buffer) -> None:
        """End a use."""
        with self._lock:
            for buffer in buffers:
                buffer.uses -= 1
                if buffer.retired:
                    self._lock.notify_all()

    def hide(self, buffer: Buffer) -> None:
        """Take `buffer` out of every look-up and refuse new uses.

        Raises:
            RequestError: it is not registered.
        """
        with self._lock:
            if not any(other is buffer for other in self._table[1]):
                raise RequestError(f"no buffer is registered at {buffer.address:#x}")
            self._by_key.pop(buffer.key, None)
            buffer.retired = True

    def retire(self, buffer: Buffer, deadline_s: float) -> None:
        """Wait until nobody uses the hidden `buffer`, then forget it.

        Raises:
            PeerTimeout: somebody still does after `deadline_s`; it stays registered and hidden.
        """
        end_s = time.monotonic() + deadline_s
        with self._lock:
            while buffer.uses:
                if not self._lock.wait(end_s - time.monotonic()):
                    raise PeerTimeout(f"buffer {buffer.address:#x}: {buffer.uses} transfers under way")
            kept = [other for other in self._table[1] if other is not buffer]
            self._table = ([other.address for other in kept], kept)
            self.version += 1
