"""Virtual time: a heap of events, and links that are shared first come, first served. Pure."""

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    """Events of the same moment happen in the order in which they were set."""

    def __init__(self) -> None:
        """Start at 0 s with nothing to happen."""
        self.now_s = 0.0
        self.count = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Do `what` at `when_s`; a time that has passed means now."""
        heapq.heappush(self._heap, (max(when_s, self.now_s), next(self._order), what))

    def step(self) -> bool:
        """Let the next event happen; False = there is none."""
        if not self._heap:
            return False
        self.now_s, _, what = heapq.heappop(self._heap)
        self.count += 1
        what()
        return True


class Link:
    """What leaves one host: one transfer after the other, at full speed."""

    def __init__(self, bytes_s: float) -> None:
        """Start idle."""
        self._bytes_s = bytes_s
        self._free_s = 0.0
        self.sent_bytes = 0

    def book(self, now_s: float, size_bytes: int) -> float:
        """Queue a transfer; return when its last byte has arrived."""
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_s
        self.sent_bytes += size_bytes
        return self._free_s
