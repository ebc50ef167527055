"""From what applications hold (numpy, torch, mmap, a bare address) to address, size and location."""

import ctypes
from typing import Any

from mooncake.core.errors import RequestError
from transfer.segment import Segment


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


def _view(memory: Any) -> memoryview:
    try:
        return memoryview(memory)
    except TypeError as error:
        raise RequestError(f"register: {type(memory).__name__} is no memory: {error}") from error
