"""Every flag of upstream's `mooncake_master` (0.3.13.post1), and what it does here.

docs/master.md shows this table; a test holds it against the list of upstream's flags.
"""

import enum
from collections.abc import Mapping, Sequence

import msgspec


class Kind(enum.StrEnum):
    """What becomes of a flag."""

    ACTS = "acts"
    IGNORED = "ignored"
    WARNED = "warned"


class Flag(msgspec.Struct, frozen=True):
    """What one does, or why it does nothing: then it is accepted silently, or named in a warning."""

    kind: Kind
    text: str


_LOGS = "logs go to stderr, as text on a terminal, else as JSON"
_HELP = "--help shows the flags that act"
_TASKS = "tasks have bounds of their own, see docs/pool.md"
_ALLOCATOR = "each store divides its memory by itself"
_RPC = "one loop answers; no object passes the master"
_SNAPSHOT = "nothing is lost with a master: stores own what they hold and say so to the next one"
_HA = "one master; for more than one, start clients with etcd://... and `mooncake directory` beside them"
_EVENTS = "stores publish events, `mooncake conductor` subscribes to them; upstream's publisher is not here"
_CXL = "memory of the host only"
_NOF = "there is no NVMe-oF pool"
_REPLICATION = "hot keys are replicated when `mooncake pool` or the Conductor asks for it"
_PROMOTION = "what is read from an SSD goes through memory with the read itself: nothing is queued"
_OFFLOAD = "copies to the SSD are paced by the disk itself"
_DISK = "each client's tier has a size of its own: MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES"
_SHARED_FS = "there is no tier in a shared file system"
_WRITES = "a write that is not finished within 30 s is given up; its room rests for a minute"
_GFLAGS = "write the flags on the command line, or use --config_path"

