"""A real cluster as the live page and `mooncake top` show it."""

import json
import re
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import BF16

pytestmark = pytest.mark.integration

PROCESSES = ("conductor", "prefill-0", "decode-0", "store-local")
SEEN_S = 60.0
"""A few rounds of the ring, on a busy machine."""


def of_conductor(cluster: Cluster) -> str:
    """Return the address of the Conductor's admin server, as prometheus.yml tells it."""
    text = (cluster.run_dir / "prometheus.yml").read_text()
    found = re.search(r'targets: \["([^"]+)"\]\n\s+labels: \{process: "conductor"\}', text)
    assert found, text
    return f"http://{found[1]}"


def newest(base: str, query: str) -> list[tuple[dict[str, str], float]]:
    """Return the labels and newest values of a query, as the page asks it."""
    status = httpx.get(f"{base}/dashboard/api/status").json()
    asked: dict[str, Any] = {"query": query, "start": status["now_s"], "end": status["now_s"], "step": 5}
    reply = httpx.get(f"{base}/dashboard/api/query_range", params=asked)
    assert reply.status_code == 200, reply.text
    return [(one["metric"], float(one["values"][-1][1])) for one in reply.json()["data"]["result"]]


@pytest.mark.parametrize("cluster", [BF16], indirect=True)
def test_the_live_page_remembers_every_process(cluster: Cluster):
    base = of_conductor(cluster)
    before = sum(value for _, value in newest(base, "sum(mooncake_tokens_total)"))
    cluster.client.complete(random_prompt(40, seed=71), max_tokens=8, **GREEDY)

    def seen() -> bool:
        up = {labels["process"]: value for labels, value in newest(base, "up")}
        tokens = newest(base, "sum(mooncake_tokens_total)")
        return up == dict.fromkeys(PROCESSES, 1.0) and tokens[0][1] >= before + 8

    wait_until("the page knows every process and the tokens", seen, SEEN_S, every_s=0.5)
    assert newest(base, "sum(mooncake_engine_kv_use_ratio)")


@pytest.mark.parametrize("cluster", [BF16], indirect=True)
def test_top_tells_of_every_process(cluster: Cluster):
    command = [sys.executable, "-m", "mooncake", "top", "--json", "--url", cluster.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SEEN_S, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [row["name"] for row in found["instances"]] == ["prefill-0", "decode-0"]
    for row in found["instances"]:
        assert (row["state"], row["running"], row["waiting"]) == ("alive", 0, 0)
        assert row["kv_use"] is not None
        assert row["bad_blocks"] == 0
    (store,) = found["stores"]
    assert store["used_bytes"] > 0
    assert found["totals"]["ttft_p50_s"] > 0
