"""deploy/overlays/dev-cpu with a tiny model in the stand-in, and traffic that is compared by tokens."""

import base64
import contextlib
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

import httpx

from tests.integration.client import GREEDY, Answer, Client
from tests.kube.cluster import ROOT, Kube, running
from tests.kube.standin.disruption import is_ready
from tests.tiny_model import make_tiny_llama

MODEL_CACHE = Path.home() / ".cache/vllm/modelinfos"
"""What vLLM has learned of model classes: 12 s of CPU for each pod that has to learn it again."""
OVERLAY = Path(__file__).parent / "tiny"
SPACE = "mooncake"
DOOR = f"{SPACE}/gateway:8000"
MODEL = "tiny"
COMPONENT = "app.kubernetes.io/component"
READY_S = 600.0
"""Three imports of vLLM at once: half a minute on two idle cores, some minutes on busy ones."""
ANSWER_S = 300.0
PROBE_FACTOR = 0.25
POLL_S = 0.2
THREADS = 2
JOBS, SHORT_TOKENS, LONG_TOKENS = 12, 24, 120
PAUSE_S, STARTING_PAUSE_S = 0.3, 1.0
"""Between two requests of a thread. Longer while pods only start: the machine is theirs."""
PLURALS = {"deploy": "deployments", "ds": "daemonsets"}
COMPILED = "vllm.v1.worker.cpu_worker"
"""A module that only engines import: is its bytecode there, all else's is."""
COMPILE_S = 300.0


def jobs() -> list[dict[str, Any]]:
    """Return the requests: prompts of one to eight blocks; every third has a long answer."""
    found = []
    for number in range(JOBS):
        chance = random.Random(number)
        prompt = chance.choices(range(3, 1000), k=40 + 20 * number)
        tokens = LONG_TOKENS if number % 3 == 0 else SHORT_TOKENS
        params: dict[str, Any] = {**GREEDY, "max_tokens": tokens}
        found.append({"prompt": prompt, "params": params})
    return found


@dataclass
class Tally:
    """What became of requests."""

    answered: int = 0
    dropped: list[str] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)

    @property
    def p50_s(self) -> float:
        """The median time to first token, of requests that were answered (one at least)."""
        return statistics.median(self.ttfts_s)

    @property
    def p99_s(self) -> float:
        """Its 99th percentile."""
        return sorted(self.ttfts_s)[int(0.99 * (len(self.ttfts_s) - 1))]


