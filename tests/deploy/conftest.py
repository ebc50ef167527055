"""The settings that a pod's process would start with."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mooncake.core.options import SECTIONS
from mooncake.core.options_base import Options
from mooncake.core.settings import load
from tests.deploy.manifests import Object, expanded, main_container, named, pod, resolved

FACTS = {
    "status.podIP": "10.1.2.3",
    "metadata.name": "pod-7d9f8b6c5d-x2x4z",
    "spec.nodeName": "node-1.example.com",
}
"""What Kubernetes says of a pod."""


def flags_of(argv: list[str]) -> dict[str, Any]:
    """Return what our command line makes of a command, or raise click's errors."""
    from mooncake.cli import app

    root = typer.main.get_command(app)
    with root.make_context("mooncake", [argv[1], "--help"], resilient_parsing=True) as context:
        command = root.get_command(context, argv[1])  # type: ignore[attr-defined]
        assert command is not None, f"mooncake has no command {argv[1]}"
    with command.make_context(argv[1], argv[2:]) as context:
        return {key: value for key, value in context.params.items() if value not in (None, [])}


@pytest.fixture
def settings_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Object], Options]:
    """Return a function: the settings of a workload's process from flags, environment, ConfigMap."""

    def settings(overlay: str, workload: Object) -> Options:
        container = main_container(workload)
        variables = resolved(overlay, container, FACTS)
        argv = [expanded(word, variables) for word in container["command"] + container["args"]]
        volumes = {volume["name"]: volume for volume in pod(workload)["volumes"]}
        places = {}
        for mount in container["volumeMounts"]:
            place = tmp_path / overlay / workload["metadata"]["name"] / mount["name"]
            place.mkdir(parents=True, exist_ok=True)
            places[mount["mountPath"]] = place
            for name, text in _files(overlay, volumes.get(mount["name"], {})).items():
                (place / name).write_text(text)
        for key in [key for key in os.environ if key.startswith("MOONCAKE_")]:
            monkeypatch.delenv(key)
        for key, value in variables.items():
            monkeypatch.setenv(key, _moved(value, places))
        flags = flags_of([_moved(word, places) for word in argv])
        return load(SECTIONS[argv[1]], flags)

    return settings


def _files(overlay: str, volume: Object) -> dict[str, str]:
    if "configMap" in volume:
        return dict(named(overlay, "ConfigMap", volume["configMap"]["name"])["data"])
    keys = {"mooncake-cluster": "secret", "mooncake-admin": "token", "mooncake-api": "key"}
    name = volume.get("secret", {}).get("secretName", "")
    return {keys[name]: "sixteen characters or more"} if name in keys else {}


def _moved(text: str, places: dict[str, Path]) -> str:
    """Return `text` with the pod's folders replaced by those of the test."""
    paths = "|".join(re.escape(path) for path in sorted(places, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({paths})(?=/)", lambda found: str(places[found[1]]), text)
