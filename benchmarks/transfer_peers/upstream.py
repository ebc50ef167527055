"""Mooncake's C++ transfer engine. It listens on every address: run it in its own network."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.transfer_peers.worker import Bytes, Contender, pool


def engine(memory: Bytes, host: str, protocol: str, device: str) -> Any:
    """Return a TransferEngine that has `memory` registered."""
    made = importlib.import_module("mooncake.engine").TransferEngine()
    if made.initialize(host, "P2PHANDSHAKE", protocol, device):
        raise RuntimeError("initialize failed")
    if made.register_memory(memory.ctypes.data, memory.size):
        raise RuntimeError("register_memory failed")
    return made


class Upstream(Contender):
    """transfer_sync_* for one page, batch_transfer_sync_* for more."""

    setting: ClassVar[tuple[str, str, str]] = ("127.0.0.1", "tcp", "")

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local = pool(pool_bytes)
        self.engine = engine(self.local, *self.setting)
        self.peer = self.start_owner()

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """See Contender."""
        memory = pool(pool_bytes)
        made = engine(memory, *cls.setting)
        return {"name": f"{cls.setting[0]}:{made.get_rpc_port()}", "address": memory.ctypes.data}, (
            made,
            memory,
        )

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        name, base, there = self.peer["name"], self.local.ctypes.data, self.peer["address"]
        mine, theirs = [base + at for at in local], [there + at for at in remote]
        lengths = [size] * len(local)
        single = getattr(self.engine, f"transfer_sync_{op.lower()}")
        batch = getattr(self.engine, f"batch_transfer_sync_{op.lower()}")

        def move() -> None:
            if len(mine) == 1:
                failed = single(name, mine[0], theirs[0], size)
            else:
                failed = batch(name, mine, theirs, lengths)
            if failed:
                raise RuntimeError(f"transfer failed: {failed}")

        return move


class UpstreamRdma(Upstream):
    """In the VM of benchmarks.transfer_rdma."""

    setting = ("10.0.0.1", "rdma", "rxe0")
