"""From what applications hold (numpy, torch, mmap, a bare address) to address, size and location."""

import ctypes
from pathlib import Path
from typing import Any

from mooncake.core.errors import RequestError
from transfer.segment import Segment

MAPS = Path("/proc/self/maps")


def locate(memory: Any, size_bytes: int | None = None, location: str = "*") -> tuple[int, int, str]:
    """Return (address, size, location) of `memory`.

    Args:
        memory: an address; a torch tensor (CPU or CUDA), numpy array, mmap, writable memoryview or
            bytearray, all contiguous; or a Segment.
        size_bytes: needed with an address; otherwise the first bytes only, None = all.
        location: "*" = unknown: a tensor says itself where it is.

    Raises:
        RequestError: no writable, contiguous memory, or it is smaller than `size_bytes`.
    """
    if isinstance(memory, int):
        if size_bytes is None:
            raise RequestError("register(address): size_bytes is needed")
        return memory, size_bytes, location
    if hasattr(memory, "data_ptr"):
        if not memory.is_contiguous():
            raise RequestError("register(tensor): it must be contiguous")
        if location == "*":
            location = str(memory.device) if memory.device.type != "cpu" else "*"
        address, have = int(memory.data_ptr()), int(memory.nbytes)
    else:
        view = memory.view(0, memory.size_bytes) if isinstance(memory, Segment) else _view(memory)
        if view.readonly or not view.c_contiguous:
            raise RequestError("register: the memory must be writable and contiguous")
        have = view.nbytes
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view.cast("B"))) if have else 0
    if size_bytes is not None and size_bytes > have:
        raise RequestError(f"register: {size_bytes} bytes of {have}")
    return address, have if size_bytes is None else size_bytes, location


def check_mapped(address: int, size_bytes: int) -> None:
    """Make sure that the range is writable memory of this process: a wrong address is an error, no crash.

    Raises:
        RequestError: it is not.
    """
    end, at = address + size_bytes, address
    with MAPS.open() as maps:
        for line in maps:
            bounds, rights, _ = line.split(maxsplit=2)
            low, _, high = bounds.partition("-")
            if int(low, 16) <= at < int(high, 16) and rights.startswith("rw"):
                at = int(high, 16)
                if at >= end:
                    return
    raise RequestError(f"register: {address:#x}+{size_bytes} is not writable memory of this process")


def _view(memory: Any) -> memoryview:
    try:
        return memoryview(memory)
    except TypeError as error:
        raise RequestError(f"register: {type(memory).__name__} is no memory: {error}") from error
