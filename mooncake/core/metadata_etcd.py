"""The metadata store on etcd. Implements MetadataStore; docs/adr/0005 says why over JSON.

Keys live under `<namespace>/data`. `<namespace>/epoch` names the life of the data: the first
client writes a random mark there if there is none. An etcd that lost its data lost the mark too,
although a rebuilt cluster may well have its old cluster id and revisions that catch up with ours.

What differs from the embedded store, within the contract: leases are rounded up to whole seconds
and to etcd's own minimum (2 s by default); keys that end with one lease share one revision.
"""

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from mooncake.core.errors import (
    ConfigError,
    MooncakeError,
    PeerError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)
from mooncake.core.metadata import POLL_S
from mooncake.core.metadata_etcd_auth import Token
from mooncake.core.metadata_etcd_http import BODY_BYTES_MAX, HttpConnection
from mooncake.core.metadata_etcd_names import Names
from mooncake.core.metadata_etcd_options import Endpoint, EtcdOptions
from mooncake.core.metadata_etcd_wire import (
    DELETE,
    GRANT,
    KEEP_ALIVE,
    RANGE,
    REVOKE,
    TXN,
    WATCH,
    Done,
    Lease,
    Pair,
    Ranged,
    Streamed,
    TxnDone,
    Watched,
    b64,
    decode,
    key_range,
    refusal,
    refusal_of,
)
from mooncake.core.metadata_memory import KEY_CHARS_MAX, TTL_S_MAX, TTL_S_MIN, VALUE_BYTES_MAX
from mooncake.core.metadata_messages import MetaChange, MetaChanges, MetaEntries, MetaEntry, MetaPutResult
from mooncake.core.metadata_outage import Outage

T = TypeVar("T")

ANSWER_S = 1.0
"""A server that has not answered by then is lost: the next one is asked. One silent server of
three costs a beat of a Registration (ttl 2 s, every third of it) less than its lease has left."""
CALL_S = 3.0
"""Deadline of one call over all servers: three of them may be silent."""
CALLS_MAX = 16
"""At once, per client: each takes a connection; a process has a few registrations and followers."""
IDLE_MAX = 2
"""Connections kept per server between calls: the usual beat and a watcher's question."""
BATCH_BYTES_MAX = BODY_BYTES_MAX
"""A watcher that is further behind lists again: a listing is not larger."""
MARKS_MAX = 3
"""Attempts to leave a mark: a second is needed only if somebody removes the first at once."""


class _Life(msgspec.Struct, frozen=True):
    """Which data a server holds, and how new."""

    epoch: str  # "" = no mark: nobody has used this store yet, or its data is lost
    revision: int


