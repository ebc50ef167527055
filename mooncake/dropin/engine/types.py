"""What `mooncake.engine` has besides the engine: directions and words."""

import enum
from typing import TypeAlias


class TransferOpcode(enum.IntEnum):
    """Direction of a transfer, as the initiator sees it."""

    Read = 0
    Write = 1


Direction: TypeAlias = TransferOpcode
"""Inside TransferEngine, where upstream has the enum as an attribute too."""
Read = TransferOpcode.Read
Write = TransferOpcode.Write


class TransferNotify:
    """A word from one application to the other."""

    def __init__(self, name: str = "", msg: str = "") -> None:
        """Both are text."""
        self.name = name
        self.msg = msg
