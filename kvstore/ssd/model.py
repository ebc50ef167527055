"""What goes into and comes out of an SSD tier (kvstore.ssd.tier): settings, requests, answers, numbers."""

import msgspec

from kvstore.header import NO_LAYOUT
from kvstore.ssd.index import FREE_SEGMENTS, PROMOTE_HITS, PROMOTE_WINDOW_S
from kvstore.ssd.layout import OBJECT_BYTES, SEGMENT_BYTES
from mooncake.core.errors import ConfigError, MooncakeError

DEADLINE_S = 10.0
"""Of one disk access with its queue. A healthy SSD answers in milliseconds."""


class SsdConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one tier.

    Args:
        node: name of the host in the cluster; the tier's file belongs to it.
        path: directory of the tier, its own.
        capacity_bytes: of the file; taken at once.
        segment_bytes: see kvstore.ssd.layout; the largest object is a little smaller.
        object_bytes: typical size of an object.
        free_segments: kept free for the next demotions.
        promote_hits: within promote_window_s.
        promote_window_s: see promote_hits.
        deadline_s: of one disk access.
    """

    node: str
    path: str
    capacity_bytes: int
    segment_bytes: int = SEGMENT_BYTES
    object_bytes: int = OBJECT_BYTES
    free_segments: int = FREE_SEGMENTS
    promote_hits: int = PROMOTE_HITS
    promote_window_s: float = PROMOTE_WINDOW_S
    deadline_s: float = DEADLINE_S

    def __post_init__(self) -> None:
        """Refuse a deadline that is none.

        Raises:
            ConfigError: names it.
        """
        if not self.deadline_s > 0:
            raise ConfigError(f"ssd deadline_s={self.deadline_s}: must be positive")


class Put(msgspec.Struct, frozen=True):
    """One object to store: `checksum` is block_checksum(key, view), `name` what it is called."""

    key: bytes
    view: memoryview
    checksum: bytes
    layout: int = NO_LAYOUT
    name: bytes = b""


class Got(msgspec.Struct, frozen=True):
    """The answer to one read. Neither hit nor error is a miss.

    `promote`: worth a place in DRAM. `error`: IntegrityError = the bytes were wrong or unreadable, the
    object is dropped. PeerTimeout = the disk hangs; it may still write into the view while that is in
    `SsdTier.unsettled`. CapacityError = too much is in flight. RequestError = a view of another size.
    """

    hit: bool = False
    promote: bool = False
    error: MooncakeError | None = None


class Recovered(msgspec.Struct):
    """What a start found on the disk. All but the first two count what was skipped."""

    objects: int = 0
    bytes: int = 0
    torn: int = 0
    """Header pages that are damaged or half written."""
    stale: int = 0
    """Of an earlier life of their segment, or put again later."""
    misplaced: int = 0
    """Sound headers at the wrong place: another tier's, or a misdirected write."""
    foreign: int = 0
    """Of a version or a codec that this program does not know."""
    corrupt: int = 0
    """Sound headers of the newest segments whose objects are torn."""


class SsdStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since start, gauges now."""

    capacity_bytes: int
    live_bytes: int
    objects: int
    free_segments: int
    hits: int
    misses: int
    evictions: int
    puts: int
    put_bytes: int
    read_bytes: int
    corrupt: int
    write_errors: int
    recovered: Recovered
