"""Memory of the caller that a member is read into, checked before anything is written to it."""

import ctypes
from typing import Any

import numpy as np

from mooncake.dropin.structured.manifest import Field
from mooncake.dropin.structured.model import RawMemory, TensorObject
from mooncake.dropin.structured.tree import is_tensor
from transfer.memory import check_mapped


def memory_at(address: int, size_bytes: int) -> memoryview:
    """Return memory of this process.

    Raises:
        RequestError: it is not mapped, or cannot be written to.
    """
    check_mapped(address, size_bytes)
    array: Any = (ctypes.c_ubyte * size_bytes).from_address(address)
    return memoryview(array).cast("B")


def place_for(name: str, field: Field, shape: list[int], size: int, destination: Any) -> tuple[Any, Any]:
    """Return the bytes of a destination, and what is the value once they are filled (None: made of them).

    Args:
        name: of the member.
        field: an array's or a tensor's.
        shape: what will be read of it.
        size: its bytes.
        destination: an array, a tensor, raw_destination or tensor_object_buffer.

    Raises:
        TypeError: none of these. ValueError: it does not fit.
    """
    if isinstance(destination, RawMemory):
        if destination.size < size:
            raise ValueError(f"member {name}: raw destination has {destination.size} bytes, {size} are read")
        return np.frombuffer(memory_at(destination.ptr, size), np.uint8), None
    if isinstance(destination, TensorObject) and field.encoding == "torch_tensor":
        return _tensor_object(name, field, shape, size, destination)
    return _array(name, field, shape, size, destination)


def _array(name: str, field: Field, shape: list[int], size: int, destination: Any) -> tuple[Any, Any]:
    if isinstance(destination, np.ndarray) and field.encoding == "ndarray":
        have, fits = destination.dtype.str, destination.flags.c_contiguous and destination.flags.writeable
        bytes_there = destination
    elif is_tensor(destination) and field.encoding == "torch_tensor":
        have = str(destination.dtype)
        fits = destination.is_contiguous() and destination.device.type == "cpu"
        bytes_there = destination.detach()
    else:
        kinds = "a numpy array" if field.encoding == "ndarray" else "a tensor, tensor_object_buffer"
        raise TypeError(f"member {name}: destination must be {kinds} or raw_destination")
    if have != field.dtype:
        raise ValueError(f"member {name}: destination dtype mismatch: expected {field.dtype}, got {have}")
    if list(destination.shape) != shape:
        have = tuple(destination.shape)
        raise ValueError(f"member {name}: destination shape mismatch: expected {tuple(shape)}, got {have}")
    if not fits:
        raise ValueError(f"member {name}: destination must be contiguous and writeable memory of the host")
    if not size:
        return np.empty(0, np.uint8), destination
    if isinstance(destination, np.ndarray):
        return bytes_there.reshape(-1).view(np.uint8), destination
    import torch

    return bytes_there.reshape(-1).view(torch.uint8).numpy(), destination


def _tensor_object(
    name: str, field: Field, shape: list[int], size: int, destination: TensorObject
) -> tuple[Any, Any]:
    import torch

    from mooncake.dropin.store.tensors import HEAD_BYTES, parts_of_tensor

    if destination.size < HEAD_BYTES + size:
        raise ValueError(f"member {name}: {destination.size} bytes for a header and {size}")
    memory = memory_at(destination.ptr, HEAD_BYTES + size)
    dtype = getattr(torch, field.dtype.removeprefix("torch."), None)
    memory[:HEAD_BYTES] = parts_of_tensor(torch.empty(shape, dtype=dtype))[0]
    return np.frombuffer(memory[HEAD_BYTES:], np.uint8), None
