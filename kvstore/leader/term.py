"""What a directory does while it leads: tasks, orders to stores, and the book of what was asked for.

One object lives for one term. Its orders carry the term; they stop with it, and stores refuse those of
an earlier term. A new leader waits until its directory is exact (SETTLE_S at most), then takes up what
the book has: every step of a task looks before it does anything, so nothing is done twice.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from kvstore.directory import messages
from kvstore.directory.directory import Directory, Mode
from kvstore.leader.executor import Executor, Observer
from kvstore.leader.placement import Placer, Room
from kvstore.leader.store_clients import StatsPoll, StoreClients
from kvstore.leader.task_book import Booked, TaskBook, TaskEntry, drain_key
from kvstore.leader.task_types import Command, Kind, Progress, State
from kvstore.leader.tasks import Tasks
from kvstore.limits import check_keys
from mooncake.core.errors import MooncakeError, NotLeader, PeerError, RequestError
from mooncake.core.messages import Ok, StoreStats, Term
from mooncake.core.metadata import MetadataStore

log = structlog.get_logger(__name__)

TICK_S = 0.1
"""Retries, deadlines and hot keys are looked at this often; results are acted on at once."""
SETTLE_S = 15.0
"""A directory of 1 M blocks is exact after 2 s. One dead node must not hold up all tasks for longer."""
BOOK_S = 5.0
"""The book is read again this often: an entry may have come late from a leader that was about to go."""


class LeaderTerm:
    """`run` until the term is over, then `close`. All methods run on one loop."""

    def __init__(
        self,
        term: Term,
        leads: Callable[[], bool],
        directory: Directory,
        look: Callable[[], None],
        clients: StoreClients,
        polls: StatsPoll,
        metadata: MetadataStore,
        observe: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing happens before `run`.

        Args:
            term: in whose name orders are given.
            leads: whether the term lasts at this moment; asked before each deed.
            directory: fed by others.
            look: tells `directory` whether all members are known.
            clients: to reach stores.
            polls: what stores say of themselves.
            metadata: keeps the book; not closed here.
            observe: for metrics.
            clock: monotonic seconds.
            wall_clock: for the times that answers give.
        """
        self.term = term
        self.placer = Placer()
        self.tasks = Tasks(directory, self.placer)
        self._leads = leads
        self._directory = directory
        self._look = look
        self._polls = polls
        self._clock = clock
        self._epoch_s = wall_clock() - clock()
        self._book = TaskBook(metadata)
        self._booked: dict[int, str] = {}  # task -> where it is kept
        self._book_turn = asyncio.Lock()  # the book and `_booked` change together
        self._seen: dict[str, StoreStats] = {}  # what the placer knows of each node
        self._executor = Executor(
            clients.ask, lambda: term if leads() else None, self._on_results, observe, clock
        )

    async def run(self) -> None:
        """Act until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_time(), name="leader beat")
            group.create_task(self._keep_book(), name="leader book")

    async def close(self) -> None:
        """Give no more orders (idempotent)."""
        await self._executor.close()

    def on_leave(self, node: str) -> None:
        """A node's lease has ended and its replicas were dropped."""
        self.placer.leave(node)
        self._seen.pop(node, None)
        self._perform(self.tasks.on_leave(self._clock(), node))

    # ------------------------------------------------------------ requests

    async def handle(self, request: messages.TaskRequest) -> messages.TaskReply:
        """Answer.

        Raises:
            RequestError: it makes no sense; CapacityError: too many tasks.
            NotLeader: the term has just ended. PeerError: the metadata store is away.
        """
        match request:
            case messages.CopyKeys(keys, target):
                self._check(keys, *target.split(","))
                return await self._begin(TaskEntry(Kind.COPY, keys, "", target, 0))
            case messages.MoveKeys(keys, source, target):
                self._check(keys, source, target)
                if source == target:
                    raise RequestError(f"cannot move from {source} to itself")
                return await self._begin(TaskEntry(Kind.MOVE, keys, source, target, 0))
            case messages.DrainNode(node, size_bytes):
                self._check([], node)
                size_bytes = size_bytes or self._block_bytes(node)
                return await self._begin(TaskEntry(Kind.DRAIN, [], node, "", size_bytes))
            case messages.UndrainNode(node):
                async with self._book_turn:
                    await self._undrain(node)
            case messages.KeepHot():
                self._keep_hot(request)
            case messages.ForgetHot(keys):
                self._check(keys)
                self.tasks.forget_hot(keys)
            case messages.TaskProgress(task_id):
                return messages.TasksAre(self._progress(task_id), self.term.life)
            case messages.CancelTask(task_id):
                async with self._book_turn:
                    await self._cancel(task_id)
        return Ok()

    def _keep_hot(self, wish: messages.KeepHot) -> None:
        self._check(wish.keys)  # its nodes may have left, or not have come yet
        if not 0 <= wish.ttl_s < math.inf:
            raise RequestError(f"ttl_s={wish.ttl_s}: must be seconds, or 0 = until ForgetHot")
        until_s = self._clock() + wish.ttl_s if wish.ttl_s else math.inf
        self.tasks.keep_hot(wish.keys, wish.copies, max(1, wish.size_bytes), wish.nodes, until_s)

    def _check(self, keys: list[bytes], *nodes: str) -> None:
        check_keys(keys)
        known = [status.node for status in self._directory.status(self._clock())]
        for node in nodes:
            if node not in known:
                raise RequestError(f"no node {node!r} in the pool: one of {', '.join(known) or '(none)'}")

    def _progress(self, task_id: int | None) -> list[Progress]:
        one = None if task_id is None else self.tasks.progress(task_id)
        found = self.tasks.all_progress() if task_id is None else [one] if one else []
        return [
            msgspec.structs.replace(
                task, created_s=task.created_s + self._epoch_s, updated_s=task.updated_s + self._epoch_s
            )
            for task in found
        ]

    async def _begin(self, entry: TaskEntry) -> messages.TaskStarted:
        async with self._book_turn:
            task_id = await self._book.add(entry)
            if not self._leads():
                # the next leader finds it in the book; whoever asked may ask there, and gets the same task
                raise NotLeader("the term has just ended: ask the next leader")
            try:
                self._start(Booked(task_id, entry))
            except MooncakeError:
                await self._book.remove(entry.key)
                raise
        return messages.TaskStarted(task_id, self.term.life)

    def _start(self, booked: Booked) -> None:
        entry, tasks = booked.entry, self.tasks
        match entry.kind:
            case Kind.COPY:
                tasks.copy(entry.keys, entry.target, task_id=booked.task_id)
            case Kind.MOVE:
                tasks.move(entry.keys, entry.source, entry.target, task_id=booked.task_id)
            case _:
                tasks.drain(entry.source, max(1, entry.size_bytes), task_id=booked.task_id)
        self._booked[booked.task_id] = entry.key

    async def _undrain(self, node: str) -> None:
        await self._book.remove(drain_key(node))
        self.tasks.undrain(node)
        for task_id in [task_id for task_id, key in self._booked.items() if key == drain_key(node)]:
            del self._booked[task_id]

    async def _cancel(self, task_id: int) -> None:
        key = self._booked.get(task_id)
        if key is None:
            raise RequestError(f"no open task {task_id}")
        if key.startswith(drain_key("")):
            await self._undrain(key.removeprefix(drain_key("")))
            return
        await self._book.remove(key)
        self.tasks.cancel(task_id)
        self._booked.pop(task_id, None)

    def _block_bytes(self, node: str) -> int:
        """Return how large a block of `node` is on average; 1 if nobody knows."""
        stats = self._polls.stats.get(node)
        return -(-stats.used_bytes // stats.blocks) if stats and stats.blocks else 1

    # ------------------------------------------------------------ time

    async def _keep_time(self) -> None:
        while True:
            self._look()
            self._take_reports()
            self._perform(self.tasks.tick(self._clock()))
            await asyncio.sleep(TICK_S)

    def _take_reports(self) -> None:
        for node, stats in self._polls.stats.items():
            if self._seen.get(node) is not stats:  # a new one
                self._seen[node] = stats
                free_bytes = max(0, stats.capacity_bytes - stats.used_bytes)
                self.placer.update(Room(node, stats.capacity_bytes, free_bytes))

    def _perform(self, commands: list[Command]) -> None:
        if commands and self._leads():
            self._executor.run(commands)

    def _on_results(self, results: Sequence[tuple[int, str]]) -> None:
        commands: list[Command] = []
        for command_id, error in results:
            commands += self.tasks.on_result(self._clock(), command_id, error)
        self._perform(commands)

    # ------------------------------------------------------------ the book

    async def _keep_book(self) -> None:
        end_s = self._clock() + SETTLE_S
        while self._directory.mode() is not Mode.EXACT and self._clock() < end_s:
            await asyncio.sleep(TICK_S)
            self._look()
        next_s = self._clock()
        while True:
            try:
                async with self._book_turn:
                    if self._clock() >= next_s:
                        await self._take_up()
                        next_s = self._clock() + BOOK_S
                    await self._cross_out()
            except MooncakeError as error:
                if not isinstance(error, PeerError):  # that one its client tells once
                    log.warning("tasks.book_away", error=str(error))
                next_s = self._clock() + BOOK_S
            await asyncio.sleep(TICK_S)

    async def _take_up(self) -> None:
        for booked in await self._book.entries():
            if booked.task_id not in self._booked and self._leads():
                log.info("tasks.taken_up", task=booked.task_id, kind=booked.entry.kind)
                try:
                    self._start(booked)
                except MooncakeError as error:
                    log.warning("tasks.not_taken_up", task=booked.task_id, error=str(error))

    async def _cross_out(self) -> None:
        """Take what has ended out of the book; drained nodes stay in it."""
        for task_id, key in list(self._booked.items()):
            progress = self.tasks.progress(task_id)
            over = progress is None or progress.state is not State.RUNNING
            if over and not key.startswith(drain_key("")) and self._leads():
                await self._book.remove(key)
                self._booked.pop(task_id, None)
