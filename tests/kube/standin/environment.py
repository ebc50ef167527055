"""The environment and the command line of a container. Pure: objects in, texts out."""

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from mooncake.core.errors import ConfigError
from tests.kube.standin.tables import at

Object = dict[str, Any]
Lookup = Callable[[str, str], Object | None]
"""(plural, name) -> object of the pod's namespace."""
_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")
_INDEXED = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_CPU, _UNITS = (
    "cpu",
    {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9},
)


def expand(text: str, known: Mapping[str, str]) -> str:
    """Replace $(NAME) by what is known; $$ is a $, and unknown names stay, as Kubernetes does it."""

    def one(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else known.get(match[2], match[0])

    return _REFERENCE.sub(one, text)


def quantity(text: str | int) -> float:
    """Return a Kubernetes quantity as a number: cores, or bytes."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * (0.001 if match[2] == "m" else _UNITS.get(match[2], 1))


def content(one: Object) -> dict[str, bytes]:
    """Return key -> bytes of a ConfigMap or Secret."""
    data = one.get("data") or {}
    if one["kind"] == "Secret":
        return {key: base64.b64decode(value) for key, value in data.items()}
    binary = {key: base64.b64decode(value) for key, value in (one.get("binaryData") or {}).items()}
    return {**{key: value.encode() for key, value in data.items()}, **binary}


def field(pod: Object, path: str) -> str:
    """Return what a fieldRef names."""
    if match := _INDEXED.fullmatch(path):
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        return "\n".join(f'{key}="{value}"' for key, value in sorted(at(pod, path, {}).items()))
    return str(at(pod, path))


def environment(pod: Object, container: Object, lookup: Lookup) -> dict[str, str]:
    """Return the variables that a container's spec gives it.

    Raises:
        ConfigError: something that it refers to does not exist.
    """
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        reference = source.get("configMapRef") or source["secretRef"]
        plural = "configmaps" if "configMapRef" in source else "secrets"
        one = lookup(plural, reference["name"])
        if one is None and not reference.get("optional"):
            raise ConfigError(f'{plural[:-1]} "{reference["name"]}" not found')
        for key, data in content(one).items() if one else ():
            found[source.get("prefix", "") + key] = data.decode()
    for variable in container.get("env", []):
        value_from = variable.get("valueFrom")
        value = (
            _value(pod, container, value_from, lookup)
            if value_from
            else expand(variable.get("value", ""), found)
        )
        if value is not None:
            found[variable["name"]] = value
    return found


def _value(pod: Object, container: Object, source: Object, lookup: Lookup) -> str | None:
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        resource = source["resourceFieldRef"]["resource"]
        kind, _, name = resource.partition(".")
        amount = quantity(container.get("resources", {}).get(kind, {}).get(name, "1"))
        return str(-(-amount // 1) if name == _CPU else amount).removesuffix(".0")
    plural = "configmaps" if "configMapKeyRef" in source else "secrets"
    reference = source.get("configMapKeyRef") or source["secretKeyRef"]
    one = lookup(plural, reference["name"])
    value = content(one).get(reference["key"]) if one else None
    if value is None and not reference.get("optional"):
        raise ConfigError(f'{plural[:-1]} "{reference["name"]}" has no key {reference["key"]!r}')
    return None if value is None else value.decode()


def command_line(container: Object, known: Mapping[str, str]) -> list[str]:
    """Return what a container runs; images have no entry points here, so `command` must be given."""
    return [expand(word, known) for word in [*container.get("command", []), *container.get("args", [])]]
