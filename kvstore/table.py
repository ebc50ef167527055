"""What lies where in a segment, as a table in shared memory that readers of the host look into by themselves.

The store alone writes it, with every commit and every drop; a reader needs neither a message nor a lease.
Nothing is locked, so a reader may see a row that is just being written, or bytes that are just being used
again. Both are harmless by one rule: a reader believes no bytes but those whose *copy* verifies against the
row's checksum, which is seeded with the key, and asks the store as soon as anything does not fit. What it is
told of *absence* relies on the order in which words are written, as kvstore.rings does.

    header  version, how many rows found no place, moment of the last sign of life (monotonic seconds)
    rows    64 bytes in buckets of eight: key 32, checksum 16, offset 8, size 7, flag 1

A key belongs into one of two buckets and goes where more room is; at half the rows in use a row without a
place is rarer than one in a million. Then, and with an SSD tier, absence proves nothing (`is_whole`).
"""

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.rings import is_read
from mooncake.core.keys import KEY_BYTES

ROW_BYTES = 64
ROWS = 8
"""Of a bucket: 512 bytes, which a reader copies in 0.1 us."""
BUCKET_BYTES = ROW_BYTES * ROWS
BLOCK_BYTES = 8192
"""Of the segment for each row: twice as many rows as there are blocks of 16 KiB, 0.8 % of the memory."""
BUCKETS_MIN = 64
HEADER_BYTES = 4096
STALE_S = 0.5
"""Five turns of a store's clock: a store that is silent for longer is asked instead of believed."""
VERSION = 1
MANY = 8
"""Keys that are found together sooner than one by one."""

_HEAD = struct.Struct("<QQd")
_PLACE = struct.Struct("<16sqQ")
_LOST, _LIFE = 8, 16
_IN_USE = 0x80
_USED = _IN_USE << 56
_SIZE_MASK = (1 << 56) - 1
_NO_ROW = bytes(ROW_BYTES)
_FREE = b"\0"

Row = tuple[bytes, int, int]
"""(checksum, offset, size_bytes)"""
_NONE: Row = (bytes(16), 0, 0)


def table_bytes(capacity_bytes: int) -> int:
    """Return the size of the table of a segment; whole pages."""
    wanted = capacity_bytes // (BLOCK_BYTES * ROWS)
    buckets = 1 << (max(BUCKETS_MIN, wanted) - 1).bit_length()
    return HEADER_BYTES + buckets * BUCKET_BYTES


def _mask(size_bytes: int) -> int:
    return (size_bytes - HEADER_BYTES) // BUCKET_BYTES - 1


class Table:
    """The store's side. Not thread-safe: the node's loop drives it."""

    def __init__(self, memory: memoryview, *, whole: bool = True) -> None:
        """Begin empty.

        Args:
            memory: `table_bytes` of zeros.
            whole: what is not in the table is not in the store either.
        """
        self._memory = memory
        self._mask = _mask(memory.nbytes)
        self._lost = 0 if whole else 1
        _HEAD.pack_into(memory, 0, VERSION, self._lost, 0.0)

    def add(self, key: bytes, offset: int, size_bytes: int, checksum: bytes) -> None:
        """Show a block that is complete now."""
        memory = self._memory
        best, most = 0, 0
        for at in _buckets(key, self._mask):
            free = bytes(memory[at + ROW_BYTES - 1 : at + BUCKET_BYTES : ROW_BYTES])
            if (count := free.count(_FREE)) > most:
                best, most = at + ROW_BYTES * free.index(_FREE), count
        if not most:
            self._lose(1)
            return
        memory[best + KEY_BYTES : best + ROW_BYTES] = _PLACE.pack(checksum, offset, size_bytes | _USED)
        memory[best : best + KEY_BYTES] = key

    def replace(self, key: bytes, offset: int, size_bytes: int, checksum: bytes) -> None:
        """Show another block under a key that was shown, so that nobody finds neither."""
        memory = self._memory
        for at in _buckets(key, self._mask):
            found = bytes(memory[at : at + BUCKET_BYTES]).find(key)
            if found >= 0:
                # not pack_into, which writes zeros first: a reader would take the row for a free one
                place = _PLACE.pack(checksum, offset, size_bytes | _USED)
                memory[at + found + KEY_BYTES : at + found + ROW_BYTES] = place
                return  # else it is among those without a row, and stays there

    def remove(self, key: bytes) -> None:
        """Hide a block, before its memory is used again."""
        memory = self._memory
        for at in _buckets(key, self._mask):
            found = bytes(memory[at : at + BUCKET_BYTES]).find(key)
            if found >= 0:
                memory[at + found : at + found + ROW_BYTES] = _NO_ROW
                return
        self._lose(-1)

    def live(self, now_s: float) -> None:
        """Give a sign of life."""
        struct.pack_into("<d", self._memory, _LIFE, now_s)

    def close(self) -> None:
        """Have no reader believe it any more (idempotent)."""
        self.live(-2 * STALE_S)

    def _lose(self, rows: int) -> None:
        self._lost += rows
        struct.pack_into("<Q", self._memory, _LOST, self._lost)


