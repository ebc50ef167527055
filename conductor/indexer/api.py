"""Upstream's indexer API over an Indexer: paths, bodies and errors; no socket is known here.

Bodies are JSON or msgpack, and answered alike. A query in msgpack is of generation 2. One in JSON is answered
in the words in which the context's publishers were registered: with a hash_profile of generation 2, else of
generation 1; `?generation=1` or `2` overrules. Where nobody is registered the answer is empty in both.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
import structlog
from prometheus_client import CollectorRegistry, generate_latest

from conductor.indexer import requests
from conductor.indexer.contexts import Context, InstanceHits
from conductor.indexer.service import Indexer, hits_shown
from mooncake.core.errors import CapacityError, RequestError

log = structlog.get_logger(__name__)

JSON = "application/json"
PACKED = frozenset({"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"})
TEXT = "text/plain; version=0.0.4; charset=utf-8"
CHANGE_S = 15.0
"""For what is done on the indexer's loop: resolving a name, leaving a publisher."""

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer."""

    status: int
    body: bytes
    content_type: str = JSON


class Api:
    """Called by threads; what changes something runs on `loop`."""

    def __init__(
        self, indexer: Indexer, loop: asyncio.AbstractEventLoop, registry: CollectorRegistry
    ) -> None:
        """`registry`: what /metrics shows."""
        self._indexer = indexer
        self._loop = loop
        self._registry = registry
        self._posts: dict[str, Callable[[bytes, bool, Mapping[str, str]], Any]] = {
            "/register": self._register,
            "/unregister": self._unregister,
            "/query": self._query,
            "/query_by_hash": self._query_by_hash,
        }
        self._gets: dict[str, Callable[[], Any]] = {
            "/global_view": indexer.global_view,
            "/services": indexer.services,
            "/health": self._health,
        }

    def answer(
        self, method: str, path: str, query: Mapping[str, str], content_type: str, body: bytes
    ) -> Answer:
        """Return the answer to any request; never raises for one that is wrong."""
        packed = content_type.partition(";")[0].strip().lower() in PACKED
        try:
            return self._route(method, path, query, packed, body)
        except RequestError as error:
            detail = error.args[0] if error.args else str(error)
            return _answer(400, detail if isinstance(detail, requests.Wrong) else _error(str(error)), packed)
        except CapacityError as error:
            return _answer(503, _error(str(error), "capacity"), packed)

    def _route(self, method: str, path: str, query: Mapping[str, str], packed: bool, body: bytes) -> Answer:
        posted, got = self._posts.get(path), self._gets.get(path)
        if path == "/metrics" and method in ("GET", "HEAD"):
            return Answer(200, generate_latest(self._registry), TEXT)
        if posted is None and got is None and path != "/metrics":
            return _answer(404, _error(f"there is no {path}", "not_found"), packed)
        if posted is not None and method == "POST":
            found = posted(body, packed, query)
            return found if isinstance(found, Answer) else _answer(200, found, packed)
        if got is not None and method in ("GET", "HEAD"):
            return _answer(200, got(), packed)
        return _answer(405, _error("Method not allowed", "method_not_allowed"), packed)

    # ------------------------------------------------------------ what there is

    def _register(self, body: bytes, packed: bool, query: Mapping[str, str]) -> Any:  # noqa: ARG002
        service = requests.service_of(requests.decode(body, requests.RegisterBody, packed))
        done = self._on_loop(self._indexer.register(service))
        if isinstance(done, Answer):
            return done
        return {"status": "registered successfully", "instance_id": service.instance}

    def _unregister(self, body: bytes, packed: bool, query: Mapping[str, str]) -> Any:  # noqa: ARG002
        wish = requests.decode(body, requests.UnregisterBody, packed)
        key = f"{wish.instance_id}|{wish.tenant_id or 'default'}|{wish.dp_rank}"
        done = self._on_loop(self._indexer.unregister(key))
        if isinstance(done, Answer):
            return done
        if not done:
            return _answer(404, _error(f"service not found: {key}", "not_found"), packed)
        return {"status": "unregistered successfully", "removed_instances": [key]}

    def _query(self, body: bytes, packed: bool, query: Mapping[str, str]) -> Any:
        if packed:
            wish: Any = requests.decode(body, requests.PackedQueryBody, packed)
        else:
            wish = requests.decode(body, requests.QueryBody, packed)
        return self._hits(wish.tenant, *self._indexer.by_tokens(wish), packed, query)

    def _query_by_hash(self, body: bytes, packed: bool, query: Mapping[str, str]) -> Any:
        wish = requests.decode(body, requests.HashQueryBody, packed)
        return self._hits(wish.tenant, *self._indexer.by_hashes(wish), packed, query)

    def _hits(
        self,
        tenant: str,
        context: Context | None,
        found: dict[str, InstanceHits],
        packed: bool,
        query: Mapping[str, str],
    ) -> dict[str, Any]:
        asked = query.get("generation", "2" if packed else "")
        if asked not in ("", "1", "2"):
            raise requests.wrong("generation must be 1 or 2", "invalid_value", "generation")
        generation = int(asked) if asked else self._indexer.generation(context)
        if generation is None and context is None:
            return {tenant: {}, "instances": {}}
        generation = generation or 1
        shown = {instance: hits_shown(hits, generation) for instance, hits in found.items()}
        return {tenant: shown} if generation == 1 else {"instances": shown}

    def _health(self) -> dict[str, Any]:
        return {"status": "ok", "publishers": {str(state): n for state, n in self._indexer.states().items()}}

    def _on_loop(self, coming: Coroutine[Any, Any, T]) -> T | Answer:
        try:
            handled = asyncio.run_coroutine_threadsafe(coming, self._loop)
        except RuntimeError:
            coming.close()
            return _answer(503, _error("the indexer is stopping", "stopping"), False)
        try:
            return handled.result(CHANGE_S)
        except (TimeoutError, concurrent.futures.CancelledError):
            handled.cancel()
            return _answer(503, _error(f"not done within {CHANGE_S:g} s", "timeout"), False)


def _error(text: str, reason: str | None = None) -> requests.Wrong:
    return requests.Wrong(text, reason)


def _answer(status: int, body: Any, packed: bool) -> Answer:
    if packed:
        return Answer(status, msgspec.msgpack.encode(body), "application/msgpack")
    return Answer(status, msgspec.json.encode(body) + b"\n")
