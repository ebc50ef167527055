"""The part of PromQL that our dashboards use, over samples in memory. Pure: no clock, no IO.

promql-parser (Rust, follows Prometheus 2.45) parses. Expressions come from a client, so their length and
depth are bounded first: the parser's time grows with the square of the depth, and a deep one overflows its
stack.
What is not known is refused by name, never drawn wrong. tests/live/test_against_prometheus.py compares
answers with a real Prometheus over the same samples.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mooncake.core.errors import RequestError
from mooncake.live.matching import Matcher, selected
from mooncake.live.samples import Array, Samples, Series
from mooncake.live.vectors import (
    AGGREGATIONS,
    ALL_BUT_NAME,
    ARITHMETIC,
    COMPARISON,
    SETS,
    Matching,
    Vector,
    aggregated,
    histogram_quantile,
    nameless,
    vector,
    with_number,
    with_vector,
)
from mooncake.live.windows import Windows, instant

EXPRESSION_CHARS_MAX = 8192
DEPTH_MAX = 24
"""Parentheses and braces in one another; the boards have at most 6."""
OPERATORS_MAX = 120
"""A chain of operators is a tree as deep as the chain is long."""
PARSED_MAX = 512
"""Expressions kept parsed: every panel of every board, for a few choices of variables."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|`[^`]*`')
_BRACE = re.compile(r"(?<!\\)\{")
"""A count in a pattern, `{9}`. The parser compiles patterns; counts in counts cost it 25 s an expression."""
_CODE = re.compile(r"\\[xuU0-7]")
"""The number of a character in a string, which may be a brace's."""
_OPERATOR = re.compile(r"[-+*/%^<>=!]+|\b(?:and|or|unless|atan2)\b")

Value = Vector | Array
"""A number is an array too: one for each time."""


@lru_cache(PARSED_MAX)
def parsed(expression: str) -> Any:
    """Return the tree of an expression.

    Raises:
        RequestError: it is no PromQL, too long or too deep, or has what could hide that.
    """
    import promql_parser

    if len(expression) > EXPRESSION_CHARS_MAX:
        raise RequestError(f"an expression of {len(expression)} characters, at most {EXPRESSION_CHARS_MAX}")
    bare = _STRING.sub("", expression)
    if "#" in bare:  # a quote in a comment would hide from `bare` what the parser reads
        raise RequestError("comments are not known here")
    for text in _STRING.findall(expression):
        if _BRACE.search(text) or _CODE.search(text.replace(r"\\", "")):
            raise RequestError(f"{text[:100]}: counts like {{9}} and codes like \\x7b are not known here")
    depth = deepest = 0
    for char in bare:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    if deepest > DEPTH_MAX or len(_OPERATOR.findall(bare)) > OPERATORS_MAX or "--" in bare or "++" in bare:
        raise RequestError(f"an expression with more than {DEPTH_MAX} levels or {OPERATORS_MAX} operators")
    try:
        return promql_parser.parse(expression)
    except ValueError as error:
        raise RequestError(f"cannot parse {expression[:200]!r}: {error}") from error


def names_of(expression: str) -> list[str]:
    """Return the metrics that an expression reads, sorted.

    Raises:
        RequestError: it is no PromQL, or has a selector without a name.
    """
    import promql_parser

    names: dict[str, None] = {}

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            if not node.name:
                raise RequestError("a selector without the name of a metric would read everything")
            names[node.name] = None
        elif isinstance(node, promql_parser.MatrixSelector):
            note(node.vector_selector)

    promql_parser.walk(parsed(expression), note)
    return sorted(names)


def evaluate(expression: str, samples: Samples, times_s: Array) -> list[Series]:
    """Return the series that `expression` gives at `times_s`, as Prometheus' query_range would.

    Raises:
        RequestError: it is no PromQL, uses what is not known here, or its series do not fit together.
    """
    found = _Evaluation(samples, times_s).value(parsed(expression))
    if not isinstance(found, Vector):
        return [Series((), found, np.ones(len(times_s), np.bool_))]
    return [
        Series(labels, values, there)
        for labels, values, there in zip(found.labels, found.values, found.there, strict=True)
        if there.any()
    ]


