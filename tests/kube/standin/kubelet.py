"""The kubelet of all nodes: a task for each pod that is meant to run, and each that is meant to end."""

import asyncio
import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from mooncake.core.errors import MooncakeError
from tests.kube.standin import endpoints
from tests.kube.standin.pod import Pod, Settings
from tests.kube.standin.sandbox import Sandbox
from tests.kube.standin.store import Object, ObjectStore
from tests.kube.standin.volumes import Places

log = structlog.get_logger(__name__)

END_S = 20.0
"""For what is killed at the end of all."""
TASK_S = 5.0
"""For a pod's task to see that all of it is dead."""


class Kubelet:
    """Runs the pods that have a node."""

    def __init__(
        self, store: ObjectStore, folder: Path, settings: Settings, claims: Mapping[str, Path]
    ) -> None:
        """`folder`: short, all of ours lies below; its `memory` is a file system in memory."""
        self._store, self._folder, self._settings, self._claims = store, folder, settings, claims
        self._pods: dict[str, Pod] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Task[None]] = {}
        self._graces_s: dict[str, float] = {}
        """What each task of `_ends` was given; 0 = none: deleted by force."""
        self._hosts: dict[str, tuple[str, str]] = {}
        """uid -> namespace and own line of its hosts file."""
        self._numbers = itertools.count(0)
        self._load = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0)
        self._taken: dict[str, list[int]] = {}
        shutil.rmtree(folder / "pods", ignore_errors=True)  # of one before us that was killed
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "hosts").mkdir(exist_ok=True)

    async def run(self) -> None:
        """Follow the pods, until cancelled; then kill what runs."""
        watch = self._store.watch()
        try:
            while True:
                self._look()
                await watch.queue.get()
                while not watch.queue.empty():
                    watch.queue.get_nowait()
        finally:
            self._store.unwatch(watch)
            await self._close()

    def _look(self) -> None:
        self._write_hosts()
        wanted = {
            pod["metadata"]["uid"]: pod for pod in self._store.all("pods") if pod["spec"].get("nodeName")
        }
        for uid, pod in wanted.items():
            ending = "deletionTimestamp" in pod["metadata"]
            if uid not in self._tasks and not ending:
                self._tasks[uid] = asyncio.create_task(self._live(uid, pod), name=pod["metadata"]["name"])
            elif ending:
                self._let_end(uid, pod, float(pod["metadata"]["deletionGracePeriodSeconds"]))
        for uid in [uid for uid in self._pods if uid not in wanted]:
            self._let_end(uid, None, 0.0)
        for one in self._pods.values():
            with contextlib.suppress(MooncakeError):  # a Secret that was deleted stays as it was
                one.volumes.refresh()

    async def _live(self, uid: str, pod: Object) -> None:
        meta = pod["metadata"]
        number = next(self._numbers)
        places = Places(
            self._folder / "pods" / f"{number}", self._folder / "memory" / f"{number}",
            self._folder / "nodes" / pod["spec"]["nodeName"], self._folder / "claims", self._claims,
        )  # fmt: skip
        for place in (places.pod, places.memory, places.node):
            place.mkdir(parents=True, exist_ok=True)
        sandbox = Sandbox(number, pod["spec"].get("hostname", meta["name"]))
        self._hosts[uid] = meta["namespace"], endpoints.own_host(sandbox.ip, sandbox.hostname)
        self._write_hosts()
        one = self._pods[uid] = Pod(
            pod, sandbox, places, self._hosts_path(uid),
            lambda plural, name: self._store.find(plural, meta["namespace"], name),
            self._settings, lambda status: self._store.set_status("pods", pod, status),
            lambda wanted: self._cores(uid, wanted),
        )  # fmt: skip
        try:
            await one.run()
        except* (MooncakeError, OSError, TimeoutError) as group:
            for error in group.exceptions:
                log.error("pod failed", pod=meta["name"], reason=repr(error))
        finally:
            await asyncio.shield(one.kill())
            shutil.rmtree(places.memory, ignore_errors=True)
            shutil.rmtree(places.pod, ignore_errors=True)
            del self._hosts[uid]
            self._hosts_path(uid).unlink(missing_ok=True)

    def _let_end(self, uid: str, pod: Object | None, grace_s: float) -> None:
        """End a pod, if it is not already ending within as little; None: there is no such object any more."""
        if grace_s >= self._graces_s.get(uid, math.inf):
            return
        earlier = self._ends.get(uid)
        if earlier is not None:
            if uid not in self._pods:
                return  # its time is over, it is being killed
            earlier.cancel()
        self._graces_s[uid] = grace_s
        self._ends[uid] = asyncio.create_task(
            self._kill(uid) if pod is None else self._end(uid, pod, grace_s)
        )

    async def _end(self, uid: str, pod: Object, grace_s: float) -> None:
        if one := self._pods.get(uid):
            await one.end(grace_s)
        await self._kill(uid)
        meta = pod["metadata"]
        found = self._store.find("pods", meta["namespace"], meta["name"])
        if found is not None and found["metadata"]["uid"] == uid:
            self._store.delete("pods", meta["namespace"], meta["name"], 0)

    async def _kill(self, uid: str) -> None:
        """End a pod's task with all that it started."""
        one, task = self._pods.pop(uid, None), self._tasks.get(uid)
        if one is not None:
            await one.kill()
        for core in self._taken.pop(uid, []):
            self._load[core] -= 1
        if task is not None:
            await asyncio.wait([task], timeout=TASK_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _close(self) -> None:
        for task in self._ends.values():
            task.cancel()
        async with asyncio.timeout(END_S):
            await asyncio.gather(*self._ends.values(), return_exceptions=True)
            await asyncio.gather(*(self._kill(uid) for uid in list(self._tasks)))

    # ------------------------------------------------------------ for pods and for the API

    def _cores(self, uid: str, wanted: float) -> Sequence[int]:
        """Return cores for a container: whole ones as it asks for, the least taken; none asked, all."""
        count = min(int(wanted), len(self._load))
        if count == 0:
            return list(self._load)
        chosen = sorted(self._load, key=lambda core: (self._load[core], core))[:count]
        for core in chosen:
            self._load[core] += 1
        self._taken.setdefault(uid, []).extend(chosen)
        return sorted(chosen)

    def log_path(self, namespace: str, pod: str, container: str, previous: bool) -> Path | None:
        """Return the file of a container, None if there is none."""
        found = self._store.find("pods", namespace, pod)
        one = self._pods.get(found["metadata"]["uid"]) if found else None
        return one.log_path(container, previous) if one else None

    def _hosts_path(self, uid: str) -> Path:
        return self._folder / "hosts" / uid

    def _write_hosts(self) -> None:
        """Write names anew where they changed; in place, as the files are mounted."""
        lines = endpoints.hosts(self._store.all("services"), self._store.all("pods"))
        for uid, (namespace, own) in self._hosts.items():
            path = self._hosts_path(uid)
            path.touch()
            rows = [*lines.get(namespace, ["127.0.0.1 localhost"]), own]  # its namespace may be gone
            text = "".join(f"{row}\n" for row in rows).encode()
            if path.read_bytes() != text:
                with path.open("r+b", buffering=0) as file:
                    file.write(text)
                    file.truncate(len(text))
