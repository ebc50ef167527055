"""etcd's v3 API as its JSON gateway speaks it: requests as dicts, answers as structs, errors mapped.

Numbers of 64 bits are strings, bytes are base64, fields with their default are left away. The
gateway is part of every etcd since 3.4, on the client port. Nothing here does IO.
"""

import base64
from typing import Generic, TypeVar

import msgspec

from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)

T = TypeVar("T")

RANGE, TXN, DELETE = "/v3/kv/range", "/v3/kv/txn", "/v3/kv/deleterange"
GRANT, KEEP_ALIVE, REVOKE = "/v3/lease/grant", "/v3/lease/keepalive", "/v3/lease/revoke"
WATCH = "/v3/watch"
AUTHENTICATE = "/v3/auth/authenticate"
_TOKEN_WANTED = ("user name is empty", "invalid auth token", "revision of auth store is old")


class Header(msgspec.Struct):
    """Of every answer."""

    cluster_id: int = 0
    revision: int = 0


class Pair(msgspec.Struct):
    """One key."""

    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0


class Ranged(msgspec.Struct):
    """Answer to RANGE."""

    header: Header = msgspec.field(default_factory=Header)
    kvs: list[Pair] = []


class Response(msgspec.Struct):
    """One answer within a transaction's."""

    response_range: Ranged = msgspec.field(default_factory=Ranged)


class TxnDone(msgspec.Struct):
    """Answer to TXN."""

    header: Header = msgspec.field(default_factory=Header)
    succeeded: bool = False
    responses: list[Response] = []


class Lease(msgspec.Struct):
    """Answer to GRANT and KEEP_ALIVE; a lease that is gone has no time to live."""

    id: int = msgspec.field(name="ID", default=0)
    ttl_s: int = msgspec.field(name="TTL", default=0)


class SignedIn(msgspec.Struct):
    """Answer to AUTHENTICATE."""

    token: str = ""


class Done(msgspec.Struct):
    """An answer of which nothing is wanted."""


class Event(msgspec.Struct):
    """One change."""

    kv: Pair
    type: str = "PUT"


class Watched(msgspec.Struct):
    """One message of a WATCH."""

    header: Header = msgspec.field(default_factory=Header)
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    fragment: bool = False  # more of this batch follows
    events: list[Event] = []


class Fault(msgspec.Struct):
    """What the gateway says instead: a gRPC code and a text."""

    code: int = 0
    grpc_code: int = 0  # as streams name it
    message: str = ""


class Streamed(msgspec.Struct, Generic[T]):
    """One line of a streamed answer."""

    result: T | None = None
    error: Fault | None = None

    def taken(self) -> T:
        """Return what it carries.

        Raises:
            MooncakeError: it carries an error; see `refusal`.
        """
        if self.error is not None:
            raise refusal(0, self.error.grpc_code or self.error.code, self.error.message)
        if self.result is None:
            raise ProtocolError("etcd's answer is damaged: a stream without result or error")
        return self.result


def b64(value: bytes) -> str:
    """Return bytes as JSON carries them."""
    return base64.b64encode(value).decode()


def key_range(prefix: bytes) -> dict[str, str]:
    """Return the fields that mean: every key that starts with `prefix` (UTF-8, not empty)."""
    return {"key": b64(prefix), "range_end": b64(prefix[:-1] + bytes([prefix[-1] + 1]))}


def decode(body: bytes, kind: type[T]) -> T:
    """Return an answer.

    Raises:
        ProtocolError: it is not what etcd answers.
    """
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ProtocolError(f"etcd's answer is damaged: {error}: {body[:200]!r}") from error


def wants_token(message: str) -> bool:
    """Return whether etcd refuses because the request came without a token, or with an old one."""
    return any(text in message for text in _TOKEN_WANTED)


def refusal_of(status: int, body: bytes) -> MooncakeError:
    """Return the error of an HTTP answer other than 200."""
    if status == 400 and b"CommonName" in body:
        return ConfigError(
            "etcd refuses a certificate with a common name as soon as it has users: `cert` must be one "
            f"without, and the address names the user (etcds://USER@...): {body[:200]!r}"
        )
    try:
        fault = decode(body, Fault)
    except ProtocolError:
        fault = Fault(message=repr(body[:200]))
    return refusal(status, fault.code, fault.message)


def refusal(status: int, code: int, message: str) -> MooncakeError:
    """Return the error of a gRPC code (google.rpc.Code), or of an HTTP status without one."""
    text = f"etcd refuses: {message} (code {code}{f', HTTP {status}' if status else ''})"
    if code in (7, 16) or status in (401, 403) or wants_token(message):
        return ConfigError(
            f"{text}; give this process a user with rights on its namespace (etcd://USER@...), "
            "or a certificate that etcd accepts (`cert`, `key`)"
        )
    if code == 8:  # too many requests; or the quota of the data base is used up
        return CapacityError(text)
    if code in (3, 5, 9, 11):
        return RequestError(text)
    if code == 4:
        return PeerTimeout(text)
    if code in (1, 2, 13, 14) or status >= 500:
        return PeerGone(text)
    return ProtocolError(text)
