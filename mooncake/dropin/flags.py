"""Command lines as gflags reads them: `--name=value`, `--name value`, `--switch`, `--noswitch`."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from mooncake.core.config import fail

TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
"""Of gflags, which upstream's flags are."""
HELP = ("help", "h")
T = TypeVar("T", bound=msgspec.Struct)


def asks_for_help(words: Sequence[str]) -> bool:
    """Return whether one of `words` is --help."""
    return any(word.startswith("-") and word.lstrip("-") in HELP for word in words)


def parse_flags(
    words: Sequence[str], kind: type[T], aliases: Mapping[str, str] | None = None
) -> tuple[T, list[str]]:
    """Return the options that `words` give, and the flags that mean nothing here.

    Args:
        words: of the command line.
        kind: a struct whose fields (bool, int, float, str) are the flags.
        aliases: other names of fields.

    Raises:
        ConfigError: a value is no number or no truth value.
    """
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, int | float | str | bool] = {}
    unknown: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        name = (aliases or {}).get(name, name)
        field = known.get(name) or known.get(name.removeprefix("no"))
        is_switch = field is not None and field.type is bool
        if not word.startswith("-") or field is None or (field.name != name and not is_switch):
            unknown.append(word.partition("=")[0])  # its value may be a password
            if word.startswith("-") and not equals and left and not left[0].startswith("-"):
                left.pop(0)
            continue
        if not equals:
            if not is_switch and not left:
                raise fail(name, "", "a value is missing")
            text = ("true" if field.name == name else "false") if is_switch else left.pop(0)
        values[field.name] = _value(name, text, field.type)
    return kind(**values), unknown


def _value(name: str, text: str, kind: type) -> int | float | str | bool:
    if kind is bool:
        if text.lower() not in TRUE + FALSE:
            raise fail(name, text, "true or false")
        return text.lower() in TRUE
    if kind is int:
        try:
            return int(text)
        except ValueError as error:
            raise fail(name, text, "a whole number") from error
    if kind is float:
        try:
            return float(text)
        except ValueError as error:
            raise fail(name, text, "a number") from error
    return text
