"""What the connector's scheduler half tells its worker half in one step (no vLLM import)."""

from dataclasses import dataclass, field

from mooncake.core.messages import Block


@dataclass
class LoadJob:
    """Copy pool blocks into the engine: blocks[i] -> block_ids[i]; keys[i] names it."""

    request_id: str
    keys: list[bytes]
    blocks: list[Block]
    block_ids: list[int]
    lease_id: int


@dataclass
class SaveJob:
    """Copy engine blocks that are complete after this step into the pool."""

    keys: list[bytes]
    block_ids: list[int]
    target: str = ""  # node whose store is to copy them, because it decodes
    depth: int = -1  # of keys[0] in its prompt; -1 = unknown


@dataclass
class StepMeta:
    """Jobs of one step. `sync_loads` must be there before each layer's attention."""

    async_loads: list[LoadJob] = field(default_factory=list)
    sync_loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)


NOTHING = StepMeta()
"""Shared by all steps without work: most decode steps."""
