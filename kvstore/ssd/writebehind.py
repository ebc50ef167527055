"""Which blocks of the DRAM segment are copied to the SSD tier next. Pure.

A node evicts in the middle of a reservation: the bytes are overwritten at once, there is no time to
write them to a disk. So blocks are copied *before* they are evicted, and eviction of a copied block is
its demotion. It also means that a host whose processes are all killed finds its KV again, but for the
last `age_s` and what the disk could not keep up with.

- In quiet times a block is copied once it is `age_s` old: tails and hand-overs that are dropped sooner
  never wear the disk.
- From `high` (of the segment in use) on, until it falls below `low`, blocks are copied at once, oldest
  first: they are the next to go.
- A block that could not be copied is tried again behind the others, `attempts_max` times in all.
"""

from collections import OrderedDict

import msgspec

from mooncake.core.errors import ConfigError

AGE_S = 2.0
"""Longer than a hand-over between prefill and decode; what a kill may cost."""
HIGH, LOW = 0.80, 0.70
"""Of the segment: the last fifth takes a burst of writes while the disk catches up."""
BATCH_BYTES = 64 << 20
"""Handed out at once: milliseconds of the disk's time, so that reads of the tier do not wait long."""
ATTEMPTS_MAX = 3


class WriteBehindLimits(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    age_s: float = AGE_S
    high: float = HIGH
    low: float = LOW
    batch_bytes: int = BATCH_BYTES
    attempts_max: int = ATTEMPTS_MAX

    def __post_init__(self) -> None:
        """Refuse limits that cannot work.

        Raises:
            ConfigError: names them.
        """
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"write behind low={self.low}, high={self.high}: 0 <= low <= high <= 1")
        if not self.age_s >= 0 or self.batch_bytes <= 0 or self.attempts_max <= 0:
            raise ConfigError(
                f"write behind age_s={self.age_s}, batch_bytes={self.batch_bytes}, "
                f"attempts_max={self.attempts_max}: must be positive"
            )


class _Waiting(msgspec.Struct, gc=False):
    size_bytes: int
    since_s: float
    attempts: int = 0


class WriteBehind:
    """Blocks that are in DRAM only, in the order they came. Fed by the node's events."""

    def __init__(self, limits: WriteBehindLimits | None = None) -> None:
        """Start empty."""
        self.limits = limits or WriteBehindLimits()
        self.waiting_bytes = 0
        self.given_up = 0
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()
        self._copying: dict[bytes, _Waiting] = {}
        self._pressed = False

    def __len__(self) -> int:
        """Return how many blocks are in DRAM only, those that are being copied included."""
        return len(self._waiting) + len(self._copying)

    def stored(self, now_s: float, key: bytes, size_bytes: int) -> None:
        """Say that a block is complete in DRAM and not on the SSD."""
        if key not in self._waiting and key not in self._copying:
            self._waiting[key] = _Waiting(size_bytes, now_s)
            self.waiting_bytes += size_bytes

    def removed(self, key: bytes) -> None:
        """Say that a block is gone from DRAM; unknown keys are fine."""
        self._copying.pop(key, None)
        block = self._waiting.pop(key, None)
        if block is not None:
            self.waiting_bytes -= block.size_bytes

    def due(self, now_s: float, used: float) -> list[bytes]:
        """Return the blocks to copy now, one batch at most; call `ended` for each.

        Args:
            now_s: any monotonic time.
            used: of the segment, 0 to 1.
        """
        if used >= self.limits.high or used < self.limits.low:
            self._pressed = used >= self.limits.high
        keys: list[bytes] = []
        room = self.limits.batch_bytes
        for key, block in self._waiting.items():
            if not self._pressed and now_s - block.since_s < self.limits.age_s:
                break
            room -= block.size_bytes
            if keys and room < 0:
                break
            keys.append(key)
        for key in keys:
            block = self._copying[key] = self._waiting.pop(key)
            self.waiting_bytes -= block.size_bytes
        return keys

    def ended(self, now_s: float, key: bytes, *, copied: bool) -> None:
        """Say how the copy of a block of `due` went; a block that left DRAM meanwhile is forgotten."""
        block = self._copying.pop(key, None)
        if block is None or copied:
            return
        block.attempts += 1
        if block.attempts >= self.limits.attempts_max:
            self.given_up += 1
            return
        block.since_s = now_s
        self._waiting[key] = block
        self.waiting_bytes += block.size_bytes
