"""`kubectl apply -k` of the dev overlay serves; scaling, restarts, a drain and a hang drop no request.

The manifests are deploy/overlays/dev-cpu but for the model (tests/kube/tiny); pods are real processes on two
"nodes" of the stand-in (tests/kube/standin), each with its own store. One cluster serves all tests, which
follow each other. Every answer under traffic is compared with that of the undisturbed cluster.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kube.cluster import GONE_S, NEEDS_PODS, pid_of
from tests.kube.serving import OVERLAY, READY_S, SPACE, Serving, Tally, fill, serving

pytestmark = [
    pytest.mark.kube,
    NEEDS_PODS,
    pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd here: scripts/etcd-parts"),
    pytest.mark.timeout(1200),
]
WORKLOADS = ("deploy/etcd", "deploy/core", "deploy/gateway", "deploy/prefill", "deploy/decode", "ds/store")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    models = tmp_path_factory.mktemp("models")
    fill(models)
    begun_s = time.monotonic()
    with serving(models) as cluster:
        print(f"\nkubectl apply to the first token: {cluster.first_token_s:.1f} s")
        cluster.rolled(*WORKLOADS)
        cluster.learn()
        print(f"begin: {time.monotonic() - begun_s:.0f} s, {cluster.kube.cpu_s():.0f} CPU-s")
        yield cluster


@pytest.fixture(autouse=True)
def phase(cluster: Serving, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what a step took."""
    begun_s, cpu_s = time.monotonic(), cluster.kube.cpu_s()
    yield
    took_s, used_s = time.monotonic() - begun_s, cluster.kube.cpu_s() - cpu_s
    print(f"{request.node.name.removeprefix('test_')}: {took_s:.0f} s, {used_s:.0f} CPU-s")


def report(cluster: Serving, what: str, tally: Tally) -> None:
    """Fail on a dropped request; print a row of the table."""
    assert not tally.dropped, f"{what}: {tally.dropped}\n{cluster.kube.logs()}"
    assert tally.answered
    times = f"p50 {tally.p50_s:.3f} s, p99 {tally.p99_s:.3f} s"
    print(f"{what}: {tally.answered} requests, none dropped, TTFT {times}")


def test_pods_run_as_the_manifests_say_and_without_the_key_nobody_is_served(cluster: Serving) -> None:
    for component in ("core", "gateway", "prefill", "decode", "store"):
        for pod in cluster.pods(component):
            status = Path(f"/proc/{pid_of(pod)}/status").read_text()
            assert "\nUid:\t10001\t10001\t10001\t10001\n" in status
            assert "\nCapEff:\t0000000000000000\n" in status
            assert "\nNoNewPrivs:\t1\n" in status
            assert pod["status"]["containerStatuses"][0]["restartCount"] == 0, cluster.kube.logs()
    with cluster.client() as client:
        del client.http.headers["Authorization"]
        assert client.http.post("/v1/completions", json=client.body("hello", {})).status_code == 401


def test_undisturbed(cluster: Serving) -> None:
    with cluster.traffic() as tally:
        cluster.wait_answered(tally, 12)
    report(cluster, "undisturbed", tally)


def test_a_core_that_hangs_is_started_again_while_decode_is_scaled_up(cluster: Serving) -> None:
    (core,) = cluster.pods("core")
    before = core["status"]["containerStatuses"][0]["restartCount"]
    with cluster.traffic() as tally:
        os.kill(pid_of(core), signal.SIGSTOP)
        cluster.kubectl("scale", "deploy/decode", "--replicas=2")
        cluster.rolled("deploy/decode")

        def restarted() -> bool:
            (status,) = cluster.pods("core")[0]["status"]["containerStatuses"]
            return status["restartCount"] > before and status["ready"]

        cluster.kube.wait("the core is started again", restarted, READY_S)
        cluster.wait_answered(tally, 6)
    report(cluster, "core hangs, decode 1 -> 2", tally)
    assert len({pod["spec"]["nodeName"] for pod in cluster.pods("decode")}) == 2


def test_a_drained_node_moves_its_decode_pod_and_scaling_down_ends_one(cluster: Serving) -> None:
    node = cluster.pods("decode")[0]["spec"]["nodeName"]
    with cluster.traffic() as tally:
        words = ("drain", node, "--pod-selector=app.kubernetes.io/component=decode", "--delete-emptydir-data")
        cluster.kubectl(*words, f"--timeout={READY_S:g}s", timeout_s=READY_S)
        cluster.rolled("deploy/decode")
        assert node not in {pod["spec"]["nodeName"] for pod in cluster.pods("decode")}
        cluster.kubectl("scale", "deploy/decode", "--replicas=1")
        cluster.rolled("deploy/decode")
        cluster.kubectl("uncordon", node)
        cluster.wait_answered(tally, 6)
    report(cluster, "drain of a node, decode 2 -> 1", tally)


def test_all_but_the_metadata_store_restarts_at_once(cluster: Serving) -> None:
    with cluster.traffic() as tally:
        cluster.restart("deploy/core", "deploy/gateway", "deploy/prefill", "deploy/decode", "ds/store")
        cluster.wait_answered(tally, 6)
    report(cluster, "rolling restart of core, gateway, prefill, decode and stores", tally)


def test_delete_leaves_nothing(cluster: Serving) -> None:
    words = ("delete", "-k", str(OVERLAY), "--ignore-not-found", f"--timeout={READY_S:g}s")
    cluster.kube.kubectl(*words, timeout_s=READY_S)
    assert not cluster.kube.get("pods", "-A")["items"]
    assert SPACE not in cluster.kube.kubectl("get", "namespaces")
    kube = cluster.kube
    kube.wait("only the stand-in runs", lambda: kube.tagged() == [kube.process.pid], GONE_S)
