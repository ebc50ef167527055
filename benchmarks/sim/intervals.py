"""Times between tokens: what an engine's steps were, and what they meant to one request. Pure."""

import math
from collections.abc import Sequence

import msgspec

Gap = tuple[float, int]
"""Seconds between two tokens, and how many such intervals there were."""
TAIL = 0.1
"""The paper's TBT: mean of the longest tenth of a request's intervals (FAST'25, section 5)."""


class Tbt(msgspec.Struct, frozen=True):
    """Time between tokens of one request."""

    mean_s: float
    tail_s: float


class Run(msgspec.Struct, frozen=True, gc=False):
    """So many decode steps of one batch; before the first, the batch stood still for stall_s."""

    start_s: float
    steps: int
    step_s: float
    stall_s: float


class Runs:
    """All of one engine, and the intervals between tokens that they gave to who was there before them."""

    def __init__(self) -> None:
        """None yet."""
        self._runs: list[Run] = []
        self._gaps: list[Gap] = []
        self._ends: list[int] = []  # of each run's, in _gaps

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def end_s(self) -> float:
        """When the last step ended."""
        return self._runs[-1].start_s + self._runs[-1].steps * self._runs[-1].step_s if self._runs else 0.0

    def add(self, run: Run) -> None:
        """The batch has made these steps."""
        self._runs.append(run)
        if run.stall_s:
            self._gaps.append((run.stall_s + run.step_s, 1))
            if run.steps > 1:
                self._gaps.append((run.step_s, run.steps - 1))
        else:
            self._gaps.append((run.step_s, run.steps))
        self._ends.append(len(self._gaps))

    def gaps(self, run_from: int, first_token_s: float) -> list[Gap]:
        """Return the intervals between the tokens of a leg that is there from that run to the last one."""
        first = self._runs[run_from]
        # its own wait between first token and batch is its first interval, whatever stalled the others
        gaps = [(first.start_s + first.step_s - first_token_s, 1)]
        if first.steps > 1:
            gaps.append((first.step_s, first.steps - 1))
        return gaps + self._gaps[self._ends[run_from] :]


def tbt_of(gaps: Sequence[Gap]) -> Tbt:
    """Weigh the intervals of one request."""
    count = sum(times for _, times in gaps)
    left = kept = math.ceil(TAIL * count)
    tail_s = 0.0
    for gap_s, times in sorted(gaps, reverse=True):
        used = min(times, left)
        tail_s += used * gap_s
        left -= used
        if not left:
            break
    return Tbt(sum(gap_s * times for gap_s, times in gaps) / count, tail_s / kept)
