"""NIXL over UCX, by its fastest documented way: prepared descriptor lists, transfers by index.

Its progress thread spins. The initiator has none, since it polls anyway: with one in each process,
which is NIXL's default, moves were as fast or slower on two cores and cost more CPU. The owner's is needed.
"""

import base64
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.transfer_peers.worker import Bytes, Contender, pool

MOVE_S_MAX = 30.0


def agent(name: str, memory: Bytes, progress: bool) -> Any:
    """Return an agent that has `memory` registered."""
    api = importlib.import_module("nixl_cu13._api")
    made = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress, backends=["UCX"]))
    made.register_memory([(memory.ctypes.data, memory.size, 0, "")], "DRAM")
    return made


class Ucx(Contender):
    """make_prepped_xfer, transfer, and polling until it is done."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local = pool(pool_bytes)
        self.agent = agent("initiator", self.local, progress=False)
        peer = self.start_owner()
        self.peer = self.agent.add_remote_agent(base64.b64decode(peer["metadata"]))
        self.bases = self.local.ctypes.data, peer["address"]
        self.lists: dict[int, tuple[Any, Any]] = {}

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """See Contender."""
        memory = pool(pool_bytes)
        made = agent("owner", memory, progress=True)
        metadata = base64.b64encode(made.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": memory.ctypes.data}, (made, memory)

    def prepared(self, size: int) -> tuple[Any, Any]:
        """Return the descriptor lists of all slots of `size` bytes, ours and the owner's."""
        if size not in self.lists:
            starts = range(0, self.pool_bytes, size)
            both = [np.array([(base + at, size, 0) for at in starts]) for base in self.bases]
            made = [
                self.agent.prep_xfer_dlist(name, rows, "DRAM")
                for name, rows in zip(("NIXL_INIT_AGENT", self.peer), both, strict=True)
            ]
            self.lists[size] = made[0], made[1]
        return self.lists[size]

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        ours, theirs = self.prepared(size)
        here, there = (np.array(side, np.int32) // size for side in (local, remote))

        def move() -> None:
            handle = self.agent.make_prepped_xfer(op, ours, here, theirs, there)
            state = self.agent.transfer(handle)
            end_s = time.monotonic() + MOVE_S_MAX
            while state == "PROC" and time.monotonic() < end_s:
                state = self.agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"transfer ended as {state}")
            handle.release()

        return move
