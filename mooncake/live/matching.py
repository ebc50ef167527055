"""Label matchers of selectors. Pure.

Patterns come from clients: RE2 takes one pass over a value whatever the pattern is, where Python's own `re`
can be held for hours. It is also Prometheus' language.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
import re2

from mooncake.core.errors import RequestError
from mooncake.live.samples import Labels

PROGRAM_MAX = 2000
"""RE2's instructions: 600 names of instances have 140. A value of a kilobyte takes a millisecond at worst."""
PATTERN_BYTES_MAX = 1 << 20
"""What RE2 may remember of one pattern's states; it keeps PATTERNS_MAX of them."""
PATTERNS_MAX = 128


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
        RequestError: a regular expression is none, or too large.
    """
    if not matchers:
        return list(rows)
    found = []
    for row in rows:
        known = dict(labels[row])
        if all(matcher.holds(known.get(matcher.name, "")) for matcher in matchers):
            found.append(row)
    return found


@lru_cache(PATTERNS_MAX)
def _pattern(text: str) -> Any:
    options = re2.Options()
    options.max_mem, options.log_errors = PATTERN_BYTES_MAX, False
    options.never_capture, options.dot_nl = True, True
    try:
        pattern = re2.compile(text, options)
    except (re2.error, UnicodeEncodeError) as error:
        raise RequestError(f"regular expression {text[:100]!r}: {error}") from error
    if pattern.programsize > PROGRAM_MAX:
        raise RequestError(f"regular expression {text[:100]!r} is too large: choose fewer values")
    return pattern


@lru_cache(4096)
def matches(text: str, value: str) -> bool:
    """Return whether the whole of `value` matches.

    Raises:
        RequestError: this is no regular expression of RE2's, or too large.
    """
    if text == ".*":
        return True
    return _pattern(text).fullmatch(value.encode(errors="replace")) is not None
