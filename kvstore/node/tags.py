"""What the writer of blocks says of them: for whom, what goes together, how long to keep it. Pure."""

import enum
import math

import msgspec

from kvstore.limits import TICK_S
from mooncake.core.errors import RequestError

SOFT_TTL_S_MAX = 24 * 3600.0
"""What is wanted for longer than a day is worth a hard pin; upstream's limit too."""
SOFT_TTL_S_MIN = TICK_S
"""A node does not notice time more exactly than that."""
NAME_CHARS_MAX = 128
"""Of a tenant and of a group."""
DEPTH_MAX = 1 << 24
"""Blocks of one prompt: more than any model's context."""


class Pin(enum.Enum):
    """How firmly a block is held."""

    NONE = "none"
    SOFT = "soft"
    HARD = "hard"


class Tags(msgspec.Struct, frozen=True):
    """Of all blocks of one request."""

    tenant: str = ""
    """Who pays; "" = nobody."""
    group: str = ""
    """Blocks of one group are of use only together; "" = none."""
    depth: int = -1
    """Blocks before the first one in its prompt, the others follow it; -1 = unknown."""
    soft_pin_s: float = 0.0
    hard_pin: bool = False

    def check(self) -> None:
        """Pass if it can be followed.

        Raises:
            RequestError: names what is out of bounds.
        """
        for name, text in (("tenant", self.tenant), ("group", self.group)):
            if len(text) > NAME_CHARS_MAX:
                raise RequestError(f"{name} has {len(text)} characters: at most {NAME_CHARS_MAX}")
        if not -1 <= self.depth <= DEPTH_MAX:
            raise RequestError(f"depth={self.depth}: must be -1 to {DEPTH_MAX}")
        if self.soft_pin_s:
            check_ttl(self.soft_pin_s)


PLAIN = Tags()


def check_pin_s(ttl_s: float) -> None:
    """Pass if a pin can last that long; 0 stands for none, infinity for a hard one.

    Raises:
        RequestError: it cannot.
    """
    if ttl_s not in (0, math.inf):
        check_ttl(ttl_s)


def check_ttl(ttl_s: float) -> None:
    """Pass if a soft pin can last that long.

    Raises:
        RequestError: it cannot.
    """
    if not SOFT_TTL_S_MIN <= ttl_s <= SOFT_TTL_S_MAX:
        raise RequestError(f"ttl_s={ttl_s}: must be {SOFT_TTL_S_MIN} to {SOFT_TTL_S_MAX:.0f}")
