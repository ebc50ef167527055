"""The live page of a gateway or core: what it is registered on, and which processes its ring asks.

A process that decides fills its ring from its start: who opens the page after an alert wants the minutes
before it. Gateways beside a core begin with the first visit: one ring per cluster is enough, and each asks
every process of the cluster.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from conductor.cluster import ClusterView
from mooncake.core.admin import AdminServer
from mooncake.core.config import admin_token
from mooncake.core.errors import PeerGone
from mooncake.core.messages import CORES_PREFIX, GATEWAYS_PREFIX, FrontRecord
from mooncake.core.metadata import MetadataStore
from mooncake.live.boards import load_boards, names_read
from mooncake.live.page import LivePage
from mooncake.live.prometheus import Prometheus
from mooncake.live.ring import Part, Ring, part_of
from mooncake.live.scrape import Scraper

PARTS_S_MAX = 1.0
"""For the loop, and a metadata store that may be away, to say who there is."""

Parts = Callable[[], Coroutine[Any, Any, list[Part]]]


def cluster_parts(view: ClusterView, metadata: MetadataStore) -> Parts:
    """Return what lists all processes of the cluster that serve metrics; call it on the loop."""

    async def parts() -> list[Part]:
        found = [part_of(record.instance_id, record.metrics_url) for record, _, _ in view.instances()]
        found += [part_of(f"store-{record.node}", record.metrics_url) for record in view.stores()]
        for prefix in (GATEWAYS_PREFIX, CORES_PREFIX):
            for entry in (await metadata.get(prefix)).entries:
                with contextlib.suppress(msgspec.MsgspecError):  # of another version
                    front = msgspec.json.decode(entry.value, type=FrontRecord)
                    found.append(part_of(front.name, front.metrics_url))
        return found

    return parts


@contextlib.asynccontextmanager
async def live_page(
    admin: AdminServer | None,
    own: Part,
    registry: CollectorRegistry,
    parts: Parts,
    *,
    prometheus_url: str = "",
    always: bool = True,
) -> AsyncIterator[None]:
    """Serve /dashboard on `admin`, if there is one.

    Args:
        admin: of this process.
        own: this process.
        registry: of its metrics.
        parts: see cluster_parts.
        prometheus_url: asked instead of a ring; "" = a ring.
        always: fill the ring from now on, not from the first visit on.

    Raises:
        ConfigError: `prometheus_url` is no address.
    """
    if admin is None:
        yield
        return
    boards = load_boards()
    ring = Ring(names_read(boards.values()))
    if prometheus_url:
        LivePage(boards, ring, Prometheus(prometheus_url)).register(admin)
        yield
        return
    loop = asyncio.get_running_loop()

    def own_page() -> str:
        return generate_latest(registry.restricted_registry(ring.names)).decode()

    def known_parts() -> list[Part]:
        asked = asyncio.run_coroutine_threadsafe(parts(), loop)
        try:
            return asked.result(PARTS_S_MAX)
        except TimeoutError as error:
            asked.cancel()
            raise PeerGone("the loop does not say who there is") from error

    scraper = Scraper(ring, own, own_page, known_parts, admin_token())
    if always:
        scraper.start()
    LivePage(boards, ring, visited=scraper.start).register(admin)
    try:
        yield
    finally:
        await asyncio.to_thread(scraper.close)
