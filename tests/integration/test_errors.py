"""What goes wrong is said in the words of stock vLLM, costs nobody else and leaves nothing."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import zmq

from mooncake.core.messages import RelayOp
from tests.integration.client import GREEDY
from tests.integration.cluster import TAG, Cluster, free_port
from tests.integration.reference import random_prompt
from tests.integration.setups import FP32

pytestmark = pytest.mark.integration
on_a_cluster = pytest.mark.parametrize("cluster", [FP32], ids=lambda setup: setup.name, indirect=True)

GIVEN_UP_S = 90.0
"""A worker waits 60 s for its store; the rest is imports."""

BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "gpt-9"}, 404, "gpt-9"),
    "prompt too long": ({"prompt": random_prompt(9000, 1)}, 400, "8192"),
    "negative temperature": ({"temperature": -1}, 400, "temperature"),
    "no tokens wanted": ({"max_tokens": 0}, 400, "max_tokens"),
    "top_p above one": ({"top_p": 1.5}, 400, "top_p"),
    "n of zero": ({"n": 0}, 400, "n must be at least 1"),
    "n too large": ({"n": 1_000_000}, 400, "n must"),
    "too many logprobs": ({"logprobs": 1000}, 400, "logprobs"),
    "token outside the vocabulary": ({"prompt": [5, 10**6]}, 400, "vocab"),
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "wrong type": ({"max_tokens": "many"}, 400, "max_tokens"),
    "a regex that is none": ({"structured_outputs": {"regex": "(["}}, 400, ""),
}
FOUND_LATE = {"too many logprobs", "token outside the vocabulary", "a regex that is none"}
"""vLLM finds these when the answer has begun: a stream tells them as an event, after status 200."""


def error_of(body: dict[str, Any], status: int) -> str:
    """Return the message of an error body, checked for vLLM's shape."""
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    if status == 404:
        assert error["type"] == "NotFoundError"
    assert error["message"]
    return error["message"]


@on_a_cluster
@pytest.mark.parametrize("stream", [False, True], ids=["waiting", "streaming"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_vllms_status_and_error(cluster: Cluster, name: str, stream: bool):
    change, status, said = BAD[name]
    body = {**cluster.client.body([5, 6, 7], {"max_tokens": 4}), **change, "stream": stream}
    response = cluster.client.http.post("/v1/completions", json=body)
    if stream and name in FOUND_LATE:
        assert response.status_code == 200, response.text[:500]
        (event, end) = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert end == "[DONE]"
        message = error_of(json.loads(event), status)
    else:
        assert response.status_code == status, response.text[:500]
        message = error_of(response.json(), status)
    assert said.lower() in message.lower()
    cluster.assert_nothing_leaked()


@on_a_cluster
def test_an_answer_too_long_for_the_context_ends_with_it(cluster: Cluster):
    """VLLM 0.32 does not refuse a `max_tokens` that does not fit beside the prompt."""
    answer = cluster.client.complete(random_prompt(8180, 1), **{**GREEDY, "max_tokens": 500})
    assert (len(answer.tokens), answer.finish) == (12, "length")
    cluster.assert_nothing_leaked()


@on_a_cluster
def test_bad_json_and_unknown_paths(cluster: Cluster):
    http = cluster.client.http
    headers = {"content-type": "application/json"}
    for content in (b"{not json", b"[]", b"", b"\xff\xfe"):
        response = http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400, response.text
        error_of(response.json(), 400)
    assert http.get("/v1/nowhere").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert http.post("/v1/embeddings", json={"model": cluster.client.model, "input": "x"}).status_code == 404
    cluster.assert_nothing_leaked()


def garbage(endpoint: str, kind: int, messages: list[list[bytes]]) -> None:
    """Send `messages` as a ZMQ peer that speaks nonsense."""
    context = zmq.Context()
    peer = context.socket(kind)
    peer.setsockopt(zmq.LINGER, 500)
    peer.connect(endpoint)
    for message in messages:
        peer.send_multipart(message)
    peer.close()
    context.term()


@on_a_cluster
def test_nonsense_on_internal_ports_ends_nothing(cluster: Cluster):
    before = sorted(cluster.processes())
    noise = [secrets.token_bytes(size) for size in (1, 8, 100, 5000)]
    operations = [value for name, value in vars(RelayOp).items() if name.isupper()]
    to_relay = [[op, *rest] for op in operations for rest in ([], noise[:1], noise[:2], noise)]
    to_relay += [[RelayOp.ENGINE, kind, noise[3]] for kind in (b"\x00", b"\x01", b"\x03", b"\xff")]
    for instance_id in cluster.states():
        garbage(cluster.record(instance_id).endpoint, zmq.DEALER, to_relay)
    store = cluster.store_record()
    garbage(store.endpoint, zmq.DEALER, [noise[:1], noise[:2], noise, [b"", b""], [noise[1], b"\xc1"]])
    garbage(store.events, zmq.SUB, [])
    ports = {
        connection.laddr.port
        for pid in before
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port != cluster.port
    }
    assert len(ports) >= 4, "relays, store, outputs"
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), 5.0) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + noise[3])
    time.sleep(0.5)
    assert sorted(cluster.processes()) == before
    cluster.wait_alive()
    assert len(cluster.client.complete([5, 6, 7, 8], max_tokens=8, **GREEDY).tokens) == 8
    cluster.assert_nothing_leaked()


