"""The indexer as a process."""

import asyncio
import contextlib
import signal

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from conductor.index import BLOCKS_MAX
from conductor.indexer import endpoints
from conductor.indexer.api import Api
from conductor.indexer.cluster import Cluster
from conductor.indexer.http import IndexerServer
from conductor.indexer.metrics import IndexerCollector
from conductor.indexer.service import Indexer, Options
from mooncake.core.config import check_host, fail
from mooncake.core.metadata_open import check_metadata, open_metadata

log = structlog.get_logger(__name__)

BLOCKS_MAX_MAX = 64_000_000
"""6 GB of names."""


class Settings(msgspec.Struct, frozen=True):
    """Of one process; "" and 0: the default."""

    host: str
    port: int
    metadata: str
    publishers: str
    blocks_max: int
    seed: int
    api_key: str

    def options(self) -> Options:
        """Return what the Indexer takes."""
        return Options(self.publishers or endpoints.PUBLISHERS, self.blocks_max or BLOCKS_MAX, self.seed)


def check(settings: Settings) -> Settings:
    """Return settings that the process can start with; raises ConfigError."""
    check_host(settings.host, settings.api_key)
    if not 0 <= settings.port < 1 << 16:
        raise fail("port", settings.port, "must be 0..65535")
    if not 0 <= settings.blocks_max <= BLOCKS_MAX_MAX:
        raise fail("blocks_max", settings.blocks_max, f"must be 1..{BLOCKS_MAX_MAX}, or 0 = {BLOCKS_MAX}")
    if not 0 <= settings.seed < 1 << 64:
        raise fail("xxh3_seed", settings.seed, "must be below 2**64")
    endpoints.networks(settings.options().publishers)
    if settings.metadata:
        check_metadata(settings.metadata)
    return settings


def serve(settings: Settings) -> int:
    """Serve until SIGTERM; return the exit code."""
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        indexer = Indexer(settings.options())
        stack.push_async_callback(indexer.close)
        if settings.metadata:
            metadata = open_metadata(settings.metadata)
            stack.push_async_callback(metadata.close)
            cluster = Cluster(indexer, metadata, settings.options().blocks_max)
            stack.push_async_callback(cluster.close)
            cluster.start()
        registry = CollectorRegistry()
        registry.register(IndexerCollector(indexer))
        server = IndexerServer(Api(indexer, loop, registry), settings.host, settings.port, settings.api_key)
        stack.push_async_callback(server.close)
        log.info("indexer.serving", url=server.start())
        await stop.wait()
    return 0
