"""What a bundle consists of: the one object that makes it visible. What it says is checked before it is used.

    {prefix}/{partition}/{id}/manifest   this
    {prefix}/{partition}/{id}/{number}   a chunk of a member's bytes

A bundle that continues another has members in the other's chunks; the others' ids stand in `shared`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from mooncake.core.errors import IntegrityError
from mooncake.dropin.structured.model import RemoteBundleRef

MANIFEST_BYTES_MAX = 64 << 20
MEMBERS_MAX = 1 << 14
CHUNKS_MAX = 1 << 17
"""Of one member: 1 TiB of 8 MiB chunks."""
SHARED_MAX = 1 << 10
"""Appends to one stage."""
NAME_CHARS_MAX = 512
OBJECT_ID = re.compile(r"[^/]{1,128}/[0-9a-f]{32}")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class Chunk(msgspec.Struct, frozen=True):
    """One object of the store."""

    key: str
    bytes: Annotated[int, msgspec.Meta(gt=0, le=1 << 60)]


class Field(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the bytes of a member are to be read."""

    encoding: Literal["bytes", "ndarray", "torch_tensor", "value", "rows", "nested_tensor"] = "bytes"
    dtype: str = ""
    shape: Annotated[list[Count], msgspec.Meta(max_length=32)] = []
    element_size: Count = 0
    rows: Count = 0


class Payload(msgspec.Struct, frozen=True):
    """A member: its bytes are those of its chunks, one behind the other."""

    bytes: Count
    chunks: Annotated[list[Chunk], msgspec.Meta(max_length=CHUNKS_MAX)]
    field: Field = Field()


Buffers = Annotated[
    dict[Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)], Payload],
    msgspec.Meta(max_length=MEMBERS_MAX),
]


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of a bundle."""

    object_id: str
    version: Literal[1]
    layout: Literal["bundle"]
    buffers: Buffers
    metadata: dict[str, Any] = {}
    meta: Payload | None = None
    shared: Annotated[list[str], msgspec.Meta(max_length=SHARED_MAX)] = []

    def payloads(self) -> list[Payload]:
        """Return all that has bytes."""
        return [*self.buffers.values(), *([self.meta] if self.meta else [])]

    def check(self, prefix: str) -> None:
        """Pass if it speaks of its own objects only, else raise IntegrityError."""
        ids = [self.object_id, *self.shared]
        partition = self.object_id.partition("/")[0]
        for one in ids:
            if not OBJECT_ID.fullmatch(one) or one.partition("/")[0] != partition:
                raise IntegrityError(f"bundle manifest: {one!r} is no object of this partition")
        bases = {f"{prefix}/{one}/" for one in ids}
        for payload in self.payloads():
            for chunk in payload.chunks:
                base, _, number = chunk.key.rpartition("/")
                if f"{base}/" not in bases or not number.isdecimal():
                    raise IntegrityError(f"bundle manifest: {chunk.key!r} is outside of the bundle")
            if sum(chunk.bytes for chunk in payload.chunks) != payload.bytes:
                raise IntegrityError("bundle manifest: the chunks of a member are not its bytes")


def key_of(prefix: str, object_id: str) -> str:
    """Return the name of a manifest."""
    return f"{prefix}/{object_id}/manifest"


def encode(manifest: Manifest) -> bytes:
    """Return its bytes.

    Raises:
        ValueError: it would be too large to be read.
    """
    data = msgspec.msgpack.encode(manifest)
    if len(data) > MANIFEST_BYTES_MAX or len(manifest.buffers) > MEMBERS_MAX:
        raise ValueError(
            f"a bundle of {len(manifest.buffers)} members, its manifest of {len(data)} bytes: at most "
            f"{MEMBERS_MAX} and {MANIFEST_BYTES_MAX}; put it as several, or use larger chunks"
        )
    return data


def decode(data: Any, key: str, prefix: str) -> Manifest:
    """Return the manifest that was read from `key`, or that a caller has of it.

    Args:
        data: bytes, or a mapping.
        key: its name, from which the object's follows.
        prefix: of all names.

    Raises:
        IntegrityError: it is none, or speaks of other objects.
    """
    try:
        if isinstance(data, Mapping):
            manifest = msgspec.convert(dict(data), Manifest)
        elif len(data) > MANIFEST_BYTES_MAX:
            raise IntegrityError(f"{key}: {len(data)} bytes are no manifest: at most {MANIFEST_BYTES_MAX}")
        else:
            manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{key}: no bundle manifest: {error}") from error
    if key != key_of(prefix, manifest.object_id):
        raise IntegrityError(f"{key}: a manifest of {manifest.object_id!r}")
    manifest.check(prefix)
    return manifest


def ref_of(manifest: Manifest, prefix: str) -> RemoteBundleRef:
    """Return it as users hold it."""
    return RemoteBundleRef(key_of(prefix, manifest.object_id), msgspec.to_builtins(manifest))
