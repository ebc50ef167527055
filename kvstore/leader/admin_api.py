"""What the admin HTTP of a directory answers, without a socket.

    GET    /health                                     200, or 503 with the reasons
    GET    /segments                                   one entry per node
    GET    /keys?node=&prefix=&limit=&cursor=          keys in order, a page at a time
    GET    /keys/{hex}                                 who holds one key
    GET    /tasks, /tasks/{id}
    POST   /tasks/copy | move | drain | undrain | hot | cool     with a JSON object
    DELETE /tasks/{id}
    GET    /metrics                                    Prometheus text

Errors are {"error": what is wrong, where, what to do}: 400 bad input, 404 unknown, 405 wrong method,
409 another directory leads (`leader` is its URL), 503 busy or another process is away.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from kvstore.directory import messages
from kvstore.directory.directory import Mode
from kvstore.directory.metrics import DirectoryView
from kvstore.leader.task_types import Progress
from mooncake.core.errors import CapacityError, MooncakeError, NotLeader, PeerError, RequestError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import StoreStats

if TYPE_CHECKING:
    from kvstore.leader.coordinator import Coordinator

KEYS_PAGE = 100
KEYS_PAGE_MAX = 1_000
"""70 KB of JSON."""
CENSUS_S = 10.0
"""Replicas are counted at most this often: 0.1 s of a core for 1 M blocks."""

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """One HTTP answer; `text` instead of JSON if it is not empty."""

    status: int
    body: Any = None
    text: bytes = b""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Node(_Body, frozen=True):
    node: str
    size_bytes: int = 0


class _Keys(_Body, frozen=True):
    keys: list[str]


class _Copy(_Keys, frozen=True):
    target: str


class _Move(_Keys, frozen=True):
    source: str
    target: str


class _Hot(_Keys, frozen=True):
    copies: int
    size_bytes: int


class AdminApi:
    """Answers requests on the coordinator's loop."""

    def __init__(self, coordinator: "Coordinator") -> None:
        """It is read at every request."""
        self._coordinator = coordinator
        self._listings = {
            "health": self._health,
            "segments": self._segments,
            "keys": self._keys,
            "tasks": self._all_tasks,
            "metrics": self._metrics,
        }
        self._scanning = asyncio.Lock()
        self._census: dict[int, int] = {}
        self._census_s = -CENSUS_S

    async def answer(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> Answer:
        """Return the answer to one request; never raises one of our errors."""
        try:
            return await self._route(method, path.rstrip("/"), query, body)
        except RequestError as error:
            return Answer(400, {"error": str(error)})
        except NotLeader as error:
            leader = await self._coordinator.leader_record()
            return Answer(409, {"error": str(error), "leader": leader.admin_url if leader else ""})
        except (CapacityError, PeerError) as error:
            return Answer(503, {"error": str(error)})
        except MooncakeError as error:
            return Answer(500, {"error": str(error)})

    async def _route(self, method: str, path: str, query: Mapping[str, str], body: bytes) -> Answer:
        match (method, path.split("/")[1:]):
            case ("GET", [what]) if what in self._listings:
                return await self._listings[what](query)
            case ("GET", ["keys", key]):
                return self._key(key)
            case ("POST", ["tasks", what]) if what in _POSTS:
                return _told(await self._coordinator.handle(_request(what, body)))
            case ("GET" | "DELETE", ["tasks", task_id]) if task_id not in _POSTS:
                number = _number(task_id, "task id")
                return await (self._task(number) if method == "GET" else self._cancel(number))
            case (_, [what, *_]) if what in self._listings:
                return Answer(405, {"error": f"{method} {path} is not offered"})
        return Answer(404, {"error": f"no such path {path!r}: /{', /'.join(self._listings)}"})

    # ------------------------------------------------------------ what there is

    async def _health(self, _: Mapping[str, str]) -> Answer:
        service, directory = self._coordinator.service, self._coordinator.directory
        service.see_members()
        reasons = [] if service.metadata_connected else ["the metadata store does not answer"]
        if service.metadata_connected and not directory.members_known:
            reasons.append("the list of stores is not complete yet")
        reasons += [
            f"node {status.node}: {status.reason} ({status.lag_s:.1f} s)"
            for status in directory.status(self._coordinator.now_s())
            if status.mode is not Mode.EXACT
        ]
        leader = self._coordinator.election.leader
        return Answer(
            503 if reasons else 200,
            {
                "healthy": not reasons,
                "reasons": reasons,
                "directory": self._coordinator.config.name,
                "mode": directory.mode(),
                "entries": len(directory),
                "leader": leader.candidate if leader else "",
                "leads": self._coordinator.leading is not None,
            },
        )

    async def _segments(self, _: Mapping[str, str]) -> Answer:
        coordinator = self._coordinator
        found = []
        for status in coordinator.directory.status(self._coordinator.now_s()):
            stats = coordinator.polls.stats.get(status.node)
            record = coordinator.clients.records.get(status.node)
            memory = {
                "tier": "memory",
                "capacity_bytes": stats.capacity_bytes if stats else record.capacity_bytes if record else 0,
                "used_bytes": stats.used_bytes if stats else None,
                "blocks": stats.blocks if stats else None,
            }
            found.append(
                {
                    **{name: getattr(status, name) for name in ("node", "epoch", "mode", "lag_s", "reason")},
                    **{name: memory[name] for name in ("capacity_bytes", "used_bytes", "blocks")},
                    "tiers": [memory, *([_ssd(stats)] if stats and stats.ssd_capacity_bytes else [])],
                    "transfer": record.transfer if record else "",
                }
            )
        return Answer(200, {"segments": found})

    async def _keys(self, query: Mapping[str, str]) -> Answer:
        if unknown := [name for name in query if name not in ("node", "prefix", "limit", "cursor")]:
            raise RequestError(f"unknown parameter {unknown[0]!r}: node, prefix, limit, cursor")
        node = query.get("node", "")
        prefix = _hex(query.get("prefix", ""), "prefix")
        after = _hex(query.get("cursor", ""), "cursor")
        limit = _number(query.get("limit", str(KEYS_PAGE)), "limit")
        if not 1 <= limit <= KEYS_PAGE_MAX:
            raise RequestError(f"limit={limit}: 1 to {KEYS_PAGE_MAX}")
        directory = self._coordinator.directory
        if node and node not in [status.node for status in directory.status(0.0)]:
            return Answer(404, {"error": f"no node {node!r} in the pool: see /segments"})
        if self._scanning.locked():
            raise CapacityError("another listing of keys is under way: ask again in a second")
        async with self._scanning:
            listing = directory.listing(node)
            keys = await asyncio.to_thread(listing.page, limit + 1, prefix, after)
        more, keys = len(keys) > limit, keys[:limit]
        holders = zip(keys, directory.replicas(keys), strict=True)
        rows = [{"key": key.hex(), "nodes": list(nodes)} for key, nodes in holders]
        return Answer(200, {"keys": rows, "cursor": keys[-1].hex() if more else ""})

    def _key(self, text: str) -> Answer:
        key = _key_of(text)
        (nodes,) = self._coordinator.directory.replicas([key])
        if not nodes:
            mode = self._coordinator.directory.mode()
            return Answer(404, {"error": f"no node is known to hold {text} (the directory is {mode})"})
        (sure,) = self._coordinator.directory.replicas([key], exact_only=True)
        rows = [{"node": node, "sure": node in sure} for node in nodes]
        return Answer(200, {"key": text.lower(), "nodes": rows})

    # ------------------------------------------------------------ tasks

    async def _tasks(self, task_id: int | None) -> list[dict[str, Any]]:
        reply = await self._coordinator.handle(messages.TaskProgress(task_id))
        assert isinstance(reply, messages.TasksAre)
        return [msgspec.structs.asdict(task) for task in reply.tasks]

    async def _all_tasks(self, _: Mapping[str, str]) -> Answer:
        return Answer(200, {"tasks": await self._tasks(None)})

    async def _task(self, task_id: int) -> Answer:
        found = await self._tasks(task_id)
        return Answer(200, found[0]) if found else _no_task(task_id)

    async def _cancel(self, task_id: int) -> Answer:
        if not await self._tasks(task_id):
            return _no_task(task_id)
        return _told(await self._coordinator.handle(messages.CancelTask(task_id)))

    # ------------------------------------------------------------ metrics

    async def _metrics(self, _: Mapping[str, str]) -> Answer:
        coordinator = self._coordinator
        if self._coordinator.now_s() - self._census_s >= CENSUS_S and not self._scanning.locked():
            async with self._scanning:
                self._census = await asyncio.to_thread(coordinator.directory.listing().replica_counts)
                self._census_s = self._coordinator.now_s()
        view = self._view()
        return Answer(200, text=await asyncio.to_thread(coordinator.metrics.render, view))

    def _view(self) -> DirectoryView:
        coordinator = self._coordinator
        coordinator.service.see_members()
        directory, leading = coordinator.directory, coordinator.leading
        status = directory.status(self._coordinator.now_s())
        tasks: list[Progress] = leading.tasks.all_progress() if leading else []
        return DirectoryView(
            mode=directory.mode(),
            lag_s=directory.lag_s(self._coordinator.now_s()),
            entries=len(directory),
            nodes=len(status),
            nodes_exact=len([node for node in status if node.mode is Mode.EXACT]),
            sweeps=directory.sweeps,
            overflows=directory.overflows,
            leader=leading is not None,
            term=leading.term.number if leading else 0,
            hot_keys=leading.tasks.hot_keys if leading else 0,
            tasks=tasks,
            replicas=self._census,
        )


_POSTS = ("copy", "move", "drain", "undrain", "hot", "cool")


def _ssd(stats: StoreStats) -> dict[str, Any]:
    used = {name: getattr(stats, f"ssd_{name}") for name in ("capacity_bytes", "used_bytes", "blocks")}
    return {"tier": "ssd", **used}


def _request(what: str, body: bytes) -> messages.TaskRequest:
    match what:
        case "copy":
            copy = _decode(body, _Copy)
            return messages.CopyKeys([_key_of(key) for key in copy.keys], copy.target)
        case "move":
            move = _decode(body, _Move)
            return messages.MoveKeys([_key_of(key) for key in move.keys], move.source, move.target)
        case "hot":
            hot = _decode(body, _Hot)
            return messages.KeepHot([_key_of(key) for key in hot.keys], hot.copies, hot.size_bytes)
        case "cool":
            return messages.ForgetHot([_key_of(key) for key in _decode(body, _Keys).keys])
        case "undrain":
            return messages.UndrainNode(_decode(body, _Node).node)
        case _:
            drain = _decode(body, _Node)
            if drain.size_bytes < 0:
                raise RequestError(f"size_bytes={drain.size_bytes}: bytes of a block, or 0")
            return messages.DrainNode(drain.node, drain.size_bytes)


def _told(reply: messages.TaskReply) -> Answer:
    if isinstance(reply, messages.TaskStarted):
        return Answer(202, {"task_id": reply.task_id})
    return Answer(200, {"done": True})


def _no_task(task_id: int) -> Answer:
    return Answer(404, {"error": f"no task {task_id}: see GET /tasks; ended ones are forgotten in time"})


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"request body: {error}") from None


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise RequestError(f"{what}={text!r}: must be a whole number")
    return int(text)


def _hex(text: str, what: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        raise RequestError(f"{what}={text!r}: an even number of hexadecimal digits") from None
    if len(value) > KEY_BYTES:
        raise RequestError(f"{what}: {len(text)} digits, a key has {2 * KEY_BYTES}")
    return value


def _key_of(text: str) -> bytes:
    key = _hex(text, "key")
    if len(key) != KEY_BYTES:
        raise RequestError(f"key={text!r}: {2 * KEY_BYTES} hexadecimal digits, not {len(text)}")
    return key
