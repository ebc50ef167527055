"""Room that a store of this host has granted in advance, and the ring by which it learns what was put there.

So a put is a copy and a few words in shared memory; a message goes once for many puts. What is not used for
a moment is given back.
"""

import threading
import time
from collections.abc import Sequence

import msgspec

from kvstore.engine.client import PoolClient
from kvstore.engine.link import StoreLink
from kvstore.limits import GRANT_S
from kvstore.rings import RingWriter, fill_of
from mooncake.core.errors import PeerTimeout
from mooncake.core.messages import Find, Findings, Grant, Granted

GRANT_BYTES_MAX = 64 << 20
"""At once, at most this part of the store:"""
GRANT_SHARE = 16
GRANT_SLOTS_MAX = 1024
NONE_S = 0.5
"""How long a store is not asked again that had no ring or no room: not every put pays for it."""
SIZES_MAX = 4
"""Sizes of objects for which room is kept: those of one model."""


class Slot(msgspec.Struct, frozen=True, gc=False):
    """Room for one object, to be filled before `until_s`."""

    offset: int
    ticket: int
    until_s: float


class Desk:
    """Of one start of a store. Thread-safe."""

    def __init__(self, client: PoolClient, link: StoreLink, writer: str, rings: memoryview) -> None:
        """`rings`: memory of kvstore.rings."""
        self._client = client
        self._link = link
        self._writer = writer
        self._memory = rings
        self._budget_bytes = min(GRANT_BYTES_MAX, link.segment.size_bytes // GRANT_SHARE)
        self._lock = threading.Lock()
        self._ring: RingWriter | None = None
        self._slots: dict[int, list[Slot]] = {}
        self._none_until_s = 0.0

    def take(self, size_bytes: int, count: int, wait_s: float) -> list[Slot] | None:
        """Return room for objects of one size; None: the store has no ring, or has to be asked for each.

        Raises:
            PeerError: the store is away.
        """
        with self._lock:
            if (slots := self._pop(size_bytes, count)) is not None:
                return slots
            returned = self._stale(size_bytes)
        now_s = time.monotonic()
        if now_s < self._none_until_s:
            return None
        count_max = max(count, min(GRANT_SLOTS_MAX, self._budget_bytes // size_bytes))
        request = Grant(self._writer, size_bytes, count, count_max, returned)
        link, room = self._client.call(request, Granted, wait_s)
        if link is not self._link:
            raise PeerTimeout(f"store {self._link.record.node} was restarted meanwhile")
        link.check_reserved(room, len(room.tickets), size_bytes)
        granted = [
            Slot(offset, ticket, now_s + GRANT_S)
            for offset, ticket in zip(room.offsets, room.tickets, strict=True)
        ]
        with self._lock:
            if room.ring >= 0 and (self._ring is None or self._ring.number != room.ring):
                self._ring = RingWriter(self._memory, room.ring)
            self._slots.setdefault(size_bytes, []).extend(granted)
            slots = self._pop(size_bytes, count) if room.ring >= 0 else None
        if slots is None:
            self._none_until_s = now_s + NONE_S
        link.used(())  # somebody has to notice when nothing is put any more
        return slots

    def _pop(self, size_bytes: int, count: int) -> list[Slot] | None:
        """Return so many that are young, the youngest first."""
        slots = self._slots.get(size_bytes)
        if slots is None or len(slots) < count or slots[-count].until_s <= time.monotonic():
            return None
        taken = slots[-count:]
        del slots[-count:]
        return taken

    def _stale(self, size_bytes: int) -> list[int]:
        """Return what is to be given back: too old, or of a size that is not put any more."""
        gone = [size for size in self._slots if size != size_bytes][: max(0, len(self._slots) - SIZES_MAX)]
        slots = [slot for size in gone for slot in self._slots.pop(size)]
        now_s = time.monotonic()
        for size, known in self._slots.items():
            slots += [slot for slot in known if slot.until_s <= now_s]
            self._slots[size] = [slot for slot in known if slot.until_s > now_s]
        return [slot.ticket for slot in slots]

    def fill(
        self,
        slots: Sequence[Slot],
        keys: Sequence[bytes],
        sums: Sequence[bytes],
        names: Sequence[bytes],
        wait_s: float,
    ) -> bool:
        """Show what was written into `slots`; False: it does not fit into a frame.

        Raises:
            PeerTimeout: the room is no longer ours. PeerError: the store is away.
        """
        tickets = [slot.ticket for slot in slots]
        for last in (False, True):
            now_s = time.monotonic()
            if min(slots[0].until_s, slots[-1].until_s) <= now_s:
                raise PeerTimeout(f"store {self._link.record.node}: written too late")
            with self._lock:
                ring = self._ring
                written = ring is not None and ring.write(fill_of(now_s, tickets, keys, sums, names))
            if ring is not None and written:
                if not ring.is_watched:
                    self._link.ring()
                return True
            if not last:
                self._client.call(Find(b""), Findings, wait_s)  # it reads the rings before it answers
        return False

    def put_back(self, size_bytes: int, slots: Sequence[Slot]) -> None:
        """Keep what was taken and not filled; nobody writes there any more."""
        with self._lock:
            self._slots[size_bytes] = [*slots, *self._slots.get(size_bytes, ())]

    def give_back(self) -> None:
        """Give all room back, without waiting."""
        with self._lock:
            slots, self._slots = self._slots, {}
        tickets = [slot.ticket for known in slots.values() for slot in known]
        if tickets:
            self._client.tell(self._link, Grant(self._writer, 0, 0, 0, tickets))
