"""What a DataProto is: rows of batch fields (dense) and non_tensor_batch fields (any), and meta_info.

It is given as an object with these three attributes, as a mapping of them, or as one flat dict.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mooncake.dropin.structured.infer import FITS
from mooncake.dropin.structured.model import FieldSchema, MooncakeDataProtoRef, StructuredMemberSlice
from mooncake.dropin.structured.tree import is_tensor

SECTIONS = ("batch", "non_tensor_batch", "meta_info")
Schemas = Mapping[str, FieldSchema] | None


class Batch(NamedTuple):
    """Its three sections."""

    batch: dict[str, Any]
    non_tensor_batch: dict[str, Any]
    meta_info: dict[str, Any]

    def rows(self) -> int:
        """Return how many rows its fields have.

        Raises:
            ValueError: they do not agree, or a field is in two sections.
        """
        both = sorted(set(self.batch) & set(self.non_tensor_batch))
        if both:
            raise ValueError(f"DataProto batch and non_tensor_batch fields overlap: {both}")
        sizes = {
            _length(name, value)
            for values in (self.batch, self.non_tensor_batch)
            for name, value in values.items()
        }
        if len(sizes) > 1:
            raise ValueError(f"DataProto fields have inconsistent batch sizes: {sorted(sizes)}")
        return sizes.pop() if sizes else 0


def split(data: Any) -> Batch:
    """Return the sections of a DataProto.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(data, Mapping):
        if not any(hasattr(data, name) for name in SECTIONS):
            raise TypeError(
                f"a DataProto has batch, non_tensor_batch, meta_info; not a {type(data).__name__}"
            )
        return Batch(*(_dict(getattr(data, name, None)) for name in SECTIONS))
    if data and set(data) <= set(SECTIONS) and all(_is_mapping(value) for value in data.values()):
        return Batch(*(_dict(data.get(name)) for name in SECTIONS))
    return Batch(dict(data), {}, {})


def join(sections: Batch, data_cls: Any) -> Any:
    """Return a DataProto as a dict of its sections, or as a `data_cls` made of them.

    Raises:
        TypeError: `data_cls` does not take them.
    """
    if data_cls is None or data_cls is dict:
        return sections._asdict()
    from_dict = getattr(data_cls, "from_dict", None)
    try:
        if callable(from_dict):
            return from_dict(sections.batch, sections.non_tensor_batch, meta_info=sections.meta_info)
        return data_cls(**sections._asdict())
    except TypeError as error:
        name = getattr(data_cls, "__name__", data_cls)
        raise TypeError(f"{name!r} is not made of batch, non_tensor_batch, meta_info: {error}") from error


def from_flat(data: Any, schemas: Schemas) -> dict[str, Any]:
    """Return the sections of a flat dict, by its schemas and by what has as many rows as the others.

    Raises:
        TypeError: it is no mapping. ValueError: how many rows there are is not clear.
    """
    if not isinstance(data, Mapping):
        raise TypeError("flat dict payload must be a mapping")
    declared = {name: _section(name, schema) for name, schema in (schemas or {}).items() if name in data}
    rowed = {name for name, section in declared.items() if section in SECTIONS[:2]}
    if rowed:
        counts = {_length(name, data[name]) for name in sorted(rowed)}
    else:
        counts = _counts({name: value for name, value in data.items() if declared.get(name) != "meta_info"})
    if len(counts) > 1:
        raise ValueError(
            f"flat dict fields have ambiguous batch sizes: {sorted(counts)}; say what they are by "
            "FieldSchema metadata['section']"
        )
    count = counts.pop() if counts else 0
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in data.items():
        section = declared.get(name)
        if section is None:
            alike = count and _is_sized(value) and len(value) == count
            dense = is_tensor(value) or (isinstance(value, np.ndarray) and value.dtype != object)
            loose = "non_tensor_batch" if alike and not rowed else "meta_info"
            section = "batch" if alike and dense else loose
        sections[section][name] = column(name, value) if section == "non_tensor_batch" else value
    return dict(sections)


def to_flat(sections: Batch) -> dict[str, Any]:
    """Return one dict of everything, arrays of objects as lists.

    Raises:
        ValueError: a name is in two sections.
    """
    flat: dict[str, Any] = {}
    for values in (sections.meta_info, sections.batch, sections.non_tensor_batch):
        twice = sorted(set(flat) & set(values))
        if twice:
            raise ValueError(f"Duplicate keys found across DataProto sections: {twice}")
        flat.update(values)
    return {
        name: value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value
        for name, value in flat.items()
    }


