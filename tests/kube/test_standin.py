"""The stand-in itself, with kubectl and pods that are small web servers."""

import contextlib
import http.client
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kube.cluster import GONE_S, NEEDS_PODS, Kube, pid_of, running

pytestmark = [pytest.mark.integration, NEEDS_PODS]
HERE = Path(__file__).parent / "web"
WAIT_S = 120.0


@pytest.fixture(scope="module")
def kube() -> Iterator[Kube]:
    with running("--probe-factor=0.2", publish=["demo/web:80"]) as kube:
        kube.kubectl("apply", "-k", str(HERE))
        kube.kubectl("-n", "demo", "rollout", "status", "deploy/web", "--timeout=180s")
        kube.wait("the proxy knows the pods", lambda: reaches(kube), WAIT_S)
        yield kube


def reaches(kube: Kube) -> bool:
    """Return whether the Service answers."""
    with contextlib.suppress(ConnectionError):
        return ask(kube)[0] == 200
    return False


def ask(kube: Kube, path: str = "/") -> tuple[int, str]:
    """Ask the Service, over a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", kube.ports["demo/web:80"], timeout=WAIT_S)
    connection.request("GET", path)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def served_by(kube: Kube, name: str, times: int = 4) -> bool:
    """Return whether so many new connections all lead to one pod."""
    with contextlib.suppress(ConnectionError):  # the proxy learns a little later what is gone
        return all(f"host={name}" in ask(kube, "/facts")[1] for _ in range(times))
    return False


def test_a_pod_has_the_user_the_root_and_the_names_that_its_spec_says(kube: Kube) -> None:
    status, text = ask(kube, "/facts")
    assert status == 200
    facts = dict(line.split("=", 1) for line in text.splitlines())
    assert facts["uid"] == "10001"
    assert facts["groups"] == "10001"
    assert facts["root"] == "read-only"
    assert facts["pid"] == "1"
    assert facts["host"] in {pod["metadata"]["name"] for pod in kube.pods("demo")}
    assert facts["name"] == kube.get("service", "web", "-n", "demo")["spec"]["clusterIP"]
    assert facts["own"] == facts["ip"]
    assert facts["nobody"] == "unknown"
    assert facts["key"] == "from the secret"


def test_what_is_applied_again_is_unchanged_and_what_is_wrong_is_refused(kube: Kube) -> None:
    told = kube.kubectl("apply", "-k", str(HERE)).splitlines()
    # of a budget kubectl always says that it is configured: its selector has the strategy "replace"
    assert [line.split()[-1] for line in told] == [*["unchanged"] * 5, "configured"]
    assert kube.get("poddisruptionbudget", "web", "-n", "demo")["metadata"]["generation"] == 1
    patch = ["-n", "demo", "patch", "deploy", "web", "--type=merge", "-p", '{"spec": {"replica": 3}}']
    assert "'replica' was unexpected" in kube.kubectl(*patch, check=False)


def test_a_rolling_restart_of_a_server_that_drains_drops_no_request(kube: Kube) -> None:
    failures: list[str] = []
    answered = 0
    leave = threading.Event()

    def load() -> None:
        nonlocal answered
        while not leave.is_set():
            try:
                status, _ = ask(kube)
            except (OSError, http.client.HTTPException) as error:
                failures.append(repr(error))
            else:
                answered += 1
                if status != 200:
                    failures.append(str(status))

    thread = threading.Thread(target=load, daemon=True)
    before = {pod["metadata"]["uid"] for pod in kube.pods("demo")}
    thread.start()
    kube.kubectl("-n", "demo", "rollout", "restart", "deploy/web")
    kube.kubectl("-n", "demo", "rollout", "status", "deploy/web", "--timeout=180s")
    kube.wait("the old pods are gone", lambda: len(kube.pods("demo")) == 2, WAIT_S)
    leave.set()
    thread.join(WAIT_S)
    assert before.isdisjoint(pod["metadata"]["uid"] for pod in kube.pods("demo"))
    assert not failures
    assert answered > 0


def test_a_process_that_stands_still_gets_no_traffic_and_is_started_again(kube: Kube) -> None:
    stopped, other = kube.pods("demo")
    before = stopped["status"]["containerStatuses"][0]["restartCount"]
    os.kill(pid_of(stopped), signal.SIGSTOP)

    def left() -> bool:
        path = "/apis/discovery.k8s.io/v1/namespaces/demo/endpointslices/web"
        slices = kube.read(path)["endpoints"]
        return [one["targetRef"]["name"] for one in slices] == [other["metadata"]["name"]]

    kube.wait("the pod is not ready", left, WAIT_S)
    kube.wait("the proxy knows it", lambda: served_by(kube, other["metadata"]["name"]), WAIT_S)

    def restarted() -> bool:
        path = f"/api/v1/namespaces/demo/pods/{stopped['metadata']['name']}"
        (status,) = kube.read(path)["status"]["containerStatuses"]
        return status["restartCount"] > before and status["ready"]

    kube.wait("it is started again", restarted, WAIT_S)


def test_a_drained_node_is_empty_and_budgets_are_kept(kube: Kube) -> None:
    kube.kubectl("drain", "node-0", "--delete-emptydir-data", "--timeout=5s", check=False)
    assert kube.pods("demo"), "the budget lets one of two go, whose replacement has no node"
    assert kube.kubectl("get", "nodes").split()[-2] == "true"
    kube.kubectl("uncordon", "node-0")
    kube.kubectl("-n", "demo", "rollout", "status", "deploy/web", "--timeout=180s")


def test_delete_leaves_no_object_and_no_process(kube: Kube) -> None:
    kube.kubectl("delete", "-k", str(HERE), "--timeout=180s")
    assert not kube.get("pods", "-A")["items"]
    kube.wait("only the stand-in runs", lambda: kube.tagged() == [kube.process.pid], GONE_S)


def test_nothing_survives_a_stand_in_that_is_killed(kube: Kube) -> None:
    with running("--probe-factor=0.2") as other:
        other.kubectl("apply", "-k", str(HERE))
        other.kubectl("-n", "demo", "rollout", "status", "deploy/web", "--timeout=180s")
        assert len(other.tagged()) > 2
        other.process.kill()
        other.process.wait(GONE_S)
        kube.wait("all are gone", lambda: not other.tagged(), GONE_S)
        other.process.returncode = 0  # as it was meant to be
