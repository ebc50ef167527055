"""One pod on a node: its sandbox, its containers one after another and again, its end, its status."""

import asyncio
import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mooncake.core.errors import ConfigError
from tests.kube.standin.container import Container, privileges, root_script
from tests.kube.standin.environment import Lookup, command_line, environment, quantity
from tests.kube.standin.probes import BackOff, Checks, Health
from tests.kube.standin.probing import attempt
from tests.kube.standin.sandbox import NODE_IP, Sandbox
from tests.kube.standin.store import GRACE_S, Object, utc
from tests.kube.standin.volumes import Places, Volumes

RETRY_S = 0.5
"""While a ConfigMap or Secret that a pod needs does not exist."""
TERM_S_MIN = 2.0
"""After a preStop that took all of the grace."""
HOOK_S_MAX = 3600.0


@dataclass(frozen=True)
class Settings:
    """How the kubelet of this stand-in works."""

    path: str
    """PATH of containers."""
    probe_factor: float = 1.0
    """Probes' delays and periods are so many times as long."""
    back_off_factor: float = 1.0
    env: dict[str, str] = field(default_factory=dict)
    """More variables for every container: what a test tells its processes apart by."""
    hidden: tuple[str, ...] = ()
    """Folders on the way to programs that others than root may not enter."""
    foreign: tuple[str, ...] = ()
    """File systems that programs lie on and that are not the root's."""
    as_root: bool = False
    """Ignore users and capabilities."""


@dataclass
class State:
    """What is known of one container, for the status."""

    name: str
    started: bool = False
    ready: bool = False
    restarts: int = 0
    now: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last: Object = field(default_factory=dict)


