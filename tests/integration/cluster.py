"""A real cluster under test: `mooncake up` as a user starts it, looked at through its public doors.

What the tests may know: the HTTP port, the records in the metadata store, the store's own protocol,
the counters that an engine shares with its relay, and the processes themselves. Every wait here has
a deadline, and nothing survives `stop`.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from mooncake.core.keys import prompt_keys, request_root
from mooncake.core.messages import (
    INSTANCES_PREFIX,
    STORES_PREFIX,
    Acquire,
    Acquired,
    InstanceRecord,
    Release,
    Stats,
    StoreRecord,
    StoreReply,
    StoreStats,
)
from mooncake.core.metadata_messages import MetaGet, MetaReply
from mooncake.core.process import alive
from mooncake.core.rpc import BlockingRpcClient
from mooncake.worker.pulse import Pulse
from tests.integration.client import Client
from tests.integration.collector import Collector

BLOCK = 32
READY_S = 240.0
"""Importing vLLM takes 30 s on two idle cores, four times that on busy ones."""
STOP_S = 45.0
"""The Conductor drains for at most 30 s, engines get 15 s."""
RESTART_S = 60.0
TAG = "MOONCAKE_TEST_CLUSTER"
LOG_TAIL_LINES = 25
LOG_LINE_CHARS = 300
"""Of a line: a CI page that shows the end of the output should still show the failed assertion."""
NOISE = re.compile('WARNING|Warning|Loading safetensors|Triton|HTTP/1.1" 200|^\\s*(if hasattr|kernel =|$)')
"""What vLLM and torch say at every start."""


@dataclass(frozen=True)
class Setup:
    """How a cluster is started. Tests with equal setups share one."""

    name: str
    dtype: str = "float32"
    load_mode: str = "async"
    flags: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    instances: int = 2
    """Prefill and decode, or two that do both, have one core each."""
    traced: bool = False


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: str, condition: Callable[[], Any], deadline_s: float, every_s: float = 0.05) -> Any:
    """Return the first true result of `condition`; fail after `deadline_s`."""
    end_s = time.monotonic() + deadline_s
    while True:
        if result := condition():
            return result
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(every_s)


def up_command(model: Path, port: int, run_dir: Path, setup: Setup) -> list[str]:
    """Return the command line of `mooncake up` for `setup`."""
    return [
        sys.executable, "-m", "mooncake", "up", f"--model={model}", f"--port={port}",
        f"--run-dir={run_dir}", f"--dtype={setup.dtype}", f"--load-mode={setup.load_mode}",
        f"--block-size={BLOCK}", "--kv-memory=256MiB", "--pool-size=512MiB", *setup.flags,
        *(["--", *setup.vllm] if setup.vllm else []),
    ]  # fmt: skip


def log_tails(paths: Iterable[Path], lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of logs, each under its file's name, without what says nothing."""
    parts = []
    for path in paths:
        said = [line for line in path.read_text(errors="replace").splitlines() if not NOISE.search(line)]
        parts.append("\n".join([f"--- {path.name}", *(line[:LOG_LINE_CHARS] for line in said[-lines:])]))
    return "\n".join(parts)


def tagged(tag: str, name: str = TAG) -> list[int]:
    """Return every living process that was started, at any depth, with `tag` in its environment as `name`."""
    mark = f"{name}={tag}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


