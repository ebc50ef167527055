"""What rows of a column have in common: used to check a FieldSchema, and public as `infer_structure`.

The store needs none of it (every row is packed by itself); callers use it to look at their data.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from mooncake.dropin.structured.tree import is_tensor

KEYS_MAX = 64
"""A dict with more keys is a leaf."""
ITEMS_MAX = 8
"""A longer list is a leaf."""
DEPTH_MAX = 32


class Missing(msgspec.Struct, frozen=True):
    """A key that a row has not; None is one that it has."""

    def __repr__(self) -> str:
        """Say so."""
        return "<MISSING>"


MISSING = Missing()


class Decision(msgspec.Struct):
    """How a column could be stored."""

    accepted: bool
    codec: str
    reason: str
    normalized_type: str
    metadata: dict[str, Any] = {}


class Leaf(msgspec.Struct):
    """A column that is not taken apart."""

    path: str
    values: list[Any]
    decision: Decision


class Branch(msgspec.Struct):
    """A column of dicts or short lists; `row_mask`: which rows are."""

    path: str
    node_type: str
    children: list[Any]
    lengths: list[int] | None = None
    row_mask: list[bool] | None = None


class Kind(NamedTuple):
    """Rows of one kind."""

    codec: str
    name: str
    fits: Callable[[Any], bool]


def _is_bytes(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, memoryview))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number))


def _is_numeric(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.issubdtype(value.dtype, np.number))
    if not _is_list(value):
        return False
    try:
        return bool(np.issubdtype(np.asarray(value).dtype, np.number))
    except (ValueError, TypeError, OverflowError):  # numpy: not rectangular
        return False


KINDS = (
    Kind("ragged_tensor", "torch.Tensor", is_tensor),
    Kind("media_list_ragged", "media list", lambda value: _is_list(value) and all(map(_is_bytes, value))),
    Kind("typed_ragged", "numeric sequence", _is_numeric),
    Kind("ndarray", "numeric scalar", _is_number),
    Kind("bytes_ragged", "bytes-like", _is_bytes),
    Kind("utf8_ragged", "str", lambda value: isinstance(value, str)),
    Kind("msgpack_ragged", "msgpack", lambda value: isinstance(value, dict) or _is_list(value)),
)
"""The first that all rows fit is theirs."""
FITS: dict[str, Callable[[Any], bool]] = {
    **{kind.codec: kind.fits for kind in KINDS},
    "typed_ragged": lambda value: (
        _is_numeric(value) or (isinstance(value, np.ndarray) and value.dtype == bool)
    ),
    "media_bytes": _is_bytes,
    "json_ragged": lambda _: True,
    "auto": lambda _: True,
    "ragged_tensor_dict": lambda value: isinstance(value, dict) and all(map(is_tensor, value.values())),
}
"""What rows a FieldSchema's codec allows."""


def present(values: list[Any]) -> list[Any]:
    """Return the values that are neither null nor missing."""
    return [value for value in values if value is not None and value is not MISSING]


def decide(values: list[Any]) -> Decision:
    """Return what the rows of a column have in common."""
    some = present(values)
    if not some:
        return Decision(False, "msgpack_ragged", "all rows are null", "msgpack")
    for kind in KINDS:
        if all(map(kind.fits, some)):
            return _decided(kind, some)
    return Decision(False, "msgpack_ragged", "no codec matched", "python object")


def _decided(kind: Kind, some: list[Any]) -> Decision:
    reason = f"all rows are {kind.name}"
    if kind.codec == "ragged_tensor":
        dtypes = sorted({str(value.dtype) for value in some})
        if len(dtypes) > 1:
            return Decision(False, kind.codec, f"mixed tensor dtype: {dtypes}", kind.name)
        return Decision(True, kind.codec, reason, kind.name, {"dtype": dtypes[0]})
    if kind.codec in ("typed_ragged", "ndarray"):
        try:
            dtype = np.result_type(*(np.asarray(value).dtype for value in some))
        except (TypeError, OverflowError):
            return Decision(False, kind.codec, "no common dtype", kind.name)
        return Decision(True, kind.codec, reason, kind.name, {"dtype": str(dtype)})
    return Decision(True, kind.codec, reason, kind.name)


def infer_structure(
    path: str, values: list[Any], leaves: list[Leaf], nodes: list[Branch], *, _depth: int = 0
) -> None:
    """Take a column apart into columns of its dicts' keys and its short lists' items.

    Args:
        path: its name; those below it are "path.key" and "path[0]".
        values: its rows.
        leaves: what cannot be taken apart is added here.
        nodes: what was is added here.

    Raises:
        ValueError: nested too deeply.
    """
    if _depth > DEPTH_MAX:
        raise ValueError(f"infer_structure exceeded max depth {DEPTH_MAX} at {path!r}")
    some = present(values)
    if some and all(isinstance(value, dict) for value in some):
        keys = list(dict.fromkeys(itertools.chain.from_iterable(some)))
        if len(keys) <= KEYS_MAX and all(isinstance(key, str) for key in keys):
            keys.sort()
            mask = [isinstance(value, dict) for value in values]
            nodes.append(Branch(path, "dict", keys, row_mask=mask))
            for key in keys:
                column = [
                    row.get(key, MISSING) if there else None for row, there in zip(values, mask, strict=True)
                ]
                infer_structure(f"{path}.{_escaped(key)}", column, leaves, nodes, _depth=_depth + 1)
            return
    if some and all(map(_is_nesting, some)) and max(map(len, some)) <= ITEMS_MAX:
        mask = [_is_list(value) for value in values]
        lengths = [len(row) if there else 0 for row, there in zip(values, mask, strict=True)]
        nodes.append(Branch(path, "list", list(range(max(lengths))), lengths, mask))
        for at in range(max(lengths)):
            column = [
                (row[at] if at < len(row) else MISSING) if there else None
                for row, there in zip(values, mask, strict=True)
            ]
            infer_structure(f"{path}[{at}]", column, leaves, nodes, _depth=_depth + 1)
        return
    leaves.append(Leaf(path, values, decide(values)))


def _is_nesting(value: Any) -> bool:
    return _is_list(value) and all(item is None or isinstance(item, (dict, list, tuple)) for item in value)


def _escaped(key: str) -> str:
    return key.replace("\\", "\\\\").replace(".", "\\.").replace("[", "\\[")
