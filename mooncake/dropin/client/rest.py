"""The REST service's endpoints: paths, methods, bodies and status codes as measured on upstream's service.

PUT    /api/put                  {"key", "value"}: a text
GET    /api/get/KEY              the bytes
GET    /api/exist/KEY            {"exists"}
DELETE /api/remove/KEY  /api/remove_all
POST   /api/mount                {"size"} -> {"segment_ids", "allocated_size"}
POST   /api/unmount              {"segment_ids", "grace_period_seconds"}
POST   /api/mount_shm            {"name", "size", "offset"}: memory of /dev/shm
POST   /api/unmount_shm          {"segment_ids", "grace_period_seconds"}
POST   /api/unmount_local_disk   {"grace_period_seconds"}
POST   /api/reconfigure          {"mode": "decode", "path", "size", "offset"} | {"mode": "prefill"}

KEY is percent-encoded, one piece of the path. A missing object is 404, and nothing else is: where somebody
who has to be asked does not answer, it is 500, as for every call of the store that fails.
"""

import threading
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import structlog

from mooncake.core.errors import MooncakeError, RequestError
from mooncake.dropin.client.web import BYTES, TEXT, Reply, json_reply
from mooncake.store import MooncakeDistributedStore

BODY_BYTES_MAX = 100 << 20
"""Upstream's limit."""
GRACE_S_MAX = 3600
STEP_BYTES = 16 << 20
"""Memory is given in multiples of it, as upstream does."""
SHARED_MEMORY = "/dev/shm/"
PREFILL, DECODE = "prefill", "decode"
SUCCESS = {"status": "success"}
UNMOUNT_FAILED = "Unmount failed for one or more segments"

log = structlog.get_logger(__name__)

Body = dict[str, Any]


