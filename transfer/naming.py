"""Where an engine is found by its name: the metadata backends of the drop-in engine.

With P2PHANDSHAKE the name *is* the address. Else every engine publishes `name -> address` in a key-value
store (upstream's HTTP metadata server, or etcd) and its peers look it up. Only addresses go there: buffer
keys are handed out by their owner alone, in the handshake.

etcd is spoken over its own JSON gateway (`/v3/kv/...`, part of etcd since 3.4, on the client port): three
calls need no gRPC client, and the blocking `http.client` fits the threads that transfers run in.
"""

import base64
import hashlib
import hmac
import http.client
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from mooncake.core.errors import (
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)
from transfer.config import split_name

P2P = "P2PHANDSHAKE"
"""Upstream's word for: no metadata server."""
KEY_PREFIX = "mooncake/engines/"
NAME_CHARS_MAX = 256
ANSWER_BYTES_MAX = 64 << 10
"""A record has about 100 bytes."""
ENDPOINTS_MAX = 9
"""Of one etcd cluster; more than 7 members only slow it down."""
ETCD_PORT = 2379
PROOF_SCHEME = "Mooncake"
PROOF_AGE_S_MAX = 300.0
"""How far the clocks of two hosts may be apart."""


Where = tuple[str, str, int]
"""Scheme, host and port of a metadata server."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine publishes under its name."""

    address: str  # "host:port" of its control listener
    epoch: str  # of this start: a restarted engine replaces the record, the old one cannot withdraw it


class Naming(Protocol):
    """A way from names to addresses. Methods are called from several threads at once."""

    def publish(self, name: str, record: Record, deadline_s: float) -> None:
        """Let others find us; replaces what is there."""

    def resolve(self, name: str, deadline_s: float) -> str:
        """Return the address of `name`, "host:port".

        Raises:
            RequestError: nobody has that name.
            PeerTimeout, PeerGone, ProtocolError: the metadata server cannot tell.
        """

    def withdraw(self, name: str, record: Record, deadline_s: float) -> None:
        """Take back exactly `record` (idempotent)."""


