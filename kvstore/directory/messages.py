"""Messages to a directory process, in the form of mooncake.core.messages."""

import msgspec

from kvstore.directory.directory import Mode, NodeStatus
from kvstore.leader.task_types import Progress
from mooncake.core.messages import Failure, Ok

DIRECTORIES_PREFIX = "/mooncake/directories/"
LEADER_KEY = "/mooncake/directory-leader"
"""Not under the prefix above: who leads is not a directory."""


class Locate(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="loc"):
    """Ask which nodes hold each of `keys`. Answer: Located.

    `exact_only` leaves out nodes that the directory is out of step with.
    """

    keys: list[bytes]
    exact_only: bool = False


class Located(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="locd"):
    """`holders[i]` are indexes into `nodes`, for `keys[i]`, those in step first.

    With mode DEGRADED, for `lag_s` so far, a key without holders may be held all the same.
    """

    nodes: list[str]
    holders: list[list[int]]
    mode: Mode
    lag_s: float


class LocatePrefix(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="pfx"):
    """Ask how many leading `keys` are held. Answer: PrefixLocated."""

    keys: list[bytes]


class PrefixLocated(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="pfxd"):
    """`covered` leading keys are each held by somebody; `by_node[n]` of them by n alone."""

    covered: int
    by_node: dict[str, int]
    mode: Mode
    lag_s: float


class DirectoryStatus(msgspec.Struct, frozen=True, array_like=True, tag="dst"):
    """Ask how the directory is. Answer: DirectoryStatusIs."""


class DirectoryStatusIs(msgspec.Struct, frozen=True, array_like=True, tag="dstd"):
    """`blocks`: distinct keys held. One entry per member of the pool."""

    mode: Mode
    lag_s: float
    blocks: int
    nodes: list[NodeStatus]


# ---------------------------------------------------------------- to the leading directory
# One that does not lead answers with NotLeader, whose text names the leader.


class CopyKeys(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="ck"):
    """Have `keys` on the node `target`, or on several, with "," between.

    Answer: TaskStarted; asked again, the same task.
    """

    keys: list[bytes]
    target: str


class MoveKeys(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="mk"):
    """Have `keys` on `target` and not on `source`. Answer: TaskStarted; asked again, the same task."""

    keys: list[bytes]
    source: str
    target: str


class DrainNode(msgspec.Struct, frozen=True, array_like=True, tag="drn"):
    """Have every block of `node` elsewhere, and copy none there until UndrainNode. Answer: TaskStarted.

    `size_bytes`: of a block, to choose nodes that can take it; 0 = as large as the node's are on average.
    """

    node: str
    size_bytes: int = 0


class UndrainNode(msgspec.Struct, frozen=True, array_like=True, tag="udr"):
    """Let blocks be copied to `node` again; ends a drain of it. Answer: Ok, also if there was none."""

    node: str


class KeepHot(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="hot"):
    """Keep `copies` replicas of each key until ForgetHot, or for `ttl_s` if it is not 0. Answer: Ok.

    A wish of this leader: whoever has it says it again now and then, for the next leader; the last one said
    for a key holds. With `nodes`, only copies there count, and are made, on the first of them that can.
    """

    keys: list[bytes]
    copies: int
    size_bytes: int
    nodes: list[str] = []
    ttl_s: float = 0.0


class ForgetHot(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="cold"):
    """End standing wishes for `keys`; replicas stay until they are evicted. Answer: Ok."""

    keys: list[bytes]


class TaskProgress(msgspec.Struct, frozen=True, array_like=True, tag="tpr"):
    """Ask how far tasks are; None = all, 0 = the hot keys. Answer: TasksAre, empty if it is unknown."""

    task_id: int | None = None


class CancelTask(msgspec.Struct, frozen=True, array_like=True, tag="ctl"):
    """End an open task; of a drain also what UndrainNode does. Answer: Ok, or a RequestError."""

    task_id: int


class TaskStarted(msgspec.Struct, frozen=True, array_like=True, tag="tst"):
    """What a task is called, by this leader and the next ones, within one `life` of the metadata store."""

    task_id: int
    life: str = ""


class TasksAre(msgspec.Struct, frozen=True, array_like=True, tag="tsk"):
    """Hot keys, ended tasks, open ones. `life`: of the metadata store, which their ids belong to."""

    tasks: list[Progress]
    life: str = ""


class DirectoryRecord(msgspec.Struct, frozen=True):
    """What a directory says of itself under DIRECTORIES_PREFIX + name (JSON)."""

    name: str
    endpoint: str  # request/reply ZMQ address
    admin_url: str  # HTTP; "" = none
    pid: int


TaskRequest = CopyKeys | MoveKeys | DrainNode | UndrainNode | KeepHot | ForgetHot | TaskProgress | CancelTask
TaskReply = TaskStarted | TasksAre | Ok
DirectoryRequest = Locate | LocatePrefix | DirectoryStatus | TaskRequest
DirectoryReply = Located | PrefixLocated | DirectoryStatusIs | TaskReply | Failure
