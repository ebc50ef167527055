"""Messages to a directory process, in the form of mooncake.core.messages."""

import msgspec

from kvstore.directory import Mode, NodeStatus
from mooncake.core.messages import Failure


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


DirectoryRequest = Locate | LocatePrefix | DirectoryStatus
DirectoryReply = Located | PrefixLocated | DirectoryStatusIs | Failure
