"""Frames of data connections: what is encoded is decoded, and garbage is an error of ours, never another."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import ProtocolError
from transfer.model import Opcode
from transfer.tcp_wire import (
    ANSWER,
    ENTRIES_MAX,
    FRAME_BYTES_MAX,
    MAGIC,
    REQUEST,
    decode_answer,
    decode_head,
    decode_table,
    encode_answer,
    encode_request,
    table_bytes,
)

KEYS = [bytes([i]) * 16 for i in range(3)]
entries_of = st.lists(
    st.tuples(st.sampled_from(KEYS), st.integers(0, 2**64 - 1), st.integers(1, 5000)), min_size=1, max_size=50
)


def decode(data: bytes):
    op, keys, count, payload, first = decode_head(data[: REQUEST.size])
    table = data[REQUEST.size :]
    assert len(table) == table_bytes(keys, count)
    return op, [first] if count == 1 else decode_table(table, keys, payload), payload


@given(st.sampled_from(list(Opcode)), entries_of)
def test_a_request_survives_the_wire(op, entries):
    assert decode(encode_request(op, entries)) == (op, entries, sum(entry[2] for entry in entries))


@given(st.binary(min_size=REQUEST.size, max_size=REQUEST.size))
def test_any_head_is_within_bounds_or_a_protocol_error(data):
    with contextlib.suppress(ProtocolError):
        _, keys, count, payload, _ = decode_head(data)
        assert 1 <= keys <= count <= ENTRIES_MAX
        assert payload <= FRAME_BYTES_MAX


@given(
    st.integers(0, 300),
    st.integers(0, 2),
    st.integers(0, 70_000),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)
def test_heads_with_the_right_magic_are_bounded_too(op, zero, keys, entries, payload):
    data = REQUEST.pack(MAGIC, op % 256, zero, keys % 65_536, entries, payload, KEYS[0], 1, payload % 2**32)
    with contextlib.suppress(ProtocolError):
        _, keys, count, payload, _ = decode_head(data)
        assert op % 256 in (0, 1)
        assert zero == 0
        assert 1 <= keys <= count <= ENTRIES_MAX
        assert payload <= FRAME_BYTES_MAX


@given(st.integers(1, 5), st.integers(2, 40), st.data())
def test_any_table_is_entries_that_add_up_or_a_protocol_error(keys, count, data):
    keys = min(keys, count)
    table = data.draw(st.binary(min_size=table_bytes(keys, count), max_size=table_bytes(keys, count)))
    with contextlib.suppress(ProtocolError):
        assert sum(entry[2] for entry in decode_table(table, keys, 1000)) == 1000


def test_an_entry_with_an_unknown_key_is_refused():
    data = bytearray(encode_request(Opcode.READ, [(KEYS[0], 1, 1), (KEYS[1], 2, 2)]))
    data[-4:] = (2).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="key 2 of 2"):
        decode(bytes(data))


def test_one_entry_needs_no_table():
    assert len(encode_request(Opcode.READ, [(KEYS[0], 1, 1)])) == REQUEST.size


@given(
    st.binary(min_size=1, max_size=40).map(lambda b: bytes(x % 2 for x in b)), st.integers(0, FRAME_BYTES_MAX)
)
def test_an_answer_survives_the_wire(statuses, payload):
    data = encode_answer(statuses, payload)
    all_done, size = decode_answer(data[: ANSWER.size], len(statuses))
    assert size == payload
    assert all_done == (not any(statuses))
    assert data[ANSWER.size :] == (b"" if all_done else statuses)


@given(st.binary(min_size=ANSWER.size, max_size=ANSWER.size), st.integers(1, ENTRIES_MAX))
def test_any_answer_is_bounded_or_a_protocol_error(data, count):
    with contextlib.suppress(ProtocolError):
        assert decode_answer(data, count)[1] <= FRAME_BYTES_MAX


def test_the_answer_to_another_request_is_refused():
    with pytest.raises(ProtocolError, match="not the answer"):
        decode_answer(encode_answer(b"\0\0", 0), 3)
