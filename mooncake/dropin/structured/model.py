"""The public nouns of `mooncake.structured_object_store`, named as upstream names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

DEFAULT_BUNDLE_CHUNK_BYTES = 2 << 20
"""One object of the store: what a read of some rows fetches at least. Measured with 1 to 8 MiB: 32 MiB are
put and read as fast, 8 rows of them read 3 times as fast as with 8 MiB. Upstream's is 64 MiB."""
STRUCTURED_FIELD_SPECS_KEY = "__mooncake_structured_fields__"
DATAPROTO_REF_HANDLE_TYPE = "mooncake_dataproto_ref"
DATAPROTO_REF_HANDLE_VERSION = 1
STORAGE_GROUP_ID = "storage_group_id"
PUT_MODES = ("auto", "batch", "parallel")
COPY_MODES = ("auto", "zero_copy", "copy")

Section = Literal["batch", "non_tensor_batch"]


class BundleStore(Protocol):
    """What is needed of a store; `put_batch`, `batch_get_into` and others are used where it has them."""

    def put(self, key: str, value: Any, config: Any = None) -> int:
        """Store an object; 0 or a negative code."""

    def get(self, key: str) -> bytes:
        """Return an object, b"" if there is none."""

    def remove(self, key: str, force: bool = False) -> int:
        """Remove an object; 0 or a negative code."""

    def is_exist(self, key: str) -> int:
        """Return 1, 0 or a negative code."""


@dataclass(frozen=True)
class BundleTransferPolicy:
    """Checked and otherwise not used: chunks go to the store in batches, and are not copied before."""

    max_inflight_put: int = 1
    put_mode: Literal["auto", "batch", "parallel"] = "auto"
    copy_mode: Literal["auto", "zero_copy", "copy"] = "auto"

    def check(self, max_inflight_put: int | None = None) -> None:
        """Pass, or raise ValueError; the argument goes before the field of its name."""
        inflight = self.max_inflight_put if max_inflight_put is None else max_inflight_put
        if inflight < 1:
            raise ValueError("max_inflight_put must be positive")
        if self.put_mode not in PUT_MODES:
            raise ValueError(f"put_mode {self.put_mode!r}: one of {PUT_MODES}")
        if self.copy_mode not in COPY_MODES:
            raise ValueError(f"copy_mode {self.copy_mode!r}: one of {COPY_MODES}")


@dataclass(frozen=True)
class FieldSchema:
    """What a DataProto field must be; `metadata` may have "section" and "dtype"."""

    codec: str
    nullable: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class RemoteBundleRef:
    """A stored bundle. The manifest says where its bytes are; {}: read it from the store."""

    manifest_key: str
    manifest: dict[str, Any]


@dataclass(frozen=True, init=False)
class StructuredObjectPayload:
    """Metadata that JSON can hold, and named members."""

    metadata: Mapping[str, Any]
    buffers: Mapping[str, Any]

    def __init__(
        self, metadata: Mapping[str, Any] | None = None, buffers: Mapping[str, Any] | None = None
    ) -> None:
        """Raise TypeError without `buffers`."""
        if buffers is None:
            raise TypeError("StructuredObjectPayload requires buffers")
        object.__setattr__(self, "metadata", {} if metadata is None else metadata)
        object.__setattr__(self, "buffers", buffers)


@dataclass
class StructuredObjectResult:
    """What was read."""

    metadata: dict[str, Any]
    objects: dict[str, Any]


@dataclass(frozen=True)
class StructuredFieldLocation:
    """Which member of which stage a DataProto field is."""

    stage: str
    member: str
    section: Section


@dataclass
class MooncakeDataProtoRef:
    """A stored batch: its fields, and the bundle of each stage that wrote some."""

    batch_size: int
    stage_refs: dict[str, RemoteBundleRef]
    field_index: dict[str, StructuredFieldLocation]
    meta_info: dict[str, Any]
    namespace: str = "default"
    partition: str = "default"
    global_indexes: list[int] | None = None
    encoded_non_tensor: dict[str, Any] = field(default_factory=dict)
    _storage_group_id: str | None = field(default=None, repr=False)


DataProtoRefLike = MooncakeDataProtoRef | Mapping[str, Any]


@dataclass(frozen=True)
class StructuredMemberSlice:
    """Rows of one member."""

    axis: int
    start: int
    end: int
    step: int = 1


@dataclass(frozen=True)
class StructuredObjectReadSpec:
    """What is to be read; nothing is until `materialize`."""

    ref: RemoteBundleRef | Mapping[str, Any]
    member_names: tuple[str, ...] | None = None
    member_slices: tuple[tuple[str, StructuredMemberSlice], ...] = ()

    def select_members(self, names: Sequence[str] | None) -> "StructuredObjectReadSpec":
        """Return one that reads these members; None: all."""
        return replace(self, member_names=None if names is None else tuple(names))

    def slice_member(
        self, name: str, axis: int, start: int, end: int, step: int = 1
    ) -> "StructuredObjectReadSpec":
        """Return one that reads only these rows of a member."""
        slices = {**dict(self.member_slices), name: StructuredMemberSlice(axis, start, end, step)}
        return replace(self, member_slices=tuple(slices.items()))

    def member_slice(self, name: str) -> StructuredMemberSlice | None:
        """Return the rows that were asked for, None: all."""
        return dict(self.member_slices).get(name)


@dataclass(frozen=True)
class RawMemory:
    """Memory of the caller at an address; `owner` keeps it there."""

    ptr: int
    size: int
    owner: Any = None
    pre_registered: bool = False


@dataclass(frozen=True)
class TensorObject:
    """Memory that holds a tensor as `get_tensor_into` leaves it: header and bytes."""

    ptr: int
    size: int
    owner: Any = None
    batch_size: int | None = None

    def __len__(self) -> int:
        """Return the rows that the caller says it has."""
        if self.batch_size is None:
            raise TypeError("tensor_object_buffer: give batch_size where it is a field of a DataProto")
        return self.batch_size


def tensor_object_buffer(
    ptr: int, size: int, owner: Any = None, batch_size: int | None = None
) -> TensorObject:
    """Return a tensor in memory as a member to store, or as a place to read a tensor into."""
    return TensorObject(int(ptr), int(size), owner, batch_size)


def raw_destination(ptr: int, size: int, owner: Any = None, *, pre_registered: bool = False) -> RawMemory:
    """Return memory for `materialize_into`; the array or tensor that was read lies there."""
    return RawMemory(int(ptr), int(size), owner, pre_registered)