_ACTS = {
    "allow_evict_soft_pinned_objects": "false: soft pins give way only when their time is over",
    "client_ttl": "seconds after which the segment of a client that is silent is gone; 5 if not given",
    "config_path": "a JSON or YAML file of flags; those of the command line win",
    "default_kv_lease_ttl": "for so long what was read is not removed unless forced; ms, or 10s, 5m, 1h",
    "default_kv_soft_pin_ttl": "of soft pins that name no time; as above",
    "enable_http_metadata_server": "serves /metadata too",
    "enable_multi_tenants": "only tenants with a quota write, and none beyond it",
    "enable_offload": "clients with MOONCAKE_OFFLOAD_FILE_STORAGE_PATH have an SSD tier whatever setup says",
    "eviction_high_watermark_ratio": "a store that is fuller evicts ahead of need; 1 if not given: never",
    "eviction_ratio": "of the memory, how far below that",
    "help": "shows the flags that act",
    "http_metadata_server_host": "where; loopback if not given",
    "http_metadata_server_port": "where",
    "metrics_host": "where the HTTP listens; as --rpc_address if not given",
    "metrics_port": "where the HTTP listens",
    "offload_on_evict": "blocks go to the SSD only when memory runs short, not once they are 2 s old",
    "port": "as --rpc_port",
    "promotion_admission_threshold": "reads until what an SSD gave to memory stays there; 1 if not given",
    "promotion_on_hit": "false: what an SSD gave to memory is always the first to go; true if not given",
    "rpc_address": "where clients register; loopback if not given",
    "rpc_interface": "its IPv4 address instead of --rpc_address",
    "rpc_port": "where clients register",
    "tenant_quota_connector_type": "file",
    "tenant_quota_connector_uri": "the file of quotas, which changes by HTTP are written to",
}
_IGNORED = {
    **dict.fromkeys(
        (
            *("alsologtoemail", "alsologtostderr", "colorlogtostderr", "drop_log_memory", "log_backtrace_at"),
            *(
                "log_dir",
                "log_link",
                "log_prefix",
                "logbuflevel",
                "logbufsecs",
                "logemaillevel",
                "logfile_mode",
            ),
            *("logmailer", "logtostderr", "max_log_size", "minloglevel", "stderrthreshold", "v", "vmodule"),
            *("stop_logging_if_full_disk", "symbolize_stacktrace"),
        ),
        _LOGS,
    ),
    **dict.fromkeys(
        ("helpfull", "helpmatch", "helpon", "helppackage", "helpshort", "helpxml", "version"), _HELP
    ),
    **dict.fromkeys(("tab_completion_columns", "tab_completion_word", "undefok"), "a matter of gflags"),
    **dict.fromkeys(
        (
            *("max_retry_attempts", "max_total_finished_tasks", "max_total_pending_tasks"),
            *("max_total_processing_tasks", "pending_task_timeout_sec", "processing_task_timeout_sec"),
        ),
        _TASKS,
    ),
    **dict.fromkeys(("memory_allocator", "mmap_arena_pool_size", "use_mmap_arena_allocator"), _ALLOCATOR),
    **dict.fromkeys(
        ("max_threads", "rpc_conn_timeout_seconds", "rpc_enable_tcp_no_delay", "rpc_thread_num"), _RPC
    ),
    **dict.fromkeys(
        (
            *("batch_oplog_retry_timeout_sec", "enable_snapshot", "enable_snapshot_restore"),
            *("oplog_batch_max_entries", "oplog_poll_interval_ms", "snapshot_backup_dir"),
            *("snapshot_catalog_backend_connstring", "snapshot_catalog_backend_type"),
            *("snapshot_catalog_store_connstring", "snapshot_catalog_store_type"),
            *("snapshot_child_timeout_seconds", "snapshot_interval_seconds", "snapshot_object_store_type"),
            *("snapshot_payload_backend_type", "snapshot_payload_store_type", "snapshot_retention_count"),
        ),
        _SNAPSHOT,
    ),
    **dict.fromkeys(
        (
            *("nof_eviction_high_watermark_ratio", "nof_eviction_ratio", "nof_heartbeat_failures_threshold"),
            *("nof_heartbeat_interval_sec", "nof_heartbeat_probe_timeout_ms"),
        ),
        _NOF,
    ),
    **dict.fromkeys(
        (
            *("dynamic_replication_admission_qps_threshold", "dynamic_replication_heat_window_seconds"),
            "dynamic_replication_max_memory_replicas",
        ),
        _REPLICATION,
    ),
    **dict.fromkeys(
        (
            "promotion_max_per_heartbeat",
            "promotion_queue_limit",
        ),
        _PROMOTION,
    ),
    **dict.fromkeys(("offload_cap_ratio", "offload_force_evict", "offloading_queue_limit"), _OFFLOAD),
    **dict.fromkeys(("put_start_discard_timeout_sec", "put_start_release_timeout_sec"), _WRITES),
    **dict.fromkeys(
        (
            *(
                "kv_events_additional_salt",
                "kv_events_backend_id",
                "kv_events_block_size",
                "kv_events_dp_rank",
            ),
            *("kv_events_emit_legacy_compat", "kv_events_emit_object_key", "kv_events_lora_name"),
            *("kv_events_model_name", "kv_events_queue_capacity", "kv_events_tenant_id"),
        ),
        _EVENTS,
    ),
    **dict.fromkeys(("cxl_path", "cxl_size"), _CXL),
    "cluster_id": _HA,
    "enable_disk_eviction": "a full tier always gives up its oldest objects",
    "enable_metadata_cleanup_on_timeout": "clients keep nothing in the HTTP metadata server",
    "enable_metric_reporting": "metrics are made when they are asked for",
    "max_kv_soft_pin_ttl": "a day, as upstream's default",
    "pod_name": "labels of pods are Kubernetes' matter",
    "pod_namespace": "labels of pods are Kubernetes' matter",
}
_WARNED = {
    "allocation_strategy": "this host first, while it has room, else the freer of two segments",
    "dynamic_replication_mode": _REPLICATION,
    "enable_cxl": _CXL,
    "enable_ha": _HA,
    "enable_kv_events": _EVENTS,
    "enable_oplog": _SNAPSHOT,
    "etcd_endpoints": _HA,
    "flagfile": _GFLAGS,
    "fromenv": _GFLAGS,
    "global_file_segment_size": _SHARED_FS,
    "ha_backend_connstring": _HA,
    "ha_backend_type": _HA,
    "kv_events_bind_endpoint": _EVENTS,
    "quota_bytes": _DISK,
    "root_fs_dir": _SHARED_FS,
    "tryfromenv": _GFLAGS,
}
FLAGS: Mapping[str, Flag] = dict(
    sorted(
        (name, Flag(kind, text))
        for kind, flags in ((Kind.ACTS, _ACTS), (Kind.IGNORED, _IGNORED), (Kind.WARNED, _WARNED))
        for name, text in flags.items()
    )
)
OFF = ("", "0", "false", "f", "no", "n", "off", "random")
"""Values that ask for nothing: no reason to warn."""


def asks_for_nothing(word: str) -> bool:
    """Return whether a flag that does nothing here is only switched off, as in `--enable_ha=false`."""
    name, equals, value = word.lstrip("-").partition("=")
    flag = FLAGS.get(name.replace("-", "_"))
    if flag is None:
        flag = FLAGS.get(name.replace("-", "_").removeprefix("no"))
        return flag is not None and flag.kind is not Kind.ACTS
    return flag.kind is not Kind.ACTS and bool(equals) and value.lower() in OFF


def warnings(names: Sequence[str]) -> list[str]:
    """Return what is to be said of flags, `--name` each, that no option took."""
    said = []
    for name in names:
        flag = FLAGS.get(name.lstrip("-").replace("-", "_"))
        if flag is None:
            said.append(f"{name}: no flag of upstream's either")
        elif flag.kind is Kind.WARNED:
            said.append(f"{name}: {flag.text}")
    return said


def table() -> str:
    """Return the table of docs/master.md."""
    rows = [f"| `--{name}` | {flag.kind} | {flag.text} |" for name, flag in FLAGS.items()]
    return "\n".join(["| flag | here | |", "|---|---|---|", *rows]) + "\n"
