"""The paths under test: ours, plain vLLM, and plain vLLM behind each router that is installed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec

from benchmarks import harness
from benchmarks.gateway_peers.stack import Plan
from benchmarks.processes import tree_cpu_s
from mooncake.core.errors import PeerTimeout
from mooncake.model import resolve_model

MAX_MODEL_LEN = 1 << 19
"""512 KB of text are 130,000 to 300,000 tokens."""
START_S_MAX = 240.0
QUIET_S = 0.2
ROUTERS = {
    "sglang-router": ("bin/python", "-m", "sglang_router.launch_router"),
    "vllm-router": ("bin/vllm-router",),
}
"""Programs inside the folders given by --sglang-router and --vllm-router."""


class Way(msgspec.Struct):
    """One way to the null engine: where it listens, and the processes whose CPU it costs."""

    name: str
    port: int
    pids: list[int]

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes, with their threads and children, so far."""
        return sum(tree_cpu_s(pid) for pid in self.pids)


class Ways(msgspec.Struct):
    """Those that are compared, ours first; and our gateways that share a decision core, with its pid."""

    compared: list[Way]
    fronts: list[Way]
    core_pid: int


def model_folder(target: Path, *, tiny: bool) -> int:
    """Write a model without weights, whose tokenizer is SmolLM2's or the tests'; return its vocabulary.

    Nothing here runs a model, but prompts of 512 KB must fit in its context.
    """
    if tiny:
        from tests.tiny_model import make_tiny_llama

        make_tiny_llama(target, layers=1, hidden=64, heads=1, kv_heads=1)
    else:
        source = Path(resolve_model(None).path_or_name)
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, target)
    config = json.loads((target / "config.json").read_text())
    config["max_position_embeddings"] = MAX_MODEL_LEN
    (target / "config.json").write_text(json.dumps(config))
    return int(config["vocab_size"])


def wait_answering(url: str, what: str, log: Path, process: "subprocess.Popen[bytes]") -> None:
    """Return when the server at `url` answers a chat.

    Raises:
        PeerTimeout: it does not; the message has the end of its `log`.
    """
    end_s = time.monotonic() + START_S_MAX
    payload = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    while time.monotonic() < end_s and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"{url}/v1/chat/completions", json=payload, timeout=5).status_code == 200:
                return
        time.sleep(QUIET_S)
    tails = [
        one.read_text(errors="replace")[-2000:] for one in (log.parent / "stack.log", log) if one.exists()
    ]
    raise PeerTimeout(f"{what} does not answer: {' '.join(tails)}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End what `start` began, with all of its group."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def start(argv: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a process group whose output goes to `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


@contextlib.contextmanager
def serving(*, tiny: bool, fronts: int, step_s: float, venvs: dict[str, str | None]) -> Iterator[Ways]:
    """Start everything; of `venvs`, the routers that are named; a decision core if there are `fronts`.

    Raises:
        PeerTimeout: something does not answer; the message has the end of its log.
    """
    with contextlib.ExitStack() as ended:
        folder = Path(ended.enter_context(tempfile.TemporaryDirectory(prefix="bench-gateway-")))
        model = folder / "model"
        model.mkdir()
        plan = Plan(
            folder=str(folder), model=str(model), vocabulary=model_folder(model, tiny=tiny),
            max_model_len=MAX_MODEL_LEN, step_s=step_s, plain_port=harness.free_port(),
            gateway_port=harness.free_port(), gateway_metadata=harness.free_port(),
            front_ports=[harness.free_port() for _ in range(fronts)], core_metadata=harness.free_port(),
        )  # fmt: skip
        (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
        argv = [sys.executable, "-m", "benchmarks.gateway_peers.stack", str(folder / "plan.json")]
        stack = start(argv, folder / "stack.log")
        ended.callback(stop, stack)
        wait_answering(f"http://127.0.0.1:{plan.gateway_port}", "our gateway", folder / "gateway.log", stack)
        for index, port in enumerate(plan.front_ports):
            wait_answering(f"http://127.0.0.1:{port}", "our front", folder / f"front-{index}.log", stack)
        wait_answering(f"http://127.0.0.1:{plan.plain_port}", "plain vLLM", folder / "plain.log", stack)
        pids = json.loads((folder / "pids.json").read_text())
        found = [
            Way("ours", plan.gateway_port, [pids["gateway"]]),
            Way("plain vLLM", plan.plain_port, [pids["plain"]]),
        ]
        for name, program in ROUTERS.items():
            venv = venvs.get(name)
            if venv is None:
                continue
            port, log = harness.free_port(), folder / f"{name}.log"
            argv = [
                str(Path(venv) / program[0]), *program[1:],
                *("--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware"),
                *("--worker-urls", f"http://127.0.0.1:{plan.plain_port}"),
                *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(harness.free_port())),
                *("--log-level", "error"),
            ]  # fmt: skip
            router = start(argv, log)
            ended.callback(stop, router)
            wait_answering(f"http://127.0.0.1:{port}", name, log, router)
            found.append(Way(f"{name} + plain", port, [router.pid, pids["plain"]]))
        own = [
            Way(f"front {index}", port, [pids[f"front-{index}"]])
            for index, port in enumerate(plan.front_ports)
        ]
        yield Ways(found, own, pids.get("core", 0))
