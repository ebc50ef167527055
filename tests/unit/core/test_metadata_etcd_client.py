"""The etcd client against servers that are damaged, slow or hostile; no etcd needed."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core import metadata_etcd_http
from mooncake.core.errors import (
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
    RequestError,
)
from mooncake.core.metadata_client import RemoteMetadata
from mooncake.core.metadata_etcd import EtcdMetadata
from mooncake.core.metadata_etcd_options import (
    PASSWORD_ENV,
    Endpoint,
    EtcdOptions,
    is_etcd,
    parse_etcd,
)
from mooncake.core.metadata_etcd_wire import refusal_of
from mooncake.core.metadata_open import check_metadata, open_metadata

ANSWER_S = 0.2
Script = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class FakeServer:
    """Reads requests and lets `script` answer each; `paths` are the requests that came."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.paths: list[str] = []
        self.head = ""
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Endpoint:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return Endpoint("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while not writer.is_closing():
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    length = int(head.lower().partition("content-length:")[2].split()[0])
                    await reader.readexactly(length)
                    self.head = head
                    self.paths.append(head.split()[1])
                    await self.script(self.paths[-1], reader, writer)
                    await writer.drain()
        finally:
            writer.close()


def answer(value: object, status: str = "200 OK") -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def says(raw: bytes, then_close: bool = False) -> Script:
    async def script(_path: str, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        if then_close:
            writer.close()

    return script


async def hangs_up(_path: str, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def is_silent(_path: str, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client hangs up


@contextlib.asynccontextmanager
async def cluster(
    *scripts: Script, **settings: float
) -> AsyncIterator[tuple[EtcdMetadata, list[FakeServer]]]:
    servers = [FakeServer(script) for script in scripts]
    endpoints = tuple([await server.start() for server in servers])
    store = EtcdMetadata(EtcdOptions(endpoints=endpoints), **{"answer_s": ANSWER_S, **settings})
    try:
        yield store, servers
    finally:
        await store.close()
        for server in servers:
            await server.close()


LEASE = answer({"ID": "7", "TTL": "3"})
DONE = answer({"header": {"cluster_id": "18446744073709551615", "revision": "5"}, "succeeded": True})


# ---------------------------------------------------------------- several servers


@pytest.mark.parametrize("fault", [hangs_up, is_silent, says(answer({"code": 14}, "503 No"))])
async def test_a_write_that_may_have_arrived_is_never_sent_again(fault):
    """A second copy could undo what another process wrote in between."""
    async with cluster(fault, says(DONE)) as (store, servers):
        with pytest.raises(PeerError):
            await store.put("/a", b"1")
        with contextlib.suppress(PeerError):
            await store.delete("/a")
        assert [len(server.paths) for server in servers] == [1, 1]


@pytest.mark.parametrize("fault", [hangs_up, is_silent, says(answer({"code": 14}, "503 No"))])
async def test_a_question_goes_on_to_the_next_server_and_stays_there(fault):
    async with cluster(fault, says(LEASE)) as (store, servers):
        for _ in range(3):
            assert await store.grant(3) == 7
        assert [len(server.paths) for server in servers] == [1, 3]


async def test_all_servers_silent_costs_the_deadline_of_a_call_not_more():
    loop = asyncio.get_running_loop()
    async with cluster(is_silent, is_silent, is_silent, call_s=0.3) as (store, _):
        began_s = loop.time()
        with pytest.raises(PeerTimeout, match="does not answer"):
            await store.get("/")
        assert loop.time() - began_s < 2.0


async def test_connections_are_kept_and_replaced_when_the_server_hung_up():
    async with cluster(says(LEASE)) as (store, (server,)):
        for _ in range(3):
            await store.grant(3)
        assert server.connections == 1
        server.script = says(LEASE, then_close=True)
        await store.grant(3)
        await asyncio.sleep(0.05)
        server.script = says(LEASE)
        assert await store.grant(3) == 7
        assert server.connections == 2


async def test_calls_at_once_are_bounded():
    waiting = 0
    most = 0

    async def slow(_path: str, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.01)
        waiting -= 1
        writer.write(LEASE)

    async with cluster(slow, answer_s=5.0, call_s=20.0) as (store, _):
        assert await asyncio.gather(*(store.grant(3) for _ in range(64))) == [7] * 64
    assert 1 < most <= 16


# ---------------------------------------------------------------- user and password


class Guarded:
    """Answers who has the token that it gave last; `seen` are the tokens that came."""

    def __init__(self, token: str = "token.1", signs_in: bytes = b"") -> None:
        self.token = token
        self.signs_in = signs_in or answer({"token": token})
        self.seen: list[str] = []

    def __call__(self, head: str) -> bytes:
        if head.startswith("POST /v3/auth/authenticate"):
            return self.signs_in
        self.seen.append(head.partition("Authorization: ")[2].partition("\r\n")[0])
        if self.seen[-1] == self.token:
            return DONE
        code, text = (16, "invalid auth token") if self.seen[-1] else (3, "user name is empty")
        return answer({"code": code, "message": "etcdserver: " + text}, "401 No")


@contextlib.asynccontextmanager
async def guarded(guard: Guarded) -> AsyncIterator[tuple[EtcdMetadata, FakeServer]]:
    server = FakeServer(says(b""))

    async def script(_path: str, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(guard(server.head))

    server.script = script
    options = EtcdOptions(endpoints=(await server.start(),), user="me")
    store = EtcdMetadata(options, answer_s=5.0, call_s=20.0)  # ten calls on a busy machine
    try:
        yield store, server
    finally:
        await store.close()
        await server.close()


@pytest.fixture
def password(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(PASSWORD_ENV, "hunter2")
    return "hunter2"


async def test_a_token_is_fetched_when_etcd_asks_and_used_from_then_on(password):
    guard = Guarded()
    async with guarded(guard) as (store, server):
        for _ in range(3):
            await store.put("/a", b"1")
        assert guard.seen == ["", "token.1", "token.1", "token.1"]
        guard.token, guard.signs_in = "token.2", answer({"token": "token.2"})
        await store.put("/a", b"1")
        assert guard.seen[4:] == ["token.1", "token.2"]
        assert server.paths.count("/v3/auth/authenticate") == 2


async def test_calls_that_are_refused_at_once_sign_in_once(password):
    guard = Guarded()
    async with guarded(guard) as (store, server):
        await asyncio.gather(*(store.put(f"/{i}", b"") for i in range(10)))
        assert guard.seen.count("token.1") == 10
        assert server.paths.count("/v3/auth/authenticate") == 1


async def test_a_token_that_is_refused_again_is_not_fetched_for_ever(password):
    guard = Guarded(signs_in=answer({"token": "another"}))
    async with guarded(guard) as (store, _server):
        with pytest.raises(ConfigError):
            await store.put("/a", b"1")
        assert guard.seen == ["", "another"]


@pytest.mark.parametrize("token", ["", "a\r\nX-Injected: 1", "\u00e9", "x" * 10_000])
async def test_a_token_that_could_not_stand_in_a_header_is_refused(password, token):
    async with guarded(Guarded(signs_in=answer({"token": token}))) as (store, _server):
        with pytest.raises(ProtocolError, match="token"):
            await store.put("/a", b"1")


async def test_a_wrong_password_says_where_it_came_from_and_is_not_told(password):
    refusal = answer({"code": 3, "message": "etcdserver: authentication failed"}, "400 No")
    async with guarded(Guarded(signs_in=refusal)) as (store, _server):
        with pytest.raises(ConfigError, match=f"does not sign in user 'me'.*{PASSWORD_ENV}") as caught:
            await store.put("/a", b"1")
        assert password not in str(caught.value)
        assert password not in repr(store._options)


# ---------------------------------------------------------------- damage


DAMAGE = {
    "no http": b"SSH-2.0-OpenSSH\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n",
    "length no number": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    "chunk no number": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no json": answer(b"<html>"),
    "another json": answer([1, 2]),
    "wrong type": answer({"ID": "seven"}),
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000,
    "not utf-8": answer(b'{"ID":"\xff"}'),
}


@pytest.mark.parametrize("raw", DAMAGE.values(), ids=DAMAGE.keys())
async def test_a_damaged_answer_is_a_protocol_error(raw):
    async with cluster(says(raw, then_close=True), answer_s=2.0) as (store, _):
        with pytest.raises(ProtocolError):
            await store.grant(3)


async def test_an_answer_is_bounded(monkeypatch):
    monkeypatch.setattr(metadata_etcd_http, "BODY_BYTES_MAX", 1000)
    async with cluster(says(answer(b" " * 1001))) as (store, _):
        with pytest.raises(ProtocolError, match="more than"):
            await store.grant(3)


async def test_a_stream_that_ends_is_a_lost_server():
    created = b'{"result":{"created":true,"header":{}}}\n'
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        len(created),
        created,
    )

    async def script(path: str, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(raw if path == "/v3/watch" else answer({"header": {"revision": "9"}}))

    async with cluster(script) as (store, _):
        with pytest.raises(PeerGone, match="ended a stream"):
            await anext(store.watch("/", 0))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_chunked_answer_reads_the_same_however_it_is_cut(sizes):
    body, chunks, at = b'{"result":{"ID":"7","TTL":"3"}}\n', b"", 0
    for size in sizes:
        piece = body[at : at + size]
        at += size
        chunks += b"%x\r\n%s\r\n" % (len(piece), piece) if piece else b""
    rest = body[at:]
    chunks += b"%x\r\n%s\r\n" % (len(rest), rest) if rest else b""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nGrpc-Trailer: x\r\n\r\n"

    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(raw * 2)
        connection = metadata_etcd_http.HttpConnection(Endpoint("h", 1), reader, _Nowhere())
        for _ in range(2):  # the second proves that the first was read to its end
            assert await connection.post("/", b"") == 200
            assert await connection.read_body() == body

    asyncio.run(run())


class _Nowhere:
    """A writer that nobody reads."""

    def write(self, _data: bytes) -> None: ...

    async def drain(self) -> None: ...


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, b'{"code":5,"message":"etcdserver: requested lease not found"}', RequestError),
        (429, b'{"code":8,"message":"etcdserver: mvcc: database space exceeded"}', CapacityError),
        (503, b'{"code":14,"message":"etcdserver: no leader"}', PeerGone),
        (504, b'{"code":4,"message":"context deadline exceeded"}', PeerTimeout),
        (403, b'{"code":7,"message":"etcdserver: permission denied"}', ConfigError),
        (401, b"", ConfigError),
        (502, b"<html>a proxy</html>", PeerGone),
        (404, b"404 page not found", ProtocolError),
    ],
)
def test_every_refusal_says_whose_fault_it_is(status: int, body: bytes, kind: type[MooncakeError]):
    assert type(refusal_of(status, body)) is kind


# ---------------------------------------------------------------- addresses


def test_an_address_names_servers_namespace_and_files():
    found = parse_etcd(
        "etcds://etcd-0.etcd:2379,[::1]:99,10.0.0.1/team-a/x?ca=/c/ca.pem&cert=/c/c.pem&key=/c/k"
    )
    assert found == EtcdOptions(
        endpoints=(Endpoint("etcd-0.etcd", 2379), Endpoint("::1", 99), Endpoint("10.0.0.1", 2379)),
        namespace="/team-a/x",
        secure=True,
        ca="/c/ca.pem",
        cert="/c/c.pem",
        key="/c/k",
    )
    assert str(found.endpoints[1]) == "[::1]:99"
    assert parse_etcd("etcd://localhost").namespace == "/mooncake"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("etcd://", "no host:port"),
        ("etcd://a:0?insecure=true", "no host:port"),
        ("etcd://127.0.0.1:70000", "no host:port"),
        ("etcd://127.0.0.1:1,", "no host:port"),
        ("etcd://user:secret@127.0.0.1:1", "others can read a password"),
        ("etcd://a b@127.0.0.1:1", "a user is made of"),
        ("etcd://127.0.0.1?password_file=x", "means nothing here"),
        ("etcd://user@127.0.0.1?password=x", "means nothing here"),
        ("etcd://" + ",".join(["127.0.0.1"] * 10), "at most 9"),
        ("etcd://10.0.0.1:2379", "others can read"),
        ("etcd://127.0.0.1,10.0.0.1", "others can read"),
        ("etcd://10.0.0.1?insecure=yes", "insecure is true"),
        ("etcd://127.0.0.1?ca=x", "means nothing here"),
        ("etcds://h?insecure=true", "means nothing here"),
        ("etcds://h?cert=x", "belong together"),
        ("etcds://h?ca=", "means nothing here"),
        ("etcd://127.0.0.1/a b", "namespace"),
        ("etcd://127.0.0.1#x", "write etcd://"),
        ("http://127.0.0.1", "write etcd://"),
    ],
)
def test_a_wrong_address_is_refused_with_its_reason(text, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_etcd(text)


@pytest.mark.parametrize("secret", ["hunter2", "hunter2@x", "hunter2/y", "a?hunter2", "#hunter2"])
def test_a_password_in_an_address_is_refused_and_not_repeated(secret):
    with pytest.raises(ConfigError) as caught:
        parse_etcd(f"etcd://me:{secret}@127.0.0.1:1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "etcd://me@127.0.0.1?password=hunter2",
        "etcds://h?pass=hunter2",
        "etcds://h?ca=x&password=hunter2&cert=y",
        "etcds://h?password=hunter2#x",
    ],
)
def test_a_setting_that_means_nothing_may_be_a_password_and_is_not_repeated(text):
    with pytest.raises(ConfigError) as caught:
        parse_etcd(text)
    assert "hunter2" not in str(caught.value)


def test_an_address_names_a_user_and_where_the_password_is(tmp_path, monkeypatch):
    monkeypatch.delenv(PASSWORD_ENV, raising=False)
    file = tmp_path / "password"
    file.write_text("s e/cret\nnot this line\n")
    found = parse_etcd(f"etcd://me@127.0.0.1:1,127.0.0.1:2?password_file={file}")
    assert (found.user, found.password(), len(found.endpoints)) == ("me", "s e/cret", 2)
    check_metadata("etcd://127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"'me' has no password.*{PASSWORD_ENV}"):
        check_metadata("etcd://me@127.0.0.1:1")
    monkeypatch.setenv(PASSWORD_ENV, "from outside")
    assert parse_etcd(check_metadata("etcd://me@127.0.0.1:1")).password() == "from outside"
    with pytest.raises(ConfigError, match="password_file = '/nowhere'"):
        check_metadata("etcd://me@127.0.0.1:1?password_file=/nowhere")


@given(st.text(max_size=60))
def test_any_other_text_is_refused_and_nothing_worse(text):
    with contextlib.suppress(ConfigError):
        parse_etcd("etcd://" + text)


async def test_one_text_names_either_store(tmp_path):
    for text, kind in (("tcp://127.0.0.1:7700", RemoteMetadata), ("etcd://127.0.0.1:2379", EtcdMetadata)):
        store = open_metadata(check_metadata(text))
        assert type(store) is kind
        await store.close()
    assert not is_etcd("tcp://127.0.0.1:7700")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1"):
        open_metadata("tcp://10.0.0.1:7700")


def test_files_that_are_missing_or_no_certificates_are_named_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.pem"):
        check_metadata("etcds://h?ca=/nowhere.pem")
    (tmp_path / "x.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"cert = .*x\.pem"):
        check_metadata(f"etcds://h?cert={tmp_path}/x.pem&key={tmp_path}/x.pem")
