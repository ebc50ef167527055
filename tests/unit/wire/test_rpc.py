"""A call ends: with the answer, with the server's error, or at its deadline. Real loopback sockets."""

import asyncio
import contextlib
import threading
import time

import msgspec
import pytest
import zmq

from mooncake.core import rpc, wire
from mooncake.core.errors import (
    WIRE_ERRORS,
    CapacityError,
    ConfigError,
    MooncakeError,
    PeerGone,
    PeerTimeout,
    ProtocolError,
)
from mooncake.core.messages import Failure, Ok
from mooncake.core.rpc import BlockingRpcClient, RpcClient, RpcServer, check_endpoint

LOCAL = "tcp://127.0.0.1:0"
PATIENT_S = 5.0


class Say(msgspec.Struct, frozen=True, array_like=True, tag="say"):
    """Answered by Said after `wait_s`; `fail` names an error of the tree, or "bug"."""

    text: str
    wait_s: float = 0.0
    fail: str = ""


class Said(msgspec.Struct, frozen=True, array_like=True, tag="said"):
    text: str


REPLY = Said | Ok | Failure


async def answer(request: Say) -> object:
    if request.wait_s:
        await asyncio.sleep(request.wait_s)
    if request.fail == "bug":
        raise ZeroDivisionError("a bug")
    if request.fail == "unencodable":
        return object()
    if request.fail:
        raise WIRE_ERRORS[request.fail](request.text)
    return Said(request.text)


@contextlib.asynccontextmanager
async def serving(endpoint=LOCAL, handler=answer):
    server = RpcServer(endpoint, Say, handler)
    server.start()
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def calling(endpoint):
    client = RpcClient(endpoint, REPLY)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
