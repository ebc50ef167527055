"""The methods of TransferEngine for memory of this process, under upstream's names."""

import ctypes
from collections.abc import Sequence

import structlog

from mooncake.core.errors import RequestError
from mooncake.dropin.engine.answers import FAILED, NOT_REGISTERED, OVERLAP, answers, natural, naturals
from mooncake.dropin.engine.start import Started
from transfer.memory import check_mapped

log = structlog.get_logger(__name__)


class MemoryForms:
    """Memory is named by address and size; every method may be called from any thread."""

    _started: Started | None

    def _need(self) -> Started:
        raise NotImplementedError

    @answers(FAILED)
    def register_memory(self, buffer_addr: int, capacity: int, location: str = "*") -> int:
        """Let peers reach `capacity` bytes at `buffer_addr`; -7: they overlap registered memory."""
        return self._register(self._need(), natural(buffer_addr), natural(capacity), location)

    @staticmethod
    def _register(started: Started, address: int, size_bytes: int, location: str) -> int:
        if size_bytes == 0:
            raise RequestError("capacity 0: nothing to register")
        known = location.partition(":")[0] in ("cpu", "cuda")
        if any(old.address < address + size_bytes and address < old.end for old in started.engine.buffers):
            log.warning("mooncake.engine: memory overlaps a registered range", address=hex(address))
            return OVERLAP
        started.engine.register(address, size_bytes, location if known else "*")
        return 0

    @answers(FAILED)
    def unregister_memory(self, arg0: int, /) -> int:
        """End the registration that begins at this address; -3: there is none."""
        return self._unregister(self._need(), natural(arg0))

    @staticmethod
    def _unregister(started: Started, address: int) -> int:
        buffer = started.engine.buffer_at(address)
        if buffer is None or buffer.address != address:
            log.warning("mooncake.engine: no memory is registered there", address=hex(address))
            return NOT_REGISTERED
        started.release(buffer)
        return 0

    @answers(FAILED)
    def batch_register_memory(
        self, buffer_addresses: Sequence[int], capacities: Sequence[int], location: str = "*"
    ) -> int:
        """Register all; the first failure's code, with the rest registered nevertheless."""
        started = self._need()
        addresses, sizes = naturals(buffer_addresses), naturals(capacities)
        if len(addresses) != len(sizes):
            raise RequestError(f"{len(addresses)} addresses, {len(sizes)} capacities")
        codes = [self._register(started, *pair, location) for pair in zip(addresses, sizes, strict=True)]
        return next((code for code in codes if code), 0)

    @answers(FAILED)
    def batch_unregister_memory(self, arg0: Sequence[int], /) -> int:
        """Unregister all; the first failure's code, with the rest unregistered nevertheless."""
        started = self._need()
        codes = [self._unregister(started, address) for address in naturals(arg0)]
        return next((code for code in codes if code), 0)

    @answers(0)
    def allocate_managed_buffer(self, arg0: int, /) -> int:
        """Return the address of that many registered bytes, 0 if there are none."""
        return self._need().managed.allocate(natural(arg0))

    @answers(FAILED)
    def free_managed_buffer(self, arg0: int, arg1: int, /) -> int:
        """Give a managed buffer back; of the length only its sign matters. Unknown ones are ignored."""
        natural(arg1)
        if not self._need().managed.free(natural(arg0)):
            log.warning("mooncake.engine: no managed buffer is there", address=hex(arg0))
        return 0

    @answers(0)
    def get_first_buffer_address(self, arg0: str, /) -> int:
        """Return the address of the oldest buffer that this peer (or this engine) has, 0 = none."""
        started = self._need()
        if arg0 in (started.name, started.engine.name):
            info = started.engine.info
        else:
            with started.at(arg0) as address:
                info = started.engine.peer(address, started.env.connect_s).refresh(started.env.connect_s)
        oldest = min(info.buffers, key=lambda buffer: buffer.buffer_id, default=None)
        return oldest.address if oldest else 0

    @answers(FAILED)
    def write_bytes_to_buffer(self, arg0: int, arg1: str | bytes, arg2: int, /) -> int:
        """Copy the first `arg2` bytes of `arg1` to address `arg0` of this process."""
        data = arg1.encode() if isinstance(arg1, str) else bytes(arg1)
        address, size_bytes = natural(arg0), natural(arg2)
        if size_bytes > len(data):
            raise RequestError(f"{size_bytes} bytes of {len(data)}")
        self._check_mapped(address, size_bytes)
        ctypes.memmove(address, data, size_bytes)
        return 0

    @answers(b"")
    def read_bytes_from_buffer(self, arg0: int, arg1: int, /) -> bytes:
        """Return `arg1` bytes at address `arg0` of this process, b"" if they are not mapped."""
        address, size_bytes = natural(arg0), natural(arg1)
        self._check_mapped(address, size_bytes)
        return ctypes.string_at(address, size_bytes)

    def _check_mapped(self, address: int, size_bytes: int) -> None:
        held = self._started.engine.buffer_at(address) if self._started else None
        registered = held is not None and held.view is not None and address + size_bytes <= held.end
        if size_bytes and not registered:  # registered memory was looked at once
            check_mapped(address, size_bytes)