def mooncake(*arguments: str, **env: str) -> subprocess.Popen[str]:
    """Start a `mooncake` command."""
    return subprocess.Popen(
        [sys.executable, "-m", "mooncake", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str], deadline_s: float) -> tuple[int, str]:
    """Return exit code and output of a command that must end by itself."""
    try:
        out, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"still runs after {deadline_s:g} s: {out}") from None
    return process.returncode, out


NOWHERE = "--metadata=tcp://127.0.0.1:1"


@pytest.mark.parametrize(
    "command",
    [["up"], ["prefill", NOWHERE], ["decode", NOWHERE], ["conductor"]],
    ids=lambda command: command[0],
)
def test_pickle_on_the_wire_is_refused_at_once(model, tmp_path, command: list[str]):
    arguments = [*command, f"--model={model}", f"--run-dir={tmp_path / 'run'}"]
    arguments += [f"--port={free_port()}"] if command[0] in ("up", "conductor") else []
    code, out = outcome(mooncake(*arguments, VLLM_ALLOW_INSECURE_SERIALIZATION="1"), 30.0)
    assert code == 2, out
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" in out
    assert "unset VLLM_ALLOW_INSECURE_SERIALIZATION" in out
    assert "Traceback" not in out


@pytest.fixture(scope="session")
def lonely_workers(model, tmp_path_factory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Workers without metadata: they wait for a minute, so they start early and are judged late."""
    run = tmp_path_factory.mktemp("lonely")
    workers = {
        role: mooncake(
            role, f"--metadata=tcp://127.0.0.1:{free_port()}", f"--model={model}", f"--run-dir={run / role}",
            **{TAG: "lonely"},
        )
        for role in ("prefill", "decode")
    }  # fmt: skip
    yield workers
    for worker in workers.values():
        worker.kill()
        worker.communicate()


@on_a_cluster
def test_a_worker_without_metadata_begins_to_wait(cluster: Cluster, lonely_workers):
    assert all(worker.poll() is None for worker in lonely_workers.values())


@on_a_cluster
@pytest.mark.last
def test_a_worker_without_metadata_says_so_and_ends(cluster: Cluster, lonely_workers):
    for worker in lonely_workers.values():
        code, out = outcome(worker, GIVEN_UP_S)
        assert code == 69, out  # EX_UNAVAILABLE: another process is missing, a retry may help
        told = json.loads(out.strip().splitlines()[-1])
        assert "no KV pool on node" in told["reason"]
        assert "mooncake store" in told["reason"], "what to do"
        assert "Traceback" not in out
