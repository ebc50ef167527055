"""Batches between one piece of the caller's memory and a store of this host: what can be one step for all is.

All or nothing: what is not new, not there, of another size or does not verify is left to the long way.
"""

import time
from collections.abc import Sequence

import msgspec
import numpy as np
from xxhash import xxh3_128_digest

from kvstore.client.local import LocalStore
from kvstore.client.model import COPY_BYTES
from mooncake.core.errors import PeerTimeout
from mooncake.core.keys import KEY_BYTES

SUM_BYTES = 16


class Pieces(msgspec.Struct, frozen=True):
    """`memory[starts[i] :][: sizes[i]]` belong to the i-th object; the caller has checked the bounds."""

    memory: memoryview
    starts: Sequence[int]
    sizes: Sequence[int]


def get(access: LocalStore, keys: Sequence[bytes], pieces: Pieces, end_s: float) -> bool:
    """Read objects; False: not all were read, and what is in the pieces means nothing."""
    shown = access.shown
    if shown is None or (table := shown.table) is None:
        return False
    segment = shown.memory
    offsets, sizes, sums = table.columns(keys)
    if list(pieces.sizes) != sizes or 0 in sizes:
        return False
    seeds = _seeds(keys)
    starts, memory = pieces.starts, pieces.memory

    def take(rows: Sequence[int]) -> bool:
        for row in rows:
            size, start, offset = sizes[row], starts[row], offsets[row]
            target = memory[start : start + size]
            source = segment[offset : offset + size]
            if len(source) != size:
                return False
            if size < COPY_BYTES:
                target[:] = source
            elif time.monotonic() < end_s:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
            else:
                return False
            if xxh3_128_digest(target, seeds[row]) != sums[SUM_BYTES * row : SUM_BYTES * row + SUM_BYTES]:
                return False
        return True

    if not all(access.lanes.run(take, range(len(keys)), sum(sizes))):
        return False
    shown.link.used(keys)
    return True


def put(
    access: LocalStore, keys: Sequence[bytes], pieces: Pieces, names: Sequence[bytes], end_s: float
) -> bool:
    """Put objects of one size that are all new; False: nothing was put.

    Raises:
        PeerError, CapacityError: as LocalStore.put.
    """
    shown, size = access.shown, pieces.sizes[0]
    if shown is None or (table := shown.table) is None or not 0 < size <= len(shown.memory):
        return False
    desk, segment = shown.desk, shown.memory
    one_size = len(pieces.sizes) == 1 or list(pieces.sizes).count(size) == len(pieces.sizes)
    if not one_size or any(table.sizes(keys)) or len(keys) > len(dict.fromkeys(keys)):
        return False
    slots = desk.take(size, len(keys), end_s - time.monotonic())
    if slots is None:
        return False
    seeds = _seeds(keys)
    starts, memory = pieces.starts, pieces.memory

    def give(rows: Sequence[int]) -> list[bytes]:
        sums = []
        for row in rows:
            start, offset = starts[row], slots[row].offset
            target = segment[offset : offset + size]
            source = memory[start : start + size]
            if size < COPY_BYTES:
                target[:] = source
            elif time.monotonic() < end_s:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
            else:
                raise PeerTimeout(f"store {access.node}: the deadline passed while writing")
            sums.append(xxh3_128_digest(target, seeds[row]))
        return sums

    filled = False
    try:
        lanes = access.lanes.run(give, range(len(keys)), size * len(keys))
        sums = [one for lane in lanes for one in lane]
        filled = desk.fill(slots, keys, sums, names, end_s - time.monotonic())
    finally:
        if not filled:
            desk.put_back(size, slots)
    return filled


def _seeds(keys: Sequence[bytes]) -> list[int]:
    """Return `checksum_seed` of each key."""
    words = np.frombuffer(b"".join(keys), "<u8")[:: KEY_BYTES // 8]
    return words.tolist()  # type: ignore[no-any-return]
