"""One Python value as bytes and back: containers and scalars by msgpack, arrays as their raw bytes.

Types come back as they went in: tuples as tuples, numpy scalars as numpy scalars, dtype and shape of every
array. What has no such form is refused and named; nothing is pickled, so that nothing read can run.

    u32 bytes of the msgpack part | u32 1: it has nodes of ours | msgpack | large arrays, aligned
"""

import math
import re
import struct
import sys
from types import NoneType
from typing import Any

import msgspec
import numpy as np

from mooncake.core.errors import IntegrityError

ALIGN_BYTES = 64
INLINE_BYTES_MAX = 4096
"""Larger arrays lie behind the msgpack part and are not copied when they are read."""
DEPTH_MAX = 64
DIMENSIONS_MAX = 32
SIDE_MAX = 1 << 48
SCALARS = frozenset({NoneType, bool, int, float, str, bytes})
NUMBERS = re.compile(r"[<>|=][biufcSUmM]\d{1,9}(\[\d{0,9}[A-Za-zμ]{1,10}\])?")
"""Of numpy's dtypes, as text: no objects and no records."""
TENSORS = frozenset((
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128",
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
))  # fmt: skip
"""Of torch's dtypes: those that are their bytes and nothing else."""
NODE = 1
IntArray = np.ndarray[Any, np.dtype[np.int64]]
_HEAD = struct.Struct("<II")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Node(msgspec.Struct, array_like=True, frozen=True):
    """What msgpack has no word for. `data`: bytes, a place behind the msgpack part, or the items."""

    kind: str  # tuple | array | scalar | tensor | objects
    dtype: str
    shape: list[int]
    data: Any


