"""Every query of every board and rule, asked of a real Prometheus that scrapes a real cluster under load."""

import contextlib
import math
import re
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mooncake.dashboards import load_boards
from mooncake.dashboards.rules import RULES
from tests.integration.client import GREEDY
from tests.integration.cluster import Cluster, wait_until
from tests.integration.pool_processes import PoolProcesses, key, until
from tests.integration.ports import lasting_port
from tests.integration.reference import random_prompt
from tests.integration.setups import THREE
from tests.observability.prometheus import NEEDS_PROMETHEUS, Prometheus, running

pytestmark = [
    pytest.mark.integration,
    pytest.mark.last,  # others count changes of roles
    NEEDS_PROMETHEUS,
    pytest.mark.parametrize("cluster", [THREE], ids=lambda setup: setup.name, indirect=True),
]

LOAD_S = 15.0
"""Long enough for a dozen scrapes of every process, on a slow machine too: they are a second apart."""
SETTLE_S = 5.0
"""For some scrapes of what has happened last."""
WINDOW = "10s"
"""In place of $__rate_interval: ten scrapes."""
STEP_S = 2.0
SIZE = 256 << 10
BLOCKS = 20
MOVED = "mooncake_transfer_bytes_total"
NOT_HERE = {
    "Fail-overs": "one transport only: there is no rdma to fall back from",
    "Pairs of NICs": "no RDMA device",
    "Events of pairs of NICs": "no RDMA device",
    "Retries": "a healthy link retries nothing; links are named when they do",
    "Failures by reason": "as with retries",
    "Path state": "only paths that have failed",
}
"""Panels without series here, and why; any other one fails."""


class Pool(PoolProcesses):
    """Two stores and a directory beside the cluster: a single host moves nothing between stores."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = {name: lasting_port() for name in ("a", "b", "d")}

    def _mooncake(self, name: str, *words: str) -> int:
        ssd = ("--ssd", str(self.folder / "ssd"), "--ssd-size", "1GiB") if name == "a" else ()
        return super()._mooncake(name, *words, *ssd, "--admin-port", str(self.ports[name]))


class Load:
    """Short requests of every kind, until it is told to end."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.error: Exception | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            for turn in count():
                if self._end.is_set():
                    return
                self._turn(turn)
        except Exception as error:  # noqa: BLE001 - told by end()
            self.error = error

    def _turn(self, turn: int) -> None:
        client = self._cluster.client
        prompt = random_prompt(6 * 32 + 5, 7000 + turn)
        for _ in "12":  # the second time it is a hit
            assert self._post(prompt).status_code == 200
        refused = self._post(random_prompt(20 * 32, 8000 + turn), {"x-slo-ttft-ms": "1"})
        assert refused.status_code in (200, 429)  # the first ones may be taken: nothing has been measured yet
        stream = client.stream(prompt, max_tokens=400, **GREEDY)
        stream.wait_tokens(2)
        stream.hang_up()

    def _post(self, prompt: list[int], headers: dict[str, str] | None = None) -> httpx.Response:
        client = self._cluster.client
        body = client.body(prompt, {"max_tokens": 8, **GREEDY})
        return client.http.post("/v1/completions", json=body, headers=headers)

    def end(self) -> None:
        """Stop; fail if something failed."""
        self._end.set()
        self._thread.join(60.0)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


def config(cluster: Cluster, pool: Pool) -> str:
    """Return the configuration that `mooncake up` has written, quicker, and with the pool's processes."""
    written = yaml.safe_load((cluster.run_dir / "prometheus.yml").read_text())
    written["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
    written["rule_files"] = [str(RULES)]
    (job,) = written["scrape_configs"]
    job["static_configs"] += [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"process": name}} for name, port in pool.ports.items()
    ]
    return yaml.safe_dump(written)


