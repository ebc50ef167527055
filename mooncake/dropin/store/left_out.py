"""Methods of upstream's store that do nothing here; each says why, instead of pretending."""

from typing import Any, NoReturn

from mooncake.core.errors import RequestError

REASONS = {
    "init_all": "use setup",
    "mount_segment": "memory of a file is not given to the pool: use allocate_and_mount_segment",
}


class LeftOut:
    """Has them all."""


def _refuse(name: str, reason: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001 - refused whatever they are
        raise RequestError(f"mooncake.store: {name}: {reason}")

    call.__name__ = name
    call.__doc__ = f"Not here: {reason}.\n\nRaises:\n    RequestError: always."
    return call


for _name, _reason in REASONS.items():
    setattr(LeftOut, _name, _refuse(_name, _reason))
