"""Members of a bundle: a value as bytes with a field that says how to read them, whole or some of its rows.

Dense arrays and tensors are their bytes, so that rows are ranges of them. Whatever else has rows (an array
of objects, a nested tensor) is one packed value per row behind an index of where each begins:

    n + 1 times i64: where row i begins behind the index | aligned | row 0 | row 1 | ...
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mooncake.core.errors import IntegrityError
from mooncake.dropin.structured.manifest import Field, Payload
from mooncake.dropin.structured.model import RawMemory, StructuredMemberSlice, TensorObject
from mooncake.dropin.structured.places import memory_at, place_for
from mooncake.dropin.structured.tree import (
    IntArray,
    aligned,
    array_of,
    bytes_of,
    check_shape,
    is_tensor,
    item_bytes,
    objects_of,
    pack,
    plain_array,
    plain_tensor,
    tensor_of,
    unpack,
)

OWN_CHUNK_BYTES = 64 << 10
"""A larger index has chunks of its own, so that it can be read without rows."""

Rows = Sequence[int]
Range = tuple[int, int]


class Encoded(NamedTuple):
    """A member to be written. `alone`: so many parts at its begin have chunks of their own."""

    field: Field
    parts: list[memoryview]
    alone: int = 0


# ------------------------------------------------------------ writing


def encode(value: Any, where: str) -> Encoded:
    """Return a value as a member.

    Args:
        value: bytes, an array, a tensor, or whatever `pack` takes.
        where: its name, for messages.

    Raises:
        TypeError, ValueError: see pack.
    """
    if isinstance(value, TensorObject):
        from mooncake.dropin.store.tensors import tensor_of as tensor_in

        value = tensor_in(memory_at(value.ptr, value.size))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Encoded(Field("bytes"), [memoryview(value).cast("B")])
    if is_tensor(value):
        if value.is_nested:
            return _nested_rows(value, where)
        tensor = plain_tensor(value, where)
        field = Field("torch_tensor", str(tensor.dtype), list(tensor.shape), tensor.element_size())
        return Encoded(field, [bytes_of(tensor)])
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1:
        return _rows(value.tolist(), where, "rows")
    if isinstance(value, np.ndarray) and value.dtype != object:
        array = plain_array(value, where)
        return Encoded(Field("ndarray", array.dtype.str, list(array.shape)), [bytes_of(array)])
    return Encoded(Field("value"), [memoryview(part) for part in pack(value, where)])


def _rows(values: list[Any], where: str, encoding: Any) -> Encoded:
    packed = [pack(value, where, row) for row, value in enumerate(values)]
    sizes = [sum(map(len, parts)) for parts in packed]
    if any(len(parts) > 1 for parts in packed):  # large arrays stay aligned
        sizes = [aligned(size) for size in sizes]
        packed = [
            [*parts, bytes(size - sum(map(len, parts)))] for parts, size in zip(packed, sizes, strict=True)
        ]
    starts = np.fromiter(itertools.accumulate(sizes, initial=0), np.int64, len(sizes) + 1)
    index = memoryview(starts.tobytes().ljust(_index_bytes(len(sizes)), b"\0"))
    data = memoryview(b"".join(itertools.chain.from_iterable(packed)))
    return Encoded(Field(encoding, rows=len(sizes)), [index, data], int(index.nbytes > OWN_CHUNK_BYTES))


def _nested_rows(value: Any, where: str) -> Encoded:
    import torch

    if value.layout != torch.jagged:
        raise ValueError(f"{where}: a nested tensor must have the layout torch.jagged")
    encoded = _rows(list(value.unbind()), where, "nested_tensor")
    values = value.values()
    field = Field("nested_tensor", str(values.dtype), list(values.shape[1:]), rows=encoded.field.rows)
    return encoded._replace(field=field)


def _index_bytes(rows: int) -> int:
    return aligned(8 * (rows + 1))


# ------------------------------------------------------------ reading


class Reading(NamedTuple):
    """Ranges of a member's bytes, for `target`, one behind the other; then `finish` returns its value."""

    payload: Payload
    ranges: list[Range]
    target: Any
    finish: Callable[[], Any]
    registered: bool = False


def rows_of(name: str, field: Field, some: StructuredMemberSlice | None) -> range | None:
    """Return the rows of a member that a slice means, None: all.

    Raises:
        ValueError: it has no rows, or no such.
    """
    if some is None:
        return None
    if some.axis != 0:
        raise ValueError(f"member {name}: slices are of axis 0")
    if some.step <= 0:
        raise ValueError(f"member {name}: the step of a slice must be positive")
    return range(*slice(some.start, some.end, some.step).indices(count_rows(name, field)))


def count_rows(name: str, field: Field) -> int:
    """Return how many rows a member has.

    Raises:
        ValueError: it has none.
    """
    if field.encoding in ("rows", "nested_tensor"):
        return field.rows
    if field.encoding in ("ndarray", "torch_tensor") and field.shape:
        return field.shape[0]
    raise ValueError(f"member {name} has no rows to choose from: it is read as a whole")


def index_reading(payload: Payload) -> Reading | None:
    """Return the reading of the index of rows, None: there is none."""
    field = payload.field
    if field.encoding not in ("rows", "nested_tensor"):
        return None
    size = _index_of(payload)
    target = np.empty(size, np.uint8)
    return Reading(payload, [(0, size)], target, lambda: _starts(target, field.rows, payload.bytes - size))