class TableReader:
    """A reader's side. Thread-safe."""

    def __init__(self, memory: memoryview, counters: memoryview | None = None) -> None:
        """`memory` is a Table's, in this process or another one; `counters` those of kvstore.rings."""
        self._counters = counters
        self._memory = memory.toreadonly()
        self._mask = _mask(memory.nbytes)
        self._rows = np.frombuffer(self._memory, "<u8", offset=HEADER_BYTES).reshape(-1, ROW_BYTES // 8)
        self._keys = self._rows.reshape(-1, ROWS, ROW_BYTES // 8)[:, :, 0]

    def is_fresh(self, now_s: float) -> bool:
        """Whether the store has given a sign of life."""
        version, _, life_s = _HEAD.unpack_from(self._memory)
        return bool(version == VERSION and now_s - life_s < STALE_S)

    @property
    def is_whole(self) -> bool:
        """Whether what is not found *after this* is not in the store either."""
        if _HEAD.unpack_from(self._memory)[1]:
            return False
        return self._counters is None or is_read(bytes(self._counters))

    def find(self, key: bytes) -> Row | None:
        """Return where the block lies; it may be about to go."""
        memory = self._memory
        for at in _buckets(key, self._mask):
            bucket = bytes(memory[at : at + BUCKET_BYTES])
            found = bucket.find(key)
            if found >= 0:
                checksum, offset, size = _PLACE.unpack_from(bucket, found + KEY_BYTES)
                begin = at + found
                # the key comes last and goes first: one that is still here was here all the time
                if memory[begin : begin + KEY_BYTES] == key and size & _USED:
                    return checksum, offset, size & _SIZE_MASK
        return None

    def find_all(self, keys: Sequence[bytes]) -> list[Row | None]:
        """`find` for each."""
        if len(keys) < MANY:
            return [self.find(key) for key in keys]
        rows, there = self._find_all(keys)
        sums = rows[:, 4:6].tobytes()
        offsets, sizes = rows[:, 6].tolist(), (rows[:, 7] & np.uint64(_SIZE_MASK)).tolist()
        return [
            (sums[16 * at : 16 * at + 16], offsets[at], sizes[at]) if found else None
            for at, found in enumerate(there.tolist())
        ]

    def columns(self, keys: Sequence[bytes]) -> tuple[list[int], list[int], bytes]:
        """Return offsets, sizes (0 for what is not there) and checksums, 16 bytes each."""
        if len(keys) < MANY:
            rows = [self.find(key) or _NONE for key in keys]
            return [row[1] for row in rows], [row[2] for row in rows], b"".join([row[0] for row in rows])
        found, there = self._find_all(keys)
        sizes = ((found[:, 7] & np.uint64(_SIZE_MASK)) * there).tolist()
        return found[:, 6].tolist(), sizes, found[:, 4:6].tobytes()

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Return the size of each block, 0 for what is not there."""
        if len(keys) < MANY:
            return [row[2] if row else 0 for row in map(self.find, keys)]
        rows, there = self._find_all(keys)
        return ((rows[:, 7] & np.uint64(_SIZE_MASK)) * there).tolist()  # type: ignore[no-any-return]

    def _find_all(self, keys: Sequence[bytes]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Return a row for each key, and whether it is the key's."""
        words = np.frombuffer(b"".join(keys), "<u8").reshape(-1, KEY_BYTES // 8)
        buckets = words[:, 1:3] & np.uint64(self._mask)
        place = (self._keys[buckets].reshape(-1, 2 * ROWS) == words[:, :1]).argmax(axis=1)
        bucket = np.where(place < ROWS, buckets[:, 0], buckets[:, 1]).astype(np.int64)
        index = bucket * ROWS + place % ROWS
        rows = self._rows[index]
        # as in `find`: a key that is still here afterwards was here all the time
        still = self._rows[index, 0] == words[:, 0]
        return rows, (rows[:, :4] == words).all(axis=1) & (rows[:, 7] >= _USED) & still


def _buckets(key: bytes, mask: int) -> tuple[int, int]:
    """Return where the two buckets of a key begin. Keys are hashes: any bits will do."""
    first = int.from_bytes(key[8:16], "little")
    second = int.from_bytes(key[16:24], "little")
    return HEADER_BYTES + (first & mask) * BUCKET_BYTES, HEADER_BYTES + (second & mask) * BUCKET_BYTES
