"""Label matchers of selectors. Pure.

Prometheus' regular expressions run in linear time, Python's do not: one from a client could hold the whole
process for minutes. So only shapes that cannot are taken: literals, classes, plain groups, `|`, and few `*`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from mooncake.core.errors import RequestError
from mooncake.live.samples import Labels

STARS_MAX = 3
"""Repeats in one alternative: a value of n characters costs at most n to this power."""
GROUPS_MAX = 3
"""Each multiplies the ways that have to be tried."""
VALUE_CHARS_MAX = 128
"""A longer value matches no pattern with a repeat: with STARS_MAX, some 10 ms at worst."""
_ATOM = r"(?:\\.|\[\^?[^\[\]\\]+\]|[^\\\[\](){}*+?|^$])"
_SAFE = re.compile(rf"(?:{_ATOM}[*+?]?|[|()^$]|\(\?:)*", re.DOTALL)
_REPEAT = re.compile(r"(?<![\\(])[*+?]")
_GROUP = re.compile(r"(?<!\\)\(")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+?{]")


class Matcher(msgspec.Struct, frozen=True):
    """One of `name="value"` (Equal), NotEqual, Re, NotRe."""

    kind: str
    name: str
    value: str

    def holds(self, value: str) -> bool:
        """Return whether a label with this value, "" = without it, matches."""
        if self.kind in ("Equal", "NotEqual"):
            return (value == self.value) == (self.kind == "Equal")
        return matches(self.value, value) == (self.kind == "Re")


def selected(labels: Sequence[Labels], rows: Sequence[int], matchers: Sequence[Matcher]) -> list[int]:
    """Return those of `rows` whose labels all matchers hold for.

    Raises:
        RequestError: a regular expression is not one of those that are taken.
    """
    if not matchers:
        return list(rows)
    found = []
    for row in rows:
        known = dict(labels[row])
        if all(matcher.holds(known.get(matcher.name, "")) for matcher in matchers):
            found.append(row)
    return found


@lru_cache(512)
def _pattern(text: str) -> tuple[re.Pattern[str], bool]:
    groups = len(_GROUP.findall(text))
    parts = [text] if groups else text.split("|")
    stars = max(len(_REPEAT.findall(part)) for part in parts)
    safe = _SAFE.fullmatch(text) and not _REPEATED_GROUP.search(text)
    if not safe or stars > STARS_MAX or groups > GROUPS_MAX:
        raise RequestError(
            f"regular expression {text[:100]!r}: only literals, classes, |, {GROUPS_MAX} groups without a"
            f" repeat and {STARS_MAX} of * + ? are taken here"
        )
    try:
        return re.compile(text, re.DOTALL), stars > 0
    except re.error as error:
        raise RequestError(f"regular expression {text[:100]!r}: {error}") from error


@lru_cache(4096)
def matches(text: str, value: str) -> bool:
    """Return whether the whole of `value` matches.

    Raises:
        RequestError: the regular expression is not one of those that are taken.
    """
    if text == ".*":
        return True
    pattern, repeats = _pattern(text)
    if repeats and text != ".+" and len(value) > VALUE_CHARS_MAX:
        return False
    return pattern.fullmatch(value) is not None
