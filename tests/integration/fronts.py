"""Two cores, two gateways on one port, one prefill and one decode instance, on a real etcd.

    python -m tests.integration.fronts MODEL PORT ETCD RUN_DIR

is `mooncake up --gateways 2` but for its metadata, which is etcd: so a second core can stand by, which the
test starts with the command of its own (`mooncake conductor --gateways 0`).
"""

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
from rich.console import Console

from mooncake.core.shared_port import Held
from mooncake.up.cluster import Cluster, prepare_run_dir
from mooncake.up.metrics import can_bind, with_admin_ports
from mooncake.up.plan import Process, UpOptions, base_env, make_plan
from mooncake.up.run import live
from mooncake.up.show import Board
from tests.integration.client import ANSWER_S, Client
from tests.integration.cluster import (
    BLOCK,
    READY_S,
    STOP_S,
    TAG,
    free_port,
    log_tails,
    tagged,
    wait_until,
)

LOG_LINES = 40
SETTINGS = "mooncake.yaml"
"""Below the run directory; what every process reloads from."""


def elsewhere(process: Process, metadata: str) -> Process:
    """Return the process with another metadata store."""
    key = "metadata_endpoint" if hasattr(process.options, "metadata_endpoint") else "metadata"
    return msgspec.structs.replace(process, options=process.options.replace(**{key: metadata}))


def main(model: str, port: str, etcd: str, run_dir: str) -> int:
    """Run the cluster until SIGTERM."""
    import asyncio

    options = UpOptions(
        model=model, served_name=Path(model).name, run_dir=run_dir, port=int(port), gateways=2,
        dtype="float32", block_size=BLOCK, kv_memory_bytes=256 << 20, pool_bytes=256 << 20,
        config=f"{run_dir}/{SETTINGS}",
    )  # fmt: skip
    with Held(options.host, options.port):
        options = with_admin_ports(options)
        plan = [elsewhere(one, etcd) for one in make_plan(options, sorted(os.sched_getaffinity(0)))]
        prepare_run_dir(Path(run_dir))
        board = Board(Console())
        cluster = Cluster(plan, Path(run_dir), base_env(os.environ, True), board, metadata=etcd)
        return asyncio.run(live(cluster, board, options.host, options.port, lambda: "all ready"))


