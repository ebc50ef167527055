"""Kubernetes' own schemas, as kubernetes-validate ships them: what is valid, and how lists merge."""

import copy
import functools
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from kubernetes_validate.utils import schema_contents  # type: ignore[import-untyped]
from referencing import Registry
from referencing import Resource as Document

from tests.kube.standin.resources import CRD_GROUPS, RESOURCES, Resource
from tests.kube.standin.status import refused

VERSION = "1.32.0"
"""Of kubectl here."""
_STRICT = f"kubernetes-json-schema/v{VERSION}-local-strict"
ERRORS_MAX = 5
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")

Schema = dict[str, Any]


@functools.cache
def _definitions() -> Schema:
    found: Schema = schema_contents(f"{_STRICT}/_definitions.json", VERSION)
    return found


@functools.cache
def _validator(resource: Resource) -> jsonschema.Draft202012Validator | None:
    if resource.group in CRD_GROUPS:
        return None
    group = f"{resource.group.partition('.')[0]}-" if resource.group else ""
    schema = schema_contents(f"{_STRICT}/{resource.kind.lower()}-{group}{resource.version}.json", VERSION)
    registry: Any = Document.from_contents(schema) @ (Document.from_contents(_definitions()) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def check(plural: str, one: dict[str, Any]) -> None:
    """Let a valid object pass.

    Raises:
        HTTPUnprocessableEntity: it breaks the schema of its kind, a field that does not exist included.
        HTTPBadRequest: it is of another kind.
    """
    resource = RESOURCES[plural]
    given = (one.get("apiVersion"), one.get("kind"))
    if given != (resource.api_version, resource.kind):
        raise refused("BadRequest", f"{given} is not {resource.api_version} {resource.kind}")
    name = one.get("metadata", {}).get("name") or one.get("metadata", {}).get("generateName", "").rstrip("-")
    if not NAME.fullmatch(name or ""):
        raise refused("Invalid", f"metadata.name: {name!r} is no name of an object")
    validator = _validator(resource)
    if validator is None:
        return
    errors = sorted(validator.iter_errors(_plain(one)), key=lambda error: error.json_path)[:ERRORS_MAX]
    if errors:
        told = "; ".join(f"{error.json_path.removeprefix('$.')}: {error.message[:300]}" for error in errors)
        causes = [
            {"field": error.json_path.removeprefix("$."), "message": error.message[:300]} for error in errors
        ]
        raise refused(
            "Invalid",
            f'{resource.kind} "{name}" is invalid: {told}',
            name=name,
            kind=resource.kind,
            causes=causes,
        )


def _plain(one: dict[str, Any]) -> dict[str, Any]:
    plain = copy.copy(one)
    plain.pop("status", None)  # ours, and partly filled in
    return plain


# ---------------------------------------------------------------- how lists merge


def root_of(plural: str) -> Schema:
    """Return the schema of a kind, {} where Kubernetes has none."""
    resource = RESOURCES[plural]
    wanted = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    return _by_kind().get(tuple(sorted(wanted.items())), {})


@functools.cache
def _by_kind() -> dict[tuple[tuple[str, str], ...], Schema]:
    found = {}
    for one in _definitions()["$defs"].values():
        for kind in one.get("x-kubernetes-group-version-kind", []):
            found[tuple(sorted(kind.items()))] = one
    return found


def resolve(schema: Schema) -> Schema:
    """Follow a reference."""
    while "$ref" in schema:
        schema = _definitions()["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def field(schema: Schema, name: str) -> Schema:
    """Return the schema of a field of an object, {} if it has none of its own."""
    schema = resolve(schema)
    found: Any = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
    return found if isinstance(found, dict) else {}


def merge_key(schema: Schema) -> str | None:
    """Return the field that tells items of a list apart; "" = they merge by value, None = no merging."""
    if schema.get("x-kubernetes-patch-strategy", "").find("merge") < 0:
        return None
    key: str = schema.get("x-kubernetes-patch-merge-key", "")
    return key


def items(schema: Schema) -> Schema:
    """Return the schema of a list's items."""
    found: Schema = schema.get("items", {})
    return found
