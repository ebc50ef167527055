"""The one codec: msgspec msgpack, typed on both sides, bounded in size. No pickle anywhere."""

import threading
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from mooncake.core.errors import ProtocolError

T = TypeVar("T")

MESSAGE_BYTES_MAX = 16 << 20
"""Largest control message: a snapshot page of 64 k keys is about 6 MB."""

DECODERS_MAX = 256
"""Types that are decoded in one process: a few dozen."""

_encoder = msgspec.msgpack.Encoder()
_making = threading.Lock()
"""Seen under load with msgspec 0.22: two threads made decoders of one type, the garbage collector crashed."""


@lru_cache(DECODERS_MAX)
def _decoder(kind: Any) -> "msgspec.msgpack.Decoder[Any]":
    """Return the decoder of `kind`: to make one for a union takes 18 us, 70 times as long as to use it."""
    with _making:
        return msgspec.msgpack.Decoder(kind)


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
        message: T = _decoder(kind).decode(data)  # type: ignore[arg-type]  # every type is hashable
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid {getattr(kind, '__name__', kind)}: {error}") from error
    return message