class EtcdMetadata:
    """Client of an etcd cluster. A write is sent once: PeerError leaves open whether it was done."""

    def __init__(
        self,
        options: EtcdOptions,
        poll_s: float = POLL_S,
        answer_s: float = ANSWER_S,
        call_s: float = CALL_S,
    ) -> None:
        """Connecting is lazy: the servers may come later. A watch yields every `poll_s` at least."""
        self._options = options
        self._root = options.namespace + "/data"
        self._mark = (options.namespace + "/epoch").encode()
        self._ask_mark = msgspec.json.encode({"key": b64(self._mark)})
        self._poll_s, self._answer_s, self._call_s = poll_s, answer_s, call_s
        self._order = list(options.endpoints)  # the one that answered last first
        self._idle: dict[Endpoint, list[HttpConnection]] = {endpoint: [] for endpoint in self._order}
        self._calls = asyncio.Semaphore(CALLS_MAX)
        self._token = Token(options)
        self._names = Names()
        self._outage = Outage(str(options))

    async def get(self, prefix: str) -> MetaEntries:
        """See MetadataStore."""
        ranges = [{"key": b64(self._mark)}, key_range(self._key(prefix))]
        request = {"success": [{"request_range": one} for one in ranges]}
        for _ in range(MARKS_MAX):
            answer = await self._call(TXN, request, TxnDone)
            if len(answer.responses) != 2:
                raise ProtocolError(f"etcd answers {len(answer.responses)} of 2 ranges")
            marks, found = (response.response_range.kvs for response in answer.responses)
            if marks:
                entries = [MetaEntry(self._name(pair), pair.value, pair.mod_revision) for pair in found]
                epoch = _epoch(answer.header.cluster_id, marks[0])
                return MetaEntries(answer.header.revision, entries, epoch)
            await self._leave_mark()
        raise PeerGone(f"etcd: the key {self._mark.decode()} does not stay; who removes it?")

    async def put(
        self, key: str, value: bytes, lease_id: int = 0, if_revision: int | None = None
    ) -> MetaPutResult:
        """See MetadataStore."""
        if not 0 < len(key) <= KEY_CHARS_MAX:
            raise RequestError(f"metadata key of {len(key)} characters: 1..{KEY_CHARS_MAX} are allowed")
        if len(value) > VALUE_BYTES_MAX:
            raise RequestError(f"metadata value of {key} has {len(value)} bytes, at most {VALUE_BYTES_MAX}")
        name = b64(self._key(key))
        request: dict[str, Any] = {
            "success": [{"request_put": {"key": name, "value": b64(value), "lease": str(lease_id)}}]
        }
        if if_revision is not None:  # an absent key has revision 0, for etcd as for us
            unchanged = {"key": name, "target": "MOD", "result": "EQUAL", "mod_revision": str(if_revision)}
            request["compare"] = [unchanged]
            request["failure"] = [{"request_range": {"key": name, "keys_only": True}}]
        try:
            answer = await self._call(TXN, request, TxnDone, repeatable=False)
        except RequestError as error:
            if "lease not found" in str(error):
                raise RequestError(
                    f"lease {lease_id} is gone: grant a new one and put {key} again"
                ) from error
            raise
        if answer.succeeded:
            return MetaPutResult(True, answer.header.revision)
        found = [pair for response in answer.responses for pair in response.response_range.kvs]
        return MetaPutResult(False, found[0].mod_revision if found else 0)

    async def delete(self, key: str) -> None:
        """See MetadataStore."""
        await self._call(DELETE, {"key": b64(self._key(key))}, Done, repeatable=False)

    async def grant(self, ttl_s: float) -> int:
        """See MetadataStore; the time is rounded up, see the module."""
        if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:  # NaN fails here too
            raise RequestError(f"lease of {ttl_s} s: {TTL_S_MIN}..{TTL_S_MAX} s are allowed")
        return (await self._call(GRANT, {"TTL": str(math.ceil(ttl_s))}, Lease)).id

    async def keep_alive(self, lease_id: int) -> bool:
        """See MetadataStore."""
        return (await self._call(KEEP_ALIVE, {"ID": str(lease_id)}, Streamed[Lease])).taken().ttl_s > 0

    async def revoke(self, lease_id: int) -> None:
        """See MetadataStore."""
        try:
            await self._call(REVOKE, {"ID": str(lease_id)}, Done)
        except RequestError as error:
            if "lease not found" not in str(error):
                raise

    async def watch(self, prefix: str, from_revision: int, epoch: str = "") -> AsyncIterator[MetaChanges]:
        """See MetadataStore.

        Silence is checked every `poll_s` by a question that only a server with a quorum answers:
        a stalled or cut-off server is lost within `poll_s + answer_s`.
        """
        # From the known revision on, not after it: etcd removes the deletion at the very revision
        # it compacts to, but answers from there on. This way it says that history is gone.
        start = {"start_revision": str(max(1, from_revision)), "fragment": True}
        body = msgspec.json.encode({"create_request": key_range(self._key(prefix)) | start})
        connection = await self._on_any(lambda connection: self._begin_watch(connection, body))
        coming: asyncio.Task[MetaChanges] | None = None
        try:
            # asked after the stream is open: what comes through it belongs to this life
            life = await self._life_at(connection.endpoint)
            known = epoch or life.epoch
            if life.epoch != known or from_revision > life.revision:
                yield MetaChanges(life.revision, [], compacted=True, epoch=life.epoch)
                return
            revision = from_revision
            while True:
                coming = coming or asyncio.create_task(self._next_batch(connection, revision, known))
                await asyncio.wait({coming}, timeout=self._poll_s)
                if not coming.done():
                    life = await self._life_at(connection.endpoint)
                    if life.epoch != known:
                        yield MetaChanges(life.revision, [], compacted=True, epoch=life.epoch)
                        return
                    yield MetaChanges(revision, [], epoch=known)
                    continue
                batch, coming = coming.result(), None
                yield batch
                if batch.compacted:
                    return
                revision = batch.revision
        finally:
            if coming:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            connection.abort()

    async def close(self) -> None:
        """See MetadataStore."""
        for connections in self._idle.values():
            while connections:
                connections.pop().abort()
        await self._names.close()

    # ------------------------------------------------------------------------------- watching

    async def _begin_watch(self, connection: HttpConnection, body: bytes) -> HttpConnection:
        begun = False
        try:
            if self._options.user:  # a watch that is refused does not say what else it wants
                await self._round(connection, RANGE, self._ask_mark)
            status = await connection.post(WATCH, body, self._token.value)
            if status != 200:
                raise refusal_of(status, await connection.read_body())
            message, _ = await self._message(connection)
            if message.canceled and not message.compact_revision:
                raise refusal(0, 7, message.cancel_reason)  # whatever it is, it is about our rights
            begun = message.created
        finally:
            if not begun:
                connection.abort()
        if not begun:
            raise ProtocolError(f"etcd server {connection.endpoint} did not begin the watch")
        return connection

    async def _next_batch(self, connection: HttpConnection, after: int, epoch: str) -> MetaChanges:
        """Wait for the next changes after a revision, however many messages they take."""
        changes: list[MetaChange] = []
        batch_bytes = 0
        while True:
            message, size_bytes = await self._message(connection)
            batch_bytes += size_bytes
            if message.canceled and not message.compact_revision:
                raise PeerGone(f"etcd server {connection.endpoint} ended a watch: {message.cancel_reason}")
            if message.compact_revision or batch_bytes > BATCH_BYTES_MAX:
                return MetaChanges(max(message.header.revision, after), [], compacted=True, epoch=epoch)
            for event in message.events:
                pair = event.kv
                if pair.mod_revision > after:
                    value = None if event.type == "DELETE" else pair.value
                    changes.append(MetaChange(self._name(pair), value, pair.mod_revision))
            if changes and not message.fragment:
                return MetaChanges(changes[-1].revision, changes, epoch=epoch)

    async def _message(self, connection: HttpConnection) -> tuple[Watched, int]:
        """Return the next message of a watch and its size in bytes."""
        line = await connection.read_line()
        if not line:
            raise PeerGone(f"etcd server {connection.endpoint} ended a stream")
        return decode(line, Streamed[Watched]).taken(), len(line)

    # ------------------------------------------------------------------------------- lives

    async def _leave_mark(self) -> None:
        mark = b64(self._mark)
        absent = {"key": mark, "target": "MOD", "result": "EQUAL", "mod_revision": "0"}
        then = {"request_put": {"key": mark, "value": b64(secrets.token_hex(8).encode())}}
        await self._call(TXN, {"compare": [absent], "success": [then]}, TxnDone)

    async def _life_at(self, endpoint: Endpoint) -> _Life:
        """Ask one server, through the quorum, which life it holds."""

        async def ask() -> _Life:
            connection = await self._connected(endpoint)
            answer = decode(await self._exchange(connection, RANGE, self._ask_mark), Ranged)
            epoch = _epoch(answer.header.cluster_id, answer.kvs[0]) if answer.kvs else ""
            return _Life(epoch, answer.header.revision)

        try:
            async with asyncio.timeout(self._answer_s):
                return await ask()
        except TimeoutError as error:
            self._avoid(endpoint)
            raise PeerTimeout(f"etcd server {endpoint} is silent for {self._answer_s:g} s") from error
        except PeerError:
            self._avoid(endpoint)
            raise

    # ------------------------------------------------------------------------------- calls

    async def _call(self, path: str, request: dict[str, Any], kind: type[T], repeatable: bool = True) -> T:
        body = msgspec.json.encode(request)
        answer = await self._on_any(lambda connection: self._exchange(connection, path, body), repeatable)
        return decode(answer, kind)

    async def _on_any(self, action: Callable[[HttpConnection], Awaitable[T]], repeatable: bool = True) -> T:
        """Run `action` as `_on_first` does; tell when the store goes away and when it is back."""
        try:
            answer = await self._on_first(action, repeatable)
        except MooncakeError as error:
            self._outage.failed(error)
            raise
        self._outage.answered()
        return answer

    async def _on_first(self, action: Callable[[HttpConnection], Awaitable[T]], repeatable: bool) -> T:
        """Run `action` on a connection to the first server that is there for it.

        What is not `repeatable` goes to a second server only if the first could not be reached.

        Raises:
            ConfigError: TLS fails, on one server at least, and no other one answered.
            PeerError: no server answered in time.
        """
        failures: list[MooncakeError] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._call_s), self._calls:
                for endpoint in tuple(self._order):
                    sent = False
                    try:
                        async with asyncio.timeout(self._answer_s):
                            connection = await self._connected(endpoint)
                            sent = True
                            return await action(connection)
                    except TimeoutError:
                        failure: MooncakeError = PeerTimeout(
                            f"etcd server {endpoint} does not answer within {self._answer_s:g} s"
                        )
                    except (PeerError, ConfigError) as error:
                        failure = error
                    failures.append(failure)
                    self._avoid(endpoint)
                    if sent and not repeatable:
                        raise failure
        wrong = [failure for failure in failures if not isinstance(failure, PeerError)]
        raise (wrong or failures or [PeerTimeout(f"etcd: no answer within {self._call_s:g} s")])[-1]

    async def _connected(self, endpoint: Endpoint) -> HttpConnection:
        idle = self._idle[endpoint]
        while idle:
            connection = idle.pop()
            if connection.reusable:
                return connection
            connection.abort()
        return await HttpConnection.open(self._options, endpoint, await self._names.addresses(endpoint))

    async def _exchange(self, connection: HttpConnection, path: str, body: bytes) -> bytes:
        """Return the answer to one request and keep the connection if it is still good."""
        try:
            return await self._round(connection, path, body)
        finally:
            idle = self._idle[connection.endpoint]
            if connection.reusable and len(idle) < IDLE_MAX:
                idle.append(connection)
            else:
                connection.abort()

    async def _round(self, connection: HttpConnection, path: str, body: bytes) -> bytes:
        """Return the answer to one request; sign in first if that is what etcd wants."""
        token = self._token.value
        status = await connection.post(path, body, token)
        answer = await connection.read_body()
        if status != 200 and self._token.may_help(answer):
            await self._token.renew(connection, token)
            status = await connection.post(path, body, self._token.value)
            answer = await connection.read_body()
        if status != 200:
            raise refusal_of(status, answer)
        return answer

    def _avoid(self, endpoint: Endpoint) -> None:
        """Ask `endpoint` last from now on."""
        if self._order[0] == endpoint:
            self._order = [*self._order[1:], endpoint]

    # ------------------------------------------------------------------------------- names

    def _key(self, key: str) -> bytes:
        try:
            return (self._root + key).encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"metadata key {key!r} is no text: {error.reason}") from error

    def _name(self, pair: Pair) -> str:
        try:
            return pair.key.decode().removeprefix(self._root)
        except UnicodeDecodeError as error:
            raise ProtocolError(f"metadata key {pair.key!r} in etcd is not ours: {error.reason}") from error


def _epoch(cluster_id: int, mark: Pair) -> str:
    # when the mark was made tells apart what a copied mark would not
    return f"{cluster_id:x}-{mark.value.decode('ascii', 'replace')}-{mark.mod_revision}"
