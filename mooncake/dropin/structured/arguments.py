"""Arguments of the catalog's calls, checked and copied."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mooncake.dropin.structured.handles import export_dataproto_ref, import_dataproto_ref
from mooncake.dropin.structured.model import MooncakeDataProtoRef


def normalized(handle: Mapping[str, Any]) -> tuple[MooncakeDataProtoRef, dict[str, Any]]:
    """Return the ref of a handle, and the handle as all are compared; raises ValueError."""
    ref = import_dataproto_ref(handle)
    return ref, export_dataproto_ref(ref)


def text(value: Any, name: str) -> str:
    """Return a text.

    Raises:
        ValueError: it is none, or empty.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a non-empty string")
    return value


def names(values: Iterable[str], label: str) -> tuple[str, ...]:
    """Return texts.

    Raises:
        ValueError: there is none, one is empty, or one comes twice.
    """
    result = () if isinstance(values, str) else tuple(values)
    if not result or not all(isinstance(value, str) and value for value in result):
        raise ValueError(f"{label} must be a sequence of non-empty strings")
    if len(result) != len(set(result)):
        raise ValueError(f"{label} must be unique")
    return result


def tags_of(tags: Sequence[Mapping[str, Any]] | None, count: int) -> list[dict[str, Any]] | None:
    """Return tags of rows, copied; None: none were given.

    Raises:
        ValueError: not one for each row. TypeError: they are no mappings.
    """
    if tags is None:
        return None
    if len(tags) != count:
        raise ValueError("tags must have the same length as keys")
    if not all(isinstance(tag, Mapping) for tag in tags):
        raise TypeError("tags must be mappings")
    return [copy.deepcopy(dict(tag)) for tag in tags]
