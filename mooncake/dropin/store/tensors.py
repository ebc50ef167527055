"""Tensors in `mooncake.store`: a header of fixed size with type and shape, then the bytes.

The bytes of an object that upstream wrote are not read here, nor the other way round.
"""

import copy
import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import structlog

from mooncake.core.errors import RequestError
from mooncake.dropin.store.calls import Calls, Parts
from mooncake.dropin.store.parallel_layout import Layout, Split
from mooncake.dropin.store.types import INVALID_PARAMS, OK, ReplicateConfig

if TYPE_CHECKING:
    import torch

HEAD_BYTES = 256
"""Data that follows is aligned as its buffer is."""
MAGIC = b"MCT1"
DIMENSIONS_MAX = 16
_HEAD = struct.Struct(f"<4sBB2x{DIMENSIONS_MAX}Q3I")
DTYPES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int16": 2, "int32": 4,
    "int64": 8, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8, "complex128": 16,
    "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip
"""torch's name and the bytes of one element. The header has their places: only ever appended to."""
_NUMBERS = {name: number for number, name in enumerate(DTYPES)}
_NAMES = tuple(DTYPES)
SIDES_MAX = 1 << 48
"""Of one dimension; a header that says more is none."""

log = structlog.get_logger(__name__)

Write = Callable[[Sequence[str], Sequence[Parts], ReplicateConfig | None], list[int]]


class Head(NamedTuple):
    """What a header says."""

    dtype: str
    shape: tuple[int, ...]
    split: Split | None
    """Which piece of a tensor this is, if whoever stored it knew."""

    @property
    def item_bytes(self) -> int:
        """Return the bytes of one element."""
        return DTYPES[self.dtype]

    @property
    def data_bytes(self) -> int:
        """Return the bytes of all elements."""
        return math.prod(self.shape) * self.item_bytes

    def pack(self) -> bytes:
        """Return its bytes."""
        shape = [*self.shape, *[0] * (DIMENSIONS_MAX - len(self.shape))]
        split = self.split
        piece = (0, 0, 0) if split is None else (split.rank, split.size, split.dim)
        packed = _HEAD.pack(MAGIC, _NUMBERS[self.dtype], len(self.shape), *shape, *piece)
        return packed.ljust(HEAD_BYTES, b"\0")


def head_of(data: Any) -> Head:
    """Return the header of an object that is one tensor.

    Raises:
        RequestError: it is none.
    """
    view = memoryview(data)
    if view.nbytes < HEAD_BYTES:
        raise RequestError(f"{view.nbytes} bytes are no tensor")
    magic, number, dimensions, *rest = _HEAD.unpack_from(view)
    if magic != MAGIC or number >= len(_NAMES) or dimensions > DIMENSIONS_MAX:
        raise RequestError("these bytes are no tensor")
    shape = tuple(rest[:dimensions])
    rank, size, dim = rest[DIMENSIONS_MAX:]
    head = Head(_NAMES[number], shape, Split(rank, size, dim) if size else None)
    if max(shape, default=0) > SIDES_MAX or HEAD_BYTES + head.data_bytes != view.nbytes:
        raise RequestError(f"a tensor of shape {list(shape)} is not {view.nbytes} bytes")
    return head


