"""Which objects a selector takes. Pure."""

import re
from typing import Any

from tests.kube.standin.status import refused
from tests.kube.standin.tables import at

_SET = re.compile(r"(?P<key>[^\s=!,()]+)\s+(?P<verb>in|notin)\s+\((?P<values>[^)]*)\)")
_PLAIN = re.compile(r"(?P<key>[^\s=!,()]+)\s*(?P<verb>==|=|!=)\s*(?P<value>[^\s=!,()]*)")
_EXISTS = re.compile(r"(?P<no>!?)\s*(?P<key>[^\s=!,()]+)")
_SPLIT = re.compile(r",(?![^(]*\))")


def by_labels(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Return whether a LabelSelector of an object's spec takes `labels`; {} takes all, None nothing."""
    if selector is None:
        return False
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    return all(_expression(one, labels) for one in selector.get("matchExpressions", []))


def _expression(one: dict[str, Any], labels: dict[str, str]) -> bool:
    found = labels.get(one["key"])
    values = one.get("values", [])
    known = {
        "In": found in values, "NotIn": found not in values,
        "Exists": found is not None, "DoesNotExist": found is None,
    }  # fmt: skip
    return known[one["operator"]]


def by_query(text: str, labels: dict[str, str]) -> bool:
    """Return whether a ?labelSelector= takes `labels`.

    Raises:
        HTTPBadRequest: it is no such selector.
    """
    return all(_requirement(part.strip(), labels) for part in _SPLIT.split(text) if part.strip())


def _requirement(text: str, labels: dict[str, str]) -> bool:
    if match := _SET.fullmatch(text):
        values = {value.strip() for value in match["values"].split(",")}
        return (labels.get(match["key"]) in values) == (match["verb"] == "in")
    if match := _PLAIN.fullmatch(text):
        return (labels.get(match["key"]) == match["value"]) == (match["verb"] != "!=")
    if match := _EXISTS.fullmatch(text):
        return (match["key"] in labels) == (not match["no"])
    raise refused("BadRequest", f"labelSelector {text!r}: not understood")


def by_fields(text: str, one: dict[str, Any]) -> bool:
    """Return whether a ?fieldSelector= takes an object: paths that are equal, or not.

    Raises:
        HTTPBadRequest: it is no such selector.
    """
    for part in filter(None, text.split(",")):
        match = _PLAIN.fullmatch(part.strip())
        if match is None:
            raise refused("BadRequest", f"fieldSelector {part!r}: not understood")
        if (str(at(one, match["key"])) == match["value"]) == (match["verb"] == "!="):
            return False
    return True
