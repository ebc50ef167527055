"""How writers of a host tell the store what they have written, without a message: rings in shared memory.

A writer is granted room and a ring (messages.Grant). It copies an object into the room, puts one frame into
its ring and is done; the store reads all rings before it does anything else that somebody asks of it, and
every few milliseconds while they are used. So whoever asks finds what was put before; and whoever looks into
the table (kvstore.table) finds it there, or sees that a ring holds more than was read, and asks.

    counters  for each ring: bytes written, by its writer; then for each: bytes read, by the store
    rings     frames [u32 length][Fill as msgpack], at multiples of 8; length WRAP: go on at the beginning

Frames of several rings are taken in the order of the moments at which they were written: of two objects of
one name the first stays. A frame that makes no sense harms its writer only: what counts is the ticket.

A frame is written before the counter that shows it, and both sides rely on seeing it in that order: x86-64
promises that, others (ARM) do not. There clients do without shared memory, see kvstore.client.lookup.
"""

from collections.abc import Callable, Sequence

import msgspec

from kvstore.limits import GRANT_S
from mooncake.core import wire
from mooncake.core.errors import ProtocolError

RINGS = 16
"""Writers of one host at a time: the workers of its engines. Others put by messages."""
RING_BYTES = 64 << 10
"""Five batches of 128 objects; a writer that finds no room asks the store to read."""
FRAME_BYTES_MAX = RING_BYTES // 2
COUNTERS_BYTES = 4096
RINGS_BYTES = COUNTERS_BYTES + RINGS * RING_BYTES
KEPT_S = 3 * GRANT_S
"""A ring is its writer's so long after the last grant: longer than any grant, and a late writer, can last."""

_WORD = 8
COUNTERS_READ = 2 * RINGS * _WORD
"""Bytes of the counters, without the last one: whether the store looks every few milliseconds."""
_WATCH = 2 * RINGS
_WRAP = 0xFFFF_FFFF


class Fill(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Objects whose bytes lie where tickets were granted; columns as in messages.Commit."""

    at_s: float
    """Monotonic, of the host: when it was written."""
    tickets: list[int]
    keys: bytes
    checksums: bytes
    names: list[bytes]


def is_read(counters: bytes) -> bool:
    """Whether the store has read all that was written, by the counters of all rings."""
    half = RINGS * _WORD
    return counters[:half] == counters[half:COUNTERS_READ]


class Rings:
    """The store's side. Not thread-safe: the store's loop drives it."""

    def __init__(self, memory: memoryview, on_nonsense: Callable[[str, ProtocolError], None]) -> None:
        """Lend nothing yet.

        Args:
            memory: RINGS_BYTES of zeros.
            on_nonsense: told of a writer whose ring makes no sense; what is in it is passed over.
        """
        self._on_nonsense = on_nonsense
        self._counters = memory[:COUNTERS_BYTES]
        self._words = self._counters.cast("Q")
        self._rings = [memory[COUNTERS_BYTES + RING_BYTES * n :][:RING_BYTES] for n in range(RINGS)]
        self._owners: list[tuple[str, float]] = [("", 0.0)] * RINGS
        self._read_to: dict[int, int] = {}

    def lend(self, writer: str, now_s: float) -> int:
        """Return the writer's ring, its own from now on for KEPT_S; -1: all are taken."""
        free = -1
        for number, (owner, until_s) in enumerate(self._owners):
            if owner == writer:
                free = number
                break
            if free < 0 and until_s <= now_s:
                free = number
        if free >= 0:
            if self._owners[free][0] != writer:
                self._words[free] = self._words[RINGS + free] = 0
            self._owners[free] = (writer, now_s + KEPT_S)
        return free

    def end(self, writer: str) -> None:
        """Take back the ring of a writer that has started anew."""
        self._owners = [("", 0.0) if owner == writer else (owner, until) for owner, until in self._owners]

    @property
    def is_read(self) -> bool:
        """Whether there is nothing to read."""
        return is_read(bytes(self._counters[:COUNTERS_READ]))

    def watch(self, *, on: bool) -> None:
        """Say whether somebody looks every few milliseconds, or has to be woken."""
        self._words[_WATCH] = int(on)

    def read(self, now_s: float) -> list[Fill]:
        """Return what was written before `now_s`, in that order. To be done with before `done` is called."""
        found: list[Fill] = []
        self._read_to = {}
        for number in range(RINGS):
            written, at = self._words[number], self._words[RINGS + number]
            if written == at:
                continue
            try:
                at = self._frames(self._rings[number], at, written, now_s, found)
            except ProtocolError as error:
                self._on_nonsense(self._owners[number][0], error)
                at = written
            self._read_to[number] = at
        return sorted(found, key=lambda fill: fill.at_s)

    def done(self) -> None:
        """Say that the table shows what was read."""
        for number, at in self._read_to.items():
            self._words[RINGS + number] = at

    @staticmethod
    def _frames(ring: memoryview, at: int, written: int, now_s: float, found: list[Fill]) -> int:
        """Add the frames between two counters; return the counter behind the last one that is due."""
        if not 0 < written - at <= RING_BYTES:
            raise ProtocolError(f"counters {at} and {written} of a ring of {RING_BYTES} bytes")
        while at < written:
            begin = at % RING_BYTES
            length = int.from_bytes(ring[begin : begin + 4], "little")
            if length == _WRAP:
                at += RING_BYTES - begin
                continue
            end = begin + 4 + length
            if end > RING_BYTES or at + 4 + length > written:
                raise ProtocolError(f"a frame of {length} bytes at {begin}")
            fill = wire.decode(ring[begin + 4 : end], Fill)
            if fill.at_s > now_s:
                break
            found.append(fill)
            at += _whole(4 + length)
        return at


class RingWriter:
    """A writer's side of one ring. Not thread-safe."""

    def __init__(self, memory: memoryview, number: int) -> None:
        """`number`: of messages.Granted; `memory` is that of Rings."""
        self.number = number
        self._words = memory[:COUNTERS_BYTES].cast("Q")
        self._ring = memory[COUNTERS_BYTES + RING_BYTES * number :][:RING_BYTES]

    @property
    def is_watched(self) -> bool:
        """Whether the store looks into the rings every few milliseconds."""
        return bool(self._words[_WATCH])

    def write(self, fill: Fill) -> bool:
        """Put a frame; False: there is no room before the store has read, or it is too long for a ring."""
        frame = wire.encode(fill)
        length = len(frame)
        if length > FRAME_BYTES_MAX:
            return False
        written, read = self._words[self.number], self._words[RINGS + self.number]
        begin = written % RING_BYTES
        skip = RING_BYTES - begin if begin + 4 + length > RING_BYTES else 0
        if written - read + skip + _whole(4 + length) > RING_BYTES:
            return False
        if skip:
            self._ring[begin : begin + 4] = _WRAP.to_bytes(4, "little")
            begin = 0
        self._ring[begin : begin + 4 + length] = length.to_bytes(4, "little") + frame
        self._words[self.number] = written + skip + _whole(4 + length)
        return True


def fill_of(
    at_s: float, tickets: Sequence[int], keys: Sequence[bytes], sums: Sequence[bytes], names: Sequence[bytes]
) -> Fill:
    """Return the frame of objects in rows."""
    return Fill(at_s, list(tickets), b"".join(keys), b"".join(sums), list(names))


def _whole(size_bytes: int) -> int:
    return -(-size_bytes // _WORD) * _WORD
