"""Counters over sliding windows, as Prometheus' rate, increase and irate see them. Pure.

Everything is looked up in running sums, so the cost is that of the series, not of windows times samples.
The extrapolation to the window's edges is Prometheus' own (promql/functions.go, extrapolatedRate): without
it a counter's rate would depend on where the scrapes happen to fall.
"""

import numpy as np

from mooncake.live.samples import Array, Indices, Mask, Samples

STALE_S = 300.0
"""Prometheus' lookback: a series is what it was at most so long ago."""
NEAR_INTERVALS = 1.1
"""An edge of the window that is nearer than so many sample intervals is taken to belong to the series."""


def instant(samples: Samples, times_s: Array) -> tuple[Array, Mask]:
    """Return the values at `times_s`, and where there are any: those of the last scrape before."""
    values = np.full((len(samples.labels), len(times_s)), np.nan)
    at = np.searchsorted(samples.times_s, times_s, side="right") - 1
    if len(samples.times_s):
        fresh = (at >= 0) & (times_s - samples.times_s[at] < STALE_S)
        values[:, fresh] = samples.values[:, at[fresh]]
    return values, ~np.isnan(values)


class Windows:
    """The windows (t - range_s, t] of some series, for every t."""

    def __init__(self, samples: Samples, times_s: Array, range_s: float) -> None:
        """Find the first and last sample of every window."""
        self._samples, self._times_s, self._range_s = samples, times_s, range_s
        columns = len(samples.times_s)
        self.there = ~np.isnan(samples.values)  # [series, columns]
        low = np.searchsorted(samples.times_s, times_s - range_s, side="right")
        high = np.searchsorted(samples.times_s, times_s, side="right")
        counted = np.concatenate(
            [np.zeros((len(samples.labels), 1), np.int64), np.cumsum(self.there, axis=1)], axis=1
        )
        self.count = counted[:, high] - counted[:, low]  # [series, times]
        column = np.arange(columns)
        before = np.maximum.accumulate(np.where(self.there, column, -1), axis=1)
        after = np.minimum.accumulate(np.where(self.there, column, columns)[:, ::-1], axis=1)[:, ::-1]
        # where count is 0 these point anywhere: clipped, and never used
        self.previous = np.concatenate([np.full((len(samples.labels), 1), -1), before[:, :-1]], axis=1)
        self.first = np.clip(_columns(after, low), 0, max(columns - 1, 0))
        self.last = np.clip(_columns(before, high - 1), 0, max(columns - 1, 0))

    def rate(self, *, per_second: bool = True) -> tuple[Array, Mask]:
        """Return Prometheus' rate (or increase) and where there is one: two samples are needed."""
        if not self.there.any():
            return self._nothing()
        values, times_s = self._samples.values, self._samples.times_s
        rows = np.arange(len(values))[:, None]
        grown = np.cumsum(self._growth(), axis=1)
        increase = grown[rows, self.last] - grown[rows, self.first]
        first_value = values[rows, self.first]
        there = self.count >= 2
        with np.errstate(divide="ignore", invalid="ignore"):
            sampled_s = times_s[self.last] - times_s[self.first]
            between_s = sampled_s / (self.count - 1)
            to_start_s = times_s[self.first] - (self._times_s - self._range_s)
            to_end_s = self._times_s - times_s[self.last]
            # a counter is never below 0: do not extrapolate to before it began
            to_zero_s = sampled_s * (first_value / increase)
            begins = (increase > 0) & (first_value >= 0) & (to_zero_s < to_start_s)
            to_start_s = np.where(begins, to_zero_s, to_start_s)
            near_s = between_s * NEAR_INTERVALS
            covered_s = (
                sampled_s
                + np.where(to_start_s < near_s, to_start_s, between_s / 2)
                + np.where(to_end_s < near_s, to_end_s, between_s / 2)
            )
            result = increase * (covered_s / sampled_s)
        return np.where(there, result / self._range_s if per_second else result, np.nan), there

    def irate(self) -> tuple[Array, Mask]:
        """Return the rate between the last two samples of each window."""
        if not self.there.any():
            return self._nothing()
        rows = np.arange(len(self._samples.values))[:, None]
        there = self.count >= 2
        last_but_one = self.previous[rows, self.last]
        elapsed_s = self._samples.times_s[self.last] - self._samples.times_s[last_but_one]
        with np.errstate(divide="ignore", invalid="ignore"):
            result = self._growth()[rows, self.last] / elapsed_s
        return np.where(there, result, np.nan), there

    def _growth(self) -> Array:
        """Return what each sample adds to the one before; a counter that fell began again at 0."""
        values = self._samples.values
        rows = np.arange(len(values))[:, None]
        old = values[rows, np.maximum(self.previous, 0)]
        with np.errstate(invalid="ignore"):
            grown = np.where(values >= old, values - old, values)
        known: Array = np.where(self.there & (self.previous >= 0), grown, 0.0)
        return known

    def _nothing(self) -> tuple[Array, Mask]:
        shape = (len(self._samples.values), len(self._times_s))
        return np.full(shape, np.nan), np.zeros(shape, np.bool_)


def _columns(table: Indices, columns: Indices) -> Indices:
    """Return these columns of `table`, clipped to those it has."""
    if not table.shape[1]:
        return np.zeros((table.shape[0], len(columns)), table.dtype)
    return table[:, np.clip(columns, 0, table.shape[1] - 1)]
