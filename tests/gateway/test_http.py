"""The whole gateway in one process: vLLM's HTTP app over fake engines."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tiny_model
from fake_engine import FakeEngine, encoded

from conductor import core, gateway, vllm_seam
from conductor.admission import AdmissionMode
from conductor.cluster import Health
from conductor.http import RejectionMiddleware
from conductor.key_guard import OPEN_PATHS, KeyGuard
from conductor.plan import Reason
from conductor.scheduler import Policy, SchedulerConfig
from conductor.tenants import Tenant, Tenants
from mooncake.core.config import ADMISSIONS, POLICIES
from mooncake.core.drain import Leaving
from mooncake.core.errors import ConfigError
from mooncake.core.health import Health as Own
from mooncake.core.messages import INSTANCES_PREFIX, StoreRecord
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.options import GatewayOptions

KEY = "k" * 24
ACME = "the-key-of-acme-alone"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}


def options(model_dir: Any, **changes: Any) -> GatewayOptions:
    settings = {
        "model": str(model_dir),
        "run_dir": str(model_dir),
        "served_name": "tiny",
        "first_token": True,
    }
    return GatewayOptions(**{**settings, "api_key": KEY, **changes})


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model_dir = tiny_model.make(tmp_path_factory.mktemp("model"))
    return model_dir, *gateway.configure(options(model_dir))


@pytest.fixture
async def site(configured: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """The app with a client; `alive(role, ...)` adds a fake engine."""
    from prometheus_client import CollectorRegistry

    from conductor.metrics import GatewayMetrics

    registry = CollectorRegistry()
    monkeypatch.setattr(gateway, "process_metrics", lambda: GatewayMetrics(registry))
    model_dir, args, config = configured
    metadata = MemoryMetadata()
    cluster = gateway.Cluster(options(model_dir), metadata)
    llm = vllm_seam.build_llm(args, config, cluster.client)
    app = await vllm_seam.build_app(llm, args)
    gateway.add_routes(app, cluster, metadata)
    cluster.start(llm)
    engines: list[FakeEngine] = []

    async def engine(instance_id: str, role: str) -> FakeEngine:
        engines.append(FakeEngine(instance_id, role))
        await metadata.put(INSTANCES_PREFIX + instance_id, encoded(engines[-1].record))
        async with asyncio.timeout(5):
            while cluster.view.health(instance_id) is not Health.ALIVE:  # noqa: ASYNC110 -- other thread
                await asyncio.sleep(0.005)
        return engines[-1]

    headers = {"Authorization": f"Bearer {KEY}"}
    guard = KeyGuard(app, gateway.api_keys(args))
    hopeless = cluster.dispatcher.hopeless
    front = RejectionMiddleware(guard, cluster.quotas, KEY, hopeless=hopeless, lets_in=guard.lets_in)
    transport = httpx.ASGITransport(app=front)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        yield SimpleNamespace(
            client=client, cluster=cluster, llm=llm, engine=engine, registry=registry, app=app
        )
    await cluster.members.close()
    llm.shutdown()
    await metadata.close()
    for one in engines:
        one.kill()


async def test_chat_is_answered_by_two_engines(site) -> None:
    prefill, decode = await site.engine("p0", "prefill"), await site.engine("d0", "decode")
    answer = await site.client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # leg 2 loaded all of them
    assert body["choices"][0]["finish_reason"] == "length"
    assert (prefill.legs(), decode.legs()) == (["prefill"], ["decode"])


async def test_sampling_that_a_request_leaves_open_is_the_models_own(site) -> None:
    engine = await site.engine("b0", "both")
    await site.client.post("/v1/chat/completions", json=CHAT)
    await site.client.post("/v1/chat/completions", json={**CHAT, "temperature": 1.0, "top_p": 1.0})
    used = [(r.sampling_params.temperature, r.sampling_params.top_p) for r in engine.received]
    assert used == [(0.2, 0.9), (1.0, 1.0)]


async def test_two_choices_cost_one_prefill(site) -> None:
    prefill, decode = await site.engine("p0", "prefill"), await site.engine("d0", "decode")
    answer = await site.client.post("/v1/chat/completions", json={**CHAT, "n": 2})
    assert len(answer.json()["choices"]) == 2, answer.text
    assert (prefill.legs(), decode.legs()) == (["prefill"], ["decode", "decode"])


async def test_a_stream_ends_with_done_and_its_usage(site) -> None:
    await site.engine("b0", "both")
    stream = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    answer = await site.client.post("/v1/chat/completions", json=stream)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_alive_is_503_with_retry_after_before_anything_streams(site, stream) -> None:
    answer = await site.client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert "no instance alive" in answer.json()["error"]["message"]
    assert site.llm.output_processor.get_num_unfinished_requests() == 0


async def test_a_rejected_request_of_two_choices_leaves_nothing_behind(site) -> None:
    answer = await site.client.post("/v1/chat/completions", json={**CHAT, "n": 2})
    assert answer.status_code == 503
    assert site.llm.output_processor.get_num_unfinished_requests() == 0
    assert site.cluster.dispatcher.in_flight == 0


@pytest.mark.parametrize("n", [1, 2])
async def test_a_request_that_keeps_failing_is_503_and_leaves_nothing_behind(site, n) -> None:
    engine = await site.engine("b0", "both")
    engine.fail_next = 100
    answer = await site.client.post("/v1/chat/completions", json={**CHAT, "n": n})
    assert answer.status_code == 503, answer.text
    assert "error" in answer.json()["error"]["message"]
    assert site.llm.output_processor.get_num_unfinished_requests() == 0
    async with asyncio.timeout(2):
        while site.cluster.dispatcher.in_flight:  # noqa: ASYNC110 -- aborts follow in the same turn
            await asyncio.sleep(0.005)


async def test_a_stop_string_frees_the_engine(site) -> None:
    engine = await site.engine("b0", "both")
    ask = {"model": "tiny", "prompt": "ab", "max_tokens": 120}
    first = await site.client.post("/v1/completions", json=ask)
    word = next(char for char in first.json()["choices"][0]["text"][1:] if char.isascii() and char.isalpha())
    request = {"model": "tiny", "prompt": "ab", "max_tokens": 2000, "stop": [word]}
    answer = await site.client.post("/v1/completions", json=request)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    async with asyncio.timeout(5):
        while engine.jobs:  # noqa: ASYNC110 -- other thread
            await asyncio.sleep(0.005)


async def test_embeddings_are_not_found_as_in_vllm(site) -> None:
    assert (await site.client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})).status_code == 404


async def test_instances_are_listed_for_holders_of_the_key(site) -> None:
    await site.engine("p0", "prefill")
    listed = (await site.client.get("/mooncake/instances")).json()
    assert [(i["instance_id"], i["role"], i["state"]) for i in listed["instances"]] == [
        ("p0", "prefill", "alive")
    ]
    assert listed["instances"][0]["metrics_url"] == ""
    assert listed["stores"] == []
    denied = await site.client.get("/mooncake/instances", headers={"Authorization": "Bearer wrong"})
    assert denied.status_code == 401


async def test_stores_are_listed_with_where_their_metrics_are(site) -> None:
    record = StoreRecord("n1", "e", "tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "/none", 1 << 20, 7, "http://m")
    site.cluster.view.store_up(record)
    (store,) = (await site.client.get("/mooncake/instances")).json()["stores"]
    assert store == {"node": "n1", "capacity_bytes": 1 << 20, "pid": 7, "metrics_url": "http://m"}


def test_policy_and_objectives_reach_the_scheduler(tmp_path) -> None:
    assert set(POLICIES) == set(Policy)
    chosen = core.scheduler_config(options(tmp_path, policy="round_robin", ttft_slo_s=2.0).checked())
    assert (chosen.policy, chosen.ttft_slo_s, chosen.tbt_slo_s) == (Policy.ROUND_ROBIN, 2.0, None)
    plain = SchedulerConfig(session_bonus_s=core.SESSION_BONUS_S)
    assert core.scheduler_config(options(tmp_path)) == plain
    assert core.scheduler_config(options(tmp_path, inline=True).checked()).inline
    assert set(ADMISSIONS) == set(AdmissionMode)
    chosen = core.scheduler_config(options(tmp_path, admission="predicted", decode_s=80.0).checked())
    assert (chosen.admission, chosen.decode_s) == (AdmissionMode.PREDICTED, 80.0)


async def test_the_api_key_guards_vllms_routes(site) -> None:
    answer = await site.client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer no"})
    assert answer.status_code == 401


def paths_of(routes: Any) -> set[tuple[str, str]]:
    """Every path that an app answers, with a method; FastAPI keeps included routers whole."""
    found = set()
    for route in routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            found |= paths_of(inner.routes)
        else:
            methods = set(getattr(route, "methods", None) or {"GET"}) - {"HEAD", "OPTIONS"}
            found |= {(method, route.path) for method in methods}
    return found


async def test_whatever_vllm_s_app_answers_needs_the_key_but_for_probes(site) -> None:
    """vLLM's own check covers /v1 and /inference: /invocations is inference without a key."""
    paths = paths_of(site.app.routes)
    assert {path for _, path in paths} > {"/invocations", "/tokenize", "/metrics", "/v1/models"} | OPEN_PATHS
    assert len(paths) > 30
    for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        transport = site.client._transport
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=shown) as client:
            for method, path in sorted(paths):
                answer = await client.request(method, path)
                wanted = 200 if path in OPEN_PATHS else 401
                assert answer.status_code == wanted, (method, path, answer.text[:100])
                assert path not in OPEN_PATHS or not answer.text, "a status and nothing else"
            for path in ("/metrics/", "/metricsx", "/health/", "/nowhere", "//health"):
                assert (await client.get(path)).status_code == 401, path
            assert (await client.options("/v1/models")).status_code != 401, "browsers ask before they show it"


