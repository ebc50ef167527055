"""DataProto batches as bundles: one for each stage that wrote fields; appends leave earlier refs valid."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import structlog

from mooncake.core.errors import IntegrityError, PeerError
from mooncake.dropin.structured import batches, objects
from mooncake.dropin.structured.batches import Batch
from mooncake.dropin.structured.fields import count_rows
from mooncake.dropin.structured.handles import ref_of
from mooncake.dropin.structured.model import (
    BundleTransferPolicy,
    DataProtoRefLike,
    FieldSchema,
    MooncakeDataProtoRef,
    RemoteBundleRef,
    Section,
    StructuredFieldLocation,
    StructuredMemberSlice,
    TensorObject,
)
from mooncake.dropin.structured.transfer import ObjectTransfer
from mooncake.dropin.structured.tree import is_tensor
from mooncake.dropin.structured.wire import group_of

log = structlog.get_logger(__name__)

Rows = slice | StructuredMemberSlice | Sequence[int] | None
Kind = Literal["dataproto", "dict"]
NO_ROWS = ("bytes", "value")


class DataProtoTransfer(ObjectTransfer):
    """The rest of upstream's transfer."""

    # ------------------------------------------------------------ writing

    def put(
        self,
        data: Any,
        *,
        type: Kind = "dataproto",  # noqa: A002 - upstream's name
        namespace: str = "default",
        partition: str = "default",
        stage: str = "default",
        chunk_bytes: int | None = None,
        policy: BundleTransferPolicy | None = None,
        config: Any = None,
        field_schemas: Mapping[str, FieldSchema] | None = None,
    ) -> MooncakeDataProtoRef:
        """Store a batch.

        Args:
            data: a DataProto, a mapping of its sections, or with `type` "dict" one flat mapping.
            type: see data.
            namespace: kept in the ref.
            partition: part of the names.
            stage: who wrote these fields.
            chunk_bytes: size of one object of the store at most.
            policy: checked and not used.
            config: the store's ReplicateConfig; at most one group.
            field_schemas: what non-tensor fields must be, and the sections of a flat mapping.

        Raises:
            TypeError: something in it is not stored (it is named); nothing is pickled.
            ValueError: fields disagree in their rows, or are not as their schemas say.
            CapacityError, PeerError, RequestError: the store refuses or fails; nothing is left then.
        """
        _check_kind(type)
        sections = batches.split(batches.from_flat(data, field_schemas) if type == "dict" else data)
        group = group_of(config)
        if group is None:
            group = f"structured-{uuid.uuid4().hex}"
        empty = MooncakeDataProtoRef(
            sections.rows(), {}, {}, {}, namespace, partition, _storage_group_id=group or None
        )
        return self._add(empty, sections, stage, False, chunk_bytes, policy, field_schemas, config)

    def put_dataproto(
        self,
        data: Any,
        *,
        namespace: str = "default",
        partition: str = "default",
        stage: str = "default",
        chunk_bytes: int | None = None,
        policy: BundleTransferPolicy | None = None,
        field_schemas: Mapping[str, FieldSchema] | None = None,
        config: Any = None,
    ) -> MooncakeDataProtoRef:
        """As put, of a DataProto."""
        return self.put(
            data, namespace=namespace, partition=partition, stage=stage, chunk_bytes=chunk_bytes,
            policy=policy, field_schemas=field_schemas, config=config,
        )  # fmt: skip

    def append_dataproto_fields(
        self,
        ref: DataProtoRefLike,
        data: Any,
        *,
        stage: str,
        overwrite: bool = False,
        chunk_bytes: int | None = None,
        policy: BundleTransferPolicy | None = None,
        field_schemas: Mapping[str, FieldSchema] | None = None,
        config: Any = None,
    ) -> MooncakeDataProtoRef:
        """Store more fields of the same rows and return a ref of all; `ref` stays valid.

        Args:
            ref: or its handle.
            data: as in put.
            stage: who wrote them; a stage may append more than once.
            overwrite: write all fields of this stage anew; its old ones are removed, `ref` loses them.
            chunk_bytes: as in put.
            policy: as in put.
            field_schemas: as in put.
            config: as in put.

        Raises:
            ValueError: other rows, or fields that are there. Others: see put.
        """
        known = ref_of(ref)
        sections = batches.split(data)
        rows = sections.rows()
        if (sections.batch or sections.non_tensor_batch) and rows != known.batch_size:
            raise ValueError(
                f"DataProto append batch size {rows} does not match ref batch size {known.batch_size}"
            )
        return self._add(known, sections, stage, overwrite, chunk_bytes, policy, field_schemas, config)

    def _add(
        self,
        ref: MooncakeDataProtoRef,
        sections: Batch,
        stage: str,
        overwrite: bool,
        chunk_bytes: int | None,
        policy: BundleTransferPolicy | None,
        schemas: Mapping[str, FieldSchema] | None,
        config: Any,
    ) -> MooncakeDataProtoRef:
        chunk = self._checked(chunk_bytes, policy)
        columns = batches.check_schemas(sections, schemas)
        index: dict[str, StructuredFieldLocation] = {}
        buffers: dict[str, Any] = {}
        for section, values in (("batch", sections.batch), ("non_tensor_batch", columns)):
            objects.check_names(list(values))
            for name, value in values.items():
                member = f"{section}.{name}"
                index[name] = _location(stage, member, section)
                buffers[member] = _as_rows(name, value)
        meta_info = {**ref.meta_info, **sections.meta_info}
        if not buffers:
            return replace(
                ref, meta_info=meta_info, stage_refs=dict(ref.stage_refs), field_index=dict(ref.field_index)
            )
        _check_fields(ref, index, stage, overwrite)
        old = ref.stage_refs.get(stage)
        written = objects.put(
            self._bundles,
            _stage_metadata(ref, stage),
            buffers,
            partition=ref.partition,
            chunk_bytes=chunk,
            config=config,
            group=ref._storage_group_id,
            after=None if old is None or overwrite else self._bundles.resolve(old),
        )
        if old is not None and overwrite:
            self._forget(old)
        return replace(
            ref,
            stage_refs={**ref.stage_refs, stage: written},
            field_index={**ref.field_index, **index},
            meta_info=meta_info,
        )

    def _forget(self, old: RemoteBundleRef) -> None:
        try:
            self._bundles.remove(old)
        except PeerError as error:  # the new fields are stored and must not be lost with an exception
            log.warning("mooncake.structured: overwritten fields are left", reason=str(error))

    # ------------------------------------------------------------ reading

    def get(
        self,
        ref: DataProtoRefLike,
        *,
        type: Kind = "dataproto",  # noqa: A002 - upstream's name
        fields: Sequence[str] | None = None,
        batch_fields: Sequence[str] | None = None,
        non_tensor_fields: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        data_cls: Any = None,
        destinations: Mapping[str, Any] | None = None,
        rows: Rows = None,
    ) -> Any:
        """Read a batch, or some fields and rows of it.

        Args:
            ref: or its handle.
            type: "dict": return one flat dict, arrays of objects as lists.
            fields: which; None: all.
            batch_fields: which of these; instead of `fields`.
            non_tensor_fields: which of these; instead of `fields`.
            meta_info_keys: which, as far as they are there; None: all.
            data_cls: what the sections are made into, by its from_dict or its constructor.
            destinations: memory of the caller for dense fields, as in materialize_into.
            rows: which, in any order; None: all.

        Raises:
            KeyError: no such field. IndexError: no such row. TypeError, ValueError: a wrong argument.
            RequestError: it is not there. PeerError: it could not be read.
            IntegrityError: its bytes are not what was stored.
        """
        _check_kind(type)
        known = ref_of(ref)
        chosen = batches.choose_fields(known, fields, batch_fields, non_tensor_fields)
        some = batches.choose_rows(rows, known.batch_size)
        manifests = {
            stage: self._bundles.resolve(known.stage_refs[stage])
            for stage in dict.fromkeys(known.field_index[name].stage for name in chosen)
        }
        members = []
        for name in chosen:
            at = known.field_index[name]
            payload = manifests[at.stage].buffers.get(at.member)
            if payload is None:
                raise KeyError(
                    f"unknown DataProto fields: [{name!r}]: the stage {at.stage!r} has no {at.member!r}"
                )
            if payload.field.encoding in NO_ROWS or count_rows(name, payload.field) != known.batch_size:
                raise IntegrityError(f"field {name!r} has not the {known.batch_size} rows of its ref")
            member = self._bundles.member(
                manifests[at.stage], at.member, some, (destinations or {}).get(name)
            )
            members.append(member._replace(name=name))
        values = dict(zip(chosen, self._bundles.read(members), strict=True))
        info = known.meta_info
        if meta_info_keys is not None:
            info = {key: info[key] for key in meta_info_keys if key in info}
        sections = Batch(_of(known, values, "batch"), _of(known, values, "non_tensor_batch"), dict(info))
        return batches.to_flat(sections) if type == "dict" else batches.join(sections, data_cls)

    def get_dataproto(
        self,
        ref: DataProtoRefLike,
        *,
        fields: Sequence[str] | None = None,
        batch_fields: Sequence[str] | None = None,
        non_tensor_fields: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        data_cls: Any = None,
        destinations: Mapping[str, Any] | None = None,
        rows: Rows = None,
    ) -> Any:
        """As get, by sections."""
        return self.get(
            ref, fields=fields, batch_fields=batch_fields, non_tensor_fields=non_tensor_fields,
            meta_info_keys=meta_info_keys, data_cls=data_cls, destinations=destinations, rows=rows,
        )  # fmt: skip

    def dataproto_manifest_view(self, ref: DataProtoRefLike) -> dict[str, Any]:
        """Return what a batch has: its fields with stage, member and how they are stored; raises as get."""
        known = ref_of(ref)
        manifests = {stage: self._bundles.resolve(one) for stage, one in known.stage_refs.items()}
        fields = {
            name: {
                "section": at.section,
                "stage": at.stage,
                "member": at.member,
                "spec": objects.spec_of(manifests[at.stage], at.member),
            }
            for name, at in known.field_index.items()
        }
        return {
            "namespace": known.namespace,
            "partition": known.partition,
            "batch_size": known.batch_size,
            "batch_fields": _of(known, fields, "batch"),
            "non_tensor_fields": _of(known, fields, "non_tensor_batch"),
            "meta_info_keys": list(known.meta_info),
            "stages": {
                stage: {
                    "manifest_key": one.manifest_key,
                    "dataproto": manifests[stage].metadata.get("dataproto", {}),
                }
                for stage, one in known.stage_refs.items()
            },
        }

    # ------------------------------------------------------------ removing

    def cleanup_dataproto(self, ref: DataProtoRefLike) -> None:
        """Remove a batch with all its stages; what is gone is no error; raises as remove_bundle."""
        for one in ref_of(ref).stage_refs.values():
            self._bundles.remove(one)

    def cleanup_dataproto_append(self, previous: DataProtoRefLike, appended: DataProtoRefLike) -> None:
        """Remove what an append has added; `previous` stays as it is. Raises as remove_bundle."""
        before, after = ref_of(previous), ref_of(appended)
        for stage, one in after.stage_refs.items():
            known = before.stage_refs.get(stage)
            if known is None:
                self._bundles.remove(one)
            elif known.manifest_key != one.manifest_key:
                self._remove_since(known, one)

    def _remove_since(self, known: RemoteBundleRef, added: RemoteBundleRef) -> None:
        if not added.manifest and not self._bundles.wire.is_there(added.manifest_key):
            return
        manifest = self._bundles.resolve(added)
        keys = [f"{self.key_prefix}/{one}/manifest" for one in manifest.ids()]
        since = keys.index(known.manifest_key) + 1 if known.manifest_key in keys else len(keys) - 1
        self._bundles.remove_since(manifest, since)