def silent():
    """A peer that takes messages and never answers; yields (endpoint, socket)."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield f"tcp://127.0.0.1:{port}", socket


@pytest.fixture
def server_thread():
    """A server on its own loop and thread, for clients that block; yields its endpoint."""
    ready, stop, endpoint = threading.Event(), threading.Event(), []

    async def main() -> None:
        async with serving() as server:
            endpoint.append(server.endpoint)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(PATIENT_S)
    yield endpoint[0]
    stop.set()
    thread.join(PATIENT_S)


@contextlib.contextmanager
def blocking(endpoint):
    client = BlockingRpcClient(endpoint, REPLY)
    try:
        yield client
    finally:
        client.close()


# ---------------------------------------------------------------- where a server may listen


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "ipc:///tmp/x", "tcp://localhost:1"]
)
def test_loopback_and_ipc_may_be_bound(endpoint):
    assert check_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:0",
        "tcp://*:0",
        "tcp://[::]:0",
        "tcp://[::1]:0",
        "tcp://:0",
        "tcp://10.0.0.1:0",
        "tcp://node-7.example.org:0",
        "tcp://127.0.0.1.example.org:0",
        "tcp://eth0:0",
        "tcp://127.0.0.1",
        "udp://127.0.0.1:0",
        "inproc://x",
        "127.0.0.1:0",
        "",
    ],
)
def test_everything_else_is_refused_before_a_socket_listens(endpoint):
    with pytest.raises(ConfigError, match="endpoint"):
        RpcServer(endpoint, Say, answer)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://localhost:*"])
async def test_a_server_knows_its_port_at_once_and_answers_there(endpoint):
    async with serving(endpoint) as server, calling(server.endpoint) as client:
        assert int(server.endpoint.rsplit(":", 1)[1]) > 0
        assert await client.call(Say("hi"), PATIENT_S) == Said("hi")


async def test_ipc_works_too(tmp_path):
    async with serving(f"ipc://{tmp_path}/s") as server, calling(server.endpoint) as client:
        assert await client.call(Say("hi"), PATIENT_S) == Said("hi")
    assert not (tmp_path / "s").exists(), "the file goes with the server"


# ---------------------------------------------------------------- deadlines


async def test_a_silent_peer_costs_its_deadline_and_no_more(silent):
    async with calling(silent[0]) as client:
        started_s = time.monotonic()
        with pytest.raises(PeerTimeout, match=r"Say within 0\.1 s"):
            await client.call(Say("hi"), 0.1)
        assert 0.09 < time.monotonic() - started_s < 1.0


async def test_a_missing_server_is_a_timeout_not_an_error_of_its_own():
    async with calling("tcp://127.0.0.1:1") as client:
        with pytest.raises(PeerTimeout):
            await client.call(Say("hi"), 0.05)


async def test_a_late_reply_is_dropped_and_never_answers_another_call():
    async with serving() as server, calling(server.endpoint) as client:
        with pytest.raises(PeerTimeout):
            await client.call(Say("late", wait_s=0.15), 0.05)
        await asyncio.sleep(0.2)
        assert await client.call(Say("now"), PATIENT_S) == Said("now")


async def test_a_slow_call_does_not_hold_up_a_quick_one():
    async with serving() as server, calling(server.endpoint) as client:
        slow = asyncio.create_task(client.call(Say("slow", wait_s=0.3), PATIENT_S))
        assert await client.call(Say("quick"), 0.25) == Said("quick")
        assert await slow == Said("slow")


async def test_a_cancelled_call_leaves_nothing_behind(silent):
    async with calling(silent[0]) as client:
        call = asyncio.create_task(client.call(Say("hi"), PATIENT_S))
        await asyncio.sleep(0.02)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not client._waiting


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("code", sorted(WIRE_ERRORS))
async def test_an_error_of_the_handler_is_raised_as_its_own_class_at_the_caller(code):
    async with serving() as server, calling(server.endpoint) as client:
        with pytest.raises(MooncakeError, match=r"tcp://127.*full stop") as caught:
            await client.call(Say("full stop", fail=code), PATIENT_S)
        assert type(caught.value) is WIRE_ERRORS[code]


@pytest.mark.parametrize(("fail", "text"), [("bug", "ZeroDivisionError"), ("unencodable", "TypeError")])
async def test_a_bug_in_the_handler_is_an_internal_error_at_once_and_the_server_lives(fail, text):
    async with serving() as server, calling(server.endpoint) as client:
        with pytest.raises(MooncakeError, match=text) as caught:
            await client.call(Say("", fail=fail), PATIENT_S)
        assert type(caught.value) is MooncakeError
        assert await client.call(Say("alive"), PATIENT_S) == Said("alive")


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"garbage", b"\x91" * 50_000, wire.encode(["no such tag"])],
    ids=lambda payload: repr(payload)[:20],
)
async def test_a_payload_that_is_no_request_is_answered_with_a_protocol_error(payload):
    async with serving() as server, calling(server.endpoint) as client:
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.connect(server.endpoint)
            raw.send_multipart([b"8 bytes.", payload])
            call_id, reply = await asyncio.to_thread(receive, raw)
        assert call_id == b"8 bytes."
        assert wire.decode(reply, REPLY).code == "protocol"
        assert await client.call(Say("alive"), PATIENT_S) == Said("alive")


def receive(socket: zmq.Socket) -> list[bytes]:
    assert socket.poll(PATIENT_S * 1000), "no answer"
    return socket.recv_multipart()


@pytest.mark.parametrize(
    "frames", [[b""], [b"short", b""], [b"8 bytes."], [b"8 bytes.", b"", b"more"], [b""] * 20]
)
async def test_frames_that_are_no_call_are_ignored(frames):
    async with serving() as server, calling(server.endpoint) as client:
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 0
            raw.connect(server.endpoint)
            raw.send_multipart(frames)
            assert await client.call(Say("alive"), PATIENT_S) == Said("alive")
            assert not raw.poll(20)


async def test_a_message_over_the_limit_does_not_harm_the_server_or_its_other_callers():
    async with serving() as server, calling(server.endpoint) as big, calling(server.endpoint) as client:
        with pytest.raises(PeerTimeout):
            await big.call(Say("x" * (wire.MESSAGE_BYTES_MAX + 1)), 0.3)
        assert await client.call(Say("alive"), PATIENT_S) == Said("alive")


async def test_a_reply_that_is_not_ours_is_a_protocol_error(silent):
    endpoint, socket = silent
    async with calling(endpoint) as client:
        call = asyncio.create_task(client.call(Say("hi"), PATIENT_S))
        identity, call_id, _ = await asyncio.to_thread(receive, socket)
        socket.send_multipart([identity, call_id, b"\xc1"])
        with pytest.raises(ProtocolError):
            await call


async def test_replies_with_strange_frames_or_ids_are_ignored_by_the_caller(silent):
    endpoint, socket = silent
    async with calling(endpoint) as client:
        call = asyncio.create_task(client.call(Say("hi"), PATIENT_S))
        identity, call_id, _ = await asyncio.to_thread(receive, socket)
        for frames in ([b"x"], [call_id], [call_id, b"", b""], [b"another!", wire.encode(Ok())]):
            socket.send_multipart([identity, *frames])
        socket.send_multipart([identity, call_id, wire.encode(Said("hi"))])
        socket.send_multipart([identity, call_id, wire.encode(Said("twice"))])
        assert await call == Said("hi")


# ---------------------------------------------------------------- limits and restarts


async def test_a_server_refuses_more_calls_than_it_may_work_on(monkeypatch):
    monkeypatch.setattr(rpc, "IN_FLIGHT_MAX", 3)
    async with serving() as server, calling(server.endpoint) as one, calling(server.endpoint) as two:
        held = [asyncio.create_task(one.call(Say("held", wait_s=0.3), PATIENT_S)) for _ in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(CapacityError, match="3 calls in progress"):
            await two.call(Say("more"), PATIENT_S)
        assert await asyncio.gather(*held) == [Said("held")] * 3
        assert await two.call(Say("later"), PATIENT_S) == Said("later")


async def test_a_client_refuses_more_calls_than_it_may_have_in_flight(monkeypatch, silent):
    monkeypatch.setattr(rpc, "IN_FLIGHT_MAX", 2)
    async with calling(silent[0]) as client:
        held = [asyncio.create_task(client.call(Say("held"), 0.2)) for _ in range(2)]
        await asyncio.sleep(0.02)
        with pytest.raises(CapacityError, match="2 calls in flight"):
            await client.call(Say("more"), PATIENT_S)
        assert all(isinstance(e, PeerTimeout) for e in await asyncio.gather(*held, return_exceptions=True))
        with pytest.raises(PeerTimeout):  # room again
            await client.call(Say("more"), 0.05)


async def test_a_restarted_server_serves_the_same_client():
    async with serving() as server:
        endpoint = server.endpoint
        client = RpcClient(endpoint, REPLY)
        assert await client.call(Say("one"), PATIENT_S) == Said("one")
    with pytest.raises(PeerTimeout):
        await client.call(Say("nobody"), 0.1)
    async with serving(endpoint):
        assert await client.call(Say("two"), PATIENT_S) == Said("two")
    await client.close()


async def test_closing_a_server_cancels_what_it_works_on():
    cancelled = asyncio.Event()

    async def forever(_request):
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    async with serving(handler=forever) as server, calling(server.endpoint) as client:
        call = asyncio.create_task(client.call(Say(""), 0.3))
        await asyncio.sleep(0.1)
        await server.close()
        assert cancelled.is_set()
        with pytest.raises(PeerTimeout):
            await call


# ---------------------------------------------------------------- the blocking client


def test_a_blocking_call_returns_the_answer(server_thread):
    with blocking(server_thread) as client:
        assert client.call(Say("hi"), PATIENT_S) == Said("hi")
        with pytest.raises(CapacityError, match="no room"):
            client.call(Say("no room", fail="capacity"), PATIENT_S)


def test_a_blocking_call_to_a_silent_peer_ends_at_its_deadline(silent):
    with blocking(silent[0]) as client:
        started_s = time.monotonic()
        with pytest.raises(PeerTimeout):
            client.call(Say("hi"), 0.1)
        assert 0.09 < time.monotonic() - started_s < 1.0
        assert not client._replies


def test_begin_overlaps_the_round_trip_and_poll_never_waits(server_thread):
    with blocking(server_thread) as client:
        call = client.begin(Say("slow", wait_s=1.0))
        started_s = time.monotonic()
        assert not client.poll(call)
        assert time.monotonic() - started_s < 0.9
        while not client.poll(call):
            assert time.monotonic() - started_s < PATIENT_S
            time.sleep(0.005)
        assert client.finish(call, 0.0) == Said("slow")
        assert not client.poll(call)


def test_answers_are_told_apart_whatever_their_order(server_thread):
    with blocking(server_thread) as client:
        slow, quick = client.begin(Say("slow", wait_s=0.1)), client.begin(Say("quick"))
        assert client.finish(slow, PATIENT_S) == Said("slow")
        assert client.finish(quick, 0.0) == Said("quick")


def test_a_forgotten_answer_is_dropped(server_thread):
    with blocking(server_thread) as client:
        call = client.begin(Say("forgotten", wait_s=0.05))
        client.forget(call)
        time.sleep(0.1)
        assert client.call(Say("next"), PATIENT_S) == Said("next")
        assert not client.poll(call)
        assert not client._replies


def test_a_blocking_client_has_bounded_calls_in_flight(monkeypatch, silent):
    monkeypatch.setattr(rpc, "IN_FLIGHT_MAX", 2)
    with blocking(silent[0]) as client:
        calls = [client.begin(Say("held")) for _ in range(2)]
        with pytest.raises(CapacityError, match="2 calls in flight"):
            client.begin(Say("more"))
        client.forget(calls[0])
        client.begin(Say("more"))


def test_threads_share_a_blocking_client_and_each_gets_its_own_answers(server_thread):
    with blocking(server_thread) as client:
        wrong: list[object] = []

        def work(name: int) -> None:
            for n in range(25):
                text = f"{name}/{n}"
                try:
                    if (got := client.call(Say(text, wait_s=0.001 * (n % 3)), PATIENT_S)) != Said(text):
                        wrong.append(got)
                except MooncakeError as error:
                    wrong.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENT_S)
        assert not wrong
        assert not client._replies


def test_a_thread_that_waits_for_its_answer_does_not_hold_up_the_others(silent):
    """The loader thread may wait on a stuck store; the engine's step must not wait with it."""
    endpoint, socket = silent
    with blocking(endpoint) as client:
        call = client.begin(Say("never"))

        def wait() -> None:
            with contextlib.suppress(ProtocolError):
                client.finish(call, PATIENT_S)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.05)
        for _ in range(10):
            mine = client.begin(Say("quick"))
            client.poll(mine)
            client.forget(mine)
        assert waiter.is_alive()  # had they waited for it, it would have given up by now; its answer comes
        identity, call_id, _ = receive(socket)
        socket.send_multipart([identity, call_id, b"\xc1"])  # no message at all
        waiter.join(PATIENT_S)
        assert not waiter.is_alive()


