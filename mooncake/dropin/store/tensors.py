"""Tensors in `mooncake.store`: a header of fixed size with type and shape, then the bytes.

The bytes of an object that upstream wrote are not read here, nor the other way round.
"""

import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from mooncake.core.errors import RequestError
from mooncake.dropin.store.calls import Calls, Parts
from mooncake.dropin.store.types import INVALID_PARAMS, OK, ReplicateConfig

if TYPE_CHECKING:
    import torch

HEAD_BYTES = 256
"""Data that follows is aligned as its buffer is."""
MAGIC = b"MCT1"
DIMENSIONS_MAX = 16
_HEAD = struct.Struct(f"<4sBB2x{DIMENSIONS_MAX}Q")
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool",
    "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "uint16", "uint32", "uint64",
)  # fmt: skip
"""By number, in the header: only ever appended to."""
SIDES_MAX = 1 << 48
"""Of one dimension; a header that says more is none."""

log = structlog.get_logger(__name__)


def parts_of_tensor(tensor: Any) -> Parts:
    """Return header and bytes of a tensor; those of another device are copied to the host.

    Raises:
        RequestError: it is no tensor, or one of a kind that has no number here.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise RequestError(f"a tensor, not {type(tensor).__name__}")
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES or tensor.dim() > DIMENSIONS_MAX or tensor.is_sparse:
        raise RequestError(f"a tensor of {name} with {tensor.dim()} dimensions: not one that can be stored")
    shape = [*tensor.shape, *[0] * (DIMENSIONS_MAX - tensor.dim())]
    head = _HEAD.pack(MAGIC, DTYPES.index(name), tensor.dim(), *shape).ljust(HEAD_BYTES, b"\0")
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [memoryview(head), memoryview(plain.numpy())]


def tensor_of(data: Any) -> "torch.Tensor":
    """Return the tensor in `data`, which shares its memory.

    Raises:
        RequestError: there is none.
    """
    import torch

    view = memoryview(bytearray(data) if isinstance(data, bytes) else data)
    if view.nbytes < HEAD_BYTES:
        raise RequestError(f"{view.nbytes} bytes are no tensor")
    magic, number, dimensions, *shape = _HEAD.unpack_from(view)
    if magic != MAGIC or number >= len(DTYPES) or dimensions > DIMENSIONS_MAX:
        raise RequestError("these bytes are no tensor")
    dtype = getattr(torch, DTYPES[number])
    sides = shape[:dimensions]
    count = math.prod(sides)
    if max(sides, default=0) > SIDES_MAX or count * dtype.itemsize > view.nbytes - HEAD_BYTES:
        raise RequestError(f"a tensor of shape {sides} in {view.nbytes} bytes")
    if not count:
        return torch.empty(sides, dtype=dtype)
    return torch.frombuffer(view, dtype=dtype, count=count, offset=HEAD_BYTES).reshape(sides)


def serialize(tensor: Any) -> tuple[bytes, int, int, Any]:
    """Return header, address and bytes of the data, and what keeps these there; raises as parts_of_tensor."""
    head, data = parts_of_tensor(tensor)
    owner = np.frombuffer(data, np.uint8)
    return bytes(head), int(owner.__array_interface__["data"][0]), owner.nbytes, owner


def metadata_size() -> int:
    """Return the bytes of a header."""
    return HEAD_BYTES


def put_tensors(
    write: Callable[[Sequence[str], Sequence[Parts], ReplicateConfig | None], list[int]],
    keys: Sequence[str],
    tensors: Sequence[Any],
    config: ReplicateConfig | None,
) -> list[int]:
    """Store tensors with `write`; -600 for what is none, or where there is not one for each key."""
    if len(keys) != len(tensors):
        return [INVALID_PARAMS] * len(keys)
    codes = [INVALID_PARAMS] * len(keys)
    rows, sources = [], []
    for row, tensor in enumerate(tensors):
        try:
            sources.append(parts_of_tensor(tensor))
            rows.append(row)
        except RequestError as error:
            log.error("mooncake.store: not put", key=keys[row], reason=str(error))
    for row, code in zip(rows, write([keys[row] for row in rows], sources, config), strict=True):
        codes[row] = code
    return codes


def get_tensors(calls: Calls, keys: Sequence[str]) -> "list[torch.Tensor | None]":
    """Return tensors, None for what is missing or is no tensor."""
    return [
        _tensor(key, value and bytearray(value)) for key, value in zip(keys, calls.get(keys), strict=True)
    ]


def get_tensors_into(
    calls: Calls, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
) -> "list[torch.Tensor | None]":
    """Read tensors, headers and all, into memory and return them there; None as in get_tensors."""
    if not len(keys) == len(addresses) == len(sizes):
        raise RequestError(f"{len(keys)} keys, {len(addresses)} addresses, {len(sizes)} sizes")
    memory = [calls.memory(address, size) for address, size in zip(addresses, sizes, strict=True)]
    codes = calls.get_into(keys, [[part] for part in memory])
    rows = zip(keys, memory, codes, strict=True)
    return [_tensor(key, part[:code] if code > 0 else None) for key, part, code in rows]


def put_tensors_from(
    write: Callable[[Sequence[str], Sequence[Parts], ReplicateConfig | None], list[int]],
    calls: Calls,
    keys: Sequence[str],
    addresses: Sequence[int],
    sizes: Sequence[int],
) -> list[int]:
    """Store what get_tensors_into has left in memory: header and bytes; -600 for what is none."""
    if not len(keys) == len(addresses) == len(sizes):
        return [INVALID_PARAMS] * len(keys)
    codes = [INVALID_PARAMS] * len(keys)
    rows: list[int] = []
    sources: list[Parts] = []
    for row, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
        try:
            part = calls.memory(address, size)
            tensor_of(part)
            rows.append(row)
            sources.append([part])
        except RequestError as error:
            log.error("mooncake.store: not put", key=keys[row], reason=str(error))
    for row, code in zip(rows, write([keys[row] for row in rows], sources, None), strict=True):
        codes[row] = code
    return codes


def shard_key(key: str, rank: int, count: int) -> str:
    """Return the name of one rank's shard, upstream's; the tensor's own if there is one rank."""
    return f"{key}_tp_{rank}" if count > 1 else key


def put_shards(
    write: Callable[[Sequence[str], Sequence[Parts], ReplicateConfig | None], list[int]],
    key: str,
    tensor: Any,
    count: int,
    dimension: int,
    config: ReplicateConfig | None,
) -> int:
    """Store a tensor in `count` shards along a dimension, one object each; 0 or the first failure."""
    import torch

    if count <= 1:
        return put_tensors(write, [key], [tensor], config)[0]
    if not isinstance(tensor, torch.Tensor) or not -tensor.dim() <= dimension < tensor.dim():
        return INVALID_PARAMS
    shards = tensor.chunk(count, dimension)
    if len(shards) != count:
        log.error("mooncake.store: not so many shards", key=key, shape=list(tensor.shape), shards=count)
        return INVALID_PARAMS
    keys = [shard_key(key, rank, count) for rank in range(count)]
    return next((code for code in put_tensors(write, keys, shards, config) if code), OK)


def _tensor(key: str, data: Any) -> "torch.Tensor | None":
    if data is None:
        return None
    try:
        return tensor_of(data)
    except RequestError as error:
        log.error("mooncake.store: no tensor", key=key, reason=str(error))
        return None
