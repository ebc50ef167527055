"""What is to break down in the simulated world, and when: written down one by one, or drawn.

`prefill-003@120+30`: that engine, at 120 s, for 30 s; without `+30`, for good. `host-prefill-003@120+30`: its
whole host, so that the store's blocks and what they were sent to others are lost, too.
"""

import math
import re
from collections.abc import Sequence
from random import Random

import msgspec

from mooncake.core.errors import ConfigError

HOST_SHARE = 0.25
"""Of what is drawn, those that take the whole host: processes die more often than machines."""
FAILURES_MAX = 100_000
"""Drawn ones: beyond it, nothing else would happen."""

_ONE = re.compile(
    r"(?P<host>host-)?(?P<name>[a-z]+-[0-9]+)@(?P<at>[0-9]+(\.[0-9]+)?)(\+(?P<back>[0-9]+(\.[0-9]+)?))?"
)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An engine breaks down at `at_s`, `host`: with its host, and is back `back_s` later (inf: never)."""

    at_s: float
    name: str
    host: bool = False
    back_s: float = math.inf


def parse(text: str, names: Sequence[str]) -> list[Failure]:
    """Return the failures of a list with commas.

    Args:
        text: as the module says; "" = none.
        names: of all instances.

    Raises:
        ConfigError: not so written, or nobody is called so.
    """
    found = []
    for one in filter(None, (part.strip() for part in text.split(","))):
        failure = _failure(one)
        if failure is None:
            raise ConfigError(f"kill={one!r}: must be like prefill-003@120+30 or host-prefill-003@120")
        if failure.name not in names:
            raise ConfigError(f"kill={one!r}: there is {names[0]} to {names[-1]}, no {failure.name}")
        found.append(failure)
    return sorted(found, key=lambda failure: failure.at_s)


def _failure(text: str) -> Failure | None:
    match = _ONE.fullmatch(text)
    if match is None:
        return None
    back_s = float(match["back"] or "inf")
    return Failure(at_s=float(match["at"]), name=match["name"], host=bool(match["host"]), back_s=back_s)


def draw(names: Sequence[str], length_s: float, mtbf_s: float, repair_s: float, seed: int) -> list[Failure]:
    """Return failures of every instance, mtbf_s of work apart in the mean, each repair_s long.

    Raises:
        ConfigError: a number is out of range, or there would be too many.
    """
    if not (mtbf_s > 0 and repair_s >= 0):
        raise ConfigError(f"mtbf_s={mtbf_s}: must be positive; repair_s={repair_s}: must not be negative")
    if length_s / (mtbf_s + repair_s) * len(names) > FAILURES_MAX:
        raise ConfigError(f"mtbf_s={mtbf_s}: more than {FAILURES_MAX} failures in {length_s:.0f} s")
    random = Random(seed)
    found = []
    for name in names:
        at_s = random.expovariate(1 / mtbf_s)
        while at_s < length_s:
            host = random.random() < HOST_SHARE
            found.append(Failure(at_s=at_s, name=name, host=host, back_s=repair_s))
            at_s += repair_s + random.expovariate(1 / mtbf_s)
    return sorted(found, key=lambda failure: (failure.at_s, failure.name))
