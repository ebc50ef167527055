"""A child that is started again when it ends: back-off, and an end to patience.

`RestartPolicy` is pure; `Supervised` gives it a clock and a way to start the child.
"""

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec
import structlog

from mooncake.core.errors import MooncakeError
from mooncake.core.process import kill_group

log = structlog.get_logger(__name__)

RESTARTS_MAX = 3
WINDOW_S = 120.0
"""An engine needs up to 30 s to fail: three failures within two minutes are no accident."""
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.5, 10.0
REAP_S = 2.0


class Child(Protocol):
    """A running process. asyncio.subprocess.Process is one."""

    @property
    def pid(self) -> int:
        """Process id; it leads its process group."""
        ...

    async def wait(self) -> int:
        """Return the exit code once it ended; negative = the signal."""
        ...


class Restart(msgspec.Struct, frozen=True):
    """Start again after `delay_s`."""

    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """It ended `times` within `window_s`."""

    times: int
    window_s: float


class RestartPolicy:
    """Pure: how often a child may end before we give up."""

    def __init__(self, restarts_max: int = RESTARTS_MAX, window_s: float = WINDOW_S) -> None:
        """At most `restarts_max` restarts within any `window_s`."""
        self._restarts_max = restarts_max
        self._window_s = window_s
        self._ends: deque[float] = deque()

    def on_exit(self, now_s: float) -> Restart | GiveUp:
        """Return what to do about a child that ended."""
        self._ends.append(now_s)
        while self._ends[0] <= now_s - self._window_s:
            self._ends.popleft()
        if len(self._ends) > self._restarts_max:
            return GiveUp(len(self._ends), self._window_s)
        return Restart(min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** (len(self._ends) - 1)))


class Started(msgspec.Struct, frozen=True):
    """The child runs."""

    name: str
    pid: int
    restarts: int


class Ended(msgspec.Struct, frozen=True):
    """The child ended although nobody asked it to; `reason` is for people."""

    name: str
    reason: str
    then: Restart | GiveUp


def exit_reason(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class Supervised:
    """Runs one child until `stop`, or until its policy gives up."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        on_event: Callable[[Started | Ended], None],
        policy: RestartPolicy | None = None,
        hopeless_codes: Sequence[int] = (),
    ) -> None:
        """`start` starts the child once; an exception of it counts as an end.

        An end with one of `hopeless_codes` is final: the same settings would fail again.
        """
        self._hopeless_codes = hopeless_codes
        self.name = name
        self._start = start
        self._on_event = on_event
        self._policy = policy or RestartPolicy()
        self._child: Child | None = None
        self._task: asyncio.Task[GiveUp] | None = None
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Process id of the running child, 0 = none runs."""
        return self._child.pid if self._child else 0

    def run(self) -> asyncio.Task[GiveUp]:
        """Start on the running loop; the task ends only by giving up or by `stop`."""
        self._task = asyncio.create_task(self._run(), name=f"supervise {self.name}")
        return self._task

    async def stop(self, grace_s: float) -> bool:
        """End the child and the supervision; return whether it ended within `grace_s`."""
        child = self._child
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if child is None:
            return True
        self._child = None
        by_itself = await kill_group(child.pid, grace_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_S):
                await child.wait()  # no zombie, no open transport
        return by_itself

    async def _run(self) -> GiveUp:
        while True:
            code, reason = await self._once()
            then = self._policy.on_exit(time.monotonic())
            if code in self._hopeless_codes:
                then = GiveUp(1, 0.0)
            self._on_event(Ended(self.name, reason, then))
            if isinstance(then, GiveUp):
                return then
            await asyncio.sleep(then.delay_s)
            self.restarts += 1

    async def _once(self) -> tuple[int | None, str]:
        try:
            child = await self._start()
        except (MooncakeError, OSError) as error:
            return None, f"did not start: {error}"
        self._child = child
        self._on_event(Started(self.name, child.pid, self.restarts))
        code = await child.wait()
        self._child = None
        # the group of a dead leader may still hold its helpers, and with them ports and memory
        await kill_group(child.pid, 0.0)
        return code, exit_reason(code)
