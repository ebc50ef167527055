"""What we would send to Kubernetes is what Kubernetes, and the operators' CRDs, define."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.manifests import DEPLOY, GROUPS, OVERLAYS, needs_kubectl, objects, rendered, workloads

pytestmark = needs_kubectl
CRDS = Path(__file__).parent / "crds"
FOREIGN = {path.stem for path in CRDS.glob("*.json")}
VERSIONS = ("1.32", "1.37")
"""The oldest that the guide names, and the newest that is known here."""
ANNOTATION_BYTES_MAX = 262_144
"""Of all annotations of an object; `kubectl apply` keeps there what it applied last."""


def distinct() -> list[Any]:
    """Every object of every overlay, equal ones once."""
    every = {json.dumps(one, sort_keys=True): one for overlay in OVERLAYS for one in objects(overlay)}
    return list(every.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_built_in_kinds_are_valid_strictly(version: str) -> None:
    for one in distinct():
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, version, strict=True)


def test_custom_resources_are_valid_with_no_unknown_field() -> None:
    found = [one for one in distinct() if one["kind"] in FOREIGN]
    assert {one["kind"] for one in found} == FOREIGN
    for one in found:
        _check(one)


@pytest.mark.parametrize("version", VERSIONS)
def test_pods_of_groups_are_valid_strictly(version: str) -> None:
    pods = [one["spec"]["template"] for one in workloads("lws") if one["kind"] == GROUPS]
    assert len(pods) == 2
    for template in pods:
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, version, strict=True)


def _check(one: dict[str, Any]) -> None:
    schema = json.loads((CRDS / f"{one['kind']}.json").read_text())
    problems = list(jsonschema.Draft202012Validator(schema).iter_errors(one))
    assert not problems, [f"{one['kind']} {list(problem.path)}: {problem.message}" for problem in problems]


def test_schemas_refuse_what_is_misspelt() -> None:
    monitor = next(one for one in objects("prod") if one["kind"] == "PodMonitor")
    endpoint = {**monitor["spec"]["podMetricsEndpoints"][0], "scrapeTimeOut": "10s"}
    broken = {**monitor, "spec": {**monitor["spec"], "podMetricsEndpoints": [endpoint]}}
    with pytest.raises(AssertionError, match="scrapeTimeOut"):
        _check(broken)


def test_every_overlay_of_the_folder_is_known_to_these_tests() -> None:
    assert tuple(sorted(path.name for path in (DEPLOY / "overlays").iterdir())) == OVERLAYS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_are_unique_and_in_our_namespace(overlay: str) -> None:
    seen = [(one["kind"], one["metadata"]["name"]) for one in objects(overlay)]
    assert len(set(seen)) == len(seen)
    for one in objects(overlay):
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == "mooncake", one["metadata"]


def test_rendering_is_repeatable() -> None:
    first = rendered("prod")
    rendered.cache_clear()
    assert rendered("prod") == first


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_the_annotation_in_which_kubectl_keeps_it(overlay: str) -> None:
    for one in objects(overlay):
        assert len(json.dumps(one)) < ANNOTATION_BYTES_MAX, one["metadata"]["name"]
