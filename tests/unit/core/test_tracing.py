"""Tracing is off unless asked for; then a collector that is slow or dead costs spans and nothing else."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from mooncake.core import tracing_sdk
from mooncake.core.errors import ConfigError
from mooncake.core.tracing import ENDPOINT_ENV, TRACES_ENDPOINT_ENV, endpoint, open_tracing, use_endpoint
from mooncake.core.tracing_sdk import Tracing


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


class Stuck(SpanExporter):
    """A collector that answers when it is let go."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.result = result
        self.go = threading.Event()
        self.asked = threading.Event()
        self.spans: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        assert self.go.wait(30)
        self.spans += [span.name for span in spans]
        return self.result


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    one = Stuck()
    yield one
    one.go.set()


def results(registry: CollectorRegistry) -> dict[str, float]:
    return {
        result: registry.get_sample_value("mooncake_trace_spans_total", {"result": result}) or 0.0
        for result in ("sent", "failed", "dropped")
    }


def spans(tracing: Tracing, count: int) -> None:
    for number in range(count):
        span = tracing.served(f"s{number}", {}, {})
        assert span is not None
        span.end()


def test_off_by_default_and_then_nothing_of_it_is_imported() -> None:
    assert open_tracing("core") is None
    code = (
        "import sys; from mooncake.core.tracing import open_tracing; import conductor.spans;"
        "assert open_tracing('core') is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_standard_variables_switch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_ENV, "http://collector:4318")
    assert endpoint() == "http://collector:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://other:4318/v1/traces")
    assert endpoint() == "http://other:4318/v1/traces"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert endpoint() == ""


def test_an_option_is_the_variable_for_this_process_and_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_ENV, "")
    use_endpoint("")
    assert endpoint() == ""
    use_endpoint("http://127.0.0.1:4318")
    assert endpoint() == "http://127.0.0.1:4318"
    with pytest.raises(ConfigError, match=r"otlp_endpoint = 'collector:4318': must be http://HOST:PORT"):
        use_endpoint("collector:4318")


def test_an_option_comes_before_every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_ENV, "http://generic:4318")
    monkeypatch.setenv(TRACES_ENDPOINT_ENV, "http://traces:4318/v1/traces")
    use_endpoint("")
    assert endpoint() == "http://traces:4318/v1/traces"
    use_endpoint("http://127.0.0.1:4318")
    assert endpoint() == "http://127.0.0.1:4318"
    sent_to = tracing_sdk.exporter()
    assert sent_to._endpoint == "http://127.0.0.1:4318/v1/traces"  # type: ignore[attr-defined]
    sent_to.shutdown()


def test_a_protocol_that_nobody_speaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_ENV, "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL = 'http/json': must be one of"):
        open_tracing("core")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_ENV, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "mooncake.core.tracing_sdk", None)
    with pytest.raises(ConfigError, match=r"pip install 'mooncake-serving\[otel\]'"):
        open_tracing("core")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_without_the_package_of_a_protocol_it_says_what_to_install(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT_ENV, "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    package = f"opentelemetry.exporter.otlp.proto.{protocol.partition('/')[0]}.trace_exporter"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed: pip install"):
        open_tracing("core")


def test_spans_of_other_processes_join_by_name() -> None:
    exporter = InMemorySpanExporter()
    one = Tracing(exporter, "gateway", registry=CollectorRegistry())
    other = Tracing(exporter, "prefill", registry=CollectorRegistry())
    above = one.served("above", {}, {})
    assert above is not None
    below = other.begin("below", above.traceparent, 1_000)
    assert below.trace_id == above.trace_id
    below.end(2_000)
    other.begin("nobody's", "no traceparent").end()
    other.flush()
    first, second = exporter.get_finished_spans()
    assert first.parent is not None
    assert first.parent.span_id == above.context.span_id
    assert (first.start_time, first.end_time) == (1_000, 2_000)
    assert second.parent is None


def test_a_service_is_called_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def resource() -> dict[str, object]:
        exporter = InMemorySpanExporter()
        tracing = Tracing(exporter, "decode", "decode-3", CollectorRegistry())
        spans(tracing, 1)
        tracing.flush()
        return dict(exporter.get_finished_spans()[0].resource.attributes)

    assert resource()["service.name"] == "mooncake-decode"
    assert resource()["service.instance.id"] == "decode-3"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=prod,service.instance.id=pod-1")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm")
    said = resource()
    assert (said["service.name"], said["service.namespace"]) == ("llm", "prod")
    assert (said["service.instance.id"], said["mooncake.role"]) == ("pod-1", "decode")


def test_spans_for_which_there_is_no_room_are_dropped_and_counted(stuck: Stuck) -> None:
    registry = CollectorRegistry()
    tracing = Tracing(stuck, "gateway", registry=registry, waiting_max=4)
    spans(tracing, 4)
    assert stuck.asked.wait(30)  # four are being sent, and count as waiting
    spans(tracing, 3)
    assert results(registry) == {"sent": 0.0, "failed": 0.0, "dropped": 3.0}
    stuck.go.set()
    tracing.flush()
    assert results(registry) == {"sent": 4.0, "failed": 0.0, "dropped": 3.0}
    spans(tracing, 1)  # there is room again
    tracing.flush()
    assert results(registry)["sent"] == 5.0
    tracing.close()


def test_spans_that_a_collector_refuses_are_counted(stuck: Stuck) -> None:
    stuck.result = SpanExportResult.FAILURE
    stuck.go.set()
    registry = CollectorRegistry()
    tracing = Tracing(stuck, "gateway", registry=registry)
    spans(tracing, 2)
    tracing.flush()
    assert results(registry) == {"sent": 0.0, "failed": 2.0, "dropped": 0.0}
    tracing.close()


def test_a_process_ends_though_its_collector_does_not_answer(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_sdk, "CLOSE_S", 0.05)
    tracing = Tracing(stuck, "gateway", registry=CollectorRegistry())
    spans(tracing, 1)
    tracing.close()  # returns
    assert stuck.asked.wait(30)
    assert not stuck.spans


def test_what_waits_is_sent_before_a_process_ends() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "gateway", registry=CollectorRegistry())
    spans(tracing, 3)
    tracing.close()
    assert len(exporter.get_finished_spans()) == 3
