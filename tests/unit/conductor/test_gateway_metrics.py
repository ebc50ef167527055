"""Words, labels and judgements of the metrics of gateways: bounded, however things are named."""

import string
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from conductor.core_metrics import CoreCollector
from conductor.genai_metrics import OPERATIONS, GenAiMetrics
from conductor.http import RejectionMiddleware
from conductor.index import PrefixIndex
from conductor.index_metrics import Booked, IndexCollector, LoadCollector
from conductor.metrics import FAILURES, STATUSES, DecisionMetrics, GatewayMetrics
from conductor.quick_metrics import QuickHistogram
from conductor.request import OVERRUN
from conductor.slo_metrics import MOVES, failure_word, move_word, objectives_of, result_of
from conductor.tenants import Tenants
from conductor.terms import CLASSES, Terms
from mooncake.core.metric_labels import INSTANCES_MAX, OTHER, TENANTS_MAX, Bounded

NAMES = st.text(alphabet=string.printable, max_size=20)


@given(st.lists(NAMES, max_size=60), st.integers(1, 10))
def test_a_bounded_label_has_so_many_values_and_each_name_always_the_same(names: list[str], most: int):
    label = Bounded(most)
    first = {name: label(name) for name in names}
    assert {name: label(name) for name in names} == first
    assert len(set(first.values()) - {OTHER}) <= most
    assert all(told in {name, OTHER} for name, told in first.items())
    if len(set(names) - {OTHER}) <= most:
        assert all(told == name for name, told in first.items())


@given(st.lists(NAMES, max_size=30))
def test_whatever_tenants_clients_name_no_series_is_made_for_one_that_is_not_listed(names: list[str]):
    metrics, tenants = GatewayMetrics(CollectorRegistry()), Tenants()
    for name in names:
        label = metrics.tenant(tenants.label(name))
        metrics.tenant_requests.labels(label, "finished").inc()
    found = {sample.labels["tenant"] for sample in metrics.tenant_requests.collect()[0].samples}
    assert found <= {OTHER}


def test_of_many_listed_tenants_so_many_have_series_of_their_own_also_over_changes_of_the_file():
    metrics = DecisionMetrics(CollectorRegistry())
    for change in range(3):
        names = [f"t{change}-{number}" for number in range(TENANTS_MAX)]
        tenants = Tenants(dict.fromkeys(names))
        for name in names:
            metrics.tenant_tokens.labels(metrics.tenant(tenants.label(name))).inc()
    samples = [one for one in metrics.tenant_tokens.collect()[0].samples if one.name.endswith("_total")]
    assert len(samples) == TENANTS_MAX + 1
    assert {one.labels["tenant"]: one.value for one in samples}[OTHER] == 2 * TENANTS_MAX


@given(st.text())
def test_every_reason_has_a_word_of_ours(text: str):
    assert failure_word(text) in FAILURES
    assert move_word(text) in {*MOVES, OTHER}


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("prefill instance p-0 was lost, after 3 attempts", "engine_lost"),
        ("lost 4 instances", "engine_lost"),
        ("decode on d-0 ended with error, after 2 attempts", "engine_error"),
        ("no instance alive", "no_place"),
        ("deadline exceeded", "silent"),
        (OVERRUN, "backlog"),
        ("something new", "other"),
    ],
)
def test_what_a_request_machine_says_of_its_failure_is_told_in_a_word(said: str, word: str):
    assert failure_word(said) == word


@pytest.mark.parametrize(
    ("said", "word"), [("silent for 1.62 s", "silent"), ("link down", "link down"), ("p-0 left", OTHER)]
)
def test_why_a_request_is_moved_is_told_without_numbers_and_names(said: str, word: str):
    assert move_word(said) == word


def test_an_objective_of_the_requests_own_holds_before_the_operators_and_batch_waits_without():
    own = Terms(ttft_slo_s=0.5, tbt_slo_s=0.02)
    batch = Terms(slo_class=CLASSES["batch"])
    assert objectives_of(own, 1.0, 0.1) == (0.5, 0.02)
    assert objectives_of(Terms(), 1.0, 0.1) == (1.0, 0.1)
    assert objectives_of(Terms(), None, None) == (inf, inf)
    assert objectives_of(batch, 1.0, 0.1) == (inf, 0.1)


@pytest.mark.parametrize(
    ("ttft_s", "gaps", "late", "result"),
    [
        (0.9, 20, 2, "met"),
        (1.1, 20, 0, "ttft"),
        (0.9, 20, 3, "tbt"),
        (1.1, 20, 9, "ttft"),
        (0.5, 0, 0, "met"),
    ],
)
def test_a_request_is_met_with_its_first_token_in_time_and_a_tenth_of_its_gaps_late(
    ttft_s, gaps, late, result
):
    assert result_of(ttft_s, 1.0, gaps, late) == result


