"""The header that every stored object carries, and its place on a disk. Pure.

A header is one page of 4096 bytes, so that it can be written by O_DIRECT alone and a torn write of one
header never touches another. All numbers are little-endian:

    0   magic       8   "MCKVHEAD"
    8   version     2   another version is refused, not guessed at
    10  kind        2   1 = file (first and last page of a tier's file), 2 = object
    12  body bytes  4   what is longer than we know was written by a later program: the rest is skipped
    16  checksum    16  xxh3-128 of the whole page with these 16 bytes as zeros
    32  body            then zeros; that of an object may go on with the length (2) of its name and the name

Every byte is under the checksum; a page that fails it is TORN, an untouched one BLANK. The checksum finds
accidents. It is no signature: a page is taken for a header only where nothing but headers is written.

Codecs: only RAW now. A lossy or packing codec will be a new id here (`stored_bytes` then differs from
`length_bytes`) and a new root of its keys; programs that do not know the id skip the object (CODEC).

Only what outlives its program has a header. In memory, length and checksum (messages.Block) are enough: the
form of the bytes is in the key. It commits to the layout (core.context: pool_layout) and to every codec but
raw (core.keys.variant_root), so a reader of raw blocks computes keys that no other form is stored under, in
any tier and on any node. A header repeats the codec because a key is a hash: a program that finds an object
in a file cannot ask it in which form it is, and must not guess. KV blocks have NO_LAYOUT for the same reason.
"""

import enum
import struct

import msgspec
from xxhash import xxh3_128, xxh3_128_digest

from kvstore.node.allocator import ALIGN_BYTES
from mooncake.core.keys import KEY_BYTES

HEADER_BYTES = ALIGN_BYTES
VERSION = 1
MAGIC = b"MCKVHEAD"
NODE_BYTES_MAX = 63
"""Of a node's name (see StoreConfig)."""
TIER_BYTES = 16
NAME_BYTES_FIT = 3_072
"""Of an object's name, besides everything else in the page; a longer one is not kept over a restart."""
CHECKSUM_BYTES = 16
NO_LAYOUT = 0
"""Bytes without a layout of ours, or one that only the key commits to."""
BLANK_PAGE = bytes(HEADER_BYTES)

_ENVELOPE = struct.Struct("<8sHHI16s")
_CHECKSUM_AT = 16
_FILE = struct.Struct(f"<{TIER_BYTES}sIIQB{NODE_BYTES_MAX}s")
_RECORD = struct.Struct(f"<{KEY_BYTES}sQQHHQ{CHECKSUM_BYTES}s{TIER_BYTES}sQIIQ")
_KIND_FILE, _KIND_RECORD = 1, 2


class Codec(enum.IntEnum):
    """How the stored bytes make the object's bytes. Numbers are for ever."""

    RAW = 0
    """They are the same."""


class Unreadable(enum.Enum):
    """Why a page is no header that we can use."""

    BLANK = "never written, or cleared"
    TORN = "damaged, half written, or no header at all"
    VERSION = "written by another version"
    CODEC = "of a codec that this version does not know"


class ObjectHeader(msgspec.Struct, frozen=True, gc=False):
    """What an object is, wherever it is stored.

    `checksum` is block_checksum(key, stored bytes). `layout` names how the KV lies inside the bytes.
    """

    key: bytes
    length_bytes: int
    checksum: bytes
    layout: int = NO_LAYOUT
    codec: Codec = Codec.RAW
    stored_bytes: int = 0
    """Bytes on the medium; 0 when constructed = as many as the object has (RAW)."""
    name: bytes = b""
    """What it was put as, see kvstore.node.names; b"" = nothing that anybody lists."""

    def __post_init__(self) -> None:
        """Fill in `stored_bytes`."""
        if not self.stored_bytes:
            msgspec.structs.force_setattr(self, "stored_bytes", self.length_bytes)


class Record(msgspec.Struct, frozen=True, gc=False):
    """An object and its place in a tier's file: the stored bytes lie at `offset`.

    The header says where itself lies (`segment`, `slot`), so that a misdirected write is noticed.
    `generation` counts how often segments of this tier were begun: in one segment the highest is current.
    """

    object: ObjectHeader
    tier: bytes
    generation: int
    segment: int
    slot: int
    offset: int


