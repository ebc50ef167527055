"""Pods that are deleted: while they start, by force, and again with less time."""

import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kube.cluster import GONE_S, NEEDS_PODS, Kube, running

pytestmark = [pytest.mark.integration, NEEDS_PODS]
STARTS = [0.0, 0.05, 0.1, 0.2]
"""Seconds into a start, which takes some tenths."""
SOON_S, LONG_S = 2, 600
"""To end. A first process that has not come to its trap yet hears no SIGTERM, here as in a cluster."""
DEAF = "trap : TERM; while :; do sleep 1000; done"


@pytest.fixture(scope="module")
def kube() -> Iterator[Kube]:
    with running() as kube:
        yield kube


def start(kube: Kube, folder: Path, name: str, grace_s: int) -> None:
    """Create a pod whose first process does not mind SIGTERM."""
    text = f"""
        apiVersion: v1
        kind: Pod
        metadata: {{name: {name}}}
        spec:
          terminationGracePeriodSeconds: {grace_s}
          containers: [{{name: sh, image: none, command: [sh, -c, "{DEAF}"]}}]
        """
    path = folder / f"{name}.yaml"
    path.write_text(textwrap.dedent(text))
    kube.kubectl("apply", "-f", str(path))


def delete(kube: Kube, name: str, *flags: str) -> None:
    """Delete a pod; do not wait for its end."""
    kube.kubectl("delete", "pod", name, "--wait=false", *flags)


def all_gone(kube: Kube) -> None:
    """Wait until neither an object nor a process of a pod is left."""
    kube.wait("no pod is left", lambda: not kube.read("/api/v1/pods")["items"], GONE_S)
    kube.wait("only the stand-in runs", lambda: kube.tagged() == [kube.process.pid], GONE_S)


@pytest.mark.parametrize("after_s", STARTS)
def test_a_pod_that_is_deleted_while_it_starts_ends_within_its_grace(
    kube: Kube, tmp_path: Path, after_s: float
) -> None:
    start(kube, tmp_path, "early", SOON_S)
    time.sleep(after_s)
    delete(kube, "early")
    all_gone(kube)


@pytest.mark.parametrize("flags", [("--grace-period=1",), ("--grace-period=0", "--force")])
def test_a_second_deletion_with_less_time_shortens_the_first(
    kube: Kube, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    start(kube, tmp_path, "deaf", LONG_S)
    path = "/api/v1/namespaces/default/pods/deaf"
    kube.wait("it runs", lambda: kube.read(path).get("status", {}).get("phase") == "Running", GONE_S)
    delete(kube, "deaf")
    assert len(kube.tagged()) > 1
    delete(kube, "deaf", *flags)
    all_gone(kube)


def test_a_pod_that_is_deleted_by_force_while_it_starts_leaves_no_process(kube: Kube, tmp_path: Path) -> None:
    start(kube, tmp_path, "forced", LONG_S)
    delete(kube, "forced", "--grace-period=0", "--force")
    all_gone(kube)
