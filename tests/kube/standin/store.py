"""The objects: resourceVersion, generation, what was changed when. In memory, one event loop.

An object that is stored is never changed in place: whoever reads one may keep it, and must not write to it.
"""

import asyncio
import copy
import uuid
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.kube.standin.resources import RESOURCES
from tests.kube.standin.status import missing, refused

HISTORY_MAX = 10_000
"""Changes that a watch can start from; a test makes some thousands."""
QUEUE_MAX = 20_000
"""Of one watch; above it the watch is ended and its client lists anew."""
GRACE_S = 30
"""Kubernetes' default between SIGTERM and SIGKILL."""

Object = dict[str, Any]
Change = tuple[int, str, str, Object]  # revision, ADDED | MODIFIED | DELETED, plural, object


def utc(now_s: float) -> str:
    """Return a time as objects carry it."""
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Watch:
    """Changes as they happen."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Change | None] = asyncio.Queue(QUEUE_MAX)
        """None: too slow, the end."""

    def tell(self, change: Change) -> None:
        """Take a change."""
        if self.queue.full():
            self.queue.get_nowait()
            self.queue.put_nowait(None)
        else:
            self.queue.put_nowait(change)


class ObjectStore:
    """All objects of the cluster."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds since the epoch."""
        self.clock = clock
        self.revision = 1
        self._objects: dict[str, dict[tuple[str, str], Object]] = {plural: {} for plural in RESOURCES}
        self._history: deque[Change] = deque(maxlen=HISTORY_MAX)
        self._watches: list[Watch] = []

    # ------------------------------------------------------------ reading

    def find(self, plural: str, namespace: str, name: str) -> Object | None:
        """Return one object, None if there is none."""
        return self._objects[plural].get((namespace, name))

    def get(self, plural: str, namespace: str, name: str) -> Object:
        """Return one object.

        Raises:
            HTTPNotFound: there is none.
        """
        found = self.find(plural, namespace, name)
        if found is None:
            raise missing(plural, name)
        return found

    def all(self, plural: str, namespace: str = "") -> list[Object]:
        """Return all objects of a kind, by namespace and name; `namespace` "" = everywhere."""
        found = self._objects[plural]
        return [found[key] for key in sorted(found) if namespace in ("", key[0])]

    def everything(self) -> list[tuple[str, Object]]:
        """Return (plural, object) of all."""
        return [(plural, one) for plural in self._objects for one in self.all(plural)]

    def watch(self, since: int | None = None) -> Watch:
        """Return a watch of all kinds; since a revision, None = from now on.

        Raises:
            HTTPGone: that revision is forgotten.
        """
        watch = Watch()
        if since is not None:
            if self._history and since < self._history[0][0] - 1:
                raise refused("Expired", f"too old resource version: {since}")
            for change in self._history:
                if change[0] > since:
                    watch.tell(change)
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """End a watch."""
        self._watches.remove(watch)

    # ------------------------------------------------------------ writing

    def create(self, plural: str, wanted: Object) -> Object:
        """Store a new object and return it.

        Raises:
            HTTPConflict: the name is taken.
            HTTPNotFound: the namespace does not exist.
        """
        resource, now = RESOURCES[plural], utc(self.clock())
        new = copy.deepcopy(wanted)
        meta = new.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        namespace = meta.get("namespace", "") if resource.namespaced else ""
        if resource.namespaced and self.find("namespaces", "", namespace) is None:
            raise missing("namespaces", namespace)
        if (namespace, meta["name"]) in self._objects[plural]:
            raise refused("AlreadyExists", f'{plural} "{meta["name"]}" already exists', name=meta["name"])
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now}
        if "spec" in new:
            meta["generation"] = 1
        return self._put("ADDED", plural, new)

    def update(self, plural: str, wanted: Object) -> Object:
        """Replace an object, and return it.

        Raises:
            HTTPConflict: it has changed since `wanted` was read (metadata.resourceVersion).
            HTTPNotFound: it is gone.
        """
        new = copy.deepcopy(wanted)
        meta = new["metadata"]
        old = self.get(plural, meta.get("namespace", ""), meta["name"])
        expected = meta.get("resourceVersion")
        if expected and expected != old["metadata"]["resourceVersion"]:
            raise refused(
                "Conflict", f'Operation cannot be fulfilled on {plural} "{meta["name"]}": the object has '
                "been modified; please apply your changes to the latest version and try again",
            )  # fmt: skip
        for key in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "resourceVersion"):
            meta.pop(key, None)
            if key in old["metadata"]:
                meta[key] = old["metadata"][key]
        if new == old:
            return old
        if new.get("spec") != old.get("spec"):
            meta["generation"] = old["metadata"].get("generation", 0) + 1
        if meta.get("deletionTimestamp") and plural != "pods" and not meta.get("finalizers"):
            return self._drop(plural, new)
        return self._put("MODIFIED", plural, new)

    def modify(self, plural: str, one: Object, change: Callable[[Object], None]) -> Object | None:
        """Change the newest version of an object; None if it is gone."""
        old = self.find(plural, one["metadata"].get("namespace", ""), one["metadata"]["name"])
        if old is None or old["metadata"]["uid"] != one["metadata"]["uid"]:
            return None
        new = copy.deepcopy(old)
        change(new)
        return self.update(plural, new)

    def set_status(self, plural: str, one: Object, status: Object) -> None:
        """Replace the status of an object, if it is still there."""
        self.modify(plural, one, lambda new: new.update(status=status))

    def delete(
        self, plural: str, namespace: str, name: str, grace_s: int | None = None, how: str = "Background"
    ) -> Object:
        """Delete an object, now or (pods, what has finalizers) as soon as it may go; return it.

        Raises:
            HTTPNotFound: there is none.
        """
        old = self.get(plural, namespace, name)
        new = copy.deepcopy(old)
        meta = new["metadata"]
        if plural == "pods":
            return self._delete_pod(new, grace_s)
        if plural == "namespaces":
            meta["finalizers"] = ["kubernetes"]
            new["status"] = {"phase": "Terminating"}
        elif how == "Foreground":
            meta["finalizers"] = [*meta.get("finalizers", []), "foregroundDeletion"]
        if not meta.get("finalizers"):
            return self._drop(plural, old)
        meta.setdefault("deletionTimestamp", utc(self.clock()))
        return old if new == old else self._put("MODIFIED", plural, new)

    def _delete_pod(self, new: Object, grace_s: int | None) -> Object:
        meta = new["metadata"]
        if grace_s is None:
            grace_s = int(new["spec"].get("terminationGracePeriodSeconds", GRACE_S))
        if grace_s == 0 or not new["spec"].get("nodeName"):
            return self._drop("pods", new)
        before = meta.get("deletionGracePeriodSeconds")
        if before is not None and before <= grace_s:
            return new
        meta |= {"deletionTimestamp": utc(self.clock() + grace_s), "deletionGracePeriodSeconds": grace_s}
        return self._put("MODIFIED", "pods", new)

    def _put(self, verb: str, plural: str, new: Object) -> Object:
        meta = new["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        self._tell(verb, plural, new)
        self._objects[plural][key] = new
        return new

    def _drop(self, plural: str, old: Object) -> Object:
        gone = copy.deepcopy(old)
        self._objects[plural].pop((gone["metadata"].get("namespace", ""), gone["metadata"]["name"]), None)
        self._tell("DELETED", plural, gone)
        return gone

    def _tell(self, verb: str, plural: str, new: Object) -> None:
        self.revision += 1
        new["metadata"]["resourceVersion"] = str(self.revision)
        change = (self.revision, verb, plural, new)
        self._history.append(change)
        for watch in self._watches:
            watch.tell(change)