class Pod:
    """A pod that is meant to run; `run` ends when it has ended."""

    def __init__(
        self, pod: Object, sandbox: Sandbox, places: Places, hosts: Path, lookup: Lookup, settings: Settings,
        report: Callable[[Object], None], cores: Callable[[float], Sequence[int]],
    ) -> None:  # fmt: skip
        """`report` takes a new status; `cores` picks cores for a request of so many."""
        self._pod, self._sandbox, self._places, self._hosts = pod, sandbox, places, hosts
        self._settings, self._report, self._lookup, self._cores = settings, report, lookup, cores
        self.volumes = Volumes(pod, places, lookup)
        spec = pod["spec"]
        self._inits = {one["name"]: State(one["name"]) for one in spec.get("initContainers", [])}
        self._mains = {one["name"]: State(one["name"]) for one in spec["containers"]}
        self._running: dict[str, Container] = {}
        self._specs = {one["name"]: one for one in [*spec.get("initContainers", []), *spec["containers"]]}
        self._ip = ""
        self._since = utc(time.time())
        self._conditions: dict[str, tuple[bool, str]] = {}
        self._ending = asyncio.Event()
        self.grace_s = float(spec.get("terminationGracePeriodSeconds", GRACE_S))

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Start everything; return when all containers have ended for good."""
        await self._sandbox.start()
        self._ip = self._sandbox.ip
        self._pod = copy.deepcopy(self._pod)
        self._pod.setdefault("status", {})["podIP"] = self._ip
        self._pod["status"]["hostIP"] = NODE_IP
        self._tell()
        async with asyncio.TaskGroup() as tasks:
            sidecars: list[asyncio.Task[None]] = []
            for spec in self._pod["spec"].get("initContainers", []):
                if spec.get("restartPolicy") == "Always":
                    sidecars.append(tasks.create_task(self._keep(spec, self._inits[spec["name"]])))
                    await self._until_started(self._inits[spec["name"]])
                else:
                    await self._keep(spec, self._inits[spec["name"]], once=True)
                if self._ending.is_set():
                    return
            mains = [
                tasks.create_task(self._keep(spec, self._mains[spec["name"]]))
                for spec in self._pod["spec"]["containers"]
            ]
            await asyncio.gather(*mains)
            for task in sidecars:
                task.cancel()

    async def end(self, grace_s: float) -> None:
        """preStop, SIGTERM, SIGKILL: for all containers at once; return when they have ended."""
        self._ending.set()
        self.grace_s = grace_s
        running = [name for name in self._mains if name in self._running]
        await asyncio.gather(*(self._stop(name, grace_s) for name in running))
        await asyncio.gather(*(self._stop(name, TERM_S_MIN) for name in list(self._running)))

    async def kill(self) -> None:
        """End it at once."""
        self._ending.set()
        await asyncio.gather(*(one.kill() for one in self._running.values()))
        await self._sandbox.close()

    async def _stop(self, name: str, grace_s: float) -> None:
        container = self._running.get(name)
        if container is None:
            return
        begun_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await container.begun.wait()
        if not container.running:  # it never was, or has ended by itself
            return
        hook = self._specs[name].get("lifecycle", {}).get("preStop")
        if hook and "exec" in hook:
            log = self._log(name).with_suffix(".prestop")
            await container.exec(hook["exec"]["command"], min(HOOK_S_MAX, grace_s), log)
        elif hook and "sleep" in hook:
            await asyncio.sleep(min(grace_s, hook["sleep"]["seconds"]))
        elif hook:
            await attempt(hook, self._specs[name], self._ip, container, grace_s)
        container.signal(signal.SIGTERM)
        left_s = max(TERM_S_MIN, grace_s - (time.monotonic() - begun_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await container.wait()
                return
        await container.kill()

    # ------------------------------------------------------------ one container

    async def _until_started(self, state: State) -> None:
        while not (state.started or self._ending.is_set()):  # noqa: ASYNC110 - see below
            await asyncio.sleep(RETRY_S / 5)  # seconds of a start: not worth an event for each state

    async def _keep(self, spec: Object, state: State, once: bool = False) -> None:
        """Run a container, again if its restart policy says so."""
        back_off = BackOff(self._settings.back_off_factor)
        policy = (
            "OnFailure"
            if once
            else spec.get("restartPolicy", self._pod["spec"].get("restartPolicy", "Always"))
        )
        while not self._ending.is_set():
            container = await self._start(spec, state)
            if container is None:
                return
            begun_s, begun = time.monotonic(), utc(time.time())
            try:
                code = await self._watch(spec, state, container)
            finally:
                await container.kill()
                self._running.pop(spec["name"], None)
                container.forget()
            reason = "Completed" if code == 0 else "Error"
            ended = {"exitCode": code, "reason": reason, "startedAt": begun, "finishedAt": utc(time.time())}
            state.started = state.ready = False
            state.now = {"terminated": ended}
            self._tell()
            if self._ending.is_set() or policy == "Never" or (policy == "OnFailure" and code == 0):
                return
            state.last, delay_s = {"terminated": ended}, back_off.on_exit(time.monotonic() - begun_s)
            state.now = {"waiting": {"reason": "CrashLoopBackOff", "message": f"back-off {delay_s:g} s"}}
            self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._ending.wait()
            state.restarts += 1

    async def _start(self, spec: Object, state: State) -> Container | None:
        """Start a container as soon as what it refers to exists; None: the pod ends."""
        name = spec["name"]
        while not self._ending.is_set():
            try:
                self.volumes.prepare()
                env = self._environment(spec)
                mounts = self.volumes.mounts(spec)
                break
            except ConfigError as error:
                state.now = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
                self._tell()
                await asyncio.sleep(RETRY_S)
        else:
            return None
        folder = self._places.pod / f"{name}-{state.restarts}"
        layers = self._places.memory / f"{name}-{state.restarts}"
        read_only = spec.get("securityContext", {}).get("readOnlyRootFilesystem", False)
        script = root_script(
            folder / "root",
            layers,
            self._hosts,
            mounts,
            read_only,
            self._settings.hidden,
            self._settings.foreign,
        )
        words = [] if self._settings.as_root else privileges(self._pod, spec)
        container = Container(self._sandbox, folder, layers, words, env)
        cores = self._cores(quantity(spec.get("resources", {}).get("requests", {}).get("cpu", 0)))
        self._running[name] = container
        await container.start(
            script, command_line(spec, env), spec.get("workingDir", "/"), self._log(name), cores
        )
        state.now = {"running": {"startedAt": utc(time.time())}}
        self._tell()
        return container

    def _environment(self, spec: Object) -> dict[str, str]:
        own = environment(self._pod, spec, self._lookup)
        name = self._pod["spec"].get("hostname", self._pod["metadata"]["name"])
        return {"PATH": self._settings.path, "HOME": "/root", "HOSTNAME": name, **self._settings.env, **own}

    async def _watch(self, spec: Object, state: State, container: Container) -> int:
        """Probe a container until it ends; return its exit code."""
        checks = Checks(spec, self._settings.probe_factor)
        self._take(state, checks.health)
        probing = [
            asyncio.create_task(self._probe(kind, spec, state, container, checks)) for kind in checks.timings
        ]
        try:
            return await container.wait()
        finally:
            for task in probing:
                task.cancel()
            await asyncio.gather(*probing, return_exceptions=True)

    async def _probe(
        self, kind: str, spec: Object, state: State, container: Container, checks: Checks
    ) -> None:
        timing = checks.timings[kind]
        probe = spec[f"{kind}Probe"]
        await asyncio.sleep(timing.initial_delay_s)
        while container.running:
            begun_s = time.monotonic()
            if kind in checks.due and not (kind == "liveness" and self._ending.is_set()):
                ok = await attempt(probe, spec, self._ip, container, timing.timeout_s)
                health = checks.on_outcome(kind, ok)
                self._take(state, health)
                if health.condemned and not self._ending.is_set():
                    state.now = {"waiting": {"reason": "Unhealthy", "message": health.condemned}}
                    self._tell()
                    await self._stop(spec["name"], probe.get("terminationGracePeriodSeconds", self.grace_s))
                    return
            elif kind == "startup":
                return
            await asyncio.sleep(timing.pause_s(time.monotonic() - begun_s))

    def _take(self, state: State, health: Health) -> None:
        if (state.started, state.ready) != (health.started, health.ready):
            state.started, state.ready = health.started, health.ready
            self._tell()

    # ------------------------------------------------------------ what others see

    def pid(self, container: str) -> int:
        """Return the first process of a running container, 0 if it does not run."""
        running = self._running.get(container)
        return running.pid if running else 0

    def log_path(self, container: str, previous: bool) -> Path | None:
        """Return the file of what a container wrote, or its predecessor."""
        states = self._inits | self._mains
        if container not in states:
            return None
        path = self._log(container, states[container].restarts - previous)
        return path if path.exists() else None

    def _log(self, name: str, restarts: int | None = None) -> Path:
        number = (self._inits | self._mains)[name].restarts if restarts is None else restarts
        return (
            self._places.pod.parent.parent / "logs" / f"{self._pod['metadata']['name']}.{name}.{number}.log"
        )

    def _tell(self) -> None:
        initialized = all("terminated" in one.now or one.started for one in self._inits.values())
        ready = all(one.ready for one in self._mains.values())
        begun = initialized and all("running" in one.now or one.restarts for one in self._mains.values())
        codes = [one.now.get("terminated", {}).get("exitCode") for one in self._mains.values()]
        phase = "Running" if begun else "Pending"
        if (
            None not in codes
            and not self._ending.is_set()
            and self._pod["spec"].get("restartPolicy") != "Always"
        ):
            phase = "Failed" if any(codes) else "Succeeded"
        found = {"PodScheduled": True, "Initialized": initialized, "ContainersReady": ready, "Ready": ready}
        for kind, value in found.items():
            if self._conditions.get(kind, (None, ""))[0] is not value:
                self._conditions[kind] = (value, utc(time.time()))
        self._report({
            "phase": phase, "podIP": self._ip, "podIPs": [{"ip": self._ip}] if self._ip else [],
            "hostIP": NODE_IP, "startTime": self._since, "qosClass": "Burstable",
            "conditions": [
                {"type": kind, "status": str(value), "lastTransitionTime": since}
                for kind, (value, since) in self._conditions.items()
            ],
            "initContainerStatuses": [self._status(one) for one in self._inits.values()],
            "containerStatuses": [self._status(one) for one in self._mains.values()],
        })  # fmt: skip

    def _status(self, state: State) -> Object:
        image = self._specs[state.name].get("image", "")
        return {
            "name": state.name, "ready": state.ready, "started": state.started,
            "restartCount": state.restarts,
            "state": copy.deepcopy(state.now), "lastState": copy.deepcopy(state.last),
            "image": image, "imageID": "", "containerID": f"process://{self.pid(state.name)}",
        }  # fmt: skip


def foreign_folders(*programs: Path) -> tuple[str, ...]:
    """Return the mount points, other than the root, on the way to programs (and to what they link to)."""
    ways = {way for one in programs for way in (one.absolute(), one.resolve())}
    folders = {folder for way in ways for folder in way.parents if folder != Path("/")}
    return tuple(sorted(str(one) for one in folders if os.path.ismount(one)))


def hidden_folders(program: Path) -> tuple[str, ...]:
    """Return the folders on the way to a program (and to what it links to) that only root may enter."""
    ways = {program.absolute(), program.resolve()}
    folders = {folder for way in ways for folder in way.parents}
    return tuple(sorted(str(one) for one in folders if not os.stat(one).st_mode & 0o001))
