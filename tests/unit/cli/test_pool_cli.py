"""`mooncake pool` and `mooncake directory`: what is missing is said; any directory leads to the leader."""

import asyncio
import http.server
import os
import signal
import threading
import urllib.request

import msgspec
import pytest
from typer.testing import CliRunner

from kvstore.directory.messages import DIRECTORIES_PREFIX, DirectoryRecord
from kvstore.leader.coordinator import CoordinatorConfig
from mooncake import cli, pool_admin, pool_cli
from mooncake.core.errors import CapacityError, ConfigError, NotLeader, PeerGone, ProtocolError, RequestError
from mooncake.core.metadata_client import MetadataServer
from mooncake.core.options import DirectoryOptions
from mooncake.pool_admin import PoolAdmin

runner = CliRunner()
TOKEN = "token-of-the-test-suite"


class Directory:
    """A scripted admin HTTP: `answers[method path]` is (status, body), or a list of them, one per call."""

    def __init__(self):
        self.answers = {}
        self.asked = []
        self.tokens = set()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def _handler(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.command, self.path, body))
                outer.tokens.add(self.headers.get("Authorization", ""))
                status, answer = outer.answer(f"{self.command} {self.path}")
                data = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_DELETE = do_GET  # noqa: N815 - http.server's

            def log_message(self, *_):
                pass

        return Handler

    def answer(self, what):
        found = self.answers.get(what, (404, {"error": f"no {what}"}))
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def make():
    made = []

    def directory() -> Directory:
        made.append(Directory())
        return made[-1]

    yield directory
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool_cli, "REFRESH_S", 0.01)
    monkeypatch.setattr(pool_admin, "RETRY_S", 0.01)
    monkeypatch.delenv("MOONCAKE_ADMIN_TOKEN", raising=False)
    monkeypatch.delenv("MOONCAKE_ADMIN_TOKEN_FILE", raising=False)


def run(*args: str, code: int = 0) -> str:
    result = runner.invoke(cli.app, list(args))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def task(state: str, done: int = 0, **more):
    return {
        "task_id": 7, "kind": "drain", "state": state, "total": 10, "done": done, "failed": 0, "reason": "",
        "source": "a", "target": "", **more,
    }  # fmt: skip


def test_a_drain_is_shown_to_its_end(make):
    directory = make()
    directory.answers = {
        "POST /tasks/drain": (202, {"task_id": 7}),
        "GET /tasks/7": [(200, task("running", 3)), (200, task("done", 10))],
    }
    assert "task 7 done: 10 of 10 blocks" in run("pool", "drain", "a", "--url", directory.url)
    assert directory.asked[0] == ("POST", "/tasks/drain", b'{"node":"a"}')


def test_a_drain_that_fails_says_why_and_exits_with_1(make):
    directory = make()
    directory.answers = {
        "POST /tasks/drain": (202, {"task_id": 7}),
        "GET /tasks/7": (200, task("failed", 3, failed=7, reason="no node to drain to")),
    }
    output = run("pool", "drain", "a", "--url", directory.url, code=1)
    assert "failed: 3 of 10" in output
    assert "no node to drain to" in output


def test_progress_outlives_the_leader(make):
    directory = make()
    directory.answers = {
        "POST /tasks/copy": (202, {"task_id": 7}),
        "GET /tasks/7": [
            (200, task("running", 3)),
            (503, {"error": "busy"}),
            (404, {"error": "not yet"}),
            (200, task("done", 10)),
        ],
    }
    assert "done" in run("pool", "copy", "00" * 32, "--to", "b", "--url", directory.url)


def test_progress_of_a_task_that_nobody_knows_any_more_ends(make, monkeypatch):
    monkeypatch.setattr(pool_cli, "LOST_S_MAX", 0.0)
    directory = make()
    directory.answers = {"POST /tasks/drain": (202, {"task_id": 7})}
    assert "no GET /tasks/7" in run("pool", "drain", "a", "--url", directory.url, code=1)


def test_a_task_may_be_left_alone(make):
    directory = make()
    directory.answers = {"POST /tasks/move": (202, {"task_id": 7})}
    words = ("pool", "move", "00" * 32, "--from", "a", "--to", "b", "--no-wait", "--url", directory.url)
    assert "task 7" in run(*words)
    body = b'{"keys":["%s"],"source":"a","target":"b"}' % (b"00" * 32)
    assert directory.asked == [("POST", "/tasks/move", body)]


