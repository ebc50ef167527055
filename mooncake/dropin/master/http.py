"""What `mooncake_master` answers over HTTP: paths, status codes and shapes as measured on upstream's.

GET  /health /role /ha_status /leader
GET  /get_all_keys /query_key?key= /batch_query_keys?keys=a,b           of the default tenant
GET  /get_all_segments /query_segment?segment= /get_segments_detail
GET  /metrics /metrics/summary
GET  /api/v1/segments/status?segment=
POST /api/v1/remove_all
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from kvstore.client.model import Outcome, Place
from kvstore.client.pool import Pool
from kvstore.leader.admin_api import Answer
from mooncake.core.config import format_size
from mooncake.core.errors import MooncakeError, PeerError
from mooncake.core.messages import StoreRecord, StoreStats
from mooncake.dropin.store.start import node_of, segment_name
from mooncake.dropin.store.types import INVALID_PARAMS, OBJECT_NOT_FOUND

SEGMENT_NOT_FOUND = -101
UNAVAILABLE = -1011
STATS_S = 2.0
LIST_S = 8.0
"""Less than the HTTP server gives an answer."""
SEGMENT_OK = 1
GIB = 1 << 30
Query = Mapping[str, str]


class MasterHttp:
    """Answers from what the pool says at the time of each request."""

    def __init__(self, pool: Pool) -> None:
        """`pool` is not closed here."""
        self._pool = pool
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
            "/api/v1/tenant_quotas": lambda _: _error(409, UNAVAILABLE, "UNAVAILABLE_IN_CURRENT_MODE"),
            "/metrics": self._metrics,
            "/metrics/summary": self._summary,
        }

    async def answer(self, method: str, path: str, query: Query, body: bytes) -> Answer:  # noqa: ARG002
        """Return the answer to one request; never raises one of our errors."""
        handler = self._gets.get(path) if method in ("GET", "HEAD") else None
        if (method, path) == ("POST", "/api/v1/remove_all"):
            handler = self._remove_all
        if handler is None:
            return Answer(404, text=b"404 Not Found")
        try:
            return await asyncio.to_thread(handler, query)
        except PeerError as error:
            return Answer(503, {"success": False, "error_message": str(error)})
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
        names = sorted(self._pool.names(deadline_s=LIST_S))
        return Answer(200, text="".join(f"{name}\n" for name in names).encode() or b"\n")

    def _query_key(self, query: Query) -> Answer:
        (places,) = self._pool.places([query.get("key", "")], deadline_s=STATS_S)
        if not places:
            return _error(404, OBJECT_NOT_FOUND, "OBJECT_NOT_FOUND")
        return Answer(200, {"success": True, "data": _copies(places, in_memory=True)})

    def _query_keys(self, query: Query) -> Answer:
        keys = [key for key in query.get("keys", "").split(",") if key]
        if not keys:
            return Answer(400, {"success": False, "error": "No keys provided. Use ?keys=key1,key2,..."})
        found: dict[str, Any] = {}
        for key, places in zip(keys, self._pool.places(keys, deadline_s=STATS_S), strict=True):
            found[key] = {
                "ok": bool(places),
                "error": None if places else "OBJECT_NOT_FOUND",
                "values": _copies(places, in_memory=True) or None,
                "disk_values": None,
                "local_disk_values": _copies(places, in_memory=False) or None,
                "nof_values": None,
            }
        return Answer(200, {"success": True, "data": found})

    def _remove_all(self, _: Query) -> Answer:
        names = self._pool.names(deadline_s=LIST_S)
        results = self._pool.remove(names, deadline_s=LIST_S)
        count = sum(result.outcome is Outcome.DONE for result in results)
        return Answer(200, {"success": True, "removed_count": count})

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
        text = f"{name}\nUsed(bytes): {stats.used_bytes}\nCapacity(bytes) : {stats.capacity_bytes}\n"
        return Answer(200, text=text.encode())

    def _detail(self, _: Query) -> Answer:
        segments = [_detail_of(record, stats) for record, stats in self._segments()]
        return Answer(200, {"total_segments": len(segments), "segments": segments})

    def _status(self, query: Query) -> Answer:
        name = query.get("segment", "")
        if not name:
            return _error(400, INVALID_PARAMS, "Missing segment query parameter")
        found = self._segment(name)
        if found is None or found[1] is None:
            return _error(404, SEGMENT_NOT_FOUND, "SEGMENT_NOT_FOUND")
        state = {"segment": name, "status": SEGMENT_OK, "status_name": "OK"}
        return Answer(200, {"success": True, **state, "error_code": 0, "error_message": ""})

    # ------------------------------------------------------------ metrics

    def _metrics(self, _: Query) -> Answer:
        stats = [stats for _, stats in self._segments() if stats]
        gauges = {
            "master_allocated_bytes": sum(one.used_bytes for one in stats),
            "master_total_capacity_bytes": sum(one.capacity_bytes for one in stats),
            "master_key_count": sum(one.blocks for one in stats),
            "master_active_clients": len(stats),
        }
        lines = [f"# TYPE {name} gauge\n{name} {value}\n" for name, value in gauges.items()]
        return Answer(200, text="".join(lines).encode())

    def _summary(self, _: Query) -> Answer:
        stats = [stats for _, stats in self._segments() if stats]
        used, room = sum(one.used_bytes for one in stats), sum(one.capacity_bytes for one in stats)
        keys, percent = sum(one.blocks for one in stats), 100 * used / max(1, room)
        text = (
            "role=leader, state=serving, service_ready=true, master={Mem Storage: "
            f"{format_size(used)} / {format_size(room)} ({percent:.1f}%) | Keys: {keys} | "
            f"Clients: {len(stats)}}}"
        )
        return Answer(200, text=text.encode())


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


def _detail_of(record: StoreRecord, stats: StoreStats | None) -> dict[str, Any]:
    used = stats.used_bytes if stats else 0
    return {
        "segment_name": segment_name(record.node),
        "segment_id": record.epoch,
        "client_id": record.epoch,
        "base_address": hex(record.segment_address),
        "size_bytes": record.capacity_bytes,
        "size_human": f"{record.capacity_bytes / GIB:f} GiB",
        "te_endpoint": record.transfer,
        "protocol": "tcp",
        "status": "OK" if stats else "UNREACHABLE",
        "allocator_used_bytes": used,
        "allocator_capacity_bytes": record.capacity_bytes,
        "allocator_usage_percent": 100 * used / max(1, record.capacity_bytes),
    }


def _error(status: int, code: int, message: str) -> Answer:
    return Answer(status, {"success": False, "error_code": code, "error_message": message})