async def test_nothing_is_read_of_a_request_without_the_key(site) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"x" * (1 << 20)

    shown = {"Authorization": "Bearer wrong"}
    answer = await site.client.post("/v1/completions", content=body(), headers=shown)
    assert (answer.status_code, read) == (401, [])


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metricsx"])
async def test_metrics_keep_their_names_whatever_a_scraper_would_rather_read(site, path) -> None:
    """In OpenMetrics the encoder writes vllm:x as vllm_x."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5"
    answer = await site.client.get(path, headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert "vllm:num_requests_running{" in answer.text
    assert "vllm_num" not in answer.text


async def test_metrics_of_both_are_on_one_page(configured) -> None:
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    from conductor.metrics import process_metrics

    process_metrics().requests.labels("finished")
    page = generate_latest(get_prometheus_registry()).decode()
    assert 'mooncake_requests_total{outcome="finished"}' in page


async def test_decisions_are_shown_newest_first_and_found_by_the_id_of_the_answer(site) -> None:
    await site.engine("p0", "prefill")
    await site.engine("d0", "decode")
    ids = [(await site.client.post("/v1/chat/completions", json=CHAT)).json()["id"] for _ in range(3)]
    shown = (await site.client.get("/mooncake/decisions")).json()["decisions"]
    assert [one["client_id"] for one in shown] == ids[::-1]
    (one,) = (await site.client.get(f"/mooncake/decisions?request_id={ids[1]}")).json()["decisions"]
    assert (one["client_id"], one["prefill"], one["decode"]) == (ids[1], "p0", "d0")
    assert [option["instance"] for option in one["prefills"] + one["decodes"]] == ["p0", "d0"]
    assert (await site.client.get("/mooncake/decisions?request_id=nobody")).json() == {"decisions": []}


async def test_what_only_we_show_needs_the_key(site) -> None:
    for path in ("/mooncake/decisions", "/mooncake/instances"):
        answer = await site.client.get(path, headers={"Authorization": "Bearer wrong"})
        assert (answer.status_code, "decisions" in answer.text) == (401, False)


@pytest.mark.parametrize("header", ["x-slo-class", "x-slo-ttft-ms"])
async def test_service_headers_that_make_no_sense_are_answered_400_by_name(site, header) -> None:
    answer = await site.client.post("/v1/chat/completions", json=CHAT, headers={header: "soon"})
    assert answer.status_code == 400
    assert header in answer.json()["error"]["message"]


async def test_an_objective_that_is_reloaded_holds_from_the_next_request_on(site, configured) -> None:
    engine = await site.engine("b0", "both")
    site.cluster.prepare(options(configured[0], ttft_slo_s=1e-6))()
    refused = await site.client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 429
    assert "Retry-After" in refused.headers
    assert engine.legs() == []
    site.cluster.prepare(options(configured[0]))()
    assert (await site.client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_an_objective_in_the_headers_is_enforced_with_429_and_retry_after(site) -> None:
    await site.engine("b0", "both")
    hurry = {"x-slo-ttft-ms": "0.000001"}
    for stream in (False, True):
        body = {**CHAT, "stream": stream}
        answer = await site.client.post("/v1/chat/completions", json=body, headers=hurry)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
    relaxed = {"x-slo-ttft-ms": "60000", "x-slo-class": "premium"}
    assert (await site.client.post("/v1/chat/completions", json=CHAT, headers=relaxed)).status_code == 200


@pytest.fixture
async def sdk(site: Any) -> AsyncIterator[Any]:
    """OpenAI's own client, with the key of a tenant."""
    import openai

    keys = {sha256(ACME.encode()).digest(): "acme"}
    site.cluster.quotas.change(0.0, Tenants({"acme": Tenant()}, keys=keys))
    async with openai.AsyncOpenAI(
        base_url="http://gateway/v1", api_key=ACME, max_retries=0,
        http_client=httpx.AsyncClient(transport=site.client._transport),
    ) as client:  # fmt: skip
        yield client


