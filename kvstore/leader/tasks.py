"""Copies, moves, drains and hot replicas as a pure state machine: events in, commands out (DESIGN 6).

Every key of a task is a step that looks at the directory, does one thing towards its goal, and looks
again; so a step may be repeated, lost or told twice, and a restarted machine given the same tasks
finishes them. A node's own copy is dropped only after a copy elsewhere was confirmed: by the copy's
result, or by a directory entry in step, and no task of this machine dropped that one or is about to
(one command per key at a time). The other node may evict it a moment later: a cache may.

    queued --look--> done | copying or dropping --done--> queued
       ^                          '--failed, late, node left--> waiting (RETRIES_MAX times) --> failed
       '---------------------------------------------------------'

Hot keys are standing goals: `keep_hot` names them, every tick looks at some of them, and one that
lost a replica is copied again. Whoever runs the commands answers with `on_result`; an answer that
comes twice, or after its deadline, is ignored. Only the leader of the mutating API runs this.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Sequence

import msgspec

from kvstore.directory.event_stream import SILENCE_S
from kvstore.leader.placement import COPIES_MAX, Placer
from kvstore.leader.steps import CopyTo, DropFrom, Reached, Step, Steps, Stuck, Task, Wish
from kvstore.leader.task_types import Command, Copy, Drop, Kind, Locations, Progress, State
from mooncake.core.errors import CapacityError, RequestError

RUNNING_MAX = 256
"""Commands at once: 800 MB of 3 MB blocks on their way in the whole pool, next to the traffic of users."""
PER_NODE_MAX = 32
"""Of those, as many touch one node: they travel in one or two requests, whose blocks are read 16 MB at a
time. A drain must not take a node's links from its engines."""
COMMAND_S = 10.0
"""A copy of one block takes milliseconds; after this its result is not awaited any more."""
RETRIES_MAX = 5
"""Attempts after the first one: over RETRY_S * (1+2+4+8+16) a restart of a node is survived."""
RETRY_S = 0.5
"""First pause of a step that failed; it doubles."""
TASKS_MAX = 64
"""Open tasks: there are as many operators and planners."""
FINISHED_MAX = 256
"""Ended tasks whose progress can still be asked for."""
KEYS_MAX = 1 << 22
"""Keys of one task: four full nodes of 1 M blocks."""
DROPPED_S = 10.0
"""A dropped copy is no reason to drop another one, for this long: more than an index in step can lag.
A confirmed copy counts without the index as long, not longer: another task may have dropped it since."""
HOT_MAX = 65_536
"""Standing goals: 200 GB of 3 MB blocks; beyond that it is not a hot spot."""
HOT_NODES_MAX = 64
"""Nodes that one wish may name: a few for each of COPIES_MAX copies."""
HOT_PER_TICK = 2_048
"""Standing goals looked at in one tick: 2 ms; all of them in 32 ticks."""
HOT_REST_S = 10.0
"""A hot key whose copy failed for good is left alone for this long."""
ROUNDS_MAX = 8
"""A drained node is listed again for blocks that came meanwhile, at most this often."""
ROUND_S = SILENCE_S + 1.0
"""Before each such listing the directory was in step for this long: whatever was lost has shown by then."""
LOOKS_MAX = 4_096
"""Steps looked at in one call: 20 ms, when none of them has anything left to do."""


class _Running(msgspec.Struct, frozen=True):
    step: Step
    command: Command


