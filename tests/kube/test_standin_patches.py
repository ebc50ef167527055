"""Patches as kubectl sends them, against the schemas of Kubernetes."""

import pytest
from aiohttp import web

from tests.kube.standin import schema
from tests.kube.standin.patches import json_merge, strategic_merge
from tests.kube.standin.resources import RESOURCES

DEPLOYMENT = schema.root_of("deployments")


def pods(*containers: dict, **spec: object) -> dict:
    return {"spec": {"template": {"spec": {"containers": list(containers), **spec}}}}


def test_a_merge_patch_removes_what_is_null_and_replaces_lists() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert json_merge(old, {"a": {"b": None, "c": [3]}, "e": 5}) == {"a": {"c": [3]}, "d": 4, "e": 5}
    assert old == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_containers_and_their_variables_merge_by_name() -> None:
    old = pods({"name": "a", "image": "x", "env": [{"name": "E", "value": "1"}]}, {"name": "b", "image": "y"})
    patch = pods({"name": "a", "env": [{"name": "F", "value": "2"}, {"name": "E", "value": "3"}]})
    assert strategic_merge(old, patch, DEPLOYMENT) == pods(
        {"name": "a", "image": "x", "env": [{"name": "E", "value": "3"}, {"name": "F", "value": "2"}]},
        {"name": "b", "image": "y"},
    )


def test_arguments_of_a_command_are_replaced_whole() -> None:
    old = pods({"name": "a", "args": ["--x", "--y"]})
    assert strategic_merge(old, pods({"name": "a", "args": ["--z"]}), DEPLOYMENT) == pods(
        {"name": "a", "args": ["--z"]}
    )


def test_an_item_is_deleted_by_its_key_and_a_list_is_put_in_the_order_that_the_patch_names() -> None:
    old = pods({"name": "a"}, {"name": "b"}, {"name": "c"})
    patch = pods({"name": "b", "$patch": "delete"}, {"name": "d", "image": "i"})
    patch["spec"]["template"]["spec"]["$setElementOrder/containers"] = [{"name": n} for n in "dca"]
    assert strategic_merge(old, patch, DEPLOYMENT) == pods(
        {"name": "d", "image": "i"}, {"name": "c"}, {"name": "a"}
    )


def test_a_part_can_be_replaced_instead_of_merged() -> None:
    old = {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}
    patch = {"spec": {"strategy": {"$patch": "replace", "type": "Recreate"}}}
    assert strategic_merge(old, patch, DEPLOYMENT) == {"spec": {"strategy": {"type": "Recreate"}}}


def test_only_named_members_of_a_union_stay() -> None:
    old = {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}
    patch = {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}
    assert strategic_merge(old, patch, DEPLOYMENT) == {"spec": {"strategy": {"type": "Recreate"}}}


def test_lists_of_plain_values_merge_and_lose_what_the_patch_deletes() -> None:
    old = {"metadata": {"finalizers": ["a", "b"]}}
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}
    assert strategic_merge(old, patch, DEPLOYMENT) == {"metadata": {"finalizers": ["b", "c"]}}


def deployment(**spec: object) -> dict:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template, **spec},
    }  # fmt: skip


def test_a_field_that_kubernetes_does_not_know_is_refused_by_name() -> None:
    schema.check("deployments", deployment(replicas=2))
    with pytest.raises(web.HTTPUnprocessableEntity) as refused:
        schema.check("deployments", deployment(replica=2))
    assert "'replica' was unexpected" in str(refused.value.text)


def test_an_object_of_another_kind_or_without_a_name_is_refused() -> None:
    with pytest.raises(web.HTTPBadRequest):
        schema.check("services", deployment())
    with pytest.raises(web.HTTPUnprocessableEntity):
        schema.check("deployments", {**deployment(), "metadata": {"name": "Not A Name"}})


@pytest.mark.parametrize("plural", [p for p, r in RESOURCES.items() if r.group not in schema.CRD_GROUPS])
def test_every_kind_of_kubernetes_has_its_schema(plural: str) -> None:
    resource = RESOURCES[plural]
    with pytest.raises(web.HTTPUnprocessableEntity):
        schema.check(plural, {
            "apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": "x"}, "no": 1,
        })  # fmt: skip
