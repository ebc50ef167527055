"""What the end-to-end benchmarks share: servers under test, a streaming client, CPU accounts, tables."""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mooncake.core.config import STEP_TOKENS
from mooncake.core.cpu import resolve_dtype
from mooncake.worker.pulse import Pulse

START_S_MAX = 300.0
STOP_S_MAX = 20.0
REQUEST_S_MAX = 300.0
DTYPE = resolve_dtype("auto")


def arguments(
    description: str, more: Callable[[argparse.ArgumentParser], None] = lambda _: None
) -> argparse.Namespace:
    """Return the common command line; `more` adds options to it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny model, few requests: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--model", help="model folder or hub name (default: SmolLM2, or tiny with --quick)")
    more(parser)
    # `timeout` and Ctrl-C alike end through `finally`, which stops the servers
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return parser.parse_args()


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that tells what begins now; the bar is full after `steps` of them."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps)
        begun = itertools.count()
        yield lambda what: bar.update(task, description=what, completed=next(begun))
        bar.update(task, description="done", completed=steps)


def free_port() -> int:
    """Return a TCP port that is free on loopback right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process group under test, with its URL and its processes by name."""

    def __init__(self, name: str, argv: list[str], port: int, env: dict[str, str] | None = None) -> None:
        """Start `argv`; `wait_ready` before use."""
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.mkstemp(prefix=f"bench-{name}-", suffix=".log")[1])
        self.run_dir: Path | None = None
        self.started_s = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                argv,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def wait_ready(self) -> float:
        """Return the seconds from start until the server answers /health.

        Raises:
            RuntimeError: it ended, or did not answer in time; the message holds the end of its log.
        """
        end_s = self.started_s + START_S_MAX
        while time.monotonic() < end_s and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                ready = httpx.get(f"{self.url}/v1/models", timeout=5).status_code == 200
                if (
                    ready
                    and httpx.get(f"{self.url}/health", timeout=5).status_code == 200
                    and self._is_whole()
                ):
                    return time.monotonic() - self.started_s
            time.sleep(0.1)
        tail = self.log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.name} did not start: {tail}")

    def _is_whole(self) -> bool:
        """A Conductor answers before its engines have loaded."""
        return self.run_dir is None or "ready after" in self.log.read_text(errors="replace")

    def instances(self) -> dict[str, Any]:
        """Return GET /mooncake/instances."""
        answer: dict[str, Any] = httpx.get(f"{self.url}/mooncake/instances", timeout=5).json()
        return answer

    def counters(self) -> dict[str, dict[str, float]]:
        """Return the engines' shared counters by instance (see mooncake.worker.pulse)."""
        assert self.run_dir is not None
        files = sorted(self.run_dir.glob("*/pulse"))
        return {f.parent.name.rpartition("-")[0]: Pulse(f, create=False).snapshot() for f in files}

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S_MAX)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.unlink(missing_ok=True)
        if self.run_dir is not None:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def model(self) -> str:
        """Return the served model's name."""
        return str(httpx.get(f"{self.url}/v1/models", timeout=5).json()["data"][0]["id"])


@contextlib.contextmanager
def running(begin: Callable[[str], None], *servers: Server) -> Iterator[None]:
    """Wait until all of `servers`, which load at the same time, are ready; stop them at the end."""
    with contextlib.ExitStack() as started:
        for server in servers:
            started.callback(server.stop)
        for server in servers:
            begin(f"starting {server.name}")
            server.wait_ready()
        yield


def mooncake_up(model: str, *extra: str) -> Server:
    """Return a starting `mooncake up`."""
    port = free_port()
    run_dir = tempfile.mkdtemp(prefix="bench-up-")
    options = ["--model", model, "--port", str(port), "--run-dir", run_dir, "--dtype", DTYPE, *extra]
    server = Server("mooncake", [sys.executable, "-m", "mooncake", "up", *options], port)
    server.run_dir = Path(run_dir)
    return server


def plain_vllm(model: str, max_model_len: int = 8192, threads: int = 1) -> Server:
    """Return a starting stock vLLM server with the settings of our engines, which have a thread each."""
    port = free_port()
    argv = [
        sys.executable,
        *("-m", "benchmarks.stock_vllm"),
        *("--model", model, "--served-model-name", "plain", "--port", str(port), "--host", "127.0.0.1"),
        *("--dtype", DTYPE, "--block-size", "32", "--kv-cache-memory-bytes", str(512 << 20)),
        *("--max-num-seqs", "16", "--max-num-batched-tokens", str(STEP_TOKENS)),
        *("--max-model-len", str(max_model_len)),
        *("--enforce-eager", "--enable-prompt-tokens-details"),
    ]
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return Server("vllm", argv, port, env)


def prompt_tokens(count: int, seed: int, vocabulary: int = 400) -> list[int]:
    """Return `count` token ids that no other seed shares a prefix with."""
    rng = random.Random(seed)
    return [rng.randrange(10, vocabulary) for _ in range(count)]


async def sse_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines of an event stream.

    httpx's own aiter_lines ends lines at U+0085, U+2028 and others too, which tokens may contain.
    """
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


async def stream(
    client: httpx.AsyncClient, url: str, model: str, tokens: list[int], max_tokens: int
) -> dict[str, Any]:
    """Run one streamed completion; return ttft_s, the gaps between tokens, and the usage."""
    body = {
        "model": model,
        "prompt": tokens,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    stamps: list[float] = []
    usage: dict[str, Any] = {}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in sse_lines(response):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices"):
                stamps.append(time.perf_counter())
            usage = event.get("usage") or usage
    return {
        "ttft_s": stamps[0] - started_s,
        "gaps_s": [b - a for a, b in itertools.pairwise(stamps)],
        "total_s": time.perf_counter() - started_s,
        "usage": usage,
    }


def run_streams(
    url: str, model: str, prompts: list[list[int]], max_tokens: int, concurrent: int
) -> list[dict[str, Any]]:
    """Run all prompts with at most `concurrent` at a time."""

    async def main() -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(concurrent)
        limits = httpx.Limits(max_connections=concurrent)
        async with httpx.AsyncClient(timeout=REQUEST_S_MAX, limits=limits) as client:

            async def one(prompt: list[int]) -> dict[str, Any]:
                async with gate:
                    return await stream(client, url, model, prompt, max_tokens)

            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    return asyncio.run(main())


def cpu_s(pid: int) -> float:
    """Return user plus system CPU seconds of one process (its threads, not its children)."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def child_of(pid: int) -> int:
    """Return the engine process of a relay, or the engine core of a vLLM server."""
    return int(psutil.Process(pid).children()[-1].pid)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one shape as a table."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def save(path: str | None, result: dict[str, Any]) -> None:
    """Write `result` as JSON if a path was given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
