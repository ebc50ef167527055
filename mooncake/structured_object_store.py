"""`mooncake.structured_object_store`: nested objects and DataProto batches over `mooncake.store`.

Names and behaviour are those of `mooncake-transfer-engine` 0.3.13.post1; docs/structured.md says what
differs.
"""

from mooncake.dropin.structured.dataproto import DataProtoTransfer
from mooncake.dropin.structured.handles import (
    export_dataproto_ref,
    import_dataproto_ref,
    is_dataproto_ref_handle,
)
from mooncake.dropin.structured.infer import MISSING, infer_structure
from mooncake.dropin.structured.model import (
    DATAPROTO_REF_HANDLE_TYPE,
    DATAPROTO_REF_HANDLE_VERSION,
    DEFAULT_BUNDLE_CHUNK_BYTES,
    STORAGE_GROUP_ID,
    STRUCTURED_FIELD_SPECS_KEY,
    BundleStore,
    BundleTransferPolicy,
    DataProtoRefLike,
    FieldSchema,
    MooncakeDataProtoRef,
    RemoteBundleRef,
    StructuredFieldLocation,
    StructuredMemberSlice,
    StructuredObjectPayload,
    StructuredObjectReadSpec,
    StructuredObjectResult,
    raw_destination,
    tensor_object_buffer,
)
from mooncake.dropin.structured.wire import OBJECT_NOT_FOUND as MISSING_OBJECT_ERROR

__all__ = [
    "DATAPROTO_REF_HANDLE_TYPE",
    "DATAPROTO_REF_HANDLE_VERSION",
    "DEFAULT_BUNDLE_CHUNK_BYTES",
    "MISSING",
    "MISSING_OBJECT_ERROR",
    "STORAGE_GROUP_ID",
    "STRUCTURED_FIELD_SPECS_KEY",
    "BundleStore",
    "BundleTransferPolicy",
    "DataProtoRefLike",
    "FieldSchema",
    "MooncakeBundleTransfer",
    "MooncakeDataProtoRef",
    "RemoteBundleRef",
    "StructuredFieldLocation",
    "StructuredMemberSlice",
    "StructuredObjectPayload",
    "StructuredObjectReadSpec",
    "StructuredObjectResult",
    "export_dataproto_ref",
    "export_ref",
    "import_dataproto_ref",
    "import_ref",
    "infer_structure",
    "is_dataproto_ref_handle",
    "raw_destination",
    "tensor_object_buffer",
]

export_ref = export_dataproto_ref
import_ref = import_dataproto_ref


class MooncakeBundleTransfer(DataProtoTransfer):
    """Objects and batches over a store; may be used by several threads if the store may."""
