"""Controllers and scheduler: look at all objects, take the next steps (rollout.py), write statuses."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tests.kube.standin import endpoints
from tests.kube.standin.disruption import budget_status, is_ready
from tests.kube.standin.rollout import (
    HASH_LABEL,
    REVISION_LABEL,
    Replicas,
    Steps,
    bounds,
    daemon_step,
    is_active,
    is_available,
    recreate_step,
    rolling_step,
    seconds,
    stateful_step,
    surplus,
    template_hash,
)
from tests.kube.standin.selectors import by_labels
from tests.kube.standin.store import Object, ObjectStore
from tests.kube.standin.tables import at

TICK_S = 0.5
"""For what time alone brings on: minReadySeconds."""
NAMESPACE_S = 8.0
"""Until what is in a namespace follows it, so that `kubectl delete -k` meets the objects that it names."""
ROUNDS_MAX = 50
"""Of steps that follow from steps (Deployment, ReplicaSet, pod, node): a handful."""
OLD_SETS_MAX = 3
REVISION = "deployment.kubernetes.io/revision"
SERVICE_NETWORK = "10.96"


class Controllers:
    """All of them; everything is looked at again after every change: there are tens of objects."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._addresses = itertools.count(10)

    async def run(self) -> None:
        """Act upon every change, until cancelled."""
        watch = self._store.watch()
        try:
            while True:
                self.settle()
                while not watch.queue.empty():
                    watch.queue.get_nowait()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await watch.queue.get()
        finally:
            self._store.unwatch(watch)

    def settle(self) -> None:
        """Act until nothing changes."""
        for _ in range(ROUNDS_MAX):
            before = self._store.revision
            self._once()
            if self._store.revision == before:
                return

    def _once(self) -> None:
        store = self._store
        self._collect_garbage()
        for one in store.all("deployments"):
            self._deployment(one)
        for one in store.all("replicasets"):
            self._replica_set(one)
        for one in store.all("statefulsets"):
            self._stateful_set(one)
        for one in store.all("daemonsets"):
            self._daemon_set(one)
        for one in store.all("pods"):
            self._schedule(one)
        for one in store.all("services"):
            self._service(one)
        for one in store.all("poddisruptionbudgets"):
            pods = store.all("pods", one["metadata"]["namespace"])
            status = {"observedGeneration": one["metadata"]["generation"], **budget_status(one, pods)}
            store.set_status("poddisruptionbudgets", one, {"conditions": [], **status})

    # ------------------------------------------------------------ what goes with its owner

    def _collect_garbage(self) -> None:
        everything = self._store.everything()
        going = {
            one["metadata"]["uid"]: "foregroundDeletion" in one["metadata"].get("finalizers", [])
            for _, one in everything
        }
        owners = set(itertools.chain.from_iterable(_owners(one) for _, one in everything))
        spaces = {one["metadata"].get("namespace") for _, one in everything}
        for plural, one in everything:
            meta = one["metadata"]
            mine = list(_owners(one))
            orphan = bool(mine) and all(going.get(uid, True) for uid in mine)  # gone, or waits for us
            space = self._store.find("namespaces", "", meta.get("namespace", ""))
            ending = space is not None and self._is_emptied(space)
            if (orphan or ending) and "deletionTimestamp" not in meta:
                self._store.delete(plural, meta.get("namespace", ""), meta["name"])
            elif going[meta["uid"]] and meta["uid"] not in owners:
                self._release(plural, one, "foregroundDeletion")
            elif plural == "namespaces" and "deletionTimestamp" in meta and meta["name"] not in spaces:
                self._release(plural, one, "kubernetes")

    def _is_emptied(self, space: Object) -> bool:
        since = space["metadata"].get("deletionTimestamp")
        return since is not None and seconds(since) + NAMESPACE_S <= self._store.clock()

    def _release(self, plural: str, one: Object, finalizer: str) -> None:
        left = [name for name in one["metadata"].get("finalizers", []) if name != finalizer]
        self._store.modify(plural, one, lambda new: new["metadata"].update(finalizers=left))

    def _owned(self, plural: str, owner: Object) -> list[Object]:
        uid = owner["metadata"]["uid"]
        return [one for one in self._store.all(plural, owner["metadata"]["namespace"]) if uid in _owners(one)]

    # ------------------------------------------------------------ Deployment and ReplicaSet

    def _deployment(self, one: Object) -> None:
        if "deletionTimestamp" in one["metadata"]:
            return
        wanted = one["spec"]["replicas"]
        sets = sorted(self._owned("replicasets", one), key=_revision)
        name = template_hash(one["spec"]["template"])
        current = next((s for s in sets if s["metadata"]["labels"].get(HASH_LABEL) == name), None)
        revision = max(map(_revision, sets), default=0)
        if current is None:
            self._new_set(one, name, revision + 1)
            return
        if _revision(current) < revision:  # a roll back: it is the newest again
            note = {REVISION: str(revision + 1)}
            self._store.modify(
                "replicasets", current, lambda new: new["metadata"]["annotations"].update(note)
            )
            return
        old = [found for found in sets if found is not current]
        view = [
            Replicas(s["metadata"]["name"], s["spec"]["replicas"], at(s, "status.availableReplicas", 0))
            for s in [current, *old]
        ]
        if at(one, "spec.strategy.type") == "Recreate":
            left = sum(len(self._owned("pods", found)) for found in old)
            steps = recreate_step(wanted, view[0], view[1:], left)
        else:
            steps = rolling_step(wanted, *bounds(one["spec"], wanted), view[0], view[1:])
        for found in sets:
            if found["metadata"]["name"] in steps:
                size = {"replicas": steps[found["metadata"]["name"]]}
                self._store.modify("replicasets", found, _update_spec(size))
        empty = [
            found for found in old if not found["spec"]["replicas"] and not at(found, "status.replicas", 0)
        ]
        for found in empty[:-OLD_SETS_MAX]:
            self._store.delete("replicasets", found["metadata"]["namespace"], found["metadata"]["name"])
        self._deployment_status(one, current, [current, *old])

    def _new_set(self, one: Object, name: str, revision: int) -> None:
        template = _labelled(one["spec"]["template"], {HASH_LABEL: name})
        selector = one["spec"]["selector"]
        labels = {**selector.get("matchLabels", {}), HASH_LABEL: name}
        self._store.create("replicasets", {
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {
                "name": f"{one['metadata']['name']}-{name}", "namespace": one["metadata"]["namespace"],
                "labels": template["metadata"]["labels"], "annotations": {REVISION: str(revision)},
                "ownerReferences": [_reference(one)],
            },
            "spec": {
                "replicas": 0, "selector": {**selector, "matchLabels": labels}, "template": template,
                "minReadySeconds": one["spec"].get("minReadySeconds", 0),
            },
        })  # fmt: skip
        note = {REVISION: str(revision)}
        self._store.modify(
            "deployments", one, lambda new: new["metadata"].setdefault("annotations", {}).update(note)
        )

    def _deployment_status(self, one: Object, current: Object, sets: list[Object]) -> None:
        def total(key: str) -> int:
            return sum(at(found, f"status.{key}", 0) for found in sets)

        wanted, replicas, available = one["spec"]["replicas"], total("replicas"), total("availableReplicas")
        updated = at(current, "status.replicas", 0)
        _, unavailable = bounds(one["spec"], wanted)
        done = updated == replicas == available == wanted
        reason = "NewReplicaSetAvailable" if done else "ReplicaSetUpdated"
        self._store.set_status("deployments", one, {
            "observedGeneration": one["metadata"]["generation"], "replicas": replicas,
            "updatedReplicas": updated, "readyReplicas": total("readyReplicas"),
            "availableReplicas": available, "unavailableReplicas": max(0, wanted - available),
            "conditions": [
                {
                    "type": "Available", "status": str(available >= wanted - unavailable),
                    "reason": "MinimumReplicas",
                },
                {"type": "Progressing", "status": "True", "reason": reason},
            ],
        })  # fmt: skip

    def _replica_set(self, one: Object) -> None:
        if "deletionTimestamp" in one["metadata"]:
            return
        pods = [pod for pod in self._owned("pods", one) if is_active(pod)]
        missing = one["spec"]["replicas"] - len(pods)
        for _ in range(missing):
            self._new_pod(one, f"{one['metadata']['name']}-{uuid.uuid4().hex[:5]}", one["spec"]["template"])
        for pod in surplus(pods, -missing) if missing < 0 else []:
            self._store.delete("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        self._store.set_status("replicasets", one, {
            "observedGeneration": one["metadata"]["generation"], **self._counts(one, pods),
        })  # fmt: skip

    def _counts(self, one: Object, pods: list[Object]) -> dict[str, int]:
        return {
            "replicas": len(pods), "readyReplicas": sum(map(is_ready, pods)),
            "availableReplicas": len(self._available(one, pods)),
        }  # fmt: skip

    def _available(self, one: Object, pods: list[Object]) -> set[str]:
        least_s, now_s = one["spec"].get("minReadySeconds", 0), self._store.clock()
        return {pod["metadata"]["name"] for pod in pods if is_available(pod, least_s, now_s)}

    def _new_pod(self, owner: Object, name: str, template: Object, **spec: Any) -> None:
        meta = owner["metadata"]
        inner = {"restartPolicy": "Always", "terminationGracePeriodSeconds": 30, **template["spec"], **spec}
        self._store.create("pods", {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": meta["namespace"], "ownerReferences": [_reference(owner)],
                "labels": at(template, "metadata.labels", {}),
                "annotations": at(template, "metadata.annotations", {}),
            },
            "spec": inner, "status": {"phase": "Pending"},
        })  # fmt: skip

    # ------------------------------------------------------------ StatefulSet and DaemonSet

    def _stateful_set(self, one: Object) -> None:
        if "deletionTimestamp" in one["metadata"]:
            return
        base, wanted, spec = one["metadata"]["name"], one["spec"]["replicas"], one["spec"]
        revision = template_hash(spec["template"])
        pods = self._owned("pods", one)
        names = [f"{base}-{number}" for number in range(wanted)]
        parallel = spec.get("podManagementPolicy") == "Parallel"
        self._take(one, stateful_step(names, pods, revision, parallel), revision)
        new = [pod for pod in pods if pod["metadata"]["labels"].get(REVISION_LABEL) == revision]
        done = len(new) == len(pods) == wanted and all(map(is_ready, pods))
        before = at(one, "status.currentRevision", revision)
        self._store.set_status("statefulsets", one, {
            "observedGeneration": one["metadata"]["generation"], **self._counts(one, pods),
            "updatedReplicas": len(new), "currentReplicas": len(pods) - len(new) if not done else len(new),
            "updateRevision": revision, "currentRevision": revision if done else before,
        })  # fmt: skip

    def _daemon_set(self, one: Object) -> None:
        if "deletionTimestamp" in one["metadata"]:
            return
        spec, pods = one["spec"], self._owned("pods", one)
        nodes = [
            node["metadata"]["name"]
            for node in self._store.all("nodes")
            if _fits(spec["template"]["spec"], node)
        ]
        revision = template_hash(spec["template"])
        rolling = {"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}}
        rolling["strategy"]["rollingUpdate"] |= at(spec, "updateStrategy.rollingUpdate", {})
        surge, unavailable = bounds(rolling, len(nodes))
        ready = self._available(one, [pod for pod in pods if is_active(pod)])
        self._take(one, daemon_step(nodes, pods, revision, surge, unavailable, ready), revision)
        new = [pod for pod in pods if pod["metadata"]["labels"].get(REVISION_LABEL) == revision]
        self._store.set_status("daemonsets", one, {
            "observedGeneration": one["metadata"]["generation"], "desiredNumberScheduled": len(nodes),
            "currentNumberScheduled": len(pods), "updatedNumberScheduled": len(new), "numberMisscheduled": 0,
            "numberReady": sum(map(is_ready, pods)), "numberAvailable": len(ready),
            "numberUnavailable": max(0, len(nodes) - len(ready)),
        })  # fmt: skip

    def _take(self, one: Object, steps: Steps, revision: str) -> None:
        base, space = one["metadata"]["name"], one["metadata"]["namespace"]
        template = _labelled(one["spec"]["template"], {REVISION_LABEL: revision})
        for name in steps.create:
            if one["kind"] == "DaemonSet":
                self._new_pod(one, f"{base}-{uuid.uuid4().hex[:5]}", template, nodeName=name)
            else:
                self._new_pod(one, name, self._with_claims(one, name, template), hostname=name,
                              subdomain=one["spec"].get("serviceName", ""))  # fmt: skip
        for name in steps.delete:
            self._store.delete("pods", space, name)

    def _with_claims(self, one: Object, pod: str, template: Object) -> Object:
        """Give a pod its own of each claimed volume; the claims stay when it goes."""
        volumes = list(template["spec"].get("volumes", []))
        for claim in one["spec"].get("volumeClaimTemplates", []):
            name, space = f"{claim['metadata']['name']}-{pod}", one["metadata"]["namespace"]
            if self._store.find("persistentvolumeclaims", space, name) is None:
                meta = {**claim["metadata"], "name": name, "namespace": space}
                wanted = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim, "metadata": meta}
                self._store.create("persistentvolumeclaims", {**wanted, "status": {"phase": "Bound"}})
            source = {"persistentVolumeClaim": {"claimName": name}}
            volumes.append({"name": claim["metadata"]["name"], **source})
        return {**template, "spec": {**template["spec"], "volumes": volumes}} if volumes else template

    # ------------------------------------------------------------ where pods run, how they are reached

    def _schedule(self, pod: Object) -> None:
        """Give a pod the node with the fewest of its kind, then the fewest of all."""
        if pod["spec"].get("nodeName") or "deletionTimestamp" in pod["metadata"]:
            return
        nodes = [one for one in self._store.all("nodes") if _fits(pod["spec"], one)]
        nodes = [one for one in nodes if not one["spec"].get("unschedulable")]
        if not nodes:
            return
        others = [one for one in self._store.all("pods") if is_active(one)]

        def load(node: Object) -> tuple[int, int, str]:
            name = node["metadata"]["name"]
            here = [one for one in others if one["spec"].get("nodeName") == name]
            kin = [one for one in here if _kin(one) == _kin(pod)]
            return len(kin), len(here), name

        chosen = min(map(load, nodes))[2]
        self._store.modify("pods", pod, lambda new: new["spec"].update(nodeName=chosen))

    def _service(self, one: Object) -> None:
        if not one["spec"].get("clusterIP"):
            address = f"{SERVICE_NETWORK}.0.{next(self._addresses)}"
            self._store.modify("services", one, lambda new: new["spec"].update(clusterIP=address))
            return
        wanted = endpoints.slice_of(one, self._store.all("pods"))
        meta = wanted["metadata"]
        found = self._store.find("endpointslices", meta["namespace"], meta["name"])
        if found is None:
            self._store.create("endpointslices", wanted)
        else:
            keep = {"endpoints": wanted["endpoints"], "ports": wanted["ports"]}
            self._store.modify("endpointslices", found, lambda new: new.update(keep))


def _update_spec(values: Object) -> Callable[[Object], None]:
    def change(new: Object) -> None:
        new["spec"].update(values)

    return change


def _owners(one: Object) -> Iterator[str]:
    return (owner["uid"] for owner in one["metadata"].get("ownerReferences", []))


def _reference(owner: Object) -> Object:
    meta = owner["metadata"]
    return {
        "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": meta["name"], "uid": meta["uid"],
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def _revision(found: Object) -> int:
    return int(found["metadata"].get("annotations", {}).get(REVISION, 0))


def _labelled(template: Object, labels: dict[str, str]) -> Object:
    meta = template.get("metadata", {})
    return {**template, "metadata": {**meta, "labels": {**meta.get("labels", {}), **labels}}}


def _fits(spec: Object, node: Object) -> bool:
    return by_labels({"matchLabels": spec.get("nodeSelector", {})}, node["metadata"].get("labels", {}))


def _kin(pod: Object) -> str:
    owners = pod["metadata"].get("ownerReferences") or [{"name": pod["metadata"]["name"]}]
    return (
        str(owners[0]["name"]).rpartition("-")[0]
        if owners[0].get("kind") == "ReplicaSet"
        else owners[0]["name"]
    )