class Tasks:
    """Turns wishes into bounded, repeated copies and drops. Drive it with `tick` and `on_result`."""

    def __init__(self, locations: Locations, placer: Placer, running_max: int = RUNNING_MAX) -> None:
        """`locations` and `placer` are kept up to date by others."""
        self._locations = locations
        self._placer = placer
        self._running_max = running_max
        self._ids = itertools.count(1)
        self._open: OrderedDict[int, Task] = OrderedDict()
        self._ended: OrderedDict[int, Progress] = OrderedDict()
        self._running: dict[int, _Running] = {}
        self._deadlines: deque[tuple[float, int]] = deque()  # ascending; may hold ended commands
        self._load: dict[str, int] = {}  # node -> commands that touch it
        self._touched: dict[bytes, None] = {}  # keys of running commands
        self._steps = Steps(locations, placer)
        self._dropped = self._steps.dropped
        self._waiting: list[tuple[float, int, Step]] = []  # heap of steps that pause
        self._hot = self._steps.wishes
        self._hot_busy: dict[bytes, None] = {}  # being copied, or resting after a failure
        self._hot_round: deque[bytes] = deque()
        self._now_s = 0.0
        self._hot_task = Task(0, Kind.HOT, Kind.HOT, "", "", 0, deque(), deque())

    # ------------------------------------------------------------ wishes

    def copy(self, keys: Sequence[bytes], target: str, *, task_id: int = 0) -> int:
        """Have every key on `target`, from wherever it is; returns the task's id.

        `target` is a node, or several with "," between: then every key goes to each of them. Asking again
        for what an open task does returns that task. Raises as `drain`; RequestError also for too many keys.
        `task_id` names a new task (another leader knew it by it); 0 = the next one.
        """
        return self._add(Kind.COPY, keys, "", target, 1, task_id)

    def move(self, keys: Sequence[bytes], source: str, target: str, *, task_id: int = 0) -> int:
        """Have every key on `target` and not on `source`; raises as `copy`."""
        if source == target:
            raise RequestError(f"cannot move from {source} to itself")
        return self._add(Kind.MOVE, keys, source, target, 1, task_id)

    def drain(self, node: str, size_bytes: int, *, task_id: int = 0) -> int:
        """Place nothing on `node` any more and have all its blocks elsewhere.

        Args:
            node: it is empty, as far as an index in step knows, or gone, when the task is DONE. A
                writer that had reserved before may still commit: look again after WRITE_S_MAX.
            size_bytes: of a block, to choose nodes that can take it.
            task_id: as of `copy`.

        Raises:
            CapacityError: too many open tasks.
        """
        # before the listing: what the placer gives out from here on is elsewhere
        self._placer.drain(node)
        return self._add(Kind.DRAIN, self._locations.keys_of(node), node, "", size_bytes, task_id)

    def undrain(self, node: str) -> None:
        """Let blocks be placed on `node` again; a drain of it that is open ends (idempotent)."""
        for task in list(self._open.values()):
            if task.kind is Kind.DRAIN and task.source == node:
                self.cancel(task.task_id)
        self._placer.drain(node, on=False)

    def keep_hot(
        self,
        keys: Sequence[bytes],
        copies: int,
        size_bytes: int,
        nodes: Sequence[str] = (),
        until_s: float = math.inf,
    ) -> None:
        """Keep `copies` replicas of each key until `forget_hot`; replaces an earlier wish for a key.

        Args:
            keys: the blocks.
            copies: of each.
            size_bytes: of a block.
            nodes: only copies on these count; the first come first. None = any node.
            until_s: when the wish ends by itself.

        Raises:
            RequestError: a count of copies that makes no sense.
            CapacityError: too many hot keys; none was taken.
        """
        if not 1 < copies <= COPIES_MAX:
            raise RequestError(f"copies={copies}: must be 2 to {COPIES_MAX}")
        fresh = [key for key in dict.fromkeys(keys) if key not in self._hot]
        if len(self._hot) + len(fresh) > HOT_MAX:
            raise CapacityError(f"{len(self._hot)} hot keys: at most {HOT_MAX}")
        if len(nodes) > HOT_NODES_MAX:
            raise RequestError(f"{len(nodes)} nodes for hot keys: at most {HOT_NODES_MAX}")
        wish = Wish(copies, size_bytes, tuple(nodes), until_s)
        for key in keys:
            self._hot[key] = wish
        self._hot_round.extend(fresh)

    def forget_hot(self, keys: Sequence[bytes]) -> None:
        """End standing goals; replicas stay until they are evicted."""
        for key in keys:
            self._hot.pop(key, None)

    def cancel(self, task_id: int) -> bool:
        """End an open task; commands that run are not awaited. False: there is none."""
        task = self._open.get(task_id)
        if task is None:
            return False
        for command_id, running in list(self._running.items()):
            if running.step.task is task:
                self._end_command(command_id)
        self._finish(task, State.CANCELLED)
        return True

    def progress(self, task_id: int) -> Progress | None:
        """Return how far a task is; task 0 is all hot keys. None: unknown, or ended long ago."""
        task = self._hot_task if task_id == 0 else self._open.get(task_id)
        return self._ended.get(task_id) if task is None else _progress(task)

    def all_progress(self) -> list[Progress]:
        """Return every task: hot keys, ended ones, open ones."""
        ended = [progress for progress in self._ended.values() if progress.task_id not in self._open]
        return [_progress(self._hot_task), *ended, *(_progress(task) for task in self._open.values())]

    @property
    def hot_keys(self) -> int:
        """How many standing goals there are."""
        return len(self._hot)

    @property
    def busy(self) -> bool:
        """Whether any task is open or any step of a hot key is on its way."""
        return bool(self._open or self._running or self._hot_task.open)

    # ------------------------------------------------------------ events

    def on_result(self, now_s: float, command_id: int, error: str = "") -> list[Command]:
        """Take the result of a command (`error` says why it failed); return what follows."""
        self._now_s = now_s
        running = self._end_command(command_id)
        if running is not None:
            step = running.step
            if error:
                self._retry(now_s, step, error)
            else:
                if isinstance(running.command, Copy):
                    step.confirmed += ((running.command.target, now_s + DROPPED_S),)
                    self._dropped.pop((step.key, running.command.target), None)
                self._proceed(step, dropped=isinstance(running.command, Drop))
        return self._dispatch(now_s)

    def on_leave(self, now_s: float, node: str) -> list[Command]:
        """A node is gone: its commands fail now, and hot keys are looked at again."""
        self._now_s = now_s
        for command_id, running in list(self._running.items()):
            if node in _nodes(running.command):
                self._end_command(command_id)
                self._retry(now_s, running.step, f"{node} left")
        for step in self._begun():
            step.confirmed = tuple(copy for copy in step.confirmed if copy[0] != node)
        return self._dispatch(now_s)

    def tick(self, now_s: float) -> list[Command]:
        """Do what is due: late commands fail, pauses end, hot keys are looked at."""
        self._now_s = now_s
        while self._deadlines and self._deadlines[0][0] <= now_s:
            late = self._end_command(self._deadlines.popleft()[1])
            if late is not None:
                self._retry(now_s, late.step, f"no result within {COMMAND_S:g} s")
        while self._dropped and next(iter(self._dropped.values())) <= now_s:
            self._dropped.popitem(last=False)
        while self._waiting and self._waiting[0][0] <= now_s:
            step = heapq.heappop(self._waiting)[2]
            if step.task is self._hot_task and step.attempts > RETRIES_MAX:
                self._hot_busy.pop(step.key, None)  # it has rested
            elif step.task.state is State.RUNNING:
                step.task.queue.append(step)
        self._look_at_hot(now_s)
        for task in list(self._open.values()):
            if task.kind is Kind.DRAIN:
                self._relist(now_s, task)
            else:
                self._end_if_empty(task)
        return self._dispatch(now_s)

    # ------------------------------------------------------------ steps

    def _dispatch(self, now_s: float) -> list[Command]:
        """Start what may start, one step of each task in turn."""
        commands: list[Command] = []
        looks = LOOKS_MAX
        tasks = deque(task for task in [self._hot_task, *self._open.values()] if task.queue or task.fresh)
        while tasks and looks and len(self._running) < self._running_max:
            looks -= 1
            task = tasks.popleft()
            step = task.queue.popleft() if task.queue else Step(task, task.fresh.popleft())
            command = self._start(now_s, step)
            if command is not None:
                commands.append(command)
            put_back = task.queue and task.queue[0] is step  # its nodes or its key are busy
            if not put_back and (task.queue or task.fresh):
                tasks.append(task)
        return commands

    def _start(self, now_s: float, step: Step) -> Command | None:
        decision = self._steps.decide(now_s, step)
        command: Command
        match decision:
            case Reached():
                self._proceed(step, dropped=True)
                return None
            case Stuck(reason):
                self._retry(now_s, step, reason)
                return None
            case CopyTo(source, target):
                command = Copy(next(self._ids), step.key, source, target)
            case DropFrom(node):
                command = Drop(next(self._ids), step.key, node)
        full = any(self._load.get(node, 0) >= PER_NODE_MAX for node in _nodes(command))
        if full or step.key in self._touched:
            step.task.queue.appendleft(step)
            return None
        for node in _nodes(command):
            self._load[node] = self._load.get(node, 0) + 1
        self._touched[step.key] = None
        if isinstance(command, Drop):
            self._dropped[step.key, command.node] = now_s + DROPPED_S
            self._dropped.move_to_end((step.key, command.node))
        self._running[command.command_id] = _Running(step, command)
        self._deadlines.append((now_s + COMMAND_S, command.command_id))
        return command

    def _proceed(self, step: Step, *, dropped: bool) -> None:
        """One thing of a step is done: a drop is the last thing of every step, so is a copy to one node."""
        task = step.task
        if not dropped and (task.kind is not Kind.COPY or "," in task.target):
            task.queue.append(step)
            return
        task.done += 1
        self._close(step)

    def _retry(self, now_s: float, step: Step, reason: str) -> None:
        task = step.task
        step.attempts += 1
        task.reason = reason
        pause_s = RETRY_S * 2 ** (step.attempts - 1)
        if step.attempts > RETRIES_MAX:
            task.failed += 1
            pause_s = HOT_REST_S
            self._close(step, rest=True)
            if task.kind is not Kind.HOT:
                return
        heapq.heappush(self._waiting, (now_s + pause_s, next(self._ids), step))

    def _close(self, step: Step, *, rest: bool = False) -> None:
        task = step.task
        task.open -= 1
        task.updated_s = self._now_s
        if task.kind is Kind.HOT and not rest:
            self._hot_busy.pop(step.key, None)
        self._end_if_empty(task)

    # ------------------------------------------------------------ tasks

    def _add(
        self, kind: Kind, keys: Sequence[bytes], source: str, target: str, size_bytes: int, task_id: int
    ) -> int:
        if len(keys) > KEYS_MAX:
            raise RequestError(f"{len(keys)} keys in one task: at most {KEYS_MAX}")
        # a drain's keys change while it runs: it is the same drain
        what = (kind, source, target, () if kind is Kind.DRAIN else tuple(keys))
        for task in self._open.values():
            if task.what == what:
                return task.task_id
        if len(self._open) >= TASKS_MAX:
            raise CapacityError(f"{len(self._open)} tasks are open: at most {TASKS_MAX}")
        task = Task(task_id or next(self._ids), kind, what, source, target, size_bytes, deque(), deque())
        task.created_s = task.updated_s = self._now_s
        self._open[task.task_id] = task
        self._queue(task, keys)
        return task.task_id

    def _queue(self, task: Task, keys: Sequence[bytes]) -> None:
        before = len(task.fresh)
        task.fresh.extend(keys if task.kind is Kind.DRAIN else dict.fromkeys(keys))
        task.open += len(task.fresh) - before
        task.total += len(task.fresh) - before

    def _end_if_empty(self, task: Task) -> None:
        if task.kind not in (Kind.HOT, Kind.DRAIN) and not task.open and task.state is State.RUNNING:
            self._finish(task, State.FAILED if task.failed else State.DONE)

    def _relist(self, now_s: float, task: Task) -> None:
        """End a drain whose node is empty; blocks that came meanwhile are drained, too."""
        if task.open:
            task.relist_s = math.inf
        elif task.failed:
            self._finish(task, State.FAILED)
        elif task.relist_s == math.inf or not self._locations.is_exact(task.source):
            task.relist_s = now_s + ROUND_S
        elif now_s >= task.relist_s:
            task.rounds += 1
            left = self._locations.keys_of(task.source)
            if left and task.rounds < ROUNDS_MAX:
                self._queue(task, left)
            else:
                task.reason = f"{len(left)} blocks left after {ROUNDS_MAX} rounds" if left else ""
                self._finish(task, State.FAILED if left else State.DONE)

    def _finish(self, task: Task, state: State) -> None:
        task.state = state
        task.updated_s = self._now_s
        task.queue.clear()
        task.fresh.clear()
        del self._open[task.task_id]
        self._ended[task.task_id] = _progress(task)
        while len(self._ended) > FINISHED_MAX:
            self._ended.popitem(last=False)

    def _look_at_hot(self, now_s: float) -> None:
        for _ in range(min(HOT_PER_TICK, len(self._hot_round))):
            key = self._hot_round.popleft()
            wish = self._hot.get(key)
            if wish is None:
                continue
            if wish.until_s <= now_s:
                del self._hot[key]
                continue
            self._hot_round.append(key)
            if key in self._hot_busy:
                continue
            step = Step(self._hot_task, key)
            if not isinstance(self._steps.decide(now_s, step), Reached):
                self._hot_busy[key] = None
                self._hot_task.queue.append(step)
                self._hot_task.open += 1
                self._hot_task.total += 1

    def _end_command(self, command_id: int) -> _Running | None:
        running = self._running.pop(command_id, None)
        if running is not None:
            del self._touched[running.step.key]
            for node in _nodes(running.command):
                self._load[node] -= 1
                if not self._load[node]:
                    del self._load[node]
        return running

    def _begun(self) -> list[Step]:
        """Return every step that was begun and has not ended."""
        queued = [step for task in [self._hot_task, *self._open.values()] for step in task.queue]
        return [*queued, *(step for _, _, step in self._waiting), *(r.step for r in self._running.values())]


def _nodes(command: Command) -> tuple[str, ...]:
    return (command.source, command.target) if isinstance(command, Copy) else (command.node,)


def _progress(task: Task) -> Progress:
    return Progress(
        *(task.task_id, task.kind, task.state, task.total, task.done, task.failed, task.reason),
        *(task.source, task.target, task.created_s, task.updated_s),
    )
