"""`python -m benchmarks.gateway_peers.stack PLAN`: everything of a run that imports vLLM, after one import.

vLLM takes 20 CPU-seconds to import, so its servers are forked from the process that imported it:

    null engine   RelayFronts (a prefill and a decode instance) and a CoreFront
    plain         vLLM's API server over vLLM's own AsyncMPClient, whose EngineCore is the CoreFront
    gateway       ours, with its decision core inside, over the RelayFronts
    front-N       gateways without one, over the same RelayFronts; "core" decides for them
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mooncake.core.process import set_parent_death_signal

log = structlog.get_logger(__name__)


class Plan(msgspec.Struct, frozen=True):
    """What to start. `folder`: sockets, logs and, when all are forked, pids.json by name."""

    folder: str
    model: str
    vocabulary: int
    max_model_len: int
    step_s: float
    plain_port: int
    gateway_port: int
    gateway_metadata: int
    front_ports: list[int]
    core_metadata: int


def null_engine(plan: Plan) -> None:
    """Serve all fronts until SIGTERM."""
    import zmq

    from benchmarks.gateway_peers.null_engine import CoreFront, Front, RelayFront, register, serve

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    relays = [RelayFront(context, f"null-{role}", role, plan.vocabulary) for role in ("prefill", "decode")]
    fronts: list[Front] = [*relays, CoreFront(context, plan.folder, plan.vocabulary)]
    records = [relay.record(plan.model, plan.max_model_len) for relay in relays]
    for port in (plan.gateway_metadata, *((plan.core_metadata,) if plan.front_ports else ())):
        at = f"tcp://127.0.0.1:{port}"
        threading.Thread(target=lambda at=at: asyncio.run(register(at, records, stop)), daemon=True).start()
    serve(fronts, plan.step_s, stop)


def arguments(plan: Plan, port: int) -> list[str]:
    """Return the flags that plain vLLM and our gateway share."""
    return [
        f"--model={plan.model}",
        "--served-model-name=m",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--max-model-len={plan.max_model_len}",
        "--block-size=32",
    ]


def plain(plan: Plan) -> None:
    """Serve vLLM's own API server."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.v1.engine.async_llm import AsyncLLM

    from conductor import vllm_seam

    async def main() -> None:
        args = vllm_seam.parse_args(arguments(plan, plan.plain_port))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", plan.plain_port))
        config = vllm_seam.build_config(args)
        ends = {"input_address": f"ipc://{plan.folder}/in", "output_address": f"ipc://{plan.folder}/out"}
        llm = AsyncLLM(
            vllm_config=config,
            executor_class=None,  # engines are managed elsewhere
            log_stats=not args.disable_log_stats,
            client_addresses=ends,
        )
        await (await build_and_serve(llm, f"http://127.0.0.1:{plan.plain_port}", sock, args))

    uvloop.run(main())


def options(plan: Plan, port: int, metadata: int, name: str) -> Any:
    """Return the settings of one of our processes."""
    from mooncake.core.options import GatewayOptions

    return GatewayOptions(
        model=plan.model, run_dir=plan.folder, port=port, served_name="m", name=name,
        metadata_endpoint=f"tcp://127.0.0.1:{metadata}", block_size=32, max_model_len=plan.max_model_len,
    )  # fmt: skip


def gateway(plan: Plan) -> None:
    """Serve our gateway, decision core included."""
    from conductor import gateway as ours

    ours.main(options(plan, plan.gateway_port, plan.gateway_metadata, "gateway"))


def core(plan: Plan) -> None:
    """Decide for the fronts."""
    from conductor import processes

    processes.main(options(plan, plan.gateway_port, plan.core_metadata, "core"))


def front(plan: Plan, index: int) -> None:
    """Serve one of several gateways."""
    from conductor import gateway as ours

    made = options(plan, plan.front_ports[index], plan.core_metadata, f"front-{index}")
    ours.main(made, alone=False)


def forked(plan: Plan, name: str, run: Callable[[], None]) -> int:
    """Run `run` in a child whose output goes to its own log; return its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        set_parent_death_signal(parent)
        log_fd = os.open(Path(plan.folder) / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        run()
        code = 0
    finally:
        if code:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attend(folder: str, pids: dict[str, int]) -> None:
    """Say in `folder` who runs; return when one has ended, or leave at SIGTERM, and end all others."""
    (Path(folder) / "pids.json").write_bytes(msgspec.json.encode(pids))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        pid, status = os.wait()
        log.error("stack.ended", pid=pid, status=status)
    finally:
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def main() -> None:
    """Fork everything, then wait; SIGTERM ends all."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.async_llm  # noqa: F401

    import conductor.gateway  # noqa: F401

    pids = {"null engine": forked(plan, "null", lambda: null_engine(plan))}
    pids["plain"] = forked(plan, "plain", lambda: plain(plan))
    pids["gateway"] = forked(plan, "gateway", lambda: gateway(plan))
    if plan.front_ports:
        pids["core"] = forked(plan, "core", lambda: core(plan))
    for index in range(len(plan.front_ports)):
        pids[f"front-{index}"] = forked(plan, f"front-{index}", partial(front, plan, index))
    attend(plan.folder, pids)


if __name__ == "__main__":
    main()
