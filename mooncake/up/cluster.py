"""Starts the planned processes, watches them, stops them. The main loop of `mooncake up`."""

import asyncio
import contextlib
import fcntl
import itertools
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import msgspec

from mooncake.core.config import format_size
from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, PeerTimeout
from mooncake.core.messages import CORES_PREFIX, GATEWAYS_PREFIX, INSTANCES_PREFIX, STORES_PREFIX
from mooncake.core.metadata_follow import Removed, follow
from mooncake.core.metadata_open import open_metadata
from mooncake.core.options import GatewayOptions, StoreOptions
from mooncake.core.process import open_log, spawn
from mooncake.core.supervise import Child, Ended, GiveUp, Started, Supervised
from mooncake.up import zygote
from mooncake.up.launch import EXIT_USAGE
from mooncake.up.plan import Process, metadata_endpoint
from mooncake.up.show import Board
from mooncake.up.starter import Zygote, write_options

READY_S_MAX = 900.0
"""A cold import on a loaded two-core machine took 123 s; beyond this something hangs."""
HEALTH_POLL_S = 0.2
HEALTH_S_MAX = 2.0
LOG_TAIL_LINES = 8


class Entry(msgspec.Struct, frozen=True):
    """What children run: `module` as a program, its `run` in a fork. Tests bring light ones."""

    module: str = "mooncake.up.launch"
    preload: str = zygote.PRELOAD


