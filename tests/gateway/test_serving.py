"""How a gateway begins and stops to serve HTTP: ports that are shared, and nothing dropped on the way out."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from conductor import vllm_seam
from mooncake.core.errors import ConfigError
from mooncake.core.shared_port import Held, check_port, join


class App:
    """Answers with its name; `/slow` waits for `go`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = SimpleNamespace()
        self.go = asyncio.Event()
        self.asked = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        self.asked.set()
        if scope["path"] == "/slow":
            await self.go.wait()
        length = str(len(self.name)).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.name.encode()})


class Served:
    def __init__(self, name: str, port: int, share: bool) -> None:
        self.app = App(name)
        self.stop = asyncio.Event()
        self.drained: list[float] = []
        self.up = asyncio.Event()
        args = vllm_seam.parse_args([f"--port={port}", "--host=127.0.0.1", "--disable-uvicorn-access-log"])
        self.task = asyncio.create_task(
            vllm_seam.serve(self.app, self.app, args, self.stop, self._drain, share, self.up.set)
        )

    async def _drain(self, limit_s: float) -> None:
        self.drained.append(limit_s)


@contextlib.asynccontextmanager
async def serving(port: int, *names: str, share: bool = True) -> AsyncIterator[list[Served]]:
    served = [Served(name, port, share) for name in names]
    try:
        async with asyncio.timeout(20):
            for one in served:
                await one.up.wait()
        yield served
    finally:
        for one in served:
            one.stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*(one.task for one in served))


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ask(url: str, times: int) -> list[str]:
    """Ask over a new connection each time."""
    answers = []
    async with httpx.AsyncClient(timeout=10, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        for _ in range(times):
            answers.append((await client.get(url)).text)
    return answers


async def test_connections_to_a_shared_port_are_dealt_out_and_one_can_leave_under_load(port) -> None:
    url = f"http://127.0.0.1:{port}/"
    with Held("127.0.0.1", port):
        async with serving(port, "a", "b") as (first, second):
            assert set(await ask(url, 60)) == {"a", "b"}
            load = asyncio.create_task(ask(url, 300))
            await asyncio.sleep(0)
            first.stop.set()
            answers = await load  # an error of any would be raised here
            assert len(answers) == 300
            await first.task
            assert set(await ask(url, 20)) == {"b"}
            assert not second.task.done()


async def test_connections_that_the_kernel_made_before_the_end_are_served(port) -> None:
    async with serving(port, "a", share=False) as (one,):
        one.stop.set()
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]  # the loop sees none yet
        for connection in waiting:
            connection.setblocking(False)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            for connection in waiting:
                answer = b""
                while data := await loop.sock_recv(connection, 4096):  # until it is closed
                    answer += data
                assert answer.startswith(b"HTTP/1.1 200")
                assert b"connection: close" in answer
                connection.close()


async def test_an_idle_connection_can_be_used_once_more_and_is_told_to_close(port) -> None:
    async with serving(port, "a", share=False) as (one,), httpx.AsyncClient(timeout=10) as client:
        url = f"http://127.0.0.1:{port}/"
        assert "connection" not in (await client.get(url)).headers
        slow = asyncio.create_task(client.get(f"{url}slow"))  # keeps the server up
        await client.get(url)
        one.stop.set()
        await asyncio.sleep(0.1)
        assert (await client.get(url)).headers["connection"] == "close"
        one.app.go.set()
        assert (await slow).text == "a"


async def test_a_request_in_flight_is_finished_before_what_has_no_connection_is_drained(port) -> None:
    async with serving(port, "a", share=False) as (one,), httpx.AsyncClient(timeout=10) as client:
        url = f"http://127.0.0.1:{port}/slow"
        slow = asyncio.create_task(client.get(url))
        await one.app.asked.wait()
        one.stop.set()
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient() as late:
            with pytest.raises(httpx.ConnectError):
                await late.get(url)
        assert not one.drained
        one.app.go.set()
        assert (await slow).text == "a"
        await one.task
        assert one.drained[0] <= vllm_seam.CLOSE_S


# ---------------------------------------------------------------- whose port it is


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_held_port_is_taken_for_all_but_those_who_share_it(port, host) -> None:
    with Held(host, port):
        with pytest.raises(ConfigError, match=f"port = {port}.*--port"):
            Held(host, port)
        with pytest.raises(ConfigError, match="use --port"):
            check_port(host, port)
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for one in [*join(host, port), *join(host, port)]:
            one.listen()
            one.close()
    check_port(host, port)


def test_who_holds_a_port_gets_no_connections(port) -> None:
    with Held("127.0.0.1", port), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)


def test_a_port_that_is_shared_already_cannot_be_held_by_a_second_cluster(port) -> None:
    shared = join("127.0.0.1", port)
    shared[0].listen()
    with pytest.raises(ConfigError, match="use --port"):
        Held("127.0.0.1", port)
    shared[0].close()


def test_a_port_that_somebody_has_alone_cannot_be_joined(port) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ConfigError, match="use --port"):
            join("127.0.0.1", port)


def test_closed_connections_of_the_last_run_are_no_obstacle(port) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        server.bind(("127.0.0.1", port))
        server.listen()
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # closed here first: TIME_WAIT stays on this port
        client.close()
    Held("127.0.0.1", port).close()


@pytest.mark.skipif(os.getuid() == 0, reason="root may bind any port")
def test_a_privileged_port_is_told() -> None:
    with pytest.raises(ConfigError, match="port = 1:"):
        Held("127.0.0.1", 1)
