"""What `mooncake_master` answers over HTTP: paths, status codes and shapes as measured on upstream's.

GET  /health /role /ha_status /leader
GET  /get_all_keys /query_key?key= /batch_query_keys?keys=a,b           of the default tenant
GET  /get_all_segments /query_segment?segment= /get_segments_detail
GET  /metrics /metrics/summary
GET  /api/v1/segments/status?segment=
POST /api/v1/remove_all
POST /api/v1/drain_jobs {"segments": [...]}     GET  /api/v1/drain_jobs/query?job_id=
                                                POST /api/v1/drain_jobs/cancel?job_id=
GET | PUT | DELETE /api/v1/tenant_quotas?tenant_id=     with --enable_multi_tenants
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec

from kvstore.client.model import Outcome, Place
from kvstore.client.pool import Pool
from kvstore.leader.admin_api import AdminApi, Answer
from kvstore.leader.coordinator import Coordinator
from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerError
from mooncake.core.messages import StoreRecord, StoreStats
from mooncake.dropin.master.drains import JOB_ID, NAMES, Busy, DrainJobs, Job
from mooncake.dropin.master.metrics import PoolNumbers, held_bytes, render, summary
from mooncake.dropin.master.quotas import Quotas, Usage
from mooncake.dropin.store.settings import TENANT, node_of, segment_name
from mooncake.dropin.store.types import INTERNAL, INVALID_PARAMS, OBJECT_NOT_FOUND, TENANT_NOT_EMPTY

SEGMENT_NOT_FOUND = -101
UNAVAILABLE_STATUS, UNAVAILABLE_MODE = -1010, -1011
JOB_NOT_FOUND = -1402
STATS_S = 2.0
LIST_S = 8.0
"""Less than the HTTP server gives an answer."""
SEGMENT_STATES = {"OK": 1, "DRAINING": 2, "DRAINED": 3}
SEGMENTS_MAX = 64
"""Of one drain job: as many as tasks may be open."""
GIB = 1 << 30
Query = Mapping[str, str]
T = TypeVar("T")


class _DrainBody(msgspec.Struct, frozen=True):
    segments: list[str] = []
    target_segments: list[str] = []


class _QuotaBody(msgspec.Struct, frozen=True):
    requested_quota_bytes: int = 0


class MasterHttp:
    """Answers from what the pool says at the time of each request."""

    def __init__(self, pool: Pool, coordinator: Coordinator, quotas: Quotas | None = None) -> None:
        """None of them is closed here. `quotas` None: --enable_multi_tenants is off."""
        self._pool = pool
        self._coordinator = coordinator
        self._directory_api = AdminApi(coordinator)
        self._quotas = quotas
        self._drains = DrainJobs(coordinator)
        self._tenant = TENANT if quotas else ""
        self._gets: dict[str, Callable[[Query], Answer]] = {
            "/health": self._health,
            "/role": lambda _: Answer(200, text=b"leader"),
            "/ha_status": lambda _: Answer(200, text=b"serving"),
            "/leader": lambda _: Answer(
                200, {"present": False, "leader_address": None, "view_version": None}
            ),
            "/get_all_keys": self._all_keys,
            "/query_key": self._query_key,
            "/batch_query_keys": self._query_keys,
            "/get_all_segments": self._all_segments,
            "/query_segment": self._query_segment,
            "/get_segments_detail": self._detail,
            "/api/v1/segments/status": self._status,
        }
        self._calls: dict[tuple[str, str], Callable[[Query, bytes], Awaitable[Answer]]] = {
            ("GET", "/metrics"): self._metrics,
            ("GET", "/metrics/summary"): self._summary,
            ("POST", "/api/v1/remove_all"): self._remove_all,
            ("POST", "/api/v1/drain_jobs"): self._begin_drain,
            ("GET", "/api/v1/drain_jobs/query"): self._query_drain,
            ("POST", "/api/v1/drain_jobs/cancel"): self._cancel_drain,
            ("GET", "/api/v1/tenant_quotas"): self._list_quotas,
            ("PUT", "/api/v1/tenant_quotas"): self._set_quota,
            ("DELETE", "/api/v1/tenant_quotas"): self._remove_quota,
        }

    async def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:
        """Return the answer to one request; never raises one of our errors."""
        method = "GET" if method == "HEAD" else method
        listing = self._gets.get(path) if method == "GET" else None
        call = self._calls.get((method, path))
        try:
            if listing is not None:
                return await asyncio.to_thread(listing, query)
            return await call(query, body) if call else Answer(404, text=b"404 Not Found")
        except (PeerError, CapacityError) as error:
            return Answer(503, {"success": False, "error_code": INTERNAL, "error_message": str(error)})
        except ConfigError as error:  # of a file that this process cannot write
            return _error(500, INTERNAL, str(error))
        except MooncakeError as error:
            return _error(400, INVALID_PARAMS, str(error))

    # ------------------------------------------------------------ the master itself

    @staticmethod
    def _health(_: Query) -> Answer:
        return Answer(
            200,
            {
                "status": "ok", "role": "leader", "ha_state": "serving", "service_ready": True,
                "leader_address": None, "view_version": None,
            },
        )  # fmt: skip

    # ------------------------------------------------------------ keys

    def _all_keys(self, _: Query) -> Answer:
        names = sorted(self._pool.names(tenant=self._tenant, deadline_s=LIST_S))
        return Answer(200, text="".join(f"{name}\n" for name in names).encode() or b"\n")

    def _query_key(self, query: Query) -> Answer:
        (places,) = self._pool.places([query.get("key", "")], tenant=self._tenant, deadline_s=STATS_S)
        if not places:
            return _error(404, OBJECT_NOT_FOUND, "OBJECT_NOT_FOUND")
        return Answer(200, {"success": True, "data": _copies(places, in_memory=True)})

    def _query_keys(self, query: Query) -> Answer:
        keys = [key for key in query.get("keys", "").split(",") if key]
        if not keys:
            return Answer(400, {"success": False, "error": "No keys provided. Use ?keys=key1,key2,..."})
        found: dict[str, Any] = {}
        all_places = self._pool.places(keys, tenant=self._tenant, deadline_s=STATS_S)
        for key, places in zip(keys, all_places, strict=True):
            found[key] = {
                "ok": bool(places),
                "error": None if places else "OBJECT_NOT_FOUND",
                "values": _copies(places, in_memory=True) or None,
                "disk_values": None,
                "local_disk_values": _copies(places, in_memory=False) or None,
                "nof_values": None,
            }
        return Answer(200, {"success": True, "data": found})

    async def _remove_all(self, _: Query, __: bytes) -> Answer:
        tenants = [one.tenant for one in await self._quotas.usage()] if self._quotas else [""]
        count = await asyncio.to_thread(lambda: sum(self._remove_of(tenant) for tenant in tenants))
        return Answer(200, {"success": True, "removed_count": count})

    def _remove_of(self, tenant: str) -> int:
        names = self._pool.names(tenant=tenant, deadline_s=LIST_S)
        results = self._pool.remove(names, tenant=tenant, deadline_s=LIST_S)
        return sum(result.outcome is Outcome.DONE for result in results)

    # ------------------------------------------------------------ segments

    def _segments(self) -> list[tuple[StoreRecord, StoreStats | None]]:
        found: list[tuple[StoreRecord, StoreStats | None]] = []
        for record in sorted(self._pool.records, key=lambda record: record.node):
            try:
                found.append((record, self._pool.stats(record.node, STATS_S)))
            except MooncakeError:
                found.append((record, None))  # it is shown, and that it does not answer
        return found

    def _segment(self, name: str) -> tuple[StoreRecord, StoreStats | None] | None:
        node = node_of(name)
        return next((one for one in self._segments() if one[0].node == node), None)

    def _all_segments(self, _: Query) -> Answer:
        nodes = sorted(record.node for record in self._pool.records)
        return Answer(200, text="".join(f"{segment_name(node)}\n" for node in nodes).encode() or b"\n")

    def _query_segment(self, query: Query) -> Answer:
        found = self._segment(query.get("segment", ""))
        if found is None or found[1] is None:
            return Answer(500, text=b"Failed to query segment")
        name, stats = segment_name(found[0].node), found[1]
        text = f"{name}\nUsed(bytes): {held_bytes(stats)}\nCapacity(bytes) : {stats.capacity_bytes}\n"
        return Answer(200, text=text.encode())

    def _detail(self, _: Query) -> Answer:
        state_of = self._drains.state_of
        segments = [_detail_of(record, stats, state_of(record.node)) for record, stats in self._segments()]
        return Answer(200, {"total_segments": len(segments), "segments": segments})

    def _status(self, query: Query) -> Answer:
        name = query.get("segment", "")
        if not name:
            return _error(400, INVALID_PARAMS, "Missing segment query parameter")
        found = self._segment(name)
        if found is None or found[1] is None:
            return _error(404, SEGMENT_NOT_FOUND, "SEGMENT_NOT_FOUND")
        status = self._drains.state_of(found[0].node)
        state = {"segment": name, "status": SEGMENT_STATES[status], "status_name": status}
        return Answer(200, {"success": True, **state, **_OK})

    # ------------------------------------------------------------ drain jobs

    async def _begin_drain(self, _: Query, body: bytes) -> Answer:
        asked = _decoded(body, _DrainBody)
        if isinstance(asked, Answer):
            return asked
        nodes = list(dict.fromkeys(node_of(name) for name in asked.segments))
        if not 0 < len(nodes) <= SEGMENTS_MAX:
            return _error(400, INVALID_PARAMS, "INVALID_PARAMS")
        known = [record.node for record in self._pool.records]
        targets = [node_of(name) for name in asked.target_segments]
        if any(node not in known for node in (*nodes, *targets)):
            return _error(404, SEGMENT_NOT_FOUND, "SEGMENT_NOT_FOUND")
        if targets:
            return _error(400, INVALID_PARAMS, "target_segments: objects go where there is room")
        job = await self._drains.begin(nodes)
        if isinstance(job, Busy):
            return _error(409, UNAVAILABLE_STATUS, "UNAVAILABLE_IN_CURRENT_STATUS")
        return Answer(200, {"success": True, "job_id": job.job_id, "status": "CREATED", **_OK})

    async def _query_drain(self, query: Query, _: bytes) -> Answer:
        if not JOB_ID.fullmatch(query.get("job_id", "")):
            return _error(400, INVALID_PARAMS, "Missing or invalid job_id")
        job = await self._drains.look(query["job_id"])
        if job is None:
            return _error(404, JOB_NOT_FOUND, "JOB_NOT_FOUND")
        return Answer(200, {"success": True, **_job(job), **_OK})

    async def _cancel_drain(self, query: Query, _: bytes) -> Answer:
        if not JOB_ID.fullmatch(query.get("job_id", "")):
            return _error(400, INVALID_PARAMS, "Missing or invalid job_id")
        job = await self._drains.cancel(query["job_id"])
        if job is None:
            return _error(404, JOB_NOT_FOUND, "JOB_NOT_FOUND")
        if isinstance(job, Busy):
            return _error(409, UNAVAILABLE_STATUS, "UNAVAILABLE_IN_CURRENT_STATUS")
        return Answer(200, {"success": True, "job_id": job.job_id, "status": "CANCELED", **_OK})

    # ------------------------------------------------------------ tenants

    async def _list_quotas(self, query: Query, _: bytes) -> Answer:
        if self._quotas is None:
            return _error(409, UNAVAILABLE_MODE, "UNAVAILABLE_IN_CURRENT_MODE")
        found = [_quota(one) for one in await self._quotas.usage()]
        if (tenant := query.get("tenant_id")) is None:
            return Answer(200, {"success": True, "data": found})
        mine = next((one for one in found if one["tenant_id"] == tenant), None)
        if mine is None:
            return _error(404, OBJECT_NOT_FOUND, "OBJECT_NOT_FOUND")
        return Answer(200, {"success": True, "data": mine})

    async def _set_quota(self, query: Query, body: bytes) -> Answer:
        if self._quotas is None:
            return _error(409, UNAVAILABLE_MODE, "UNAVAILABLE_IN_CURRENT_MODE")
        if not query.get("tenant_id"):
            return _error(400, INVALID_PARAMS, "Missing or invalid tenant_id")
        asked = _decoded(body, _QuotaBody)
        if isinstance(asked, Answer):
            return asked
        usage = await self._quotas.set(query["tenant_id"], asked.requested_quota_bytes)
        return Answer(200, {"success": True, "data": _quota(usage)})

    async def _remove_quota(self, query: Query, _: bytes) -> Answer:
        if self._quotas is None:
            return _error(409, UNAVAILABLE_MODE, "UNAVAILABLE_IN_CURRENT_MODE")
        if not query.get("tenant_id"):
            return _error(400, INVALID_PARAMS, "Missing or invalid tenant_id")
        usage = await self._quotas.remove(query["tenant_id"])
        if usage is None:
            return _error(404, OBJECT_NOT_FOUND, "OBJECT_NOT_FOUND")
        if usage.used_bytes:
            return _error(409, TENANT_NOT_EMPTY, "TENANT_NOT_EMPTY")
        return Answer(200, {"success": True, "data": None})

    # ------------------------------------------------------------ metrics

    async def _numbers(self) -> PoolNumbers:
        segments = await asyncio.to_thread(self._segments)
        stats = {segment_name(record.node): stats for record, stats in segments if stats}
        tenants = await self._quotas.usage() if self._quotas else ()
        return PoolNumbers(stats, len(self._coordinator.directory), tenants)

    async def _metrics(self, _: Query, __: bytes) -> Answer:
        own = await self._directory_api.answer("GET", "/metrics", {}, b"")
        return Answer(200, text=render(await self._numbers()).encode() + own.text)

    async def _summary(self, _: Query, __: bytes) -> Answer:
        return Answer(200, text=summary(await self._numbers()).encode())


_OK = {"error_code": 0, "error_message": ""}


def _job(job: Job) -> dict[str, Any]:
    progress = list(job.progress.values())
    done, failed = sum(one.done for one in progress), sum(one.failed for one in progress)
    return {
        "job_id": job.job_id,
        "type": 0,
        "type_name": "DRAIN",
        "status": job.status,
        "status_name": NAMES[job.status],
        "created_at_ms_epoch": job.created_ms,
        "last_updated_at_ms_epoch": job.updated_ms,
        "segments": [segment_name(node) for node in job.nodes],
        "succeeded_units": done,
        "failed_units": failed,
        "blocked_units": 0,
        "active_units": sum(one.total for one in progress) - done - failed if job.running else 0,
        "migrated_bytes": job.used_bytes - job.left_bytes,
        "message": job.message(),
    }


def _quota(usage: Usage) -> dict[str, Any]:
    return {
        "tenant_id": usage.tenant,
        "requested_quota_bytes": usage.quota_bytes,
        "effective_quota_bytes": usage.effective_bytes,
        "charged_bytes": usage.used_bytes,
        "admission_closed": False,
        "over_quota": usage.used_bytes > usage.effective_bytes,
        "has_explicit_policy": True,
    }


def _decoded(body: bytes, kind: type[T]) -> T | Answer:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return _error(400, INVALID_PARAMS, f"Invalid JSON body: {error}")


def _copies(places: list[Place], *, in_memory: bool) -> list[dict[str, Any]]:
    return [
        {
            "size_": place.size_bytes,
            "buffer_address_": place.address,
            "protocol_": "tcp",
            "transport_endpoint_": place.transfer,
        }
        for place in places
        if place.in_memory is in_memory
    ]


def _detail_of(record: StoreRecord, stats: StoreStats | None, state: str) -> dict[str, Any]:
    used = held_bytes(stats) if stats else 0
    return {
        "segment_name": segment_name(record.node),
        "segment_id": record.epoch,
        "client_id": record.epoch,
        "base_address": hex(record.segment_address),
        "size_bytes": record.capacity_bytes,
        "size_human": f"{record.capacity_bytes / GIB:f} GiB",
        "te_endpoint": record.transfer,
        "protocol": "tcp",
        "status": state if stats else "UNREACHABLE",
        "allocator_used_bytes": used,
        "allocator_capacity_bytes": record.capacity_bytes,
        "allocator_usage_percent": 100 * used / max(1, record.capacity_bytes),
    }


def _error(status: int, code: int, message: str) -> Answer:
    return Answer(status, {"success": False, "error_code": code, "error_message": message})
