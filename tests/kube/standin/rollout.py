"""What Deployments, ReplicaSets, StatefulSets and DaemonSets do next. Pure: counts and pods in, steps out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.kube.standin.disruption import amount, is_ready
from tests.kube.standin.tables import at

Object = dict[str, Any]
HASH_LABEL = "pod-template-hash"
REVISION_LABEL = "controller-revision-hash"


def template_hash(template: Object) -> str:
    """Return a name for a pod template: equal templates, equal names."""
    text = json.dumps(template, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:10]


def is_available(pod: Object, min_ready_s: float, now_s: float) -> bool:
    """Return whether a pod has been ready for so long."""
    if not is_ready(pod):
        return False
    since = next(one["lastTransitionTime"] for one in pod["status"]["conditions"] if one["type"] == "Ready")
    return min_ready_s == 0 or seconds(since) + min_ready_s <= now_s


def seconds(text: str) -> float:
    """Return a time of an object as seconds since the epoch."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def is_active(pod: Object) -> bool:
    """Return whether a pod counts as a replica: neither ending nor ended."""
    return "deletionTimestamp" not in pod["metadata"] and at(pod, "status.phase") not in (
        "Succeeded",
        "Failed",
    )


# ---------------------------------------------------------------- Deployment


@dataclass(frozen=True)
class Replicas:
    """One ReplicaSet of a Deployment."""

    name: str
    wanted: int
    """spec.replicas"""
    available: int


def bounds(spec: Object, wanted: int) -> tuple[int, int]:
    """Return maxSurge and maxUnavailable of a rolling update, in pods."""
    rolling = at(spec, "strategy.rollingUpdate", {})
    surge = amount(rolling.get("maxSurge", "25%"), wanted, up=True)
    unavailable = amount(rolling.get("maxUnavailable", "25%"), wanted, up=False)
    return surge, unavailable if surge or unavailable else 1


def rolling_step(
    wanted: int, surge: int, unavailable: int, new: Replicas, old: Sequence[Replicas]
) -> dict[str, int]:
    """Return ReplicaSet -> replicas to set now; {} = nothing, or nothing yet. `old`: oldest first."""
    total = new.wanted + sum(one.wanted for one in old)
    if new.wanted > wanted:
        return {new.name: wanted}
    if new.wanted < wanted and (room := wanted + surge - total) > 0:
        return {new.name: min(wanted, new.wanted + room)}
    needed = wanted - unavailable
    spare = total - needed - (new.wanted - new.available)
    steps: dict[str, int] = {}
    for one in old:  # first those that serve nobody
        take = min(max(0, one.wanted - one.available), max(0, spare))
        if take:
            steps[one.name] = one.wanted - take
            spare -= take
    can = new.available + sum(one.available for one in old) - needed
    for one in old:
        left = steps.get(one.name, one.wanted)
        take = min(left, max(0, can), max(0, spare))
        if take:
            steps[one.name] = left - take
            can -= take
            spare -= take
    return steps


def recreate_step(wanted: int, new: Replicas, old: Sequence[Replicas], old_pods: int) -> dict[str, int]:
    """Return as rolling_step: all old ones first, their pods ended, before a new one."""
    if down := {one.name: 0 for one in old if one.wanted}:
        return down
    return {} if old_pods or new.wanted == wanted else {new.name: wanted}


def surplus(pods: Sequence[Object], count: int) -> list[Object]:
    """Return `count` pods to delete: the unready first, then the youngest."""
    order = sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True)
    return sorted(order, key=lambda pod: (bool(at(pod, "spec.nodeName")), is_ready(pod)))[:count]


# ---------------------------------------------------------------- StatefulSet, DaemonSet


@dataclass(frozen=True)
class Steps:
    """What to do now."""

    create: tuple[str, ...] = ()
    """Names of pods, or of nodes."""
    delete: tuple[str, ...] = ()
    """Names of pods."""


def stateful_step(names: Sequence[str], pods: Sequence[Object], revision: str, parallel: bool) -> Steps:
    """Return the next step of a StatefulSet whose pods should be `names`, in order."""
    found = {pod["metadata"]["name"]: pod for pod in pods}
    if extra := [name for name in found if name not in names]:
        alive = [name for name in extra if is_active(found[name])]
        last = sorted(alive, key=lambda name: int(name.rpartition("-")[2]))[-1:]
        return Steps(delete=tuple(alive if parallel else last))
    create: list[str] = []
    for name in names:
        if name not in found:
            create.append(name)
        if not parallel and (name not in found or not is_ready(found[name])):
            return Steps(create=tuple(create))
    if create or not all(is_ready(pod) and is_active(pod) for pod in found.values()):
        return Steps(create=tuple(create))
    old = [
        name for name in reversed(names) if found[name]["metadata"]["labels"].get(REVISION_LABEL) != revision
    ]
    return Steps(delete=tuple(old[:1]))


def daemon_step(
    nodes: Sequence[str], pods: Sequence[Object], revision: str, surge: int, unavailable: int, ready: set[str]
) -> Steps:
    """Return the next steps of a DaemonSet: one pod for each of `nodes`; `ready`: names of available pods."""
    create: list[str] = []
    delete: list[str] = []
    waiting = 0
    stale: list[Object] = []
    for node in nodes:
        here = [pod for pod in pods if at(pod, "spec.nodeName") == node]
        new = [p for p in here if is_active(p) and p["metadata"]["labels"].get(REVISION_LABEL) == revision]
        old = [pod for pod in here if is_active(pod) and pod not in new]
        if not new and not old:
            waiting += 1
            if not here or surge:  # else its predecessor on this node ends first
                create.append(node)
        elif new and old:
            if any(pod["metadata"]["name"] in ready for pod in new):
                delete += [pod["metadata"]["name"] for pod in old]
            else:
                waiting += 1
        elif old:
            stale += old
            waiting += not any(pod["metadata"]["name"] in ready for pod in old)
        else:
            waiting += not any(pod["metadata"]["name"] in ready for pod in new)
    delete += [p["metadata"]["name"] for p in pods if is_active(p) and at(p, "spec.nodeName") not in nodes]
    room = (surge or unavailable) - waiting
    for pod in sorted(stale, key=lambda pod: pod["metadata"]["name"] in ready):  # what serves nobody first
        serves = pod["metadata"]["name"] in ready
        if serves and room <= 0:
            break
        room -= serves
        if surge:
            create.append(pod["spec"]["nodeName"])
        else:
            delete.append(pod["metadata"]["name"])
    return Steps(create=tuple(create), delete=tuple(delete))
