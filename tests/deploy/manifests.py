"""The overlays as `kubectl kustomize` renders them, and short ways to their parts."""

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("dev-cpu", "etcd", "gpu", "lws", "prod", "rdma")
CLUSTERS = ("dev-cpu", "gpu", "lws", "prod", "rdma")
"""Those with all of our processes."""
NO_POOL = ("gpu", "lws")
"""Those without stores."""
WORKLOADS = ("Deployment", "DaemonSet", "StatefulSet")
GROUPS = "LeaderWorkerSet"
LWS = "leaderworkerset.sigs.k8s.io"
COMPONENT = "app.kubernetes.io/component"
RENDER_S_MAX = 60

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")

Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> str:
    """Return what would be applied; nothing without kubectl (tests are collected there, and skip)."""
    if shutil.which("kubectl") is None:
        return ""
    command = ["kubectl", "kustomize", str(DEPLOY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RENDER_S_MAX, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return done.stdout


@functools.cache
def objects(overlay: str) -> tuple[Object, ...]:
    """Return its objects."""
    return tuple(yaml.load_all(rendered(overlay), yaml.CSafeLoader))


def of_kind(overlay: str, *kinds: str) -> list[Object]:
    """Return its objects of some kinds."""
    return [one for one in objects(overlay) if one["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Object:
    """Return one object."""
    (found,) = (one for one in of_kind(overlay, kind) if one["metadata"]["name"] == name)
    return found


def names(overlay: str, kind: str) -> set[str]:
    """Return the names of its objects of a kind."""
    return {one["metadata"]["name"] for one in of_kind(overlay, kind)}


def workloads(overlay: str) -> list[Object]:
    """Return what has pods; of a LeaderWorkerSet leaders and workers, as if each were a workload."""
    halves = [half for one in of_kind(overlay, GROUPS) for half in (leaders(one), followers(one))]
    return of_kind(overlay, *WORKLOADS) + halves


def leaders(groups: Object, group: int = 0) -> Object:
    """Return the leaders of a LeaderWorkerSet, with what its operator adds to those of one group."""
    return _half(groups, "leader", group, 0)


def followers(groups: Object, group: int = 0) -> Object:
    """Return the workers of a LeaderWorkerSet, with what its operator adds to the first of one group."""
    return _half(groups, "worker", group, 1)


def _half(groups: Object, role: str, group: int, rank: int) -> Object:
    name, parts = groups["metadata"]["name"], groups["spec"]["leaderWorkerTemplate"]
    template = copy.deepcopy(parts[f"{role}Template"])
    labels = {f"{LWS}/name": name, f"{LWS}/worker-index": str(rank)}
    template["metadata"]["labels"] |= {**labels, f"{LWS}/group-index": str(group)}
    told = {
        "LWS_LEADER_ADDRESS": f"{name}-{group}.{name}.{groups['metadata']['namespace']}",
        "LWS_GROUP_SIZE": str(parts["size"]),
        "LWS_WORKER_INDEX": str(rank),
    }
    for container in template["spec"]["containers"]:
        container["env"] = [*container["env"], *({"name": key, "value": told[key]} for key in told)]
    return {
        "kind": GROUPS,
        "metadata": {"name": f"{name}-{role}", "namespace": groups["metadata"]["namespace"]},
        "spec": {
            "replicas": groups["spec"]["replicas"], "selector": {"matchLabels": labels}, "template": template,
        },
    }  # fmt: skip


def pod(workload: Object) -> Object:
    """Return the specification of its pods."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def pod_labels(workload: Object) -> dict[str, str]:
    """Return the labels of its pods."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def main_container(workload: Object) -> Object:
    """Return the one container that is no init container."""
    (container,) = pod(workload)["containers"]
    found: Object = container
    return found


def containers(workload: Object) -> Iterator[Object]:
    """Yield all of them."""
    yield from pod(workload).get("initContainers", [])
    yield from pod(workload)["containers"]


def is_ours(workload: Object) -> bool:
    """Return whether it runs a process of ours (etcd's is not)."""
    return bool(main_container(workload)["command"][0] == "mooncake")


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Return whether a label selector matches; {} = all."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions", []):
        assert term["operator"] == "In", term
        if labels.get(term["key"]) not in term["values"]:
            return False
    return True


def environment(container: Object) -> dict[str, Any]:
    """Return its variables: values as they are, references as {}."""
    return {one["name"]: one.get("value", {}) for one in container.get("env", [])}


def resolved(overlay: str, container: Object, facts: dict[str, str]) -> dict[str, str]:
    """Return its variables with `facts` by fieldPath, and ConfigMaps of the overlay."""
    found = {}
    for one in container.get("env", []):
        source = one.get("valueFrom", {})
        if "value" in one:
            found[one["name"]] = one["value"]
        elif "fieldRef" in source:
            found[one["name"]] = facts[source["fieldRef"]["fieldPath"]]
        else:
            ref = source["configMapKeyRef"]
            found[one["name"]] = named(overlay, "ConfigMap", ref["name"])["data"][ref["key"]]
    return found


def expanded(text: str, variables: dict[str, str]) -> str:
    """Return `text` with $(NAME) replaced, as Kubernetes does in commands."""
    for name, value in variables.items():
        text = text.replace(f"$({name})", value)
    return text
