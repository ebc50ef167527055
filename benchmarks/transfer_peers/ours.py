"""transfer.engine: over shared memory, TCP and RDMA, and reading over shared memory with checksums.

Each engine has one transport only: nothing can quietly take another.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.transfer_peers.worker import Contender, pool
from mooncake.core.keys import block_checksum
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
from transfer.model import Opcode


class Shm(Contender):
    """The owner's memory is the engine's own."""

    transport: ClassVar[str] = "shm"

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local = pool(pool_bytes)
        self.engine = TransferEngine(EngineConfig(transports=(self.transport,))).start()
        self.engine.register(self.local)
        self.peer = self.start_owner()

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """See Contender."""
        engine = TransferEngine(EngineConfig(transports=(cls.transport,))).start()
        return {"name": engine.name, "address": engine.allocate(pool_bytes).address}, engine

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        base, there, name = self.local.ctypes.data, self.peer["address"], self.peer["name"]
        mine, theirs = [base + at for at in local], [there + at for at in remote]
        lengths = [size] * len(local)
        return lambda: self.engine.transfer(Opcode[op], name, mine, theirs, lengths)


class Tcp(Shm):
    """The owner's memory is private, as the peers' is."""

    transport = "tcp"

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """See Contender."""
        engine = TransferEngine(EngineConfig(transports=(cls.transport,))).start()
        return {"name": engine.name, "address": engine.register(pool(pool_bytes)).address}, engine


class Rdma(Tcp):
    """For a machine with a device."""

    transport = "rdma"


class Verify(Shm):
    """Every page that was read is hashed and compared; its seed is its place, as a block's is its key."""

    def check(self) -> None:
        """Give the owner contents that are known here; every read is then a check."""
        self.sums: dict[tuple[int, int], bytes] = {}
        self.sent = np.random.default_rng(2).integers(0, 256, self.pool_bytes, np.uint8)
        np.copyto(self.local, self.sent)
        super().plan("WRITE", self.pool_bytes, [0], [0])()
        self.local[:] = 0

    def expected(self, size: int, at: int) -> tuple[bytes, bytes]:
        """Return the seed and the checksum of the owner's block at `at`."""
        seed = at.to_bytes(8, "little")
        if (size, at) not in self.sums:
            self.sums[size, at] = block_checksum(seed, self.sent[at : at + size].data)
        return seed, self.sums[size, at]

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        move = super().plan(op, size, local, remote)
        pages = [self.local[at : at + size].data for at in local]
        wanted = [(*self.expected(size, at), page) for at, page in zip(remote, pages, strict=True)]

        def verified() -> None:
            move()
            for seed, checksum, page in wanted:
                if block_checksum(seed, page) != checksum:
                    raise RuntimeError("a checksum does not fit")

        return verified
