"""Every module of upstream's wheel (0.3.13.post1, `non-cuda`) with its public names: here, or why not.

UPSTREAM is its interface, as `dir` and the sources of its pure-Python modules show it. ROWS says of each
name what became of it. `python -m tests.unit.dropin.module_table` writes the table of
docs/store-modules.md from them.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

from mooncake.dropin.left_out import REASONS

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/store-modules.md"

UPSTREAM = {
    "__init__": "BufferPool RegisteredBufferPool",
    "async_store": "MooncakeDistributedStoreAsync",
    "buffer_pool": "BufferPool RegisteredBufferPool",
    "cli": "main",
    "cli_bench": "main",
    "cli_client": "main",
    "dataproto_catalog": "DataProtoCatalog DataProtoCatalogTransfer",
    "engine": """CoroRPCInterface InnerTransferEngine Read ReceivedData ReceivedTensor RpcInterface
        SUPPORT_CUDA SUPPORT_EFA SUPPORT_HIP SUPPORT_INTRA_NVLINK SUPPORT_MNNVL SUPPORT_MUSA SharedSegment
        TransferEngine TransferNotify TransferOpcode Write create_rpc_client create_rpc_server""",
    "ep": "",
    "fabric_allocator_utils": "get_mooncake_so_path probe_allocator_backend",
    "http_metadata_server": "KVBootstrapServer KVPoll main",
    "mooncake_config": "MooncakeConfig",
    "mooncake_connector_v1": """MooncakeAgentMetadata MooncakeConnector MooncakeConnectorMetadata
        MooncakeConnectorScheduler MooncakeConnectorWorker RecvReqMeta SendBlockMeta
        get_mooncake_side_channel_port group_concurrent_contiguous zmq_ctx""",
    "mooncake_elastic_buffer": "EPHandle ElasticBuffer EventOverlap",
    "mooncake_ep_buffer": "Buffer EventOverlap",
    "mooncake_ssd_register": "MooncakeNoFRegister main parse_arguments",
    "mooncake_ssd_unregister": "MooncakeNoFUnregister main parse_arguments",
    "mooncake_store_service": "MooncakeStoreService main parse_arguments sync_main",
    "pg": "",
    "reshard": "PlacementManifest ResourceKind ResourceManifest RuntimeBindingManifest",
    "reshard.contracts": """LeaseId ParticipantId PlacementFragmentId PlacementId PlacementManifest
        PlacementSetId ResourceId ResourceKind ResourceManifest RevisionId RuntimeBindingFragment
        RuntimeBindingManifest RuntimeFragmentId RuntimeInstanceId StoredFragmentId StoredResourceManifest
        TensorId TopologyId validate_resource_binding_identity""",
    "reshard.geometry": """LogicalBox OverlapRegion box_contains boxes_exactly_cover boxes_overlap
        regions_exactly_cover""",
    "reshard.weight": """LogicalTransferOperation LogicalTransferPlan OwnershipAxis ParallelRank
        ParallelTopology PipelineRouteGroup PlacementExecutorPlan PlacementFragment PlanningLimits
        ReplicatedAxis RuntimeBindingFragment SplitAxis StoredFragment TensorDescriptor TopologyParticipant
        TransferRegion WeightManifest WeightPlacementManifest WeightPlacementPart WeightRuntimeBindingManifest
        plan_placement_transfer plan_placement_transfer_to_local_target
        plan_stored_transfer_to_target_placement validate_runtime_binding validate_runtime_bindings
        weight_placement_from_json weight_placement_to_json""",
    "shared_segment": "SharedSegment SharedSegmentError create_shared_segment shared_segment_supported",
    "spdk_tgt_create": "SPDKTgtCreator main parse_arguments",
    "store": """ACTIVATION BufferHandle BufferLease BufferLeaseView BufferPool COMPLETE Descriptor
        DiskDescriptor EngramStore EngramStoreConfig FAILED GENERAL GRADIENT INITIALIZED KVCACHE METADATA
        MemoryDescriptor MooncakeDistributedNoFRegister MooncakeDistributedStore MooncakeHostMemAllocator
        OPTIMIZER_STATE ObjectDataType PENDING PROCESSING ParallelAxis QueryTaskResponse REMOVED REPLICA_COPY
        REPLICA_MOVE ReadTarget RegisteredBufferLease RegisteredBufferLeaseView RegisteredBufferPool
        ReplicaDescriptor ReplicaStatus ReplicateConfig SAMPLE SUCCESS SoftPinAction TENSOR TaskStatus
        TaskType TensorParallelism UNDEFINED UNKNOWN WEIGHT _deserialize_tensor _get_pyclient_from_wrapper
        _serialize_tensor _tensor_metadata_size bind_to_numa_node get_alloc_func_addr get_free_func_addr""",
    "structured_object_store": """BundleStore BundleTransferPolicy FieldSchema MooncakeBundleTransfer
        MooncakeDataProtoRef RemoteBundleRef StructuredFieldLocation StructuredMemberSlice
        StructuredObjectPayload StructuredObjectReadSpec StructuredObjectResult export_dataproto_ref
        import_dataproto_ref infer_structure is_dataproto_ref_handle raw_destination tensor_object_buffer""",
    "transfer_engine_topology_dump": """apply_backend dump_te_topology dump_tent_topology main parse_args
        resolve_backend sanitize_tent_conf_for_discover""",
    "vllm_v1_proxy_server": """get_next_client handle_chat_completions handle_completions healthcheck lifespan
        parse_args send_request_to_service stream_service_response""",
}


class Row(NamedTuple):
    """What became of names of a module; none are named = all of them that no other row names."""

    module: str
    names: str
    here: bool
    text: str


def _absent(module: str, under: str = "") -> Row:
    return Row(module, "", False, REASONS[under or module])


ROWS = [
    Row("__init__", "", True, "`from mooncake import BufferPool`, loaded when asked for"),
    Row("async_store", "", True, "its own bounded threads; a cancelled call is waited for if it has begun"),
    Row("buffer_pool", "", True, "see store"),
    Row("cli", "", True, "another program: `mooncake`; the command `mooncake_master` is there as upstream's"),
    _absent("cli_bench"),
    Row("cli_client", "", True, "the command `mooncake_client`"),
    Row("dataproto_catalog", "", True, "batches of training samples by name"),
    Row("engine", "", True, "[transfer.md](transfer.md)"),
    _absent("ep"),
    _absent("fabric_allocator_utils"),
    Row("http_metadata_server", "", True, "the command of that name; loopback unless told otherwise"),
    Row("mooncake_config", "", True, "same fields, files and variables; what is wrong is a ConfigError"),
    _absent("mooncake_connector_v1"),
    _absent("mooncake_elastic_buffer"),
    _absent("mooncake_ep_buffer"),
    _absent("mooncake_ssd_register"),
    _absent("mooncake_ssd_unregister"),
    Row("mooncake_store_service", "", True, "the REST service, `mc_store_rest_server`"),
    Row("mooncake_store_service", "parse_arguments", False, "its parser is its own: `main` takes the words"),
    _absent("pg"),
    _absent("reshard"),
    _absent("reshard.contracts", "reshard"),
    _absent("reshard.geometry", "reshard"),
    _absent("reshard.weight", "reshard"),
    Row("shared_segment", "", True, "host memory only; `mmap=False`, `host_register=True` need Ascend NPUs"),
    _absent("spdk_tgt_create"),
    Row("store", "MooncakeDistributedStore", True, "[store-methods.md](store-methods.md)"),
    Row("store", "ReplicateConfig SoftPinAction ObjectDataType UNKNOWN KVCACHE TENSOR WEIGHT SAMPLE "
        "ACTIVATION GRADIENT OPTIMIZER_STATE METADATA GENERAL", True, "how an object is kept"),
    Row("store", "ReplicaDescriptor MemoryDescriptor DiskDescriptor Descriptor ReplicaStatus UNDEFINED "
        "INITIALIZED COMPLETE REMOVED", True, "where its copies are"),
    Row("store", "QueryTaskResponse TaskStatus TaskType REPLICA_COPY REPLICA_MOVE PENDING PROCESSING SUCCESS "
        "FAILED", True, "copy and move tasks"),
    Row("store", "BufferHandle", True, "an object in memory of this process"),
    Row("store", "BufferPool BufferLease BufferLeaseView RegisteredBufferPool RegisteredBufferLease "
        "RegisteredBufferLeaseView", True, "registered memory by lease, below"),
    Row("store", "EngramStore EngramStoreConfig", True, "embedding tables; small ones, see below"),
    Row("store", "MooncakeHostMemAllocator get_alloc_func_addr get_free_func_addr", True,
        "host memory by address; upstream's functions give none where there is no SPDK"),
    Row("store", "bind_to_numa_node", True, "what cannot be bound is one line of log"),
    Row("store", "ParallelAxis TensorParallelism ReadTarget", True, "layouts of tensors in pieces"),
    Row("store", "_serialize_tensor _deserialize_tensor _tensor_metadata_size", True, "tensors as bytes"),
    Row("store", "MooncakeDistributedNoFRegister", False, "NVMe-oF by SPDK: use `mooncake store --ssd-path`"),
    Row("store", "_get_pyclient_from_wrapper", False,
        "there is no C++ client to point to, nor the store's _get_pyclient_capsule"),
    Row("structured_object_store", "", True, "nested objects, read in part"),
    Row("transfer_engine_topology_dump", "main", True, "the command of that name"),
    Row("transfer_engine_topology_dump", "", False, "parts of upstream's script: use transfer.topology"),
    _absent("vllm_v1_proxy_server"),
]  # fmt: skip

HEAD = "| module | names | |\n|---|---|---|\n"


def names(module: str) -> list[str]:
    """Return upstream's public names of a module."""
    return sorted(UPSTREAM[module].split())


def covered(row: Row) -> list[str]:
    """Return the names that a row is about."""
    if row.names:
        return sorted(row.names.split())
    others = {name for one in ROWS if one.module == row.module for name in one.names.split()}
    return [name for name in names(row.module) if name not in others]


def table() -> str:
    """Return the table of the page."""
    lines = []
    for row in ROWS:
        module = "mooncake" if row.module == "__init__" else row.module
        listed = ", ".join(f"`{name}`" for name in covered(row))
        lines.append(f"| `{module}` | {listed} | {row.text if row.here else f'**left out**: {row.text}'} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(HEAD)
    lines = rest.splitlines(keepends=True)
    after = "".join(itertools.dropwhile(lambda line: line.startswith("|"), lines))
    PAGE.write_text(before + table() + after)
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {len(UPSTREAM)} modules\n")
