"""`python -m benchmarks.observability_stand PLAN`: gateways that differ in what they measure; null engines.

All are forked from one process that has imported vLLM, as in benchmarks.gateway_peers.stack. The null process
has two engines for the gateways that are compared, many for the one whose page is looked at, and takes the
spans of those that trace.
"""

import asyncio
import http.server
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gateway_peers.stack import attend, forked

TRACED = {
    "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",
}


class Front(msgspec.Struct, frozen=True):
    """One gateway. `measures`: ours, and vLLM's statistics; `traced`: the part of requests; 0 = off."""

    name: str
    port: int
    metadata: int
    admin_port: int = 0
    instances: int = 2
    measures: bool = True
    vllm_stats: bool = True
    traced: float = 0.0


class Stand(msgspec.Struct, frozen=True):
    """What to start. `folder`: logs, and when all are forked, pids.json by name."""

    folder: str
    model: str
    vocabulary: int
    max_model_len: int
    step_s: float
    sink: int
    fronts: list[Front]


class _Sink(http.server.BaseHTTPRequestHandler):
    """Takes spans and keeps none."""

    def do_POST(self) -> None:
        """Answer as a collector does."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def engines(stand: Stand) -> None:
    """Serve null engines, and the sink, until SIGTERM."""
    import zmq

    from benchmarks.gateway_peers.null_engine import RelayFront, register, serve

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    most = max(front.instances for front in stand.fronts)
    relays = [
        RelayFront(context, f"null-{index}", ("prefill", "decode")[index % 2], stand.vocabulary)
        for index in range(most)
    ]
    sink = http.server.ThreadingHTTPServer(("127.0.0.1", stand.sink), _Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    records = [relay.record(stand.model, stand.max_model_len) for relay in relays]
    for front in stand.fronts:
        run = partial(register, f"tcp://127.0.0.1:{front.metadata}", records[: front.instances], stop)
        threading.Thread(target=lambda run=run: asyncio.run(run()), daemon=True).start()
    serve(list(relays), stand.step_s, stop)


class Nothing:
    """A metric that counts nothing."""

    model = ""

    def labels(self, *_: Any) -> "Nothing":
        """Itself, for any labels."""
        return self

    series = labels

    def inc(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    observe = set = ended = inc

    def clear(self) -> None:
        """Nothing."""


def measuring_nothing() -> Any:
    """Return a gateway's metrics that cost a call and no more."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from conductor.genai_metrics import GenAiMetrics
    from conductor.metrics import GatewayMetrics
    from conductor.quick_metrics import QuickCounter, QuickHistogram

    metrics, nothing = GatewayMetrics(CollectorRegistry()), Nothing()
    for name, value in vars(metrics).items():
        if isinstance(value, Counter | Gauge | Histogram | QuickCounter | QuickHistogram | GenAiMetrics):
            setattr(metrics, name, nothing)
    return metrics


def serve_front(stand: Stand, front: Front) -> None:
    """Serve one gateway, with its decision core inside."""
    from conductor import gateway
    from mooncake.core.options import GatewayOptions

    if front.traced:
        os.environ.update(TRACED, OTEL_TRACES_SAMPLER_ARG=str(front.traced))
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{stand.sink}"
    if not front.measures:
        none = measuring_nothing()
        vars(gateway)["process_metrics"] = lambda: none
    gateway.main(
        GatewayOptions(
            model=stand.model, run_dir=stand.folder, port=front.port, served_name="m",
            name=f"front-{front.port}", metadata_endpoint=f"tcp://127.0.0.1:{front.metadata}", block_size=32,
            max_model_len=stand.max_model_len, admin_port=front.admin_port,
            vllm_args=[] if front.vllm_stats else ["--disable-log-stats"],
        )
    )  # fmt: skip


def main() -> None:
    """Fork everything, then wait; SIGTERM ends all."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    stand = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Stand)
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.async_llm  # noqa: F401

    import conductor.gateway  # noqa: F401

    where: Any = stand  # `forked` looks for the folder
    todo: dict[str, Callable[[], None]] = {"null": lambda: engines(stand)}
    todo |= {front.name: partial(serve_front, stand, front) for front in stand.fronts}
    pids = {name: forked(where, name, run) for name, run in todo.items()}
    attend(stand.folder, pids)


if __name__ == "__main__":
    main()
