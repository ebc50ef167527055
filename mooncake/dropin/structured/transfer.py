"""`MooncakeBundleTransfer`: objects and DataProto batches over a store."""

from collections.abc import Mapping
from typing import Any

from mooncake.dropin.structured import objects
from mooncake.dropin.structured.bundles import Bundles, Ref
from mooncake.dropin.structured.fields import Encoded
from mooncake.dropin.structured.manifest import Field
from mooncake.dropin.structured.model import (
    DEFAULT_BUNDLE_CHUNK_BYTES,
    BundleStore,
    BundleTransferPolicy,
    RemoteBundleRef,
    StructuredObjectPayload,
    StructuredObjectReadSpec,
    StructuredObjectResult,
)
from mooncake.dropin.structured.wire import group_of

PREFIX_CHARS_MAX = 256


class ObjectTransfer:
    """Structured objects, under upstream's names; see mooncake.dropin.structured.objects."""

    def __init__(
        self,
        store: BundleStore,
        key_prefix: str = "bundle",
        default_chunk_bytes: int = DEFAULT_BUNDLE_CHUNK_BYTES,
        buffer_pool: Any = None,
    ) -> None:
        """Use a store.

        Args:
            store: MooncakeDistributedStore, or what has its put, get, remove and is_exist.
            key_prefix: what all names begin with.
            default_chunk_bytes: size of one object of the store at most; more than its default gains
                nothing and makes reads of rows slow, so that it is the most that is used.
            buffer_pool: not used: what is read is the caller's own memory.

        Raises:
            ValueError: no prefix, or no size.
        """
        del buffer_pool
        prefix = key_prefix.strip("/") if isinstance(key_prefix, str) else ""
        if not 0 < len(prefix) <= PREFIX_CHARS_MAX:
            raise ValueError(f"key_prefix must be a non-empty key prefix, not {key_prefix!r}")
        self.store = store
        self.key_prefix = prefix
        self.default_chunk_bytes = objects.check_chunk_bytes(default_chunk_bytes)
        self._bundles = Bundles(store, prefix)

    def _checked(
        self,
        chunk_bytes: int | None,
        policy: BundleTransferPolicy | None,
        max_inflight_put: int | None = None,
    ) -> int:
        (policy or BundleTransferPolicy()).check(max_inflight_put)
        given = objects.check_chunk_bytes(self.default_chunk_bytes if chunk_bytes is None else chunk_bytes)
        return min(given, DEFAULT_BUNDLE_CHUNK_BYTES)

    def put_bundle(
        self,
        meta: bytes | bytearray | memoryview,
        buffers: Mapping[str, Any],
        partition: str = "default",
        chunk_bytes: int | None = None,
        policy: BundleTransferPolicy | None = None,
        max_inflight_put: int | None = None,
        config: Any = None,
    ) -> RemoteBundleRef:
        """Store bytes: `meta` and named buffers.

        Raises:
            TypeError: they are no bytes. ValueError: a wrong argument.
            CapacityError, PeerError, RequestError: the store refuses or fails; nothing is left then.
        """
        chunk = self._checked(chunk_bytes, policy, max_inflight_put)
        objects.check_partition(partition)
        objects.check_names(list(buffers))
        members = {name: Encoded(Field(), [_bytes(value, name)]) for name, value in buffers.items()}
        return self._bundles.write(
            members, partition=partition, chunk_bytes=chunk, metadata={}, meta=_bytes(meta, "meta"),
            config=config, group=group_of(config),
        )  # fmt: skip

    def remove_bundle(self, ref: Ref) -> None:
        """Remove a stored object; one that is gone is no error."""
        self._bundles.remove(ref)

    def put_structured_object(
        self,
        payload: StructuredObjectPayload,
        partition: str = "default",
        chunk_bytes: int | None = None,
        policy: BundleTransferPolicy | None = None,
        max_inflight_put: int | None = None,
        config: Any = None,
    ) -> RemoteBundleRef:
        """Store metadata and named members of any nesting.

        Raises:
            TypeError: something in it is not stored (it is named); nothing is pickled.
            Others: see put_bundle.
        """
        chunk = self._checked(chunk_bytes, policy, max_inflight_put)
        return objects.put(
            self._bundles, payload.metadata, payload.buffers,
            partition=partition, chunk_bytes=chunk, config=config,
        )  # fmt: skip

    def put_object(
        self,
        obj: Any,
        partition: str = "default",
        chunk_bytes: int | None = None,
        policy: BundleTransferPolicy | None = None,
        max_inflight_put: int | None = None,
        config: Any = None,
    ) -> RemoteBundleRef:
        """Store an object: a mapping's items can be read one by one; raises as put_structured_object."""
        if objects.is_members(obj):
            payload = StructuredObjectPayload({}, obj)
        else:
            payload = StructuredObjectPayload({objects.WRAPPED: True}, {"value": obj})
        return self.put_structured_object(payload, partition, chunk_bytes, policy, max_inflight_put, config)

    def get_object(self, ref: Ref) -> Any:
        """Return what put_object stored; raises as materialize."""
        result = self.materialize(self.read_spec(ref))
        return result.objects["value"] if result.metadata.get(objects.WRAPPED) else result.objects

    def read_spec(self, ref: Ref) -> StructuredObjectReadSpec:
        """Return a spec of all of an object, to be narrowed; nothing is read."""
        return StructuredObjectReadSpec(ref)

    def materialize(self, spec: StructuredObjectReadSpec) -> StructuredObjectResult:
        """Read what a spec asks for.

        Raises:
            RequestError: the object is not there. PeerError: it could not be read.
            IntegrityError: its bytes are not what was stored, or its manifest is hostile.
            KeyError: no such member. ValueError: no such rows.
        """
        return objects.read(self._bundles, spec, None)

    def materialize_into(
        self, spec: StructuredObjectReadSpec, destinations: Mapping[str, Any] | None
    ) -> StructuredObjectResult:
        """As materialize, arrays and tensors into memory of the caller where some is given.

        Raises:
            TypeError, ValueError: a destination does not fit; nothing was read then.
        """
        return objects.read(self._bundles, spec, destinations)

    @staticmethod
    def release_result(result: Any) -> None:
        """Do nothing: what was read is the caller's own memory."""


def _bytes(value: Any, name: str) -> memoryview:
    try:
        return memoryview(value).cast("B")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be bytes-like, got {type(value).__name__}: {error}") from error
