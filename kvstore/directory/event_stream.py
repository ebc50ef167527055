"""One node's event stream as a pure machine: when to take a snapshot, what to apply, what to distrust.

    WAITING --first message--> ASKED --snapshot--> LIVE --gap, other epoch, silence--> WAITING
                                 '---failed, or silent------------------------------------'

`kvstore.directory.follower` runs it on sockets, the simulation under loss, reordering and repeats. Messages
that arrive while a snapshot is on its way are kept, up to a bound; a message beyond it is lost, which
the next one shows as a gap.
"""

from collections import deque
from collections.abc import Sequence
from enum import Enum

import msgspec

from kvstore.limits import HEARTBEAT_S, SNAPSHOT_KEYS_MAX
from mooncake.core.errors import ProtocolError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import SnapshotPage, StoreEvents

SILENCE_S = 4 * HEARTBEAT_S
"""As follower.STALE_S: three lost heartbeats and a half."""
KEPT_MAX = 10_000
"""Messages kept during a snapshot: the bound of the socket they would wait in (rpc.HWM_MESSAGES)."""


class TakeSnapshot(msgspec.Struct, frozen=True):
    """Ask the node for its keys; answer with `on_snapshot` or `on_failed`."""


class Reset(msgspec.Struct, frozen=True):
    """In step from here on: the node, in this epoch, holds exactly these keys."""

    epoch: str
    pages: tuple[bytes, ...]


class Apply(msgspec.Struct, frozen=True):
    """The node's next change."""

    stored: bytes
    removed: bytes


class Distrust(msgspec.Struct, frozen=True):
    """Out of step; said once per life."""

    reason: str


Action = TakeSnapshot | Reset | Apply | Distrust


class _State(Enum):
    WAITING = "waiting"
    ASKED = "asked"
    LIVE = "live"


class EventStream:
    """Turns the messages of one node into actions on an index."""

    def __init__(self, now_s: float, silence_s: float = SILENCE_S) -> None:
        """Wait for the first message: it shows that the subscription works."""
        self._state = _State.WAITING
        self._silence_s = silence_s
        self._heard_s = now_s
        self._kept: deque[StoreEvents] = deque()
        self._epoch = ""
        self._seq = 0

    @property
    def live(self) -> bool:
        """Whether the index is in step with the node."""
        return self._state is _State.LIVE

    def on_message(self, now_s: float, event: StoreEvents) -> list[Action]:
        """Take one message of the node."""
        self._heard_s = now_s
        if self._state is _State.WAITING:
            self._state = _State.ASKED
            return [TakeSnapshot()]
        if self._state is _State.ASKED:
            if len(self._kept) < KEPT_MAX:
                self._kept.append(event)
            return []
        return self._continue(event)

    def on_snapshot(self, now_s: float, epoch: str, seq: int, pages: Sequence[bytes]) -> list[Action]:
        """Take the answer to TakeSnapshot: every page, of one moment, and what came meanwhile."""
        if self._state is not _State.ASKED:
            return []
        self._heard_s = now_s
        self._state, self._epoch, self._seq = _State.LIVE, epoch, seq
        actions: list[Action] = [Reset(epoch, tuple(pages))]
        while self._kept and self.live:
            actions += self._continue(self._kept.popleft())
        return actions if self.live else actions + self._begin()

    def on_failed(self) -> list[Action]:
        """No snapshot came: the next message asks again. The caller pauses before it does."""
        if self._state is not _State.ASKED:
            return []
        return self._begin()

    def tick(self, now_s: float) -> list[Action]:
        """Notice silence of a live stream."""
        if self._state is _State.LIVE and now_s - self._heard_s >= self._silence_s:
            return [self._lose(f"silent for {self._silence_s:g} s")]
        return []

    def _begin(self) -> list[Action]:
        """Start another life with the oldest kept message, or wait for one."""
        self._state = _State.WAITING
        if not self._kept:
            return []
        self._kept.popleft()
        self._state = _State.ASKED
        return [TakeSnapshot()]

    def _continue(self, event: StoreEvents) -> list[Action]:
        if event.epoch != self._epoch:
            return [self._lose(f"epoch {event.epoch} after {self._epoch}")]
        heartbeat = not event.stored and not event.removed
        if event.seq > self._seq + (0 if heartbeat else 1):
            return [self._lose(f"message {event.seq} after {self._seq}")]
        if heartbeat or event.seq <= self._seq:  # the latter is in the snapshot already
            return []
        self._seq = event.seq
        return [Apply(event.stored, event.removed)]

    def _lose(self, reason: str) -> Distrust:
        self._state = _State.WAITING
        return Distrust(reason)


class SnapshotPages:
    """Collects the pages of one snapshot; refuses those of two moments (the node restarted between)."""

    def __init__(self, keys_max: int = SNAPSHOT_KEYS_MAX) -> None:
        """Expect the first page; `keys_max` bounds what a broken peer can make us hold."""
        self.pages: list[bytes] = []
        self._left_bytes = keys_max * KEY_BYTES
        self.epoch = ""
        self.seq = 0

    def add(self, page: SnapshotPage) -> int:
        """Take the next page; return the cursor to ask for, 0 when the snapshot is complete.

        Raises:
            ProtocolError: not whole keys, without end, or of another moment than the first page.
        """
        if self.pages and (page.epoch, page.seq) != (self.epoch, self.seq):
            raise ProtocolError(f"a page of {page.epoch}/{page.seq} after one of {self.epoch}/{self.seq}")
        self.epoch, self.seq = page.epoch, page.seq
        self._left_bytes -= len(page.keys)
        if len(page.keys) % KEY_BYTES or self._left_bytes < 0 or (page.cursor and not page.keys):
            raise ProtocolError("a snapshot page that is no whole number of keys, or one too many")
        self.pages.append(page.keys)
        return page.cursor
