"""Instances of a real cluster change their roles: requests in flight end well, caches stay."""

import httpx
import pytest

from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK, Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import THREE

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [THREE], ids=lambda setup: setup.name, indirect=True),
]

FULL = 20
CHANGED_S = 60.0


def roles(cluster: Cluster) -> dict[str, str]:
    return {row["instance_id"]: row["role"] for row in cluster.view()["instances"]}


def change(cluster: Cluster, instance_id: str, role: str) -> httpx.Response:
    wish = {"instance_id": instance_id, "role": role}
    return httpx.post(f"{cluster.url}/mooncake/roles", json=wish, timeout=10.0)


def change_and_wait(cluster: Cluster, instance_id: str, role: str) -> None:
    change(cluster, instance_id, role).raise_for_status()
    wait_until(f"{instance_id} is {role}", lambda: roles(cluster)[instance_id] == role, CHANGED_S)


def test_instances_change_places_under_a_stream_and_know_what_they_knew(cluster: Cluster):
    prompt = random_prompt(FULL * BLOCK + 5, 9100)
    epochs = cluster.epochs()
    first = cluster.client.complete(prompt, max_tokens=64, **GREEDY)
    assert first.cached == 0
    stream = cluster.client.stream(prompt, max_tokens=2000, **GREEDY)
    stream.wait_tokens(1)

    change_and_wait(cluster, "prefill-1", "decode")
    assert change(cluster, "decode-0", "prefill").status_code == 202  # it still streams
    wait_until("it drains", lambda: roles(cluster)["decode-0"] == "draining", CHANGED_S)
    again = cluster.client.complete(prompt, max_tokens=64, **GREEDY)
    assert again.outcome == first.outcome
    assert again.cached == FULL * BLOCK
    assert stream.result().tokens[:64] == first.tokens
    wait_until("it prefills", lambda: roles(cluster)["decode-0"] == "prefill", CHANGED_S)

    change_and_wait(cluster, "prefill-0", "decode")  # now each is what it was not
    assert cluster.client.complete(prompt, max_tokens=64, **GREEDY).outcome == first.outcome
    other = random_prompt(FULL * BLOCK + 5, 9101)
    saved = cluster.counters("decode-0")["save_blocks"]
    assert cluster.client.complete(other, max_tokens=8, **GREEDY).cached == 0
    wait_until("it saves what it prefills", lambda: cluster.counters("decode-0")["save_blocks"] > saved, 30.0)
    assert cluster.epochs() == epochs  # nobody restarted
    assert cluster.metric("mooncake_role_switches_total", role="decode") == 2
    cluster.assert_nothing_leaked(10.0)


def test_the_last_of_a_role_stays_and_a_wish_without_sense_is_explained(cluster: Cluster):
    (last,) = [name for name, role in roles(cluster).items() if role == "prefill"]
    answer = change(cluster, last, "decode")
    assert (answer.status_code, "the last prefill instance" in answer.json()["error"]) == (400, True)
    assert "no instance 'x'" in change(cluster, "x", "decode").json()["error"]
    assert "must be prefill or decode" in change(cluster, last, "king").json()["error"]
