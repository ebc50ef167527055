"""An engine of two nodes behind a Conductor; its commands are those of the manifests.

Both on loopback, or `apart`: the follower in a network namespace behind a cable, as on another host.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil

from mooncake.core.config import LOOPBACK
from mooncake.core.process import alive
from tests.integration.client import Client
from tests.integration.cluster import BLOCK, READY_S, STOP_S, TAG, log_tails, tagged, wait_until
from tests.integration.hosts import FETCH, HERE, SECRET, THERE
from tests.integration.ports import lasting_port

NAME = "engine-0"
KV_MEMORY = 256 << 20


class TwoNodes:
    """Each process ends, or is ended, by itself; `start_engine` makes both nodes anew."""

    def __init__(self, model: Path, space: str) -> None:
        """`space`: name of the other namespace, "" = this machine has none."""
        self.model = model
        self.space = space
        self.apart = False
        self.tag = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="mc-"))
        self.port, self.metadata, self.meeting = (lasting_port() for _ in range(3))
        self.admin = {"leader": lasting_port(), "follower": lasting_port()}
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.url, model.name)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (self.folder / "secret").write_text(SECRET)
        (self.folder / "secret").chmod(0o600)
        self._run(
            "conductor", "conductor", f"--model={model}", f"--port={self.port}", "--dtype=float32",
            f"--metadata-endpoint=tcp://127.0.0.1:{self.metadata}", f"--block-size={BLOCK}", "--aggregated",
        )  # fmt: skip

    def commands(self) -> dict[str, list[str]]:
        """Return the words of both nodes after `mooncake`, but for their folders."""
        leader, follower = (HERE, THERE) if self.apart else (LOOPBACK, LOOPBACK)
        return {
            "leader": [
                "prefill", f"--metadata=tcp://127.0.0.1:{self.metadata}", f"--name={NAME}", "--node=a",
                f"--address={leader}", "--admin-host=127.0.0.1", "--both", "--no-pool", "--nodes=2",
                "--accept-unauthenticated-nodes", f"--nodes-port={self.meeting}",
                f"--admin-port={self.admin['leader']}", f"--kv-memory={KV_MEMORY}", "--max-num-seqs=16",
                "--max-num-batched-tokens=512",
                f"--model={self.model}", "--dtype=float32", f"--block-size={BLOCK}", "--drain-s=60",
                "--", "--tensor-parallel-size=2",
            ],
            "follower": [
                "follower", f"--leader={leader}:{self.meeting}", "--node-rank=1", f"--address={follower}",
                "--admin-host=127.0.0.1", f"--admin-port={self.admin['follower']}", "--drain-s=60",
                "--accept-unauthenticated-nodes",
            ],
        }  # fmt: skip

    def start_engine(self, apart: bool) -> None:
        """Start both nodes, those that there are ended first."""
        for name in ("leader", "follower"):
            if name in self.processes:
                self.processes[name].kill()
                self.code(name)
        self.apart = apart
        for name, words in self.commands().items():
            place = [f"--run-dir={self.folder / name}"]
            at = words.index("--") if "--" in words else len(words)
            self._run(name, *words[:at], *place, *words[at:])

    def _run(self, name: str, *words: str) -> None:
        (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        if name == "conductor":
            words = (*words, f"--run-dir={self.folder / name}")
        env = {
            **os.environ, TAG: self.tag, "VLLM_SERVER_DEV_MODE": "1", "CXX": "/bin/false",
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
            "MOONCAKE_SECRET_FILE": str(self.folder / "secret"),
        }  # fmt: skip
        command = [sys.executable, "-m", "mooncake", *words]
        if name == "follower" and self.apart:
            command = ["ip", "netns", "exec", self.space, *command]
        with (self.folder / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )

    def wait_serves(self) -> None:
        """Return when both nodes are ready and the gateway has the instance."""

        def ready() -> bool:
            ended = {name: one.returncode for name, one in self.processes.items() if one.poll() is not None}
            assert not ended, f"ended: {ended}\n{self.logs()}"
            return all(
                self.page(name, "/readyz") == (200, "ready") for name in self.admin
            ) and self.states() == ["alive"]

        self.wait("both nodes serve", ready, READY_S)

    def wait(self, what: str, condition: Any, deadline_s: float) -> None:
        """Return when `condition` holds; fail after `deadline_s`, with every log."""
        try:
            wait_until(what, condition, deadline_s, 0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def states(self) -> list[str]:
        """Return how the gateway finds its instances."""
        try:
            answer = httpx.get(f"{self.url}/mooncake/instances", timeout=5.0).raise_for_status().json()
        except httpx.TransportError:
            return []
        return [row["state"] for row in answer["instances"]]

    def page(self, name: str, path: str) -> tuple[int, str]:
        """Return status and text of a node's admin port; 0 while nobody answers (there: or not with 200)."""
        url = f"http://127.0.0.1:{self.admin[name]}{path}"
        if name == "follower" and self.apart:
            command = ["ip", "netns", "exec", self.space, sys.executable, "-c", FETCH, url]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30.0)
            return (0, "") if done.returncode else (200, done.stdout.strip())
        try:
            answer = httpx.get(url, timeout=5.0)
        except httpx.TransportError:
            return 0, ""
        return answer.status_code, answer.text.strip()

    def code(self, name: str, deadline_s: float = STOP_S) -> int:
        """Return the exit code of a node that has been told to end, or should by itself."""
        try:
            return self.processes.pop(name).wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} has not ended after {deadline_s:g} s\n{self.logs()}") from None

    def family(self) -> set[int]:
        """Return both nodes and all that they have started: ranks write over what `tagged` looks for."""
        found = set()
        for name in ("leader", "follower"):
            process = psutil.Process(self.processes[name].pid)
            found |= {process.pid, *(child.pid for child in process.children(recursive=True))}
        return found

    def log(self, name: str) -> str:
        """Return what a node has logged."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """Return the last lines of every log."""
        return log_tails(sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        """Leave nothing."""
        self.client.close()
        for pid in tagged(self.tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait(10.0)
        wait_until("all are gone", lambda: not any(map(alive, tagged(self.tag))), 10.0)
        shutil.rmtree(self.folder, ignore_errors=True)