def _check_kind(kind: str) -> None:
    if kind not in ("dataproto", "dict"):
        raise ValueError(f"unsupported Mooncake payload type: {kind!r}")


def _location(stage: str, member: str, section: str) -> StructuredFieldLocation:
    named: Section = "batch" if section == "batch" else "non_tensor_batch"
    if not isinstance(stage, str) or not stage:
        raise ValueError(f"a stage is a non-empty text, not {stage!r}")
    return StructuredFieldLocation(stage, member, named)


def _as_rows(name: str, value: Any) -> Any:
    """Return a field as something that has rows: of objects, each is what is behind the first dimension."""
    if is_tensor(value) or isinstance(value, TensorObject):
        return value
    array = batches.column(name, value)
    if array.dtype == object and array.ndim != 1:
        return batches.column(name, list(array))
    return array


def _check_fields(
    ref: MooncakeDataProtoRef, index: Mapping[str, StructuredFieldLocation], stage: str, overwrite: bool
) -> None:
    there = sorted(set(ref.field_index) & set(index))
    if there and not overwrite:
        raise ValueError(f"DataProto fields already exist: {there}")
    if overwrite:
        lost = sorted(name for name, at in ref.field_index.items() if at.stage == stage and name not in index)
        if lost:
            raise ValueError(f"DataProto overwrite for stage {stage!r} must include existing fields: {lost}")


def _stage_metadata(ref: MooncakeDataProtoRef, stage: str) -> dict[str, Any]:
    about = {
        "version": 1,
        "namespace": ref.namespace,
        "partition": ref.partition,
        "stage": stage,
        "batch_size": ref.batch_size,
    }
    return {"layout": "dataproto_stage", "dataproto": about}


def _of(ref: MooncakeDataProtoRef, values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if ref.field_index[name].section == section}
