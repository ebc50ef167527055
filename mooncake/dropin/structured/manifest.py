"""What a bundle consists of: the one object that makes it visible. What it says is checked before it is used.

    {prefix}/{partition}/{id}/manifest   this
    {prefix}/{partition}/{id}/{number}   a chunk of a member's bytes

Names of chunks follow from where a member begins and how large its chunks are; no manifest can name other
objects. A bundle that continues another has members in the other's chunks: the others' ids are `shared`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from mooncake.core.errors import IntegrityError
from mooncake.dropin.structured.model import RemoteBundleRef

MANIFEST_BYTES_MAX = 64 << 20
MEMBERS_MAX = 1 << 14
CHUNKS_MAX = 1 << 20
"""Of a bundle: 2 TiB of 2 MiB chunks."""
SHARED_MAX = 1 << 10
"""Appends to one stage."""
NAME_CHARS_MAX = 512
OBJECT_ID = re.compile(r"[^/]{1,128}/[0-9a-f]{32}")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class Field(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the bytes of a member are to be read."""

    encoding: Literal["bytes", "ndarray", "torch_tensor", "value", "rows", "nested_tensor"] = "bytes"
    dtype: str = ""
    shape: Annotated[list[Count], msgspec.Meta(max_length=32)] = []
    element_size: Count = 0
    rows: Count = 0


class Payload(msgspec.Struct, frozen=True, omit_defaults=True):
    """A member: `bytes` in chunks of `chunk_bytes`, the `first` of which has that number.

    The first `head` bytes have chunks of their own. `source`: whose chunks, of Manifest.ids().
    """

    bytes: Count
    chunk_bytes: Annotated[int, msgspec.Meta(gt=0, le=1 << 60)]
    first: Count = 0
    head: Count = 0
    source: Annotated[int, msgspec.Meta(ge=0, le=SHARED_MAX)] = 0
    field: Field = Field()

    @property
    def chunks(self) -> range:
        """Return the numbers of its chunks."""
        head, rest = -(-self.head // self.chunk_bytes), -(-(self.bytes - self.head) // self.chunk_bytes)
        return range(self.first, self.first + head + rest)

    def chunk_at(self, offset: int) -> tuple[int, int, int]:
        """Return the number of the chunk with the byte at `offset`, and where it begins and ends."""
        begin, end, number = 0, self.head, self.first
        if offset >= self.head:
            begin, end, number = self.head, self.bytes, self.first + -(-self.head // self.chunk_bytes)
        row = (offset - begin) // self.chunk_bytes
        start = begin + row * self.chunk_bytes
        return number + row, start, min(start + self.chunk_bytes, end)


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

    def ids(self) -> list[str]:
        """Return whose chunks it has, its own last."""
        return [*self.shared, self.object_id]

    def keys(self, prefix: str, since: int = 0) -> list[str]:
        """Return the names of all chunks of the sources from `since` on."""
        bases = [f"{prefix}/{one}/" for one in self.ids()]
        numbers = {
            (one.source, number) for one in self.payloads() if one.source >= since for number in one.chunks
        }
        return [f"{bases[source]}{number}" for source, number in sorted(numbers)]

    def check(self) -> None:
        """Pass if it makes sense, else raise IntegrityError."""
        ids = self.ids()
        partition = self.object_id.partition("/")[0]
        if not all(OBJECT_ID.fullmatch(one) and one.partition("/")[0] == partition for one in ids):
            raise IntegrityError(f"bundle manifest: {ids[:3]} are not objects of one partition")
        payloads = self.payloads()
        if any(one.source >= len(ids) or one.head > one.bytes for one in payloads):
            raise IntegrityError("bundle manifest: a member of nothing")
        if sum(len(one.chunks) for one in payloads) > CHUNKS_MAX:
            raise IntegrityError(f"bundle manifest: more than {CHUNKS_MAX} chunks")


def key_of(prefix: str, object_id: str) -> str:
    """Return the name of a manifest."""
    return f"{prefix}/{object_id}/manifest"


def encode(manifest: Manifest) -> bytes:
    """Return its bytes.

    Raises:
        ValueError: it would be too large to be read.
    """
    data = msgspec.msgpack.encode(manifest)
    members, chunks = len(manifest.buffers), sum(len(one.chunks) for one in manifest.payloads())
    if len(data) > MANIFEST_BYTES_MAX or members > MEMBERS_MAX or chunks > CHUNKS_MAX:
        raise ValueError(
            f"a bundle of {members} members, {chunks} chunks and a manifest of {len(data)} bytes: at most "
            f"{MEMBERS_MAX}, {CHUNKS_MAX} and {MANIFEST_BYTES_MAX}: put it as several, or use larger chunks"
        )
    if len(manifest.shared) > SHARED_MAX:
        raise ValueError(
            f"{len(manifest.shared)} appends to one stage: at most {SHARED_MAX}; use another stage"
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
    manifest.check()
    return manifest


def ref_of(manifest: Manifest, prefix: str) -> RemoteBundleRef:
    """Return it as users hold it."""
    return RemoteBundleRef(key_of(prefix, manifest.object_id), msgspec.to_builtins(manifest))