def test_objectives_are_shown_by_class_and_follow_a_reload():
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)

    def shown(slo_class: str, objective: str) -> float | None:
        labels = {"slo_class": slo_class, "objective": objective}
        return registry.get_sample_value("mooncake_slo_objective_seconds", labels)

    assert shown("default", "ttft") is None
    metrics.set_objectives(2.0, 0.1)
    assert (shown("default", "ttft"), shown("premium", "tbt"), shown("batch", "ttft")) == (2.0, 0.1, None)
    metrics.set_objectives(1.0, None)
    assert (shown("default", "ttft"), shown("premium", "tbt")) == (1.0, None)


def test_a_labelled_quick_histogram_is_scraped_as_the_librarys():
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    one = Histogram("gap_seconds", "Gaps.", ["kind"], buckets=(1.0, 2.0), registry=theirs)
    other = QuickHistogram("gap_seconds", "Gaps.", (1.0, 2.0), ours, ("kind",))
    for kind, value in (("a", 0.5), ("b", 1.0), ("a", 9.0)):
        one.labels(kind).observe(value)
        other.observe(value, kind)

    def lines(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert lines(ours) == lines(theirs)


def test_other_http_statuses_than_those_we_know_share_one_series():
    metrics = GatewayMetrics(CollectorRegistry())
    for status in (200, 418, 599, 101):
        metrics.answered(status)
    samples = {one.labels["code"]: one.value for one in metrics.responses.collect()[0].samples}
    assert {code for code, count in samples.items() if count} >= {"200", OTHER}
    assert set(samples) == set(STATUSES)


async def test_the_status_of_answers_that_engines_are_needed_for_is_counted_and_of_no_others():
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message) -> None:
        sent.append(message["type"])

    counted: list[int] = []
    sent: list[str] = []
    front = RejectionMiddleware(app, answered=counted.append)
    for path, headers in (
        ("/v1/completions", []),
        ("/health", []),
        ("/v1/chat/completions", [(b"x-slo-class", b"no such")]),
    ):
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await front(scope, receive, send)
    assert counted == [200, 400]
    assert sent.count("http.response.start") == 3


def test_genai_metrics_know_the_served_name_and_no_name_of_a_client():
    registry = CollectorRegistry()
    genai = GenAiMetrics(registry)
    genai.model = "big"
    for operation in ("chat", "text_completion"):
        for adapter in (False, True):
            genai.ended(
                operation, adapter=adapter, seconds=1.0, ttft_s=0.1, tpot_s=None, prompt_tokens=7,
                answer_tokens=0, error="",
            )  # fmt: skip
    assert set(OPERATIONS.values()) == {"chat", "text_completion"}
    page = generate_latest(registry).decode()
    models = {part.split('"')[1] for part in page.split("gen_ai_request_model=")[1:]}
    assert models == {"big", OTHER}
    labels = {
        "gen_ai_operation_name": "chat", "gen_ai_request_model": "big", "gen_ai_provider_name": "mooncake"
    }  # fmt: skip
    count = "gen_ai_client_token_usage_count"
    assert registry.get_sample_value(count, {**labels, "gen_ai_token_type": "input"}) == 1
    assert registry.get_sample_value(count, {**labels, "gen_ai_token_type": "output"}) is None


def test_of_many_instances_so_many_have_series_and_the_others_one_sum():
    registry = CollectorRegistry()
    booked = [Booked(f"i{n:04}", "prefill", 1.0, 2, 3, 4) for n in range(INSTANCES_MAX + 10)]
    registry.register(LoadCollector(lambda: booked))
    known = {one.instance_id: 5 for one in booked}
    registry.register(IndexCollector(PrefixIndex(1), lambda: known))
    page = generate_latest(registry).decode()
    for name, each in (("instance_kv_tokens", 4), ("instance_queue_seconds", 1)):
        assert page.count(f"mooncake_{name}{{") == INSTANCES_MAX + 1
        rest = registry.get_sample_value(f"mooncake_{name}", {"instance_id": OTHER, "role": OTHER})
        assert rest == 10 * each
    assert registry.get_sample_value("mooncake_gpu_blocks_known", {"instance_id": OTHER}) == 50


def test_a_core_tells_its_term_and_who_has_joined():
    class Office:
        term = 7
        gateways = ("one", "two")

    registry = CollectorRegistry()
    registry.register(CoreCollector(Office()))
    assert registry.get_sample_value("mooncake_core_term") == 7
    assert registry.get_sample_value("mooncake_core_gateways") == 2
