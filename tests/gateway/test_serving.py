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
from conductor.announce import DrainAnnounced
from mooncake.core.drain import Leaving
from mooncake.core.errors import ConfigError
from mooncake.core.health import Health
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
    def __init__(self, name: str, port: int, share: bool, delay_s: float) -> None:
        self.app = App(name)
        self.health = Health()
        self.leaving = Leaving(self.health, drain_s=60.0)
        self.drained = 0
        self.up = asyncio.Event()
        args = vllm_seam.parse_args([f"--port={port}", "--host=127.0.0.1", "--disable-uvicorn-access-log"])
        serving = vllm_seam.Serving(self.leaving, self._drain, self.up.set, share, delay_s)
        front = DrainAnnounced(self.app, self.health)
        self.task = asyncio.create_task(vllm_seam.serve(self.app, front, args, serving))

    async def _drain(self) -> None:
        self.drained += 1


@contextlib.asynccontextmanager
async def serving(
    port: int, *names: str, share: bool = True, delay_s: float = 0.0
) -> AsyncIterator[list[Served]]:
    served = [Served(name, port, share, delay_s) for name in names]
    try:
        async with asyncio.timeout(20):
            for one in served:
                await one.up.wait()
        yield served
    finally:
        for one in served:
            if not one.leaving.told.is_set():
                one.leaving.tell()
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
            first.leaving.tell()
            answers = await load  # an error of any would be raised here
            assert len(answers) == 300
            await first.task
            assert set(await ask(url, 20)) == {"b"}
            assert not second.task.done()


async def test_connections_that_the_kernel_made_before_the_end_are_served(port) -> None:
    async with serving(port, "a", share=False) as (one,):
        one.leaving.tell()
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
        one.leaving.tell()
        await asyncio.sleep(0.1)
        assert (await client.get(url)).headers["connection"] == "close"
        one.app.go.set()
        assert (await slow).text == "a"


async def test_a_request_in_flight_is_finished_before_what_has_no_connection_is_drained(port) -> None:
    async with serving(port, "a", share=False) as (one,), httpx.AsyncClient(timeout=10) as client:
        url = f"http://127.0.0.1:{port}/slow"
        slow = asyncio.create_task(client.get(url))
        await one.app.asked.wait()
        one.leaving.tell()
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient() as late:
            with pytest.raises(httpx.ConnectError):
                await late.get(url)
        assert not one.drained
        one.app.go.set()
        assert (await slow).text == "a"
        await one.task
        assert one.drained == 1


async def test_for_a_while_it_takes_what_balancers_still_send_and_says_it_is_not_ready(
    port,
) -> None:
    async with serving(port, "a", share=False, delay_s=60.0) as (one,):
        url = f"http://127.0.0.1:{port}/"
        async with httpx.AsyncClient(timeout=10) as client:
            assert (await client.get(f"{url}health")).status_code == 200
            one.leaving.tell()
            assert (await client.get(f"{url}health")).status_code == 503
        assert await ask(url, 3) == ["a", "a", "a"]
        assert not one.task.done()
        one.leaving.tell()  # again: at once
        async with asyncio.timeout(20):
            await one.task


async def test_one_that_was_only_asked_to_drain_finishes_all_and_waits_to_be_told(port) -> None:
    async with serving(port, "a", share=False) as (one,), httpx.AsyncClient(timeout=10) as client:
        slow = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/slow"))
        await one.app.asked.wait()
        one.leaving.ask("asked for")
        one.app.go.set()
        assert (await slow).text == "a"
        async with asyncio.timeout(20):
            while not one.drained:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
        assert not one.task.done()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)
        one.leaving.tell()
        async with asyncio.timeout(20):
            await one.task


async def test_told_again_it_does_not_wait_for_what_is_in_flight(port) -> None:
    async with serving(port, "a", share=False) as (one,), httpx.AsyncClient(timeout=10) as client:
        slow = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/slow"))
        await one.app.asked.wait()
        one.leaving.tell()
        one.leaving.tell()
        async with asyncio.timeout(20):
            await one.task
        with contextlib.suppress(httpx.TransportError):
            assert (await slow).status_code == 500


async def test_what_fails_once_it_serves_is_raised_and_ends_the_server(port) -> None:
    """It must look neither as if it were told to drain nor as if nothing had happened."""
    args = vllm_seam.parse_args([f"--port={port}", "--host=127.0.0.1", "--disable-uvicorn-access-log"])
    app = App("a")

    async def drain() -> None:
        raise AssertionError("nobody asked for that")

    def serves() -> None:
        raise OSError("cannot say that it serves")

    plan = vllm_seam.Serving(Leaving(Health(), drain_s=60.0), drain, serves)
    async with asyncio.timeout(20):
        with pytest.raises(OSError, match="cannot say that it serves"):
            await vllm_seam.serve(app, app, args, plan)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)
    assert not {"http", "stop"} & {task.get_name() for task in asyncio.all_tasks()}


async def test_what_fails_while_it_drains_is_raised_and_ends_the_server(port) -> None:
    args = vllm_seam.parse_args([f"--port={port}", "--host=127.0.0.1", "--disable-uvicorn-access-log"])
    app, leaving = App("a"), Leaving(Health(), drain_s=60.0)

    async def drain() -> None:
        raise OSError("cannot be drained")

    plan = vllm_seam.Serving(leaving, drain, lambda: leaving.ask("asked for"))
    async with asyncio.timeout(20):
        with pytest.raises(OSError, match="cannot be drained"):
            await vllm_seam.serve(app, app, args, plan)
    assert not {"http", "stop"} & {task.get_name() for task in asyncio.all_tasks()}


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
