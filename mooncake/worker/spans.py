"""What an engine does with the pool for a leg: spans under the gateway's span of that leg (docs/tracing.md).

kv.lookup   the pool is asked what it has; it may fetch blocks from another host meanwhile
kv.load     blocks go from the pool into the engine, and are verified
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mooncake.core.messages import Acquired
from mooncake.core.tracing import WallClock

if TYPE_CHECKING:
    from mooncake.core.tracing_sdk import Tracing


class PoolSpans:
    """Makes them when they are over, from the times that were measured."""

    def __init__(self, tracing: "Tracing") -> None:
        """`tracing` is of the engine's process."""
        self._tracing = tracing

    def looked_up(
        self, trace: str, start_s: float, wanted: int, answer: Acquired | None, source: str, ranks: int = 1
    ) -> None:
        """The pool answered; None: not in time. A block is `ranks` objects in the pool."""
        about: dict[str, str | int | float] = {"mooncake.wanted_blocks": wanted}
        if answer is None:
            about["mooncake.timeout"] = True
        else:
            about["mooncake.found_blocks"] = len(answer.blocks) // ranks
            if answer.fetched_bytes:
                about["mooncake.fetched_bytes"] = answer.fetched_bytes
                about["mooncake.fetch_s"] = answer.fetch_s
                about["mooncake.source_node"] = source
        self._made("kv.lookup", trace, start_s, about)

    def loaded(self, trace: str, start_s: float, blocks: int, size_bytes: int, *, intact: bool) -> None:
        """Blocks are in the engine, or were not what they should be."""
        about = {"mooncake.blocks": blocks, "mooncake.bytes": size_bytes, "mooncake.intact": intact}
        self._made("kv.load", trace, start_s, about)

    def _made(self, name: str, trace: str, start_s: float, about: Mapping[str, str | int | float]) -> None:
        clock = WallClock()
        self._tracing.begin(name, trace, clock.ns(start_s), about).end(clock.ns(time.monotonic()))