def is_tensor(value: Any) -> bool:
    """Return whether `value` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def aligned(size_bytes: int) -> int:
    """Return the next multiple of ALIGN_BYTES."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def plain_array(array: "np.ndarray[Any, Any]", where: str) -> "np.ndarray[Any, Any]":
    """Return `array` as one piece of memory.

    Raises:
        TypeError: objects or records are in it, or a mask is over it.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{where}: the mask of a masked array is not stored: store data and mask")
    if not NUMBERS.fullmatch(array.dtype.str):
        raise TypeError(f"{where}: an array of {array.dtype} is not stored: use numbers, texts or a list")
    return np.ascontiguousarray(array).reshape(array.shape)


def plain_tensor(tensor: Any, where: str) -> Any:
    """Return a tensor as one piece of host memory.

    Raises:
        TypeError: it has no plain bytes.
    """
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name not in TENSORS or tensor.layout != torch.strided or tensor.dim() > DIMENSIONS_MAX:
        raise TypeError(f"{where}: a {tensor.layout} tensor of {name} is not stored: make it a dense one")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def bytes_of(array: Any) -> memoryview:
    """Return the bytes of what plain_array or plain_tensor has returned."""
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8).data if array.nbytes else memoryview(b"")
    import torch

    return memoryview(array.reshape(-1).view(torch.uint8).numpy())


def item_bytes(dtype: str) -> int:
    """Return the bytes of one number: "<f4" is numpy's, "torch.float32" torch's.

    Raises:
        IntegrityError: there is no such.
    """
    if dtype.startswith("torch.") and dtype.removeprefix("torch.") in TENSORS:
        import torch

        return int(getattr(torch, dtype.removeprefix("torch.")).itemsize)
    try:
        if NUMBERS.fullmatch(dtype):
            return np.dtype(dtype).itemsize
    except TypeError as error:
        raise IntegrityError(f"{dtype!r}: {error}") from error
    raise IntegrityError(f"{dtype!r} is no kind of number that is stored here")


def array_of(dtype: str, shape: list[int], data: Any) -> "np.ndarray[Any, Any]":
    """Return the array in `data`, sharing its memory.

    Raises:
        IntegrityError: there is none.
    """
    size = memoryview(data).nbytes
    check_shape(shape, item_bytes(dtype), size)
    if dtype.startswith("torch."):
        raise IntegrityError(f"an array of {dtype}")
    try:
        return np.frombuffer(data, dtype).reshape(shape) if size else np.zeros(shape, dtype)
    except ValueError as error:
        raise IntegrityError(f"an array of {dtype!r} {shape}: {error}") from error


def tensor_of(dtype: str, shape: list[int], data: Any) -> Any:
    """Return the tensor in `data`, sharing its memory; raises as array_of."""
    import torch

    size = memoryview(data).nbytes
    check_shape(shape, item_bytes(dtype), size)
    if not dtype.startswith("torch."):
        raise IntegrityError(f"a tensor of {dtype}")
    kind = getattr(torch, dtype.removeprefix("torch."))
    return torch.frombuffer(data, dtype=kind).reshape(shape) if size else torch.empty(shape, dtype=kind)


def check_shape(shape: list[int], item_bytes: int, size_bytes: int) -> None:
    """Pass if an array of this shape has so many bytes, else raise IntegrityError."""
    sane = len(shape) <= DIMENSIONS_MAX and all(0 <= side <= SIDE_MAX for side in shape)
    if not sane or math.prod(shape) * item_bytes != size_bytes:
        raise IntegrityError(f"an array of shape {shape} in {size_bytes} bytes: damaged, or not ours")


class _Packer:
    """Turns one value into msgpack's words and Nodes; large arrays are kept aside."""

    def __init__(self) -> None:
        self.arrays: list[bytes | memoryview] = []
        self.size_bytes = 0
        self.nodes = False

    def plain(self, value: Any, where: str, depth: int = 0) -> Any:
        if type(value) in SCALARS:
            return value
        if depth >= DEPTH_MAX:
            raise ValueError(f"{where}: nested deeper than {DEPTH_MAX}")
        if isinstance(value, list):
            return self.items(value, where, depth)
        if isinstance(value, dict):
            return self.mapping(value, where, depth)
        if isinstance(value, tuple):
            return self.node("tuple", "", [], self.items(value, where, depth))
        if isinstance(value, (bytearray, memoryview)):
            return bytes(value)
        if isinstance(value, np.generic):
            return self.node("scalar", plain_array(np.asarray(value), where).dtype.str, [], value.tobytes())
        if isinstance(value, np.ndarray):
            return self.array(value, where, depth)
        if is_tensor(value):
            tensor = plain_tensor(value, where)
            return self.node("tensor", str(tensor.dtype), list(tensor.shape), self.place(bytes_of(tensor)))
        raise TypeError(
            f"{where}: a {type(value).__module__}.{type(value).__qualname__} is not stored, for reading it "
            "would run its code: turn it into dicts, lists, texts, numbers, bytes, arrays or tensors"
        )

    def items(self, values: Any, where: str, depth: int) -> list[Any]:
        if SCALARS.issuperset(map(type, values)):
            return values if isinstance(values, list) else list(values)
        return [
            value if type(value) in SCALARS else self.plain(value, f"{where}[{row}]", depth + 1)
            for row, value in enumerate(values)
        ]

    def mapping(self, value: dict[Any, Any], where: str, depth: int) -> dict[Any, Any]:
        if not SCALARS.issuperset(map(type, value)):
            raise TypeError(f"{where}: keys of a dict are texts, numbers, bytes or None")
        return {
            key: one if type(one) in SCALARS else self.plain(one, f"{where}[{key!r}]", depth + 1)
            for key, one in value.items()
        }

    def array(self, value: "np.ndarray[Any, Any]", where: str, depth: int) -> msgspec.msgpack.Ext:
        if value.dtype == object:
            items = self.items(value.reshape(-1).tolist(), where, depth)
            return self.node("objects", "", list(value.shape), items)
        array = plain_array(value, where)
        return self.node("array", array.dtype.str, list(array.shape), self.place(bytes_of(array)))

    def place(self, data: memoryview) -> Any:
        if data.nbytes <= INLINE_BYTES_MAX:
            return bytes(data)
        at, self.size_bytes = self.size_bytes, self.size_bytes + aligned(data.nbytes)
        self.arrays += [data, bytes(aligned(data.nbytes) - data.nbytes)]
        return [at, data.nbytes]

    def node(self, kind: str, dtype: str, shape: list[int], data: Any) -> msgspec.msgpack.Ext:
        self.nodes = True
        return msgspec.msgpack.Ext(NODE, _encode(Node(kind, dtype, shape, data)))


