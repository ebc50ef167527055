"""The decision core as a process of its own, and how it and its gateways find and name each other.

startup     metadata (served here, or etcd), CoreService: it follows the cluster and stands for election
main loop   the event loop
shutdown    SIGTERM or SIGINT: resign, so that another core leads at once, then leave

It imports no vLLM (a contract of pyproject.toml holds that): it starts in a second and needs little memory.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator

import msgspec
import structlog
import zmq
from prometheus_client import REGISTRY

from conductor.core import Core
from conductor.core_service import CoreService
from conductor.metrics import process_metrics
from mooncake.core.config import GatewayOptions, fail
from mooncake.core.messages import CORES_PREFIX, FrontRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_client import MetadataServer
from mooncake.core.metadata_etcd_options import is_etcd
from mooncake.core.metadata_open import open_metadata
from mooncake.core.metadata_registration import Registration
from mooncake.core.scrape import MetricsServer, metrics_url

log = structlog.get_logger(__name__)


def process_name(options: GatewayOptions, kind: str) -> str:
    """Return the name of this process among those of its kind."""
    return options.name or f"{kind}-{socket.gethostname().split('.')[0]}-{os.getpid()}"[:64]


@contextlib.asynccontextmanager
async def open_cluster_metadata(endpoint: str) -> AsyncIterator[MetadataStore]:
    """Give the cluster's metadata store: etcd, or our own, which is served at `endpoint`.

    Raises:
        ConfigError: it cannot be bound, or names no store.
    """
    if is_etcd(endpoint):
        async with joined_metadata(endpoint) as joined:
            yield joined
        return
    try:
        server = MetadataServer(endpoint)
    except zmq.ZMQError as error:
        what = f"cannot serve metadata there ({error.strerror})"
        raise fail("metadata_endpoint", endpoint, f"{what}; a standby core needs etcd://...") from error
    server.start()
    log.info("conductor.metadata", endpoint=server.endpoint)
    try:
        yield server.store
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def joined_metadata(endpoint: str) -> AsyncIterator[MetadataStore]:
    """Give the metadata store that others serve at `endpoint`."""
    store = open_metadata(endpoint)
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def serving_metrics(port: int) -> AsyncIterator[str]:
    """Serve this process's metrics on a loopback port, 0 = nowhere; give their address."""
    if not port:
        yield ""
        return
    server = MetricsServer(REGISTRY, port)
    server.start()
    try:
        yield metrics_url(port)
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def registered(metadata: MetadataStore, prefix: str, record: FrontRecord) -> AsyncIterator[None]:
    """Tell the cluster of this process while it serves."""
    value = msgspec.json.encode(record)
    registration = Registration(metadata, prefix + record.name, lambda: value)
    registration.start()
    try:
        yield
    finally:
        await registration.close()


def stop_event() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def run_core(options: GatewayOptions) -> None:
    """Be a candidate for leading until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting cannot work.
    """
    stop = stop_event()
    name = process_name(options, "core")
    async with contextlib.AsyncExitStack() as stack:
        metadata = await stack.enter_async_context(open_cluster_metadata(options.metadata_endpoint))
        core = Core(options, metadata, process_metrics())
        bind = f"tcp://{options.address}:*"
        service = CoreService(core, metadata, bind, f"{name}-{secrets.token_hex(4)}")  # another at each start
        stack.push_async_callback(service.close)
        await service.start()
        url = await stack.enter_async_context(serving_metrics(options.admin_port))
        record = FrontRecord(name, os.getpid(), "", url)
        await stack.enter_async_context(registered(metadata, CORES_PREFIX, record))
        log.info("core.serves", name=name, endpoint=service.endpoint)
        await stop.wait()
        await service.close()  # before the metadata hears of anything else


def main(options: GatewayOptions) -> int:
    """Run a core on uvloop; return the exit status.

    Raises:
        ConfigError: a setting cannot work.
    """
    import uvloop

    uvloop.run(run_core(options.checked()))
    return 0
