"""Instant vectors at many times at once, and what PromQL does with them. Pure.

Rows are series, columns times; `there` says where a series has a value (a value may be NaN: 0/0 is one).
"""

import operator
from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np

from mooncake.core.errors import RequestError
from mooncake.live.samples import NAME, Array, Labels, Mask

Operator = Callable[[Array, Array], Array]
ARITHMETIC: Mapping[str, Operator] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "%": np.fmod,
    "^": np.power,
}
COMPARISON: Mapping[str, Callable[[Array, Array], Mask]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
SETS = ("and", "or", "unless")


class Vector(msgspec.Struct, frozen=True):
    """Some series: `values[i, j]` of `labels[i]`."""

    labels: list[Labels]
    values: Array
    there: Mask


class Matching(msgspec.Struct, frozen=True):
    """Which labels decide what belongs together: only `names` (on, by), or all others."""

    only: bool = False
    names: frozenset[str] = frozenset((NAME,))

    def key(self, labels: Labels) -> Labels:
        """Return the labels that decide."""
        if self.only:
            return tuple(pair for pair in labels if pair[0] in self.names)
        return tuple(pair for pair in labels if pair[0] not in self.names and pair[0] != NAME)


ALL_BUT_NAME = Matching()


def vector(rows: Iterable[tuple[Labels, Array, Mask]], times_n: int) -> Vector:
    """Return a vector of rows; those with equal labels become one.

    Raises:
        RequestError: two of them have a value at the same time.
    """
    found: dict[Labels, tuple[Array, Mask]] = {}
    for labels, values, there in rows:
        known = found.get(labels)
        if known is None:
            found[labels] = (values, there)
            continue
        if (known[1] & there).any():
            raise RequestError(f"two series {shown(labels)} at the same time: aggregate with `by` first")
        found[labels] = (np.where(there, values, known[0]), known[1] | there)
    if not found:
        return Vector([], np.zeros((0, times_n)), np.zeros((0, times_n), np.bool_))
    values_of, there_of = [pair[0] for pair in found.values()], [pair[1] for pair in found.values()]
    return Vector(list(found), np.stack(values_of), np.stack(there_of))


def shown(labels: Labels) -> str:
    """Return labels as people write them."""
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels) + "}"


def nameless(one: Vector) -> Vector:
    """Return it without the metric's name, as every function does."""
    rows = zip((ALL_BUT_NAME.key(labels) for labels in one.labels), one.values, one.there, strict=True)
    return vector(rows, one.values.shape[1])


def with_number(one: Vector, op: str, number: Array, *, swapped: bool, as_bool: bool) -> Vector:
    """Return `one op number`, or the other way round; comparisons keep what is true."""
    left, right = (number, one.values) if swapped else (one.values, number)
    with np.errstate(all="ignore"):
        if op in ARITHMETIC:
            return nameless(Vector(one.labels, ARITHMETIC[op](left, right), one.there))
        holds = COMPARISON[op](left, right)
    if as_bool:
        return nameless(Vector(one.labels, holds.astype(np.float64), one.there))
    return Vector(one.labels, one.values, one.there & holds)


def with_vector(left: Vector, op: str, right: Vector, matching: Matching, *, as_bool: bool) -> Vector:
    """Return `left op right`, series by series.

    Raises:
        RequestError: several series of one side belong to one of the other.
    """
    times_n = left.values.shape[1]
    if op in SETS:
        return _sets(left, op, right, matching)
    others = _by_key(right, matching)
    _by_key(left, matching)  # raises where it is not one to one
    rows: list[tuple[Labels, Array, Mask]] = []
    for labels, values, there in zip(left.labels, left.values, left.there, strict=True):
        key = matching.key(labels)
        if key not in others:
            continue
        other_values, other_there = others[key]
        both = there & other_there
        with np.errstate(all="ignore"):
            if op in ARITHMETIC:
                rows.append((key, ARITHMETIC[op](values, other_values), both))
                continue
            holds = COMPARISON[op](values, other_values)
        if as_bool:
            rows.append((key, holds.astype(np.float64), both))
        else:
            rows.append((key if matching.only else labels, values, both & holds))
    return vector(rows, times_n)


def _by_key(one: Vector, matching: Matching) -> dict[Labels, tuple[Array, Mask]]:
    keys = (matching.key(labels) for labels in one.labels)
    merged = vector(zip(keys, one.values, one.there, strict=True), one.values.shape[1])
    return {
        labels: (values, there)
        for labels, values, there in zip(merged.labels, merged.values, merged.there, strict=True)
    }


