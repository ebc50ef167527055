"""The yardstick: np.copyto between two private pools of one process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.transfer_peers.worker import Contender, pool


class Memcpy(Contender):
    """One copy per page."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local, self.remote = pool(pool_bytes), pool(pool_bytes)

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        mine = [self.local[at : at + size] for at in local]
        theirs = [self.remote[at : at + size] for at in remote]
        pairs = list(zip(mine, theirs, strict=True) if op == "READ" else zip(theirs, mine, strict=True))

        def move() -> None:
            for target, source in pairs:
                np.copyto(target, source)

        return move
