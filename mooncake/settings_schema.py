"""JSON Schema of the settings file, made from the models: for editors, and where no Mooncake is."""

from typing import Any

from mooncake.core.config_file import COMMON
from mooncake.core.options import SECTIONS
from mooncake.core.options_base import Setting, settings_of

_TYPES: dict[str, list[str]] = {
    "flag": ["boolean", "string"],
    "whole number": ["integer"],
    "number": ["number"],
    "size": ["integer", "string"],
    "cores": ["integer", "string", "array"],
    "words": ["array", "string"],
    "text": ["string", "number"],
}
"""What YAML may make of a value: `node: 007` and `cores: 0` are written without quotes, too."""


def schema() -> dict[str, Any]:
    """Return it, for a file with sections. Whether values go together only `mooncake config check` says."""
    sections = {name: _keys(settings_of(kind)) for name, kind in SECTIONS.items()}
    common: dict[str, Any] = {}
    for keys in sections.values():
        for key, one in keys.items():
            said = common.setdefault(key, {"anyOf": []})["anyOf"]
            said += [one] if one not in said else []
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of Mooncake",
        **_mapping({name: _mapping(keys) for name, keys in {COMMON: common, **sections}.items()}),
    }


def _mapping(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _keys(settings: Any) -> dict[str, Any]:
    return {
        name: _one(one)
        for one in settings.values()
        for name in one.names
        if not one.secret and name != "config"
    }


def _one(one: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {"description": one.text}
    if "|" in one.kind:
        choices = one.kind.split("|")
        # to YAML a bare `off` is false
        return {**found, "enum": [*choices, *([False] if "off" in choices else []), None]}
    found["type"] = [*_TYPES[one.kind], "null"]
    if one.low is not None:
        found["minimum"] = one.low
    if one.high is not None:
        found["maximum"] = one.high
    return found
