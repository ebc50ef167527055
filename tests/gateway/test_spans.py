"""A request is one trace: what a gateway measures of it, as spans in the right order under the client's."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Front, World, make_request
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry
from test_core import Site, pools

from conductor.http import FATE, HttpFate
from conductor.spans import RequestTrace, Traces
from conductor.vllm_seam import Unavailable
from mooncake.core.tracing_sdk import Tracing

PARENT = "00-0123456789abcdef0123456789abcdef-00f067aa0ba902b7-01"
PROMPT = list(range(2, 20))


class Traced:
    """Dispatches requests as the HTTP front end does, and reads what comes of their spans."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self.exporter = exporter
        self.tracing = Tracing(exporter, "gateway", registry=CollectorRegistry())
        self.traces = Traces(self.tracing, "tiny")

    def begin(self, *headers: tuple[bytes, bytes]) -> RequestTrace:
        trace = self.traces.begin("/v1/chat/completions", headers, "mine")
        assert trace is not None
        return trace

    def add(self, world: Front, trace: RequestTrace, **params: object) -> str:
        request = make_request(PROMPT, **params)
        world.finished[request.request_id] = asyncio.Event()
        fate = HttpFate(names={"request_id": "mine"})
        fate.trace = trace
        token = FATE.set(fate)
        try:
            world.dispatcher.add(request)
        finally:
            FATE.reset(token)
        return request.request_id

    def spans(self) -> list[ReadableSpan]:
        """Everything that has ended, by its start."""
        self.tracing.flush()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def tree(self) -> list[tuple[str, str]]:
        """Names of spans with those of their parents."""
        names = {span.context.span_id: span.name for span in self.spans() if span.context}
        return [
            (span.name, names.get(span.parent.span_id, "the client's") if span.parent else "")
            for span in self.spans()
        ]

    def one(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self.spans() if span.name == name)
        return span


@pytest.fixture
def traced() -> Iterator[Traced]:
    one = Traced(InMemorySpanExporter())
    yield one
    one.tracing.close()


MakeWorld = Callable[..., World]