class Fronts:
    """The cluster under test, looked at through its public doors."""

    def __init__(self, model: Path, etcd: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.tag = uuid.uuid4().hex
        self.run_dir = Path(tempfile.mkdtemp(prefix="mc-"))
        self.client = Client(self.url, model.name)
        self._env = {**os.environ, TAG: self.tag, "CXX": "/bin/false"}
        self._processes: list[subprocess.Popen[bytes]] = []
        self.write_settings("{}")
        self._start(
            "up", "-m", "tests.integration.fronts", str(model), str(self.port), etcd, str(self.run_dir)
        )
        self._etcd = etcd

    def _start_standby(self) -> None:
        """Start it last: the core that is started again when it dies leads first."""
        metrics = next(port for port in itertools.count(29_471) if can_bind(port))
        (self.run_dir / "b").mkdir(mode=0o700)
        self._start(
            "standby", "-m", "mooncake", "conductor", "--gateways=0", f"--metadata-endpoint={self._etcd}",
            f"--run-dir={self.run_dir / 'b'}", f"--admin-port={metrics}", f"--block-size={BLOCK}",
            f"--config={self.run_dir / SETTINGS}",
        )  # fmt: skip

    def _start(self, name: str, *words: str) -> None:
        with (self.run_dir / f"{name}.out").open("wb") as out:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._env,
                    start_new_session=True,
                )
            )  # fmt: skip

    def write_settings(self, values: str) -> None:
        """Let the file say `values` (a YAML mapping) of all processes, as a ConfigMap changes: at once."""
        fresh = self.run_dir / "mooncake.new"
        fresh.write_text(f"up: {values}\nconductor: {values}\n")
        fresh.replace(self.run_dir / SETTINGS)

    def wait_ready(self) -> None:
        """Return when everything serves and one core leads."""

        def ready() -> bool:
            ended = [one.args for one in self._processes if one.poll() is not None]
            assert not ended, f"ended: {ended}\n{self.logs()}"
            return "all ready" in (self.run_dir / "up.out").read_text()

        self.wait("all ready", ready, READY_S)
        self._start_standby()
        self.wait("two cores", lambda: len(self.view()["cores"]) == 2, 30.0)
        self.wait_led()

    def wait(self, what: str, condition: Any, deadline_s: float, every_s: float = 0.1) -> Any:
        """Return the first true result of `condition`; fail after `deadline_s`, with every log."""
        try:
            return wait_until(what, condition, deadline_s, every_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def stop(self) -> None:
        """End everything; fail if anything does not end cleanly, but leave nothing."""
        try:
            self.client.http.close()
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(STOP_S) for process in self._processes]
            assert codes == [0, 0], f"{codes}\n{self.logs()}"
            assert not tagged(self.tag), self.logs()
        finally:
            for pid in tagged(self.tag):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._processes:
                process.kill()
                process.wait(10.0)

    def logs(self) -> str:
        """Return the last lines of every log."""
        return log_tails(sorted([*self.run_dir.glob("*.out"), *self.run_dir.glob("*.log")]), LOG_LINES)

    # ------------------------------------------------------------ who is there

    def view(self) -> dict[str, Any]:
        """Return GET /mooncake/instances of any one gateway, over a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10.0)
        with contextlib.closing(connection):
            connection.request("GET", "/mooncake/instances")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer

    def views(self) -> dict[int, dict[str, Any]]:
        """Return what each gateway says, by its process."""
        found: dict[int, dict[str, Any]] = {}
        for _ in range(64):
            view = self.view()
            found[view["pid"]] = view
            if len(found) == len(view["gateways"]):
                break
        return found

    def gateways(self) -> dict[str, int]:
        """Return name -> process of the gateways."""
        return {one["name"]: one["pid"] for one in self.view()["gateways"]}

    def leader(self) -> dict[str, Any]:
        """Return the core that leads, as all gateways say; {} while they do not agree."""
        views = list(self.views().values())
        core = views[0]["core"]
        if len(views) < len(views[0]["gateways"]) or any(
            view["core"].get("term") != core.get("term") for view in views
        ):
            return {}
        name = core.get("leader", "").rpartition("-")[0]
        found: list[dict[str, Any]] = [one for one in views[0]["cores"] if one["name"] == name]
        return {**found[0], "term": core["term"]} if found and core["mode"] == "core" else {}

    def wait_led(self, after_term: int = 0) -> dict[str, Any]:
        """Return the core that leads in a later term than `after_term`, once all gateways follow it."""

        def led() -> dict[str, Any]:
            leader = self.leader()
            return leader if leader.get("term", 0) > after_term else {}

        found: dict[str, Any] = self.wait("a core leads", led, 30.0, 0.02)
        return found

    def wait_two_gateways(self, without: int) -> None:
        """Return when two gateways serve, and `without` is none of them."""

        def both() -> bool:
            pids = set(self.gateways().values())
            return without not in pids and len(pids) == 2 and set(self.views()) == pids

        self.wait(f"another gateway than {without}", both, READY_S)

    def metric(self, url: str, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry `labels`, on one page."""
        total = 0.0
        for line in httpx.get(url, timeout=10.0).raise_for_status().text.splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total

    def gateways_metric(self, name: str, **labels: str) -> float:
        """Return the sum over both gateways."""
        return sum(self.metric(one["metrics_url"], name, **labels) for one in self.view()["gateways"])

    def bound_client(self, pid: int) -> Client:
        """Return a client whose one connection leads to that gateway."""
        for _ in range(64):
            client = Client(self.url, self.client.model)
            client.http = httpx.Client(
                base_url=self.url, timeout=ANSWER_S, limits=httpx.Limits(max_connections=1)
            )
            if client.http.get("/mooncake/instances").json()["pid"] == pid:
                return client
            client.http.close()
        raise AssertionError(f"no connection leads to {pid}")


class Crowd:
    """Threads that ask one after another, `ask` by `ask`, until they leave; every failure is kept."""

    def __init__(self, fronts: Fronts, threads: int) -> None:
        self.failures: list[str] = []
        self.answered = 0
        self._fronts = fronts
        self._leave = threading.Event()
        self._lock = threading.Lock()
        self._turns = itertools.count(1)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def ask(self, turn: int) -> str:
        """Ask once, for the `turn`th time of all threads; return what was wrong, "" = nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join(ANSWER_S)

    def wait_answered(self, more: int) -> None:
        """Return when so many more have been answered."""
        goal = self.answered + more
        self._fronts.wait(
            f"{more} answers; failures {self.failures[:3]}",
            lambda: self.answered >= goal or self.failures,
            ANSWER_S,
        )

    def _run(self) -> None:
        while not self._leave.is_set():
            problem = self.ask(next(self._turns))
            with self._lock:
                self.answered += not problem
                if problem:
                    self.failures.append(problem)


class Load(Crowd):
    """Short completions, each over a new connection."""

    def __init__(self, fronts: Fronts, threads: int = 2) -> None:
        super().__init__(fronts, threads)

    def ask(self, turn: int) -> str:
        """See Crowd."""
        prompt = [(7 * turn + i) % 900 + 50 for i in range(40)]
        body = self._fronts.client.body(prompt, {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True})
        connection = http.client.HTTPConnection("127.0.0.1", self._fronts.port, timeout=ANSWER_S)
        try:
            with contextlib.closing(connection):
                connection.request(
                    "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        return "" if answer.status == 200 else f"{answer.status}: {text}"


@contextlib.contextmanager
def running(model: Path, etcd: str) -> Iterator[Fronts]:
    """Give the cluster, ready, and end it."""
    fronts = Fronts(model, etcd)
    try:
        fronts.wait_ready()
        yield fronts
    finally:
        fronts.stop()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
