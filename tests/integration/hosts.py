"""Two hosts on one machine: this one, and a network namespace behind a cable (veth)."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from mooncake.core.metadata_messages import MetaGet, MetaReply
from mooncake.core.process import alive
from mooncake.core.rpc import BlockingRpcClient
from mooncake.core.secret import SECRET_ENV
from tests.integration.client import Client
from tests.integration.cluster import BLOCK, READY_S, STOP_S, TAG, free_port, log_tails, tagged, wait_until

NETWORK = "10.213.77"
HERE, THERE = f"{NETWORK}.1", f"{NETWORK}.2"
ADDRESSES = {"a": HERE, "b": THERE}
METRICS_PORT = 29_451
"""On each host's own loopback."""
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"
SECRET = "a secret that both hosts know"


def no_second_host() -> str:
    """Return why this machine cannot have a second network, "" if it can."""
    if os.geteuid() != 0:
        return "needs root to make a network namespace"
    if shutil.which("ip") is None:
        return "needs the ip command (iproute2)"
    probe = subprocess.run(["ip", "netns", "add", "mcprobe"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "mcprobe"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else f"no network namespaces here: {probe.stderr.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10.0)


@contextlib.contextmanager
def second_host() -> Iterator[str]:
    """Yield the name of a namespace that reaches HERE from THERE by a cable, and nothing else."""
    mark = uuid.uuid4().hex[:6]
    space, near, far = f"mc{mark}", f"mcn{mark}", f"mcf{mark}"
    _ip("netns", "add", space)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        _ip("addr", "add", f"{HERE}/24", "dev", near)
        _ip("link", "set", near, "up")
        for device, address in ((far, f"{THERE}/24"), ("lo", None)):
            if address:
                _ip("-n", space, "addr", "add", address, "dev", device)
            _ip("-n", space, "link", "set", device, "up")
        yield space
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", near)
        _ip("netns", "del", space)


class TwoHosts:
    """A cluster over both: Conductor, store and prefill here, store and decode there."""

    def __init__(self, space: str, model: Path) -> None:
        self.space = space
        self.model = model
        self.tag = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="mc-"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.metadata = f"tcp://{HERE}:{free_port()}"
        self.client = Client(self.url, model.name)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (self.folder / "secret").write_text(SECRET)
        (self.folder / "secret").chmod(0o600)

    def run(self, name: str, *words: str, there: bool = False) -> None:
        """Start `mooncake WORDS` on one of the hosts."""
        (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "mooncake", *words, f"--run-dir={self.folder / name}"]
        if there:
            command = ["ip", "netns", "exec", self.space, *command]
        env = {
            **{name: value for name, value in os.environ.items() if name != SECRET_ENV},
            TAG: self.tag, "MOONCAKE_SECRET_FILE": str(self.folder / "secret"),
            "VLLM_SERVER_DEV_MODE": "1", "CXX": "/bin/false", "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive", "VLLM_HOST_IP": THERE if there else HERE,
        }  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as out:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )

    def start(self, cores: Sequence[int]) -> None:
        """Start everything and wait until it serves."""
        self.run(
            "conductor", "conductor", f"--model={self.model}", f"--port={self.port}", "--dtype=float32",
            f"--metadata-endpoint={self.metadata}", f"--address={HERE}", f"--block-size={BLOCK}",
        )  # fmt: skip
        self.run_store("a")
        self.run_store("b")
        # engines wait a minute for their store, and that one for the Conductor, which imports vLLM first
        self.wait("both stores are known", lambda: len(self.view().get("stores", [])) == 2, READY_S, 0.5)
        self.run_engine("prefill", "a", cores[0])
        self.run_engine("decode", "b", cores[-1])

        def complete() -> bool:
            ended = {name: p.returncode for name, p in self.processes.items() if p.poll() is not None}
            assert not ended, f"ended: {ended}\n{self.logs()}"
            return [row["state"] for row in self.view().get("instances", [])] == ["alive", "alive"]

        self.wait("both engines serve", complete, READY_S, 0.5)

    def view(self) -> dict[str, Any]:
        """Return GET /mooncake/instances, {} while nobody answers."""
        try:
            return httpx.get(f"{self.url}/mooncake/instances", timeout=5.0).raise_for_status().json()
        except httpx.TransportError:
            return {}

    def wait(self, what: str, condition: Callable[[], Any], deadline_s: float, every_s: float = 0.2) -> None:
        """Return when `condition` holds; fail after `deadline_s`, with every log."""
        try:
            wait_until(what, condition, deadline_s, every_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def run_store(self, node: str) -> None:
        """Start the store of `node`, "a" here or "b" there."""
        self.run(
            f"store-{node}", "store", f"--metadata={self.metadata}", f"--node={node}", "--capacity=256MiB",
            f"--address={ADDRESSES[node]}", f"--admin-port={METRICS_PORT}", there=node == "b",
        )  # fmt: skip

    def run_engine(self, role: str, node: str, core: int) -> None:
        """Start an engine on `node`."""
        self.run(
            f"{role}-{node}", role, f"--metadata={self.metadata}", f"--model={self.model}", "--dtype=float32",
            f"--block-size={BLOCK}", "--kv-memory=256MiB", f"--name={role}-{node}", f"--node={node}",
            f"--address={ADDRESSES[node]}", f"--cores={core}", there=node == "b",
        )  # fmt: skip

    def store_metric(self, node: str, name: str) -> float:
        """Return a metric of a store, as its own host sees it."""
        command = [sys.executable, "-c", FETCH, f"http://127.0.0.1:{METRICS_PORT}/metrics"]
        if node == "b":
            command = ["ip", "netns", "exec", self.space, *command]
        page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30.0).stdout
        match = re.search(rf"^{name}{{[^}}]*}} (\S+)$", page, re.MULTILINE)
        assert match, f"no {name} in\n{page}"
        return float(match[1])

    def records(self, prefix: str) -> list[str]:
        """Return the names under a prefix of the metadata store."""
        client = BlockingRpcClient(self.metadata, MetaReply)
        try:
            return [entry.key.removeprefix(prefix) for entry in client.call(MetaGet(prefix), 10.0).entries]
        finally:
            client.close()

    def forget_locally(self) -> None:
        """Clear every engine's own prefix cache."""
        httpx.post(f"{self.url}/reset_prefix_cache", timeout=30.0).raise_for_status()

    def logs(self) -> str:
        """Return the last lines of every log."""
        return log_tails(sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        """End everything; fail if a process does not end by itself, but leave none."""
        self.client.close()
        try:
            for names in (["conductor"], ["prefill-a", "decode-b"], ["store-a", "store-b"]):
                for name in names:
                    if name in self.processes:
                        self.processes[name].terminate()
                end_s = time.monotonic() + STOP_S
                for name in names:
                    if name in self.processes:
                        self.processes[name].wait(max(0.1, end_s - time.monotonic()))
        finally:
            for pid in tagged(self.tag):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            for process in self.processes.values():
                process.wait(10.0)
            wait_until("all are gone", lambda: not any(map(alive, tagged(self.tag))), 10.0)
            shutil.rmtree(self.folder, ignore_errors=True)