def test_status_shows_nodes_also_degraded_ones(make):
    directory = make()
    tier = {"tier": "memory", "capacity_bytes": 1 << 30, "used_bytes": 1 << 29, "blocks": 1234}
    unknown = {**tier, "used_bytes": None, "blocks": None}
    nodes = [
        {"node": "a", "mode": "exact", "lag_s": 0.0, "reason": "", "tiers": [tier]},
        {"node": "b", "mode": "degraded", "lag_s": 2.5, "reason": "[silent]", "tiers": [unknown]},
    ]
    health = {"healthy": False, "reasons": ["node b: silent"], "entries": 9, "leader": "d1", "leads": False}
    directory.answers = {"GET /health": (503, health), "GET /segments": (200, {"segments": nodes})}
    output = run("pool", "status", "--url", directory.url)
    for words in ("512 MiB (50%)", "1,234", "2.5 s", "[silent]", "d1 leads", "degraded: node b: silent"):
        assert words in output


def test_tasks_are_a_table(make):
    directory = make()
    directory.answers = {"GET /tasks": (200, {"tasks": [task("running", 3)]})}
    assert "3 of 10" in run("pool", "tasks", "--url", directory.url)


def test_a_drain_is_undone_and_a_task_ended(make):
    directory = make()
    directory.answers = {
        "POST /tasks/undrain": (200, {"done": True}),
        "DELETE /tasks/7": (200, {"done": True}),
    }
    run("pool", "undrain", "a", "--url", directory.url)
    run("pool", "cancel", "7", "--url", directory.url)
    assert [what[:2] for what in directory.asked] == [("POST", "/tasks/undrain"), ("DELETE", "/tasks/7")]


def test_the_token_comes_from_a_file_or_the_environment(make, monkeypatch, tmp_path):
    directory = make()
    directory.answers = {"GET /tasks": (200, {"tasks": []})}
    (tmp_path / "token").write_text(TOKEN + "\n")
    run("pool", "tasks", "--url", directory.url, "--token-file", str(tmp_path / "token"))
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN", TOKEN)
    run("pool", "tasks", "--url", directory.url)
    monkeypatch.delenv("MOONCAKE_ADMIN_TOKEN")
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN_FILE", str(tmp_path / "token"))
    run("pool", "tasks", "--url", directory.url)
    assert directory.tokens == {f"Bearer {TOKEN}"}


def test_an_empty_file_is_no_token_and_does_not_mean_that_none_is_needed(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("\n")
    path, asked = str(tmp_path / "token"), ("pool", "tasks", "--url", "http://127.0.0.1:1")
    assert f"token_file = '{path}': is empty" in run(*asked, "--token-file", path, code=2)
    served = ("directory", "--metadata", "tcp://127.0.0.1:1", "--admin-token-file", path)
    assert f"admin_token_file = '{path}': is empty" in run(*served, code=2)
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN_FILE", path)
    assert f"MOONCAKE_ADMIN_TOKEN_FILE = '{path}': is empty" in run(*asked, code=2)


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (("pool", "status"), "--url", 2),
        (("pool", "status", "--url", "ftp://x"), "http://127.0.0.1:7710", 2),
        (("pool", "status", "--url", "http://127.0.0.1:1"), "does not answer", 69),
        (("pool", "status", "--metadata", "nonsense"), "nonsense", 2),
        (("pool", "status", "--url", "http://127.0.0.1:1", "--token-file", "/no/file"), "/no/file", 2),
        (("directory", "--metadata", "nonsense"), "nonsense", 2),
        (("directory", "--metadata", "tcp://127.0.0.1:1", "--port", "70000"), "port", 2),
        (("directory", "--metadata", "tcp://127.0.0.1:1", "--address", "10.0.0.1"), "MOONCAKE_SECRET", 2),
        (("directory", "--metadata", "tcp://127.0.0.1:1", "--admin-host", "0.0.0.0"), "TOKEN", 2),
        (("directory", "--metadata", "tcp://127.0.0.1:1", "--name", "a/b"), "name", 2),
    ],
)
def test_what_cannot_work_is_said_with_what_to_do(words, told, code):
    assert told in run(*words, code=code)


