"""One attempt of a probe, against servers that answer well, badly and not at all."""

import asyncio
from pathlib import Path

import pytest

from tests.kube.standin.container import Container
from tests.kube.standin.probes import timing
from tests.kube.standin.probing import attempt
from tests.kube.standin.sandbox import Sandbox

TIMEOUT_S = 10.0


def no_container() -> Container:
    """Return one that probes over the network do not ask."""
    return Container(Sandbox(0, "none"), Path("none"), Path("none"), [], {})


async def probed(answer: bytes, kind: str = "httpGet") -> bool:
    """Return the outcome of an attempt on a server that says `answer` and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if kind == "httpGet":
            await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await attempt({kind: {"port": port}}, {}, "127.0.0.1", no_container(), TIMEOUT_S)


@pytest.mark.parametrize(("answer", "ok"), [
    (b"HTTP/1.1 200 OK\r\n\r\n", True), (b"HTTP/1.1 302 Found\r\n\r\n", True),
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False), (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
    (b"", False), (b"HTTP/1.1\r\n", False), (b"220 mail ready\r\n", False), (b"+OK what?\r\n", False),
])  # fmt: skip
async def test_only_a_status_from_200_to_399_is_well(answer: bytes, ok: bool) -> None:
    assert await probed(answer) is ok


async def test_a_port_that_takes_connections_is_all_that_a_tcp_probe_wants() -> None:
    assert await probed(b"", "tcpSocket")


@pytest.mark.parametrize(("took_s", "pause_s"), [(0.0, 10.0), (4.0, 6.0), (10.0, 0.0), (25.0, 0.0)])
def test_periods_count_from_the_beginning_of_attempts(took_s: float, pause_s: float) -> None:
    assert timing({"periodSeconds": 10}).pause_s(took_s) == pause_s
