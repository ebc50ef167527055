"""What readers say is bad is hashed again before it is dropped: a reader may be wrong, or malicious."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from kvstore.limits import BAD_KEYS_MAX, CHECK_LEASE_S, CHECKS_WAITING_MAX
from kvstore.node.node import Node
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Block, Ok, ReportBad
from transfer.segment import Segment

log = structlog.get_logger(__name__)


class Recheck:
    """Checks one block at a time, off the loop that calls it."""

    def __init__(self, node: Node, clock: Callable[[], float], changed: Callable[[], None]) -> None:
        """`changed` is called when blocks may have gone."""
        self._node = node
        self._clock = clock
        self._changed = changed
        self._segment: Segment | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-hash")
        self._checking: set[bytes] = set()
        self._reports = 0

    def open(self, segment: Segment) -> None:
        """Read from `segment` until closed."""
        self._segment = segment

    def close(self) -> None:
        """Check nothing more (idempotent). A hash in progress holds a view: the memory goes when it ends."""
        self._segment = None
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def report(self, request: ReportBad) -> Ok:
        """Drop those of the reported blocks that are bad.

        Raises:
            RequestError: too many keys; CapacityError: too many reports are being checked.
        """
        if len(request.keys) > BAD_KEYS_MAX:
            raise RequestError(f"{len(request.keys)} keys reported: at most {BAD_KEYS_MAX} at once")
        if self._reports >= CHECKS_WAITING_MAX:
            raise CapacityError(f"{self._reports} reports are being checked")
        self._reports += 1
        try:
            for key in request.keys:
                if key not in self._checking:
                    await self._check(key)
        finally:
            self._reports -= 1
        return Ok()

    async def _check(self, key: bytes) -> None:
        held = self._node.lease_for_check(self._clock(), key, CHECK_LEASE_S)
        if not held.blocks:
            return
        (block,) = held.blocks
        self._checking.add(key)
        try:
            loop = asyncio.get_running_loop()
            if not await loop.run_in_executor(self._thread, self._is_sound, key, block):
                log.warning("store.bad_block", key=key.hex()[:16], offset=block.offset)
                self._node.drop_bad(self._clock(), key, block)
        finally:
            self._checking.discard(key)
            self._node.release(self._clock(), held.lease_id)
            self._changed()

    def _is_sound(self, key: bytes, block: Block) -> bool:
        segment = self._segment
        if segment is None:
            return True  # closing
        return block_checksum(key, segment.view(block.offset, block.size_bytes)) == block.checksum
