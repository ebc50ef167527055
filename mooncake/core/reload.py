"""Settings that change without a restart: on SIGHUP, on POST /config/reload, and when a file changes.

All or nothing: what the file says is read and checked as a whole, with what else hangs on it (the file of
tenants), before anything of it holds. A wrong file changes nothing; it is logged, counted and shown.
What flags and the environment said still comes first. Keys that need a restart are named.
"""

import asyncio
import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from mooncake.core import log as logs
from mooncake.core.admin import AdminServer, Answer, Asked, json_answer
from mooncake.core.config_file import ConfigFile, Entry, read_config
from mooncake.core.errors import ConfigError
from mooncake.core.options import SECTIONS
from mooncake.core.options_base import ENV_PREFIX, Options, settings_of, shown, told, values_of

log = structlog.get_logger(__name__)

POLL_S: Final = 3.0
"""How often files are read: they are short, and a ConfigMap that changed says so in no other way."""
RELOAD_S_MAX: Final = 30.0
"""Longest wait of POST /config/reload: reading two short files takes milliseconds, a slow disk seconds."""
TENANTS: Final = "tenants"
"""The setting that names a file whose text reloads, too."""
HASH_DIGITS: Final = 12
"""Of a digest that is shown as a number: 48 bits, which a float holds exactly."""

Change = Callable[[], None]
Prepare = Callable[[Any], Change]
"""Checks options and returns what makes them hold, which must not fail."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a reload. `changed`: keys that hold now; `needs_restart`: those that do not yet."""

    result: str  # changed | unchanged | refused
    changed: list[str] = []
    needs_restart: list[str] = []
    errors: list[str] = []


class _Wanted(msgspec.Struct, frozen=True):
    """What files ask for. `restart`: keys that have to wait; `change` makes the rest hold."""

    options: Options
    restart: list[str]
    texts: str  # digest of files that the options name
    change: Change


