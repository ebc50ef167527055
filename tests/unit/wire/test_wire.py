"""Every message survives the wire; whatever else arrives is a ProtocolError, never a crash."""

import contextlib
import inspect
import json
import types

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core import messages, metadata_messages, wire
from mooncake.core.errors import ProtocolError

CLASSES = [
    *inspect.getmembers(messages, inspect.isclass),
    *inspect.getmembers(metadata_messages, inspect.isclass),
]
STRUCTS = [cls for _, cls in sorted(dict(CLASSES).items()) if issubclass(cls, msgspec.Struct)]
UNIONS = {
    "StoreRequest": messages.StoreRequest,
    "StoreReply": messages.StoreReply,
    "MetaRequest": metadata_messages.MetaRequest,
    "MetaReply": metadata_messages.MetaReply,
}
KINDS = [*STRUCTS, *UNIONS.values(), list, list[str], dict, object, tuple[int, int, str, list]]


def values_of(cls: type) -> st.SearchStrategy:
    """Return a strategy for `cls`: floats that msgpack keeps, integers that fit its 64 bits."""
    hints = {field.name: field.type for field in msgspec.structs.fields(cls)}
    return st.builds(cls, **{name: value_of(kind) for name, kind in hints.items()})


def value_of(kind: object) -> st.SearchStrategy:
    if kind is int:
        return st.integers(-(2**63), 2**64 - 1)
    if kind is float:
        return st.floats(allow_nan=False)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return values_of(kind)
    if getattr(kind, "__origin__", None) is list:
        return st.lists(value_of(kind.__args__[0]), max_size=4)
    if getattr(kind, "__origin__", None) is dict:
        return st.dictionaries(*map(value_of, kind.__args__), max_size=4)
    if isinstance(kind, types.UnionType):
        return st.one_of(*map(value_of, kind.__args__))
    return st.from_type(kind)


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
def test_every_message_comes_back_equal(cls):
    @settings(max_examples=15, deadline=None)
    @given(message=values_of(cls))
    def check(message):
        assert wire.decode(wire.encode(message), cls) == message
        assert wire.decode(memoryview(wire.encode(message)), cls) == message

    check()


@pytest.mark.parametrize("name", UNIONS)
def test_every_member_of_a_union_is_told_apart_by_its_tag(name):
    @settings(max_examples=60, deadline=None)
    @given(message=st.one_of(*(values_of(cls) for cls in UNIONS[name].__args__)))
    def check(message):
        back = wire.decode(wire.encode(message), UNIONS[name])
        assert back == message
        assert type(back) is type(message)

    check()


@given(message=values_of(messages.InstanceRecord) | values_of(messages.StoreRecord))
def test_records_also_survive_as_json_objects_that_people_can_read(message):
    text = msgspec.json.encode(message)
    assert msgspec.json.decode(text, type=type(message)) == message
    assert set(json.loads(text)) == set(message.__struct_fields__)


@settings(max_examples=3 * settings.default.max_examples)
@given(data=st.binary(max_size=64), kind=st.sampled_from(KINDS))
def test_random_bytes_are_a_message_or_a_protocol_error(data, kind):
    decode_or_protocol_error(data, kind)


@settings(max_examples=3 * settings.default.max_examples)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_damaged_message_is_a_message_or_a_protocol_error(data, kind):
    cls = data.draw(st.sampled_from(STRUCTS))
    raw = bytearray(wire.encode(data.draw(values_of(cls))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decode_or_protocol_error(bytes(raw), kind)


def decode_or_protocol_error(data: bytes, kind: type) -> None:
    with contextlib.suppress(ProtocolError):
        wire.decode(data, kind)


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
def test_a_truncated_message_is_a_protocol_error(cls):
    @settings(max_examples=8, deadline=None)
    @given(message=values_of(cls), data=st.data())
    def check(message, data):
        raw = wire.encode(message)
        with pytest.raises(ProtocolError):
            wire.decode(raw[: data.draw(st.integers(0, len(raw) - 1))], cls)

    check()


def test_bytes_behind_a_message_are_a_protocol_error():
    with pytest.raises(ProtocolError, match="trailing"):
        wire.decode(wire.encode(messages.Ok()) + b"\0", messages.StoreReply)


@pytest.mark.parametrize("tag", ["", "acqq", "acqd", 7, None])
def test_a_tag_that_is_not_of_the_union_is_a_protocol_error(tag):
    with pytest.raises(ProtocolError):
        wire.decode(msgspec.msgpack.encode([tag, [b"k" * 32], 1.0]), messages.StoreRequest)


def test_a_message_of_another_server_is_a_protocol_error():
    with pytest.raises(ProtocolError):
        wire.decode(wire.encode(metadata_messages.MetaGet("/")), messages.StoreRequest)


@pytest.mark.parametrize("kind", [list, object, dict, messages.StoreRequest])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x01", b"\xdd\x00\x00\x00\x01"])
def test_nesting_without_end_is_a_protocol_error_not_a_deep_recursion(kind, opening):
    with pytest.raises(ProtocolError):
        wire.decode(opening * 100_000, kind)


def test_text_that_is_not_utf8_is_a_protocol_error():
    with pytest.raises(ProtocolError):
        wire.decode(b"\x92\xa3err\xa2\xff\xfe", messages.StoreReply)


def test_a_message_over_the_limit_is_refused_before_it_is_decoded():
    too_long = b"\xc6" + (wire.MESSAGE_BYTES_MAX).to_bytes(4, "big") + bytes(wire.MESSAGE_BYTES_MAX)
    with pytest.raises(ProtocolError, match="exceeds"):
        wire.decode(too_long, bytes)
    assert wire.decode(b"\xc6\0\0\0\1x", bytes) == b"x"


def test_a_snapshot_page_of_64_k_keys_fits():
    page = messages.SnapshotPage("epoch", 1, b"k" * (32 << 16), 0)
    assert wire.decode(wire.encode(page), messages.StoreReply) == page


def test_a_longer_message_of_a_newer_peer_is_read_up_to_what_we_know():
    assert wire.decode(msgspec.msgpack.encode(["rel", 5, "new"]), messages.StoreRequest) == messages.Release(
        5
    )


def test_no_wire_message_shares_its_tag_with_another_of_the_same_union():
    for union in UNIONS.values():
        tags = [cls.__struct_config__.tag for cls in union.__args__]
        assert len(set(tags)) == len(tags)
        assert None not in tags
