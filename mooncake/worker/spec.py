"""What an engine process is told, and what it answers once it is ready."""

import signal
from pathlib import Path

import msgspec

from mooncake.core.config import STEP_TOKENS
from mooncake.core.messages import StoreRecord
from mooncake.core.process import pick_cores

LOAD_MODES = ("async", "layerwise")
STOP_SIGNAL = signal.SIGUSR2
"""By which a relay ends its engine: SIGTERM may come to a whole process group, and the relay drains first."""


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The place of a process in an engine that spans several nodes; rank 0 leads, and serves."""

    count: int
    rank: int
    address: str  # of this node, for the others
    leader: str  # address of rank 0
    port: int  # on the leader: where torch.distributed's ranks find each other


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one engine process needs; travels as JSON, never holds a secret.

    Sizes in bytes, block_size in tokens. `store` None = no pool: the engine runs alone.
    """

    instance_id: str
    role: str  # prefill | decode | both
    epoch: str
    run_dir: str
    model: str
    dtype: str = "bfloat16"
    block_size: int = 32
    max_model_len: int = 0  # 0 = the model's own
    kv_memory_bytes: int = 512 << 20
    max_num_seqs: int = 16
    max_num_batched_tokens: int = STEP_TOKENS
    cores: list[int] = []  # [] = not bound
    threads: int = 0  # of a CPU engine; 0 = one per core it is bound to
    load_mode: str = "async"
    save_decoded: bool = True
    store: StoreRecord | None = None
    vllm_args: list[str] = []
    nodes: NodeSpec | None = None  # None = one node

    @property
    def threads_used(self) -> int:
        """What a CPU engine computes with: unbound, it cannot know how many cores are its own."""
        return self.threads or max(1, len(self.cores))

    def share_of_cores(self, rank: int, ranks: int) -> tuple[list[int], int]:
        """Return the cores and the number of threads of one of `ranks` of a CPU engine; each has 1."""
        cores = pick_cores(rank, ranks, self.cores) if self.cores else []
        return cores, max(1, self.threads_used // ranks)

    @property
    def engine_in(self) -> str:
        """ZMQ address on which the relay feeds the engine."""
        return f"ipc://{self.run_dir}/in"

    @property
    def kv_events(self) -> str:
        """ZMQ address on which vLLM publishes what its prefix cache holds."""
        return f"ipc://{self.run_dir}/kv"

    @property
    def kv_replay(self) -> str:
        """ZMQ address on which vLLM repeats what it has published."""
        return f"ipc://{self.run_dir}/kv-replay"

    @property
    def facts_path(self) -> Path:
        """File that the engine writes (atomically) before it reports ready."""
        return Path(self.run_dir) / "facts.json"

    @property
    def store_path(self) -> Path:
        """File in which the relay keeps the store's current record (it may restart elsewhere)."""
        return Path(self.run_dir) / "store.json"

    @property
    def pulse_path(self) -> Path:
        """File of the shared counters (see pulse.py)."""
        return Path(self.run_dir) / "pulse"


class EngineFacts(msgspec.Struct, frozen=True):
    """What only the engine knows: the root of its block names and the size of one block, over all ranks.

    tells_blocks: whether it publishes on `EngineSpec.kv_events` what its prefix cache holds.
    ranks: that share each block (core.keys.share_key).
    """

    context_root: str  # hex, core.context.KvContext.root()
    block_bytes: int
    context: dict[str, str]  # core.context.KvContext.settings()
    tells_blocks: bool = False
    ranks: int = 1


def write_atomically(path: Path, payload: bytes) -> None:
    """Write `path` so that a reader sees all or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(payload)
    temporary.replace(path)


def current_store(path: Path) -> StoreRecord | None:
    """Return the store's record as the relay last saw it, or None."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=StoreRecord)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def write_facts(path: Path, facts: EngineFacts) -> None:
    """Write `facts` for the relay."""
    write_atomically(path, msgspec.json.encode(facts))
