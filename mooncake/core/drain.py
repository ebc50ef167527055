"""A process is told to go by SIGTERM, or asked to drain first (POST /drain). For processes with a loop.

Drain: not ready, nothing new, what is in flight ends. Told (SIGTERM, SIGINT): the same, and then it ends;
after `drain_s`, or told again, at once. One that was only asked waits, drained, until it is told.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from mooncake.core.admin import Drains
from mooncake.core.health import Health

log = structlog.get_logger(__name__)


class Leaving:
    """The events of one running loop; `ask` may be called from any thread."""

    def __init__(self, health: Health, drain_s: float, in_flight: Callable[[], int] = lambda: 0) -> None:
        """Made on the loop.

        Args:
            health: is told at once.
            drain_s: since it was told to end, until it does whatever is in flight.
            in_flight: how much there is.
        """
        self.draining = asyncio.Event()
        self.told = asyncio.Event()
        self.at_once = asyncio.Event()
        self.in_flight = in_flight
        self.is_done = False
        """Whether it has drained: nothing in flight, nobody comes any more. Set by the process."""
        self._health = health
        self._drain_s = drain_s
        self._loop = asyncio.get_running_loop()

    @property
    def drains(self) -> Drains:
        """What the admin server needs."""
        return Drains(self.ask, lambda: self.in_flight(), lambda: self.is_done)

    def on_signals(self) -> None:
        """Take SIGTERM and SIGINT from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.tell, number.name)

    def ask(self, why: str) -> None:
        """Drain, but do not end (idempotent)."""
        self._health.draining(why)  # at once, whatever the loop does; it repeats it: see Health
        with contextlib.suppress(RuntimeError):  # the loop has ended: it has left
            self._loop.call_soon_threadsafe(self._drain, why)

    def tell(self, why: str = "told to stop") -> None:
        """Drain and end; a second time: at once. On the loop."""
        if self.told.is_set():
            log.warning("drain.cut_short", why=why, in_flight=self.in_flight())
            self.at_once.set()
            return
        self.told.set()
        self._loop.call_later(self._drain_s, self.at_once.set)
        self._drain(why)

    def _drain(self, why: str) -> None:
        self._health.draining(why)
        if not self.draining.is_set():
            log.info("drain.begins", why=why, in_flight=self.in_flight())
            self.draining.set()

    async def pause(self, limit_s: float) -> None:
        """Sleep, but not beyond the moment in which it has to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self.at_once.wait()

    async def unless_at_once(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do `work` unless it has to end before; return whether it was done."""
        doing = asyncio.create_task(work, name="drain")
        hurry = asyncio.create_task(self.at_once.wait(), name="at once")
        try:
            await asyncio.wait({doing, hurry}, return_when=asyncio.FIRST_COMPLETED)
            done = doing.done()
            if done:
                doing.result()
            return done
        finally:
            for task in (doing, hurry):
                task.cancel()
            await asyncio.gather(doing, hurry, return_exceptions=True)