def dtype_of(tensor: Any) -> str:
    """Return the name of a tensor's type.

    Raises:
        RequestError: it is no tensor, or one of a kind that cannot be stored.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise RequestError(f"a tensor, not {type(tensor).__name__}")
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES or tensor.dim() > DIMENSIONS_MAX:
        raise RequestError(f"a tensor of {name} with {tensor.dim()} dimensions: not one that can be stored")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        raise RequestError("a tensor that is sparse, nested or without data cannot be stored")
    return name


def parts_of_tensor(tensor: Any, split: Split | None = None) -> Parts:
    """Return header and bytes of a tensor; those of another device are copied to the host.

    Raises:
        RequestError: it is no tensor, or one of a kind that cannot be stored.
    """
    import torch

    name = dtype_of(tensor)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # reshape keeps the stride of a single element
    head = Head(name, tuple(tensor.shape), split).pack()
    return [memoryview(head), memoryview(flat.view(torch.uint8).numpy())]


def tensor_of(data: Any) -> "torch.Tensor":
    """Return the tensor in `data`, which shares its memory unless that is immutable.

    Raises:
        RequestError: there is none.
    """
    import torch

    head = head_of(data)
    dtype = getattr(torch, head.dtype)
    if not head.data_bytes:
        return torch.empty(head.shape, dtype=dtype)
    if isinstance(data, bytes):  # a tensor can be written to; numpy's memory comes in huge pages
        data = np.frombuffer(data, np.uint8).copy()
    return torch.frombuffer(data, dtype=dtype, offset=HEAD_BYTES).reshape(head.shape)


def serialize(tensor: Any) -> tuple[bytes, int, int, Any]:
    """Return header, address and bytes of the data, and what keeps these there; raises as parts_of_tensor."""
    head, data = parts_of_tensor(tensor)
    owner = np.frombuffer(data, np.uint8)
    return bytes(head), int(owner.__array_interface__["data"][0]), owner.nbytes, owner


def metadata_size() -> int:
    """Return the bytes of a header."""
    return HEAD_BYTES


def put_tensors(
    write: Write, keys: Sequence[str], tensors: Sequence[Any], config: ReplicateConfig | None
) -> list[int]:
    """Store tensors with `write`; -600 for what is none, or where there is not one for each key."""
    if len(keys) != len(tensors):
        log.error("mooncake.store: not a tensor for each key", keys=len(keys), tensors=len(tensors))
        return [INVALID_PARAMS] * len(keys)
    return put_pieces(
        write, keys, [[(key, one, None)] for key, one in zip(keys, tensors, strict=True)], config
    )


Piece = tuple[str, Any, Split | None]
"""Name, tensor, and which piece of a tensor that is."""


def put_pieces(
    write: Write, keys: Sequence[str], pieces: Sequence[Sequence[Piece]], config: ReplicateConfig | None
) -> list[int]:
    """Store the pieces of each key; return 0, the first failure, or -600: none, or one that is no tensor."""
    codes = [OK] * len(check_keys(keys))
    if config is not None and config.group_ids is not None and len(config.group_ids) != len(keys):
        log.error("mooncake.store: not a group for each key", keys=len(keys), groups=len(config.group_ids))
        return [INVALID_PARAMS] * len(keys)
    rows: list[int] = []
    names: list[str] = []
    sources: list[Parts] = []
    for row, of_key in enumerate(pieces):
        try:
            found = [parts_of_tensor(tensor, split) for _, tensor, split in of_key]
        except RequestError as error:
            log.error("mooncake.store: not put", key=keys[row], reason=str(error))
            found = []
        if not found:
            codes[row] = INVALID_PARAMS
            continue
        sources += found
        names += [name for name, _, _ in of_key]
        rows += [row] * len(of_key)
    for row, code in zip(rows, write(names, sources, _for_rows(config, rows)), strict=True):
        codes[row] = codes[row] or code
    return codes


def _for_rows(config: ReplicateConfig | None, rows: Sequence[int]) -> ReplicateConfig | None:
    if config is None or config.group_ids is None:
        return config
    spread = copy.copy(config)
    spread.group_ids = [config.group_ids[row] for row in rows]
    return spread


def check_keys(keys: Sequence[str]) -> Sequence[str]:
    """Return them.

    Raises:
        TypeError: one is no text.
    """
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(f"a key is a str, not {type(key).__name__}")
    return keys


def get_tensors(calls: Calls, keys: Sequence[str]) -> "list[torch.Tensor | None]":
    """Return tensors, None for what is missing or is no tensor."""
    return [tensor_or_none(key, value) for key, value in zip(keys, calls.get(check_keys(keys)), strict=True)]


def get_tensors_into(
    calls: Calls, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
) -> "list[torch.Tensor | None]":
    """Read tensors, headers and all, into memory and return them there; None as in get_tensors."""
    memory = memory_for(calls, keys, addresses, sizes)
    codes = calls.get_into(keys, [[part] for part in memory])
    rows = zip(keys, memory, codes, strict=True)
    return [tensor_or_none(key, part[:code] if code > 0 else None) for key, part, code in rows]


def memory_for(
    calls: Calls, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
) -> list[memoryview]:
    """Return the memory of each key.

    Raises:
        RequestError: not one for each, or no such memory.
    """
    if not len(check_keys(keys)) == len(addresses) == len(sizes):
        raise RequestError(f"{len(keys)} keys, {len(addresses)} addresses, {len(sizes)} sizes")
    return [calls.memory(address, size) for address, size in zip(addresses, sizes, strict=True)]


def tensors_at(
    calls: Calls, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]
) -> "list[torch.Tensor | None]":
    """Return the tensors that get_tensors_into has left in memory; None where there is none.

    Raises:
        RequestError: not an address and a size for each key.
    """
    if not len(keys) == len(addresses) == len(sizes):
        raise RequestError(f"{len(keys)} keys, {len(addresses)} addresses, {len(sizes)} sizes")
    found: list[torch.Tensor | None] = []
    for key, address, size in zip(keys, addresses, sizes, strict=True):
        try:
            found.append(tensor_of(calls.memory(address, size)))
        except RequestError as error:
            log.error("mooncake.store: no tensor in memory", key=key, reason=str(error))
            found.append(None)
    return found


def shard_key(key: str, rank: int, count: int) -> str:
    """Return the name of one rank's shard, upstream's; the tensor's own if there is one rank."""
    return Layout((), Split(rank, count, None)).name(key) if count > 1 else key


