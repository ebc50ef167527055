"""The stand-in as a test sees it: started, spoken to by kubectl, ended with all that it started."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from mooncake.core.process import set_parent_death_signal
from tests.integration.cluster import log_tails, tagged
from tests.integration.ports import lasting_port
from tests.kube.standin.sandbox import unable

TAG = "MOONCAKE_TEST_KUBE"
READY_S, CALL_S, END_S, GONE_S = 120.0, 240.0, 60.0, 30.0
ROOT = Path(__file__).parents[2]

T = TypeVar("T")


def unable_here() -> str:
    """Return why no test of the stand-in can run here, "" if it can."""
    if shutil.which("kubectl") is None:
        return "no kubectl here"
    return unable()


NEEDS_PODS = pytest.mark.skipif(bool(unable_here()), reason=unable_here())


class Kube:
    """A stand-in; see `running`."""

    def __init__(self, *flags: str, publish: Sequence[str] = ()) -> None:
        """Start it. `publish`: "NAMESPACE/SERVICE:PORT", each gets a port of this machine (`ports`)."""
        self.folder = Path(tempfile.mkdtemp(prefix="mk-"))
        self.folder.chmod(0o755)
        self.tag = uuid.uuid4().hex
        self.port = lasting_port()
        self.ports = {where: lasting_port() for where in publish}
        command = [
            sys.executable, "-m", "tests.kube.standin", f"--port={self.port}", f"--folder={self.folder}",
            f"--env={TAG}={self.tag}", *flags,
            *(f"--publish={where}={port}" for where, port in self.ports.items()),
        ]  # fmt: skip
        with (self.folder / "standin.out").open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, TAG: self.tag},
                preexec_fn=functools.partial(set_parent_death_signal, os.getpid()),  # noqa: PLW1509
            )  # fmt: skip

    def wait_serves(self) -> None:
        """Return when it takes requests."""
        self.wait("the stand-in serves", lambda: "ready" in self.output().splitlines(), READY_S)

    def output(self) -> str:
        """Return what the stand-in itself said."""
        return (self.folder / "standin.out").read_text()

    def kubectl(self, *words: str, check: bool = True, timeout_s: float = CALL_S) -> str:
        """Return what kubectl prints, warnings and errors included."""
        done = self._kubectl(words, check, timeout_s)
        return done.stdout + done.stderr

    def _kubectl(
        self, words: Sequence[str], check: bool, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", f"--server=http://127.0.0.1:{self.port}", *words]
        env = {**os.environ, "KUBECONFIG": os.devnull}
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=timeout_s, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done

    def get(self, *words: str) -> dict[str, Any]:
        """Return `kubectl get` as an object; in a loop, `read` costs a fiftieth of it."""
        done = self._kubectl(["get", *words, "-o", "json"], check=True, timeout_s=CALL_S)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def read(self, path: str) -> dict[str, Any]:
        """Return what the API server has at a path."""
        url = f"http://127.0.0.1:{self.port}{path}"
        found: dict[str, Any] = httpx.get(url, timeout=CALL_S, trust_env=False).raise_for_status().json()
        return found

    def pods(self, namespace: str, **labels: str) -> list[dict[str, Any]]:
        """Return the pods that carry `labels` (dots and slashes of names written as _)."""
        found: list[dict[str, Any]] = self.read(f"/api/v1/namespaces/{namespace}/pods")["items"]
        return [
            pod for pod in found
            if all(pod["metadata"].get("labels", {}).get(key) == value for key, value in labels.items())
        ]  # fmt: skip

    def wait(self, what: str, condition: Callable[[], T], deadline_s: float, every_s: float = 0.1) -> T:
        """Return the first true result of `condition`; fail after `deadline_s`, with every log."""
        end_s = time.monotonic() + deadline_s
        while not (found := condition()):
            assert self.process.poll() is None, f"the stand-in ended: {self.output()}"
            assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}\n{self.logs()}"
            time.sleep(every_s)
        return found

    def tagged(self) -> list[int]:
        """Return every living process of the stand-in or of a pod."""
        return tagged(self.tag, TAG)

    def cpu_s(self) -> float:
        """Return what the stand-in and all pods, those that have ended too, have used of processors."""
        ticks = 0
        for pid in self.tagged():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, words[11:15]))  # its own, and of children that it has waited for
        return ticks / os.sysconf("SC_CLK_TCK")

    def logs(self) -> str:
        """Return the last lines that the stand-in and every container wrote."""
        return log_tails([self.folder / "standin.out", *sorted((self.folder / "logs").glob("*"))])

    def stop(self) -> None:
        """End it; fail if that takes force, but leave nothing in any case."""
        try:
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(END_S)
            assert code == 0, f"the stand-in ended with {code}: {self.output()}"
            assert not self.tagged(), self.tagged()
        finally:
            self.process.kill()
            self.process.wait(END_S)
            for pid in self.tagged():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running(*flags: str, publish: Sequence[str] = ()) -> Iterator[Kube]:
    """Give a stand-in that serves, and end it."""
    kube = Kube(*flags, publish=publish)
    try:
        kube.wait_serves()
        yield kube
    finally:
        kube.stop()


def pid_of(pod: dict[str, Any]) -> int:
    """Return the first process of a pod's first container, as this machine counts."""
    return int(pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2])
