"""How old blocks were when they had to go: a histogram that costs a few additions. Pure."""

from bisect import bisect_left

BOUNDS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
"""From a pool that is far too small (a block dies before the next turn of its chat) to a day."""


class AgeHistogram:
    """Counts of ages by BOUNDS_S; one more for what is older."""

    def __init__(self) -> None:
        """Start empty."""
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, age_s: float) -> None:
        """Count one age; a bound belongs to the bucket below it."""
        self.counts[bisect_left(BOUNDS_S, age_s)] += 1
        self.sum_s += age_s
