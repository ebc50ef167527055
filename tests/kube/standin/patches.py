"""How a patch changes an object: JSON merge patch (RFC 7386) and Kubernetes' strategic merge patch. Pure."""

import copy
from typing import Any

from tests.kube.standin import schema as schemas
from tests.kube.standin.schema import Schema
from tests.kube.standin.status import refused

_ORDER, _DELETED, _KEEP = "$setElementOrder/", "$deleteFromPrimitiveList/", "$retainKeys"
_DIRECTIVE = "$patch"


def json_merge(old: Any, patch: Any) -> Any:
    """Return `old` with a JSON merge patch applied: null removes, objects merge, all else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    new = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = json_merge(new.get(name), value)
    return new


def strategic_merge(old: Any, patch: Any, schema: Schema) -> Any:  # noqa: C901 - one branch for each directive
    """Return `old` with a strategic merge patch applied: lists merge by the keys that their schema names."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get(_DIRECTIVE) == "replace":
        return {name: copy.deepcopy(value) for name, value in patch.items() if name != _DIRECTIVE}
    new = dict(old) if isinstance(old, dict) else {}
    if (kept := patch.get(_KEEP)) is not None:
        new = {name: value for name, value in new.items() if name in kept}
    for name, value in patch.items():
        if name.startswith(_DELETED):
            target = name.removeprefix(_DELETED)
            new[target] = [one for one in new.get(target, []) if one not in value]
        elif name.startswith("$"):
            continue  # orders come last, directives of a list's item are its list's
        elif value is None:
            new.pop(name, None)
        else:
            inner = schemas.field(schema, name)
            new[name] = _merge_field(new.get(name), value, inner)
    for name, value in patch.items():
        if name.startswith(_ORDER):
            target = name.removeprefix(_ORDER)
            if target in new:
                new[target] = _ordered(new[target], value, schemas.merge_key(schemas.field(schema, target)))
    return new


def _merge_field(old: Any, value: Any, schema: Schema) -> Any:
    if isinstance(value, list):
        key = schemas.merge_key(schema)
        if key is None or not isinstance(old, list):
            return [copy.deepcopy(one) for one in value if not _is_directive(one)]
        if key == "":
            return [*old, *(one for one in value if one not in old)]
        return _merge_list(old, value, key, schemas.items(schema))
    return strategic_merge(old, value, schema)


def _is_directive(one: Any) -> bool:
    return isinstance(one, dict) and _DIRECTIVE in one


def _merge_list(old: list[Any], patch: list[Any], key: str, schema: Schema) -> list[Any]:
    if any(one == {_DIRECTIVE: "replace"} for one in patch):
        return [copy.deepcopy(one) for one in patch if not _is_directive(one)]
    new = list(old)
    for one in patch:
        if key not in one:
            raise refused("BadRequest", f"an item of a patched list lacks its merge key {key!r}")
        at = next((i for i, there in enumerate(new) if there.get(key) == one[key]), None)
        if one.get(_DIRECTIVE) == "delete":
            new = [there for there in new if there.get(key) != one[key]]
        elif at is None:
            new.append(strategic_merge({}, one, schema))
        else:
            new[at] = strategic_merge(new[at], one, schema)
    return new


def _ordered(found: list[Any], order: list[Any], key: str | None) -> list[Any]:
    """Return items as `order` names them; those that it does not name stay behind the one they followed."""
    names = [one[key] if key and isinstance(one, dict) else one for one in order]
    rank, last = {}, -1
    for at, one in enumerate(found):
        name = one.get(key) if key and isinstance(one, dict) else one
        last = names.index(name) if name in names else last
        rank[at] = last
    return [found[at] for at in sorted(rank, key=lambda at: rank[at])]
