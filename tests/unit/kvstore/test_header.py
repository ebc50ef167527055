"""A header says what was stored, or why it cannot be read; no bytes can make it raise or lie."""

import struct

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given
from xxhash import xxh3_128_digest

from kvstore.header import (
    BLANK_PAGE,
    HEADER_BYTES,
    NAME_BYTES_FIT,
    Codec,
    FileHeader,
    ObjectHeader,
    Record,
    Unreadable,
    decode_file,
    decode_record,
    encode_file,
    encode_record,
)

u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)


def fixed(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


objects = st.builds(
    ObjectHeader, fixed(32), st.integers(1, 2**64 - 1), fixed(16), u64, name=st.binary(max_size=300)
)
records = st.builds(Record, objects, fixed(16), u64, u32, u32, u64)
names = st.text(st.sampled_from("abcXYZ019._-"), min_size=1, max_size=63)
files = st.builds(FileHeader, fixed(16), names, u32, u64, u32)

NAMED = ObjectHeader(b"k" * 32, 5, b"c" * 16, 7, name=b"name")
RECORD = Record(ObjectHeader(b"k" * 32, 5, b"c" * 16, 7), b"t" * 16, 3, 1, 2, 8192)


def changed(page: bytes, offset: int, value: bytes) -> bytes:
    """`page` with other bytes and a checksum that fits: written so on purpose, not by accident."""
    data = bytearray(page)
    data[offset : offset + len(value)] = value
    data[16:32] = bytes(16)
    data[16:32] = xxh3_128_digest(data)
    return bytes(data)


@given(records)
def test_a_record_is_read_as_it_was_written_in_one_page(record):
    page = encode_record(record)
    assert len(page) == HEADER_BYTES
    assert decode_record(page) == decode_record(memoryview(page)) == record


@given(files)
def test_a_file_header_is_read_as_it_was_written(header):
    assert decode_file(encode_file(header)) == header


@given(records, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_makes_a_header_torn(record, position, difference):
    page = bytearray(encode_record(record))
    page[position] ^= difference
    assert decode_record(bytes(page)) is Unreadable.TORN


@given(records, records, st.lists(st.booleans(), min_size=8, max_size=8))
def test_sectors_of_two_headers_mixed_are_torn_or_one_of_both(old, new, taken):
    pages = encode_record(old), encode_record(new)
    mixed = b"".join(pages[t][i * 512 : (i + 1) * 512] for i, t in enumerate(taken))
    # only the first sector differs: the rest of a page is zeros
    assert decode_record(mixed) == (new if taken[0] else old)


@given(st.binary(max_size=HEADER_BYTES + 10))
def test_no_bytes_make_the_decoders_raise(data):
    assert isinstance(decode_record(data), Unreadable)
    assert isinstance(decode_file(data), Unreadable)


@given(st.integers(0, 500), st.binary(min_size=1, max_size=40))
def test_a_sound_checksum_over_any_fields_makes_no_decoder_raise(offset, value):
    for page, decode in ((encode_record(RECORD), decode_record), (FILE_PAGE, decode_file)):
        found = decode(changed(page, offset, value))
        assert isinstance(found, Record | FileHeader | Unreadable)


FILE_PAGE = encode_file(FileHeader(b"t" * 16, "node-1", 3, 1 << 20, 4))


def test_a_page_of_zeros_is_blank():
    assert decode_record(BLANK_PAGE) is Unreadable.BLANK
    assert decode_file(BLANK_PAGE) is Unreadable.BLANK


def test_one_kind_of_header_is_never_taken_for_the_other():
    assert decode_record(FILE_PAGE) is Unreadable.TORN
    assert decode_file(encode_record(RECORD)) is Unreadable.TORN


def test_another_version_is_named_not_guessed_at():
    assert decode_record(changed(encode_record(RECORD), 8, struct.pack("<H", 2))) is Unreadable.VERSION
    assert decode_file(changed(FILE_PAGE, 8, struct.pack("<H", 2))) is Unreadable.VERSION


def test_an_unknown_codec_is_named_not_served_as_raw():
    codec_at = 32 + 32 + 8 + 8
    assert decode_record(changed(encode_record(RECORD), codec_at, b"\x01\x00")) is Unreadable.CODEC


def test_fields_that_a_later_program_adds_at_the_end_are_skipped():
    body_bytes = struct.unpack_from("<I", encode_record(RECORD), 12)[0]
    longer = changed(encode_record(RECORD), 12, struct.pack("<I", body_bytes + 8))
    assert decode_record(changed(longer, 32 + body_bytes, b"\0\0newer")) == RECORD
    named = Record(NAMED, *msgspec.structs.astuple(RECORD)[1:])
    assert decode_record(changed(longer, 32 + body_bytes, b"\x04\0nameit")) == named


@pytest.mark.parametrize("length", [0, 7, 65_535])
def test_a_name_that_does_not_fit_its_body_is_none(length):
    body_bytes = struct.unpack_from("<I", encode_record(RECORD), 12)[0]
    longer = changed(encode_record(RECORD), 12, struct.pack("<I", body_bytes + 8))
    page = changed(longer, 32 + body_bytes, struct.pack("<H", length) + b"abcdef")
    assert decode_record(page) == RECORD


def test_a_name_that_is_too_long_for_the_page_is_left_out():
    longest = msgspec.structs.replace(RECORD.object, name=b"n" * NAME_BYTES_FIT)
    record = msgspec.structs.replace(RECORD, object=longest)
    assert decode_record(encode_record(record)) == record
    longer = msgspec.structs.replace(RECORD.object, name=b"n" * (NAME_BYTES_FIT + 1))
    assert decode_record(encode_record(msgspec.structs.replace(RECORD, object=longer))) == RECORD


@pytest.mark.parametrize("body_bytes", [0, 1, 100, HEADER_BYTES - 31, 2**32 - 1])
def test_a_body_of_an_impossible_size_is_torn(body_bytes):
    assert decode_record(changed(encode_record(RECORD), 12, struct.pack("<I", body_bytes))) is Unreadable.TORN


def test_the_format_of_version_1_is_for_ever():
    """The bytes themselves: a change here makes every cache on every disk unreadable."""
    page = encode_record(RECORD)
    body = b"k" * 32 + struct.pack("<QQHHQ", 5, 5, 0, 0, 7) + b"c" * 16
    body += b"t" * 16 + struct.pack("<QIIQ", 3, 1, 2, 8192)
    head = b"MCKVHEAD" + struct.pack("<HHI", 1, 2, len(body))
    rest = bytes(HEADER_BYTES - 32 - len(body))
    assert page == head + xxh3_128_digest(head + bytes(16) + body + rest) + body + rest
    assert Codec.RAW == 0
