"""`mooncake_client`: its flags, how it refuses, and what its ports say."""

import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncake.core.errors import ConfigError, PeerError, ProtocolError
from mooncake.core.messages import Ok
from mooncake.dropin.client import command
from mooncake.dropin.client.command import ClientOptions, RealClient, main
from mooncake.dropin.client.line import Answer, Ask, Hello, Line, Move, Share, Welcome
from mooncake.dropin.client.relay import new_session
from mooncake.dropin.flags import asks_for_help, parse_flags

from .conftest import PATIENCE_S, MasterThread

FOREVER = 1e9


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this process's logs and signals as they are."""
    monkeypatch.setattr(command.logs, "setup", lambda *_: None)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def real(master: MasterThread) -> Iterator[RealClient]:
    options = ClientOptions(port=0, global_segment_size="8MB", master_server_address=master.address)
    real = RealClient(options)
    real.start()
    yield real
    real.close()


def invitation(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as one, one.makefile() as lines:
        return json.loads(lines.readline())["socket"]


# ---------------------------------------------------------------- flags


def test_flags_are_read_as_gflags_reads_them() -> None:
    words = ["--port=50060", "-host", "10.0.0.1", "--global_segment_size=1 GB", "--device-names=mlx5_0"]
    options, unknown = parse_flags(words, ClientOptions)
    assert (options.port, options.host, options.device_names) == (50060, "10.0.0.1", "mlx5_0")
    assert options.settings.global_segment_size == 1 << 30
    assert unknown == []


def test_without_flags_the_settings_are_upstreams_and_on_loopback() -> None:
    options, _ = parse_flags([], ClientOptions)
    assert (options.port, options.host, options.settings.global_segment_size) == (50052, "127.0.0.1", 4 << 30)
    assert options.settings.master == "tcp://127.0.0.1:50051"


def test_every_address_of_the_machine_is_none_that_others_could_call() -> None:
    assert ClientOptions(host="0.0.0.0").settings.local_hostname == "127.0.0.1"


def test_unknown_flags_are_named_without_their_values() -> None:
    words = ["--threads=4", "--secret", "hidden", "--noenable_it", "--port=1"]
    options, unknown = parse_flags(words, ClientOptions)
    assert unknown == ["--threads", "--secret", "--noenable_it"]
    assert options.port == 1


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=20), max_size=6))
def test_any_words_are_options_or_a_config_error(words: list[str]) -> None:
    try:
        options, unknown = parse_flags(words, ClientOptions)
    except ConfigError:
        return
    assert isinstance(options, ClientOptions)
    assert len(unknown) <= len(words)


@pytest.mark.parametrize("word", ["--port=x", "--port=70000", "--port", "--global_segment_size=much"])
def test_a_flag_that_cannot_work_ends_the_command_with_its_name(
    word: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([word]) == 2
    assert word.lstrip("-").partition("=")[0] in capsys.readouterr().err


def test_help_lists_the_flags(capsys: pytest.CaptureFixture) -> None:
    assert asks_for_help(["--help"])
    assert not asks_for_help(["help"])
    assert main(["--help"]) == 0
    assert "--port=50052" in capsys.readouterr().out


# ---------------------------------------------------------------- starting


def test_without_a_master_it_ends_and_says_what_to_start(capsys: pytest.CaptureFixture) -> None:
    assert main(["--master_server_address=127.0.0.1:1", "--port=0", "--global_segment_size=8MB"]) == 1
    assert "start mooncake_master" in capsys.readouterr().err


def test_a_port_in_use_ends_it_and_leaves_no_segment_behind(master: MasterThread, real: RealClient) -> None:
    second = RealClient(
        ClientOptions(port=real.port, global_segment_size="8MB", master_server_address=master.address)
    )
    with pytest.raises(ConfigError, match=str(real.port)):
        second.start()
    assert second.started is None


# ---------------------------------------------------------------- ports


def test_the_port_says_where_processes_of_this_user_connect(real: RealClient) -> None:
    line = Line.open(invitation(real.port), FOREVER)
    line.send(Hello("s1", follow=True), FOREVER)
    welcome, _ = line.receive(Answer, FOREVER)
    assert isinstance(welcome, Welcome)
    assert welcome.tenant == "default"
    line.close()


def test_a_session_that_nobody_follows_gets_no_answer_but_an_error(real: RealClient) -> None:
    line = Line.open(invitation(real.port), FOREVER)
    assert line.call(Hello("nobody", follow=False), Ok, FOREVER) == Ok()
    with pytest.raises(PeerError):
        line.call(Ask("127.0.0.1:1", "store", b"", 1.0), Ok, FOREVER)
    line.close()


@pytest.fixture
def caller(real: RealClient) -> Iterator[Line]:
    """A connection of a session that is followed."""
    session = new_session()
    follower = Line.open(invitation(real.port), FOREVER)
    follower.send(Hello(session, follow=True), FOREVER)
    follower.receive(Answer, FOREVER)
    line = Line.open(invitation(real.port), FOREVER)
    line.call(Hello(session, follow=False), Ok, FOREVER)
    yield line
    line.close()
    follower.close()


@pytest.mark.parametrize(
    "request_",
    [
        Share(1 << 20, 4096),  # without a descriptor
        Move(0, "127.0.0.1:1", [1 << 20], [0], [10], 1.0),  # memory that is not shared
        Move(0, "127.0.0.1:1", [1], [], [10], 1.0),
        Move(7, "127.0.0.1:1", [], [], [], 1.0),
        Hello("s2", follow=False),  # no call
    ],
)
def test_a_request_that_makes_no_sense_is_an_error_and_the_connection_goes_on(caller: Line, request_) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="mooncake_client: ") as raised:
            caller.call(request_, Ok, FOREVER)
        assert raised.type.__module__ == "mooncake.core.errors"


def test_a_peer_that_is_away_is_the_callers_error(caller: Line) -> None:
    with pytest.raises(PeerError):
        caller.call(Ask("127.0.0.1:1", "store", b"", 1.0), Ok, FOREVER)


def test_bytes_that_are_no_message_end_the_connection(real: RealClient) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(PATIENCE_S)
        one.connect(invitation(real.port))
        one.sendall(b"\xff\xff\xff\xff nonsense")
        assert one.recv(100) == b""


def test_a_line_takes_no_answer_of_another_kind(real: RealClient) -> None:
    line = Line.open(invitation(real.port), FOREVER)
    with pytest.raises(ProtocolError):
        line.call(Hello("s3", follow=False), Welcome, FOREVER)
    line.close()
