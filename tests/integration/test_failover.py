"""Engines, relays and the store are killed and stopped under load: clients notice a pause, nothing else.

Seven streams of different sampling settings run at once; what they say must not depend on whether
the engine that says it was struck in the middle.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from mooncake.core.process import alive
from mooncake.worker.connector_scheduler import LEASE_S
from tests.integration.client import GREEDY, Answer, Stream
from tests.integration.cluster import Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import FP32

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [FP32], ids=lambda setup: setup.name, indirect=True),
]

TOKENS = 300
STRUCK_AFTER = 15
"""Tokens that every stream has when the engine is struck."""
KILL_NOTICED_S = 2.0
"""It takes 0.1 s on a quiet machine; silence alone would be noticed later than this."""
STOP_NOTICED_S = 5.0
REGEX = r"([a-z]{3} ){70}[0-9]{3}"

KINDS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seed": {"temperature": 1.0, "seed": 11, "ignore_eos": True},
    "frequency and presence": {**GREEDY, "frequency_penalty": 0.8, "presence_penalty": 0.6},
    "repetition": {**GREEDY, "repetition_penalty": 1.2},
    "regex": {"temperature": 0.0, "structured_outputs": {"regex": REGEX}},
    "logprobs": {**GREEDY, "logprobs": 2},
    "seed and penalty": {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.5, "ignore_eos": True},
}  # fmt: skip


def start_streams(cluster: Cluster) -> dict[str, Stream]:
    """Begin one stream of every kind."""
    return {
        kind: cluster.client.stream(random_prompt(100 + 41 * i, 3000 + i), max_tokens=TOKENS, **params)
        for i, (kind, params) in enumerate(KINDS.items())
    }


_undisturbed: dict[str, Answer] = {}


def undisturbed(cluster: Cluster) -> dict[str, Answer]:
    """Return what the streams say when nothing happens."""
    if not _undisturbed:
        for kind, stream in start_streams(cluster).items():
            _undisturbed[kind] = stream.result()
    return _undisturbed


def assert_same(got: dict[str, Answer], wanted: dict[str, Answer]) -> None:
    different = [kind for kind in wanted if got[kind].outcome != wanted[kind].outcome]
    assert not different, {kind: (got[kind], wanted[kind]) for kind in different}
    assert got["logprobs"].logprobs == pytest.approx(wanted["logprobs"].logprobs, abs=1e-4)
    for kind, answer in wanted.items():
        assert got[kind].usage["completion_tokens"] == answer.usage["completion_tokens"]


class Noticed:
    """When the gateway took an instance for lost, as /mooncake/instances tells."""

    seconds: float | None = None


@contextmanager
def watching(cluster: Cluster, instance_id: str) -> Iterator[Noticed]:
    """Watch `instance_id` closely from now until the block ends; the clock starts with the block."""
    epoch = cluster.epochs()[instance_id]
    noticed, leave = Noticed(), threading.Event()
    begun = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=cluster.url, timeout=5.0) as http:
            http.get("/mooncake/instances")
            begun.set()
            while not leave.wait(0.005):
                rows = http.get("/mooncake/instances").json()["instances"]
                if not any(
                    (row["instance_id"], row["epoch"], row["state"]) == (instance_id, epoch, "alive")
                    for row in rows
                ):
                    noticed.seconds = time.monotonic() - start_s
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begun.wait(5.0)
    start_s = time.monotonic()
    try:
        yield noticed
    finally:
        leave.set()
        thread.join(10.0)


def serves_decode(cluster: Cluster, instance_id: str) -> bool:
    """Whether a new request is decoded by `instance_id`: its engine loads the hand-over."""
    before = cluster.counters(instance_id)["load_blocks"]
    cluster.client.complete(random_prompt(90, time.monotonic_ns()), max_tokens=4, **GREEDY)
    return cluster.counters(instance_id)["load_blocks"] > before


@pytest.mark.parametrize("victim", ["group", "engine", "relay"])
def test_streams_survive_the_death_of_their_decode_worker(cluster: Cluster, victim: str, record_property):
    wanted = undisturbed(cluster)
    # an engine that was just restarted compiles the grammar first: the others would be done by then
    cluster.client.complete(random_prompt(90, time.monotonic_ns()), max_tokens=4, **KINDS["regex"])
    relay, engine = cluster.worker_pid("decode-0"), cluster.engine_pid("decode-0")
    epoch, moved = cluster.epochs()["decode-0"], cluster.metric("mooncake_migrations_total")
    streams = start_streams(cluster)
    for stream in streams.values():
        stream.wait_tokens(STRUCK_AFTER)
    with watching(cluster, "decode-0") as noticed:
        if victim == "group":
            os.killpg(relay, signal.SIGKILL)
        else:
            os.kill(engine if victim == "engine" else relay, signal.SIGKILL)
        # an engine never outlives its relay, nor a relay its engine
        wait_until("engine gone", lambda: not alive(engine), 10.0, 0.01)
        answers = {kind: stream.result() for kind, stream in streams.items()}
    assert_same(answers, wanted)
    assert cluster.metric("mooncake_migrations_total") - moved == len(streams), "not struck in mid-stream"
    assert noticed.seconds is not None
    print(f"{victim}: noticed after {noticed.seconds:.3f} s, gaps {gaps(answers)}")
    assert noticed.seconds <= KILL_NOTICED_S
    cluster.wait_restarted("decode-0", epoch)
    folders = list(cluster.run_dir.glob("decode-0-*"))
    assert len(folders) == 1, f"what the killed one left is still there: {folders}"
    assert serves_decode(cluster, "decode-0"), "the restarted worker got no work"
    cluster.assert_nothing_leaked()


def gaps(answers: dict[str, Answer]) -> str:
    """Return the longest silence in every stream."""
    return ", ".join(f"{answer.gap_s:.2f}" for answer in answers.values())


def test_streams_survive_a_decode_worker_that_hangs_and_comes_back(cluster: Cluster):
    wanted = undisturbed(cluster)
    relay, epoch = cluster.worker_pid("decode-0"), cluster.epochs()["decode-0"]
    streams = start_streams(cluster)
    for stream in streams.values():
        stream.wait_tokens(STRUCK_AFTER)
    try:
        with watching(cluster, "decode-0") as noticed:
            os.killpg(relay, signal.SIGSTOP)
            answers = {kind: stream.result() for kind, stream in streams.items()}
    finally:
        os.killpg(relay, signal.SIGCONT)
    assert noticed.seconds is not None
    print(f"SIGSTOP: noticed after {noticed.seconds:.3f} s, gaps {gaps(answers)}")
    assert noticed.seconds <= STOP_NOTICED_S
    assert_same(answers, wanted)
    # it wakes with requests that live elsewhere now: it drops them and takes new work
    cluster.wait_alive()
    assert cluster.epochs()["decode-0"] == epoch, "the worker came back by itself, not as a new one"
    wait_until("nothing runs", lambda: cluster.metric("vllm:num_requests_running") == 0, 3.0)
    wait_until("it decodes again", lambda: serves_decode(cluster, "decode-0"), 10.0)
    assert_same({kind: stream.answer for kind, stream in streams.items()}, wanted)
    cluster.assert_nothing_leaked()


def test_a_stream_survives_the_death_of_its_prefill_worker_before_the_first_token(cluster: Cluster):
    prompt = random_prompt(7000, 4000)
    epoch, relay = cluster.epochs()["prefill-0"], cluster.worker_pid("prefill-0")
    stream = cluster.client.stream(prompt, max_tokens=32, **GREEDY)

    def prefilling() -> bool:
        (row,) = [row for row in cluster.view()["instances"] if row["instance_id"] == "prefill-0"]
        return row["load"]["prefill_requests"] > 0

    wait_until("the prompt is being prefilled", prefilling, 10.0, 0.005)
    time.sleep(0.3)  # into the first chunk
    assert not stream.answer.tokens, "too late: the prompt is too short"
    with watching(cluster, "prefill-0") as noticed:
        os.killpg(relay, signal.SIGKILL)
        answer = stream.result()
    assert noticed.seconds is not None
    print(f"prefill killed: noticed after {noticed.seconds:.3f} s")
    assert noticed.seconds <= KILL_NOTICED_S
    cluster.wait_restarted("prefill-0", epoch)
    again = cluster.client.complete(prompt, max_tokens=32, **GREEDY)
    assert answer.outcome == again.outcome
    saved = cluster.counters("prefill-0")["save_blocks"]
    cluster.client.complete(random_prompt(90, 4001), max_tokens=4, **GREEDY)
    assert cluster.counters("prefill-0")["save_blocks"] > saved, "the restarted worker got no work"
    cluster.assert_nothing_leaked()


def test_requests_go_on_while_the_store_is_dead_and_hit_again_once_it_is_back(cluster: Cluster):
    prompt = random_prompt(500, 4100)
    wanted = cluster.client.complete(prompt, max_tokens=32, **GREEDY)
    running = cluster.client.stream(random_prompt(300, 4101), max_tokens=TOKENS, **GREEDY)
    running.wait_tokens(STRUCK_AFTER)
    before = cluster.store_record()
    os.killpg(before.pid, signal.SIGKILL)
    cluster.forget_locally()
    answer = cluster.client.complete(prompt, max_tokens=32, **GREEDY)
    assert answer.outcome == wanted.outcome
    assert answer.cached == 0, "the pool that knew it is dead"
    assert len(running.result().tokens) == TOKENS

    wait_until("the store is back", lambda: cluster.store_epoch() not in ("", before.epoch), 30.0)
    fresh = random_prompt(500, 4102)

    def hits_again() -> bool:
        cluster.client.complete(fresh, max_tokens=4, **GREEDY)
        cluster.forget_locally()
        return cluster.client.complete(fresh, max_tokens=4, **GREEDY).cached > 0

    wait_until("the pool serves again", hits_again, 20.0, 0.5)
    cluster.wait_alive()
    # a look-up that was given up because the new store was late has a lease that nobody heard of
    cluster.assert_nothing_leaked(2.0 + LEASE_S)
