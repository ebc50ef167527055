"""What the connector's scheduler half tells its worker half in one step (no vLLM import)."""

from dataclasses import dataclass, field

from mooncake.core.keys import share_key
from mooncake.core.messages import Block


@dataclass
class LoadJob:
    """Copy pool blocks into the engine: blocks[i] -> block_ids[i]; keys[i] names it.

    For an engine of several ranks, `blocks` has a share of each rank for each key, block by block.
    """

    request_id: str
    keys: list[bytes]
    blocks: list[Block]
    block_ids: list[int]
    lease_id: int  # for the worker half to release; 0 = the scheduler half does, when all ranks have loaded

    def share(self, rank: int, ranks: int) -> "LoadJob":
        """Return what rank `rank` of several has to load."""
        keys = [share_key(key, rank) for key in self.keys]
        return LoadJob(self.request_id, keys, self.blocks[rank::ranks], self.block_ids, self.lease_id)


@dataclass
class SaveJob:
    """Copy engine blocks that are complete after this step into the pool."""

    keys: list[bytes]
    block_ids: list[int]
    target: str = ""  # node whose store is to copy them, because it decodes
    depth: int = -1  # of keys[0] in its prompt; -1 = unknown

    def share(self, rank: int) -> "SaveJob":
        """Return what rank `rank` of several has to save."""
        return SaveJob([share_key(key, rank) for key in self.keys], self.block_ids, self.target, self.depth)


@dataclass
class StepMeta:
    """Jobs of one step. `sync_loads` must be there before each layer's attention."""

    async_loads: list[LoadJob] = field(default_factory=list)
    sync_loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)

    def share(self, rank: int, ranks: int) -> "StepMeta":
        """Return the jobs of rank `rank` of several; these have no synchronous loads."""
        loads = [job.share(rank, ranks) for job in self.async_loads]
        return StepMeta(loads, [], [job.share(rank) for job in self.saves])


NOTHING = StepMeta()
"""Shared by all steps without work: most decode steps."""
