"""One cluster over two hosts: prompts are computed on one and decoded on the other."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake.core import secret
from mooncake.core.errors import PeerTimeout
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata_messages import MetaGet, MetaReply
from mooncake.core.rpc import BlockingRpcClient
from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK
from tests.integration.hosts import SECRET, THERE, TwoHosts, no_second_host, second_host
from tests.integration.reference import random_prompt

WHY_NOT = no_second_host()
pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

PROMPT = random_prompt(700, 9001)
BLOCKS = len(PROMPT) // BLOCK + 1
"""Of the prompt, with its tail."""


@pytest.fixture(scope="module")
def hosts(model: Path) -> Iterator[TwoHosts]:
    with second_host() as space:
        hosts = TwoHosts(space, model)
        try:
            hosts.start(sorted(os.sched_getaffinity(0)))
            yield hosts
        finally:
            hosts.stop()


@pytest.fixture
def with_secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(secret.SECRET_ENV, SECRET)
    secret.cluster_secret.cache_clear()
    yield
    monkeypatch.undo()
    secret.cluster_secret.cache_clear()


def test_the_two_hosts_are_two(hosts: TwoHosts):
    ports = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
    assert THERE not in ports, "what listens there is not to be reached here by itself"


def test_a_prompt_computed_on_one_host_is_decoded_on_the_other(hosts: TwoHosts):
    pulled = hosts.store_metric("b", "mooncake_store_pull_blocks_total")
    answer = hosts.client.complete(PROMPT, max_tokens=24, **GREEDY)
    assert len(answer.tokens) == 24
    assert hosts.store_metric("b", "mooncake_store_pull_blocks_total") - pulled == BLOCKS
    assert hosts.store_metric("b", "mooncake_store_pull_failures_total") == 0


def test_tokens_do_not_depend_on_where_the_blocks_came_from(hosts: TwoHosts, with_secret: None):
    """The second answer loads on both hosts; the third computes on the decoding host: its store is dead."""
    first = hosts.client.complete(PROMPT, max_tokens=24, **GREEDY)
    hosts.forget_locally()
    second = hosts.client.complete(PROMPT, max_tokens=24, **GREEDY)
    assert second.outcome == first.outcome
    assert second.cached >= len(PROMPT) - BLOCK
    hosts.processes["store-b"].send_signal(signal.SIGKILL)
    hosts.processes["store-b"].wait(10.0)
    hosts.forget_locally()
    third = hosts.client.complete(PROMPT, max_tokens=24, **GREEDY)
    assert third.outcome == first.outcome
    hosts.wait("b's store is forgotten", lambda: hosts.records(STORES_PREFIX) == ["a"], 20.0)
    hosts.run_store("b")
    hosts.wait("b has a store again", lambda: sorted(hosts.records(STORES_PREFIX)) == ["a", "b"], 60.0)

    def fetches() -> bool:  # the engine there attaches to the new store by itself
        pulled = hosts.store_metric("b", "mooncake_store_pull_blocks_total")
        hosts.client.complete(random_prompt(700, time.monotonic_ns()), max_tokens=4, **GREEDY)
        return hosts.store_metric("b", "mooncake_store_pull_blocks_total") - pulled == BLOCKS

    hosts.wait("b fetches again", fetches, 60.0, 1.0)
    hosts.forget_locally()
    assert hosts.client.complete(PROMPT, max_tokens=24, **GREEDY).outcome == first.outcome


def test_a_stranger_learns_nothing(hosts: TwoHosts):
    client = BlockingRpcClient(hosts.metadata, MetaReply)
    try:
        with pytest.raises(PeerTimeout):
            client.call(MetaGet(STORES_PREFIX), 1.0)
    finally:
        client.close()