class Cluster:
    """One running `mooncake up`."""

    def __init__(self, setup: Setup, model: Path) -> None:
        self.setup = setup
        self.port = free_port()
        self.tag = uuid.uuid4().hex
        # a unix socket's path is short: not below pytest's long folders
        self.run_dir = Path(tempfile.mkdtemp(prefix="mc-"))
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = self.run_dir / "up.out"
        self.settings = self.run_dir / "mooncake.yaml"
        self.settings.write_text("")
        env = {
            **os.environ, TAG: self.tag,
            "MOONCAKE_CONFIG": str(self.settings),
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
            "CXX": "/bin/false",  # nothing needs a compiler, grammars included
        }  # fmt: skip
        self.collector = Collector() if setup.traced else None
        if self.collector is not None:
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = self.collector.url
            env["OTEL_BSP_SCHEDULE_DELAY"] = "200"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                up_command(model, self.port, self.run_dir, setup),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True,
            )  # fmt: skip
        self.client = Client(self.url, model.name)

    # ------------------------------------------------------------ life

    def wait_ready(self) -> None:
        """Return after the ready line."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"up ended with {self.process.returncode}:\n{self.logs()}")
            return "Mooncake is ready" in self.output.read_text()

        try:
            wait_until("the ready line", ready, READY_S, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        self.wait_alive()

    def processes(self) -> list[int]:
        """Return all living processes of this cluster."""
        return tagged(self.tag)

    @property
    def running(self) -> bool:
        """Whether `up` runs."""
        return self.process.poll() is None

    def interrupt(self) -> int:
        """Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_S)

    def stop(self) -> None:
        """End the cluster; fail if it does not end cleanly, but leave nothing in any case."""
        try:
            self.client.close()
            if self.running:
                code = self.interrupt()
                assert code == 0, f"up ended with {code}:\n{self.logs()}"
            left = self.processes()
            assert not left, f"processes {left} survived:\n{self.logs()}"
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.running:
                self.process.kill()
            self.process.wait(10.0)
            if self.collector is not None:
                self.collector.close()

    def logs(self) -> str:
        """Return the last lines of every log."""
        return log_tails([self.output, *sorted(self.run_dir.glob("*.log"))])

    # ------------------------------------------------------------ records and processes

    def _metadata(self, prefix: str) -> list[bytes]:
        client = BlockingRpcClient(f"ipc://{self.run_dir}/metadata.sock", MetaReply)
        try:
            return [entry.value for entry in client.call(MetaGet(prefix), 5.0).entries]
        finally:
            client.close()

    def record(self, instance_id: str) -> InstanceRecord:
        """Return what an instance says of itself."""
        for value in self._metadata(INSTANCES_PREFIX):
            record = msgspec.json.decode(value, type=InstanceRecord)
            if record.instance_id == instance_id:
                return record
        raise AssertionError(f"{instance_id} is not registered")

    def store_record(self) -> StoreRecord:
        """Return what the store says of itself."""
        (value,) = self._metadata(STORES_PREFIX)
        return msgspec.json.decode(value, type=StoreRecord)

    def store_epoch(self) -> str:
        """Return which start of the store is registered, "" if none is."""
        for value in self._metadata(STORES_PREFIX):
            return msgspec.json.decode(value, type=StoreRecord).epoch
        return ""

    def worker_pid(self, instance_id: str) -> int:
        """Return the pid of an instance's relay, which leads the worker's process group."""
        return self.record(instance_id).pid

    def engine_pid(self, instance_id: str) -> int:
        """Return the pid of the engine process behind an instance's relay."""
        relay = self.worker_pid(instance_id)
        (child,) = map(int, Path(f"/proc/{relay}/task/{relay}/children").read_text().split())
        return child

    # ------------------------------------------------------------ what the gateway says

    def view(self) -> dict[str, Any]:
        """Return GET /mooncake/instances."""
        view: dict[str, Any] = (
            httpx.get(f"{self.url}/mooncake/instances", timeout=5.0).raise_for_status().json()
        )
        return view

    def states(self) -> dict[str, str]:
        """Return instance id -> alive | suspect | dead."""
        return {row["instance_id"]: row["state"] for row in self.view()["instances"]}

    def epochs(self) -> dict[str, str]:
        """Return instance id -> engine start."""
        return {row["instance_id"]: row["epoch"] for row in self.view()["instances"]}

    def wait_alive(self, deadline_s: float = RESTART_S) -> None:
        """Return when every instance and the store are there."""

        def complete() -> bool:
            states = self.states()
            return len(states) == self.setup.instances and set(states.values()) == {"alive"}

        wait_until(f"all instances alive, but {self.states()}", complete, deadline_s)
        wait_until("the store is registered", lambda: self._metadata(STORES_PREFIX), deadline_s)

    def wait_restarted(self, instance_id: str, before: str, deadline_s: float = RESTART_S) -> None:
        """Return when another start of `instance_id` than `before` is alive."""

        def back() -> bool:
            return self.epochs().get(instance_id, before) != before

        wait_until(f"{instance_id} starts again", back, deadline_s)
        self.wait_alive(deadline_s)

    def metrics(self) -> str:
        """Return the gateway's /metrics page."""
        return httpx.get(f"{self.url}/metrics", timeout=10.0).raise_for_status().text

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry `labels`."""
        total = 0.0
        for line in self.metrics().splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total

    # ------------------------------------------------------------ what engines and store say

    def counters(self, instance_id: str) -> dict[str, float]:
        """Return the counters of the running engine of an instance (its KV connector's)."""
        epoch = self.record(instance_id).epoch
        for folder in self.run_dir.glob(f"{instance_id}-*"):
            with contextlib.suppress(OSError):
                if msgspec.json.decode((folder / "spec.json").read_bytes())["epoch"] == epoch:
                    return Pulse(folder / "pulse", create=False).snapshot()
        raise AssertionError(f"no counters of {instance_id} epoch {epoch}")

    @contextlib.contextmanager
    def store(self) -> Iterator[BlockingRpcClient]:
        """Yield a client of the store."""
        client = BlockingRpcClient(self.store_record().endpoint, StoreReply)
        try:
            yield client
        finally:
            client.close()

    def store_stats(self) -> StoreStats:
        """Return the store's counters."""
        with self.store() as client:
            stats: StoreStats = client.call(Stats(), 5.0)
            return stats

    def keys(self, prompt: list[int], salt: str | None = None) -> tuple[list[bytes], bytes | None]:
        """Return the names of a prompt's full blocks and of its tail."""
        root = bytes.fromhex(self.record(next(iter(self.states()))).context_root)
        return prompt_keys(request_root(root, salt, None), prompt, BLOCK)

    def blocks(self, keys: list[bytes]) -> Acquired:
        """Return where the longest stored prefix of `keys` lies (its lease is given back)."""
        with self.store() as client:
            found: Acquired = client.call(Acquire(keys, 5.0), 5.0)
            if found.lease_id:
                client.call(Release(found.lease_id), 5.0)
            return found

    def forget_locally(self) -> None:
        """Clear every engine's own prefix cache, so that only the pool knows old prompts."""
        httpx.post(f"{self.url}/reset_prefix_cache", timeout=30.0).raise_for_status()

    def is_idle(self) -> bool:
        """Whether nothing is in flight, charged, or leased."""
        view = self.view()
        loads = [row["load"] for row in view["instances"]]
        stats = self.store_stats()
        return view["in_flight"] == 0 and not any(map(any, map(dict.values, loads))) and stats.leases == 0

    def assert_nothing_leaked(self, deadline_s: float = 2.0) -> None:
        """Fail unless the cluster is idle within `deadline_s`."""

        def told() -> str:
            return f"idle; but {self.view()} and {self.store_stats()}"

        try:
            wait_until("idle", self.is_idle, deadline_s)
        except AssertionError:
            raise AssertionError(told()) from None


class Clusters:
    """At most one cluster runs at any time: two cores are shared by everything."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.current: Cluster | None = None

    def get(self, setup: Setup) -> Cluster:
        """Return a running, complete cluster of `setup`."""
        current = self.current
        if current is not None and current.setup == setup and current.running:
            current.wait_alive()
            return current
        self.close()
        self.current = Cluster(setup, self._model)
        self.current.wait_ready()
        return self.current

    def close(self) -> None:
        """Stop what runs."""
        current, self.current = self.current, None
        if current is not None:
            current.stop()
