"""What a process with a loop has beside its work: health, vital signs, a way to leave, an admin server."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram

from mooncake.core.admin import AdminServer, metrics_url
from mooncake.core.config import admin_token
from mooncake.core.drain import Leaving
from mooncake.core.health import Health
from mooncake.core.vitals import VitalsCollector, beating, lag_histogram, refuse_shared_files


class AdminOptions(Protocol):
    """What WorkerOptions, GatewayOptions and StoreOptions share."""

    @property
    def admin_host(self) -> str:
        """Where the admin server listens."""
        ...

    @property
    def admin_port(self) -> int:
        """0 = there is none."""
        ...

    @property
    def drain_s(self) -> float:
        """See Leaving."""
        ...

    @property
    def address(self) -> str:
        """Of this host, for the cluster."""
        ...


class Attended:
    """One process, as others see it. `look` is called ten times a second on the loop, to say how it is."""

    def __init__(
        self, health: Health, leaving: Leaving, lag_s: Histogram, admin: AdminServer | None, url: str
    ) -> None:
        """`lag_s`: by kind of loop. `admin` None: no port was asked for. `url`: of its metrics."""
        self.health = health
        self.leaving = leaving
        self.lag_s = lag_s
        self.admin = admin
        self.metrics_url = url
        self.children: dict[str, int] = {}  # kind -> pid of those that serve no metrics themselves
        self.look: Callable[[], None] = lambda: None


@contextlib.asynccontextmanager
async def beside(kind: str, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Show the vital signs of a process whose HTTP is a server of its own: the directory's, the indexer's.

    Raises:
        ConfigError: metrics would be shared by files.
    """
    refuse_shared_files()
    registry.register(VitalsCollector(kind))
    async with beating(kind, Health(), lag_histogram(registry)):
        yield


@contextlib.asynccontextmanager
async def attended(kind: str, options: AdminOptions, registry: CollectorRegistry) -> AsyncIterator[Attended]:
    """Attend to this process from now on, on the running loop; `kind`: conductor, gateway, store, ...

    Raises:
        ConfigError: the file of the admin token cannot be read, or metrics would be shared by files.
    """
    refuse_shared_files()
    health = Health()
    leaving = Leaving(health, options.drain_s)
    admin = None
    if options.admin_port:
        admin = AdminServer(
            registry, options.admin_port,
            host=options.admin_host, token=admin_token(), health=health, drains=leaving.drains,
        )  # fmt: skip
        admin.start()
    try:
        url = metrics_url(options.admin_port, options.admin_host, options.address)
        own = Attended(health, leaving, lag_histogram(registry), admin, url)
        registry.register(VitalsCollector(kind, own.children))
        async with beating(kind, health, own.lag_s, lambda: own.look()):
            yield own
    finally:
        if admin is not None:
            admin.close()
