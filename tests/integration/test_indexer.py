"""A real vLLM engine and a real indexer: what is cached is found by who asks as upstream's proxy does."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK as CLUSTER_BLOCK
from tests.integration.cluster import Cluster, wait_until
from tests.integration.engine_script import ROOT, run_script
from tests.integration.indexer_engine import ASKS, BLOCK, BLOCKS, longest, send, tokens_of
from tests.integration.ports import lasting_port
from tests.integration.reference import random_prompt
from tests.integration.setups import AGGREGATED

pytestmark = pytest.mark.integration

ALL = BLOCKS * BLOCK
START_S = 60.0


@contextlib.contextmanager
def indexer(*flags: str) -> Iterator[str]:
    """Run `mooncake indexer` as its users start it; yield its URL."""
    port = lasting_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mooncake", "indexer", f"--port={port}", "--log-level=warning", *flags],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_healthy(address, process)
        yield address
        process.terminate()
        assert process.wait(START_S) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with indexer() as address:
        yield address


def wait_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5.0):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end_s
            time.sleep(0.05)


@pytest.fixture(scope="module")
def asked(model: Path, url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What indexer_engine.py says; none of its processes outlives this."""
    folder = tmp_path_factory.mktemp("indexer")
    arguments = [str(folder), str(model), url, str(lasting_port()), str(lasting_port())]
    return json.loads(run_script("indexer_engine", arguments, "", folder).splitlines()[-1])


@pytest.mark.parametrize("label", ASKS)
def test_a_prompt_is_found_with_its_salt_and_adapter_and_not_with_another_salt(asked, label):
    assert asked["registered"] == {"status": "registered successfully", "instance_id": "vllm-0"}
    assert asked[label]["by tokens"] == asked[label]["as text"] == ALL
    assert asked[label]["another salt"] == 0


@pytest.mark.parametrize("label", ["salted", "adapter", "both"])
def test_names_by_upstream_s_bare_keys_would_find_nothing_of_this_vllm(asked, label):
    assert asked[label]["tagged hashes"] == ALL
    assert asked[label]["bare hashes"] == 0


def test_an_engine_that_is_gone_is_not_told_of_any_more(asked, url):
    """Its process has ended: what it had cached is gone with it."""
    end_s = time.monotonic() + START_S
    while True:
        with urllib.request.urlopen(f"{url}/services", timeout=30.0) as answer:
            (service,) = json.loads(answer.read())["services"]
        if service["State"] == "stale" or time.monotonic() > end_s:
            break
        time.sleep(0.05)
    assert service["State"] == "stale"
    assert service["Lost"] == service["Undecodable"] == 0
    query = {"model": "tiny", "block_size": BLOCK, "token_ids": tokens_of(0)}
    assert longest(send(f"{url}/query", query)) == 0


@pytest.mark.parametrize("cluster", [AGGREGATED], ids=lambda setup: setup.name, indirect=True)
def test_a_router_can_ask_what_our_own_cluster_holds(cluster: Cluster):
    prompt = random_prompt(5 * CLUSTER_BLOCK + 3, 7200)
    model = cluster.record("both-0").model
    query = {"model": model, "block_size": CLUSTER_BLOCK, "token_ids": prompt}
    with indexer(f"--metadata=ipc://{cluster.run_dir}/metadata.sock") as address:

        def hits() -> dict[str, Any]:
            return send(f"{address}/query?generation=2", query)["instances"]

        wait_until("both engines are known", lambda: len(hits()) == 2, START_S)
        assert {one["longest_matched"] for one in hits().values()} == {0}
        cluster.client.complete(prompt, max_tokens=4, **GREEDY)
        everything = 5 * CLUSTER_BLOCK
        # whoever computed it has it in its own cache, and the pool has it for the other one
        wait_until(
            "the prompt is found",
            lambda: (
                sorted((one["gpu"], one["cpu"]) for one in hits().values())
                == [(0, everything), (everything, everything)]
            ),
            START_S,
        )
