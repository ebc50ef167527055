"""What `kubectl get` prints: a few columns for each kind. Pure."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

Object = dict[str, Any]
Column = tuple[str, Callable[[Object], Any]]


def at(one: Object, path: str, default: Any = "") -> Any:
    """Return the value at a dotted path."""
    found: Any = one
    for part in path.split("."):
        if not isinstance(found, dict) or part not in found:
            return default
        found = found[part]
    return found


def _of(path: str, default: Any = 0) -> Callable[[Object], Any]:
    return lambda one: at(one, path, default)


def _ready_of(ready: str, wanted: str) -> Callable[[Object], str]:
    return lambda one: f"{at(one, ready, 0)}/{at(one, wanted, 0)}"


def _containers(one: Object) -> list[Object]:
    found: list[Object] = at(one, "status.containerStatuses", [])
    return found


def _pod_ready(one: Object) -> str:
    ready = sum(bool(container["ready"]) for container in _containers(one))
    return f"{ready}/{len(one['spec']['containers'])}"


def _pod_status(one: Object) -> str:
    if "deletionTimestamp" in one["metadata"]:
        return "Terminating"
    for container in [*at(one, "status.initContainerStatuses", []), *_containers(one)]:
        if reason := at(container, "state.waiting.reason"):
            return str(reason)
    return str(at(one, "status.phase", "Pending"))


def _restarts(one: Object) -> int:
    return sum(container["restartCount"] for container in _containers(one))


def _ports(one: Object) -> str:
    return ",".join(f"{port['port']}/{port.get('protocol', 'TCP')}" for port in one["spec"].get("ports", []))


def _selector(one: Object) -> str:
    return ",".join(f"{key}={value}" for key, value in at(one, "spec.selector", {}).items())


COLUMNS: dict[str, list[Column]] = {
    "pods": [
        ("Ready", _pod_ready), ("Status", _pod_status), ("Restarts", _restarts),
        ("IP", _of("status.podIP", "")), ("Node", _of("spec.nodeName", "")),
    ],
    "deployments": [
        ("Ready", _ready_of("status.readyReplicas", "spec.replicas")),
        ("Up-to-date", _of("status.updatedReplicas")), ("Available", _of("status.availableReplicas")),
    ],
    "replicasets": [
        ("Desired", _of("spec.replicas")), ("Current", _of("status.replicas")),
        ("Ready", _of("status.readyReplicas")),
    ],
    "statefulsets": [("Ready", _ready_of("status.readyReplicas", "spec.replicas"))],
    "daemonsets": [
        ("Desired", _of("status.desiredNumberScheduled")), ("Current", _of("status.currentNumberScheduled")),
        ("Ready", _of("status.numberReady")), ("Up-to-date", _of("status.updatedNumberScheduled")),
    ],
    "services": [
        ("Type", _of("spec.type", "ClusterIP")), ("Cluster-IP", _of("spec.clusterIP", "")),
        ("Port(s)", _ports), ("Selector", _selector),
    ],
    "nodes": [("Unschedulable", _of("spec.unschedulable", False))],
    "events": [
        ("Reason", _of("reason", "")), ("Object", _of("involvedObject.name", "")),
        ("Message", _of("message", "")),
    ],
    "poddisruptionbudgets": [
        ("Min available", _of("spec.minAvailable", "N/A")),
        ("Max unavailable", _of("spec.maxUnavailable", "N/A")),
        ("Allowed disruptions", _of("status.disruptionsAllowed")),
    ],
}  # fmt: skip


def table(plural: str, found: list[Object], now_s: float, revision: str) -> Object:
    """Return objects as the rows that kubectl prints."""
    columns: list[Column] = [("Name", _of("metadata.name")), *COLUMNS.get(plural, [])]
    definitions = [
        {"name": name, "type": "string", "format": "", "description": "", "priority": 0}
        for name, _ in [*columns, ("Age", None)]
    ]  # fmt: skip
    rows = [
        {
            "cells": [*(cell(one) for _, cell in columns), _age(one, now_s)],
            "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": one["metadata"],
            },
        }
        for one in found
    ]  # fmt: skip
    return {
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": revision},
        "columnDefinitions": definitions, "rows": rows,
    }  # fmt: skip


def _age(one: Object, now_s: float) -> str:
    born = datetime.strptime(one["metadata"]["creationTimestamp"], "%Y-%m-%dT%H:%M:%S%z")
    age_s = int(now_s - born.timestamp())
    return f"{age_s}s" if age_s < 600 else f"{age_s // 60}m"
