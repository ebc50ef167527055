"""Methods of `mooncake.store` answer upstream's codes instead of raising our errors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import structlog

from mooncake.core.errors import CapacityError, MooncakeError, PeerError, UserError
from mooncake.dropin.store.types import INTERNAL, INVALID_PARAMS, NO_AVAILABLE_HANDLE, RPC_FAIL

log = structlog.get_logger(__name__)
P = ParamSpec("P")
Batched = TypeVar("Batched", bound=Callable[..., list[int]])


def code_of(error: MooncakeError) -> int:
    """Return what upstream calls this kind of error."""
    match error:
        case UserError():
            return INVALID_PARAMS
        case CapacityError():
            return NO_AVAILABLE_HANDLE
        case PeerError():
            return RPC_FAIL
    return INTERNAL


def answers_code(method: Callable[Concatenate[Any, P], int]) -> Callable[Concatenate[Any, P], int]:
    """Make a method answer a code, and log one line, instead of raising an error of ours."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return method(self, *args, **kwargs)
        except MooncakeError as error:
            log.error("mooncake.store: call failed", call=method.__name__, reason=str(error))
            return code_of(error)

    return call


def answers_codes(method: Batched) -> Batched:
    """As `answers_code`, for a method that answers one code per key."""

    @functools.wraps(method)
    def call(self: Any, keys: Sequence[str], *args: Any, **kwargs: Any) -> list[int]:
        try:
            return method(self, keys, *args, **kwargs)
        except MooncakeError as error:
            log.error("mooncake.store: call failed", call=method.__name__, reason=str(error))
            return [code_of(error)] * len(keys)

    return cast(Batched, call)
