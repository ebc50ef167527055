"""What kubectl asks before it asks for anything: versions, groups, kinds, and that the server validates."""

from typing import Any

from tests.kube.standin.resources import RESOURCES, groups
from tests.kube.standin.schema import VERSION

VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]

Json = dict[str, Any]


def version() -> Json:
    """Return /version."""
    major, minor, _ = VERSION.split(".")
    return {"major": major, "minor": minor, "gitVersion": f"v{VERSION}", "platform": "linux/amd64"}


def group_list() -> Json:
    """Return /apis."""
    return {
        "kind": "APIGroupList", "apiVersion": "v1",
        "groups": [_group(group, version) for group, version in groups().items()],
    }  # fmt: skip


def _group(group: str, version: str) -> Json:
    one = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [one], "preferredVersion": one}


def resource_list(group_version: str) -> Json | None:
    """Return the kinds of one API group and version, None if there is no such group."""
    found: list[Json] = []
    for one in RESOURCES.values():
        if one.api_version != group_version:
            continue
        basic = {"namespaced": one.namespaced, "kind": one.kind, "singularName": one.kind.lower()}
        found.append({"name": one.plural, "verbs": VERBS, "shortNames": list(one.short), **basic})
        for sub in one.subresources:
            row = {**basic, "name": f"{one.plural}/{sub}", "verbs": ["get", "patch", "update"]}
            if sub == "eviction":
                row |= {"group": "policy", "version": "v1", "kind": "Eviction", "verbs": ["create"]}
            elif sub == "scale":
                row |= {"group": "autoscaling", "version": "v1", "kind": "Scale"}
            found.append(row)
    if not found:
        return None
    return {
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": found,
    }  # fmt: skip


def openapi_index() -> Json:
    """Return /openapi/v3."""
    prefixes = sorted({one.prefix for one in RESOURCES.values()})
    return {"paths": {one: {"serverRelativeURL": f"/openapi/v3/{one}?hash=1"} for one in prefixes}}


def openapi(prefix: str) -> Json:
    """Return what kubectl looks at in a group's OpenAPI document before it leaves checks to the server."""
    paths: Json = {}
    field_validation = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    for one in RESOURCES.values():
        if one.prefix == prefix:
            kind = {"group": one.group, "version": one.version, "kind": one.kind}
            operation = {
                "parameters": [field_validation],
                "x-kubernetes-action": "patch",
                "x-kubernetes-group-version-kind": kind,
                "requestBody": {"content": {"application/merge-patch+json": {}}},
                "responses": {},
            }
            middle = "namespaces/{namespace}/" if one.namespaced else ""
            paths[f"/{prefix}/{middle}{one.plural}/{{name}}"] = {"patch": operation}
    info = {"title": "Kubernetes", "version": f"v{VERSION}"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}
