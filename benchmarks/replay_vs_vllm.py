"""`python -m benchmarks.replay_vs_vllm --trace FILE`: a trace on two cores, three ways.

    plain        one vLLM server, two threads
    split        `mooncake up`: one prefill, one decode engine, a core each
    aggregated   `mooncake up --aggregated 2`: two engines that do both, a core each

The same requests (scaled, as `mooncake bench` makes them) at several speeds, one server at a time, in turns.
CPU seconds are of all processes of a server. Without --trace, growing conversations are made up.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.processes import tree_cpu_s
from benchmarks.replay.client import Target
from benchmarks.replay.prompts import Shape
from benchmarks.replay.report import Summary, summarize
from benchmarks.replay.run import ready, replay_until_stopped
from benchmarks.sim.trace import TraceRequest, requests_of, rescale
from mooncake.model import resolve_model
from tests.tiny_model import make_tiny_llama

CONTEXT_TOKENS = 8192
"""Longer requests of the trace are left out."""
POOL = "--pool-size=2GiB"
MEMORY = "--kv-memory=512MiB"
"""Of each engine, the plain one included: split and aggregated have twice as much, as two machines would."""


class Setting(NamedTuple):
    """One benchmark: `scale` of tokens, seconds of requests per run, mean requests per second by speed."""

    scale: float
    run_s: float
    rates: tuple[float, ...]
    ttft_slo_s: float
    tbt_slo_s: float
    rounds: int


QUICK = Setting(0.0625, 5.0, (4.0, 16.0), 1.0, 0.2, 1)
TINY = Setting(0.0625, 6.0, (4.0, 8.0, 16.0, 24.0), 1.0, 0.2, 2)
SMOL = Setting(0.0625, 40.0, (0.15, 0.3, 0.5, 0.8), 15.0, 0.6, 2)
"""Blocks of 32 tokens, as the engines have; a third of the prompts' tokens was there before."""

Start = Callable[[str], harness.Server]

SERVERS: dict[str, Start] = {
    "plain": lambda model: harness.plain_vllm(model, CONTEXT_TOKENS, threads=2),
    "split": lambda model: harness.mooncake_up(model, f"--max-model-len={CONTEXT_TOKENS}", POOL, MEMORY),
    "aggregated": lambda model: harness.mooncake_up(
        model, f"--max-model-len={CONTEXT_TOKENS}", POOL, MEMORY, "--aggregated=2"
    ),
}


class Run(NamedTuple):
    """One replay of one server at one rate."""

    summary: Summary
    cpu_s: float


