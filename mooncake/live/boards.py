"""The boards that Grafana gets, as the live page needs them: their queries, and which metrics they read."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mooncake.live.promql import names_of

MACROS = {"__rate_interval": "1m", "__interval": "1m", "__range": "15m"}
"""What stands in for Grafana's macros where only the names matter."""
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")
_LABEL_VALUES = re.compile(r"label_values\((?:(?P<metric>[^{},()]+)(?:\{[^}]*\})?,\s*)?\w+\)")


def load_boards() -> dict[str, dict[str, Any]]:
    """Return the boards by uid, in the order of the menu."""
    from mooncake import dashboards

    return dashboards.load_boards()


def expressions(board: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield panel title and query, for every query of a board; variables and macros are still in it."""
    for panel in panels(board):
        for target in panel.get("targets", ()):
            yield panel.get("title", ""), target["expr"]


def panels(board: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield all panels, those of collapsed rows too."""
    for panel in board.get("panels", ()):
        yield panel
        yield from panel.get("panels", ())


def filled(expression: str, values: Mapping[str, str] | None = None) -> str:
    """Return a query with its macros and variables filled in; of a variable not in `values`, all."""
    known = {**MACROS, **(values or {})}
    return _VARIABLE.sub(lambda found: known.get(found[1] or found[2], ".*"), expression)


def names_read(boards: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the metrics that the panels and variables of `boards` read, and `up`.

    Raises:
        RequestError: a query is none.
    """
    names = {"up"}
    for board in boards:
        for _, expression in expressions(board):
            names.update(names_of(filled(expression)))
        for variable in board.get("templating", {}).get("list", ()):
            query = variable.get("query", "")
            text = query.get("query", "") if isinstance(query, dict) else query
            found = _LABEL_VALUES.fullmatch(str(text).strip())
            if found and found["metric"]:
                names.add(found["metric"].strip())
    return frozenset(names)