class Cluster:
    """All processes of one `mooncake up`."""

    def __init__(
        self,
        plan: list[Process],
        run_dir: Path,
        env: dict[str, str],
        board: Board,
        use_zygote: bool = True,
        entry: Entry | None = None,
        metadata: str = "",
    ) -> None:
        """Start nothing yet.

        Args:
            plan: the processes.
            run_dir: of their logs and sockets.
            env: the environment of every child; the plan's own come on top.
            board: is told how they are.
            use_zygote: fork those that are heavy from a warm process.
            entry: what children run.
            metadata: where they register; "" = at their own store below `run_dir`.
        """
        self._metadata = metadata or metadata_endpoint(str(run_dir))
        self._plan = plan
        self._run_dir = run_dir
        self._env = env
        self._board = board
        self._use_zygote = use_zygote
        self._entry = entry or Entry()
        self._zygote: Zygote | None = None
        self._supervised: dict[str, Supervised] = {}
        self._tasks: dict[asyncio.Task[object], str] = {}
        self._registered: set[str] = set()
        self._pids: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._stopping = False

    # ------------------------------------------------------------ startup

    async def start(self) -> None:
        """Start everything in order; returns at once, `wait_ready` tells when it is ready."""
        for process in self._plan:
            self._board.set(process.name, "starting", self._about(process))
        if self._use_zygote and any(process.heavy for process in self._plan):
            self._board.set("imports", "importing", "vLLM, once for all engines")
            self._zygote = await Zygote.start(self._env, self.log_path("zygote"), self._entry.preload)
            self._watch(self._zygote_died(self._zygote), "zygote")
        for process in self._plan:
            supervised = Supervised(
                process.name, partial(self._launch, process), self._on_event, hopeless_codes=(EXIT_USAGE,)
            )
            self._supervised[process.name] = supervised
            self._tasks[supervised.run()] = process.name
        self._watch(self._follow(), "metadata")

    def log_path(self, name: str) -> Path:
        """Return the log file of a process."""
        return self._run_dir / f"{name}.log"

    async def _launch(self, process: Process) -> Child:
        data = process.options.encoded()
        if process.heavy and self._zygote:
            await self._zygote.wait_ready()
            self._board.set("imports", "ready", f"{self._zygote.seconds:.1f} s")
            return await self._zygote.fork(
                f"{self._entry.module}:run",
                process.role,
                data,
                process.env,
                self.log_path(process.name),
                process.cores,
            )
        path = write_options(self._run_dir / f"{process.name}.options", data)
        return await spawn(
            [sys.executable, "-m", self._entry.module, process.role, str(path)],
            env={**self._env, **process.env},
            log_path=self.log_path(process.name),
            cores=process.cores,
        )

    def _about(self, process: Process) -> str:
        if process.role == "store":
            return format_size(getattr(process.options, "capacity_bytes", 0))
        return f"cores {','.join(map(str, process.cores))}" if process.cores else ""

    def _watch(self, work: "asyncio._CoroutineLike[object]", name: str) -> None:
        self._tasks[asyncio.create_task(work, name=name)] = name

    async def _zygote_died(self, warm: Zygote) -> None:
        with contextlib.suppress(MooncakeError):  # told by the processes that wait for it
            await warm.wait_ready()
        code = await warm.process.wait()
        with contextlib.suppress(PeerGone):
            await warm.wait_ready()  # raises the reason if it never was ready
        raise PeerGone(
            f"the warm process ended (exit code {code}) and with it every engine; see {warm.log_path}"
        )

    # ------------------------------------------------------------ main loop

    async def wait_ready(self, stop: asyncio.Event, host: str, port: int) -> bool:
        """Return True once everything is ready, False if `stop` came first.

        Raises:
            MooncakeError: something gave up, see `watch`.
        """
        ready = asyncio.create_task(self._wait_ready(host, port), name="ready")
        try:
            await self._until(stop, ready)
            return ready.done() and not ready.cancelled() and ready.exception() is None
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def watch(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set.

        Raises:
            PeerGone: a process ended too often; the message names its log and its last words.
            MooncakeError: what made a process impossible to start.
        """
        await self._until(stop, None)

    async def _until(self, stop: asyncio.Event, ready: "asyncio.Task[None] | None") -> None:
        stopped = asyncio.create_task(stop.wait())
        waited: Iterable[asyncio.Task[object]] = [stopped, *([ready] if ready else []), *self._tasks]
        try:
            done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        # the zygote's end explains the end of everything that it forked
        for task in sorted(done, key=lambda task: self._tasks.get(task) != "zygote"):
            if task in (stopped, ready) and task.exception() is None:
                continue
            result = task.result()
            if isinstance(result, GiveUp):
                raise PeerGone(self._obituary(self._tasks[task], result))

    def _obituary(self, name: str, end: GiveUp) -> str:
        path = self.log_path(name)
        last = ""
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()
            last = "".join(f"\n    {line}" for line in lines[-LOG_TAIL_LINES:])
        return f"{name} ended {end.times} time(s) within {end.window_s:g} s: giving up. Its log: {path}{last}"

    async def _wait_ready(self, host: str, port: int) -> None:
        names = {process.name for process in self._plan if process.role != "conductor"}
        healthy = False
        try:
            async with asyncio.timeout(READY_S_MAX):
                while not (names <= self._registered and healthy):
                    healthy = await is_healthy(host, port)
                    if healthy and "conductor" in self._supervised:
                        self._board.set("conductor", "ready", f"port {port}")
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(HEALTH_POLL_S):
                            await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            missing = sorted(names - self._registered) + ([] if healthy else [f"port {port}"])
            raise PeerTimeout(
                f"not ready after {READY_S_MAX:g} s: {', '.join(missing)}; logs in {self._run_dir}"
            ) from None

    async def _follow(self) -> None:
        metadata = open_metadata(self._metadata)
        names = {record_key(process): process.name for process in self._plan}
        try:
            async for event in follow(metadata, "/mooncake/"):
                name = names.get(event.key, "")
                if name not in self._supervised:
                    continue
                if isinstance(event, Removed):
                    self._registered.discard(name)
                else:
                    self._registered.add(name)
                    self._board.set(name, "ready", f"pid {self._pids.get(name, 0)}")
                self._changed.set()
        finally:
            await metadata.close()

    def _on_event(self, event: Started | Ended) -> None:
        if isinstance(event, Started):
            self._pids[event.name] = event.pid
            restarts = f", restart {event.restarts}" if event.restarts else ""
            self._board.set(event.name, "loading", f"pid {event.pid}{restarts}")
            return
        self._registered.discard(event.name)
        if self._stopping:
            return
        if isinstance(event.then, GiveUp):
            self._board.set(event.name, "failed", event.reason)
        else:
            detail = f"{event.reason}; again in {event.then.delay_s:g} s; {self.log_path(event.name)}"
            self._board.set(event.name, "restarting", detail)

    # ------------------------------------------------------------ shutdown

    async def close(self) -> None:
        """Stop the Conductor (it drains), then the engines, then the store, then the zygote."""
        self._stopping = True
        for task, name in self._tasks.items():
            if name in ("zygote", "metadata"):  # their ends are no news any more
                task.cancel()
        ordered = sorted(self._plan, key=lambda process: process.stop_rank)
        for _, group in itertools.groupby(ordered, key=lambda process: process.stop_rank):
            await asyncio.gather(*(self._stop(process) for process in group))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._zygote:
            await self._zygote.close()

    async def _stop(self, process: Process) -> None:
        supervised = self._supervised.get(process.name)
        if supervised is None:
            return
        self._board.set(process.name, "stopping")
        try:
            by_itself = await supervised.stop(process.stop_s)
        except PeerGone as error:
            self._board.set(process.name, "failed", str(error))
        else:
            self._board.set(
                process.name, "stopped", "" if by_itself else f"killed after {process.stop_s:g} s"
            )


def record_key(process: Process) -> str:
    """Return the key under which a process says that it is there; "" = it says it by HTTP alone."""
    options = process.options
    if isinstance(options, StoreOptions):
        return STORES_PREFIX + options.node
    if isinstance(options, GatewayOptions):
        prefix = {"core": CORES_PREFIX, "gateway": GATEWAYS_PREFIX}.get(process.role)
        return prefix + options.name if prefix else ""
    return INSTANCES_PREFIX + options.instance_id


async def is_healthy(host: str, port: int) -> bool:
    """Return whether GET /health answers 200."""
    try:
        async with asyncio.timeout(HEALTH_S_MAX):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def prepare_run_dir(path: Path) -> None:
    """Make a private folder, or check that it is one.

    Raises:
        ConfigError: others own it or can read it, or another `up` uses it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(f"run_dir = {str(path)!r}: must be yours alone: chmod 700")
        lock = open_log(path / "up.lock")  # held until this process ends, however it ends
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"run_dir = {str(path)!r}: another `mooncake up` uses it") from None
    except OSError as error:
        raise ConfigError(f"run_dir = {str(path)!r}: {error.strerror}") from error