class _Evaluation:
    """One expression at many times."""

    def __init__(self, samples: Samples, times_s: Array) -> None:
        self._samples, self._times_s = samples, times_s
        self._rows = samples.rows()

    def value(self, node: Any) -> Value:
        kind = type(node).__name__
        make = getattr(self, f"_{kind.lower()}", None)
        if make is None:
            raise RequestError(f"{kind} is not known here: {str(node.prettify())[:200]}")
        made: Value = make(node)
        return made

    def _numberliteral(self, node: Any) -> Value:
        return np.full(len(self._times_s), node.val)

    def _parenexpr(self, node: Any) -> Value:
        return self.value(node.expr)

    def _unaryexpr(self, node: Any) -> Value:
        found = self.value(node.expr)
        if isinstance(found, Vector):
            return nameless(Vector(found.labels, -found.values, found.there))
        return -found

    def _vectorselector(self, node: Any) -> Value:
        samples = self._select(node)
        values, there = instant(samples, self._times_s - _offset_s(node))
        return Vector(list(samples.labels), values, there)

    def _aggregateexpr(self, node: Any) -> Value:
        how = str(node.op)
        if how not in AGGREGATIONS:
            raise RequestError(f"{how} is not known here, only {', '.join(AGGREGATIONS)}")
        only, names = True, frozenset[str]()
        if node.modifier is not None:
            only, names = str(node.modifier.type).endswith("By"), frozenset(node.modifier.labels)
        return aggregated(self._vector(node.expr), how, Matching(only, names))

    def _binaryexpr(self, node: Any) -> Value:
        op, modifier = str(node.op), node.modifier
        if op not in ARITHMETIC and op not in COMPARISON and op not in SETS:
            raise RequestError(f"operator {op} is not known here")
        as_bool = modifier is not None and modifier.return_bool
        left, right = self.value(node.lhs), self.value(node.rhs)
        if isinstance(left, Vector):
            if isinstance(right, Vector):
                return with_vector(left, op, right, _matching(modifier), as_bool=as_bool)
            return with_number(left, op, right, swapped=False, as_bool=as_bool)
        if isinstance(right, Vector):
            return with_number(right, op, left, swapped=True, as_bool=as_bool)
        with np.errstate(all="ignore"):
            if op in ARITHMETIC:
                return ARITHMETIC[op](left, right)
            return COMPARISON[op](left, right).astype(np.float64)

    def _call(self, node: Any) -> Value:
        name = node.func.name
        call = _CALLS.get(name)
        if call is None:
            raise RequestError(f"function {name} is not known here, only {', '.join(_CALLS)}")
        return call(self, node.args)

    # ------------------------------------------------------------ parts

    def _select(self, node: Any) -> Samples:
        if node.at is not None or node.matchers.or_matchers:
            raise RequestError(f"@ and `or` in selectors are not known here: {str(node.prettify())[:200]}")
        rows = self._rows.get(node.name or "", [])
        matchers = [Matcher(str(m.op).rpartition(".")[2], m.name, m.value) for m in node.matchers.matchers]
        rows = selected(self._samples.labels, rows, matchers)
        labels = [self._samples.labels[row] for row in rows]
        return Samples(self._samples.times_s, labels, self._samples.values[rows])

    def _vector(self, node: Any) -> Vector:
        found = self.value(node)
        if not isinstance(found, Vector):
            raise RequestError("a number where series are needed")
        return found

    def number(self, node: Any) -> Array:
        found = self.value(node)
        if isinstance(found, Vector):
            raise RequestError("series where a number is needed")
        return found

    def windows(self, node: Any) -> tuple[Samples, Windows]:
        if type(node).__name__ != "MatrixSelector":
            raise RequestError(f"{type(node).__name__} is not known here: {str(node.prettify())[:200]}")
        samples = self._select(node.vector_selector)
        times_s = self._times_s - _offset_s(node.vector_selector)
        return samples, Windows(samples, times_s, node.range.total_seconds())

    def mapped(self, node: Any, change: Callable[[Array], Array]) -> Vector:
        found = self._vector(node)
        with np.errstate(all="ignore"):
            return nameless(Vector(found.labels, change(found.values), found.there))

    # ------------------------------------------------------------ functions

    def rate(self, args: Sequence[Any]) -> Value:
        samples, windows = self.windows(args[0])
        return nameless(Vector(list(samples.labels), *windows.rate()))

    def increase(self, args: Sequence[Any]) -> Value:
        samples, windows = self.windows(args[0])
        return nameless(Vector(list(samples.labels), *windows.rate(per_second=False)))

    def irate(self, args: Sequence[Any]) -> Value:
        samples, windows = self.windows(args[0])
        return nameless(Vector(list(samples.labels), *windows.irate()))

    def histogram_quantile(self, args: Sequence[Any]) -> Value:
        shares = self.number(args[0])
        found = self._vector(args[1])
        return histogram_quantile(float(shares[0]) if len(shares) else 0.0, found)

    def clamp(self, args: Sequence[Any]) -> Value:
        low, high = self.number(args[1]), self.number(args[2])
        return self.mapped(args[0], lambda values: np.maximum(low, np.minimum(high, values)))

    def clamp_min(self, args: Sequence[Any]) -> Value:
        low = self.number(args[1])
        return self.mapped(args[0], lambda values: np.maximum(low, values))

    def clamp_max(self, args: Sequence[Any]) -> Value:
        high = self.number(args[1])
        return self.mapped(args[0], lambda values: np.minimum(high, values))

    def abs(self, args: Sequence[Any]) -> Value:
        return self.mapped(args[0], np.abs)

    def vector(self, args: Sequence[Any]) -> Value:
        return vector([((), self.number(args[0]), np.ones(len(self._times_s), np.bool_))], len(self._times_s))

    def time(self, _args: Sequence[Any]) -> Value:
        return self._times_s


_CALLS: dict[str, Callable[[_Evaluation, Sequence[Any]], Value]] = {
    "rate": _Evaluation.rate,
    "increase": _Evaluation.increase,
    "irate": _Evaluation.irate,
    "histogram_quantile": _Evaluation.histogram_quantile,
    "clamp": _Evaluation.clamp,
    "clamp_min": _Evaluation.clamp_min,
    "clamp_max": _Evaluation.clamp_max,
    "abs": _Evaluation.abs,
    "vector": _Evaluation.vector,
    "time": _Evaluation.time,
}


def _offset_s(selector: Any) -> float:
    return float(selector.offset.total_seconds()) if selector.offset is not None else 0.0


def _matching(modifier: Any) -> Matching:
    if modifier is None:
        return ALL_BUT_NAME
    if modifier.group_labels or str(modifier.card).endswith(("ManyToOne", "OneToMany")):
        raise RequestError("group_left and group_right are not known here")
    if modifier.matching is None:
        return ALL_BUT_NAME
    only = str(modifier.matching.type).endswith("Include")
    return Matching(only, frozenset(modifier.matching.labels))