async def test_a_request_is_one_trace_of_its_decision_both_legs_and_the_handover(
    make_world: MakeWorld, traced: Traced
) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    trace = traced.begin((b"traceparent", PARENT.encode()))
    await world.finish(traced.add(world, trace))
    trace.ended(200, complete=True)
    assert traced.tree() == [
        ("gateway.request", "the client's"),
        ("conductor.decide", "gateway.request"),
        ("prefill", "gateway.request"),
        ("handover", "gateway.request"),
        ("decode", "gateway.request"),
    ]
    assert {f"{span.context.trace_id:032x}" for span in traced.spans() if span.context} == {PARENT[3:35]}
    about = dict(traced.one("gateway.request").attributes or {})
    assert about["gen_ai.operation.name"] == "chat"
    assert about["gen_ai.request.model"] == "tiny"
    assert about["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert about["gen_ai.usage.output_tokens"] == 8
    assert about["gen_ai.response.finish_reasons"] == ("length",)
    assert about["gen_ai.server.time_to_first_token"] > 0
    assert about["http.response.status_code"] == 200
    decided = dict(traced.one("conductor.decide").attributes or {})
    assert (decided["mooncake.prefill"], decided["mooncake.decode"]) == ("p0", "d0")
    assert decided["mooncake.decision"] == "kvcache_centric"
    handover = traced.one("handover")
    assert handover.start_time == traced.one("prefill").end_time
    assert (handover.attributes or {})["mooncake.bytes"] == 1024 * 5  # 18 tokens in blocks of 4


async def test_an_engine_is_told_the_span_of_its_leg(make_world: MakeWorld, traced: Traced) -> None:
    world = make_world()
    prefill, decode = await world.engine("p0", "prefill"), await world.engine("d0", "decode")
    trace = traced.begin()
    await world.finish(traced.add(world, trace))
    for engine, name in ((prefill, "prefill"), (decode, "decode")):
        (request,) = engine.received
        told = request.sampling_params.extra_args["kv_transfer_params"]["mooncake"]["trace"]
        context = traced.one(name).context
        assert context is not None
        assert told.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
        assert request.trace_headers is None  # vLLM would repeat them with every token


async def test_what_moves_has_a_span_for_each_attempt_linked_to_the_one_before(
    make_world: MakeWorld, traced: Traced
) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    first = await world.engine("d0", "decode", step_s=0.05)
    trace = traced.begin()
    rid = traced.add(world, trace, max_tokens=40)
    await world.until(lambda: len(world.tokens(rid)) > 2)
    await world.engine("d1", "decode")
    first.kill()
    await world.finish(rid)
    trace.ended(200, complete=True)
    lost, resumed = (span for span in traced.spans() if span.name == "decode")
    assert lost.status.status_code is StatusCode.ERROR
    assert (lost.attributes or {})["mooncake.instance"] == "d0"
    assert (resumed.attributes or {})["mooncake.instance"] == "d1"
    assert (resumed.attributes or {})["mooncake.attempt"] == 2
    assert (resumed.attributes or {})["mooncake.resumed_tokens"] > 2
    assert [link.context.span_id for link in resumed.links] == [lost.context and lost.context.span_id]
    assert "migration" in [event.name for event in traced.one("gateway.request").events]


async def test_a_leg_that_fails_is_an_error_and_the_next_one_a_second_attempt(
    make_world: MakeWorld, traced: Traced
) -> None:
    world = make_world()
    for name in ("p0", "p1"):
        (await world.engine(name, "prefill")).fail_next = 1
    await world.engine("d0", "decode")
    trace = traced.begin()
    await world.finish(traced.add(world, trace))
    trace.ended(200, complete=True)
    failed, again = [span for span in traced.spans() if span.name == "prefill"][:2]
    assert failed.status.status_code is StatusCode.ERROR
    assert (failed.attributes or {})["mooncake.finish"] == "error"
    assert (again.attributes or {})["mooncake.attempt"] == 2
    assert [link.context for link in again.links] == [failed.context]
    assert "retry" in [event.name for event in traced.one("gateway.request").events]
    assert (traced.one("gateway.request").attributes or {})["gen_ai.response.finish_reasons"] == ("length",)


async def test_who_is_turned_away_has_a_decision_that_says_why(make_world: MakeWorld, traced: Traced) -> None:
    world = make_world()
    trace = traced.begin()
    with pytest.raises(Unavailable):
        traced.add(world, trace)
    trace.ended(503, complete=True)
    assert [name for name, _ in traced.tree()] == ["gateway.request", "conductor.decide"]
    decided = traced.one("conductor.decide")
    assert (decided.attributes or {})["mooncake.reason"] == "no instance alive"
    assert decided.status.status_code is StatusCode.ERROR
    assert traced.one("gateway.request").status.status_code is StatusCode.ERROR


async def test_a_client_that_leaves_ends_every_span(make_world: MakeWorld, traced: Traced) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode", step_s=0.05)
    trace = traced.begin()
    rid = traced.add(world, trace, max_tokens=1000)
    await world.until(lambda: len(world.tokens(rid)) > 2)
    world.dispatcher.abort([rid])
    trace.ended(200, complete=False)
    assert (traced.one("decode").attributes or {})["mooncake.finish"] == "aborted"
    request = traced.one("gateway.request")
    assert (request.attributes or {})["gen_ai.response.finish_reasons"] == ("aborted",)
    assert (request.attributes or {})["mooncake.client_left"] is True
    assert request.status.status_code is StatusCode.ERROR


async def test_choices_of_one_request_share_its_prefill_span(make_world: MakeWorld, traced: Traced) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    trace = traced.begin()
    parent = "cmpl-x-abcd"
    ids = [traced.add(world, trace, rid=f"{index}_{parent}", external="cmpl-x") for index in range(2)]
    for rid in ids:
        await world.finish(rid)
    trace.ended(200, complete=True)
    names = [span.name for span in traced.spans()]
    assert names.count("prefill") == 1
    assert names.count("decode") == 2
    about = dict(traced.one("gateway.request").attributes or {})
    assert about["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert about["gen_ai.usage.output_tokens"] == 16
    assert about["gen_ai.response.finish_reasons"] == ("length", "length")


async def test_no_token_and_no_prompt_is_in_any_span(make_world: MakeWorld, traced: Traced) -> None:
    world = make_world()
    await world.engine("p0", "prefill")
    await world.engine("d0", "decode")
    trace = traced.begin((b"authorization", b"Bearer secret-key"), (b"baggage", b"user=somebody"))
    await world.finish(traced.add(world, trace))
    trace.ended(200, complete=True)
    for span in traced.spans():
        shown = span.to_json()
        assert "secret-key" not in shown
        assert "somebody" not in shown
        values = [value for one in (span, *span.events) for value in (one.attributes or {}).values()]
        assert all(isinstance(value, str | int | float | bool | tuple) for value in values)
        assert not [v for v in values if isinstance(v, tuple) and any(isinstance(one, int) for one in v)]


async def test_without_a_trace_engines_are_told_none(make_world: MakeWorld) -> None:
    world = make_world()
    engine = await world.engine("p0", "both")
    await world.finish(world.add(make_request(PROMPT)))
    for request in engine.received:
        assert "trace" not in request.sampling_params.extra_args["kv_transfer_params"]["mooncake"]


async def test_a_core_elsewhere_adds_its_decision_under_the_gateways(traced: Traced, tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        await pools(site, gateways=1)
        core = site.cores[0].core
        core.tracing = Tracing(traced.exporter, "core", registry=CollectorRegistry())
        trace = traced.begin()
        await site.gateways[0].finish(traced.add(site.gateways[0], trace))
        trace.ended(200, complete=True)
        core.tracing.flush()
        assert ("core.decide", "conductor.decide") in traced.tree()
        decided = traced.one("core.decide")
        assert decided.resource.attributes["service.name"] == "mooncake-core"
        assert (decided.attributes or {})["mooncake.decode"] == "d0"
        (why,) = core.decider.decisions._records
        assert why.names == {"request_id": "mine"}
    finally:
        await site.close()


def test_requests_that_no_sampler_wants_have_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    one = Traced(InMemorySpanExporter())
    assert one.traces.begin("/v1/completions", [], "x") is None
    assert one.traces.begin("/v1/completions", [(b"traceparent", PARENT.encode())], "x") is not None
    assert one.traces.begin("/v1/models", [(b"traceparent", PARENT.encode())], "x") is None
    one.tracing.close()
