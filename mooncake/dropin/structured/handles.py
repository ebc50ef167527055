"""DataProto refs as plain JSON, to be sent to other processes; what comes back is checked."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from mooncake.dropin.structured.manifest import MEMBERS_MAX
from mooncake.dropin.structured.model import (
    DATAPROTO_REF_HANDLE_TYPE,
    DATAPROTO_REF_HANDLE_VERSION,
    STORAGE_GROUP_ID,
    DataProtoRefLike,
    MooncakeDataProtoRef,
    RemoteBundleRef,
    Section,
    StructuredFieldLocation,
)

KIND = "bundle_stages"
VERSION_WITH_GROUP = 2
VERSIONS = (DATAPROTO_REF_HANDLE_VERSION, VERSION_WITH_GROUP)
STAGES_MAX = 1 << 10
ROWS_MAX = 1 << 40

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class _Stage(msgspec.Struct):
    manifest_key: Text


class _Location(msgspec.Struct):
    stage: Text
    member: Text
    section: Section


class _Handle(msgspec.Struct):
    version: int
    kind: Literal["bundle_stages"]
    batch_size: Annotated[int, msgspec.Meta(ge=0, le=ROWS_MAX)]
    stage_refs: Annotated[dict[Text, _Stage], msgspec.Meta(max_length=STAGES_MAX)]
    field_index: Annotated[dict[Text, _Location], msgspec.Meta(max_length=MEMBERS_MAX)]
    meta_info: dict[str, Any] = {}
    namespace: str = "default"
    partition: str = "default"
    global_indexes: list[int] | None = None
    encoded_non_tensor: dict[str, Any] = {}
    storage_group_id: Text | None = None


def is_dataproto_ref_handle(value: Any) -> bool:
    """Return whether this is a ref as JSON."""
    return isinstance(value, Mapping) and value.get("type") == DATAPROTO_REF_HANDLE_TYPE


def export_dataproto_ref(ref: MooncakeDataProtoRef) -> dict[str, Any]:
    """Return a ref as JSON.

    Raises:
        TypeError: it is no ref, or its meta_info has what JSON has no word for.
    """
    if not isinstance(ref, MooncakeDataProtoRef):
        raise TypeError(f"expected MooncakeDataProtoRef, got {type(ref).__name__}")
    handle = {
        "type": DATAPROTO_REF_HANDLE_TYPE,
        "version": DATAPROTO_REF_HANDLE_VERSION,
        "kind": KIND,
        "batch_size": int(ref.batch_size),
        "namespace": ref.namespace,
        "partition": ref.partition,
        "global_indexes": _plain(ref.global_indexes),
        "stage_refs": {stage: {"manifest_key": one.manifest_key} for stage, one in ref.stage_refs.items()},
        "field_index": {
            name: {"stage": at.stage, "member": at.member, "section": at.section}
            for name, at in ref.field_index.items()
        },
        "meta_info": _plain(ref.meta_info),
        "encoded_non_tensor": _plain(ref.encoded_non_tensor),
    }
    if ref._storage_group_id is not None:
        handle[STORAGE_GROUP_ID] = ref._storage_group_id
    json.dumps(handle)
    return handle


def import_dataproto_ref(handle: Mapping[str, Any]) -> MooncakeDataProtoRef:
    """Return the ref that JSON stands for; nothing is read from the store.

    Raises:
        ValueError: it is none.
    """
    if not is_dataproto_ref_handle(handle):
        raise ValueError("not a Mooncake DataProto ref handle")
    if handle.get("version") not in VERSIONS:
        raise ValueError(f"unsupported DataProto ref handle version: {handle.get('version')!r}")
    try:
        plain = msgspec.convert(dict(handle), _Handle)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"DataProto ref handle: {error}") from error
    if plain.version == VERSION_WITH_GROUP and plain.storage_group_id is None:
        raise ValueError("DataProto ref handle has invalid storage_group_id")
    lost = [name for name, at in plain.field_index.items() if at.stage not in plain.stage_refs]
    if lost:
        raise ValueError(f"DataProto ref handle fields {lost} are of stages that it has not")
    return MooncakeDataProtoRef(
        plain.batch_size,
        {stage: RemoteBundleRef(one.manifest_key, {}) for stage, one in plain.stage_refs.items()},
        {
            name: StructuredFieldLocation(at.stage, at.member, at.section)
            for name, at in plain.field_index.items()
        },
        plain.meta_info,
        plain.namespace,
        plain.partition,
        plain.global_indexes,
        plain.encoded_non_tensor,
        plain.storage_group_id,
    )


def ref_of(ref: DataProtoRefLike) -> MooncakeDataProtoRef:
    """Return a ref, also of its handle.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(ref, MooncakeDataProtoRef):
        return ref
    if is_dataproto_ref_handle(ref):
        return import_dataproto_ref(ref)
    raise TypeError(f"expected MooncakeDataProtoRef or DataProto handle, got {type(ref).__name__}")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    raise TypeError(f"DataProto ref handles are JSON: a {type(value).__name__} has no place in one")
