"""Which pods stand behind a Service, and what names resolve to. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.kube.standin.disruption import is_ready
from tests.kube.standin.tables import at

Object = dict[str, Any]
DOMAIN = "cluster.local"


@dataclass(frozen=True)
class Port:
    """One port of a Service and where it leads."""

    name: str
    port: int
    backends: tuple[tuple[str, int], ...]
    """(address, port) of the pods that take new connections."""


def members(service: Object, pods: Sequence[Object]) -> list[Object]:
    """Return the pods that a Service selects and that take new connections: ready, and not ending."""
    selector = service["spec"].get("selector")
    if not selector:
        return []
    found = []
    for pod in pods:
        meta, labels = pod["metadata"], pod["metadata"].get("labels", {})
        if meta.get("namespace") != service["metadata"].get("namespace") or not at(pod, "status.podIP"):
            continue
        if any(labels.get(key) != value for key, value in selector.items()):
            continue
        early = service["spec"].get("publishNotReadyAddresses", False)
        if early or (is_ready(pod) and "deletionTimestamp" not in meta):
            found.append(pod)
    return found


def target_port(port: Object, pod: Object) -> int | None:
    """Return the number of a Service's target port in a pod; None: the pod has no port of that name."""
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for one in container.get("ports", []):
            if one.get("name") == target:
                return int(one["containerPort"])
    return None


def ports(service: Object, pods: Sequence[Object]) -> list[Port]:
    """Return where each TCP port of a Service leads now."""
    chosen = members(service, pods)
    found = []
    for port in service["spec"].get("ports", []):
        if port.get("protocol", "TCP") == "TCP":
            numbers = [(pod["status"]["podIP"], target_port(port, pod)) for pod in chosen]
            backends = tuple((ip, number) for ip, number in numbers if number is not None)
            found.append(Port(port.get("name", ""), port["port"], backends))
    return found


def slice_of(service: Object, pods: Sequence[Object]) -> Object:
    """Return the EndpointSlice of a Service."""
    meta = service["metadata"]
    chosen = members(service, pods)
    first = service["spec"].get("ports", [])
    numbers = [(port, target_port(port, chosen[0]) if chosen else None) for port in first]
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": meta["name"], "namespace": meta["namespace"],
            "labels": {"kubernetes.io/service-name": meta["name"]},
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Service", "name": meta["name"], "uid": meta["uid"],
                "controller": True,
            }],
        },
        "endpoints": [
            {
                "addresses": [pod["status"]["podIP"]],
                "conditions": {"ready": is_ready(pod)},
                "nodeName": pod["spec"]["nodeName"],
                "targetRef": {"kind": "Pod", "name": pod["metadata"]["name"], "namespace": meta["namespace"]},
            }
            for pod in chosen
        ],
        "ports": [
            {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP")}
            for port, number in numbers if number is not None
        ],
    }  # fmt: skip


def hosts(services: Sequence[Object], pods: Sequence[Object]) -> dict[str, list[str]]:
    """Return namespace -> lines that all of its pods have in their hosts files: Services, as a DNS does."""
    lines: dict[str, list[str]] = {}
    spaces = {one["metadata"]["namespace"] for one in [*services, *pods]}
    for space in sorted(spaces):
        rows = ["127.0.0.1 localhost"]
        for service in services:
            meta = service["metadata"]
            rows += _lines(service, pods, space == meta["namespace"])
        lines[space] = rows
    return lines


def own_host(ip: str, hostname: str) -> str:
    """Return the line of a hosts file that a pod alone has: its own name, which no DNS knows."""
    return f"{ip} {hostname}"


def _lines(service: Object, pods: Sequence[Object], same_space: bool) -> list[str]:
    meta = service["metadata"]
    address = service["spec"].get("clusterIP", "None")
    if address != "None":
        return [f"{address} {_names(meta['name'], meta['namespace'], same_space)}"]
    rows = []
    for pod in members(service, pods):
        names = _names(meta["name"], meta["namespace"], same_space)
        if pod["spec"].get("subdomain") == meta["name"]:
            host = f"{pod['spec'].get('hostname', pod['metadata']['name'])}.{meta['name']}"
            names = f"{_names(host, meta['namespace'], same_space)} {names}"
        rows.append(f"{pod['status']['podIP']} {names}")
    return rows


def _names(name: str, space: str, same_space: bool) -> str:
    long = f"{name}.{space} {name}.{space}.svc {name}.{space}.svc.{DOMAIN}"
    return f"{name} {long}" if same_space else long
