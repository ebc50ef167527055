"""Structured objects: JSON metadata and named members as a bundle, read whole or in part."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mooncake.dropin.structured.bundles import Bundles, Member
from mooncake.dropin.structured.fields import encode, rows_of
from mooncake.dropin.structured.manifest import MEMBERS_MAX, NAME_CHARS_MAX, Manifest
from mooncake.dropin.structured.model import (
    STRUCTURED_FIELD_SPECS_KEY,
    RemoteBundleRef,
    StructuredObjectReadSpec,
    StructuredObjectResult,
)
from mooncake.dropin.structured.wire import group_of

PARTITION_CHARS_MAX = 128
WRAPPED = "__mooncake_wrapped_object__"
"""In the metadata of what was no mapping of texts: its only member is the object."""


def check_partition(partition: Any) -> str:
    """Return a part of a name.

    Raises:
        ValueError: it cannot be one.
    """
    if not isinstance(partition, str) or not 0 < len(partition) <= PARTITION_CHARS_MAX or "/" in partition:
        raise ValueError(
            f"invalid bundle partition {partition!r}: 1 to {PARTITION_CHARS_MAX} characters, no /"
        )
    return partition


def check_chunk_bytes(chunk_bytes: Any) -> int:
    """Return a size.

    Raises:
        ValueError: it is none.
    """
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes!r}")
    return chunk_bytes


def check_names(names: Sequence[Any]) -> None:
    """Pass if members can have these names, else raise ValueError."""
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS_MAX:
            raise ValueError(
                f"invalid bundle buffer name {name!r:.100}: a text of 1 to {NAME_CHARS_MAX} characters"
            )
    if len(names) > MEMBERS_MAX:
        raise ValueError(f"{len(names)} members: at most {MEMBERS_MAX}")


def is_members(obj: Any) -> bool:
    """Return whether each of an object's items can be a member of its own."""
    return isinstance(obj, Mapping) and all(isinstance(name, str) and name for name in obj)


def plain_json(metadata: Any) -> dict[str, Any]:
    """Return metadata as it will be read.

    Raises:
        TypeError, ValueError: JSON cannot hold it.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError("structured metadata must be a mapping")
    if STRUCTURED_FIELD_SPECS_KEY in metadata:
        raise ValueError(f"structured metadata key {STRUCTURED_FIELD_SPECS_KEY!r} is reserved")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    except (TypeError, RecursionError) as error:
        raise TypeError(f"structured metadata must be JSON-serializable: {error}") from error
    if not isinstance(plain.setdefault("layout", "structured"), str):
        raise TypeError("structured metadata layout must be a string")
    return plain


def put(
    bundles: Bundles,
    metadata: Mapping[str, Any],
    buffers: Mapping[str, Any],
    *,
    partition: str,
    chunk_bytes: int,
    config: Any,
    group: str | None = None,
    after: Manifest | None = None,
) -> RemoteBundleRef:
    """Store an object; see Bundles.write, `encode` and `plain_json` for what it raises."""
    check_partition(partition)
    check_names(list(buffers))
    plain = plain_json(metadata)
    wanted = group if group is not None else group_of(config)
    members = {name: encode(value, name) for name, value in buffers.items()}
    return bundles.write(
        members, partition=partition, chunk_bytes=chunk_bytes, metadata=plain, config=config, group=wanted,
        after=after,
    )  # fmt: skip


def metadata_of(bundles: Bundles, manifest: Manifest) -> dict[str, Any]:
    """Return the metadata of an object, with the fields of its members as upstream shows them."""
    metadata = dict(manifest.metadata)
    if manifest.meta is not None:  # put_bundle
        given = bundles.read([Member("meta", manifest.meta, f"{bundles.prefix}/{manifest.object_id}/")])[0]
        try:
            metadata = msgspec.json.decode(given, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(
                "this bundle's metadata is no JSON object: it is no structured object"
            ) from error
    specs = {name: spec_of(manifest, name) for name in manifest.buffers}
    return {**metadata, **({STRUCTURED_FIELD_SPECS_KEY: specs} if specs else {})}


def spec_of(manifest: Manifest, name: str) -> dict[str, Any]:
    """Return the field of a member."""
    field = manifest.buffers[name].field
    spec: dict[str, Any] = msgspec.to_builtins(field)
    shaped = field.encoding in ("ndarray", "torch_tensor")
    return {"encoding": field.encoding, **spec, **({"shape": field.shape} if shaped else {})}


def read(
    bundles: Bundles, spec: StructuredObjectReadSpec, destinations: Mapping[str, Any] | None
) -> StructuredObjectResult:
    """Return what a spec asks for.

    Raises:
        KeyError: there is no such member. ValueError: none was asked for, or not in this way.
        Others: see Bundles.read.
    """
    if spec.member_names is not None and not spec.member_names:
        raise ValueError("structured read spec selected no members")
    manifest = bundles.resolve(spec.ref)
    names = list(manifest.buffers) if spec.member_names is None else list(spec.member_names)
    members = []
    for name in names:
        payload = manifest.buffers.get(name)
        if payload is None:
            raise KeyError(f"unknown bundle buffers: {[one for one in names if one not in manifest.buffers]}")
        rows = rows_of(name, payload.field, spec.member_slice(name))
        members.append(bundles.member(manifest, name, rows, (destinations or {}).get(name)))
    metadata = metadata_of(bundles, manifest)
    return StructuredObjectResult(metadata, dict(zip(names, bundles.read(members), strict=True)))