def _index_of(payload: Payload) -> int:
    size = _index_bytes(payload.field.rows)
    if size > payload.bytes:
        raise IntegrityError(f"{payload.field.rows} rows in {payload.bytes} bytes")
    return size


def _starts(index: Any, rows: int, data_bytes: int) -> IntArray:
    starts = index[: 8 * (rows + 1)].view(np.int64)
    if starts[0] != 0 or starts[-1] != data_bytes or np.any(starts[1:] < starts[:-1]):
        raise IntegrityError("an index of rows that is none")
    return starts  # type: ignore[no-any-return]


def reading(
    name: str, payload: Payload, rows: Rows | None, starts: IntArray | None, destination: Any
) -> Reading:
    """Return how a member is read.

    Args:
        name: of it.
        payload: its bytes and field.
        rows: which; None = all.
        starts: what the reading of its index gave, where rows are chosen of a member that has one.
        destination: memory of the caller, or None.

    Raises:
        TypeError, ValueError: the destination does not fit, or there are no such rows.
        IntegrityError: field and bytes contradict each other.
    """
    field = payload.field
    if field.encoding in ("ndarray", "torch_tensor"):
        return _dense(name, payload, rows, destination)
    if destination is not None:
        raise ValueError(f"member {name}: {field.encoding} is not read into a destination, arrays are")
    if field.encoding in ("rows", "nested_tensor"):
        return _some_rows(payload, rows, starts)
    if rows is not None:
        count_rows(name, field)
    target = np.empty(payload.bytes, np.uint8)
    view = target.data
    finish = (lambda: bytes(view)) if field.encoding == "bytes" else (lambda: unpack(view))
    return Reading(payload, [(0, payload.bytes)], target, finish)


def _dense(name: str, payload: Payload, rows: Rows | None, destination: Any) -> Reading:
    field, shape = payload.field, list(payload.field.shape)
    ranges = [(0, payload.bytes)]
    if rows is not None:
        count = count_rows(name, field)
        row_bytes, rest = divmod(payload.bytes, count) if count else (0, payload.bytes)
        if rest:
            raise IntegrityError(f"member {name}: {payload.bytes} bytes in {count} rows")
        shape[0] = len(rows)
        starts = np.arange(count + 1, dtype=np.int64) * row_bytes
        ranges = _ranges(rows, starts)
    size = sum(length for _, length in ranges)
    check_shape(shape, item_bytes(field.dtype), size)

    def make(data: Any) -> Any:
        return (
            array_of(field.dtype, shape, data)
            if field.encoding == "ndarray"
            else tensor_of(field.dtype, shape, data)
        )

    if destination is None:
        target = np.empty(size, np.uint8)
        return Reading(payload, ranges, target, lambda: make(target))
    target, result = place_for(name, field, shape, size, destination)
    registered = isinstance(destination, RawMemory) and destination.pre_registered
    return Reading(payload, ranges, target, lambda: make(target) if result is None else result, registered)


def _some_rows(payload: Payload, rows: Rows | None, starts: IntArray | None) -> Reading:
    field, skip = payload.field, _index_of(payload)

    def finish_rows(items: list[Any]) -> Any:
        return _nested(field, items) if field.encoding == "nested_tensor" else objects_of(items, [len(items)])

    if rows is None:
        target = np.empty(payload.bytes, np.uint8)

        def finish() -> Any:
            found = _starts(target[:skip], field.rows, payload.bytes - skip)
            return finish_rows(_unpacked(target.data[skip:], found))

        return Reading(payload, [(0, payload.bytes)], target, finish)
    if starts is None:
        raise ValueError("rows are chosen by an index that was not read")
    some = np.asarray(rows, np.int64)
    lengths = starts[1:][some] - starts[:-1][some]
    own = np.concatenate(([0], np.cumsum(lengths)))
    data = np.empty(int(own[-1]), np.uint8)
    ranges = [(start + skip, size) for start, size in _ranges(rows, starts)]
    return Reading(payload, ranges, data, lambda: finish_rows(_unpacked(data.data, own)))


def _unpacked(data: memoryview, starts: IntArray) -> list[Any]:
    bounds = starts.tolist()
    return [unpack(data[start:end]) for start, end in itertools.pairwise(bounds)]


def _nested(field: Field, rows: list[Any]) -> Any:
    import torch

    if not rows:
        values = tensor_of(field.dtype, [0, *field.shape], b"")
        return torch.nested.nested_tensor_from_jagged(values, offsets=torch.zeros(1, dtype=torch.int64))
    if not all(isinstance(row, torch.Tensor) for row in rows):
        raise IntegrityError("a nested tensor with rows that are no tensors")
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _ranges(rows: Rows, starts: IntArray) -> list[Range]:
    """Return the bytes of rows, neighbours as one range."""
    if not len(rows):
        return []
    some = np.asarray(rows, np.int64)
    first = np.concatenate(([True], some[1:] != some[:-1] + 1))
    at = np.flatnonzero(first)
    last = np.concatenate((at[1:], [len(some)])) - 1
    begins, ends = starts[some[at]], starts[some[last] + 1]
    return [
        (begin, end - begin) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True) if end > begin
    ]
