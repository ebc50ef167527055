"""The indexer as a process."""

import asyncio
import contextlib
import signal

import structlog
from prometheus_client import CollectorRegistry

from conductor.index import BLOCKS_MAX
from conductor.indexer import endpoints
from conductor.indexer.api import Api
from conductor.indexer.cluster import Cluster
from conductor.indexer.http import IndexerServer
from conductor.indexer.metrics import IndexerCollector
from conductor.indexer.service import Indexer, Options
from mooncake.core.attend import beside
from mooncake.core.metadata_metrics import MetadataCollector, metered, process_meter
from mooncake.core.metadata_open import check_metadata, open_metadata
from mooncake.core.options import IndexerOptions
from mooncake.core.reload import reloading

log = structlog.get_logger(__name__)


def check(options: IndexerOptions) -> IndexerOptions:
    """Return options that the process can start with; raises ConfigError."""
    options.checked()
    if options.metadata:
        check_metadata(options.metadata)
    endpoints.networks(_own(options).publishers)
    return options


def _own(options: IndexerOptions) -> Options:
    """Return what the Indexer takes; "" and 0: the default."""
    return Options(
        options.publishers or endpoints.PUBLISHERS, options.blocks_max or BLOCKS_MAX, options.xxh3_seed
    )


def serve(options: IndexerOptions) -> int:
    """Serve until SIGTERM; return the exit code."""
    return asyncio.run(_serve(options))


async def _serve(options: IndexerOptions) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        registry = CollectorRegistry()
        await stack.enter_async_context(beside("indexer", registry))
        indexer = Indexer(_own(options))
        stack.push_async_callback(indexer.close)
        if options.metadata:
            metadata = metered(open_metadata(options.metadata))
            registry.register(MetadataCollector(process_meter()))
            stack.push_async_callback(metadata.close)
            cluster = Cluster(indexer, metadata, _own(options).blocks_max)
            stack.push_async_callback(cluster.close)
            cluster.start()
        registry.register(IndexerCollector(indexer))
        await stack.enter_async_context(reloading(options, registry, None))
        server = IndexerServer(Api(indexer, loop, registry), options.host, options.port, options.api_key)
        stack.push_async_callback(server.close)
        log.info("indexer.serving", url=server.start())
        await stop.wait()
    return 0
