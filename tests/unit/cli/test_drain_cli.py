"""`mooncake drain`: what a pod runs before it is stopped."""

import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

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
        (("--url=http://127.0.0.1:1",), "does not answer"),
    ],
)
def test_an_address_that_cannot_be_is_one_line(words, said):
    code, text = run(*words)
    assert code not in (0, 1)
    assert said in text.replace("\n", " ")
    assert text.count("\n") == 1