class Store(Protocol):
    """The three calls a metadata server has to know."""

    def get(self, key: str, deadline_s: float) -> bytes | None:
        """Return the value, None if there is none."""

    def put(self, key: str, value: bytes, deadline_s: float) -> None:
        """Set the value."""

    def delete(self, key: str, value: bytes, deadline_s: float) -> None:
        """Delete `key` if it still has `value`."""


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of "host:port" or "[v6]:port".

    Raises:
        RequestError: it is not such a text.
    """
    try:
        return split_name(text[:NAME_CHARS_MAX].encode("ascii").decode())
    except (ConfigError, UnicodeError) as error:
        raise RequestError(f"no address, write host:port: {error}") from error


class PeerToPeer:
    """Names are addresses."""

    def publish(self, name: str, record: Record, deadline_s: float) -> None:
        """Nothing to do."""

    def resolve(self, name: str, deadline_s: float) -> str:  # noqa: ARG002 - see Naming
        """Return `name`, which is an address; see Naming."""
        parse_address(name)
        return name

    def withdraw(self, name: str, record: Record, deadline_s: float) -> None:
        """Nothing to do."""


class Directory:
    """Names in a key-value store."""

    def __init__(self, store: Store) -> None:
        """`store` may be shared with other applications: our keys begin with KEY_PREFIX."""
        self._store = store

    def publish(self, name: str, record: Record, deadline_s: float) -> None:
        """See Naming."""
        self._store.put(_key(name), msgspec.json.encode(record), deadline_s)

    def resolve(self, name: str, deadline_s: float) -> str:
        """See Naming."""
        value = self._store.get(_key(name), deadline_s)
        if value is None:
            raise RequestError(f"no engine has published the name {name!r}")
        try:
            address = msgspec.json.decode(value, type=Record).address
            parse_address(address)
        except (msgspec.DecodeError, RequestError) as error:
            raise ProtocolError(f"the record of {name!r} is damaged: {error}") from error
        return address

    def withdraw(self, name: str, record: Record, deadline_s: float) -> None:
        """See Naming."""
        self._store.delete(_key(name), msgspec.json.encode(record), deadline_s)


def naming_of(metadata: str, secret: bytes = b"") -> Naming:
    """Return the backend that a metadata string names.

    Args:
        metadata: "P2PHANDSHAKE", "http://host:port/metadata", "etcd://host:port[,host:port...]", or as
            upstream has it "host:port[;host:port...]" for etcd.
        secret: proves to our own HTTP metadata server that we may write; b"" = it asks for none.

    Raises:
        ConfigError: it is none of these.
    """
    if metadata == P2P:
        return PeerToPeer()
    scheme, mark, rest = metadata.partition("://")
    if mark and scheme in ("http", "https"):
        return Directory(HttpStore(metadata, secret))
    if not mark or scheme == "etcd":
        return Directory(EtcdStore(_endpoints(rest if mark else metadata, metadata)))
    raise ConfigError(
        f"metadata server {metadata!r}: {scheme} is not supported; use {P2P}, http://host:port/metadata or etcd://host:port"
    )


class HttpStore:
    """A client of `mooncake_http_metadata_server`, ours or upstream's."""

    def __init__(self, url: str, secret: bytes = b"") -> None:
        """Connects at each call: names are looked up rarely."""
        self._url = urllib.parse.urlsplit(url)
        self._secret = secret
        try:
            port = self._url.port
        except ValueError as error:
            raise ConfigError(f"metadata server {url!r}: {error}") from error
        if not self._url.hostname:
            raise ConfigError(f"metadata server {url!r}: write http://host:port/metadata")
        self._where = (
            self._url.scheme,
            self._url.hostname,
            port or (443 if self._url.scheme == "https" else 80),
        )

    def get(self, key: str, deadline_s: float) -> bytes | None:
        """See Store."""
        status, body = self._call("GET", key, b"", deadline_s)
        return None if status == 404 else body

    def put(self, key: str, value: bytes, deadline_s: float) -> None:
        """See Store."""
        self._call("PUT", key, value, deadline_s)

    def delete(self, key: str, value: bytes, deadline_s: float) -> None:
        """See Store. Not atomic: the protocol has no conditional delete."""
        if self.get(key, deadline_s) == value:
            self._call("DELETE", key, b"", deadline_s)

    def _call(self, method: str, key: str, body: bytes, deadline_s: float) -> tuple[int, bytes]:
        path = f"{self._url.path or '/metadata'}?key={urllib.parse.quote(key, safe='')}"
        headers = (
            {"Authorization": prove(self._secret, method, key, body, time.time())} if self._secret else {}
        )
        status, answer = _exchange(self._where, method, path, body, headers, deadline_s)
        if status not in (200, 404, 400, 413):
            raise _refusal(self._where, status, answer)
        return status, answer


