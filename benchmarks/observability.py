"""`python -m benchmarks.observability`: what it costs a gateway to be watched.

    CPU per token    gateways alike but for what they measure, over the same null engines, at the same time:
                     without our metrics, with them, with the live page's ring, with vLLM's statistics off,
                     with a part of the requests traced. Ratios are within a round, medians over rounds.
    a scrape         the page of a gateway with 64 instances: bytes, series, seconds and CPU seconds, by whose
                     series they are

CPU is that of the gateway's process, from /proc. The engines compute nothing and give all gateways the same
tokens (benchmarks.gateway_peers.null_engine).
"""

import argparse
import contextlib
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks import harness
from benchmarks.gateway_peers import load
from benchmarks.gateway_peers.paths import MAX_MODEL_LEN, Way, model_folder, start, stop, wait_answering
from benchmarks.observability_stand import Front, Stand

STEP_S = 0.025
INSTANCES = 64
SCRAPES = 20
STREAMS = 16
"""Of each gateway, at a token per step and stream: a tenth of what one of them can do."""
TOKENS, QUICK_TOKENS = 800, 40
"""Of each stream: CPU is counted in ticks of 10 ms, and 1 % of a round must be more than one of them."""
NONE, METRICS = "no metrics", "metrics"


def fronts(*, quick: bool) -> list[Front]:
    """Return the gateways to compare, and the one that has many instances."""

    def front(name: str, **what: Any) -> Front:
        return Front(name, harness.free_port(), harness.free_port(), **what)

    found = [front(NONE, measures=False), front(METRICS), front("1% traced", traced=0.01)]
    if not quick:
        found += [
            front("live page", admin_port=harness.free_port()),
            front("all traced", traced=1.0),
            front("metrics, no vLLM statistics", vllm_stats=False),
        ]
    return [*found, front("many instances", instances=INSTANCES, admin_port=harness.free_port())]


@contextlib.contextmanager
def standing(*, quick: bool) -> Iterator[tuple[list[Way], Way, int]]:
    """Start everything; yield the gateways that are compared, the one with many instances, its admin port."""
    with contextlib.ExitStack() as ended:
        folder = Path(ended.enter_context(tempfile.TemporaryDirectory(prefix="bench-observability-")))
        model = folder / "model"
        model.mkdir()
        stand = Stand(
            folder=str(folder), model=str(model), vocabulary=model_folder(model, tiny=quick),
            max_model_len=MAX_MODEL_LEN, step_s=STEP_S, sink=harness.free_port(), fronts=fronts(quick=quick),
        )  # fmt: skip
        (folder / "plan.json").write_bytes(msgspec.json.encode(stand))
        argv = [sys.executable, "-m", "benchmarks.observability_stand", str(folder / "plan.json")]
        process = start(argv, folder / "stack.log")
        ended.callback(stop, process)
        for front in stand.fronts:
            wait_answering(
                f"http://127.0.0.1:{front.port}", front.name, folder / f"{front.name}.log", process
            )
        pids = json.loads((folder / "pids.json").read_text())
        *compared, large = [Way(front.name, front.port, [pids[front.name]]) for front in stand.fronts]
        yield compared, large, stand.fronts[-1].admin_port


def compare(ways: list[Way], rounds: int, tokens: int) -> list[dict[str, float]]:
    """Stream over all gateways at once; return the CPU per token of each in each round, in microseconds.

    Whatever else the machine does then, it does to all of them alike.
    """
    found = []
    with harness.progress(rounds + 1) as begin:
        for index in range(rounds + 1):  # the first warms up
            begin(f"{STREAMS} streams over each")
            turn = ways if index % 2 else list(reversed(ways))
            payloads = [
                load.body([{"role": "user", "content": f"{index} {number} {way.name}"}], tokens, stream=True)
                for number in range(STREAMS)
                for way in turn
            ]
            connections = [load.Connection(way.port) for _ in range(STREAMS) for way in turn]
            before_s = {way.name: way.cpu_s() for way in ways}
            made, _ = load.streams(connections, payloads)
            spent_s = {way.name: way.cpu_s() - before_s[way.name] for way in ways}
            for connection in connections:
                connection.close()
            assert made == STREAMS * tokens * len(ways)
            if index:
                found.append({name: cpu_s / (STREAMS * tokens) * 1e6 for name, cpu_s in spent_s.items()})
    return found


def costs(found: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return one row per gateway: CPU per token, and by that without metrics and with."""
    rows = []
    for name in found[0]:
        row: dict[str, Any] = {"gateway": name}
        row["CPU us/token"] = statistics.median(one[name] for one in found)
        for base in (NONE, METRICS):
            row[f"/ {base}"] = statistics.median(one[name] / one[base] for one in found)
        rows.append(row)
    return rows


def scrape(way: Way, admin_port: int, scrapes: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scrape the page of a gateway with many instances; return what it weighs, by whose it is, and takes."""
    url = f"http://127.0.0.1:{admin_port}/metrics"
    with httpx.Client(timeout=60) as client:
        plain = client.get(url, headers={"accept-encoding": "identity"}).raise_for_status().text
        before_s, took_s, packed_bytes = way.cpu_s(), [], 0
        for _ in range(scrapes):
            began_s = time.perf_counter()
            with client.stream("GET", url, headers={"accept-encoding": "gzip"}) as answer:
                packed_bytes = sum(map(len, answer.iter_raw()))
            took_s.append(time.perf_counter() - began_s)
        cpu_s = (way.cpu_s() - before_s) / scrapes
    sizes: Counter[str] = Counter()
    series: Counter[str] = Counter()
    for line in plain.splitlines(keepends=True):
        name = line.removeprefix("# HELP ").removeprefix("# TYPE ")
        whose = next((kind for kind in ("vllm:", "mooncake_", "gen_ai_") if name.startswith(kind)), "others")
        sizes[whose] += len(line)
        series[whose] += not line.startswith("#")
    rows = [{"of": whose, "series": series[whose], "bytes": sizes[whose]} for whose in sizes]
    rows.append({"of": "all", "series": series.total(), "bytes": sizes.total()})
    return rows, {
        "instances": len(set(re.findall(r'instance_id="([^"]+)"', plain))),
        "gzip bytes": packed_bytes,
        "seconds": statistics.median(took_s),
        "slowest": max(took_s),
        "CPU s": cpu_s,
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny tokenizer, 1 round: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    args = parser.parse_args()
    with standing(quick=args.quick) as (ways, large, admin_port):
        found = compare(ways, 1 if args.quick else args.rounds, QUICK_TOKENS if args.quick else TOKENS)
        page, took = scrape(large, admin_port, 5 if args.quick else SCRAPES)
    rows = costs(found)
    harness.show("what a token costs a gateway, by what it measures", rows)
    harness.show(f"/metrics of a gateway with {INSTANCES} instances", page)
    harness.show("to scrape it", [took])
    harness.save(args.json, {"costs": rows, "page": page, "scrape": took, "rounds": found})


if __name__ == "__main__":
    main()
