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
from prometheus_client import CollectorRegistry

from conductor.cluster import ClusterView
from mooncake.core.admin import AdminServer
from mooncake.core.config import admin_token
from mooncake.core.errors import PeerGone
from mooncake.core.messages import CORES_PREFIX, GATEWAYS_PREFIX, FrontRecord
from mooncake.core.metadata import MetadataStore
from mooncake.live.boards import load_boards, names_read
from mooncake.live.page import LivePage
from mooncake.live.prometheus import Prometheus
from mooncake.live.ring import Part, Ring, Sample, part_of, samples_of
from mooncake.live.scrape import SAMPLES_PATH, Scraper

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
                    found.append(part_of(front.name, _samples_url(front.metrics_url)))
        return found

    return parts


def _samples_url(metrics_url: str) -> str:
    """Return where a process with a live page hands over samples."""
    return metrics_url.removesuffix("/metrics") + SAMPLES_PATH if metrics_url else ""


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
    own = part_of(own.process, _samples_url(own.url))

    def samples() -> list[Sample]:
        return samples_of(registry, ring.names)

    if prometheus_url:
        LivePage(boards, ring, Prometheus(prometheus_url), samples=samples).register(admin)
        yield
        return
    loop = asyncio.get_running_loop()

    def known_parts() -> list[Part]:
        asked = asyncio.run_coroutine_threadsafe(parts(), loop)
        try:
            return asked.result(PARTS_S_MAX)
        except TimeoutError as error:
            asked.cancel()
            raise PeerGone("the loop does not say who there is") from error

    scraper = Scraper(ring, own, samples, known_parts, admin_token())
    if always:
        scraper.start()
    LivePage(boards, ring, visited=scraper.start, samples=samples, round_s=lambda: scraper.round_s).register(
        admin
    )
    try:
        yield
    finally:
        await asyncio.to_thread(scraper.close)
