"""Carries out what Tasks command: who shall have a block is told to pull it, who shall not to drop it.

Nothing is sent without orders: they are asked for right before each request, so that a term that ended
since the command was given sends nothing more. Between two stores one request is under way at a time;
what is commanded meanwhile travels together in the next one, which is ten times quicker than one by one.
Commands are bounded by whoever gives them (Tasks).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import structlog

from kvstore.leader.task_types import Command, Copy
from kvstore.leader.tasks import COMMAND_S
from mooncake.core.errors import MooncakeError
from mooncake.core.messages import DropKeys, KeysDropped, Pull, Pulled, StoreRequest, Term

log = structlog.get_logger(__name__)

PULL_WAIT_S = 3.0
"""A copy of 32 blocks of 3 MB takes 80 ms on a fast link, a second on a slow one that is in use."""
PULL_S = PULL_WAIT_S + 1.0
DROP_S = 2.0

Ask = Callable[[str, StoreRequest, type[Any], float], Awaitable[Any]]
"""As StoreClients.ask: node, request, kind of its answer, deadline."""
_Way = tuple[str, str]
"""Source and target of copies; "" and the node of drops."""
Results = Callable[[Sequence[tuple[int, str]]], None]
"""Told (command id, error), "" = done."""


class Observer(Protocol):
    """Hears of every request that was made."""

    def __call__(self, command: str, result: str, commands: int, seconds: float) -> None:
        """Take a `command` (copy, drop) with its `result` (ok, failed), for so many commands at once."""


class Executor:
    """Runs commands until closed; results come later, by `results`, on the same loop."""

    def __init__(
        self,
        ask: Ask,
        orders: Callable[[], Term | None],
        results: Results,
        observe: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs yet.

        Args:
            ask: sends a request to a store.
            orders: in whose name; None = the term is over, send nothing.
            results: called once for every command, unless the term or this object ended first.
            observe: for metrics.
            clock: monotonic seconds.
        """
        self._ask = ask
        self._orders = orders
        self._results = results
        self._observe = observe
        self._clock = clock
        self._waiting: dict[_Way, list[tuple[float, Command]]] = {}  # ways with a request under way
        self._running: set[asyncio.Task[None]] = set()

    def run(self, commands: Sequence[Command]) -> None:
        """Begin to carry out `commands`."""
        now_s = self._clock()
        for command in commands:
            way = (command.source, command.target) if isinstance(command, Copy) else ("", command.node)
            if way not in self._waiting:
                self._waiting[way] = []
                task = asyncio.create_task(self._serve(*way), name=f"commands to {way[1]}")
                self._running.add(task)
                task.add_done_callback(self._ended)
            self._waiting[way].append((now_s, command))

    async def _serve(self, source: str, node: str) -> None:
        """Carry out what waits for one way, until nothing does."""
        way = (source, node)
        try:
            while group := self._waiting[way]:
                self._waiting[way] = []
                # nothing runs that is not awaited any more
                begin_s = self._clock() - (COMMAND_S - (PULL_S if source else DROP_S))
                late = [command for since_s, command in group if since_s < begin_s]
                if late:
                    self._results([(command.command_id, f"{node} is too slow") for command in late])
                in_time = [command for since_s, command in group if since_s >= begin_s]
                if in_time:
                    await self._carry_out(source, node, in_time)
        finally:
            del self._waiting[way]

    async def _carry_out(self, source: str, node: str, group: Sequence[Command]) -> None:
        orders = self._orders()
        if orders is None:
            return
        begun_s = self._clock()
        keys = [command.key for command in group]
        try:
            if source:
                errors = await self._pull(keys, source, node, orders)
            else:
                await self._ask(node, DropKeys(keys, orders), KeysDropped, DROP_S)
                errors = [""] * len(keys)
        except MooncakeError as error:
            errors = [str(error) or type(error).__name__] * len(keys)
        self._tell("copy" if source else "drop", errors, self._clock() - begun_s)
        self._results([(command.command_id, error) for command, error in zip(group, errors, strict=True)])

    async def _pull(self, keys: list[bytes], source: str, node: str, orders: Term) -> list[str]:
        pulled: Pulled = await self._ask(node, Pull(keys, source, PULL_WAIT_S, orders), Pulled, PULL_S)
        held = [*pulled.held, *[False] * len(keys)][: len(keys)]
        return ["" if there else f"{node} did not get it from {source}" for there in held]

    def _tell(self, command: str, errors: Sequence[str], seconds: float) -> None:
        failed = len([error for error in errors if error])
        for result, count in (("ok", len(errors) - failed), ("failed", failed)):
            if count and self._observe:
                self._observe(command, result, count, seconds)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("command.died", exc_info=error)

    async def close(self) -> None:
        """Stop at once (idempotent): what was sent may still be done, nobody hears of it."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
