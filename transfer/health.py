"""Which paths may be used now: a circuit breaker per path, and the order in which transports are tried.

A path is a name: a transport ("rdma"), or a transport and what lies behind it ("rdma/10.0.0.7:15001").
It is USABLE until it fails often, then QUARANTINED for a cooldown, then on TRIAL: one attempt at a time
is let through, and several successes in a row are needed before it is USABLE again. A trial that fails
doubles the cooldown, so a flapping link is tried ever more rarely, and never given up.

Pure and without locks: the owner passes the time and calls from one thread, or under a lock of its own.
"""

import enum
from collections import deque
from collections.abc import Sequence

import msgspec

TRANSPORT_ORDER = ("shm", "rdma", "tcp")
"""Fastest first (reference: benchmarks/LOG.md, transports); any other comes after them."""


class PathState(enum.IntEnum):
    """What the metric mooncake_transfer_path_state shows."""

    USABLE = 0
    TRIAL = 1
    QUARANTINED = 2


class Limits(msgspec.Struct, frozen=True):
    """When a path is left and taken up again."""

    errors_max: int = 3
    window_s: float = 10.0
    """That many errors within the window quarantine a path: one lost packet train does not."""
    cooldown_s: float = 1.0
    cooldown_max_s: float = 60.0
    """First and longest quarantine: a rerouted link is back in seconds, a dead one costs little."""
    trials_needed: int = 3
    """Successes in a row before a path is trusted again: one may be luck on a link that flaps."""
    trial_s: float = 30.0
    """A trial whose outcome was never told is forgotten after this (its thread may have died)."""
    paths_max: int = 1024
    """Paths that are remembered; only those that ever failed are."""


class _Line:
    """What is remembered of one path."""

    def __init__(self, limits: Limits) -> None:
        self.errors: deque[float] = deque(maxlen=limits.errors_max)
        self.cooldown_s = limits.cooldown_s
        self.open = False  # quarantined or on trial
        self.until_s = 0.0  # quarantined until then
        self.trial_end_s: float | None = None  # None = no trial in flight
        self.trials_won = 0
        self.since_s = float("-inf")  # attempts begun before this say nothing about now


class Health:
    """The state of all paths. A path that was never heard of is usable."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        """Start with every path usable."""
        self._limits = limits
        self._lines: dict[str, _Line] = {}  # the one that failed last is last

    def state(self, path: str, now_s: float) -> PathState:
        """Return the state of `path`, for metrics and people."""
        line = self._lines.get(path)
        if line is None or not line.open:
            return PathState.USABLE
        return PathState.QUARANTINED if now_s < line.until_s else PathState.TRIAL

    def states(self, now_s: float) -> dict[str, PathState]:
        """Return the state of every path that ever failed and is still remembered."""
        return {path: self.state(path, now_s) for path in self._lines}

    def admits(self, path: str, now_s: float) -> bool:
        """Return what `usable` would, without taking the trial: for looking ahead."""
        state = self.state(path, now_s)
        if state is not PathState.TRIAL:
            return state is PathState.USABLE
        trial_end_s = self._lines[path].trial_end_s
        return trial_end_s is None or now_s >= trial_end_s

    def usable(self, path: str, now_s: float) -> bool:
        """Return whether `path` may be used for an attempt that begins now.

        On trial, True takes the one trial: the caller makes the attempt and tells its outcome by
        `succeeded` or `failed`. Until then, or until `trial_s` has passed, nobody else gets True.
        """
        if not self.admits(path, now_s):
            return False
        line = self._lines.get(path)
        if line is not None and line.open:
            line.trial_end_s = now_s + self._limits.trial_s
            line.since_s = now_s
        return True

    def failed(self, path: str, now_s: float, fatal: bool = False, began_s: float | None = None) -> bool:
        """Tell that an attempt failed because of the path.

        Args:
            path: which.
            now_s: when it was seen to fail.
            fatal: no need to count further (the port is down, the peer's process is gone).
            began_s: when the attempt began; late news from before the path was last quarantined, or
                from before its present trial, then counts for nothing.

        Returns:
            Whether this quarantined the path.
        """
        line = self._lines.pop(path, None) or self._remember()
        self._lines[path] = line
        if _is_old(line, began_s):
            return False
        if line.open:
            if now_s < line.until_s:
                return False  # others that were in flight fail with the first; known already
            line.cooldown_s = min(2 * line.cooldown_s, self._limits.cooldown_max_s)
        else:
            line.errors.append(now_s)
            many = len(line.errors) == self._limits.errors_max
            if not (fatal or (many and now_s - line.errors[0] < self._limits.window_s)):
                return False
            line.open = True
        line.until_s = now_s + line.cooldown_s
        line.since_s = now_s
        line.trial_end_s = None
        line.trials_won = 0
        return True

    def succeeded(self, path: str, now_s: float, began_s: float | None = None) -> bool:  # noqa: ARG002 - as failed
        """Tell that an attempt succeeded; the arguments are those of `failed`.

        Returns:
            Whether this made the path usable again.
        """
        line = self._lines.get(path)
        if line is None or not line.open or line.trial_end_s is None or _is_old(line, began_s):
            return False
        line.trial_end_s = None
        line.trials_won += 1
        if line.trials_won < self._limits.trials_needed:
            return False
        line.open = False
        line.cooldown_s = self._limits.cooldown_s
        line.errors.clear()
        return True

    def _remember(self) -> _Line:
        """Return a new line, after making room for it: the oldest healthy one goes, else the oldest."""
        if len(self._lines) >= self._limits.paths_max:
            healthy = (path for path, line in self._lines.items() if not line.open)
            del self._lines[next(healthy, next(iter(self._lines)))]
        return _Line(self._limits)


def rank(candidates: Sequence[str], health: Health, now_s: float, hint: str = "") -> list[str]:
    """Return `candidates` in the order in which they should be tried.

    Admitted paths come before the others, which are there for when nothing else is left: to try is
    better than to refuse. Within each, `hint` first, then TRANSPORT_ORDER, then as given. No trial is
    taken: whoever uses a path asks `Health.usable` right before.

    Args:
        candidates: paths.
        health: of them.
        now_s: time.
        hint: a transport's name the caller prefers, "" = none.
    """

    def key(path: str) -> tuple[bool, bool, int]:
        transport = path.partition("/")[0]
        known = transport in TRANSPORT_ORDER
        place = TRANSPORT_ORDER.index(transport) if known else len(TRANSPORT_ORDER)
        return (not health.admits(path, now_s), transport != hint, place)

    return sorted(candidates, key=key)


def _is_old(line: _Line, began_s: float | None) -> bool:
    return began_s is not None and began_s < line.since_s