class Rest:
    """Answers requests by calls of one store. Thread-safe."""

    def __init__(self, store: MooncakeDistributedStore) -> None:
        """`store` is set up, and not closed here."""
        self._store = store
        self._lock = threading.Lock()  # of what is mounted: changes of the mode are one behind the other
        self._mode = PREFILL
        self._mounted: list[str] = []  # by reconfigure and mount_shm
        self._memory: tuple[str, Any, Any] = ("", 0, 0)  # of the mode: path, size, offset
        self._bodies: Mapping[str, tuple[str, Callable[[Body], Reply]]] = {
            "/api/put": ("PUT", self._put),
            "/api/mount": ("POST", self._mount),
            "/api/unmount": ("POST", self._unmount),
            "/api/mount_shm": ("POST", self._mount_shm),
            "/api/unmount_shm": ("POST", self._unmount_shm),
            "/api/unmount_local_disk": ("POST", self._unmount_local_disk),
            "/api/reconfigure": ("POST", self._reconfigure),
        }
        self._keys: Mapping[str, tuple[str, Callable[[str], Reply]]] = {
            "get": ("GET", self._get),
            "exist": ("GET", self._exist),
            "remove": ("DELETE", self._remove),
        }

    def answer(self, method: str, path: str, body: bytes) -> Reply:
        """Return the answer to one request; see web.Answer."""
        method = "GET" if method == "HEAD" else method
        try:
            if path == "/api/remove_all":
                return self._remove_all() if method == "DELETE" else _not_allowed("DELETE")
            if path in self._bodies:
                allowed, handle = self._bodies[path]
                return handle(_body(body)) if method == allowed else _not_allowed(allowed)
            match path.split("/"):
                case ["", "api", what, key] if what in self._keys and key:
                    allowed, act = self._keys[what]
                    return act(urllib.parse.unquote(key)) if method == allowed else _not_allowed(allowed)
        except RequestError as error:
            return _error(400, str(error))
        except MooncakeError as error:
            log.error("mc_store_rest_server: failed", path=path, reason=str(error))
            return _error(500, str(error))
        return Reply(404, b"404: Not Found", TEXT)

    # ------------------------------------------------------------ objects

    def _put(self, body: Body) -> Reply:
        key, value = body.get("key"), body.get("value")
        if not key or value is None:
            return _error(400, "Missing key or value")
        if not isinstance(key, str) or not isinstance(value, str):
            return _error(400, "key and value must be texts")
        code = self._store.put(key, value.encode("utf-8", "surrogatepass"))
        return json_reply(200, SUCCESS) if code == 0 else _error(500, "PUT operation failed")

    def _get(self, key: str) -> Reply:
        value = self._store.get(key)
        if value:
            return Reply(200, value, BYTES)
        return _error(404, "Key not found")

    def _exist(self, key: str) -> Reply:
        there = self._store.is_exist(key)
        return _error(500, "Exist check failed") if there < 0 else json_reply(200, {"exists": there > 0})

    def _remove(self, key: str) -> Reply:
        code = self._store.remove(key)
        return json_reply(200, SUCCESS) if code == 0 else _error(500, "Remove operation failed")

    def _remove_all(self) -> Reply:
        count = self._store.remove_all()
        if count < 0:
            return _error(500, "RemoveAll operation failed")
        return json_reply(200, {"status": f"success removed {count} keys"})

    # ------------------------------------------------------------ memory

    def _mount(self, body: Body) -> Reply:
        size = body.get("size")
        if type(size) is not int or size <= 0:
            return _error(400, "Invalid size, must be a positive integer")
        done = self._store.allocate_and_mount_segment(size + -size % STEP_BYTES)
        if done["ret"] != 0:
            return _error(500, f"Allocate and mount failed, ret={done['ret']}")
        kept = {"segment_ids": list(done["segment_ids"]), "allocated_size": done["allocated_size"]}
        return json_reply(200, {**SUCCESS, **kept})

    def _unmount(self, body: Body) -> Reply:
        code = self._store.unmount_and_free_segment(_segment_ids(body), _grace_s(body))
        return json_reply(200, SUCCESS) if code == 0 else _error(500, f"Unmount and free failed, ret={code}")

    def _mount_shm(self, body: Body) -> Reply:
        path, size = _shared_path(body.get("name")), body.get("size")
        if not path or size is None:
            return _error(400, "Missing or invalid name or size")
        with self._lock:
            ids = self._give(path, size, body.get("offset", 0))
            if not ids:
                return _error(500, "Mount failed, ret=-1")
            self._mounted += ids
        return json_reply(200, {**SUCCESS, "segment_ids": ids})

    def _unmount_shm(self, body: Body) -> Reply:
        ids, grace_s = _segment_ids(body), _grace_s(body)
        with self._lock:
            failed = [one for one in ids if self._store.unmount_segment([one], grace_s) != 0]
            self._mounted = [one for one in self._mounted if one not in ids or one in failed]
            if not self._mounted:
                self._mode = PREFILL
        if failed:
            return json_reply(500, {"error": UNMOUNT_FAILED, "failed_segment_ids": failed})
        return json_reply(200, SUCCESS)

    def _unmount_local_disk(self, body: Body) -> Reply:
        code = self._store.unmount_local_disk_segment(_grace_s(body))
        return (
            json_reply(200, SUCCESS) if code == 0 else _error(500, f"Unmount local disk failed, ret={code}")
        )

    def _reconfigure(self, body: Body) -> Reply:
        mode = str(body.get("mode", "")).lower()
        with self._lock:
            if mode == PREFILL:
                failed = [one for one in self._mounted if self._store.unmount_segment([one]) != 0]
                self._mounted, self._mode = [], PREFILL
                if failed:
                    return json_reply(500, {"error": UNMOUNT_FAILED, "failed_segment_ids": failed})
                return json_reply(200, {**SUCCESS, "mode": PREFILL})
            if mode == DECODE:
                return self._to_decode(body)
        return _error(400, "Invalid mode. Use 'decode' or 'prefill'")

    def _to_decode(self, body: Body) -> Reply:
        """Give the new memory first, then take the old back: a failure changes nothing."""
        path, size = body.get("path"), body.get("size")
        if not path or size is None:
            return _error(400, "Missing path or size for decode mode")
        memory = (str(path), size, body.get("offset", 0))
        if self._mode == DECODE and memory == self._memory:  # two segments cannot have the same bytes
            return json_reply(200, {**SUCCESS, "mode": DECODE, "segment_ids": self._mounted})
        ids = self._give(*memory)
        if not ids:
            kept = "keeping previous decode segments" if self._mounted else "rolled back to prefill"
            return json_reply(500, {"error": f"Mount failed, ret=-1; {kept}", "mode": self._mode})
        for old in self._mounted:
            if self._store.unmount_segment([old]) != 0:
                log.warning("mc_store_rest_server: not unmounted", segment=old)
        self._mounted, self._mode, self._memory = ids, DECODE, memory
        return json_reply(200, {**SUCCESS, "mode": DECODE, "segment_ids": ids})

    def _give(self, path: str, size: Any, offset: Any) -> list[str]:
        """Give memory of a file to the pool; return the segment's id, none if that cannot be."""
        if type(size) is not int or type(offset) is not int or size <= 0 or offset < 0:
            raise RequestError("size and offset must be whole numbers")
        done = self._store.mount_segment(path, size, offset)
        return list(done["segment_ids"]) if done["ret"] == 0 else []


def _body(data: bytes) -> Body:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("Malformed JSON body") from error
    if not isinstance(value, dict):
        raise RequestError("Request body must be a JSON object")
    return value


def _segment_ids(body: Body) -> list[str]:
    ids = body.get("segment_ids")
    ids = [ids] if isinstance(ids, str) else ids
    if not ids or not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise RequestError("Missing segment_ids")
    return ids


def _grace_s(body: Body) -> int:
    grace_s = body.get("grace_period_seconds", 0)
    if type(grace_s) is not int or not 0 <= grace_s <= GRACE_S_MAX:
        what = f"must be a non-negative integer no greater than {GRACE_S_MAX}"
        raise RequestError(f"Invalid grace_period_seconds, {what}")
    return grace_s


def _shared_path(name: Any) -> str:
    """Return the path of named shared memory; "" if that is no name."""
    plain = name.removeprefix("/") if isinstance(name, str) else ""
    return SHARED_MEMORY + plain if plain not in ("", ".", "..") and "/" not in plain else ""


def _error(status: int, text: str) -> Reply:
    return json_reply(status, {"error": text})


def _not_allowed(method: str) -> Reply:
    return Reply(405, b"405: Method Not Allowed", TEXT, method)