async def test_a_prompt_cache_key_goes_back_to_the_engines_that_served_it_last(site, sdk) -> None:
    for number in range(4):
        await site.engine(f"b{number}", "both")
    sessions = site.cluster.core.decider.scheduler._sessions
    hello = {"model": "tiny", "prompt_cache_key": "chat-7"}
    chat = {"messages": CHAT["messages"], "max_tokens": 6}
    await sdk.chat.completions.create(**hello, **chat)
    await sdk.chat.completions.create(**hello, **chat, stream=True)
    assert len(sessions) == 1
    first = sessions.last("acme\nchat-7").prefill
    assert first
    await sdk.completions.create(model="tiny", prompt="x", extra_body={"prompt_cache_key": "chat-8"})
    await sdk.responses.create(model="tiny", input="x", max_output_tokens=6, prompt_cache_key="chat-9")
    assert all(sessions.last(f"acme\nchat-{n}").prefill for n in (8, 9))
    await sdk.chat.completions.create(**hello, **chat, extra_headers={"x-session-id": "own"})
    assert sessions.last("acme\nown").prefill
    await site.client.post("/v1/chat/completions", json={**CHAT, "prompt_cache_key": "chat-7"})
    assert sessions.last("\nchat-7").prefill  # nobody's is not acme's
    assert len(sessions) == 5


