"""How a process gets on with its metadata store: mooncake_metadata_*, of whatever store it is.

One meter per process: a few calls a second go through it, from one loop or another.
"""

import itertools
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import cache
from typing import TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mooncake.core.errors import MooncakeError, RequestError
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_messages import MetaChanges, MetaEntries, MetaPutResult

T = TypeVar("T")

OPS = ("get", "put", "delete", "grant", "keep_alive", "revoke", "watch")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0)
"""Bounds up to the deadline of a call."""


class MetadataMeter:
    """Counts of one process."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        self._lock = threading.Lock()
        self.results: Counter[tuple[str, str]] = Counter()  # op, ok | error
        self.counts = {op: [0] * (len(SECONDS) + 1) for op in OPS}
        self.seconds = dict.fromkeys(OPS, 0.0)
        self.connected = False
        """Whether the last answer was one."""
        self.gaps = 0
        self.leases = 0
        self._confirmed_s: dict[int, float] = {}

    def asked(self, op: str, seconds: float, *, ok: bool) -> None:
        """An answer came, or none."""
        with self._lock:
            self.results[op, "ok" if ok else "error"] += 1
            self.counts[op][bisect_left(SECONDS, seconds)] += 1
            self.seconds[op] += seconds
            self.connected = ok

    def watched(self, *, gap: bool) -> None:
        """A batch of changes came; `gap`: everything has to be listed anew."""
        self.connected = True
        self.gaps += gap

    def confirmed(self, lease_id: int, now_s: float, *, new: bool) -> None:
        """The store says that a lease lives."""
        with self._lock:
            self._confirmed_s[lease_id] = now_s
            self.leases += new

    def ended(self, lease_id: int) -> None:
        """A lease is no more."""
        with self._lock:
            self._confirmed_s.pop(lease_id, None)

    def lease_age_s(self, now_s: float) -> float | None:
        """Return since when the lease that has waited longest was not confirmed; None: there is none."""
        with self._lock:
            return max((now_s - at_s for at_s in self._confirmed_s.values()), default=None)


class MeteredMetadata:
    """A MetadataStore that counts what is asked of another one."""

    def __init__(self, store: MetadataStore, meter: MetadataMeter) -> None:
        """`store` is closed by `close`."""
        self._store = store
        self._meter = meter

    async def get(self, prefix: str) -> MetaEntries:
        """See MetadataStore."""
        return await self._timed("get", self._store.get(prefix))

    async def put(
        self, key: str, value: bytes, lease_id: int = 0, if_revision: int | None = None
    ) -> MetaPutResult:
        """See MetadataStore."""
        try:
            return await self._timed("put", self._store.put(key, value, lease_id, if_revision))
        except RequestError:
            self._meter.ended(lease_id)  # most likely it is over; one that lives is confirmed when it is kept
            raise

    async def delete(self, key: str) -> None:
        """See MetadataStore."""
        await self._timed("delete", self._store.delete(key))

    async def grant(self, ttl_s: float) -> int:
        """See MetadataStore."""
        lease_id = await self._timed("grant", self._store.grant(ttl_s))
        self._meter.confirmed(lease_id, time.monotonic(), new=True)
        return lease_id

    async def keep_alive(self, lease_id: int) -> bool:
        """See MetadataStore."""
        begun_s = time.monotonic()
        alive = await self._timed("keep_alive", self._store.keep_alive(lease_id))
        if alive:
            self._meter.confirmed(lease_id, begun_s, new=False)
        else:
            self._meter.ended(lease_id)
        return alive

    async def revoke(self, lease_id: int) -> None:
        """See MetadataStore."""
        self._meter.ended(lease_id)
        await self._timed("revoke", self._store.revoke(lease_id))

    async def watch(self, prefix: str, from_revision: int, epoch: str = "") -> AsyncIterator[MetaChanges]:
        """See MetadataStore."""
        begun_s = time.monotonic()
        first = True
        try:
            async for batch in self._store.watch(prefix, from_revision, epoch):
                if first:
                    self._meter.asked("watch", time.monotonic() - begun_s, ok=True)
                    first = False
                self._meter.watched(gap=batch.compacted)
                yield batch
        except MooncakeError:
            self._meter.asked("watch", time.monotonic() - begun_s if first else 0.0, ok=False)
            raise

    async def close(self) -> None:
        """See MetadataStore."""
        await self._store.close()

    async def _timed(self, op: str, asked: Awaitable[T]) -> T:
        begun_s, ok = time.monotonic(), False
        try:
            answer = await asked
            ok = True
        finally:
            self._meter.asked(op, time.monotonic() - begun_s, ok=ok)
        return answer


class MetadataCollector(Collector):
    """The Prometheus view of a meter."""

    def __init__(self, meter: MetadataMeter, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic seconds."""
        self._meter, self._clock = meter, clock

    def collect(self) -> Iterator[Metric]:
        """Yield one family per number."""
        meter = self._meter
        requests = CounterMetricFamily(
            "mooncake_metadata_requests",
            "Questions to the metadata store by what came of them.",
            labels=["op", "result"],
        )
        took = HistogramMetricFamily(
            "mooncake_metadata_request_seconds",
            "From a question to the metadata store to its answer; of a watch, to its first.",
            labels=["op"],
        )
        bounds = [*(f"{bound:g}" for bound in SECONDS), "+Inf"]
        for op in OPS:
            for result in ("ok", "error"):
                requests.add_metric([op, result], meter.results[op, result])
            counts = itertools.accumulate(list(meter.counts[op]))
            took.add_metric([op], list(zip(bounds, counts, strict=True)), sum_value=meter.seconds[op])
        yield requests
        yield took
        yield GaugeMetricFamily(
            "mooncake_metadata_connected", "1 if the store's last answer was one.", meter.connected
        )
        yield CounterMetricFamily(
            "mooncake_metadata_watch_gaps",
            "Times that what is watched had to be listed anew: history was gone, or the store was another.",
            meter.gaps,
        )
        yield CounterMetricFamily(
            "mooncake_metadata_leases", "Leases granted: more than a few mean that the store forgot us.",
            meter.leases,
        )  # fmt: skip
        age = GaugeMetricFamily(
            "mooncake_metadata_lease_age_seconds",
            "Since the store last confirmed this process's leases, the oldest of them; absent without one.",
        )
        age_s = meter.lease_age_s(self._clock())
        if age_s is not None:
            age.add_metric([], age_s)
        yield age


@cache
def process_meter() -> MetadataMeter:
    """Return this process's."""
    return MetadataMeter()


def metered(store: MetadataStore) -> MetadataStore:
    """Return `store`, counted by this process's meter."""
    return MeteredMetadata(store, process_meter())
