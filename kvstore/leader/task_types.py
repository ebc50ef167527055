"""What tasks are called, what they command and what they look at; kvstore.leader.tasks decides."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec


class Kind(StrEnum):
    """What a task is for."""

    COPY = "copy"
    MOVE = "move"
    DRAIN = "drain"
    HOT = "hot"


class State(StrEnum):
    """FAILED: ended, and at least one key did not reach its goal."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Copy(msgspec.Struct, frozen=True):
    """Copy one block; succeed only if it is complete on `target` (also if it was there already)."""

    command_id: int
    key: bytes
    source: str
    target: str


class Drop(msgspec.Struct, frozen=True):
    """Drop one block of one node; a block that is not there is dropped."""

    command_id: int
    key: bytes
    node: str


Command = Copy | Drop


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """`total` keys so far: `done` reached their goal, `failed` did not; the rest is on its way.

    `created_s`, `updated_s`: seconds of the leader's own clock, as answers to requests since the epoch.
    """

    task_id: int
    kind: Kind
    state: State
    total: int
    done: int
    failed: int
    reason: str
    source: str = ""
    target: str = ""
    created_s: float = 0.0
    updated_s: float = 0.0


class Locations(Protocol):
    """The part of a Directory that tasks look at."""

    def replicas(self, keys: Sequence[bytes], *, exact_only: bool = False) -> list[tuple[str, ...]]:
        """Return the nodes of each key."""
        ...

    def keys_of(self, node: str) -> list[bytes]:
        """Return the keys of a node."""
        ...

    def is_exact(self, node: str) -> bool:
        """Return whether `keys_of` is all that the node holds."""
        ...