def _sets(left: Vector, op: str, right: Vector, matching: Matching) -> Vector:
    times_n = left.values.shape[1]
    kept, other = (right, left) if op == "or" else (left, right)
    present: dict[Labels, Mask] = {}
    for labels, there in zip(other.labels, other.there, strict=True):
        key = matching.key(labels)
        present[key] = present[key] | there if key in present else there
    nowhere = np.zeros(times_n, np.bool_)
    rows = []
    for labels, values, there in zip(kept.labels, kept.values, kept.there, strict=True):
        known = present.get(matching.key(labels), nowhere)
        rows.append((labels, values, there & (known if op == "and" else ~known)))
    if op == "or":
        return vector([*zip(left.labels, left.values, left.there, strict=True), *rows], times_n)
    return vector(rows, times_n)


def _highest(values: Array, there: Mask) -> Array:
    highest: Array = np.fmax.reduce(np.where(there, values, np.nan), axis=0)
    return highest


def _lowest(values: Array, there: Mask) -> Array:
    lowest: Array = np.fmin.reduce(np.where(there, values, np.nan), axis=0)
    return lowest


def _sum(values: Array, there: Mask) -> Array:
    total: Array = np.where(there, values, 0.0).sum(axis=0)
    return total


def _count(_values: Array, there: Mask) -> Array:
    count: Array = there.sum(axis=0).astype(np.float64)
    return count


def _mean(values: Array, there: Mask) -> Array:
    with np.errstate(all="ignore"):
        return _sum(values, there) / _count(values, there)


AGGREGATIONS: Mapping[str, Callable[[Array, Mask], Array]] = {
    "sum": _sum,
    "avg": _mean,
    "max": _highest,
    "min": _lowest,
    "count": _count,
}


def aggregated(one: Vector, how: str, by: Matching) -> Vector:
    """Return one series for each group."""
    groups: dict[Labels, list[int]] = {}
    for row, labels in enumerate(one.labels):
        groups.setdefault(by.key(labels), []).append(row)
    rows: list[tuple[Labels, Array, Mask]] = []
    for labels, members in groups.items():
        there = one.there[members]
        somewhere: Mask = np.logical_or.reduce(there, axis=0)
        rows.append((labels, AGGREGATIONS[how](one.values[members], there), somewhere))
    return vector(rows, one.values.shape[1])


def histogram_quantile(share: float, one: Vector) -> Vector:
    """Return the quantile of each histogram of classic buckets, as Prometheus estimates it."""
    by = Matching(names=frozenset(("le", NAME)))
    groups: dict[Labels, dict[float, int]] = {}
    for row, labels in enumerate(one.labels):
        limit = _number(dict(labels).get("le", ""))
        if limit is not None:
            groups.setdefault(by.key(labels), {})[limit] = row
    rows: list[tuple[Labels, Array, Mask]] = []
    for labels, buckets in groups.items():
        limits = sorted(buckets)
        members = [buckets[limit] for limit in limits]
        counts = np.where(one.there[members], one.values[members], -np.inf)
        there: Mask = np.logical_or.reduce(one.there[members], axis=0)
        rows.append((labels, _quantiles(share, np.array(limits), counts), there))
    return vector(rows, one.values.shape[1])


def _quantiles(share: float, limits: Array, counts: Array) -> Array:
    """Return the quantile at each time; `counts` has one row for each limit."""
    times_n = counts.shape[1]
    if len(limits) < 2 or not np.isposinf(limits[-1]):
        return np.full(times_n, np.nan)
    if not 0 <= share <= 1:
        return np.full(times_n, np.copysign(np.inf, share))
    counts = np.maximum.accumulate(counts, axis=0)  # scrapes are not atomic
    total = counts[-1]  # -inf where there is none
    column = np.arange(times_n)
    with np.errstate(all="ignore"):
        rank = share * total
        reached = counts[:-1] >= rank
        at = np.where(reached.any(axis=0), reached.argmax(axis=0), len(limits) - 1)
        below = np.where(at > 0, counts[np.maximum(at - 1, 0), column], 0.0)
        start = np.where(at > 0, limits[np.maximum(at - 1, 0)], 0.0)
        inside = start + (limits[at] - start) * ((rank - below) / (counts[at, column] - below))
    found = np.where(at == len(limits) - 1, limits[-2], inside)
    found = np.where((at == 0) & (limits[0] <= 0), limits[0], found)
    return np.where(total > 0, found, np.nan)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