class Watched:
    """A Prometheus that has seen a cluster at work from `start_s` to `end_s`."""

    def __init__(self, prometheus: Prometheus, cluster: Cluster, pool: Pool) -> None:
        self.prometheus = prometheus
        self.start_s = time.time()
        load = Load(cluster)
        self._disturb(cluster, pool)
        time.sleep(max(SETTLE_S, self.start_s + LOAD_S - time.time()))  # rates are over time itself
        load.end()
        self.end_s = time.time()

    def _disturb(self, cluster: Cluster, pool: Pool) -> None:
        change_a_role(cluster)
        blocks = [key(number) for number in range(BLOCKS)]
        a = pool.store("a", "8MiB")
        pool.store("b", "16MiB")
        pool.directory("d")
        pool.put(a, blocks, SIZE, batch=8)
        pool.wait_exact(pool.admin("d"))
        self._copy(pool, blocks[: BLOCKS // 2])
        moved = f'sum({MOVED}{{op="read"}})'  # a series has to be there before it grows
        wait_until("the copy is scraped", lambda: self.prometheus.value(moved), 60.0)
        self._copy(pool, blocks[BLOCKS // 2 :])
        for first in range(1000, 1000 + 2 * BLOCKS, 8):  # it evicts; what the SSD's copier reads cannot go
            time.sleep(0.5)
            pool.put(a, [key(first + number) for number in range(8)], SIZE)
        evicted = "sum(mooncake_store_eviction_age_seconds_count)"
        wait_until("the evictions are scraped", lambda: self.prometheus.value(evicted), 60.0)

    def _copy(self, pool: Pool, blocks: list[bytes]) -> None:
        admin = pool.admin("d")
        order = {"keys": [one.hex() for one in blocks], "target": "b"}
        task = until(lambda: admin.post("/tasks/copy", order))["task_id"]
        until(lambda: admin.get(f"/tasks/{task}")["state"] == "done")

    def series(self, expr: str) -> list[list[float]]:
        """Return the series of a panel's query, as Grafana would ask for it."""
        return self.prometheus.series(fill(expr), self.start_s, self.end_s, STEP_S)


def fill(expr: str) -> str:
    """Put values in the place of a board's variables: All, and a window."""
    filled = expr.replace("$__rate_interval", WINDOW)
    return re.sub(r"\$(namespace|model|instance|tenant|process)\b", ".*", filled)


def roles(cluster: Cluster) -> dict[str, str]:
    return {row["instance_id"]: row["role"] for row in cluster.view()["instances"]}


def change_role(cluster: Cluster, instance_id: str, role: str) -> None:
    order = {"instance_id": instance_id, "role": role}
    httpx.post(f"{cluster.url}/mooncake/roles", json=order, timeout=10.0).raise_for_status()
    wait_until(f"{instance_id} is {role}", lambda: roles(cluster)[instance_id] == role, 60.0)


def change_a_role(cluster: Cluster) -> None:
    """Give an instance another role, and its own again."""
    before = roles(cluster)
    twice = [role for role in before.values() if list(before.values()).count(role) > 1]
    instance_id = next(name for name, role in before.items() if role in twice)
    change_role(cluster, instance_id, "decode" if before[instance_id] == "prefill" else "prefill")
    change_role(cluster, instance_id, before[instance_id])


@pytest.fixture(scope="module")
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


SEEN: list[Watched] = []
"""Watching takes its time: once for all tests here."""


@pytest.fixture
def watched(
    cluster: Cluster, stack: contextlib.ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    if not SEEN:
        folder = tmp_path_factory.mktemp("boards")
        pool = stack.enter_context(contextlib.closing(Pool(folder)))
        prometheus = stack.enter_context(running(folder, config(cluster, pool)))
        SEEN.append(Watched(prometheus, cluster, pool))
        stack.callback(SEEN.clear)
    return SEEN[0]


def silent(watched: Watched, boards: list[dict[str, Any]]) -> dict[str, str]:
    """Return the queries that gave no number, by "board / panel"."""
    found = {}
    for board in boards:
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                values = watched.series(target["expr"])
                if not any(math.isfinite(value) for series in values for value in series):
                    found[f"{board['title']} / {panel['title']}"] = target["expr"]
    return found


def test_every_query_of_every_panel_gives_numbers_from_a_cluster_at_work(watched: Watched):
    found = silent(watched, list(load_boards().values()))
    unexpected = {name: expr for name, expr in found.items() if name.split(" / ")[-1] not in NOT_HERE}
    assert not unexpected, "\n".join(f"{name}: no series for {expr}" for name, expr in unexpected.items())
    came = set(NOT_HERE) - {name.split(" / ")[-1] for name in found}
    assert not came, f"these have series: take them from NOT_HERE: {came}"


def test_a_panel_whose_metric_nobody_has_is_found(watched: Watched):
    board = {
        "title": "x",
        "panels": [{"title": "y", "targets": [{"expr": "rate(mooncake_request_total[1m])"}]}],
    }
    assert list(silent(watched, [board])) == ["x / y"]
    board["panels"][0]["targets"][0]["expr"] = "sum(rate(mooncake_requests_total["
    with pytest.raises(AssertionError, match="parse error"):
        silent(watched, [board])


def test_every_variable_of_a_board_has_values(watched: Watched):
    for board in load_boards().values():
        for variable in board["templating"]["list"]:
            if (
                variable["type"] == "query" and variable["name"] != "namespace"
            ):  # there is none without Kubernetes
                match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
                assert match, variable
                assert watched.prometheus.label_values(*match.groups()), variable["query"]


def test_all_rules_evaluate_and_all_processes_are_scraped(watched: Watched):
    def bad() -> list[Any]:
        return [rule for rule in watched.prometheus.rules() if rule["health"] != "ok"]

    wait_until("every rule has been evaluated", lambda: not bad(), 30.0)
    down = [target["labels"] for target in watched.prometheus.targets() if target["health"] != "up"]
    assert not down
