"""Copies and moves of single objects, as tasks of the pool's directory, under upstream's names.

`mooncake_master` is a directory, so is `mooncake directory`: the one that leads carries the task out, another
one that leads after it finishes it. A task is called by two numbers: which life of the metadata store it
belongs to, and its number there; so any client may ask for it, and a restarted master knows none of before.
"""

import time
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, TypeVar

import structlog

from kvstore.client.object_names import object_key
from kvstore.directory.messages import (
    CopyKeys,
    DirectoryReply,
    MoveKeys,
    TaskProgress,
    TaskRequest,
    TasksAre,
    TaskStarted,
)
from kvstore.leader.task_types import Kind, Progress, State
from mooncake.core.errors import MooncakeError, NotLeader, PeerError, PeerGone, RequestError
from mooncake.core.rpc import BlockingRpcClient
from mooncake.dropin.store.answers import code_of
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.settings import node_of
from mooncake.dropin.store.types import (
    OBJECT_NOT_FOUND,
    OK,
    TASK_NOT_FOUND,
    QueryTaskResponse,
    TaskId,
    TaskStatus,
    TaskType,
)

ASK_S = 5.0
"""For one order, with the change of a leader in between."""
ANSWER_S = 2.0
"""For one directory: it writes what it is to do into the metadata store, which takes milliseconds."""
PAUSE_S = 0.1
"""Between two rounds over directories of which none leads."""
TARGETS_MAX = 8
"""As many copies as an object can have."""
NO_TASK: TaskId = (0, 0)
DONE_TEXT = "Task completed successfully"

log = structlog.get_logger(__name__)
T = TypeVar("T", TaskStarted, TasksAre)


class TaskForms:
    """The methods, under upstream's names."""

    def _need(self) -> Calls:
        raise NotImplementedError

    def create_copy_task(self, key: str, targets: Sequence[str]) -> tuple[TaskId, int]:
        """Copy an object to segments: (name of the task, 0); -704: no such object, -600: no such segment."""
        return self._create(key, None, list(targets))

    def create_move_task(self, key: str, source: str, target: str) -> tuple[TaskId, int]:
        """Move an object between segments; answers as create_copy_task; -600 also: it is not on `source`."""
        return self._create(key, source, [target])

    def _create(self, key: str, source: str | None, targets: list[str]) -> tuple[TaskId, int]:
        try:
            return self._started(key, source, targets)
        except MooncakeError as error:
            log.error("mooncake.store: no task", key=key, reason=str(error))
            return NO_TASK, code_of(error)

    def _started(self, key: str, source: str | None, targets: list[str]) -> tuple[TaskId, int]:
        calls = self._need()
        nodes = list(dict.fromkeys(node_of(segment) for segment in targets))
        if not 1 <= len(nodes) <= TARGETS_MAX or not all(nodes):
            raise RequestError(f"targets {targets}: 1 to {TARGETS_MAX} segments")
        (places,) = calls.places([key])
        if not places:
            return NO_TASK, OBJECT_NOT_FOUND
        keys = [object_key(key, calls.tenant)]
        order: TaskRequest = CopyKeys(keys, ",".join(nodes))
        if source is not None:
            if node_of(source) not in [place.node for place in places]:
                raise RequestError(f"{key} is not on {source}")
            order = MoveKeys(keys, node_of(source), nodes[0])
        started = ask_leader(calls, order, TaskStarted)
        return (life_number(started.life), started.task_id), OK

    def query_task(self, task_id: TaskId) -> tuple[QueryTaskResponse | None, int]:
        """Return (how far a task is, 0), or (None, -1400): no such task."""
        life, number = task_id
        if not isinstance(life, int) or not isinstance(number, int):
            raise TypeError(f"a task is called by two numbers, not {task_id!r}")
        try:
            found = ask_leader(self._need(), TaskProgress(number), TasksAre) if number > 0 else None
        except MooncakeError as error:
            log.error("mooncake.store: task not asked for", task=task_id, reason=str(error))
            return None, code_of(error)
        if found is None or life_number(found.life) != life:
            return None, TASK_NOT_FOUND
        known = [task for task in found.tasks if task.kind in (Kind.COPY, Kind.MOVE)]
        return (response(task_id, known[0]), OK) if known else (None, TASK_NOT_FOUND)


def ask_leader(calls: Calls, request: TaskRequest, kind: type[T]) -> T:
    """Return what the directory that leads answers.

    Raises:
        RequestError: it refuses, or the pool has no directory. PeerError: none answers, or none leads.
    """
    end_s = time.monotonic() + ASK_S
    last: MooncakeError | None = None
    while True:
        for endpoint in list(calls.pool.directories.values()):
            try:
                return _ask(endpoint, request, kind, end_s)
            except (NotLeader, PeerError) as error:  # another one may lead by now
                last = error
        if time.monotonic() + PAUSE_S >= end_s:
            break
        time.sleep(PAUSE_S)
    if not calls.started.background.has_master():
        raise PeerGone(f"the master is away: {last or 'no directory'}")
    if last is None:
        raise RequestError(
            "this pool has no directory to do it: start mooncake_master or `mooncake directory`"
        )
    raise PeerGone(f"no directory does it: {last}")


def _ask(endpoint: str, request: TaskRequest, kind: type[T], end_s: float) -> T:
    client = BlockingRpcClient(endpoint, DirectoryReply)
    try:
        reply: Any = client.call(request, max(0.0, min(ANSWER_S, end_s - time.monotonic())))
    finally:
        client.close()
    if not isinstance(reply, kind):
        raise PeerGone(f"directory {endpoint}: no answer to this request: {type(reply).__name__}")
    return reply


def life_number(life: str) -> int:
    """Return the first half of what tasks of one life of the metadata store are called."""
    return uuid_of(life)[0]


def uuid_of(text: str) -> TaskId:
    """Return two numbers of 64 bits that stand for `text`."""
    digest = sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def response(task_id: TaskId, task: Progress) -> QueryTaskResponse:
    """Return upstream's form of how far a task is."""
    status = {
        State.RUNNING: TaskStatus.PROCESSING, State.DONE: TaskStatus.SUCCESS,
        State.FAILED: TaskStatus.FAILED, State.CANCELLED: TaskStatus.FAILED,
    }[task.state]  # fmt: skip
    answer = QueryTaskResponse()
    answer.id = task_id
    answer.type = TaskType.REPLICA_COPY if task.kind is Kind.COPY else TaskType.REPLICA_MOVE
    answer.status = status
    answer.created_at_ms_epoch = int(task.created_s * 1000)
    answer.last_updated_at_ms_epoch = int(task.updated_s * 1000)
    answer.assigned_client = uuid_of(task.target)
    answer.message = DONE_TEXT if status is TaskStatus.SUCCESS else task.reason
    if task.state is State.CANCELLED:
        answer.message = "cancelled"
    return answer