async def test_a_tenant_s_own_key_asks_for_answers_and_opens_nothing_else(site, sdk) -> None:
    await site.engine("b0", "both")
    answer = await sdk.chat.completions.create(model="tiny", messages=CHAT["messages"], max_tokens=6)
    assert answer.usage.completion_tokens == 6
    labels = {"tenant": "acme"}
    assert site.registry.get_sample_value("mooncake_tenant_tokens_total", labels) == answer.usage.total_tokens
    shown = {"Authorization": f"Bearer {ACME}"}
    for path in ("/mooncake/decisions", "/mooncake/instances"):
        assert (await site.client.get(path, headers=shown)).status_code == 401
    lora = {"lora_name": "x", "lora_path": "/x"}
    refused = await site.client.post("/v1/load_lora_adapter", json=lora, headers=shown)
    assert refused.status_code in {401, 404}
    lent = {**shown, "x-mooncake-tenant": "b"}
    assert (await site.client.post("/v1/chat/completions", json=CHAT, headers=lent)).status_code == 400


async def test_who_cannot_be_in_time_whatever_is_asked_is_told_before_anybody_reads_it(site) -> None:
    await site.engine("p0", "prefill")
    await site.engine("d0", "decode")
    ticket = site.cluster.view.charge_prefill(time.monotonic(), "p0", 3600.0, 1000)
    nonsense, objective = b"no JSON", {"x-slo-ttft-ms": "2000"}

    answer = await site.client.post("/v1/completions", content=nonsense, headers=objective)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "30"
    assert "objective 2.000 s" in answer.json()["error"]["message"]
    labels = {"reason": str(Reason.TTFT_SLO), "slo_class": "default"}
    assert site.registry.get_sample_value("mooncake_rejections_total", labels) == 1

    batch = await site.client.post(
        "/v1/completions", content=nonsense, headers={**objective, "x-slo-class": "batch"}
    )
    assert batch.status_code == 400  # it waits for others to be done, so its prompt matters
    site.cluster.view.release(time.monotonic(), ticket)
    assert (await site.client.post("/v1/completions", content=nonsense, headers=objective)).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tenant_over_its_quota_is_told_429_and_when_to_come_again(site, stream) -> None:
    await site.engine("b0", "both")
    site.cluster.quotas.change(0.0, Tenants({"acme": Tenant(requests_per_s=0.001)}))
    named, body = {"x-mooncake-tenant": "acme"}, {**CHAT, "stream": stream}
    assert (await site.client.post("/v1/chat/completions", json=body, headers=named)).status_code == 200
    answer = await site.client.post("/v1/chat/completions", json=body, headers=named)
    assert answer.status_code == 429
    assert 900 < int(answer.headers["retry-after"]) <= 1000
    assert "0.001 requests/s of tenant 'acme'" in answer.json()["error"]["message"]
    assert (await site.client.post("/v1/chat/completions", json=body)).status_code == 200
    assert site.llm.output_processor.get_num_unfinished_requests() == 0


