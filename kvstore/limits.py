"""Every bound of a store node, each with its reason. Shared by node, service and client."""

from collections.abc import Sequence

import msgspec

from mooncake.core.errors import ConfigError, RequestError
from mooncake.core.keys import KEY_BYTES

KEYS_PER_REQUEST_MAX = 16_384
"""A prompt of 262k tokens in blocks of 16: half a megabyte of keys, about 10 ms of node time."""
LEASE_S_MAX = 60.0
"""A reader that needs longer has died or must ask again; a lease pins memory."""
LEASES_MAX = 4_096
"""One lease per request in flight: four engines of 1024 sequences on a host."""
LEASED_BLOCKS_MAX = 1 << 20
"""Sum over all leases; bounds the node's memory for them to about 10 MB."""
WRITES_MAX = 65_536
"""Blocks in writing at once: 200 GB of 3 MB blocks, more than any host has in flight."""
WRITE_S_MAX = 30.0
"""From reserve to commit. A prefill chunk takes seconds; upstream discards after 30 s too."""
GRANT_S = 10.0
"""A writer uses room that it was granted in advance so long, well before the store takes it back."""
GRANT_SHARE_MAX = 4
"""Part of a segment that may be granted in advance, to all writers together: one in so many bytes."""
QUARANTINE_S = 60.0
"""How long the range of a lost writer rests: its late bytes land in memory that nobody uses.

Twice the write deadline: a writer stopped for longer than both together is still caught, by the
checksum of the block it damages; the bound trades idle memory against recomputed blocks.
"""
EVICTIONS_PER_KEY_MAX = 1_024
"""Blocks given up to place one block; more means fragmentation that eviction in age order won't heal."""
WRITER_CHARS_MAX = 128
"""A writer's name is an instance id."""
WAIT_S_MAX = 1.0
"""Longest wait of one Acquire for blocks in writing: a reader may ask again."""
PULL_WAIT_S_MAX = 10.0
"""Longest wait of one Acquire or Pull for blocks of another host: 10 GB at 10 Gb/s."""
BAD_KEYS_MAX = 1_024
"""Keys of one ReportBad: each costs the node a hash over a whole block (0.2 ms for 3 MB)."""
CHECKS_WAITING_MAX = 16
"""ReportBad requests that may queue for the one hashing thread."""
CHECK_LEASE_S = 60.0
"""A block stays in place while it is re-hashed."""
SERVICE = "store"
"""What a store is called among the applications of its transfer engine."""
ANSWER_S = 2.0
"""A store that needs longer for a request of another host is in trouble; its loop turns in milliseconds."""
EVENT_KEYS_MAX = 65_536
"""Keys of one event message: 2 MB."""
SNAPSHOT_PAGE_KEYS = 65_536
"""Keys of one snapshot page: 2 MB, one message."""
SNAPSHOTS_MAX = 4
"""Snapshots held for paging readers; 32 bytes per block each. The oldest is dropped first."""
SNAPSHOT_KEYS_MAX = 1 << 24
"""Largest snapshot a follower accepts (512 MB): beyond it the peer is not one node."""
HEARTBEAT_S = 0.5
"""Distance of heartbeats on the event socket."""
TICK_S = 0.1
"""How late an expiry may be noticed when nobody calls."""


def check_keys(keys: Sequence[bytes], keys_max: int = KEYS_PER_REQUEST_MAX) -> None:
    """Pass if these may be the keys of one request.

    Raises:
        RequestError: too many, or one that is no key.
    """
    check_count(keys, keys_max)
    for key in keys:
        if len(key) != KEY_BYTES:
            raise RequestError(f"a key has {KEY_BYTES} bytes, not {len(key)}")


def check_count(items: Sequence[object], keys_max: int = KEYS_PER_REQUEST_MAX) -> None:
    """Pass if one request may name as many; raises RequestError."""
    if len(items) > keys_max:
        raise RequestError(f"{len(items)} keys in one request: at most {keys_max}")


class NodeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds that tests and the simulator vary; defaults are the named constants."""

    keys_max: int = KEYS_PER_REQUEST_MAX
    lease_s_max: float = LEASE_S_MAX
    leases_max: int = LEASES_MAX
    leased_blocks_max: int = LEASED_BLOCKS_MAX
    writes_max: int = WRITES_MAX
    write_s: float = WRITE_S_MAX
    quarantine_s: float = QUARANTINE_S

    def __post_init__(self) -> None:
        """Refuse bounds that are not positive.

        Raises:
            ConfigError: names the bound and its value.
        """
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"limit {name}={value!r} must be positive")
