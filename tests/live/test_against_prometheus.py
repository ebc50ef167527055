"""The live page's evaluator gives what a real Prometheus gives for the same samples.

Over random counters that begin again and series that come and go, and for every query of every board.
Times of the answers lie between scrapes: at the edge of a window Prometheus 2 and 3 differ among themselves.
"""

import json
import math
import random
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from mooncake.live.boards import expressions, filled, load_boards, names_read
from mooncake.live.promql import evaluate, names_of
from mooncake.live.ring import Ring
from mooncake.live.samples import NAME, Samples
from tests.live import fake_cluster
from tests.live.remote_write import write

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus: run scripts/prometheus-parts"
)

READY_S = 60.0
ROUNDS, STEP_S = 120, 5.0
BEGIN_S = float(int(time.time()) - 3600)
RANDOM_SEED = 7
LIMITS = ("0.1", "1", "10", "+Inf")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text("{}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}", "--web.enable-remote-write-receiver",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    found = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + READY_S
        while True:
            try:
                with urllib.request.urlopen(f"{found}/-/ready", timeout=5):
                    break
            except OSError:
                text = (folder / "log").read_text()[-2000:]
                assert process.poll() is None, text
                assert time.monotonic() < deadline_s, text
                time.sleep(0.1)
        yield found
    finally:
        process.kill()
        process.wait(30)


Row = tuple[str, dict[str, str], list[float]]


def random_rows(dice: random.Random) -> Iterator[Row]:
    """Counters, gauges and histograms with resets, holes, late beginnings and early ends."""
    for i in range(12):
        labels = {"role": f"role-{i % 2}", "node": f"n{i % 3}", "i": str(i)}
        value, counter = float(dice.choice([0, 0, 1, 1e6])), []
        for _ in range(ROUNDS):
            value = 0.0 if dice.random() < 0.03 else value + dice.choice([0, 0, 1, 5, 0.25])
            counter.append(value)
        gauge = [dice.choice([0.0, -3.5, 2.0, 1e9, 7.25]) for _ in range(ROUNDS)]
        for name, values in (("live_c_total", counter), ("live_g", gauge)):
            for _ in range(dice.randrange(4)):
                at = dice.randrange(ROUNDS)
                for hole in range(at, min(ROUNDS, at + dice.randrange(1, 20))):
                    values[hole] = math.nan
            yield name, labels, values
        for limit, counts in random_histogram(dice).items():
            yield "live_h_bucket", {**labels, "le": limit}, counts


def random_histogram(dice: random.Random) -> dict[str, list[float]]:
    counts = dict.fromkeys(LIMITS, 0.0)
    found: dict[str, list[float]] = {limit: [] for limit in LIMITS}
    for _ in range(ROUNDS):
        hit = dice.randrange(6)  # sometimes none
        for n, limit in enumerate(LIMITS):
            counts[limit] += n >= hit
            found[limit].append(counts[limit])
        if dice.random() < 0.02:
            counts = dict.fromkeys(LIMITS, 0.0)
    return found


@pytest.fixture(scope="module")
def random_samples(url: str) -> Samples:
    rows = list(random_rows(random.Random(RANDOM_SEED)))
    labels = [tuple(sorted({NAME: name, **more}.items())) for name, more, _ in rows]
    values = np.array([values for _, _, values in rows], dtype=float)
    found = Samples(BEGIN_S + STEP_S * np.arange(ROUNDS), labels, values)
    write(url, found)
    return found


@pytest.fixture(scope="module")
def cluster(url: str) -> Ring:
    ring = Ring(names_read(load_boards().values()))
    fake_cluster.fill(ring, BEGIN_S + STEP_S * (fake_cluster.ROUNDS - 1))
    write(url, ring.samples(sorted(ring.names)))
    return ring


def asked(url: str, expression: str, times_s: np.ndarray) -> dict[frozenset, dict[int, float]]:
    """What Prometheus answers: labels -> index of the time -> value."""
    step_s = times_s[1] - times_s[0]
    query = urllib.parse.urlencode(
        {"query": expression, "start": f"{times_s[0]:.3f}", "end": f"{times_s[-1]:.3f}", "step": f"{step_s}"}
    )
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=60) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from error
    return {
        frozenset(one["metric"].items()): {
            round((when - times_s[0]) / step_s): float(value) for when, value in one["values"]
        }
        for one in answer["data"]["result"]
    }


