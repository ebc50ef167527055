"""How the file of an SSD tier is divided (see kvstore.ssd.index for why). Pure."""

import msgspec

from kvstore.header import HEADER_BYTES
from mooncake.core.errors import ConfigError

SEGMENTS_MIN = 3
"""One open, one free, one that holds something meanwhile."""
SEGMENTS_MAX = 1 << 16
"""16 TiB of the default segments; to choose the next to clear looks at each."""
SEGMENT_BYTES = 256 << 20
"""A reclaim loses at most this much at once; clearing its headers (4 MiB) is 2 % of writing it."""
OBJECT_BYTES = 256 << 10
"""One header page for so many bytes of a segment (1.6 %). Smaller objects run out of header pages first."""


class Geometry(msgspec.Struct, frozen=True):
    """How a tier's file is divided. Offsets are bytes in the file."""

    segments: int
    segment_bytes: int
    slots: int

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: names the number.
        """
        if not SEGMENTS_MIN <= self.segments <= SEGMENTS_MAX:
            raise ConfigError(f"an ssd tier of {self.segments} segments: {SEGMENTS_MIN} to {SEGMENTS_MAX}")
        if self.segment_bytes % HEADER_BYTES or self.slots < 1 or self.object_bytes_max < HEADER_BYTES:
            raise ConfigError(
                f"segment_bytes={self.segment_bytes} with {self.slots} header pages: must be whole pages of "
                f"{HEADER_BYTES}, and leave room for an object"
            )

    @classmethod
    def of(
        cls, capacity_bytes: int, segment_bytes: int = SEGMENT_BYTES, object_bytes: int = OBJECT_BYTES
    ) -> "Geometry":
        """Return the division of a file of at most `capacity_bytes` for objects of about `object_bytes`.

        Raises:
            ConfigError: too small, or not whole pages.
        """
        if object_bytes < HEADER_BYTES or segment_bytes <= 0:
            raise ConfigError(f"object_bytes={object_bytes}, segment_bytes={segment_bytes}: too small")
        segments = (capacity_bytes - 2 * HEADER_BYTES) // segment_bytes
        if segments < SEGMENTS_MIN:
            least = SEGMENTS_MIN * segment_bytes + 2 * HEADER_BYTES
            raise ConfigError(f"ssd capacity_bytes={capacity_bytes}: at least {least}")
        return cls(segments, segment_bytes, max(1, segment_bytes // object_bytes))

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return 2 * HEADER_BYTES + self.segments * self.segment_bytes

    @property
    def object_bytes_max(self) -> int:
        """The largest object."""
        return self.segment_bytes - self.slots * HEADER_BYTES

    def header_offset(self, segment: int, slot: int) -> int:
        """Return where a header page lies."""
        return HEADER_BYTES + segment * self.segment_bytes + slot * HEADER_BYTES

    def objects_offset(self, segment: int) -> int:
        """Return where the objects of a segment begin."""
        return self.header_offset(segment, self.slots)
