"""Samples of many series at common times: what the ring keeps and the evaluator reads. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Labels: TypeAlias = tuple[tuple[str, str], ...]
"""Sorted pairs; the metric's name is the label NAME."""
NAME = "__name__"


class Samples(msgspec.Struct, frozen=True):
    """`values[i, j]` is what series `labels[i]` was at `times_s[j]`; NaN = it was not there.

    All series share their times, as one round of scrapes gives them one; so an absent sample is what
    Prometheus marks as stale.
    """

    times_s: Array  # [times], rising
    labels: Sequence[Labels]
    values: Array  # [series, times]

    def rows(self) -> Mapping[str, list[int]]:
        """Return the rows of each name."""
        found: dict[str, list[int]] = {}
        for row, labels in enumerate(self.labels):
            found.setdefault(dict(labels).get(NAME, ""), []).append(row)
        return found


class Series(msgspec.Struct, frozen=True):
    """One series of an answer; NaN where `there` says so is a value (0/0), else there is none."""

    labels: Labels
    values: Array
    there: Mask
