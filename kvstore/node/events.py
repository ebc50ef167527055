"""What a node tells its followers: ordered events with heartbeats, and snapshots in pages."""

import itertools
from collections import OrderedDict
from collections.abc import Callable

import structlog
import zmq

from kvstore.limits import EVENT_KEYS_MAX, SNAPSHOT_PAGE_KEYS, SNAPSHOTS_MAX
from kvstore.node.changes import NodeEvents
from mooncake.core import rpc, wire
from mooncake.core.errors import RequestError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import SnapshotPage, StoreEvents

log = structlog.get_logger(__name__)

_PAGE_BITS = 24  # cursor = snapshot number above, page number below


class EventPublisher:
    """PUB socket of one node. Sending never waits: a slow follower loses messages, sees the gap."""

    def __init__(self, endpoint: str, node: str, epoch: str) -> None:
        """Bind at once; raises ConfigError unless `endpoint` is loopback or ipc."""
        self._node = node
        self._epoch = epoch
        self.seq = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(rpc.HWM_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self.endpoint = rpc.bind(self._socket, endpoint)
        except BaseException:
            self.close()
            raise

    def publish(self, events: NodeEvents) -> None:
        """Send `events`, in as many messages as their size needs; nothing if they are empty."""
        stored, removed = events.stored, events.removed
        # a key is never in both lists, so the order of messages among them does not matter
        for start in range(0, max(len(stored), len(removed)), EVENT_KEYS_MAX):
            self.seq += 1
            end = start + EVENT_KEYS_MAX
            self._send(b"".join(stored[start:end]), b"".join(removed[start:end]))

    def heartbeat(self) -> None:
        """Say that the node lives, and which message was the last."""
        self._send(b"", b"")

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)

    def _send(self, stored: bytes, removed: bytes) -> None:
        message = StoreEvents(self._node, self._epoch, self.seq, stored, removed)
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("events.send_failed", seq=self.seq, error=str(error))  # followers see the gap


class Snapshots:
    """Copies of the complete set, kept for readers that page through them; bounded in number."""

    def __init__(self, epoch: str, page_keys: int = SNAPSHOT_PAGE_KEYS) -> None:
        """Start with none; `page_keys` keys per page."""
        self._epoch = epoch
        self._page_bytes = page_keys * KEY_BYTES
        self._numbers = itertools.count(1)
        self._held: OrderedDict[int, tuple[int, bytes]] = OrderedDict()  # number -> (seq, keys)

    def page(self, cursor: int, seq: int, keys: Callable[[], list[bytes]]) -> SnapshotPage:
        """Return the page at `cursor`; 0 takes a new snapshot.

        Args:
            cursor: 0, or the cursor of the page before.
            seq: of the last event published, which `keys` reflects exactly.
            keys: returns the complete set; called for a new snapshot only.

        Raises:
            RequestError: no such page, or its snapshot was dropped for newer ones: start again.
        """
        number, index = cursor >> _PAGE_BITS, cursor & ((1 << _PAGE_BITS) - 1)
        if cursor == 0:
            number = self._take(seq, keys)
        if number not in self._held:
            raise RequestError(f"cursor {cursor}: no such snapshot (any more), start again at 0")
        seq, blob = self._held[number]
        start, end = index * self._page_bytes, (index + 1) * self._page_bytes
        if start and start >= len(blob):
            raise RequestError(f"cursor {cursor}: beyond the last page")
        following = (number << _PAGE_BITS) + index + 1 if end < len(blob) else 0
        if not following:
            # every reader has its own snapshot: this one has been read to its end
            del self._held[number]
        return SnapshotPage(self._epoch, seq, blob[start:end], following)

    def _take(self, seq: int, keys: Callable[[], list[bytes]]) -> int:
        number = next(self._numbers)
        self._held[number] = (seq, b"".join(keys()))
        while len(self._held) > SNAPSHOTS_MAX:
            self._held.popitem(last=False)
        return number
