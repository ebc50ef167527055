"""The admin server: what each path says, to whom, and that it never stops what it serves."""

import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from mooncake.core import admin
from mooncake.core.admin import AdminServer, Answer, Asked, Drains, json_answer, metrics_url
from mooncake.core.health import ALIVE_S, Health

TOKEN = "a-token-of-sixteen"
SHOWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    return registry


@pytest.fixture
def serve(registry: CollectorRegistry) -> Iterator[Callable[..., AdminServer]]:
    servers: list[AdminServer] = []

    def make(**settings: object) -> AdminServer:
        servers.append(AdminServer(registry, 0, **settings))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def ask(
    server: AdminServer,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10.0)
    try:
        connection.request(method, path, body or None, headers or {})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


# ---------------------------------------------------------------- health


def test_the_three_probes_say_a_word_and_a_reason(serve):
    health = Health()
    server = serve(health=health)
    assert ask(server, "/livez")[::2] == (200, b"alive\n")
    assert ask(server, "/startupz")[::2] == (503, b"starting\n")
    health.started()
    health.unready("no engine is known")
    assert ask(server, "/startupz")[::2] == (200, b"started\n")
    assert ask(server, "/readyz")[::2] == (503, b"not ready: no engine is known\n")
    health.ready()
    assert ask(server, "/readyz")[::2] == (200, b"ready\n")
    health.draining("SIGTERM")
    assert ask(server, "/readyz")[::2] == (503, b"draining: SIGTERM\n")
    health.beat("the loop", time.monotonic() - ALIVE_S - 5)
    assert ask(server, "/livez")[0] == 503


def test_probes_need_no_token_and_all_else_does(serve):
    server = serve(token=TOKEN, drains=Drains(lambda why: None, lambda: 0, lambda: True))
    assert {ask(server, path)[0] for path in ("/livez",)} == {200}
    for path in ("/metrics", "/drain", "/nowhere"):
        status, headers, _ = ask(server, path)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert ask(server, path, headers={"Authorization": "Bearer wrong"})[0] == 401
    assert ask(server, "/metrics", headers=SHOWN)[0] == 200
    assert ask(server, "/drain", "POST", headers=SHOWN)[0] == 202
    status, _, text = ask(server, "/nowhere", headers=SHOWN)
    assert status == 404
    assert b"/readyz" in text, "it says what there is"


def test_without_a_token_only_loopback_names_are_answered(serve):
    server = serve()
    assert ask(server, "/metrics", headers={"Host": "evil.example:80"})[0] == 403
    assert ask(server, "/metrics", headers={"Host": "localhost:80"})[0] == 200
    assert ask(server, "/livez", headers={"Host": "10.1.2.3:80"})[0] == 200, "a kubelet names the pod"


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null"])
def test_without_a_token_no_web_page_can_change_anything(serve, origin):
    begun: list[str] = []
    server = serve(drains=Drains(begun.append, lambda: 0, lambda: True))
    server.route("/config/reload", lambda asked: json_answer(200, begun.append("reload")), methods=("POST",))
    as_form = {"Origin": origin, "Content-Type": "text/plain"}
    for path in ("/drain", "/config/reload"):
        status, _, text = ask(server, path, "POST", as_form)
        assert status == 403
        assert b"no web page" in text
    assert begun == []
    assert ask(server, "/drain", "POST", {"Origin": server.url})[0] == 202, "but a page of its own"


def test_who_shows_the_token_may_be_a_web_page(serve):
    server = serve(token=TOKEN, drains=Drains(lambda why: None, lambda: 0, lambda: True))
    assert ask(server, "/drain", "POST", {"Origin": "http://console.example", **SHOWN})[0] == 202


def test_without_a_token_others_can_reach_health_alone(registry):
    server = AdminServer(registry, 0, host="0.0.0.0")
    server.start()
    try:
        assert ask(server, "/livez")[0] == 200
        assert ask(server, "/metrics")[0] == 404
    finally:
        server.close()


# ---------------------------------------------------------------- metrics, drain, routes


