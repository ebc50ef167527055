import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from mooncake import http_metadata_server
from mooncake.core.errors import ConfigError
from mooncake.http_metadata_server import VALUE_BYTES_MAX, KVBootstrapServer, KVPoll, main

JSON_TEXT = "application/json; charset=utf-8"


@pytest.fixture
def server() -> Iterator[KVBootstrapServer]:
    server = KVBootstrapServer(0)
    server.run()
    yield server
    server.close()


def ask(
    server: KVBootstrapServer, method: str, target: str = "/metadata?key=a", body: bytes | None = None
) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5.0)
    try:
        connection.request(method, target, body)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


# every expectation below was measured on upstream's server, 0.3.13.post1


def test_a_missing_key_is_404_as_measured_on_upstream(server: KVBootstrapServer) -> None:
    assert ask(server, "GET") == (404, JSON_TEXT, b"metadata not found")


def test_no_key_is_400_as_measured_on_upstream(server: KVBootstrapServer) -> None:
    for target in ("/metadata", "/metadata?key=", "/metadata?key=%20"):
        assert ask(server, "GET", target) == (400, JSON_TEXT, b"metadata key is required")


def test_put_get_and_delete_answer_as_measured_on_upstream(server: KVBootstrapServer) -> None:
    assert ask(server, "PUT", body=b"hello") == (200, JSON_TEXT, b"metadata updated")
    assert ask(server, "GET") == (200, "application/json", b"hello")
    assert ask(server, "PUT", body=b"") == (200, JSON_TEXT, b"metadata updated")
    assert ask(server, "GET") == (200, "application/json", b"")
    assert ask(server, "DELETE") == (200, JSON_TEXT, b"metadata deleted")
    assert ask(server, "DELETE") == (404, JSON_TEXT, b"metadata not found")


def test_an_rpc_meta_key_is_written_once_as_measured_on_upstream(server: KVBootstrapServer) -> None:
    target = "/metadata?key=mooncake/rpc_meta/node"
    assert ask(server, "PUT", target, b"1")[0] == 200
    assert ask(server, "PUT", target, b"2") == (400, JSON_TEXT, b"Duplicate rpc_meta key not allowed")
    assert ask(server, "GET", target)[2] == b"1"


@pytest.mark.parametrize("method", ["POST", "HEAD", "PATCH", "OPTIONS"])
def test_other_methods_are_405_as_measured_on_upstream(server: KVBootstrapServer, method: str) -> None:
    assert ask(server, method)[:2] == (405, JSON_TEXT)


def test_other_paths_are_404_as_measured_on_upstream(server: KVBootstrapServer) -> None:
    assert ask(server, "GET", "/nope") == (404, "text/plain; charset=utf-8", b"404: Not Found")


def test_a_value_over_1_mib_is_413_as_measured_on_upstream(server: KVBootstrapServer) -> None:
    assert ask(server, "PUT", body=bytes(VALUE_BYTES_MAX))[0] == 200
    head = f"PUT /metadata?key=b HTTP/1.1\r\nHost: x\r\nContent-Length: {VALUE_BYTES_MAX + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 5.0) as raw:
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


# what follows is ours


def test_it_is_not_reachable_from_other_hosts_without_a_secret() -> None:
    with pytest.raises(ConfigError, match="MOONCAKE_SECRET"):
        KVBootstrapServer(0, "0.0.0.0")


def test_who_does_not_prove_the_secret_learns_and_changes_nothing() -> None:
    server = KVBootstrapServer(0, secret=b"sixteen bytes or more")
    server.run()
    try:
        for method in ("GET", "PUT", "DELETE"):
            assert ask(server, method, body=b"x")[0] == 401
    finally:
        server.close()


def test_keys_are_bounded(server: KVBootstrapServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_metadata_server, "KEYS_MAX", 1)
    assert ask(server, "PUT", body=b"1")[0] == 200
    assert ask(server, "PUT", "/metadata?key=b", b"1")[0] == 507
    assert ask(server, "PUT", body=b"2")[0] == 200
    assert ask(server, "DELETE")[0] == 200
    assert ask(server, "PUT", "/metadata?key=b", b"1")[0] == 200


def test_bytes_are_bounded_and_a_replaced_value_frees_its_own(
    server: KVBootstrapServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_metadata_server, "TOTAL_BYTES_MAX", 10)
    assert ask(server, "PUT", body=b"x" * 9)[0] == 200
    assert ask(server, "PUT", body=b"y" * 9)[0] == 200
    assert ask(server, "PUT", body=b"x" * 10)[0] == 507
    assert ask(server, "GET")[2] == b"y" * 9


def test_a_long_key_is_refused(server: KVBootstrapServer) -> None:
    assert ask(server, "PUT", "/metadata?key=" + "k" * 1025, b"x")[0] == 400


@pytest.mark.parametrize("head", ["Content-Length: -1", "Content-Length: x", "Transfer-Encoding: chunked"])
def test_a_body_of_unknown_length_is_411(server: KVBootstrapServer, head: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5.0) as raw:
        raw.sendall(f"PUT /metadata?key=a HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 411 ")


def test_a_cut_off_body_changes_nothing(server: KVBootstrapServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5.0) as raw:
        raw.sendall(b"PUT /metadata?key=a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(100) == b""
    assert ask(server, "GET")[0] == 404


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_metadata_server, "CONNECTIONS_MAX", 1)
    server = KVBootstrapServer(0)
    server.run()
    try:
        with socket.create_connection(("127.0.0.1", server.port), 5.0) as first:
            first.sendall(b"GET /metadata?key=a HTTP/1.1\r\nHost: x\r\n\r\n")
            assert first.recv(100).startswith(b"HTTP/1.1 404 ")
            with socket.create_connection(("127.0.0.1", server.port), 5.0) as second:
                assert second.recv(100) == b""
    finally:
        server.close()


def test_poll_tells_whether_it_serves(server: KVBootstrapServer) -> None:
    assert KVBootstrapServer(0).poll() is KVPoll.Failed
    assert server.poll() is KVPoll.Success
    server.close()
    assert server.poll() is KVPoll.Failed


def test_a_port_in_use_is_an_error_that_names_it(server: KVBootstrapServer) -> None:
    with pytest.raises(ConfigError, match=str(server.port)):
        KVBootstrapServer(server.port).run()


def test_the_command_refuses_a_network_it_would_have_to_trust(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_metadata_server.signal, "signal", lambda *_: None)
    monkeypatch.setattr(http_metadata_server.logs, "setup", lambda *_: None)
    monkeypatch.delenv("MOONCAKE_SECRET", raising=False)
    assert main(["--host", "0.0.0.0", "--port", "0"]) == 2


def test_the_command_serves_until_it_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {}
    monkeypatch.setattr(http_metadata_server.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(http_metadata_server.logs, "setup", lambda *_: None)
    codes: list[int] = []
    started = threading.Event()
    run = KVBootstrapServer.run

    def noticed(self: KVBootstrapServer) -> threading.Thread:
        thread = run(self)
        started.set()
        return thread

    monkeypatch.setattr(KVBootstrapServer, "run", noticed)
    command = threading.Thread(target=lambda: codes.append(main(["--port", "0"])), daemon=True)
    command.start()
    assert started.wait(5.0)
    handlers[http_metadata_server.signal.SIGTERM](None, None)
    command.join(5.0)
    assert codes == [0]
