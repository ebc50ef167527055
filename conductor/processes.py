"""The decision core as a process of its own, and how it and its gateways find and name each other.

startup     metadata (served here, or etcd), CoreService: it follows the cluster and stands for election
main loop   the event loop
shutdown    SIGTERM or SIGINT: resign, so that another core leads at once, then leave

It imports no vLLM (a contract of pyproject.toml holds that): it starts in a second and needs little memory.
"""

import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
import structlog
import zmq

from conductor.core import Core
from conductor.core_service import CoreService
from conductor.live import cluster_parts, live_page
from conductor.metrics import core_metrics
from mooncake.core.attend import attended
from mooncake.core.config import fail
from mooncake.core.health import Health
from mooncake.core.messages import CORES_PREFIX, FrontRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_client import MetadataServer
from mooncake.core.metadata_etcd_options import is_etcd
from mooncake.core.metadata_metrics import metered
from mooncake.core.metadata_open import open_metadata
from mooncake.core.metadata_registration import Registration, RegistrationState
from mooncake.core.options import GatewayOptions
from mooncake.core.reload import reloading
from mooncake.core.tracing import open_tracing
from mooncake.live.ring import part_of

if TYPE_CHECKING:
    from mooncake.core.tracing_sdk import Tracing

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
        yield metered(server.store)
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def joined_metadata(endpoint: str) -> AsyncIterator[MetadataStore]:
    """Give the metadata store that others serve at `endpoint`."""
    store = metered(open_metadata(endpoint))
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def registered(
    metadata: MetadataStore, prefix: str, record: FrontRecord
) -> AsyncIterator[Registration]:
    """Tell the cluster of this process while it serves."""
    value = msgspec.json.encode(record)
    registration = Registration(metadata, prefix + record.name, lambda: value)
    registration.start()
    try:
        yield registration
    finally:
        await registration.close()


def traced(stack: contextlib.AsyncExitStack, role: str, name: str) -> "Tracing | None":
    """Return what makes this process's spans; None: tracing is off. It ends with `stack`.

    Raises:
        ConfigError: it is switched on and cannot be.
    """
    tracing = open_tracing(role, name)
    if tracing is not None:
        stack.callback(tracing.close)
    return tracing


async def run_core(options: GatewayOptions) -> None:
    """Be a candidate for leading until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting cannot work.
    """
    name = process_name(options, "core")
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(attended("core", options, core_metrics().registry))
        own.leaving.on_signals()
        metadata = await stack.enter_async_context(open_cluster_metadata(options.metadata_endpoint))
        core = Core(options, metadata, core_metrics())
        core.tracing = traced(stack, "core", name)
        bind = f"tcp://{options.address}:*"
        service = CoreService(core, metadata, bind, f"{name}-{secrets.token_hex(4)}")  # another at each start
        stack.push_async_callback(service.close)
        await service.start()
        record = FrontRecord(name, os.getpid(), "", own.metrics_url)
        await stack.enter_async_context(
            live_page(
                own.admin, part_of(name, own.metrics_url), core.metrics.registry,
                cluster_parts(core.view, metadata), prometheus_url=options.prometheus_url,
            )
        )  # fmt: skip
        async with registered(metadata, CORES_PREFIX, record) as registration:
            own.look = lambda: tell_ready(own.health, registration)
            await stack.enter_async_context(
                reloading(options, core.metrics.registry, own.admin, core.prepare)
            )
            log.info("core.serves", name=name, endpoint=service.endpoint)
            await own.leaving.draining.wait()
            await service.close()  # before the metadata hears of anything else
        own.leaving.is_done = True
        await own.leaving.told.wait()


def tell_ready(health: Health, registration: Registration) -> None:
    """Say whether this core can lead: one that the metadata does not know cannot."""
    if registration.state is RegistrationState.REGISTERED:
        health.started()
        health.ready()
    else:
        health.unready("the metadata store is away")


def main(options: GatewayOptions) -> int:
    """Run a core on uvloop; return the exit status.

    Raises:
        ConfigError: a setting cannot work.
    """
    import uvloop

    uvloop.run(run_core(options.checked()))
    return 0
