"""Find: any keys in any order, answered in columns. Pure."""

from array import array
from collections.abc import Callable, Sequence

from kvstore.node.contract import CHECKSUM_BYTES
from kvstore.node.node import Node
from mooncake.core.errors import RequestError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import Block, Find, Findings

ELSEWHERE = -1
"""In Findings.offsets (wire contract): the store has it, not in memory."""
INLINE = -2
"""In Findings.offsets (wire contract): its bytes are in Findings.data."""
INLINE_BYTES_MAX = 1 << 20
"""Sum of what one answer carries; a store that copies more keeps its other callers waiting."""
NO_CHECKSUM = bytes(CHECKSUM_BYTES)

Read = Callable[[int, int], memoryview]
"""(offset, size_bytes) -> bytes of the segment."""


def split_keys(blob: bytes) -> list[bytes]:
    """Return the keys of one blob.

    Raises:
        RequestError: it is not a whole number of keys.
    """
    if len(blob) % KEY_BYTES:
        raise RequestError(f"a blob of {len(blob)} bytes is no list of keys of {KEY_BYTES} bytes")
    return [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


def find(
    node: Node, now_s: float, request: Find, elsewhere: Callable[[bytes], int] | None, read: Read
) -> Findings:
    """Answer `request`.

    Args:
        node: what is in memory.
        now_s: monotonic.
        request: see Find.
        elsewhere: bytes of an object in a slower tier, 0 = not there either; None: there is none.
        read: of the memory that `node` divides.

    Raises:
        RequestError: too many keys, or a lease that makes no sense.
        CapacityError: too many leases.
    """
    keys = split_keys(request.keys)
    if len(keys) > node.limits.keys_max:
        raise RequestError(f"{len(keys)} keys: at most {node.limits.keys_max} at once")
    node.tick(now_s)
    blocks = [node.block_of(key) for key in keys]
    lease_id, carried = 0, []
    if request.lease_s:
        if not request.lease_s > 0:  # also refuses NaN
            raise RequestError(f"lease_s={request.lease_s}: must not be negative")
        carried = _carried(blocks, request.inline_bytes)
        known = sum(block is not None for block in blocks)
        node.hits += known
        node.misses += len(keys) - known
        node.note_reads([key for key, block in zip(keys, blocks, strict=True) if block is not None])
        node.touch([keys[row] for row in carried])
        if len(carried) < known:
            inline = set(carried)
            held = [key for row, key in enumerate(keys) if row not in inline] if inline else keys
            lease_id = node.hold(now_s, held, request.lease_s)[0]
    found = _columns(lease_id, keys, blocks, elsewhere)
    if not carried:
        return found
    offsets = array("q", found.offsets)
    parts = []
    for row in carried:
        block = blocks[row]
        assert block is not None
        parts.append(read(block.offset, block.size_bytes))
        offsets[row] = INLINE
    return Findings(lease_id, offsets.tobytes(), found.sizes, found.checksums, b"".join(parts))


def _carried(blocks: Sequence[Block | None], inline_bytes: int) -> list[int]:
    """Return the rows whose bytes go with the answer."""
    room = INLINE_BYTES_MAX
    rows = []
    for row, block in enumerate(blocks) if inline_bytes else ():
        if block is not None and block.size_bytes <= min(inline_bytes, room):
            room -= block.size_bytes
            rows.append(row)
    return rows


def _columns(
    lease_id: int,
    keys: Sequence[bytes],
    blocks: Sequence[Block | None],
    elsewhere: Callable[[bytes], int] | None,
) -> Findings:
    offsets, sizes, checksums = array("q"), array("q"), []
    for key, block in zip(keys, blocks, strict=True):
        if block is not None:
            offsets.append(block.offset)
            sizes.append(block.size_bytes)
            checksums.append(block.checksum)
        else:
            offsets.append(ELSEWHERE)
            sizes.append(elsewhere(key) if elsewhere else 0)
            checksums.append(NO_CHECKSUM)
    return Findings(lease_id, offsets.tobytes(), sizes.tobytes(), b"".join(checksums))
