"""The admin HTTP on real sockets: whom it answers, what it refuses, and that nothing makes it fall over."""

import asyncio
import http.client
import urllib.parse

import msgspec
import pytest

from kvstore.leader import admin_http
from kvstore.leader.admin_api import Answer
from kvstore.leader.admin_http import AdminServer, check_admin
from mooncake.core.errors import ConfigError

TOKEN = "token-of-the-test-suite"


class Api:
    def __init__(self):
        self.asked = []
        self.stuck = asyncio.Event()

    async def answer(self, method, path, query, body):
        self.asked.append((method, path, dict(query), body))
        if path == "/stuck":
            await self.stuck.wait()
        if path == "/bug":
            raise ZeroDivisionError("a bug")
        if path == "/metrics":
            return Answer(200, text=b"up 1\n")
        return Answer(200, {"fine": True})


@pytest.fixture
def api():
    return Api()


@pytest.fixture
async def serve(api):
    servers = []

    def served(**settings):
        servers.append(AdminServer(api.answer, **settings))
        return Client(servers[-1].start())

    yield served
    for server in servers:
        await asyncio.to_thread(server.close)


class Client:
    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self.address = parts.hostname, parts.port

    def _ask(self, method, path, body, headers):
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, reply.read(), dict(reply.getheaders())
        finally:
            connection.close()

    async def ask(self, method, path, body=None, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await asyncio.to_thread(self._ask, method, path, body, named)


JSON = {"Content_Type": "application/json; charset=utf-8"}


async def test_a_request_arrives_whole_and_its_answer_goes_back(serve, api):
    client = serve()
    status, body, headers = await client.ask("POST", "/tasks/a%20b?x=1&y=", b'{"a":1}', **JSON)
    assert api.asked == [("POST", "/tasks/a b", {"x": "1", "y": ""}, b'{"a":1}')]
    assert (status, msgspec.json.decode(body)) == (200, {"fine": True})
    assert headers["Content-Type"] == "application/json"
    status, body, headers = await client.ask("GET", "/metrics")
    assert (body, headers["Content-Type"].split(";")[0]) == (b"up 1\n", "text/plain")


async def test_with_a_token_nobody_is_answered_without_it(serve, api):
    client = serve(token=TOKEN)
    for wrong in [
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "ÿ"},
    ]:
        status, body, headers = await client.ask("GET", "/health", **wrong)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert TOKEN.encode() not in body
    assert api.asked == []
    status, _, _ = await client.ask("GET", "/health", Authorization=f"Bearer {TOKEN}")
    assert status == 200


async def test_without_a_token_no_web_page_can_ask(serve, api):
    client = serve()
    assert (await client.ask("GET", "/health", Host="evil.example"))[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert (await client.ask("POST", "/tasks/drain", b"{}", Content_Type=kind))[0] == 415
    assert api.asked == []
    assert (await client.ask("GET", "/health", Host="localhost:1"))[0] == 200


async def test_bodies_are_bounded_and_have_a_length(serve, api, monkeypatch):
    monkeypatch.setattr(admin_http._Handler, "body_bytes_max", 10)
    client = serve()
    assert (await client.ask("POST", "/tasks/drain", b"x" * 11, **JSON))[0] == 413
    assert (await client.ask("POST", "/tasks/drain", None, Content_Length="9" * 30, **JSON))[0] == 413
    assert (await client.ask("POST", "/x", None, Transfer_Encoding="chunked", **JSON))[0] == 411
    assert (await client.ask("POST", "/x", None, Content_Length="-1", **JSON))[0] == 411
    assert api.asked == []


async def test_a_bug_is_500_and_the_next_request_is_answered(serve):
    client = serve()
    status, body, _ = await client.ask("GET", "/bug")
    assert (status, b"ZeroDivisionError" in body) == (500, True)
    assert (await client.ask("GET", "/health"))[0] == 200


async def test_a_loop_that_does_not_answer_is_503(serve, monkeypatch):
    monkeypatch.setattr(admin_http, "ANSWER_S", 0.05)
    status, body, _ = await serve().ask("GET", "/stuck")
    assert (status, b"busy" in body) == (503, True)


async def test_connections_are_bounded(serve, api, monkeypatch):
    monkeypatch.setattr(admin_http, "CONNECTIONS_MAX", 1)
    client = serve()
    waiting = asyncio.create_task(client.ask("GET", "/stuck"))
    async with asyncio.timeout(30.0):
        while not api.asked:  # noqa: ASYNC110 - a look from outside
            await asyncio.sleep(0.01)
    with pytest.raises((http.client.HTTPException, OSError)):
        await client.ask("GET", "/health")
    waiting.cancel()


async def test_other_methods_are_the_apis_to_judge(serve, api):
    await serve().ask("PUT", "/health", b"")
    assert api.asked[0][0] == "PUT"


async def test_close_ends_it_and_may_come_twice(api):
    server = AdminServer(api.answer)
    client = Client(server.start())
    await asyncio.to_thread(server.close)
    await asyncio.to_thread(server.close)
    with pytest.raises(OSError):  # noqa: PT011 - refused or reset
        await client.ask("GET", "/health")


@pytest.mark.parametrize(
    ("host", "port", "token", "words"),
    [
        ("0.0.0.0", 0, "", "MOONCAKE_ADMIN_TOKEN"),
        ("::", 0, "", "--admin-token-file"),
        ("127.0.0.1", 0, "short", "at least 16"),
        ("127.0.0.1", 0, "with a\nnewline in it", "printable"),
        ("127.0.0.1", 70_000, "", "admin_port"),
    ],
)
def test_what_would_trust_a_network_is_refused(host, port, token, words):
    with pytest.raises(ConfigError, match=words) as refused:
        check_admin(host, port, token)
    assert not token or token not in str(refused.value)


def test_the_loopback_needs_no_token():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_admin(host, 0, "")
    check_admin("0.0.0.0", 0, TOKEN)
