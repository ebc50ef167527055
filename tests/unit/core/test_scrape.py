"""Metrics are served on loopback and never stop what they measure."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from mooncake.core import scrape
from mooncake.core.scrape import MetricsServer, metrics_url


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    return registry


def page(port: int) -> str:
    with urllib.request.urlopen(metrics_url(port), timeout=2) as reply:
        return reply.read().decode()


async def until_bound(server: MetricsServer) -> None:
    for _ in range(500):
        if server.bound:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 5 s")


def test_no_port_is_no_address():
    assert metrics_url(0) == ""


async def test_a_taken_port_is_waited_for(registry, monkeypatch):
    monkeypatch.setattr(scrape, "BIND_RETRY_S", 0.02)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = MetricsServer(registry, other.getsockname()[1])
        server.start()
        await asyncio.sleep(0.1)
        assert not server.bound
    await until_bound(server)
    assert "things_total 3.0" in await asyncio.to_thread(page, server.port)
    await server.close()
    assert not server.bound


async def test_close_ends_the_waiting(registry):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = MetricsServer(registry, other.getsockname()[1])
        server.start()
        await server.close()
        assert not server.bound


CHILD = """
import asyncio, sys
from prometheus_client import CollectorRegistry
from mooncake.core.scrape import MetricsServer
async def main():
    server = MetricsServer(CollectorRegistry(), 0)
    server.start()
    print(server.port, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_the_port_of_a_killed_process_can_be_bound_again_at_once(registry):
    argv = [sys.executable, "-c", CHILD]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:  # noqa: ASYNC220
        port = int(child.stdout.readline())
        # connections that the kernel still remembers: one open, one closed by the server
        with socket.create_connection(("127.0.0.1", port)):
            await asyncio.to_thread(page, port)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            server = MetricsServer(registry, port)
            server.start()
            assert server.bound
    assert "things_total 3.0" in await asyncio.to_thread(page, port)
    await server.close()
