"""A client that leaves takes its work along: engines stop, blocks are free, leases are given back."""

import json
import socket
import time

import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import FP32

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [FP32], ids=lambda setup: setup.name, indirect=True),
]

FREE_S = 10.0
"""It takes 0.2 s on a quiet machine; decoding for nobody would take longer than this."""
SAMPLED = {"temperature": 1.0, "seed": 1, "ignore_eos": True}
"""n > 1 wants sampling."""
LONG_PROMPT, SHORT_PROMPT = 8000, 100


def post(cluster: Cluster, prompt: list[int], **params: object) -> socket.socket:
    """Send a completion request and leave its answer unread: closing the socket is hanging up."""
    body = json.dumps(cluster.client.body(prompt, params)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", cluster.port), 5.0)
    connection.sendall(head.encode() + body)
    return connection


def prefills(cluster: Cluster) -> int:
    return sum(row["load"]["prefill_requests"] for row in cluster.view()["instances"])


def running(cluster: Cluster) -> float:
    return cluster.metric("vllm:num_requests_running")


def assert_freed(cluster: Cluster, left_s: float) -> None:
    """Fail unless engines, pool and gateway are free of it FREE_S after `left_s`."""

    def free() -> bool:
        return (
            running(cluster) == 0
            and cluster.metric("vllm:num_requests_waiting") == 0
            and cluster.metric("vllm:kv_cache_usage_perc") == 0.0
            and cluster.is_idle()
        )

    wait_until("everything is free", free, FREE_S, 0.02)
    print(f"free after {time.monotonic() - left_s:.2f} s")
    # what the gauges say is so: the engines have time for others at once
    started_s = time.monotonic()
    cluster.client.complete(random_prompt(SHORT_PROMPT, time.monotonic_ns()), max_tokens=4, **GREEDY)
    assert time.monotonic() - started_s < FREE_S


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting"])
class TestAClientLeaves:
    def test_during_prefill(self, cluster: Cluster, stream: bool, n: int):
        prompt = random_prompt(LONG_PROMPT, 7000 + 2 * n + stream)
        tokens = cluster.metric("vllm:generation_tokens_total")
        connection = post(cluster, prompt, max_tokens=64, n=n, stream=stream, **SAMPLED)
        with connection:
            wait_until("the prompt is being prefilled", lambda: prefills(cluster) > 0, 5.0, 0.005)
            time.sleep(0.3)
            assert prefills(cluster) > 0, "too late: the prompt is too short"
        assert_freed(cluster, time.monotonic())
        decoded = cluster.metric("vllm:generation_tokens_total") - tokens
        assert decoded < 64, "somebody decoded for a client that had left"

    def test_during_decode(self, cluster: Cluster, stream: bool, n: int):
        prompt = random_prompt(SHORT_PROMPT, 7100 + 2 * n + stream)
        tokens = cluster.metric("vllm:generation_tokens_total")
        with post(cluster, prompt, max_tokens=6000, n=n, stream=stream, **SAMPLED):
            wait_until("both decode", lambda: running(cluster) == n, 10.0)
            wait_until("tokens", lambda: cluster.metric("vllm:generation_tokens_total") > tokens + 50, 10.0)
        assert_freed(cluster, time.monotonic())
        before = cluster.metric("vllm:generation_tokens_total")
        time.sleep(0.2)
        assert cluster.metric("vllm:generation_tokens_total") == before, "an engine still decodes"


def test_a_client_leaves_while_others_stay(cluster: Cluster):
    """Half of the clients leave; the others get what they would have got."""
    prompts = [random_prompt(200, 7200 + i) for i in range(6)]
    wanted = [cluster.client.complete(prompt, max_tokens=200, **GREEDY) for prompt in prompts[::2]]
    stay = [cluster.client.stream(prompt, max_tokens=200, **GREEDY) for prompt in prompts[::2]]
    leave = [post(cluster, prompt, max_tokens=6000, stream=True, **GREEDY) for prompt in prompts[1::2]]
    for stream in stay:
        stream.wait_tokens(20)
    for connection in leave:
        connection.close()
    for stream, answer in zip(stay, wanted, strict=True):
        assert stream.result().outcome == answer.outcome
    assert_freed(cluster, time.monotonic())
