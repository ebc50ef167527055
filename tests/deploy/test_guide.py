"""The kustomizations that docs/deploy.md shows do what it says of them."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, RENDER_S_MAX, ROOT, Object, is_ours, needs_kubectl, objects, pod

pytestmark = needs_kubectl
_BLOCK = re.compile(r"```yaml\n# ([\w-]+)/kustomization\.yaml\n(.*?)```", re.DOTALL)
SHOWN = _BLOCK.findall((ROOT / "docs" / "deploy.md").read_text())
"""Folder and text of each."""


def rendered(folder: Path, text: str) -> list[Object]:
    """Return the objects of a kustomization in a folder beside ours."""
    folder.mkdir()
    (folder.parent / "deploy").symlink_to(DEPLOY)
    (folder / "kustomization.yaml").write_text(text)
    (folder / "mooncake.yaml").write_text((DEPLOY / "base" / "mooncake.yaml").read_text())
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RENDER_S_MAX, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def shown(word: str, tmp_path: Path) -> list[Object]:
    """Return the objects of the one that has `word` in it."""
    ((folder, text),) = (one for one in SHOWN if word in one[1])
    return rendered(tmp_path / folder, text)


def ours(found: list[Object]) -> list[Object]:
    return [one for one in found if one["kind"] in ("Deployment", "DaemonSet") and is_ours(one)]


def keys(found: list[Object] | tuple[Object, ...]) -> set[tuple[str, str]]:
    return {(one["kind"], re.sub(r"-[0-9a-z]{10}$", "", one["metadata"]["name"])) for one in found}


def test_an_overlay_of_your_own_has_what_prod_has_and_your_settings(tmp_path: Path) -> None:
    assert keys(shown("behavior: replace", tmp_path)) == keys(objects("prod"))


def test_with_an_etcd_of_your_own_nothing_of_ours_is_left_and_everybody_asks_yours(tmp_path: Path) -> None:
    found = shown("etcd-own", tmp_path)
    taken = {
        ("StatefulSet", "etcd"), ("Service", "etcd-peers"), ("ServiceAccount", "etcd"),
        ("PodDisruptionBudget", "etcd"), ("NetworkPolicy", "etcd"), ("PodMonitor", "etcd"),
    }  # fmt: skip
    assert keys(objects("prod")) - keys(found) == taken
    (cluster,) = (
        one for one in found
        if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("mooncake-cluster-")
    )  # fmt: skip
    address = cluster["data"]["metadata"]
    assert "etcd-peers" not in address
    for workload in ours(found):
        container = pod(workload)["containers"][0]
        (asks,) = (one for one in container["env"] if one["name"] == "METADATA")
        assert asks["valueFrom"]["configMapKeyRef"]["name"] == cluster["metadata"]["name"]
        files = {mount["mountPath"] for mount in container["volumeMounts"]}
        for path in re.findall(r"=(/[^&]+)", address):
            assert str(Path(path).parent) in files
    (policy,) = (one for one in found if one["metadata"]["name"] == "to-etcd")
    (rule,) = policy["spec"]["egress"]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "etcd"}}}]


def test_a_second_cluster_shares_neither_folder_nor_number_with_the_first(tmp_path: Path) -> None:
    found = shown("second-cluster", tmp_path)
    assert keys(found) - {("Namespace", "mooncake-b")} == keys(objects("prod")) - {("Namespace", "mooncake")}
    assert {one["metadata"]["namespace"] for one in found if one["kind"] != "Namespace"} == {"mooncake-b"}
    folders = {
        volume["hostPath"]["path"]
        for workload in ours(found)
        for volume in pod(workload)["volumes"]
        if "hostPath" in volume
    }
    assert folders == {"/run/mooncake-b"}
    queries = [
        one["spec"]["triggers"][0]["metadata"]["query"] for one in found if one["kind"] == "ScaledObject"
    ]
    assert len(queries) == 2
    assert all('namespace="mooncake-b"' in query for query in queries)
    wanted = {query.replace("mooncake-b", "mooncake") for query in queries}
    assert wanted == {
        one["spec"]["triggers"][0]["metadata"]["query"]
        for one in objects("prod")
        if one["kind"] == "ScaledObject"
    }


def test_the_second_cluster_after_gpu_is_refused_as_there_is_no_folder_to_give(tmp_path: Path) -> None:
    ((folder, text),) = (one for one in SHOWN if "second-cluster" in one[1])
    with pytest.raises(AssertionError, match="hostPath"):
        rendered(tmp_path / folder, text.replace("overlays/prod", "overlays/gpu"))
