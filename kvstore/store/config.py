"""Settings of one store node, checked before anything is opened."""

import re

import msgspec

from kvstore.node.allocator import ALIGN_BYTES
from kvstore.node.keeping import make_policy
from kvstore.node.node import HARD_PIN_RATIO
from kvstore.node.pins import Guarded
from kvstore.ssd.model import SsdConfig
from kvstore.ssd.writebehind import AGE_S
from mooncake.core.errors import ConfigError
from transfer.config import EngineConfig

EVICT_RATIO = 0.05
"""Upstream's default."""
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # a host name; becomes a file name


class FileMemory(msgspec.Struct, frozen=True):
    """Memory of a file: StoreConfig.capacity_bytes of it from `offset` on, see transfer.file_segment."""

    path: str
    offset: int = 0


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one store node.

    Args:
        node: name of the host in the cluster, one store each.
        capacity_bytes: memory given to KV blocks; rounded down to whole pages.
        run_dir: private directory (0700) for the socket that hands out the memory.
        endpoint: where requests are served; loopback tcp or ipc, port 0 = any.
        events: where events are published; as `endpoint`.
        metrics_url: where they are served, by whoever runs this; "" = nowhere.
        eviction: lru, lfu, length or tail: kvstore.node.eviction says what they mean.
        hard_pin_ratio: of the memory that blocks may hold that are never evicted.
        evict_soft_pins: whether soft pins give way, after everything else, before their time is over.
        quota_needed: whether a tenant without a quota is refused.
        evict_above_ratio: of the memory in use, from where on blocks are evicted ahead of need; 1 = never.
        evict_ratio: of the memory, evicted below that in one go.
        ssd: the SSD tier below the memory; None = none.
        ssd_age_s: a block is copied there once it is that old, or earlier when memory runs short.
        ssd_reads: of a block from there until it is kept in memory like any other; before, it goes first.
        transfer: settings of the transfer engine through which engines of other hosts read and write;
            None = this host only.
        hugepages: auto, off or require: transfer.hugepages says what they mean.
    """

    node: str
    capacity_bytes: int
    run_dir: str
    endpoint: str = "tcp://127.0.0.1:0"
    events: str = "tcp://127.0.0.1:0"
    metrics_url: str = ""
    transfer: EngineConfig | None = None
    eviction: str = "lru"
    hard_pin_ratio: float = HARD_PIN_RATIO
    evict_soft_pins: bool = True
    quota_needed: bool = False
    evict_above_ratio: float = 1.0
    evict_ratio: float = EVICT_RATIO
    ssd: SsdConfig | None = None
    ssd_age_s: float = AGE_S
    ssd_reads: int = 1
    hugepages: str = "auto"

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ConfigError: names the setting and its value.
        """
        if not _NODE_NAME.fullmatch(self.node):
            raise ConfigError(f"node={self.node!r}: 1 to 63 letters, digits, '.', '_' or '-'")
        if self.capacity_bytes < ALIGN_BYTES:
            raise ConfigError(f"capacity_bytes={self.capacity_bytes}: at least {ALIGN_BYTES}")
        for name in ("evict_above_ratio", "evict_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: 0 to 1")
        if self.ssd_reads < 1:
            raise ConfigError(f"ssd_reads={self.ssd_reads}: at least 1")
        self.policy(self.capacity_bytes)

    def policy(self, capacity_bytes: int) -> Guarded:
        """Return what decides which blocks of so much memory go first."""
        return make_policy(
            capacity_bytes,
            self.eviction,
            self.hard_pin_ratio,
            evict_soft=self.evict_soft_pins,
            quota_needed=self.quota_needed,
        )
