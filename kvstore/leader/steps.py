"""What the next step towards a goal is, for one key of a task, as the world is now. Pure."""

import math
from collections import OrderedDict, deque

import msgspec

from kvstore.leader.placement import Placer
from kvstore.leader.task_types import Kind, Locations, State


class Task(msgspec.Struct):
    """What was asked for, and how far it is."""

    task_id: int
    kind: Kind
    what: object  # equal for equal requests
    source: str
    target: str  # of a copy: nodes with "," between
    size_bytes: int
    queue: deque["Step"]  # to be looked at now
    fresh: deque[bytes]  # keys that are no steps yet: 1 M of them at once would stop the loop for 2 s
    state: State = State.RUNNING
    open: int = 0
    total: int = 0
    done: int = 0
    failed: int = 0
    rounds: int = 0
    relist_s: float = math.inf  # when a drained node is listed again
    reason: str = ""
    created_s: float = 0.0
    updated_s: float = 0.0  # when its state or one of its counters changed


class Step(msgspec.Struct):
    """One key of a task."""

    task: Task
    key: bytes
    attempts: int = 0
    confirmed: tuple[tuple[str, float], ...] = ()  # copies made, and until when no index need know them


class Wish(msgspec.Struct, frozen=True):
    """For a hot key; one object for all that were named together."""

    copies: int
    size_bytes: int
    nodes: tuple[str, ...]
    until_s: float


class CopyTo(msgspec.Struct, frozen=True):
    """Next, copy the block."""

    source: str
    target: str


class DropFrom(msgspec.Struct, frozen=True):
    """Next, drop the block."""

    node: str


class Reached(msgspec.Struct, frozen=True):
    """Nothing is left to do."""


class Stuck(msgspec.Struct, frozen=True):
    """Nothing can be done now."""

    reason: str


Decision = CopyTo | DropFrom | Reached | Stuck


class Steps:
    """Decides. What was done before does not matter, but for copies that were just dropped."""

    def __init__(self, locations: Locations, placer: Placer) -> None:
        """Both are kept up to date by others."""
        self._locations = locations
        self._placer = placer
        self.wishes: dict[bytes, Wish] = {}
        """For hot keys."""
        self.dropped: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        """Copies (key, node) that an index may still name, and until when, ascending: they do not count."""

    def decide(self, now_s: float, step: Step) -> Decision:
        """Look at the world as it is now; what was done before does not matter."""
        task, locations = step.task, self._locations
        confirmed = [node for node, until_s in step.confirmed if now_s < until_s]
        held = dict.fromkeys([*confirmed, *locations.replicas([step.key])[0]])
        if task.kind is Kind.HOT:
            return self._decide_hot(step, list(held))
        sure = [*confirmed, *locations.replicas([step.key], exact_only=True)[0]]
        exact = [node for node in sure if (step.key, node) not in self.dropped]
        if task.kind is Kind.DRAIN:
            if task.source not in held:
                return Reached()
            if any(node != task.source for node in exact):
                return DropFrom(task.source)
            target = self._placer.choose(step.key, task.size_bytes, exclude=[task.source]).nodes
            return CopyTo(task.source, target[0]) if target else Stuck("no node to drain to")
        lacking = [node for node in task.target.split(",") if node not in exact]
        if not lacking:
            return DropFrom(task.source) if task.kind is Kind.MOVE and task.source in held else Reached()
        sources = [node for node in held if node not in lacking]
        if not sources:
            return Stuck("no node holds it")
        return CopyTo(task.source if task.source in sources else sources[0], lacking[0])

    def _decide_hot(self, step: Step, held: list[str]) -> Decision:
        wish = self.wishes.get(step.key)
        if wish is None or not held:
            return Reached()  # unwanted, or lost: then nobody can copy it
        there = [node for node in wish.nodes if node in held] if wish.nodes else held
        if len(there) >= wish.copies:
            return Reached()
        if wish.nodes:
            target = [n for n in wish.nodes if n not in held and self._placer.takes(n, wish.size_bytes)][:1]
        else:
            target = list(self._placer.choose(step.key, wish.size_bytes, exclude=held).nodes)
        if not target:
            return Reached()  # it is wherever it can be
        # spread over the sources: many readers want this block
        return CopyTo(held[step.key[0] % len(held)], target[0])
