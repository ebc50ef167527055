"""Managed buffers of the drop-in engine, out of slabs of registered memory."""

import threading
from collections.abc import Callable

from mooncake.core.errors import CapacityError, MooncakeError
from transfer.model import Buffer

SLAB_BYTES = 16 << 20
"""Small buffers share one: each slab is a memfd and a registration of its own."""
SMALL_BYTES_MAX = 1 << 20
CLASS_BYTES_MIN = 4 << 10
MANAGED_MAX = 65_536


class ManagedBuffers:
    """Hands out registered memory by address; freed small buffers are reused, large ones are given back."""

    def __init__(self, allocate: Callable[[int], Buffer], release: Callable[[Buffer], None]) -> None:
        """`allocate` makes registered memory of that many bytes, `release` ends it."""
        self._allocate = allocate
        self._release = release
        self._lock = threading.Lock()
        self._live: dict[int, int | Buffer] = {}  # address -> its class, or the large buffer itself
        self._free: dict[int, list[int]] = {}
        self._slab: Buffer | None = None
        self._slab_used = 0

    def allocate(self, size_bytes: int) -> int:
        """Return the address of at least `size_bytes` bytes.

        Raises:
            ConfigError: the machine has not that much; CapacityError: too many.
        """
        with self._lock:
            if len(self._live) >= MANAGED_MAX:
                raise CapacityError(f"{MANAGED_MAX} managed buffers are in use: free some")
            if size_bytes > SMALL_BYTES_MAX:
                buffer = self._allocate(size_bytes)
                self._live[buffer.address] = buffer
                return buffer.address
            size_class = max(CLASS_BYTES_MIN, 1 << (size_bytes - 1).bit_length())
            free = self._free.get(size_class)
            address = free.pop() if free else self._carve(size_class)
            self._live[address] = size_class
            return address

    def free(self, address: int) -> bool:
        """Take a buffer back; return whether it was in use.

        Raises:
            PeerTimeout: a peer may still use a large one; it stays in use.
        """
        with self._lock:
            held = self._live.pop(address, None)
            if isinstance(held, int):
                self._free.setdefault(held, []).append(address)
        if isinstance(held, Buffer):
            try:
                self._release(held)
            except MooncakeError:
                with self._lock:
                    self._live[address] = held
                raise
        return held is not None

    def _carve(self, size_class: int) -> int:
        """Cut a new buffer off the slab; what is left of a full one stays unused (less than 1 MiB)."""
        if self._slab is None or self._slab_used + size_class > SLAB_BYTES:
            self._slab, self._slab_used = self._allocate(SLAB_BYTES), 0
        address = self._slab.address + self._slab_used
        self._slab_used += size_class
        return address