def cut(tensor: Any, size: int, dim: int) -> "list[torch.Tensor]":
    """Return the pieces of a tensor along a dimension.

    Raises:
        RequestError: it cannot be stored, has no such dimension, or not so many pieces.
    """
    dtype_of(tensor)
    if not -tensor.dim() <= dim < tensor.dim():
        raise RequestError(f"a tensor of shape {list(tensor.shape)} has no dimension {dim}")
    pieces = tensor.chunk(size, dim)
    if len(pieces) != size:
        raise RequestError(f"a tensor of shape {list(tensor.shape)} has not {size} pieces along {dim}")
    return list(pieces)


def put_shards(
    write: Write,
    keys: Sequence[str],
    tensors: Sequence[Any],
    count: int,
    dimension: int,
    config: ReplicateConfig | None,
) -> list[int]:
    """Store tensors in `count` shards along a dimension, one object each; 0 or the first failure of each."""
    if len(keys) != len(tensors):
        log.error("mooncake.store: not a tensor for each key", keys=len(keys), tensors=len(tensors))
        return [INVALID_PARAMS] * len(keys)
    if count <= 1:
        return put_tensors(write, keys, tensors, config)
    pieces: list[list[Piece]] = []
    for key, tensor in zip(keys, tensors, strict=True):
        try:
            shards = cut(tensor, count, dimension)
        except RequestError as error:
            log.error("mooncake.store: not put", key=key, reason=str(error))
            pieces.append([])
            continue
        splits = [Split(rank, count, dimension % tensor.dim()) for rank in range(count)]
        pieces.append(
            [(shard_key(key, one.rank, count), shard, one) for shard, one in zip(shards, splits, strict=True)]
        )
    return put_pieces(write, keys, pieces, config)


def tensor_or_none(key: str, data: Any) -> "torch.Tensor | None":
    """Return the tensor in `data`; None, which is logged where there are bytes, if there is none."""
    if data is None:
        return None
    try:
        return tensor_of(data)
    except RequestError as error:
        log.error("mooncake.store: no tensor", key=key, reason=str(error))
        return None