class Serving:
    """The cluster under proof."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.answers: list[Answer] = []
        """Of an undisturbed cluster, in the order of `jobs`."""
        self._key = ""
        self.first_token_s = 0.0
        """From `kubectl apply` to the first token through the Service."""

    # ------------------------------------------------------------ kubectl

    def kubectl(self, *words: str, timeout_s: float = 240.0) -> str:
        """Run kubectl in our namespace."""
        return self.kube.kubectl("-n", SPACE, *words, timeout_s=timeout_s)

    def apply(self) -> None:
        """Apply the overlay and wait for the first token of a client that has the key of the Secret."""
        begun_s = time.monotonic()
        self.kube.kubectl("apply", "-k", str(OVERLAY))
        self._key = self.key()
        with self.client() as client:
            self.kube.wait("the gateway answers", lambda: _answers(client), READY_S, POLL_S)
        self.first_token_s = time.monotonic() - begun_s

    def key(self) -> str:
        """Return the API key as an operator finds it."""
        secret = self.kube.get("secret", "mooncake-api", "-n", SPACE)
        return base64.b64decode(secret["data"]["key"]).decode()

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """Yield a client; each request has a connection of its own and meets the pods of that moment."""
        client = Client(f"http://127.0.0.1:{self.kube.ports[DOOR]}", MODEL)
        client.http.close()
        client.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.kube.ports[DOOR]}", timeout=ANSWER_S, trust_env=False,
            headers={"Authorization": f"Bearer {self._key}"},
            limits=httpx.Limits(max_keepalive_connections=0),
        )  # fmt: skip
        try:
            yield client
        finally:
            client.close()

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Return the pods of a workload, ending ones included."""
        return self.kube.pods(SPACE, **{COMPONENT: component})

    def rolled(self, *workloads: str) -> None:
        """Return when the roll-outs are done and the old pods gone."""
        for workload in workloads:
            self.kubectl("rollout", "status", workload, f"--timeout={READY_S:g}s", timeout_s=READY_S + 10.0)
        for workload in workloads:
            kind, _, name = workload.partition("/")
            spec = self.kube.read(f"/apis/apps/v1/namespaces/{SPACE}/{PLURALS[kind]}/{name}")["spec"]
            self._wait_pods(name, spec.get("replicas", len(self.nodes())))

    def _wait_pods(self, component: str, count: int) -> None:
        self.kube.wait(f"{count} pods of {component}", lambda: len(self.pods(component)) == count, READY_S)

    def restart(self, *workloads: str) -> None:
        """Restart workloads, one pod after another, all at once; fail unless every pod is a new one."""
        names = [workload.partition("/")[2] for workload in workloads]
        before = {pod["metadata"]["uid"] for name in names for pod in self.pods(name)}
        self.kubectl("rollout", "restart", *workloads)
        self.rolled(*workloads)
        after = {pod["metadata"]["uid"] for name in names for pod in self.pods(name)}
        assert before.isdisjoint(after)

    def nodes(self) -> list[str]:
        """Return the names of all nodes."""
        return [node["metadata"]["name"] for node in self.kube.read("/api/v1/nodes")["items"]]

    # ------------------------------------------------------------ traffic

    def learn(self) -> None:
        """Ask everything once, undisturbed: what all later answers are compared with."""
        with self.client() as client, ThreadPoolExecutor(THREADS) as pool:
            asked = pool.map(lambda job: client.complete(job["prompt"], **job["params"]), jobs())
            self.answers = list(asked)

    @contextlib.contextmanager
    def traffic(self, threads: int = THREADS) -> Iterator[Tally]:
        """Stream requests one after another from some threads while the body runs."""
        tally, leave, lock = Tally(), threading.Event(), threading.Lock()
        numbers = itertools.count()
        with self.client() as client:
            run = threading.Thread
            workers = [
                run(target=self._ask_on, args=(client, numbers, leave, tally, lock), daemon=True)
                for _ in range(threads)
            ]
            for worker in workers:
                worker.start()
            try:
                yield tally
            finally:
                leave.set()
                for worker in workers:
                    worker.join(ANSWER_S)

    def _ask_on(
        self,
        client: Client,
        numbers: Iterator[int],
        leave: threading.Event,
        tally: Tally,
        lock: threading.Lock,
    ) -> None:
        work: Sequence[dict[str, Any]] = jobs()
        while not leave.is_set():
            with lock:
                number = next(numbers) % len(work)
            job, begun_s = work[number], time.monotonic()
            try:
                answer = client.stream(job["prompt"], **job["params"]).result(ANSWER_S)
                assert answer.outcome == self.answers[number].outcome, f"other tokens: {answer}"
            except AssertionError as error:
                with lock:
                    tally.dropped.append(f"{time.strftime('%T')} job {number}: {str(error)[:500]}")
            else:
                with lock:
                    tally.answered += 1
                    tally.ttfts_s.append(answer.arrivals_s[0] - begun_s)
            leave.wait(self._pause_s())

    def _pause_s(self) -> float:
        pods = self.kube.pods(SPACE)
        calm = not any("deletionTimestamp" in pod["metadata"] for pod in pods)
        return STARTING_PAUSE_S if calm and not all(map(is_ready, pods)) else PAUSE_S

    def wait_answered(self, tally: Tally, more: int) -> None:
        """Return when so many more requests have been answered, or one was dropped."""
        goal = tally.answered + more
        self.kube.wait(f"{more} answers", lambda: tally.answered >= goal or bool(tally.dropped), ANSWER_S)


def _answers(client: Client) -> bool:
    """Return whether the first token comes."""
    with contextlib.suppress(httpx.HTTPError):
        body = client.body("hello", {"max_tokens": 1})
        return client.http.post("/v1/completions", json=body).status_code == 200
    return False


def compiled() -> None:
    """See that packages have their bytecode, as in an image: pods cannot write it."""
    folder = Path(str(find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    source = folder.joinpath(*COMPILED.split(".")[1:]).with_suffix(".py")
    if not Path(cache_from_source(str(source))).exists():
        words = [sys.executable, "-c", "from mooncake.worker.preload import preload; preload()"]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run(words, env=env, cwd=ROOT, check=True, timeout=COMPILE_S)


def fill(models: Path) -> None:
    """Make the volume of models, as it is after a first start."""
    make_tiny_llama(models / MODEL)
    (models / "vllm").mkdir()
    if MODEL_CACHE.is_dir():
        shutil.copytree(MODEL_CACHE, models / "vllm" / MODEL_CACHE.name)
    for path in (models, *models.rglob("*")):  # pods are not root
        path.chmod(0o777 if path.is_dir() else 0o666)


@contextlib.contextmanager
def serving(models: Path) -> Iterator[Serving]:
    """Give the cluster, applied; `models` is what `fill` has filled."""
    flags = (f"--probe-factor={PROBE_FACTOR}", "--node-count=2", f"--claim=mooncake-models={models}")
    compiled()
    with running(*flags, publish=[DOOR]) as kube:
        one = Serving(kube)
        one.apply()
        yield one
