"""Names of `mooncake.store` that need what is not here; whoever calls them is told so."""

from typing import NoReturn

from mooncake.core.errors import RequestError


class MooncakeDistributedNoFRegister:
    """Gives NVMe-oF targets of an SPDK process to the pool: not here."""

    def __init__(self) -> None:
        """Refuse.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "mooncake.store: MooncakeDistributedNoFRegister needs SPDK and NVMe-oF targets, which are not "
            "supported: the SSD tier is `mooncake store --ssd-path`"
        )


def _get_pyclient_from_wrapper(wrapper: object) -> NoReturn:
    """Refuse: there is no C++ client whose pointer could be given away.

    Raises:
        RequestError: always.
    """
    raise RequestError(
        f"mooncake.store: there is no C++ client behind {type(wrapper).__name__}: use its methods"
    )
