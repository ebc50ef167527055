"""Instances and store nodes as people and tools read them, JSON-ready."""

from typing import Any

from conductor.cluster import ClusterView
from conductor.members import Members


def described(view: ClusterView, members: Members) -> list[dict[str, Any]]:
    """Return the instances, with what is charged to each."""
    return [
        {
            "instance_id": record.instance_id,
            "role": record.role,
            "state": str(health),
            "node": record.node,
            "epoch": record.epoch,
            "pid": record.pid,
            "model": record.model,
            "engine": members.engine_slot(record.instance_id),  # label of its vllm:* metrics
            "metrics_url": record.metrics_url,
            "load": {
                "prefill_requests": load.prefill_requests,
                "prefill_tokens": load.prefill_tokens,
                "decode_requests": load.decode_requests,
                "decode_kv_tokens": load.decode_kv_tokens,
            },
        }
        for record, health, load in view.instances()
    ]


def described_stores(view: ClusterView) -> list[dict[str, Any]]:
    """Return the store nodes."""
    return [
        {
            "node": record.node,
            "capacity_bytes": record.capacity_bytes,
            "pid": record.pid,
            "metrics_url": record.metrics_url,
        }
        for record in view.stores()
    ]