class ReloadMetrics:
    """Of one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """A second one in the same registry raises."""
        self.reloads = Counter(
            "mooncake_config_reloads", "Reloads of the settings, by result.", ["result"], registry=registry
        )
        self.success = Gauge(
            "mooncake_config_last_reload_success", "1 unless the last reload was refused.", registry=registry
        )
        self.at_s = Gauge(
            "mooncake_config_last_reload_timestamp_seconds",
            "When settings were last read.",
            registry=registry,
        )
        self.generation = Gauge(
            "mooncake_config_generation",
            "How often settings have changed since the start.",
            registry=registry,
        )
        self.hash = Gauge(
            "mooncake_config_hash",
            "Of the settings that hold: equal in processes that agree.",
            registry=registry,
        )
        for result in ("changed", "unchanged", "refused"):
            self.reloads.labels(result)


class Reloader:
    """Lives on the process's loop; `wake` may be called from anywhere."""

    def __init__(self, options: Options, metrics: ReloadMetrics, prepare: Prepare | None = None) -> None:
        """Nothing is read before `start`. `prepare`: of what goes by the options; the level of logs does."""
        self.options = options
        self.generation = 0
        self.last = Outcome("unchanged")
        self._section = options.source or options.section
        self._prepare = prepare
        self._metrics = metrics
        self._first: Options | None = None  # what the file said at the start
        self._seen = ""  # fingerprint of what was read last
        self._texts = ""  # digest of the files that the options which hold name
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._busy = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the file: it may have changed since these options were made. Then follow it."""
        await self.reload("start")
        self._task = asyncio.create_task(self._run(), name="config")

    async def close(self) -> None:
        """End (idempotent)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """Reload soon."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._woken.set)

    async def reload(self, why: str) -> Outcome:
        """Let the files hold, if they may."""
        async with self._busy:
            self._seen = await asyncio.to_thread(self._fingerprint)
            try:
                wanted = await asyncio.to_thread(self._read)
            except ConfigError as error:
                outcome = Outcome("refused", errors=str(error).splitlines())
                log.error(
                    "config.refused", why=why, errors=outcome.errors, advice="what held before still holds"
                )
            else:
                outcome = self._apply(wanted, why)
            self.last = outcome
            self._show()
            return outcome

    def _apply(self, wanted: _Wanted, why: str) -> Outcome:
        options, restart = wanted.options, wanted.restart
        changed = [
            one.key
            for one in settings_of(type(options)).values()
            if getattr(options, one.field) != getattr(self.options, one.field)
        ]
        if self._texts and wanted.texts != self._texts and TENANTS not in changed:
            changed.append(TENANTS)
        wanted.change()
        if options.log_level != self.options.log_level:
            logs.set_level(options.log_level)
        self.options, self._texts = options, wanted.texts
        if changed:
            self.generation += 1
            log.info("config.changed", why=why, keys=changed)
        for key in restart:
            log.warning("config.needs_restart", key=key, advice=f"{key} changed: needs a restart")
        return Outcome("changed" if changed else "unchanged", changed, restart)

    def _show(self) -> None:
        self._metrics.reloads.labels(self.last.result).inc()
        self._metrics.success.set(self.last.result != "refused")
        self._metrics.at_s.set(time.time())
        self._metrics.generation.set(self.generation)
        self._metrics.hash.set(int(self.hash, 16))

    @property
    def hash(self) -> str:
        """Digest of the values that can be reloaded, and of the text of files that they name."""
        values = [
            f"{one.key}={shown(one.kind, getattr(self.options, one.field))}"
            for one in settings_of(type(self.options)).values()
            if one.reloads
        ]
        return sha256("\n".join([*values, self._texts]).encode()).hexdigest()[:HASH_DIGITS]

    # ------------------------------------------------------------ files

    def _read(self) -> _Wanted:
        options = self.options
        said: dict[str, Entry] = {}
        file = ConfigFile("", {})
        if options.config:
            file = read_config(options.config)
            said, problems = file.of(self._section)
            if problems:
                raise told(problems)
        kind = SECTIONS[self._section]
        keys = settings_of(kind)
        # what has to be said may have been said by a flag
        values = {key: getattr(options, one.field, "") for key, one in keys.items() if one.default is None}
        values |= {key: entry.value for key, entry in said.items()}
        wanted = kind(**values)
        if self._first is None:
            self._first = wanted
        origins = {key: origin for key, origin in options.origins.items() if _is_pinned(origin)}
        free = {key: one for key, one in keys.items() if key not in origins}
        restart = [
            key
            for key, one in free.items()
            if not one.reloads and getattr(wanted, one.field) != getattr(self._first, one.field)
        ]
        changes = {
            one.field: getattr(wanted, one.field)
            for one in free.values()
            if one.reloads and one.field in type(options).model_fields
        }
        origins |= {key: file.origin(entry) for key, entry in said.items() if key in free}
        if not options.config:
            changes, origins = {}, options.origins
        made = options.replace(**changes, origins=origins)
        next_start = made  # of a child: who starts it alone knows all that flags said
        if not options.source:
            pinned = {key: getattr(options, one.field) for key, one in keys.items() if key not in free}
            next_start = kind(**{**values, **pinned})
        if conflicts := next_start.conflicts():
            raise told(conflicts)
        texts = _digest(getattr(made, TENANTS, ""))  # first: a change meanwhile is found next time
        return _Wanted(made, restart, texts, self._prepare(made) if self._prepare else _nothing)

    def _fingerprint(self) -> str:
        return _digest(self.options.config, getattr(self.options, TENANTS, ""))

    async def _run(self) -> None:
        before = self._seen
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._woken.wait()
                self._woken.clear()
                await self.reload("asked for")
                before = self._seen
                continue
            except TimeoutError:
                now = await asyncio.to_thread(self._fingerprint)
            if now == before and now != self._seen:  # twice the same: nobody is writing it just now
                await self.reload("file changed")
            before = now

    # ------------------------------------------------------------ people

    def route(self, admin: AdminServer) -> None:
        """Answer GET /config and POST /config/reload."""
        admin.route("/config", lambda asked: json_answer(200, self.told()))  # noqa: ARG005
        admin.route("/config/reload", self._asked, methods=("POST",))

    def told(self) -> dict[str, Any]:
        """Return what holds, JSON-ready; secrets are masked."""
        return {
            "process": self._section,
            "file": self.options.config,
            "generation": self.generation,
            "hash": self.hash,
            "last_reload": msgspec.to_builtins(self.last),
            "settings": values_of(self.options),
        }

    def _asked(self, asked: Asked) -> Answer:  # noqa: ARG002
        work = asyncio.run_coroutine_threadsafe(self.reload("POST /config/reload"), self._loop)
        try:
            outcome = work.result(RELOAD_S_MAX)
        except TimeoutError:
            return json_answer(503, {"error": f"not done within {RELOAD_S_MAX:g} s"})
        return json_answer(422 if outcome.result == "refused" else 200, msgspec.to_builtins(outcome))


def _digest(*paths: str) -> str:
    """Return a digest of what files say; "" = none."""
    digest = sha256()
    for path in paths:
        if path:
            try:
                digest.update(Path(path).read_bytes())
            except OSError as error:
                digest.update(str(error.errno).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _is_pinned(origin: str) -> bool:
    return origin.startswith(("--", ENV_PREFIX))


def _nothing() -> None:
    """Change nothing: the process has no more than its logs that goes by settings."""


@functools.cache
def has_terminal() -> bool:
    """Return whether this process was started on a terminal: then SIGHUP says that it was closed, no more."""
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


@contextlib.asynccontextmanager
async def reloading(
    options: Options, registry: CollectorRegistry, admin: AdminServer | None, prepare: Prepare | None = None
) -> AsyncIterator[Reloader]:
    """Let this process's settings change from now on; SIGHUP is caught if this is the main thread's loop."""
    reloader = Reloader(options, ReloadMetrics(registry), prepare)
    if threading.current_thread() is threading.main_thread() and not has_terminal():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.wake)
    if admin is not None:
        reloader.route(admin)
    await reloader.start()
    try:
        yield reloader
    finally:
        await reloader.close()