def check(url: str, expression: str, samples: Samples, times_s: np.ndarray) -> int:
    """Compare; return how many values there were."""
    theirs = asked(url, expression, times_s)
    ours = {
        frozenset(series.labels): {int(i): float(series.values[i]) for i in np.flatnonzero(series.there)}
        for series in evaluate(expression, samples, times_s)
    }
    assert set(ours) == set(theirs), expression
    for labels, values in theirs.items():
        assert set(ours[labels]) == set(values), (expression, dict(labels))
        for at, value in values.items():
            close = pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True)
            assert ours[labels][at] == close, (expression, dict(labels), at)
    return sum(map(len, theirs.values()))


EXPRESSIONS = [
    "live_c_total",
    "live_g offset 20s",
    'live_g{role="role-1", i!="3", node=~"n[01]", nothing=""}',
    'live_g{role!~"role-1|x.*"}',
    *(
        f"{name}(live_c_total[{range_s}s])"
        for name in ("rate", "increase", "irate")
        for range_s in (7, 20, 60, 900)
    ),
    "rate(live_c_total[30s] offset 10s)",
    *(f"{how} by (role) (live_g)" for how in ("sum", "avg", "min", "max", "count")),
    "sum without (i, node) (rate(live_c_total[20s]))",
    "avg(live_g)",
    *(
        f"histogram_quantile({q}, sum by (le, role) (rate(live_h_bucket[20s])))"
        for q in (0, 0.5, 0.95, 0.99, 1, 1.5, -1)
    ),
    "histogram_quantile(0.9, rate(live_h_bucket[60s]))",
    "histogram_quantile(0.5, live_h_bucket)",
    "live_g * 2 - 3 / live_g % 7 ^ 2",
    "-live_g",
    "sum by (role) (live_g) / sum by (role) (rate(live_c_total[20s]))",
    "sum by (i) (live_g) / (sum by (i) (rate(live_c_total[20s])) > 0)",
    "sum by (role, i) (live_g) - on (i) sum by (i) (live_c_total)",
    "live_g - ignoring (role, node) sum by (i) (live_c_total)",
    "live_g > 2",
    "2 <= live_g",
    "live_g == bool 2",
    "live_g > on (i, role, node) live_c_total",
    "live_g != bool live_c_total",
    "live_g and on (i) (live_c_total > 10)",
    "live_g unless live_c_total",
    "live_g or live_c_total",
    'live_c_total{role="role-0"} or on (node) live_g',
    "sum(live_nothing) or vector(0)",
    "clamp_min(live_g, 1)",
    "clamp_max(live_g, 1)",
    "clamp(live_g, -1, 3)",
    "abs(live_g)",
    "time() - live_g",
    "1 + 2 > bool 2",
    "sum(live_c_total) * 0 / 0",
    "-1 * sum(live_c_total) / 0",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_gives_what_prometheus_gives(url, random_samples, expression):
    times_s = BEGIN_S + 1.25 + 7.5 * np.arange(int(ROUNDS * STEP_S / 7.5) + 50)  # and beyond the end
    assert check(url, expression, random_samples, times_s) > 0


@pytest.mark.parametrize("uid", list(load_boards()))
def test_every_query_of_a_board_gives_what_prometheus_gives(url, cluster, uid):
    times_s = BEGIN_S + 1.25 + 15.0 * np.arange(60)
    for title, text in expressions(load_boards()[uid]):
        expression = filled(text, {"__rate_interval": "20s"})
        assert check(url, expression, cluster.samples(names_of(expression)), times_s) > 0, title
