"""The API server: what kubectl speaks, over the objects."""

import asyncio
import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import yaml
from aiohttp import web

from tests.kube.standin import discovery, disruption, patches, schema
from tests.kube.standin.resources import RESOURCES, Resource
from tests.kube.standin.selectors import by_fields, by_query
from tests.kube.standin.status import missing, refused
from tests.kube.standin.store import Object, ObjectStore, Watch
from tests.kube.standin.tables import at, table

WATCH_S = 300.0
"""A watch that names no end is ended then; its client starts another."""
BODY_BYTES_MAX = 4 << 20
LOG_POLL_S = 0.2
SCALE_META = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
PROTOBUF = "application/vnd.kubernetes.protobuf"
"""What `kubectl create configmap` and its like send."""
JSON_PATCHES = ("application/json-patch+json", "application/apply-patch+yaml")


class Logs(Protocol):
    """Where what containers wrote lies."""

    def log_path(self, namespace: str, pod: str, container: str, previous: bool) -> Path | None:
        """Return the file of a container, None if there is none."""
        ...


class ApiServer:
    """Handlers of an aiohttp application."""

    def __init__(self, store: ObjectStore, logs: Logs, settle: Callable[[], None]) -> None:
        """`settle`: let the controllers act now."""
        self._store = store
        self._logs = logs
        self._settle = settle

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        known: list[tuple[str, Any]] = [
            ("/version", discovery.version()),
            ("/api", {"kind": "APIVersions", "versions": ["v1"]}),
            ("/apis", discovery.group_list()),
            ("/openapi/v3", discovery.openapi_index()),
            ("/healthz", {}),
            ("/readyz", {}),
        ]
        for path, body in known:
            app.router.add_get(path, functools.partial(_constant, body))
        app.router.add_get(
            "/openapi/v3/{prefix:.+}", lambda r: _json(discovery.openapi(r.match_info["prefix"]))
        )
        app.router.add_route("*", "/{root:api|apis}/{rest:.+}", self._any)
        return app

    async def _any(self, request: web.Request) -> web.StreamResponse:
        parts = request.match_info["rest"].strip("/").split("/")
        size = 1 if request.match_info["root"] == "api" else 2
        group_version, parts = "/".join(parts[:size]), parts[size:]
        if not parts:
            found = discovery.resource_list(group_version)
            if found is None:
                raise missing("groups", group_version)
            return await _json(found)
        namespace = ""
        if parts[0] == "namespaces" and len(parts) > 2 and parts[2] in RESOURCES:
            namespace, parts = parts[1], parts[2:]
        plural, name, sub = (*parts, "", "")[:3]
        resource = RESOURCES.get(plural)
        if resource is None or resource.api_version != group_version:
            raise missing("resources", f"{group_version}/{plural}")
        if sub:
            return await self._sub(request, resource, namespace, name, sub)
        if name:
            return await self._one(request, resource, namespace, name)
        return await self._many(request, resource, namespace)

    # ------------------------------------------------------------ collections

    async def _many(self, request: web.Request, resource: Resource, namespace: str) -> web.StreamResponse:
        if request.method == "POST":
            new = await _body(request)
            if resource.namespaced:
                new.setdefault("metadata", {}).setdefault("namespace", namespace)
            schema.check(resource.plural, new)
            if request.query.get("dryRun"):
                return await _json(new, 201)
            return await _json(self._store.create(resource.plural, defaulted(resource.plural, new)), 201)
        if request.method == "DELETE":
            for one in self._listed(request, resource, namespace):
                self._store.delete(
                    resource.plural, one["metadata"].get("namespace", ""), one["metadata"]["name"]
                )
            return await _json({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        if request.method != "GET":
            raise refused("MethodNotAllowed", request.method)
        if request.query.get("watch") in ("true", "1"):
            return await self._watch(request, resource, namespace)
        found, revision = self._listed(request, resource, namespace), str(self._store.revision)
        if _wants_table(request):
            return await _json(table(resource.plural, found, self._store.clock(), revision))
        return await _json({
            "kind": f"{resource.kind}List", "apiVersion": resource.api_version,
            "metadata": {"resourceVersion": revision}, "items": found,
        })  # fmt: skip

    def _listed(self, request: web.Request, resource: Resource, namespace: str) -> list[Object]:
        return [one for one in self._store.all(resource.plural, namespace) if _selected(request, one)]

    async def _watch(self, request: web.Request, resource: Resource, namespace: str) -> web.StreamResponse:
        since = request.query.get("resourceVersion", "")
        first = [] if since not in ("", "0") else self._listed(request, resource, namespace)
        watch = self._store.watch(None if since in ("", "0") else int(since))
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        try:
            await response.prepare(request)
            for one in first:
                await self._told(request, response, "ADDED", resource, one)
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", WATCH_S))):
                await self._follow(request, response, resource, namespace, watch)
        except (TimeoutError, ConnectionError):
            pass  # its end, or its client's
        finally:
            self._store.unwatch(watch)
        return response

    async def _follow(
        self, request: web.Request, response: web.StreamResponse, resource: Resource, namespace: str,
        watch: Watch,
    ) -> None:  # fmt: skip
        while (change := await watch.queue.get()) is not None:
            _, verb, plural, one = change
            inside = namespace in ("", one["metadata"].get("namespace", ""))
            if plural == resource.plural and inside and _selected(request, one):
                await self._told(request, response, verb, resource, one)

    async def _told(
        self, request: web.Request, response: web.StreamResponse, verb: str, resource: Resource, one: Object
    ) -> None:  # fmt: skip
        if _wants_table(request):
            one = table(resource.plural, [one], self._store.clock(), one["metadata"]["resourceVersion"])
        await response.write(json.dumps({"type": verb, "object": one}).encode() + b"\n")

    # ------------------------------------------------------------ one object

    async def _one(
        self, request: web.Request, resource: Resource, namespace: str, name: str
    ) -> web.StreamResponse:
        plural = resource.plural
        old = self._store.get(plural, namespace, name)
        if request.method == "GET":
            if _wants_table(request):
                revision = old["metadata"]["resourceVersion"]
                return await _json(table(plural, [old], self._store.clock(), revision))
            return await _json(old)
        if request.method == "DELETE":
            return await self._delete(request, plural, old)
        if request.method == "PUT":
            new = await _body(request)
        elif request.method == "PATCH":
            new = await _patched(request, plural, old)
        else:
            raise refused("MethodNotAllowed", request.method)
        schema.check(plural, new)
        if request.query.get("dryRun"):
            return await _json(new)
        return await _json(self._store.update(plural, defaulted(plural, new)))

    async def _delete(self, request: web.Request, plural: str, old: Object) -> web.StreamResponse:
        options = await _body(request) if request.can_read_body else {}
        if not (request.query.get("dryRun") or options.get("dryRun")):
            grace_s = options.get("gracePeriodSeconds", request.query.get("gracePeriodSeconds"))
            how = options.get("propagationPolicy") or request.query.get("propagationPolicy", "Background")
            if how == "Orphan":
                raise refused("BadRequest", "propagationPolicy Orphan: not in this stand-in")
            meta = old["metadata"]
            old = self._store.delete(
                plural,
                meta.get("namespace", ""),
                meta["name"],
                None if grace_s is None else int(grace_s),
                how,
            )
        meta = old["metadata"]
        details = {"name": meta["name"], "kind": plural, "uid": meta["uid"]}
        return await _json({"kind": "Status", "apiVersion": "v1", "status": "Success", "details": details})

    # ------------------------------------------------------------ subresources

    async def _sub(
        self, request: web.Request, resource: Resource, namespace: str, name: str, sub: str
    ) -> web.StreamResponse:
        if sub not in resource.subresources:
            raise missing(f"{resource.plural}/{sub}", name)
        old = self._store.get(resource.plural, namespace, name)
        if sub == "status":
            return await self._one(request, resource, namespace, name)
        if sub == "scale":
            return await self._scale(request, resource, old)
        if sub == "eviction":
            return await self._evict(request, old)
        return await self._log(request, old)

    async def _scale(self, request: web.Request, resource: Resource, old: Object) -> web.StreamResponse:
        if request.method != "GET":
            scale = scale_of(old)
            new = await _body(request)
            new = patches.json_merge(scale, new) if request.method == "PATCH" else new
            if new.get("metadata", {}).get("resourceVersion", "") not in (
                "",
                old["metadata"]["resourceVersion"],
            ):
                raise refused("Conflict", f"{old['metadata']['name']} has changed; read it again")
            wanted = new.get("spec", {}).get("replicas", 0)
            if not isinstance(wanted, int) or wanted < 0:
                raise refused("Invalid", f"spec.replicas = {wanted!r}: a number of 0 or more")
            self._store.modify(resource.plural, old, lambda one: one["spec"].update(replicas=wanted))
            old = self._store.get(resource.plural, old["metadata"]["namespace"], old["metadata"]["name"])
        return await _json(scale_of(old))

    async def _evict(self, request: web.Request, pod: Object) -> web.StreamResponse:
        options = (await _body(request)).get("deleteOptions", {})
        meta = pod["metadata"]
        budgets = self._store.all("poddisruptionbudgets", meta["namespace"])
        if "deletionTimestamp" not in meta:
            pods = self._store.all("pods", meta["namespace"])
            if told := disruption.forbids(pod, pods, budgets):
                raise refused("TooManyRequests", f"Cannot evict pod as it would violate {told}")
            grace_s = options.get("gracePeriodSeconds")
            self._store.delete("pods", meta["namespace"], meta["name"], grace_s)
            self._settle()  # the next eviction counts a replacement
        return await _json({"kind": "Status", "apiVersion": "v1", "status": "Success"}, 201)

    async def _log(self, request: web.Request, pod: Object) -> web.StreamResponse:
        meta = pod["metadata"]
        container = request.query.get("container") or pod["spec"]["containers"][0]["name"]
        previous = request.query.get("previous") == "true"
        path = self._logs.log_path(meta["namespace"], meta["name"], container, previous)
        if path is None:
            raise refused("BadRequest", f'container "{container}" in pod "{meta["name"]}" has no log yet')
        text = path.read_bytes()
        if tail := request.query.get("tailLines"):
            text = b"".join(text.splitlines(keepends=True)[-int(tail) :])
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        await response.write(text)
        done = path.stat().st_size
        while request.query.get("follow") == "true" and self._store.find(
            "pods", meta["namespace"], meta["name"]
        ):
            await asyncio.sleep(LOG_POLL_S)
            with path.open("rb") as file:
                file.seek(done)
                more = file.read()
            done += len(more)
            await response.write(more)
        return response


def defaulted(plural: str, new: Object) -> Object:
    """Return an object with the defaults that our controllers rely on."""
    spec = new.get("spec", {})
    if plural in ("deployments", "statefulsets", "replicasets"):
        spec = {"replicas": 1, **spec}
    if plural in ("statefulsets", "daemonsets"):
        spec = {**spec, "updateStrategy": {"type": "RollingUpdate", **spec.get("updateStrategy", {})}}
    if spec != new.get("spec", {}):
        return {**new, "spec": spec}
    if plural == "secrets" and new.get("stringData"):
        coded = {name: base64.b64encode(text.encode()).decode() for name, text in new["stringData"].items()}
        rest = {name: value for name, value in new.items() if name != "stringData"}
        return {**rest, "data": {**new.get("data", {}), **coded}}
    return new


def scale_of(one: Object) -> Object:
    """Return the scale subresource of a workload."""
    meta = one["metadata"]
    labels = at(one, "spec.selector.matchLabels", {})
    return {
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {key: meta[key] for key in SCALE_META},
        "spec": {"replicas": one["spec"].get("replicas", 1)},
        "status": {
            "replicas": at(one, "status.replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in labels.items()),
        },
    }  # fmt: skip


def _selected(request: web.Request, one: Object) -> bool:
    labels = one["metadata"].get("labels", {})
    return by_query(request.query.get("labelSelector", ""), labels) and by_fields(
        request.query.get("fieldSelector", ""), one
    )


def _wants_table(request: web.Request) -> bool:
    return "as=Table" in request.headers.get("Accept", "")


async def _body(request: web.Request) -> dict[str, Any]:
    if request.content_type == PROTOBUF:
        raise refused(
            "UnsupportedMediaType", f"{PROTOBUF}: not in this stand-in; use `kubectl apply` with YAML"
        )
    try:
        found = yaml.safe_load(await request.read())  # JSON is YAML
    except yaml.YAMLError as error:
        raise refused("BadRequest", f"body: {error}") from None
    if not isinstance(found, dict):
        raise refused("BadRequest", "the body is no object")
    return found


async def _patched(request: web.Request, plural: str, old: Object) -> Object:
    if request.content_type in JSON_PATCHES:
        raise refused(
            "UnsupportedMediaType", f"{request.content_type}: not in this stand-in; apply client-side"
        )
    patch = await _body(request)
    if request.content_type == "application/strategic-merge-patch+json":
        new = patches.strategic_merge(old, patch, schema.root_of(plural))
    else:
        new = patches.json_merge(old, patch)
    found: Object = new
    return found


async def _constant(body: dict[str, Any], _: web.Request) -> web.StreamResponse:
    return await _json(body)


async def _json(body: dict[str, Any], status: int = 200) -> web.StreamResponse:
    return web.json_response(body, status=status)