def test_a_peer_that_does_not_speak_our_protocol_is_a_protocol_error(silent):
    endpoint, socket = silent
    with blocking(endpoint) as client:
        call = client.begin(Say("hi"))
        identity, call_id, _ = receive(socket)
        socket.send_multipart([identity, call_id, b"\x91" * 50_000])
        with pytest.raises(ProtocolError):
            client.finish(call, PATIENT_S)
        call = client.begin(Say("hi"))
        receive(socket)
        socket.send_multipart([identity, b"one frame"])
        with pytest.raises(ProtocolError):
            client.finish(call, PATIENT_S)
        assert not client._replies


def test_a_blocking_client_survives_a_restart_of_its_server():
    async def serve_one(client, endpoint):
        async with serving(endpoint) as server:
            if client is None:
                client = BlockingRpcClient(server.endpoint, REPLY)
            assert await asyncio.to_thread(client.call, Say("hi"), PATIENT_S) == Said("hi")
            return client, server.endpoint

    client, endpoint = asyncio.run(serve_one(None, LOCAL))
    with pytest.raises(PeerTimeout):
        client.call(Say("nobody"), 0.05)
    asyncio.run(serve_one(client, endpoint))
    client.close()


def test_a_client_that_another_thread_closes_is_gone_for_those_who_use_it(server_thread):
    with blocking(server_thread) as client:
        call = client.begin(Say("slow", wait_s=60.0))
        ended: list[Exception] = []

        def wait() -> None:
            try:
                client.finish(call, 60.0)
            except PeerGone as gone:
                ended.append(gone)

        waiter = threading.Thread(target=wait)
        waiter.start()
        client.close()
        waiter.join(PATIENT_S)
        assert len(ended) == 1
        assert not client.poll(call)
        with pytest.raises(PeerGone):
            client.begin(Say("hi"))