async def test_a_metadata_store_without_a_directory_says_how_to_start_one():
    server = MetadataServer("tcp://127.0.0.1:*")
    server.start()
    record = DirectoryRecord("d", "e", "http://127.0.0.1:1", 1)
    try:
        with pytest.raises(PeerGone, match=f"mooncake directory --metadata {server.endpoint}"):
            await asyncio.to_thread(pool_admin.find_directories, server.endpoint)
        await server.store.put(DIRECTORIES_PREFIX + "d", msgspec.json.encode(record))
        assert await asyncio.to_thread(pool_admin.find_directories, server.endpoint) == [record.admin_url]
        await server.store.put(DIRECTORIES_PREFIX + "e", b"nonsense")
        with pytest.raises(ProtocolError):
            await asyncio.to_thread(pool_admin.find_directories, server.endpoint)
    finally:
        await server.close()


async def test_a_directory_shows_its_reloads_its_metadata_and_how_it_is_like_every_process():
    server = MetadataServer("tcp://127.0.0.1:*")
    server.start()
    options = DirectoryOptions(metadata=server.endpoint, name="d")
    serving = asyncio.create_task(pool_cli._serve(CoordinatorConfig(name="d"), options))
    try:
        async with asyncio.timeout(30):
            while not (found := (await server.store.get(DIRECTORIES_PREFIX)).entries):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        url = msgspec.json.decode(found[0].value, type=DirectoryRecord).admin_url
        page = (await asyncio.to_thread(urllib.request.urlopen, f"{url}/metrics")).read().decode()
        for line in (
            'mooncake_config_reloads_total{result="unchanged"} 1.0',
            'mooncake_process_open_fds{kind="directory"}',
            'mooncake_process_event_loop_lag_seconds_count{kind="directory"}',
            'mooncake_metadata_requests_total{op="grant",result="ok"}',
            "mooncake_directory_leader",
        ):
            assert line in page
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await serving == 0
    finally:
        serving.cancel()
        await server.close()


# ---------------------------------------------------------------- the client


def test_a_follower_leads_to_the_leader_even_if_only_it_was_known(make):
    follower, leader = make(), make()
    follower.answers = {"GET /tasks": (409, {"error": "ask d2", "leader": leader.url})}
    leader.answers = {"GET /tasks": (200, {"tasks": []})}
    admin = PoolAdmin([follower.url])
    assert admin.get("/tasks") == {"tasks": []}
    assert admin.url == leader.url


def test_a_dead_directory_is_passed_over(make):
    alive = make()
    alive.answers = {"GET /health": (200, {"healthy": True})}
    admin = PoolAdmin(["http://127.0.0.1:1", alive.url])
    assert admin.get("/health") == {"healthy": True}
    assert admin.url == alive.url


def test_an_election_is_waited_for_and_not_for_ever(make):
    directory = make()
    nobody = (409, {"error": "no leader is known yet", "leader": ""})
    directory.answers = {"GET /tasks": [nobody, nobody, (200, {"tasks": []})]}
    assert PoolAdmin([directory.url]).get("/tasks") == {"tasks": []}
    directory.answers = {"GET /tasks": nobody}
    with pytest.raises(NotLeader, match="no leader is known"):
        PoolAdmin([directory.url], elected_s=0.05).get("/tasks")


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (400, {"error": "bad limit"}, RequestError, "bad limit"),
        (404, {"error": "no node"}, RequestError, "no node"),
        (401, {"error": "token"}, RequestError, "MOONCAKE_ADMIN_TOKEN"),
        (403, {"error": "only loopback"}, RequestError, "only loopback"),
        (503, {"error": "busy"}, CapacityError, "busy"),
        (500, {"error": "a bug"}, PeerGone, "a bug"),
        (302, {}, RequestError, "302"),
        (200, b"<html>", ProtocolError, "no admin address"),
        (200, b"[]", ProtocolError, "no admin address"),
    ],
)
def test_every_answer_has_its_error(make, status, body, error, words):
    directory = make()
    directory.answers = {"GET /x": (status, body)}
    with pytest.raises(error, match=words):
        PoolAdmin([directory.url], elected_s=0.0).get("/x")


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ConfigError):
        PoolAdmin(["file:///etc/passwd"])
