"""How long answers hold their place: the share still there after so many seconds, that forgets. Pure.

A mean forgets those that are still decoded, which are the long ones; so each step of the table divides
those that ended in it by all that came so far, the running ones too (Kaplan-Meier). An answer that ended
for whatever reason counts: its room is free. Ages in seconds.
"""

from collections.abc import Iterable
from math import expm1, log2

STEPS_PER_OCTAVE = 4
"""Steps of 19 %: finer than one answer repeats another."""
AGE_MIN_S = 0.05
"""End of the first step: a token or two."""
STEPS = 15 * STEPS_PER_OCTAVE
"""Up to 27 minutes; what is older counts as that old."""
MEMORY_ANSWERS = 1024.0
"""When so many are known, all are halved."""
REFRESH_S = 1.0
"""The running ones are counted anew so often: they age slowly beside what is asked, seconds."""

_ENDS = [AGE_MIN_S * 2 ** (step / STEPS_PER_OCTAVE) for step in range(STEPS)]


class Stays:
    """Constant memory. `refresh` costs a pass over the running answers, everything else is constant."""

    def __init__(self, prior_s: float) -> None:
        """`prior_s`: mean stay until some were measured; it weighs as one answer."""
        self._ended = [0.0] * STEPS
        self._answers = 1.0
        self._total_s = prior_s
        # the chance to end within a step, if answers end at a constant rate
        begins = [0.0, *_ENDS[:-1]]
        self._prior = [-expm1((begin - end) / prior_s) for begin, end in zip(begins, _ENDS, strict=True)]
        self._there: list[float] = []  # share that outlives the beginning of a step
        self._at_s = -1.0
        self._build([0] * STEPS)

    @property
    def mean_s(self) -> float:
        """Mean of those that ended."""
        return self._total_s / self._answers

    def ended(self, age_s: float) -> None:
        """Learn from one that is over."""
        self._ended[_step(age_s)] += 1
        self._answers += 1
        self._total_s += age_s
        self._at_s = -1.0
        if self._answers >= MEMORY_ANSWERS:
            self._ended = [one / 2 for one in self._ended]
            self._answers /= 2
            self._total_s /= 2

    def is_old(self, now_s: float) -> bool:
        """Whether `refresh` would tell something new."""
        return self._at_s < 0 or now_s - self._at_s >= REFRESH_S

    def refresh(self, now_s: float, ages_s: Iterable[float]) -> None:
        """Count the running ones: they have not ended yet."""
        running = [0] * STEPS
        for age_s in ages_s:
            running[_step(age_s)] += 1
        self._build(running)
        self._at_s = now_s

    def chance(self, age_s: float, ahead_s: float) -> float:
        """Return how likely one that is so old will still be there `ahead_s` later."""
        return min(1.0, self._share(age_s + ahead_s) / self._share(age_s))

    def _build(self, running: list[int]) -> None:
        hazards, came = [], 1.0  # the prior's one
        for ended, still, prior in zip(
            reversed(self._ended), reversed(running), reversed(self._prior), strict=True
        ):
            came += ended
            hazards.append((ended + prior) / came)
            came += still  # they were at risk in every earlier step
        share = 1.0
        self._there = [share]
        for hazard in reversed(hazards):
            share *= max(1 - hazard, 1e-3)  # never certain, and never 0: it is divided by
            self._there.append(share)

    def _share(self, age_s: float) -> float:
        if age_s <= AGE_MIN_S:
            return 1 - (1 - self._there[1]) * max(0.0, age_s) / AGE_MIN_S
        at = 1 + STEPS_PER_OCTAVE * log2(age_s / AGE_MIN_S)
        step = int(at)
        if step >= STEPS:
            return self._there[STEPS]
        left, right = self._there[step], self._there[step + 1]
        return left + (right - left) * (at - step)


def _step(age_s: float) -> int:
    if age_s < AGE_MIN_S:
        return 0
    return min(int(1 + STEPS_PER_OCTAVE * log2(age_s / AGE_MIN_S)), STEPS - 1)
