"""Pods that are deleted: while they start, by force, and again with less time."""

import asyncio
import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kube.cluster import GONE_S, NEEDS_PODS, Kube, running
from tests.kube.standin.container import Container
from tests.kube.standin.pod import Pod, Settings
from tests.kube.standin.sandbox import Sandbox
from tests.kube.standin.volumes import Places

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


class Here(Sandbox):
    """The network of this machine."""

    def enter(self) -> list[str]:
        """Return no command that leads elsewhere."""
        return ["env"]


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


@pytest.fixture
def container(tmp_path: Path) -> Container:
    """Return one that is not started."""
    return Container(Here(0, "here"), tmp_path / "c", tmp_path / "layers", [], dict(os.environ))


async def begin(container: Container, folder: Path) -> None:
    """Start it; its root takes a while, and SIGTERM in that time ends it with 7."""
    script = f"trap 'exit 7' TERM; sleep 0.5; : > {folder}/c/made; while :; do sleep 0.05; done"
    await container.start(script, [], "/", folder / "log", [])


async def test_a_container_whose_root_is_being_made_is_asked_to_end_when_its_command_runs(
    container: Container, tmp_path: Path
) -> None:
    spec = {"metadata": {"name": "pod"}, "spec": {"containers": [{"name": "c"}]}}
    places = Places(tmp_path, tmp_path, tmp_path, tmp_path, {})
    settings = Settings(os.environ["PATH"])
    pod = Pod(spec, Here(0, "here"), places, tmp_path, lambda *_: None, settings, print, lambda _: [])
    pod._running["c"] = container
    starting = asyncio.create_task(begin(container, tmp_path))
    await pod.end(GONE_S)
    await starting
    assert await container.wait() == 7
    assert (tmp_path / "c/made").exists()


async def test_a_container_that_is_killed_before_it_has_a_process_gets_none_that_lives(
    container: Container, tmp_path: Path
) -> None:
    starting = asyncio.create_task(begin(container, tmp_path))
    await asyncio.sleep(0)
    await container.kill()
    await starting
    assert not container.running
