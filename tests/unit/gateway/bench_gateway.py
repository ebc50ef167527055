"""CPU time of the gateway per streamed token, over null engines. Run it, it is not a test.

    python tests/unit/gateway/bench_gateway.py [--streams 32] [--tokens 200]

Engines (made-up tokens) and clients (raw sockets) live in forked processes, so that process_time()
of this process is the gateway's alone: HTTP, vLLM's front end, dispatcher, links and ZMQ's IO thread.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

PORT = 18191
STEP_S = 0.005


def _fork(work: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def _engine(instance_id: str, role: str, record_path: Path) -> None:
    from fake_engine import FakeEngine, encoded

    engine = FakeEngine(instance_id, role, step_s=STEP_S)
    record_path.with_suffix(".tmp").write_bytes(encoded(engine.record))
    record_path.with_suffix(".tmp").rename(record_path)
    signal.pause()


async def _stream(tokens: int) -> int:
    body = json.dumps(
        {"model": "tiny", "prompt": "a" * 100, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    data = await reader.read()
    writer.close()
    return data.count(b"data: ") - 1


def _clients(streams: int, tokens: int, result: Path) -> None:
    async def run() -> None:
        for _ in range(100):
            try:
                await _stream(1)
                break
            except OSError:
                await asyncio.sleep(0.1)
        await asyncio.gather(*(_stream(8) for _ in range(streams)))
        began = time.monotonic()
        (result.parent / "begin").write_text("x")
        await asyncio.sleep(0.5)
        events = sum(await asyncio.gather(*(_stream(tokens) for _ in range(streams))))
        result.write_text(json.dumps([events, time.monotonic() - began]))  # noqa: ASYNC240

    asyncio.run(run())


async def measure(streams: int, tokens: int, first_token: bool = False) -> dict[str, float]:
    """Return CPU microseconds of the gateway per streamed token, and what was streamed."""
    import tiny_model

    from conductor import gateway, vllm_seam
    from conductor.http import RejectionMiddleware
    from mooncake.core.config import GatewayOptions
    from mooncake.core.messages import INSTANCES_PREFIX
    from mooncake.core.metadata_memory import MemoryMetadata

    directory = Path(tempfile.mkdtemp())
    roles = {"p0": "prefill", "d0": "decode"}
    children = [_fork(lambda i=i, role=role: _engine(i, role, directory / i)) for i, role in roles.items()]
    children.append(_fork(lambda: _clients(streams, tokens, directory / "result")))
    try:
        model = tiny_model.make(directory / "model")
        options = GatewayOptions(
            model=str(model),
            run_dir=str(directory),
            served_name="tiny",
            port=PORT,
            first_token=first_token,
            vllm_args=["--disable-uvicorn-access-log"],
        )
        args, config = gateway.configure(options)
        metadata = MemoryMetadata()
        cluster = gateway.Cluster(options, metadata)
        llm = vllm_seam.build_llm(args, config, cluster.client)
        app = await vllm_seam.build_app(llm, args)
        cluster.start(llm)
        for instance_id in roles:
            record = (directory / instance_id).read_bytes()
            await metadata.put(INSTANCES_PREFIX + instance_id, record)
        while len(cluster.view.alive()) < 2:  # noqa: ASYNC110 -- other process
            await asyncio.sleep(0.05)
        stop = asyncio.Event()
        served = asyncio.create_task(
            vllm_seam.serve(app, RejectionMiddleware(app), args, stop, cluster.drain)
        )
        while not (directory / "begin").exists():  # noqa: ASYNC110 -- other process
            await asyncio.sleep(0.02)
        cpu_s, main_s = time.process_time(), time.thread_time()
        while not (directory / "result").exists():  # noqa: ASYNC110 -- other process
            await asyncio.sleep(0.05)
        cpu_s, main_s = time.process_time() - cpu_s, time.thread_time() - main_s
        await asyncio.sleep(0.1)
        events, wall_s = json.loads((directory / "result").read_text())
        stop.set()
        await served
        await cluster.members.close()
        llm.shutdown()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # noqa: ASYNC222
    return {
        "cpu_us_per_token": cpu_s / (streams * tokens) * 1e6,
        "main_thread_us_per_token": main_s / (streams * tokens) * 1e6,
        "tokens": streams * tokens,
        "sse_events": events,  # fewer than tokens: a busy gateway sends several tokens at once
        "wall_s": wall_s,
    }


async def measure_dispatch(streams: int, frames: int) -> dict[str, float]:
    """Return CPU microseconds per token of our part alone: decode, state machines, metrics."""
    from conftest import World, make_request

    from conductor.scheduler import Mode
    from conductor.vllm_seam import EngineCoreOutput, EngineCoreOutputs, MsgpackEncoder

    world = World(first_token=False, mode=Mode.AGGREGATED)
    engine = await world.engine("b0", "both", step_s=1e6)
    rids = [world.add(make_request([1, 2, index], max_tokens=10**6)) for index in range(streams)]
    await world.until(lambda: len(engine.received) == streams)
    outputs = [EngineCoreOutput(request_id=r.request_id, new_token_ids=[7]) for r in engine.received]
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(outputs=outputs, timestamp=1.0))
    link = world.members.links["b0"]
    began_s = time.thread_time()
    for _ in range(frames):
        link._take_outputs(list(encoded))
        world.dispatcher.outputs.get_nowait()
    spent_s = time.thread_time() - began_s
    world.dispatcher.abort(rids)
    await world.close()
    return {"dispatch_us_per_token": spent_s / (frames * streams) * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--profile", default="")
    given = parser.parse_args()
    import fake_engine  # noqa: F401 -- imported once, before the forks
    import uvloop

    print(json.dumps(asyncio.run(measure_dispatch(given.streams, 400))))
    if given.profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    print(json.dumps(uvloop.run(measure(given.streams, given.tokens))))
    if given.profile:
        profiler.disable()
        profiler.dump_stats(given.profile)


if __name__ == "__main__":
    main()