def column(name: str, value: Any) -> Any:
    """Return a non-tensor field as an array.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        array = np.empty(len(value), object)
        for row, item in enumerate(value):
            array[row] = item
        return array
    raise TypeError(f"non_tensor_batch field {name!r} must be an ndarray or non-string sequence")


def check_schemas(sections: Batch, schemas: Schemas) -> dict[str, Any]:
    """Return the non-tensor fields as their schemas want them.

    Raises:
        ValueError: a field is in another section, null where it must not be, or of another kind.
        TypeError: it is no column.
    """
    columns = dict(sections.non_tensor_batch)
    for name, schema in (schemas or {}).items():
        wanted = _section(name, schema)
        actual = [one for one, values in zip(SECTIONS, sections, strict=True) if name in values]
        if wanted and actual and wanted not in actual:
            raise ValueError(
                f"FieldSchema for {name!r} declares section {wanted!r}, but data has it in {actual}"
            )
        if name in columns and wanted in (None, "non_tensor_batch"):
            columns[name] = _as_schema(name, column(name, columns[name]), schema)
    return columns


def _as_schema(name: str, array: Any, schema: FieldSchema) -> Any:
    values = [value for value in array.tolist() if value is not None] if array.dtype == object else array
    if not schema.nullable and len(values) < len(array):
        raise ValueError(f"FieldSchema for {name!r} is not nullable")
    fits = FITS.get(schema.codec)
    if fits is None:
        raise ValueError(f"field {name!r}: unsupported schema codec: {schema.codec!r}; one of {sorted(FITS)}")
    if schema.codec in ("ndarray", "typed_ragged") and "dtype" in schema.metadata:
        return _cast(name, array, _number(name, schema.metadata["dtype"]))
    other = next((value for value in values if not fits(value)), None) if array.dtype == object else None
    if other is not None:
        raise ValueError(f"field {name!r}: a {type(other).__name__} among its rows is not {schema.codec}")
    return array


def _cast(name: str, array: Any, dtype: "np.dtype[Any]") -> Any:
    """Return numbers of this kind, arrays as arrays and lists as lists."""
    try:
        if array.dtype != object:
            return np.asarray(array, dtype)
        rows = [None if row is None else np.asarray(row, dtype) for row in array]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"field {name!r} is not of {dtype}: {error}") from error
    kept = zip(rows, array, strict=True)
    return column(
        name, [new if new is None or isinstance(old, np.ndarray) else new.tolist() for new, old in kept]
    )


def _number(name: str, given: Any) -> "np.dtype[Any]":
    try:
        dtype: np.dtype[Any] = np.dtype(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"field {name!r}: invalid FieldSchema metadata['dtype'] {given!r}") from error
    if dtype.kind not in "biufc":
        raise ValueError(
            f"field {name!r}: FieldSchema metadata['dtype'] must be numeric or bool, got {dtype}"
        )
    return dtype


def choose_fields(
    ref: MooncakeDataProtoRef,
    fields: Sequence[str] | None,
    batch_fields: Sequence[str] | None,
    non_tensor_fields: Sequence[str] | None,
) -> list[str]:
    """Return the names of fields that are to be read.

    Raises:
        KeyError: there is no such field. ValueError: asked for in two ways.
    """
    if fields is not None and (batch_fields is not None or non_tensor_fields is not None):
        raise ValueError("fields cannot be combined with batch_fields or non_tensor_fields")
    chosen = list(ref.field_index)
    if fields is not None:
        chosen = list(fields)
    elif batch_fields is not None or non_tensor_fields is not None:
        chosen = [*(batch_fields or ()), *(non_tensor_fields or ())]
    unknown = [name for name in chosen if name not in ref.field_index]
    if unknown:
        raise KeyError(f"unknown DataProto fields: {unknown}")
    return list(dict.fromkeys(chosen))


def choose_rows(rows: Any, count: int) -> Sequence[int] | None:
    """Return which of `count` rows are meant, None: all.

    Raises:
        TypeError: no rows. ValueError: not of axis 0, or backwards. IndexError: there is no such row.
    """
    if rows is None:
        return None
    if isinstance(rows, StructuredMemberSlice):
        if rows.axis != 0:
            raise ValueError("DataProto row slicing currently supports axis=0 only")
        rows = slice(rows.start, rows.end, rows.step)
    if isinstance(rows, slice):
        if rows.step is not None and rows.step <= 0:
            raise ValueError("DataProto row slicing step must be positive")
        return range(*rows.indices(count))
    if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype.kind in "iu":
        rows = rows.tolist()
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes, bytearray)):
        raise TypeError("DataProto rows must be a slice, StructuredMemberSlice, or row index sequence")
    return _numbered(rows, count)


def _numbered(rows: Sequence[Any], count: int) -> list[int]:
    for row in rows:
        if not isinstance(row, (int, np.integer)):
            raise TypeError(f"DataProto row indices must be integers, not {row!r:.50}")
        if not -count <= row < count:
            raise IndexError(f"DataProto row index {row} out of range for {count} rows")
    return [int(row) % count for row in rows]


def _section(name: str, schema: FieldSchema) -> str | None:
    section = schema.metadata.get("section")
    if section is not None and section not in SECTIONS:
        raise ValueError(f"FieldSchema for {name!r}: metadata['section'] must be one of {SECTIONS}")
    return section


def _counts(data: Mapping[str, Any]) -> set[int]:
    dense = {
        len(value)
        for value in data.values()
        if (is_tensor(value) or (isinstance(value, np.ndarray) and value.dtype != object))
        and _is_sized(value)
    }
    return dense or {len(value) for value in data.values() if _is_sized(value)}


def _is_sized(value: Any) -> bool:
    if is_tensor(value) or isinstance(value, np.ndarray):
        return bool(value.ndim > 0)
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _length(name: str, value: Any) -> int:
    try:
        return len(value)
    except TypeError as error:
        raise ValueError(f"field {name!r} has no rows: {error}") from error


def _is_mapping(value: Any) -> bool:
    return value is None or isinstance(value, Mapping) or callable(getattr(value, "items", None))


def _dict(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not _is_mapping(value):
        raise TypeError(f"expected mapping-like value, got {type(value).__name__}")
    return dict(value.items())
