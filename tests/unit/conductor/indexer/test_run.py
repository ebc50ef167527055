"""The indexer as a process: what it shows of itself, like every other."""

import asyncio
import os
import signal
import urllib.request
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from conductor.indexer import run
from mooncake.core.metadata_client import MetadataServer
from mooncake.core.options import IndexerOptions


@pytest.fixture
def logs() -> Iterator[list]:
    with capture_logs() as lines:
        yield lines


async def page_of(options: IndexerOptions, logs: list) -> str:
    serving = asyncio.create_task(run._serve(options))
    try:
        async with asyncio.timeout(30):
            while not any(line["event"] == "indexer.serving" for line in logs):  # noqa: ASYNC110 -- no event
                await asyncio.sleep(0.01)
        url = next(line["url"] for line in logs if line["event"] == "indexer.serving")
        return (await asyncio.to_thread(urllib.request.urlopen, f"{url}/metrics")).read().decode()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await serving == 0


async def test_it_shows_its_reloads_and_how_it_is(logs):
    page = await page_of(IndexerOptions(port=0), logs)
    for line in (
        'mooncake_config_reloads_total{result="unchanged"} 1.0',
        'mooncake_process_open_fds{kind="indexer"}',
        'mooncake_process_event_loop_lag_seconds_count{kind="indexer"}',
        "mooncake_indexer_publishers",
    ):
        assert line in page
    assert "mooncake_metadata" not in page, "it has none, which is no outage"


async def test_it_shows_how_it_gets_on_with_metadata_that_it_reads(logs):
    server = MetadataServer("tcp://127.0.0.1:*")
    server.start()
    try:
        assert "mooncake_metadata_connected" in await page_of(
            IndexerOptions(port=0, metadata=server.endpoint), logs
        )
    finally:
        await server.close()
