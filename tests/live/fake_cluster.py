"""Pages of a cluster that is none: every metric that the boards read, with the labels they ask for.

What a query selects by (result="met") or groups by (role) is taken from the query itself, so a panel without
a line is a fault of the page and not of the data. Counters rise in waves and one process begins again.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import promql_parser

from mooncake.live.boards import expressions, filled, load_boards
from mooncake.live.promql import parsed
from mooncake.live.ring import ROUND_S, Page, Part, Ring, Sample, part_of

PROCESSES = ("gateway-0", "prefill-0", "decode-0")
LIMITS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, math.inf)
RESTART_AT = 100
"""In this round the last process begins again."""
ROUNDS = 185

Wanted = dict[str, dict[tuple[tuple[str, str], ...], None]]


def metrics_wanted() -> Wanted:
    """Return the label sets that the boards' queries need, by metric."""
    wanted: Wanted = {}
    for board in load_boards().values():
        for _, expression in expressions(board):
            _walk(parsed(filled(expression)), {}, wanted)
    wanted.pop("up", None)  # said by who asks
    return wanted


def _walk(node: Any, grouped: Mapping[str, None], wanted: Wanted) -> None:
    if isinstance(node, promql_parser.VectorSelector):
        for one in _label_sets(node.matchers.matchers, grouped):
            wanted.setdefault(node.name, {})[tuple(sorted(one.items()))] = None
        return
    if isinstance(node, promql_parser.MatrixSelector):
        _walk(node.vector_selector, grouped, wanted)
        return
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        grouped = {**grouped, **dict.fromkeys(node.modifier.labels)}
    children = [getattr(node, name) for name in ("expr", "lhs", "rhs") if hasattr(node, name)]
    for child in [*children, *getattr(node, "args", ())]:
        _walk(child, grouped, wanted)


def _label_sets(matchers: list[Any], grouped: Mapping[str, None]) -> list[dict[str, str]]:
    sets: list[dict[str, str]] = [{}]
    for matcher in matchers:
        kind = str(matcher.op).rpartition(".")[2]
        if kind == "Equal":
            sets = [{**one, matcher.name: matcher.value} for one in sets]
        elif kind == "Re" and not any(char in matcher.value for char in ".*+["):
            sets = [{**one, matcher.name: value} for one in sets for value in matcher.value.split("|")]
    for name in grouped:
        if name not in ("process", "le", "instance") and name not in sets[0]:
            sets = [{**one, name: f"{name}-{i}"} for one in sets for i in range(2)]
    return sets


class Shape(NamedTuple):
    """How one series moves."""

    name: str
    labels: dict[str, str]
    seed: int
    speed: float
    counts: bool


def shapes(wanted: Wanted, process: str) -> list[Shape]:
    """Return the series of a process."""
    found = []
    for name, sets in wanted.items():
        for labels in sets:
            seed = zlib.crc32(f"{name}{labels}{process}".encode())
            speed = 0.5 + seed % 100 / 25
            if name.endswith("_bucket"):
                for n, limit in enumerate(LIMITS):
                    text = "+Inf" if math.isinf(limit) else f"{limit:g}"
                    found.append(Shape(name, {**dict(labels), "le": text}, seed, speed * (n + 1), True))
            else:
                counts = name.endswith(("_total", "_sum", "_count"))
                found.append(Shape(name, dict(labels), seed, speed, counts))
    return found


def page(series: list[Shape], rounds: int) -> list[Sample]:
    """Return what a process says after so many rounds of life."""
    return [
        (
            one.name,
            one.labels,
            round(_grown(one.speed, one.seed, rounds), 3)
            if one.counts
            else round(one.speed * (1.2 + math.sin(rounds / 25 + one.seed % 7)), 4),
        )
        for one in series
    ]


def _grown(speed: float, seed: int, rounds: int) -> float:
    phase = seed % 6
    waves = 20 * (math.cos(phase) - math.cos(rounds / 20 + phase))  # the integral of a sine
    return speed * ROUND_S * (1.1 * rounds + waves)


def fill(ring: Ring, end_s: float, rounds: int = ROUNDS) -> None:
    """Let `rounds` rounds happen, the last at `end_s`."""
    wanted = metrics_wanted()
    parts: dict[str, Part] = {name: part_of(name, f"http://{name}:9/metrics") for name in PROCESSES}
    series = {name: shapes(wanted, name) for name in PROCESSES}
    for n in range(1, rounds + 1):
        pages: dict[Part, Page | None] = {}
        for name, part in parts.items():
            is_last = name == PROCESSES[-1]
            if is_last and RESTART_AT - 3 <= n < RESTART_AT:
                pages[part] = None
            else:
                pages[part] = page(series[name], n - RESTART_AT if is_last and n >= RESTART_AT else n)
        ring.add(end_s - ROUND_S * (rounds - n), pages)