class FileHeader(msgspec.Struct, frozen=True):
    """What a tier's file is: whose, and how it is divided. `tier` is drawn when the file is made."""

    tier: bytes
    node: str
    segments: int
    segment_bytes: int
    slots: int


def encode_record(record: Record) -> bytes:
    """Return the page of `record`."""
    item = record.object
    assert len(item.key) == KEY_BYTES
    assert len(item.checksum) == CHECKSUM_BYTES
    body = _RECORD.pack(
        item.key,
        item.length_bytes,
        item.stored_bytes,
        item.codec,
        0,
        item.layout,
        item.checksum,
        record.tier,
        record.generation,
        record.segment,
        record.slot,
        record.offset,
    )
    return _seal(_KIND_RECORD, body + _encode_name(item.name))


def decode_record(page: memoryview | bytes) -> Record | Unreadable:
    """Return what one page holds. Total: any bytes give an answer, nothing raises."""
    found = _open(page, _KIND_RECORD, _RECORD.size)
    if isinstance(found, Unreadable):
        return found
    (key, length, stored, codec, _, layout, checksum, tier, generation, segment, slot, offset) = (
        _RECORD.unpack_from(found)
    )
    if codec != Codec.RAW:
        return Unreadable.CODEC
    if not length or length != stored:
        return Unreadable.TORN  # never encoded by us
    item = ObjectHeader(key, length, checksum, layout, Codec.RAW, stored, _decode_name(found[_RECORD.size :]))
    return Record(item, tier, generation, segment, slot, offset)


def _encode_name(name: bytes) -> bytes:
    """Return what follows the fields; a program that was written before there were names skips it."""
    return struct.pack("<H", len(name)) + name if 0 < len(name) <= NAME_BYTES_FIT else b""


def _decode_name(rest: bytes) -> bytes:
    length = int.from_bytes(rest[:2], "little")
    return rest[2 : 2 + length] if length <= len(rest) - 2 else b""


def encode_file(header: FileHeader) -> bytes:
    """Return the page of a file's header."""
    node = header.node.encode()
    assert 0 < len(node) <= NODE_BYTES_MAX, "checked by the configuration"
    body = _FILE.pack(header.tier, header.segments, header.slots, header.segment_bytes, len(node), node)
    return _seal(_KIND_FILE, body)


def decode_file(page: memoryview | bytes) -> FileHeader | Unreadable:
    """Return what a file's first or last page holds. Total, as decode_record."""
    found = _open(page, _KIND_FILE, _FILE.size)
    if isinstance(found, Unreadable):
        return found
    tier, segments, slots, segment_bytes, node_bytes, node = _FILE.unpack_from(found)
    try:
        name = node[:node_bytes].decode()
    except UnicodeDecodeError:
        return Unreadable.TORN
    return FileHeader(tier, name, segments, segment_bytes, slots)


def _seal(kind: int, body: bytes) -> bytes:
    page = bytearray(HEADER_BYTES)
    _ENVELOPE.pack_into(page, 0, MAGIC, VERSION, kind, len(body), bytes(CHECKSUM_BYTES))
    page[_ENVELOPE.size : _ENVELOPE.size + len(body)] = body
    page[_CHECKSUM_AT : _CHECKSUM_AT + CHECKSUM_BYTES] = xxh3_128_digest(page)
    return bytes(page)


def _open(page: memoryview | bytes, kind: int, body_bytes_min: int) -> bytes | Unreadable:
    """Return the body of a sound page of this kind."""
    data = bytes(page)
    if data == BLANK_PAGE:
        return Unreadable.BLANK
    if len(data) != HEADER_BYTES:
        return Unreadable.TORN
    magic, version, found_kind, body_bytes, checksum = _ENVELOPE.unpack_from(data)
    digest = xxh3_128(data[:_CHECKSUM_AT])
    digest.update(bytes(CHECKSUM_BYTES))
    digest.update(data[_ENVELOPE.size :])
    if magic != MAGIC or digest.digest() != checksum:
        return Unreadable.TORN
    if version != VERSION:
        return Unreadable.VERSION
    if found_kind != kind or not body_bytes_min <= body_bytes <= HEADER_BYTES - _ENVELOPE.size:
        return Unreadable.TORN
    return data[_ENVELOPE.size : _ENVELOPE.size + body_bytes]
