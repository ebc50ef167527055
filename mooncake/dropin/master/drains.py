"""Drain jobs in upstream's shape, over the drain tasks of the directory that this master runs."""

import asyncio
import re
import secrets
import time
from collections.abc import Callable

import msgspec

from kvstore.directory.messages import (
    CancelTask,
    DrainNode,
    TaskProgress,
    TaskReply,
    TaskRequest,
    TasksAre,
    TaskStarted,
)
from kvstore.leader.coordinator import Coordinator
from kvstore.leader.task_types import Progress, State
from mooncake.core.errors import MooncakeError, NotLeader, RequestError

JOBS_MAX = 1_024
"""Ended ones are forgotten first, oldest first."""
LEAD_S = 5.0
"""A directory that has just begun leads within a lease; asked meanwhile, it waits."""
LOOK_S = 0.1
JOB_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

STATUS = {State.RUNNING: 2, State.DONE: 3, State.FAILED: 4, State.CANCELLED: 5}
NAMES = {2: "RUNNING", 3: "SUCCEEDED", 4: "FAILED", 5: "CANCELED"}
MESSAGES = {
    2: "Drain job running",
    3: "Drain job finished successfully",
    4: "Drain job failed",
    5: "Drain job canceled",
}


class Busy(msgspec.Struct, frozen=True):
    """The job cannot be begun or ended as things are; upstream's UNAVAILABLE_IN_CURRENT_STATUS."""


class Job(msgspec.Struct):
    """One request; `progress` is what was last heard of each task."""

    job_id: str
    nodes: list[str]
    tasks: list[int]
    created_ms: int
    updated_ms: int
    used_bytes: int
    progress: dict[int, Progress]
    left_bytes: int = 0
    cancelled: bool = False

    @property
    def status(self) -> int:
        """Of all tasks together: the first of running, failed, cancelled that any of them is."""
        if self.cancelled:
            return STATUS[State.CANCELLED]
        states = [one.state for one in self.progress.values()]
        for state in (State.RUNNING, State.FAILED, State.CANCELLED):
            if state in states or (state is State.RUNNING and len(states) < len(self.tasks)):
                return STATUS[state]
        return STATUS[State.DONE]

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.status == STATUS[State.RUNNING]

    def message(self) -> str:
        """Return what it is doing, or why it failed."""
        reasons = [one.reason for one in self.progress.values() if one.state is State.FAILED and one.reason]
        return ": ".join([MESSAGES[self.status], *reasons[:1]])


class DrainJobs:
    """All methods run on the coordinator's loop."""

    def __init__(self, coordinator: Coordinator, wall_s: Callable[[], float] = time.time) -> None:
        """It is not closed here."""
        self._coordinator = coordinator
        self._wall_s = wall_s
        self._jobs: dict[str, Job] = {}

    async def begin(self, nodes: list[str]) -> Job | Busy:
        """Empty segments of nodes that are in the pool, all of them or none.

        Raises:
            PeerError, CapacityError: the directory does not lead, or has too many tasks.
        """
        if any(self.state_of(node) != "OK" for node in nodes):
            return Busy()
        tasks: list[int] = []
        try:
            for node in nodes:
                reply = await self._ask(DrainNode(node))
                assert isinstance(reply, TaskStarted)
                tasks.append(reply.task_id)
        except MooncakeError:
            for task_id in tasks:
                await self._ask(CancelTask(task_id))
            raise
        now_ms = int(self._wall_s() * 1000)
        job_id = f"{secrets.randbits(64)}-{secrets.randbits(64)}"
        used_bytes = self._used_bytes(nodes)
        job = Job(job_id, list(nodes), tasks, now_ms, now_ms, used_bytes, {}, used_bytes)
        self._jobs[job_id] = job
        for old in [one.job_id for one in self._jobs.values() if not one.running]:
            if len(self._jobs) > JOBS_MAX:
                del self._jobs[old]
        return job

    async def look(self, job_id: str) -> Job | None:
        """Return a job as it is now; None: there is none of that id."""
        job = self._jobs.get(job_id)
        if job is not None and job.running:
            before = dict(job.progress)
            for task_id in job.tasks:
                reply = await self._ask(TaskProgress(task_id))
                assert isinstance(reply, TasksAre)
                for one in reply.tasks:
                    job.progress[task_id] = one
            job.left_bytes = min(job.left_bytes, self._used_bytes(job.nodes))
            if job.progress != before:
                job.updated_ms = int(self._wall_s() * 1000)
        return job

    async def cancel(self, job_id: str) -> Job | Busy | None:
        """End a job that runs; blocks may be placed on its segments again."""
        job = await self.look(job_id)
        if job is None:
            return None
        if not job.running:
            return Busy()
        for task_id in job.tasks:
            await self._ask(CancelTask(task_id))
        job.cancelled = True
        job.updated_ms = int(self._wall_s() * 1000)
        return job

    def state_of(self, node: str) -> str:
        """Return OK, DRAINING or DRAINED, as far as jobs know."""
        for job in reversed(self._jobs.values()):
            if node in job.nodes:
                if job.running:
                    return "DRAINING"
                if job.status == STATUS[State.DONE]:
                    return "DRAINED"
                break
        return "OK"

    def _used_bytes(self, nodes: list[str]) -> int:
        stats = self._coordinator.polls.stats
        return sum(stats[node].used_bytes for node in nodes if node in stats)

    async def _ask(self, request: TaskRequest) -> TaskReply:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + LEAD_S
        while True:
            try:
                return await self._coordinator.handle(request)
            except NotLeader:
                if loop.time() > end_s:
                    raise
            except RequestError:  # it has ended by itself meanwhile, which is what was wanted
                if not isinstance(request, CancelTask):
                    raise
                return TasksAre([])
            await asyncio.sleep(LOOK_S)
