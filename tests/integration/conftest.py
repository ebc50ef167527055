"""Real clusters, shared by tests of one setup: the most expensive thing here is a start (30 s).

Tests say what they need with `@pytest.mark.parametrize("cluster", [SETUP], indirect=True)`; they are
sorted so that every setup is started once, and at most one cluster runs at any time.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, Clusters, Setup
from tests.integration.etcd_servers import running as etcd_running
from tests.integration.fronts import Fronts
from tests.integration.fronts import running as fronts_running
from tests.integration.reference import Reference
from tests.tiny_model import make_tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def reference(model: Path) -> Iterator[Reference]:
    """Answers of stock vLLM to every job of the parity tests."""
    reference = Reference(model)
    yield reference
    reference.close()


@pytest.fixture(scope="session", autouse=True)
def _early_reference(request: pytest.FixtureRequest) -> None:
    """Let the reference compute while the first cluster starts, if any test will ask for it."""
    if any("reference" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("reference")


@pytest.fixture(scope="session")
def clusters(model: Path) -> Iterator[Clusters]:
    clusters = Clusters(model)
    yield clusters
    clusters.close()


@pytest.fixture(scope="module")
def fronts(model: Path, clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    """Gateways and cores in processes of their own, over a real etcd: one such cluster for each module."""
    clusters.close()  # two cores are shared by everything
    with (
        etcd_running(tmp_path_factory.mktemp("etcd")) as etcd,
        fronts_running(model, f"etcd://127.0.0.1:{etcd.ports[0]}") as fronts,
    ):
        yield fronts


@pytest.fixture
def cluster(clusters: Clusters, request: pytest.FixtureRequest) -> Cluster:
    """A running cluster of the setup that the test is parametrised with, complete and idle."""
    cluster = clusters.get(request.param)
    cluster.assert_nothing_leaked(10.0)
    return cluster


def _setup_of(item: pytest.Item) -> Setup | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("cluster") if callspec else None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "last: runs after all other tests of its cluster")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by setup; tests without a cluster come last: by then the reference is there."""
    order: dict[Setup | None, int] = {None: len(items)}
    for item in items:
        order.setdefault(_setup_of(item), len(order))
    items.sort(key=lambda item: (order[_setup_of(item)], item.get_closest_marker("last") is not None))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Show the cluster's logs with a failure."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        with contextlib.suppress(OSError):
            report.sections.append(("cluster logs", cluster.logs()))
    return report