async def test_several_choices_are_one_request_of_a_quota(site) -> None:
    await site.engine("b0", "both")
    site.cluster.quotas.change(0.0, Tenants({"acme": Tenant(requests_per_s=0.001, concurrent=1)}))
    named = {"x-mooncake-tenant": "acme"}
    answer = await site.client.post("/v1/chat/completions", json={**CHAT, "n": 3}, headers=named)
    assert len(answer.json()["choices"]) == 3, answer.text
    usage = answer.json()["usage"]
    labels = {"tenant": "acme"}
    assert site.registry.get_sample_value("mooncake_tenant_tokens_total", labels) == usage["total_tokens"]


async def test_utility_calls_go_to_every_engine(site) -> None:
    await site.engine("p0", "prefill")
    await site.engine("d0", "decode")
    assert await site.llm.reset_prefix_cache() is True
    with pytest.raises(vllm_seam.Unavailable, match="stop the instance"):
        await site.llm.sleep()
    assert not site.llm.errored


@pytest.mark.parametrize(
    "bad", [["--host=0.0.0.0", "--api-key=short"], ["--no-such-flag"], ["--enable-auto-tool-choice"]]
)
def test_settings_that_cannot_work_stop_the_gateway(configured, bad) -> None:
    with pytest.raises(ConfigError):
        gateway.configure(options(configured[0], api_key="", vllm_args=bad))


def test_vllms_own_flags_pass_through(configured) -> None:
    flags = ["--enable-auto-tool-choice", "--tool-call-parser=hermes", "--max-num-queued-reqs=7"]
    args, config = gateway.configure(options(configured[0], vllm_args=flags))
    assert args.tool_call_parser == "hermes"
    assert args.enable_prompt_tokens_details
    assert config.scheduler_config.max_num_queued_reqs == 7
    assert config.cache_config.block_size == 32


async def test_stopping_refuses_new_connections_and_finishes_open_streams(site, configured) -> None:
    import copy
    import socket

    engine = await site.engine("b0", "both")
    engine.step_s = 0.02
    args = copy.copy(configured[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        args.port = probe.getsockname()[1]
    leaving = Leaving(Own(), drain_s=60.0)
    how = vllm_seam.Serving(leaving, site.cluster.drain)
    serving = asyncio.create_task(vllm_seam.serve(site.app, RejectionMiddleware(site.app), args, how))
    base = f"http://127.0.0.1:{args.port}"
    async with httpx.AsyncClient(base_url=base, headers={"Authorization": f"Bearer {KEY}"}) as client:
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await client.get("/health")).status_code == 200
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
        request = {**CHAT, "max_tokens": 40, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            leaving.tell()
            await asyncio.sleep(0.2)
            async with httpx.AsyncClient(base_url=base) as late:
                with pytest.raises(httpx.ConnectError):
                    await late.get("/health")
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
    async with asyncio.timeout(10):
        await serving


async def test_a_stream_that_fails_midway_ends_with_an_error_event(site) -> None:
    engine = await site.engine("b0", "both")
    engine.step_s = 0.01
    request = {**CHAT, "max_tokens": 2000, "stream": True}
    pending = asyncio.create_task(site.client.post("/v1/chat/completions", json=request))
    async with asyncio.timeout(5):
        while not engine.jobs:  # noqa: ASYNC110 -- other thread
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    engine.fail_next = 100
    answer = await pending
    assert answer.status_code == 200
    errors = [line for line in answer.text.splitlines() if line.startswith('data: {"error"')]
    assert len(errors) == 1
    assert json.loads(errors[0][6:])["error"]["code"] == 503
