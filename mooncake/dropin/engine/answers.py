"""Methods of `mooncake.engine` answer upstream's codes, not our errors; arguments are checked as there."""

import functools
import operator
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog

from mooncake.core.errors import MooncakeError
from mooncake.dropin.engine.types import TransferOpcode

FAILED = -1
"""Also what upstream answers for a bad setting, a bad peer and a refused range."""
TIMED_OUT = -2
DONE = 1
PENDING = 0
NOT_REGISTERED = -3
OVERLAP = -7
BAD_NAME = -101
NO_ANSWER = -102
UNKNOWN_NAME = -200
"""Codes as measured on upstream: unregister, register, probe of what is no address, of a dead peer, of a
name that the metadata server does not know."""

log = structlog.get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def answers(failed: R) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Make a method answer `failed`, and log one line, instead of raising an error of ours."""

    def wrap(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except MooncakeError as error:
                log.error("mooncake.engine: call failed", call=method.__name__, reason=str(error))
                return failed

        return call

    return wrap


def natural(value: Any) -> int:
    """Return `value` as an int; raises TypeError like upstream for what is no number of 0 or more."""
    number = operator.index(value)
    if number < 0:
        raise TypeError(f"{number}: must not be negative")
    return number


def naturals(values: Any) -> list[int]:
    """As natural, for several."""
    return [natural(value) for value in values]


def texts(*values: Any) -> None:
    """Raise TypeError like upstream for what is no text."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r}: must be a str")


def check_opcode(value: Any) -> None:
    """Raise TypeError like upstream for what is no direction."""
    if not isinstance(value, TransferOpcode):
        raise TypeError(f"{value!r}: must be a TransferOpcode")
