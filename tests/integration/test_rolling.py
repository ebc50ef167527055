"""Every process of a cluster is restarted in turn under streams, as an upgrade does: no client sees it.

Old ones end before new ones start, which is the harder order: a store's DaemonSet, a StatefulSet, one host.
"""

import itertools
import json
import os
import re
import signal
import time
from typing import Any

import httpx
import pytest

from mooncake.core.process import alive
from mooncake.drain_cli import drained
from tests.integration.client import GREEDY, Client
from tests.integration.etcd_servers import NEEDS_ETCD
from tests.integration.fronts import Crowd, Fronts
from tests.integration.reference import random_prompt

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

PROMPTS, TOKENS = 6, 40
"""Six conversations, each of which is asked again and again; an answer takes about a second."""
BACK_S = 120.0
"""A process imports nothing when it comes back; the machine may be busy with others."""


class Streams(Crowd):
    """Clients that stream all the time, each request over a new connection; every answer is compared."""

    def __init__(self, fronts: Fronts, threads: int = 3) -> None:
        super().__init__(fronts, threads)
        self._prompts = [random_prompt(50 + 30 * i, 700 + i) for i in range(PROMPTS)]
        self.expected = [self._tokens(prompt) for prompt in self._prompts]

    def _tokens(self, prompt: list[int]) -> list[int]:
        client = Client(self._fronts.url, self._fronts.client.model)
        try:
            return client.stream(prompt, max_tokens=TOKENS, **GREEDY).result().tokens
        finally:
            client.close()

    def ask(self, turn: int) -> str:
        """See Crowd."""
        number = turn % PROMPTS
        try:
            tokens = self._tokens(self._prompts[number])
        except (AssertionError, httpx.HTTPError) as error:
            return f"prompt {number}: {error!r}"
        if tokens != self.expected[number]:
            return f"prompt {number}: {tokens} instead of {self.expected[number]}"
        return ""

    def wait_answered(self, more: int) -> None:
        """See Crowd; fail at the first failure."""
        super().wait_answered(more)
        assert not self.failures, f"{self.failures[:3]}\n{self._fronts.logs()}"


def listed(fronts: Fronts, kind: str) -> dict[str, dict[str, Any]]:
    """Return what the cluster knows of its processes of a kind, by name."""
    key = {"instances": "instance_id", "stores": "node"}.get(kind, "name")
    return {one[key]: one for one in fronts.view()[kind]}


def admin(one: dict[str, Any], path: str) -> tuple[int, str]:
    answer = httpx.get(one["metrics_url"].replace("/metrics", path), timeout=10.0)
    return answer.status_code, answer.text.strip()


def restart(fronts: Fronts, kind: str, name: str, *signals: signal.Signals, ask: bool = False) -> float:
    """Tell one process to go and return when its successor is ready, and after how many seconds.

    `ask`: drain it first, as a pod's preStop command does.
    """
    before = listed(fronts, kind)[name]
    assert admin(before, "/readyz") == (200, "ready")
    begun_s = time.monotonic()
    if ask:
        assert drained(before["metrics_url"].removesuffix("/metrics"), BACK_S) is None
        assert admin(before, "/readyz") == (503, "draining: asked for")
        assert alive(before["pid"]), "it waits to be told"
    for number in signals or (signal.SIGTERM,):
        os.kill(before["pid"], number)

    def back() -> bool:
        now = listed(fronts, kind).get(name)
        if now is None or now["pid"] == before["pid"] or now.get("state", "alive") != "alive":
            return False
        try:
            return admin(now, "/readyz")[0] == 200
        except httpx.TransportError:
            return False

    fronts.wait(f"the old {name} ends", lambda: not alive(before["pid"]), BACK_S)
    fronts.wait(f"a new {name} is ready", back, BACK_S)
    return time.monotonic() - begun_s


def test_every_process_tells_how_it_is_on_its_own_page(fronts: Fronts):
    kinds = {"stores": ["store"], "gateways": ["gateway"], "cores": ["core"]}
    for kind in ("stores", "gateways", "cores", "instances"):
        for name, one in listed(fronts, kind).items():
            expected = kinds.get(kind, [name.partition("-")[0], "engine", "relay"])
            _, page = admin(one, "/metrics")
            lag = re.findall(r'mooncake_process_event_loop_lag_seconds_count\{kind="(\w+)"\}', page)
            memory = re.findall(r'mooncake_process_resident_bytes\{kind="(\w+)"\}', page)
            assert set(lag) | set(memory) == set(expected), name
            assert ("vllm:" in page) == (kind == "gateways"), "its API port shows the same"
            assert [admin(one, path)[0] for path in ("/livez", "/startupz", "/readyz")] == [200] * 3
            assert json.loads(admin(one, "/drain")[1]) == {"state": "ready", "in_flight": 0}


def test_every_process_is_restarted_under_streams_and_no_request_fails(fronts: Fronts):
    turns = [
        *(("stores", name) for name in listed(fronts, "stores")),
        *(("instances", name) for name in listed(fronts, "instances")),
        *(("gateways", name) for name in listed(fronts, "gateways")),
        ("cores", fronts.leader()["name"]),
    ]
    assert len(turns) == 6
    with Streams(fronts) as streams:
        streams.wait_answered(2)
        for kind, name in turns:
            took_s = restart(fronts, kind, name, ask=kind == "instances")
            print(f"{name} was back after {took_s:.1f} s")
            streams.wait_answered(4)
    assert not streams.failures


def test_a_stream_that_is_longer_than_the_drain_is_handed_over(fronts: Fronts):
    prompt = random_prompt(60, 999)
    quiet = fronts.client.stream(prompt, max_tokens=300, **GREEDY).result()
    stream = fronts.client.stream(prompt, max_tokens=300, **GREEDY)
    stream.wait_tokens(5)
    restart(fronts, "instances", "decode-0", signal.SIGTERM, signal.SIGTERM)
    assert stream.result().outcome == quiet.outcome


def test_a_store_that_is_back_is_used_again_by_the_engines_that_stayed(fronts: Fronts):
    name = next(iter(listed(fronts, "stores")))
    restart(fronts, "stores", name)
    seeds = itertools.count(5000)

    def hit() -> bool:
        prompt = random_prompt(200, next(seeds))
        fronts.client.complete(prompt, max_tokens=2, **GREEDY)
        pages = [one["metrics_url"] for one in listed(fronts, "instances").values()]
        return sum(fronts.metric(page, "mooncake_kv_save_blocks_total") for page in pages) > saved

    pages = [one["metrics_url"] for one in listed(fronts, "instances").values()]
    saved = sum(fronts.metric(page, "mooncake_kv_save_blocks_total") for page in pages)
    fronts.wait("blocks go into the new store", hit, 60.0)
