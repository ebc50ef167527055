"""Frames of a data connection (transfer.tcp). All numbers little-endian.

request   MAGIC u32 | op u8 | 0 u8 | keys u16 | entries u32 | payload u64 | key (16) | address u64
          | size u32 | 0 (12)
          with one entry, key, address and size say all; with more, a table follows:
          keys x 16 bytes, then entries x (address u64, size u32, index of its key u32)
          then, for a WRITE, the payload: the bytes of all entries in order
answer    MAGIC u32 | state u8 | 0 u8 | 0 u16 | entries u32 | payload u64 | 0 (44)
          state 1: entries x status u8 follow (0 = done); state 0: all are done
          then, for a READ, the payload: the bytes of the entries that are done, in order

Heads are 64 bytes and tables multiples of 16, so that the kernel's copies of the payload stay aligned:
with a head of 20 bytes READ was a third slower.

The owner reads exactly what a request announces, also when it refuses it, so a wrong key or range
costs its entry and nothing else. Anything else than such a frame ends the connection.
"""

import struct
from collections.abc import Sequence

from mooncake.core.errors import ProtocolError
from transfer.model import KEY_BYTES, Opcode

MAGIC = 0x314B434D  # "MCK1"
REQUEST = struct.Struct("<IBBHIQ16sQI12x")
ANSWER = struct.Struct("<IBBHIQ44x")
ENTRY = struct.Struct("<QII")
ENTRIES_MAX = 1000
"""With the header they fit one sendmsg (1,024 pieces)."""
FRAME_BYTES_MAX = 8 << 20
"""Payload of one frame: bounds what an owner has to drain after a refusal."""

DONE, REFUSED = 0, 1
ALL_DONE, SOME_DONE = 0, 1

Entry = tuple[bytes, int, int]
"""(key, address, size_bytes)"""


def encode_request(op: Opcode, entries: Sequence[Entry]) -> bytes:
    """Return the request without its payload."""
    total = sum(entry[2] for entry in entries)
    key, address, size = entries[0]
    if len(entries) == 1:
        return REQUEST.pack(MAGIC, op, 0, 1, 1, total, key, address, size)
    keys = {key: at for at, key in enumerate(dict.fromkeys(entry[0] for entry in entries))}
    head = REQUEST.pack(MAGIC, op, 0, len(keys), len(entries), total, key, address, size)
    return b"".join((head, *keys, *(ENTRY.pack(address, size, keys[key]) for key, address, size in entries)))


def decode_head(data: bytes | bytearray) -> tuple[Opcode, int, int, int, Entry]:
    """Return (op, keys, entries, payload bytes, first entry) of a request.

    Raises:
        ProtocolError: not a request within the limits.
    """
    magic, op, zero, keys, entries, payload, key, address, size = REQUEST.unpack(data)
    if magic != MAGIC or zero or op > Opcode.WRITE:
        raise ProtocolError("not a transfer request")
    if not 1 <= entries <= ENTRIES_MAX or not 1 <= keys <= entries or payload > FRAME_BYTES_MAX:
        raise ProtocolError(f"a request of {entries} entries, {keys} keys, {payload} bytes is out of bounds")
    if entries == 1 and size != payload:
        raise ProtocolError(f"a request announces {payload} bytes and names {size}")
    return Opcode(op), keys, entries, payload, (key, address, size)


def table_bytes(keys: int, entries: int) -> int:
    """Return the size of the table after the head."""
    return 0 if entries == 1 else keys * KEY_BYTES + entries * ENTRY.size


def decode_table(data: bytes | bytearray, keys: int, payload: int) -> list[Entry]:
    """Return the entries of a table of `keys` keys.

    Raises:
        ProtocolError: sizes do not add up to `payload`, or an entry names no key.
    """
    names = [bytes(data[at : at + KEY_BYTES]) for at in range(0, keys * KEY_BYTES, KEY_BYTES)]
    entries: list[Entry] = []
    total = 0
    for address, size, which in ENTRY.iter_unpack(memoryview(data)[keys * KEY_BYTES :]):
        if which >= keys:
            raise ProtocolError(f"an entry names key {which} of {keys}")
        total += size
        entries.append((names[which], address, size))
    if total != payload:
        raise ProtocolError(f"a request announces {payload} bytes and names {total}")
    return entries


def encode_answer(statuses: bytes, payload: int) -> bytes:
    """Return the answer to a request without its payload."""
    if any(statuses):
        return ANSWER.pack(MAGIC, SOME_DONE, 0, 0, len(statuses), payload) + statuses
    return ANSWER.pack(MAGIC, ALL_DONE, 0, 0, len(statuses), payload)


def decode_answer(data: bytes | bytearray, entries: int) -> tuple[bool, int]:
    """Return (whether all are done, payload bytes) of the answer to a request of `entries`.

    Raises:
        ProtocolError: not such an answer.
    """
    magic, state, zero, zeros, count, payload = ANSWER.unpack(data)
    if magic != MAGIC or state > SOME_DONE or zero or zeros or count != entries or payload > FRAME_BYTES_MAX:
        raise ProtocolError("not the answer to our request")
    return state == ALL_DONE, payload
