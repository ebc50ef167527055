"""The one codec: msgspec msgpack, typed on both sides, bounded in size. No pickle anywhere."""

from typing import Any, TypeVar

import msgspec

from mooncake.core.errors import ProtocolError

T = TypeVar("T")

MESSAGE_BYTES_MAX = 16 << 20
"""Largest control message: a snapshot page of 64 k keys is about 6 MB."""

_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """Return `message` (a msgspec struct or plain builtins) as msgpack bytes."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """Return `data` decoded as `kind`.

    Raises:
        ProtocolError: too large, not msgpack, or not of that type.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"message of {len(data)} bytes exceeds {MESSAGE_BYTES_MAX}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid {getattr(kind, '__name__', kind)}: {error}") from error
