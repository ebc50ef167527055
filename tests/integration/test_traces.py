"""One request through real processes is one trace, under the client's own, and its id is in their logs."""

import json
import secrets
from typing import Any

import httpx
import pytest

from tests.integration.cluster import Cluster, wait_until
from tests.integration.reference import random_prompt
from tests.integration.setups import THREE

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [THREE], ids=lambda setup: setup.name, indirect=True),
]

SPANS_S = 30.0
"""Spans are sent five times a second (cluster.Cluster)."""
CLIENTS_SPAN = "00f067aa0ba902b7"


def ask(cluster: Cluster, trace: str, **body: Any) -> httpx.Response:
    """Send a completion as a client that traces."""
    headers = {"traceparent": f"00-{trace}-{CLIENTS_SPAN}-01", "x-request-id": f"run-{trace}"}
    model = cluster.client.model
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": model, "temperature": 0, **body},
        headers=headers,
        timeout=120,
    )
    return answer.raise_for_status()


def test_a_request_is_one_trace_from_the_client_to_the_pool(cluster: Cluster) -> None:
    collector = cluster.collector
    assert collector is not None
    trace = secrets.token_hex(16)
    answer = ask(cluster, trace, prompt=random_prompt(150, int(trace[:8], 16)), max_tokens=5, ignore_eos=True)
    assert answer.headers["x-request-id"] == f"run-{trace}"
    assert answer.headers["traceresponse"].split("-")[1] == trace
    wanted = {
        ("gateway.request", ""), ("conductor.decide", "gateway.request"), ("prefill", "gateway.request"),
        ("handover", "gateway.request"), ("decode", "gateway.request"), ("kv.lookup", "prefill"),
        ("kv.lookup", "decode"), ("kv.load", "decode"),
    }  # fmt: skip
    wait_until(f"{wanted}, but {collector.tree(trace)}", lambda: collector.tree(trace) == wanted, SPANS_S)
    spans = {span.name: span for span in collector.trace(trace)}
    request = spans["gateway.request"]
    assert request.parent == CLIENTS_SPAN
    assert request.attributes["gen_ai.usage.input_tokens"] == 150
    assert request.attributes["gen_ai.usage.output_tokens"] == 5
    assert request.service == spans["conductor.decide"].service == "mooncake-gateway"
    assert spans["kv.load"].service in ("mooncake-decode", "mooncake-prefill")  # as it was started
    load = spans["kv.load"]
    assert load.attributes["mooncake.intact"] is True
    assert load.attributes["mooncake.bytes"] == spans["handover"].attributes["mooncake.bytes"]
    # one machine, one clock: what an engine measured lies within what the gateway did
    assert spans["decode"].start_ns <= load.start_ns <= load.end_ns <= spans["decode"].end_ns
    assert request.start_ns <= spans["prefill"].start_ns <= spans["decode"].end_ns <= request.end_ns


def test_logs_of_all_processes_are_json_and_name_the_request(cluster: Cluster) -> None:
    trace = secrets.token_hex(16)
    ask(cluster, trace, prompt=random_prompt(40, int(trace[:8], 16)), max_tokens=2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for path in cluster.run_dir.glob("*.log"):
        if path.stem != "zygote":  # what imports print before any process of ours is one
            lines[path.stem] = [
                json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")
            ]
    assert {line["service"] for line in lines["decode-0"]} >= {"decode", "decode-engine"}
    everything = [line for name in lines for line in lines[name]]
    assert any(str(line.get("logger", "")).startswith("vllm.") for line in everything)
    access = [line for line in everything if line.get("request_id") == f"run-{trace}"]
    assert ("http.access", trace) in [(line["event"], line["trace_id"]) for line in access]
