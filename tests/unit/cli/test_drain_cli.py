"""`mooncake drain`: what a pod runs before it is stopped."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from mooncake import drain_cli
from mooncake.cli import app
from mooncake.core.admin import AdminServer, Drains
from mooncake.core.config import ADMIN_TOKEN_ENV, ADMIN_TOKEN_FILE_ENV
from mooncake.core.health import Health

TOKEN = "a-token-of-sixteen"


class Draining:
    """A process with one request, which ends when `go` is set, or when it was asked after so often."""

    def __init__(self, looks: int = 1000, token: str = "") -> None:
        self.begun: list[str] = []
        self.looks = looks
        drains = Drains(self.begun.append, self.in_flight, lambda: self.looks <= 0)
        self.server = AdminServer(CollectorRegistry(), 0, token=token, health=Health(), drains=drains)
        self.server.start()

    def in_flight(self) -> int:
        self.looks -= 1
        return 1


BREAKS, SILENT, FAILS = b"", b"silent", b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nno\n"


def told(state: str) -> bytes:
    body = f'{{"state": "{state}", "in_flight": 2}}'
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


class Scripted:
    """An admin server that answers as it is told, once each; at the end it listens no more."""

    def __init__(self, *answers: bytes) -> None:
        self.asked: list[str] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.held: list[socket.socket] = []
        self.thread = threading.Thread(target=self.run, args=(answers,), daemon=True)
        self.thread.start()

    def run(self, answers: tuple[bytes, ...]) -> None:
        with self.socket, contextlib.suppress(OSError):  # the test is over
            for answer in answers:
                connection, _ = self.socket.accept()
                self.held.append(connection)
                self.asked.append(connection.recv(4096).split()[0].decode())
                if answer is not SILENT:
                    connection.sendall(answer)
                    connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has ended by itself
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(10.0)
        for connection in self.held:
            connection.close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    processes: list[Scripted] = []

    def make(*answers: bytes) -> Scripted:
        processes.append(Scripted(*answers))
        return processes[-1]

    yield make
    for one in processes:
        one.close()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOONCAKE_ADMIN_PORT", ADMIN_TOKEN_ENV, ADMIN_TOKEN_FILE_ENV):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def made() -> Iterator[list[Draining]]:
    processes: list[Draining] = []
    yield processes
    for one in processes:
        one.server.close()


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["drain", *words])
    return result.exit_code, result.output


def test_it_asks_the_process_to_drain_and_waits_until_it_is_drained(made):
    made.append(Draining(looks=4))
    assert run(f"--url={made[0].server.url}") == (0, "")
    assert made[0].begun == ["asked for"]
    assert made[0].looks <= 0


def test_what_is_left_after_the_wait_is_told(made):
    made.append(Draining())
    code, text = run(f"--url={made[0].server.url}", "--wait-s=0.3")
    assert code == 1
    assert "1 in flight after 0.3 s" in text


def test_without_a_wait_it_only_asks(made):
    made.append(Draining())
    assert run(f"--url={made[0].server.url}", "--wait-s=0") == (0, "")
    assert made[0].begun == ["asked for"]


def test_the_process_of_this_host_is_found_by_the_environment(made, monkeypatch):
    made.append(Draining(looks=1))
    monkeypatch.setenv("MOONCAKE_ADMIN_PORT", str(made[0].server.port))
    assert run() == (0, "")


def test_a_process_that_ends_meanwhile_has_drained(made):
    made.append(Draining())
    threading.Timer(0.5, made[0].server.close).start()
    assert run(f"--url={made[0].server.url}", "--wait-s=30") == (0, "")


@pytest.mark.parametrize("answer", [BREAKS, SILENT, FAILS], ids=["breaks", "silent", "fails"])
def test_an_answer_that_does_not_come_once_does_not_mean_that_it_has_drained(answer, scripted, monkeypatch):
    monkeypatch.setattr(drain_cli, "ANSWER_S", 0.3)
    process = scripted(told("draining"), answer, told("draining"), told("drained"))
    assert run(f"--url={process.url}") == (0, "")
    assert process.asked == ["POST", "GET", "GET", "GET"], "to the end"


@pytest.mark.parametrize("answer", [BREAKS, SILENT], ids=["breaks", "silent"])
def test_a_process_that_is_too_busy_to_hear_it_is_asked_again(answer, scripted, monkeypatch):
    monkeypatch.setattr(drain_cli, "ANSWER_S", 0.3)
    process = scripted(answer, told("draining"), told("drained"))
    assert run(f"--url={process.url}") == (0, "")
    assert process.asked == ["POST", "POST", "GET"]


@pytest.mark.parametrize(
    ("answer", "said"), [(BREAKS, "does not answer"), (FAILS, "500 no")], ids=["breaks", "fails"]
)
def test_what_does_not_answer_in_the_end_is_not_called_drained(answer, said, scripted):
    process = scripted(told("draining"), *[answer] * 50)
    code, text = run(f"--url={process.url}", "--wait-s=1")
    assert code != 0
    assert said in text.replace("\n", " ")


def test_the_token_comes_from_the_environment_or_its_file(made, monkeypatch, tmp_path):
    made.append(Draining(looks=1, token=TOKEN))
    url = f"--url={made[0].server.url}"
    code, text = run(url)
    assert code != 0
    assert "401" in text
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv(ADMIN_TOKEN_FILE_ENV, str(tmp_path / "token"))
    assert run(url) == (0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--url http://127.0.0.1:ADMIN_PORT"),
        (("--url=ftp://x",), "write http://HOST:PORT"),
        (("--url=http://127.0.0.1:admin",), "write http://HOST:PORT"),
        (("--url=http://127.0.0.1:99999",), "write http://HOST:PORT"),
        (("--url=http://[::1",), "write http://HOST:PORT"),
        (("--url=http://127.0.0.1:1",), "does not answer"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(words, said):
    code, text = run(*words)
    assert code not in (0, 1)
    assert said in text.replace("\n", " ")
    assert text.count("\n") == 1