def parts(trace: str, setting: Setting, seed: int) -> list[list[TraceRequest]]:
    """Return what is sent at each rate: the same part of the trace, faster; what does not fit is left out."""
    shape = Shape(scale=setting.scale)
    whole = requests_of(
        trace, count=400, rate=1.0, seed=seed, speed=1.0, start_s=0.0, length_s=0.0, sample=1.0, spread_s=3.0
    )
    fitting = [one for one in whole if len(one.hash_ids) * shape.block_tokens + 200 < CONTEXT_TOKENS // 2]
    found = []
    for rate in setting.rates:
        count = max(8, round(rate * setting.run_s))
        some = fitting[:count]
        speed = rate * (some[-1].arrival_s - some[0].arrival_s) / count
        found.append(rescale(some, speed=speed, start_s=0.0))
    return found


def one_run(server: harness.Server, requests: Sequence[TraceRequest], setting: Setting, seed: int) -> Run:
    """Replay; `seed` makes other tokens, so that no run finds what another left."""
    shape = Shape(scale=setting.scale, seed=seed)
    target = ready(Target(url=server.url, timeout_s=180.0), requests, shape)
    before_s = tree_cpu_s(server.process.pid)
    outcomes = asyncio.run(replay_until_stopped(requests, shape, target, lambda _: None, []))
    summary = summarize(outcomes, setting.ttft_slo_s, setting.tbt_slo_s)
    return Run(summary, tree_cpu_s(server.process.pid) - before_s)


def row(name: str, rate: float, runs: Sequence[Run]) -> dict[str, Any]:
    """Return medians over the rounds of one server at one rate."""

    def of(value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in runs)

    return {
        "rate/s": rate,
        "server": name,
        "goodput/s": of(lambda run: run.summary.goodput),
        "within": of(lambda run: run.summary.attainment),
        "TTFT p50": of(lambda run: run.summary.ttft_s.p50),
        "p90": of(lambda run: run.summary.ttft_s.p90),
        "p99 s": of(lambda run: run.summary.ttft_s.p99),
        "TBT p50": of(lambda run: run.summary.tbt_s.p50 * 1e3),
        "p90 ": of(lambda run: run.summary.tbt_s.p90 * 1e3),
        "p99 ms": of(lambda run: run.summary.tbt_s.p99 * 1e3),
        "hit": of(lambda run: run.summary.hit_rate),
        "CPU s each": of(lambda run: run.cpu_s / max(1, run.summary.served)),
        "failed": sum(run.summary.requests - run.summary.served for run in runs),
    }


def crossing(rows: Sequence[dict[str, Any]], ours: str, figure: str, *, more_is_better: bool) -> str:
    """Return in words at which rates `ours` is ahead of the plain server."""
    plain = {one["rate/s"]: one[figure] for one in rows if one["server"] == "plain"}
    mine = {one["rate/s"]: one[figure] for one in rows if one["server"] == ours}
    sign = 1 if more_is_better else -1
    ahead = ", ".join(f"{rate:g}" for rate, value in mine.items() if sign * (value - plain[rate]) > 0)
    behind = ", ".join(f"{rate:g}" for rate, value in mine.items() if sign * (value - plain[rate]) < 0)
    return f"{figure}: {ours} ahead at {ahead or 'no rate'}, plain at {behind or 'no rate'}"


def more(parser: argparse.ArgumentParser) -> None:
    """Add our options."""
    parser.add_argument("--trace", default="", metavar="FILE", help="in the format of the public traces")
    parser.add_argument(
        "--tiny", action="store_true", help="a model that computes next to nothing, all speeds"
    )
    parser.add_argument("--only", default="", metavar="NAMES", help=f"of {', '.join(SERVERS)}; with commas")
    parser.add_argument("--rates", default="", metavar="LIST", help="requests per second, with commas")


def main() -> None:
    """See the module's text."""
    args = harness.arguments(__doc__, more)
    is_tiny = (args.quick or args.tiny) and not args.model
    setting = QUICK if args.quick else TINY if args.tiny else SMOL
    if args.rates:
        setting = setting._replace(rates=tuple(float(rate) for rate in args.rates.split(",")))
    model = str(make_tiny_llama(tempfile.mkdtemp(prefix="bench-tiny-"))) if is_tiny else ""
    model = model or args.model or resolve_model(None).path_or_name
    names = args.only.split(",") if args.only else list(SERVERS)
    sent = parts(args.trace, setting, seed=0)
    runs: dict[tuple[str, float], list[Run]] = {}
    servers = {name: SERVERS[name](model) for name in names}
    steps = len(servers) + setting.rounds * len(sent) * len(servers)
    with harness.progress(steps) as begin, harness.running(begin, *servers.values()):
        for server in servers.values():  # nobody's first prompts are counted
            one_run(server, sent[0][:8], setting, seed=1)
        for number in range(setting.rounds):
            for rate, requests in zip(setting.rates, sent, strict=True):
                for name, server in servers.items():
                    begin(f"{name}, {rate:g}/s")
                    seed = 100 * number + round(10 * rate) + 2
                    runs.setdefault((name, rate), []).append(one_run(server, requests, setting, seed))
    rows = [row(name, rate, runs[name, rate]) for rate in setting.rates for name in names]
    slo = f"TTFT <= {setting.ttft_slo_s:g} s, TBT <= {setting.tbt_slo_s:g} s"
    harness.show(f"{slo}, tokens x {setting.scale:g}, medians of {setting.rounds}", rows)
    said = []
    for ours in names:
        if ours != "plain" and "plain" in names:
            said.append(crossing(rows, ours, "goodput/s", more_is_better=True))
            said += [
                crossing(rows, ours, key, more_is_better=False)
                for key in ("TTFT p50", "p99 ms", "CPU s each")
            ]
    if said:
        harness.show("where the lines cross", [{"": line} for line in said])
    harness.save(args.json, {"setting": setting._asdict(), "rows": rows, "crossing": said})


if __name__ == "__main__":
    main()