def pack(value: Any, where: str, row: int | None = None) -> list[bytes | memoryview]:
    """Return a value as pieces of bytes; arrays among them are views of the caller's.

    Args:
        value: containers, scalars, arrays and tensors in any nesting.
        where: its name, for messages.
        row: of it.

    Raises:
        TypeError: something in it is not stored. ValueError: nested too deeply, a number too large.
    """
    packer = None
    if type(value) not in SCALARS:
        packer = _Packer()
        value = packer.plain(value, where if row is None else f"{where}[{row}]")
    try:
        body = _encode(value)
    except OverflowError as error:
        raise ValueError(f"{where}: a whole number of more than 64 bits: store it as text") from error
    if packer is None or not packer.nodes:
        return [_HEAD.pack(len(body), 0) + body]
    head = _HEAD.pack(len(body), 1) + body
    return [head.ljust(aligned(len(head)), b"\0"), *packer.arrays] if packer.arrays else [head]


def unpack(data: memoryview) -> Any:
    """Return the value that was packed; large arrays share the memory of `data`.

    Raises:
        IntegrityError: these are no such bytes.
    """
    if data.nbytes < _HEAD.size:
        raise IntegrityError(f"{data.nbytes} bytes are no value")
    size_bytes, nodes = _HEAD.unpack_from(data)
    end = _HEAD.size + size_bytes
    if end > data.nbytes:
        raise IntegrityError(f"a value of {end} bytes in {data.nbytes}: cut off")
    try:
        if not nodes:
            return _decode(data[_HEAD.size : end])
        return _Unpacker(data[aligned(end) :]).value(data[_HEAD.size : end])
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError) as error:
        raise IntegrityError(f"a value that cannot be read: {error}") from error


class _Unpacker:
    def __init__(self, arrays: memoryview) -> None:
        self.arrays = arrays
        self.depth = 0

    def value(self, data: Any) -> Any:
        return msgspec.msgpack.decode(data, ext_hook=self.ext)

    def ext(self, code: int, data: memoryview) -> Any:
        if code != NODE or self.depth >= DEPTH_MAX:
            raise IntegrityError("nested too deeply, or not ours")
        self.depth += 1
        node = msgspec.msgpack.decode(data, type=Node, ext_hook=self.ext)
        self.depth -= 1
        return self.build(node)

    def build(self, node: Node) -> Any:
        if node.kind in ("tuple", "objects"):
            if not isinstance(node.data, list):
                raise IntegrityError(f"a {node.kind} without items")
            return tuple(node.data) if node.kind == "tuple" else objects_of(node.data, node.shape)
        if isinstance(node.data, bytes):
            data: Any = bytearray(node.data)
        else:
            at, size_bytes = msgspec.convert(node.data, tuple[int, int])
            if at < 0 or size_bytes < 0 or at + size_bytes > self.arrays.nbytes:
                raise IntegrityError("an array beyond the end")
            data = self.arrays[at : at + size_bytes]
        if node.kind == "tensor":
            return tensor_of(node.dtype, node.shape, data)
        array = array_of(node.dtype, node.shape, data)
        return array[()] if node.kind == "scalar" else array


def objects_of(items: list[Any], shape: list[int]) -> "np.ndarray[Any, Any]":
    """Return an array of objects; raises IntegrityError if there are not so many."""
    check_shape(shape, 1, len(items))
    array = np.empty(len(items), object)
    for row, item in enumerate(items):  # assigned at once, numpy would look into them
        array[row] = item
    return array.reshape(shape)
