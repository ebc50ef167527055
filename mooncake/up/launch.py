"""What a child process of the cluster runs: one role with its options.

    python -m mooncake.up.launch ROLE OPTIONS_FILE

The zygote calls `run` in a forked child; everywhere else this module is the program. Options
travel as JSON in a private file; the API key travels in the environment and nowhere else.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from mooncake.core import log as logs
from mooncake.core.admin import metrics_url
from mooncake.core.attend import attended
from mooncake.core.config import API_KEY_ENV, is_loopback
from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerError
from mooncake.core.health import Health
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata_metrics import metered
from mooncake.core.metadata_open import open_metadata
from mooncake.core.metadata_registration import Registration, RegistrationState
from mooncake.core.options import FollowerOptions, GatewayOptions, StoreOptions, Traced, WorkerOptions
from mooncake.core.options_base import Options
from mooncake.core.reload import has_terminal, reloading
from mooncake.core.secret import cluster_secret

if TYPE_CHECKING:
    from transfer.config import EngineConfig

log = structlog.get_logger(__name__)

EXIT_FAILED, EXIT_USAGE, EXIT_UNAVAILABLE = 1, 2, 69
"""69 is EX_UNAVAILABLE of sysexits.h: another process or a resource is missing, retry may help."""


def exit_code(error: MooncakeError) -> int:
    """Return the exit code that tells the kind of `error`."""
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, PeerError | CapacityError) else EXIT_FAILED


def run_store(options: StoreOptions) -> int:
    """Serve one store node until SIGTERM; return the exit code."""
    return asyncio.run(_store(options.checked()))


async def _store(options: StoreOptions) -> int:
    from kvstore.ssd.model import SsdConfig
    from kvstore.store.config import StoreConfig
    from kvstore.store.service import StoreService

    url = metrics_url(options.admin_port, options.admin_host, options.address)
    config = StoreConfig(
        node=options.node,
        capacity_bytes=options.capacity_bytes,
        run_dir=options.run_dir,
        endpoint=f"tcp://{options.address}:*",
        events=f"tcp://{options.address}:*",
        transfer=transfer_config(options),
        metrics_url=url,
        eviction=options.eviction,
        hugepages=options.hugepages,
        ssd=SsdConfig(node=options.node, path=options.ssd_path, capacity_bytes=options.ssd_bytes)
        if options.ssd_path
        else None,
    )
    async with contextlib.AsyncExitStack() as stack:
        registry = CollectorRegistry()
        own = await stack.enter_async_context(attended("store", options, registry))
        own.leaving.on_signals()
        metadata = metered(open_metadata(options.metadata))
        stack.push_async_callback(metadata.close)
        service = StoreService(config, metadata=metadata)
        record = await service.start()
        stack.push_async_callback(service.close)
        service.register(registry)
        own.leaving.in_flight = lambda: service.unsaved
        registration = Registration(
            metadata, STORES_PREFIX + record.node, lambda: msgspec.json.encode(record)
        )
        registration.start()
        stack.push_async_callback(registration.close)
        own.look = lambda: _tell_ready(own.health, registration)
        await stack.enter_async_context(reloading(options, registry, own.admin))
        await service.run_until(own.leaving.draining)
        await registration.close()  # others fetch nothing more from here
        await service.save(own.leaving.at_once.is_set)
        own.leaving.is_done = True
        await service.run_until(own.leaving.told)
    return 0


def _tell_ready(health: Health, registration: Registration) -> None:
    """Say whether the cluster knows this store; the engines of its host need no metadata for it."""
    if registration.state is RegistrationState.REGISTERED:
        health.started()
        health.ready()
    else:
        health.unready("the metadata store is away")


def transfer_config(options: StoreOptions) -> "EngineConfig | None":
    """Return the settings of the store's transfer engine; None: blocks stay on this host.

    Raises:
        ConfigError: `transfer` is no HOST:PORT, or is open to others without a secret.
    """
    from transfer.config import EngineConfig, split_name

    if not options.transfer and is_loopback(options.address):
        return None
    host, port = split_name(options.transfer or f"{options.address}:0")
    return EngineConfig(
        host=host, port=port, secret=cluster_secret(), run_dir=str(Path(options.run_dir) / "transfer")
    )


def run_prefill(options: WorkerOptions) -> int:
    """Run a prefill (or aggregated) instance until SIGTERM; return the exit code."""
    from prefill import service

    return service.main(options.checked())


def run_decode(options: WorkerOptions) -> int:
    """Run a decode instance until SIGTERM; return the exit code."""
    from decode import service

    return service.main(options.checked())


def run_follower(options: FollowerOptions) -> int:
    """Run one more node of an engine until its leader ends, or SIGTERM; return the exit code."""
    from mooncake.worker import follower

    return follower.main(options.checked())


def run_conductor(options: GatewayOptions) -> int:
    """Run the Conductor with its gateway until SIGTERM; return the exit code."""
    from conductor import gateway

    return gateway.main(_with_key(options))


def run_gateway(options: GatewayOptions) -> int:
    """Run a gateway whose decisions are made by a core elsewhere, until SIGTERM; return the exit code."""
    from conductor import gateway

    return gateway.main(_with_key(options), alone=False)


def run_core(options: GatewayOptions) -> int:
    """Run a decision core until SIGTERM; return the exit code. It serves no clients and needs no key."""
    from conductor import processes

    return processes.main(options)


def _with_key(options: GatewayOptions) -> GatewayOptions:
    key = options.api_key or os.environ.get(API_KEY_ENV, "")
    return options.replace(api_key=key).checked()


ROLES: dict[str, tuple[type[Options], Callable[..., int]]] = {
    "store": (StoreOptions, run_store),
    "prefill": (WorkerOptions, run_prefill),
    "decode": (WorkerOptions, run_decode),
    "follower": (FollowerOptions, run_follower),
    "conductor": (GatewayOptions, run_conductor),
    "gateway": (GatewayOptions, run_gateway),
    "core": (GatewayOptions, run_core),
}


def run(role: str, data: bytes) -> int:
    """Run `role` with encoded options in this process; return its exit code."""
    kind, main = ROLES[role]
    options = kind.decoded(data)
    return guarded(role, options, lambda: main(options))


def guarded(service: str, options: Options, main: Callable[[], int]) -> int:
    """Return what `main` returns; our errors become one log line and an exit code."""
    logs.setup(service, options.log_level, options.log_format)
    if not has_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is somebody who can reload
    signal.signal(signal.SIGTERM, _leave)
    try:
        if isinstance(options, Traced) and options.otlp_endpoint:
            from mooncake.core.tracing import use_endpoint

            use_endpoint(options.otlp_endpoint)
        return main()
    except MooncakeError as error:
        log.error("stopped", kind=type(error).__name__, reason=str(error))
        return exit_code(error)
    except KeyboardInterrupt:
        return 130


def _leave(number: int, frame: object) -> None:  # noqa: ARG001
    """End at once: until a process has something to finish, and takes the signal over.

    The first process of a container would not hear the signal at all without a handler.
    """
    raise SystemExit(0)


def main() -> int:
    """Entry of `python -m mooncake.up.launch`."""
    role, path = sys.argv[1:]
    return run(role, Path(path).read_bytes())


if __name__ == "__main__":
    sys.exit(main())
