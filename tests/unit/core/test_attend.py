"""A process with a loop as others see it, over HTTP."""

import asyncio
import collections
import http.client
import json
import os
import socket
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from mooncake.core.admin import AdminServer
from mooncake.core.attend import Attended, attended
from mooncake.core.config import ADMIN_TOKEN_ENV, ADMIN_TOKEN_FILE_ENV
from mooncake.core.options import StoreOptions


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ADMIN_TOKEN_ENV, ADMIN_TOKEN_FILE_ENV):
        monkeypatch.delenv(name, raising=False)


def options(**settings: object) -> StoreOptions:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"node": "n", "run_dir": "/r", "metadata": "tcp://127.0.0.1:1", "admin_port": port}
    return StoreOptions(**{**given, **settings})


async def ask(admin: AdminServer | None, path: str, method: str = "GET") -> tuple[int, str]:
    assert admin is not None

    def fetch() -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=10.0)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    return await asyncio.to_thread(fetch)


async def until(own: Attended, path: str, good: Callable[[int], bool]) -> str:
    async with asyncio.timeout(10.0):
        while True:
            status, text = await ask(own.admin, path)
            if good(status):
                return text
            await asyncio.sleep(0.01)


async def test_its_page_has_every_family_once_and_its_own_vital_signs():
    async with attended("store", options(), CollectorRegistry()) as own:
        own.children["engine"] = os.getpid()
        own.lag_s.labels("relay").observe(0.0)
        _, page = await ask(own.admin, "/metrics")
        types = collections.Counter(
            line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")
        )
        assert set(types.values()) == {1}
        for name in ("resident_bytes", "open_fds", "threads", "cpu_seconds_total"):
            for kind in ("store", "engine"):
                assert f'mooncake_process_{name}{{kind="{kind}"}}' in page
        assert own.metrics_url == f"http://127.0.0.1:{own.admin.port}/metrics"


async def test_it_looks_around_by_itself_and_drains_when_it_is_asked_to():
    async with attended("store", options(), CollectorRegistry()) as own:
        assert (await ask(own.admin, "/startupz"))[0] == 503

        def look() -> None:
            own.health.started()
            own.health.ready()

        own.look = look
        assert await until(own, "/readyz", lambda status: status == 200) == "ready\n"
        own.leaving.in_flight = lambda: 3
        status, text = await ask(own.admin, "/drain", "POST")
        assert (status, json.loads(text)) == (202, {"state": "draining", "in_flight": 3})
        async with asyncio.timeout(10.0):
            await own.leaving.draining.wait()
        assert (await ask(own.admin, "/readyz"))[0] == 503, "it looks around still, and stays unready"
        assert (await ask(own.admin, "/livez"))[0] == 200
        own.leaving.is_done = True
        assert json.loads((await ask(own.admin, "/drain"))[1])["state"] == "drained"


async def test_without_a_port_it_leaves_as_well():
    async with attended("store", options(admin_port=0), CollectorRegistry()) as own:
        assert (own.admin, own.metrics_url) == (None, "")
        own.leaving.tell()
        assert own.leaving.told.is_set()
