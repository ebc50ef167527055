"""Brings what stores and engines say into the PrefixIndex without holding up the gateway's loop.

A snapshot of a million blocks takes the index half a second: applied at once it would stop every
stream of tokens and every heartbeat for as long. So what is large is applied in slices, TURN_S per
turn of the loop, one node after the other; what a node said later waits behind it. Until then the
index knows less than the node holds, which costs hit rate and nothing else.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from conductor.index import PrefixIndex
from mooncake.core.keys import KEY_BYTES

log = structlog.get_logger(__name__)

TURN_S = 0.002
"""Of one turn of the loop: a tenth of the distance of two tokens that a reader would notice. What cannot be
cut: a dict that doubles, some 50 ms at a million keys."""
SLICE_KEYS = 1_024
"""Applied between two looks at the clock: 0.3 to 0.7 ms."""
WAITING_MAX = 10_000
"""Messages of one node that wait (as in the socket before it); beyond, the loop stands still for them."""

Piece = tuple[bytes, bytes]
"""Keys that were stored, keys that were removed."""


class IndexFeed:
    """A StoreListener for all stores and engines of one gateway, on the loop of their followers."""

    def __init__(self, index: PrefixIndex, clock: Callable[[], float] = time.perf_counter) -> None:
        """`index` is changed on the running loop only."""
        self._index = index
        self._clock = clock
        self._in_step: set[str] = set()
        self._filling: set[str] = set()  # whose snapshot is not all in the index
        self._waiting: dict[str, deque[Piece]] = {}
        self._told: dict[str, int] = {}  # keys that each says it holds
        self._task: asyncio.Task[None] | None = None

    def on_snapshot(self, node: str, epoch: str, pages: Sequence[bytes]) -> None:  # noqa: ARG002
        """See StoreListener."""
        self._reset(node)
        self._in_step.add(node)
        self._filling.add(node)
        self._told[node] = sum(map(len, pages)) // KEY_BYTES
        self._wait(node, [(page, b"") for page in pages])
        if node not in self._waiting:
            self._filling.discard(node)

    def on_events(self, node: str, stored: bytes, removed: bytes) -> None:
        """See StoreListener."""
        if node not in self._in_step:
            return  # the last word of a follower that is being closed
        self._told[node] += (len(stored) - len(removed)) // KEY_BYTES
        large = max(len(stored), len(removed)) > SLICE_KEYS * KEY_BYTES
        if large or node in self._waiting:
            self._wait(node, [(stored, removed)])
        else:
            self._index.apply(node, stored, removed)

    def on_stale(self, node: str, reason: str) -> None:  # noqa: ARG002
        """See StoreListener."""
        self._reset(node)

    def in_step(self, node: str) -> bool:
        """Return whether the index knows what `node` holds: its snapshot is in, and no gap since."""
        return node in self._in_step and node not in self._filling

    def told(self, node: str) -> int:
        """Return how many keys `node` says it holds, in or on their way into the index; 0 out of step."""
        return self._told.get(node, 0)

    def drop(self, node: str) -> None:
        """Forget a node that is gone; nothing of it that waits is applied any more."""
        self._reset(node)

    async def close(self) -> None:
        """Stop (idempotent)."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # ------------------------------------------------------------ inside

    def _reset(self, node: str) -> None:
        self._in_step.discard(node)
        self._filling.discard(node)
        self._waiting.pop(node, None)
        self._told.pop(node, None)
        self._index.reset(node)
        self._go_on()

    def _wait(self, node: str, pieces: Sequence[Piece]) -> None:
        waiting = self._waiting.setdefault(node, deque())
        waiting.extend(pieces)
        if not waiting:
            del self._waiting[node]
        if len(waiting) > WAITING_MAX:
            # none may be left out: a removal that is lost is a wrong hint until the next snapshot
            log.warning("index_feed.behind", node=node, waiting=len(waiting))
            while waiting:
                self._index.apply(node, *waiting.popleft())
            del self._waiting[node]
            self._filling.discard(node)
        self._go_on()

    def _go_on(self) -> None:
        if self._task is None and (self._waiting or self._index.sweeping):
            self._task = asyncio.create_task(self._run(), name="index feed")

    async def _run(self) -> None:
        try:
            while self._waiting or self._index.sweeping:
                self._turn()
                await asyncio.sleep(0)
        finally:
            self._task = None

    def _turn(self) -> None:
        """Do TURN_S worth of work, one slice at least, for one node if one waits."""
        end_s = self._clock() + TURN_S
        if not self._waiting:
            self._index.sweep(SLICE_KEYS)
            while self._index.sweeping and self._clock() < end_s:
                self._index.sweep(SLICE_KEYS)
            return
        node = next(iter(self._waiting))
        waiting = self._waiting.pop(node)
        self._index.apply(node, *_first_slice(waiting))
        while waiting and self._clock() < end_s:
            self._index.apply(node, *_first_slice(waiting))
        if waiting:
            self._waiting[node] = waiting  # behind the others
        else:
            self._filling.discard(node)


def _first_slice(waiting: deque[Piece]) -> Piece:
    """Take at most SLICE_KEYS of what waits first; stored before removed, as in one message."""
    size = SLICE_KEYS * KEY_BYTES
    stored, removed = waiting.popleft()
    if max(len(stored), len(removed)) <= size:
        return stored, removed
    pieces = [(stored[at : at + size], b"") for at in range(0, len(stored), size)]
    pieces += [(b"", removed[at : at + size]) for at in range(0, len(removed), size)]
    waiting.extendleft(reversed(pieces))
    return waiting.popleft()