def test_metrics_are_served_and_large_ones_are_compressed_for_who_can_read_that(serve, registry):
    server = serve()
    status, headers, body = ask(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert b"things_total 3.0" in body
    Counter("vllm:things", "Of vLLM.", registry=registry).inc()
    as_prometheus = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    status, headers, body = ask(server, "/metrics", headers=as_prometheus)
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\nvllm:things_total 1.0\n" in body
    many = Counter("many", "Many.", ["which"], registry=registry)
    for which in range(200):
        many.labels(str(which)).inc()
    status, headers, body = ask(server, "/metrics", headers={"Accept-Encoding": "gzip"})
    assert headers["content-encoding"] == "gzip"
    assert b'many_total{which="7"} 1.0' in gzip.decompress(body)


def test_a_drain_is_begun_by_post_alone_and_tells_what_is_left(serve):
    health, begun, left = Health(), [], [2]

    def begin(why: str) -> None:
        begun.append(why)
        health.draining(why)

    health.started()
    health.ready()
    server = serve(health=health, drains=Drains(begin, lambda: left[0], lambda: not left[0]))
    assert json.loads(ask(server, "/drain")[2]) == {"state": "ready", "in_flight": 2}
    assert begun == []
    status, _, body = ask(server, "/drain", "POST")
    assert (status, json.loads(body)) == (202, {"state": "draining", "in_flight": 2})
    left[0] = 0
    assert json.loads(ask(server, "/drain")[2]) == {"state": "drained", "in_flight": 0}


def test_who_cannot_be_told_to_drain_has_no_such_path(serve):
    assert ask(serve(), "/drain")[0] == 404


def test_routes_get_the_request_and_say_what_they_want(serve):
    server, seen = serve(), []

    def page(asked: Asked) -> Answer:
        seen.append(asked)
        return Answer(200, b"page", "text/html", {"Content-Security-Policy": "default-src 'self'"})

    server.route("/config/reload", lambda asked: json_answer(200, asked.body.decode()), methods=("POST",))
    server.route("/dashboard/", page)
    server.route("/dashboard/api/", lambda asked: json_answer(200, dict(asked.query)))
    assert ask(server, "/config/reload", "POST", body=b"x: 1")[2] == b'"x: 1"\n'
    status, headers, _ = ask(server, "/config/reload")
    assert (status, headers["allow"]) == (405, "POST")
    status, headers, body = ask(server, "/dashboard/a%20b.js?v=1", headers={"X-Mine": "yes"})
    assert (status, body, headers["content-security-policy"]) == (200, b"page", "default-src 'self'")
    assert (seen[0].path, seen[0].query, seen[0].headers["x-mine"]) == (
        "/dashboard/a b.js",
        {"v": "1"},
        "yes",
    )
    assert ask(server, "/dashboard/api/query?q=a%2Bb")[2] == b'{"q":"a+b"}\n', "the longest one answers"
    assert ask(server, "/dashboardx")[0] == 404


def test_a_route_that_fails_is_one_answer_and_the_server_lives(serve):
    server = serve()
    server.route("/broken", lambda asked: json_answer(200, {}["nothing"]))
    assert ask(server, "/broken")[0] == 500
    assert ask(server, "/livez")[0] == 200


def test_bodies_are_bounded(serve):
    server = serve()
    server.route("/take", lambda asked: json_answer(200, len(asked.body)), methods=("POST",))
    assert ask(server, "/take", "POST", {"Content-Length": str(admin.BODY_BYTES_MAX + 1)})[0] == 413


def test_connections_are_bounded_and_come_free_again(serve, monkeypatch):
    monkeypatch.setattr(admin, "CONNECTIONS_MAX", 2)
    server, held, entered = serve(), threading.Event(), threading.Semaphore(0)

    def slow(asked: Asked) -> Answer:
        entered.release()
        return json_answer(200, held.wait(10.0))

    server.route("/slow", slow)
    threads = [threading.Thread(target=ask, args=(server, "/slow")) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert entered.acquire(timeout=10.0)

    def refused() -> bool:
        try:
            ask(server, "/livez")
        except (OSError, http.client.HTTPException):
            return True
        return False

    assert refused()
    held.set()
    for thread in threads:
        thread.join()
    until(lambda: not refused())


# ---------------------------------------------------------------- life


def test_no_port_is_no_address_and_all_addresses_are_told_as_one():
    assert metrics_url(0) == ""
    assert metrics_url(9001) == "http://127.0.0.1:9001/metrics"
    assert metrics_url(9001, "0.0.0.0", "10.0.0.7") == "http://10.0.0.7:9001/metrics"
    assert metrics_url(9001, "fd00::1") == "http://[fd00::1]:9001/metrics"


def test_binding_asks_no_resolver(serve, monkeypatch):
    def look_up(*args: object) -> str:
        raise AssertionError(f"asked for the name of {args}")

    for name in ("getfqdn", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(socket, name, look_up)
    server = serve()
    assert ask(server, "/livez")[0] == 200


def test_a_taken_port_is_waited_for(registry, monkeypatch):
    monkeypatch.setattr(admin, "BIND_RETRY_S", 0.02)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = AdminServer(registry, other.getsockname()[1])
        server.start()
        assert not server.bound
    until(lambda: server.bound)
    assert b"things_total 3.0" in ask(server, "/metrics")[2]
    server.close()
    assert not server.bound


def test_close_ends_the_waiting_for_a_port(registry):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = AdminServer(registry, other.getsockname()[1])
        server.start()
        server.close()
        assert not server.bound


CHILD = """
import time
from prometheus_client import CollectorRegistry
from mooncake.core.admin import AdminServer
server = AdminServer(CollectorRegistry(), 0)
server.start()
print(server.port, flush=True)
time.sleep(60)
"""


def test_the_port_of_a_killed_process_can_be_bound_again_at_once(registry):
    argv = [sys.executable, "-c", CHILD]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        port = int(child.stdout.readline())
        server = AdminServer(registry, port)
        # connections that the kernel still remembers: one open, one closed by the server
        with socket.create_connection(("127.0.0.1", port)):
            ask(server, "/livez")
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            server.start()
            assert server.bound
    assert b"things_total 3.0" in ask(server, "/metrics")[2]
    server.close()