class EtcdStore:
    """A client of etcd's JSON gateway."""

    def __init__(self, endpoints: Sequence[tuple[str, int]]) -> None:
        """`endpoints` are tried in turn, the one that answered last first."""
        self._endpoints = list(endpoints)

    def get(self, key: str, deadline_s: float) -> bytes | None:
        """See Store."""
        values = self._call("range", {"key": _b64(key.encode())}, deadline_s).get("kvs", [])
        try:
            return base64.b64decode(values[0].get("value", ""), validate=True) if values else None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ProtocolError(f"etcd's answer is damaged: {error!r}") from error

    def put(self, key: str, value: bytes, deadline_s: float) -> None:
        """See Store."""
        self._call("put", {"key": _b64(key.encode()), "value": _b64(value)}, deadline_s)

    def delete(self, key: str, value: bytes, deadline_s: float) -> None:
        """See Store."""
        name = _b64(key.encode())
        unchanged = {"key": name, "target": "VALUE", "result": "EQUAL", "value": _b64(value)}
        then = {"request_delete_range": {"key": name}}
        self._call("txn", {"compare": [unchanged], "success": [then]}, deadline_s)

    def _call(self, verb: str, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        end_s = time.monotonic() + deadline_s
        failure: MooncakeError = PeerTimeout("etcd: no time left")
        for endpoint in tuple(self._endpoints):
            where = ("http", *endpoint)
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                break
            try:
                status, body = _exchange(
                    where, "POST", f"/v3/kv/{verb}", msgspec.json.encode(request), {}, left_s
                )
                if status != 200:
                    raise _refusal(where, status, body)
                answer = msgspec.json.decode(body, type=dict[str, Any])
            except (PeerGone, PeerTimeout) as error:
                failure = error
                continue
            except msgspec.DecodeError as error:
                raise ProtocolError(f"{_place(where)} is no etcd: {error}") from error
            if self._endpoints[0] != endpoint:  # replaced as a whole: other threads may be iterating
                self._endpoints = [endpoint, *(other for other in self._endpoints if other != endpoint)]
            return answer
        raise failure


def prove(secret: bytes, method: str, key: str, body: bytes, now_s: float) -> str:
    """Return the Authorization header of one request to our HTTP metadata server."""
    text = f"{method}\n{key}\n{int(now_s)}\n".encode() + body
    return f"{PROOF_SCHEME} {int(now_s)}:{hmac.digest(secret, text, hashlib.sha256).hex()}"


def proves(header: str, secret: bytes, method: str, key: str, body: bytes, now_s: float) -> bool:
    """Return whether `header` is what `prove` makes of this request, lately."""
    stamp = header.removeprefix(f"{PROOF_SCHEME} ").partition(":")[0]
    if not (
        stamp.isascii()
        and stamp.isdecimal()
        and len(stamp) < 16
        and abs(int(stamp) - now_s) <= PROOF_AGE_S_MAX
    ):
        return False
    return hmac.compare_digest(header.encode(), prove(secret, method, key, body, float(stamp)).encode())


def _key(name: str) -> str:
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        raise RequestError(
            f"{name[:NAME_CHARS_MAX]!r} is no name: 1 to {NAME_CHARS_MAX} printable characters"
        )
    return KEY_PREFIX + name


def _endpoints(text: str, metadata: str) -> list[tuple[str, int]]:
    """Return the parts of "host:port,host:port"."""
    parts = [part.strip().removesuffix("/") for part in text.replace(";", ",").split(",")]
    try:
        found = [parse_address(part if ":" in part else f"{part}:{ETCD_PORT}") for part in parts]
    except RequestError as error:
        raise ConfigError(f"metadata server {metadata!r}: {error}") from error
    if len(found) > ENDPOINTS_MAX:
        raise ConfigError(f"metadata server {metadata!r}: at most {ENDPOINTS_MAX} endpoints")
    return found


def _b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _place(where: Where) -> str:
    return f"metadata server {where[0]}://{where[1]}:{where[2]}"


def _refusal(where: Where, status: int, body: bytes) -> MooncakeError:
    """Return the error of an answer that is neither yes nor no."""
    text = f"{_place(where)} answers {status}: {body[:200]!r}"
    if status in (401, 403):
        return ConfigError(f"{text}; give all engines and the metadata server the same secret")
    return PeerGone(text) if status >= 500 else ProtocolError(text)


def _exchange(
    where: Where,
    method: str,
    path: str,
    body: bytes,
    headers: dict[str, str],
    deadline_s: float,
) -> tuple[int, bytes]:
    """Send one request, return (status, body). No proxy, no redirect: metadata stays in the cluster."""
    scheme, host, port = where
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=deadline_s)
    try:
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        text = answer.read(ANSWER_BYTES_MAX + 1)
    except TimeoutError as error:
        raise PeerTimeout(f"{_place(where)} does not answer within {deadline_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise PeerGone(f"{_place(where)} cannot be reached: {error!r}; is it running?") from error
    finally:
        connection.close()
    if len(text) > ANSWER_BYTES_MAX:
        raise ProtocolError(f"{_place(where)} answers more than {ANSWER_BYTES_MAX} bytes")
    return answer.status, text
