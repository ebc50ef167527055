import asyncio
import ctypes
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import mooncake.engine as module
from mooncake.dropin.engine import rpc as engine_rpc
from mooncake.dropin.engine.rpc import ReceivedData, ReceivedTensor, RpcInterface

SECRET = "sixteen bytes or more"
TARGET_HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("MOONCAKE_SECRET", "MOONCAKE_SECRET_FILE"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def target() -> str:
    with socket.socket() as probe:
        probe.bind((TARGET_HOST, 0))
        return f"{TARGET_HOST}:{probe.getsockname()[1]}"


@pytest.fixture
def server(target: str) -> Iterator[RpcInterface]:
    server = RpcInterface()
    assert server.initialize_server(target, 2, 5)
    assert server.start_server_async()
    yield server
    server.stop_server()


@pytest.fixture
def client() -> RpcInterface:
    client = RpcInterface()
    assert client.initialize_client(10, 5)
    return client


class Tensor:
    """As much of torch's as send_tensor looks at; importing torch would cost more than all these tests."""

    def __init__(self, data: bytes, shape: list[int], dtype: str) -> None:
        self._memory = ctypes.create_string_buffer(data, len(data)) if data else None
        self.nbytes, self.shape, self.dtype = len(data), shape, dtype

    def data_ptr(self) -> int:
        return ctypes.addressof(self._memory) if self._memory else 0

    def detach(self) -> "Tensor":
        return self

    cpu = contiguous = detach


@pytest.mark.parametrize("data", [b"hello", b"", bytes(9 << 20)])
def test_bytes_arrive_in_the_callback_as_measured_on_upstream(
    server: RpcInterface, client: RpcInterface, target: str, data: bytes
) -> None:
    got: list[ReceivedData] = []
    server.set_data_receive_callback(got.append)
    assert client.send_data(target, data) == 0
    (message,) = got
    assert isinstance(message, dict)
    assert message["data"] == data
    assert message.get_bytes() == data == bytes(message.get_memory_view())
    assert message.data_size == len(data)
    assert message.source_address.startswith("127.0.0.1:")


@pytest.mark.parametrize("bad", ["text", bytearray(b"x"), None])
def test_what_is_no_bytes_is_a_type_error_as_measured_on_upstream(
    client: RpcInterface, target: str, bad: Any
) -> None:
    with pytest.raises(TypeError, match="bytes"):
        client.send_data(target, bad)


def test_nobody_there_is_minus_1_as_measured_on_upstream(client: RpcInterface, target: str) -> None:
    assert client.send_data(target, b"x") == -1
    assert client.send_data("nonsense", b"x") == -1


def test_before_initialize_it_answers_as_measured_on_upstream(target: str) -> None:
    interface = RpcInterface()
    assert interface.send_data(target, b"x") == -1
    assert not interface.start_server()
    assert not interface.start_server_async()
    interface.stop_server()


def test_a_server_starts_once_as_measured_on_upstream(server: RpcInterface) -> None:
    assert not server.start_server_async()


def test_a_port_in_use_shows_at_the_start_as_measured_on_upstream(server: RpcInterface, target: str) -> None:
    other = RpcInterface()
    assert other.initialize_server(target)
    assert not other.start_server_async()


def test_a_callback_that_raises_is_logged_and_the_sender_has_its_0_as_measured_on_upstream(
    server: RpcInterface, client: RpcInterface, target: str
) -> None:
    def broken(message: ReceivedData) -> None:
        raise ValueError(message)

    server.set_data_receive_callback(broken)
    assert client.send_data(target, b"x") == 0
    got: list[ReceivedData] = []
    server.set_data_receive_callback(got.append)
    assert client.send_data(target, b"y") == 0
    assert [message["data"] for message in got] == [b"y"]


def test_without_a_callback_the_sender_learns_that_nobody_listens(
    server: RpcInterface, client: RpcInterface, target: str
) -> None:
    assert client.send_data(target, b"x") == -1


def test_a_stopped_server_takes_nothing_where_upstream_still_answers_0(
    server: RpcInterface, client: RpcInterface, target: str
) -> None:
    server.set_data_receive_callback(lambda message: None)
    assert client.send_data(target, b"x") == 0
    server.stop_server()
    assert client.send_data(target, b"x") == -1
    assert server.start_server_async()
    assert client.send_data(target, b"x") == 0


def test_a_tensor_arrives_with_type_and_shape_where_upstream_loses_both(
    server: RpcInterface, client: RpcInterface, target: str
) -> None:
    got: list[ReceivedTensor] = []
    server.set_tensor_receive_callback(got.append)
    assert (
        client.send_tensor(target, Tensor(b"\0\1\2\3\4\5\6\7\x08\x09\x0a\x0b", [2, 3], "torch.bfloat16")) == 0
    )
    assert client.send_tensor(target, Tensor(b"", [0], "torch.float32")) == 0
    first, second = got
    assert (first.dtype, first.shape, first.total_bytes, first.get_data_size()) == (
        "bfloat16",
        [2, 3],
        12,
        12,
    )
    assert first.get_data_as_bytes() == bytes(first.get_memory_view()) == bytes(range(12))
    assert (second.dtype, second.shape, second.total_bytes) == ("float32", [0], 0)


def test_what_is_no_tensor_is_minus_1_as_measured_on_upstream(client: RpcInterface, target: str) -> None:
    assert client.send_tensor(target, [1, 2]) == -1


async def test_the_async_calls_work_where_upstream_s_abort(
    server: RpcInterface, client: RpcInterface, target: str
) -> None:
    got: list[Any] = []
    server.set_data_receive_callback(got.append)
    server.set_tensor_receive_callback(got.append)
    loop = asyncio.get_running_loop()
    assert await client.send_data_async(target, b"x", loop) == 0
    assert await client.send_tensor_async(target, Tensor(b"abcd", [4], "torch.uint8"), loop) == 0
    assert [type(each) for each in got] == [ReceivedData, ReceivedTensor]


def test_senders_at_once_are_all_served(server: RpcInterface, client: RpcInterface, target: str) -> None:
    got: list[bytes] = []
    server.set_data_receive_callback(lambda message: got.append(message["data"]))
    codes: list[int] = []
    senders = [
        threading.Thread(target=lambda n=n: codes.append(client.send_data(target, bytes([n]) * 1000)))
        for n in range(20)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(10.0)
    assert codes == [0] * 20
    assert sorted(got) == [bytes([n]) * 1000 for n in range(20)]


def test_a_message_that_is_too_long_is_refused_before_it_is_sent(
    server: RpcInterface, client: RpcInterface, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.set_data_receive_callback(lambda message: None)
    monkeypatch.setattr(engine_rpc, "POST_BYTES_MAX", 10)
    assert client.send_data(target, bytes(10)) == 0
    assert client.send_data(target, bytes(11)) == -1


def test_a_client_without_the_secret_is_not_let_in(
    client: RpcInterface, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_SECRET", SECRET)
    server, friend = RpcInterface(), RpcInterface()
    got: list[ReceivedData] = []
    assert server.initialize(target)
    server.set_data_receive_callback(got.append)
    assert server.start_server_async()
    assert friend.initialize()
    assert client.send_data(target, b"stranger") == -1
    assert friend.send_data(target, b"friend") == 0
    assert [message["data"] for message in got] == [b"friend"]
    server.stop_server()


def test_without_a_secret_a_server_listens_on_loopback_only(client: RpcInterface, target: str) -> None:
    port = target.rpartition(":")[2]
    server = RpcInterface()
    assert server.initialize_server(f"0.0.0.0:{port}")
    assert server.start_server_async()
    with socket.socket() as other:  # free for somebody else: not bound there
        other.bind(("127.0.0.2", int(port)))
    server.stop_server()


def test_start_server_returns_when_it_is_stopped(target: str) -> None:
    server = RpcInterface()
    server.initialize_server(target)
    answers: list[bool] = []
    started = threading.Event()
    server.set_data_receive_callback(lambda message: started.set())
    thread = threading.Thread(target=lambda: answers.append(server.start_server()), daemon=True)
    thread.start()
    client = module.create_rpc_client()
    while client.send_data(target, b"x") != 0:
        assert thread.is_alive()
    assert started.is_set()
    assert answers == []
    server.stop_server()
    thread.join(5.0)
    assert answers == [True]


def test_the_module_has_upstream_s_names_of_it() -> None:
    assert module.CoroRPCInterface is module.RpcInterface is RpcInterface
    assert isinstance(module.create_rpc_server(0, 1), RpcInterface)
    assert isinstance(module.create_rpc_client(local_rank=0, world_size=1), RpcInterface)
