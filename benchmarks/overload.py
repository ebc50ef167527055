"""`python -m benchmarks.overload`: twice the load that `mooncake up` (1 prefill, 1 decode) can sustain.

    teach    a closed loop: engines and cost model get warm, and a first guess of the rate
    ramp     open loop, rates around the guess: the most requests a second within both objectives is the peak
    judge    half the peak, then twice the peak, then half the peak again

Requests are independent prompts, Poisson arrivals, all from one seed. Client, gateway and engines share the
machine: what the client costs them is part of the figures, and "sent late" says when it was too slow itself.
"""

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.overload_plot import draw
from benchmarks.processes import mooncake_processes, resident_bytes
from benchmarks.replay.client import Outcome, Target
from benchmarks.replay.prompts import Shape
from benchmarks.replay.report import within
from benchmarks.replay.run import ready, replay_until_stopped
from benchmarks.sim.report import spread
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest
from mooncake.model import resolve_model
from tests.tiny_model import make_tiny_llama

SHAPE = Shape()
TEACH_REQUESTS, TEACH_AT_ONCE = 24, 6
RAMP_BEGIN, RAMP_STEP, RAMP_STEPS_MAX = 0.5, 1.3, 14
"""The first rate, of the closed loop's; each one beside the one before. A quiet machine goes far beyond."""
KEPT = 0.9
"""Of what is sent: where less of it is good, the peak is behind us."""
BASE, OVER = 0.5, 2.0
"""Of the peak."""
MEMORY = ("--kv-memory=128MiB", "--pool-size=256MiB", "--max-model-len=2048")
"""Little enough to be touched wholly before the load: what grows then is no cache."""
SAMPLE_S = 1.0
"""Between looks at the memory."""
WINDOW = 6
"""Requests whose median TTFT says that the load is over: one is noise."""
RECOVERED = 1.2
"""Times the median TTFT before the load."""


class Load(NamedTuple):
    """What is asked of a model; tokens are means, evenly spread from half to one and a half of them."""

    prompt_tokens: int
    answer_tokens: int
    ttft_slo_s: float
    tbt_slo_s: float
    step_s: float  # of the ramp
    base_s: float
    over_s: float


SMOL = Load(128, 16, 5.0, 0.6, step_s=15.0, base_s=20.0, over_s=45.0)
TINY = Load(128, 16, 1.0, 0.3, step_s=5.0, base_s=8.0, over_s=15.0)

Stretch = tuple[float, float]
"""A rate (requests per second) and for how many seconds."""
Memory = list[tuple[float, dict[str, int]]]
"""Seconds since the begin, resident bytes by process."""


def arrivals(load: Load, stretches: Sequence[Stretch], seed: int) -> list[TraceRequest]:
    """Return Poisson arrivals, one stretch after another; no two prompts share anything."""
    found, begin_s, number = [], 0.0, seed << 32
    for rate, length_s in stretches:
        random = Random(f"{seed} {rate}")  # the same before the load and after it
        at_s = random.expovariate(rate)
        while at_s < length_s:
            tokens, answer = (random.randint(n // 2, n * 3 // 2) for n in load[:2])
            blocks = -(-tokens // BLOCK_TOKENS)
            found.append(TraceRequest(begin_s + at_s, tokens, answer, tuple(range(number, number + blocks))))
            number += blocks
            at_s += random.expovariate(rate)
        begin_s += length_s
    return found


def due(outcomes: Sequence[Outcome], begin_s: float, end_s: float) -> list[Outcome]:
    """Return what became of the requests of a stretch of time."""
    return [one for one in outcomes if begin_s <= one.due_s < end_s]


def goodput(load: Load, outcomes: Sequence[Outcome], begin_s: float, end_s: float) -> float:
    """Return requests per second, due in a stretch of time, that kept both objectives."""
    good = sum(within(one, load.ttft_slo_s, load.tbt_slo_s) for one in due(outcomes, begin_s, end_s))
    return good / (end_s - begin_s)


def recovery_s(before: Sequence[Outcome], after: Sequence[Outcome], end_s: float) -> float | None:
    """Return seconds from the load's end until WINDOW requests have their usual TTFT; None: never."""
    usual_s = statistics.median(one.ttft_s for one in before if not one.error)
    for at in range(len(after) - WINDOW + 1):
        group = after[at : at + WINDOW]
        if any(one.error for one in group):
            continue
        if statistics.median(one.ttft_s for one in group) <= RECOVERED * usual_s:
            return group[0].due_s - end_s
    return None


def slope_mb_min(memory: Memory, name: str, begin_s: float, end_s: float) -> float:
    """Return by how many MB a minute a process grew (least squares)."""
    points = [(at_s, sizes[name]) for at_s, sizes in memory if begin_s <= at_s <= end_s and name in sizes]
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope * 60 / 1e6


class Bench:
    """One server, and what is sent to it."""

    def __init__(self, server: harness.Server, load: Load) -> None:
        """`server` answers already."""
        self.load = load
        self.pids = mooncake_processes(server)
        probe = arrivals(load, [(1.0, 10.0)], seed=99)
        self.target = ready(Target(url=server.url, timeout_s=120.0), probe, SHAPE)
        self._server = server

    def teach(self) -> float:
        """Send a closed loop of requests; return how many a second were served."""
        load = self.load
        prompts = [harness.prompt_tokens(load.prompt_tokens, 10_000 + i) for i in range(TEACH_REQUESTS)]
        begun_s = time.perf_counter()
        harness.run_streams(self._server.url, self.target.model, prompts, load.answer_tokens, TEACH_AT_ONCE)
        return TEACH_REQUESTS / (time.perf_counter() - begun_s)

    def run(self, stretches: Sequence[Stretch], seed: int) -> tuple[list[Outcome], Memory]:
        """Send one stretch after another, and wait for the last answer."""
        return asyncio.run(self._run(arrivals(self.load, stretches, seed)))

    async def _run(self, requests: Sequence[TraceRequest]) -> tuple[list[Outcome], Memory]:
        memory: Memory = []
        watching = asyncio.create_task(self._watch(memory))
        try:
            outcomes = await replay_until_stopped(requests, SHAPE, self.target, lambda _: None, [])
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        return outcomes, memory

    async def _watch(self, memory: Memory) -> None:
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        while True:
            memory.append((clock() - begun_s, resident_bytes(self.pids)))
            await asyncio.sleep(SAMPLE_S)

    def ramp(self, guess: float) -> list[dict[str, float]]:
        """Return the goodput at each rate of the ramp, which ends behind the peak."""
        load = self.load
        rows: list[dict[str, float]] = []
        rate = guess * RAMP_BEGIN
        while len(rows) < RAMP_STEPS_MAX and (not rows or rows[-1]["goodput/s"] >= KEPT * rows[-1]["sent/s"]):
            outcomes, _ = self.run([(rate, load.step_s)], seed=1 + len(rows))
            ttft_s = spread([one.ttft_s for one in outcomes if not one.error])
            rows.append({
                "sent/s": len(outcomes) / load.step_s,
                "goodput/s": goodput(load, outcomes, 0.0, load.step_s),
                "TTFT p50 s": ttft_s.p50,
                "TTFT p99 s": ttft_s.p99,
                "rejected": float(sum(one.is_refused for one in outcomes)),
            })  # fmt: skip
            rate *= RAMP_STEP
        return rows


def judged(load: Load, outcomes: Sequence[Outcome], memory: Memory, peak: float) -> dict[str, Any]:
    """Return what the overload did; see docs/overload.md for the bars."""
    begin_s, end_s = load.base_s, load.base_s + load.over_s
    over = due(outcomes, begin_s, end_s)
    before, after = due(outcomes, 0.0, begin_s), due(outcomes, end_s, end_s + load.base_s)
    refused = [one for one in outcomes if one.is_refused]
    failed = [one.error for one in outcomes if one.error and not one.is_refused]
    answered = spread([one.answered_s for one in refused])
    found = goodput(load, outcomes, begin_s, end_s)
    served_s = spread([one.ttft_s for one in over if not one.error])
    return {
        "peak goodput/s": peak,
        "sent/s": len(over) / load.over_s,
        "goodput/s": found,
        "goodput / peak": found / peak,
        "served and late": sum(not one.error for one in over) - round(found * load.over_s),
        "TTFT p50 s": served_s.p50,
        "TTFT p99 s": served_s.p99,
        "rejected": len(refused),
        "rejected p50 ms": answered.p50 * 1e3,
        "rejected p99 ms": answered.p99 * 1e3,
        "no Retry-After": sum(one.retry_after_s < 0 for one in refused),
        "without answer": len(failed),
        "failures": sorted(set(failed)),
        "recovered after s": recovery_s(before, after, end_s),
        "sent late p99 ms": spread([one.late_s for one in outcomes]).p99 * 1e3,
        "growth MB/min": {
            name: slope_mb_min(memory, name, begin_s + load.over_s / 4, end_s) for name in memory[0][1]
        },
    }


def bars(found: dict[str, Any], load: Load) -> list[dict[str, str]]:
    """Return what is wanted beside what was found."""
    ratio, recovered = found["goodput / peak"], found["recovered after s"]
    rejected_ms, quiet, lost = found["rejected p99 ms"], found["no Retry-After"], found["without answer"]
    told = "not seen" if recovered is None else f"{recovered:.1f} s"
    wanted: list[tuple[str, bool, str]] = [
        ("goodput at 2x >= 0.9 of the peak", ratio >= 0.9, f"{ratio:.2f}"),
        ("rejected within 50 ms, p99", rejected_ms <= 50, f"{rejected_ms:.1f} ms"),
        ("all with Retry-After", not quiet, f"{quiet} without"),
        ("every request answered", not lost, f"{lost} not"),
        (f"TTFT back within {RECOVERED}x", recovered is not None and recovered <= 2 * load.ttft_slo_s, told),
    ]
    return [{"bar": bar, "found": text, "": "holds" if holds else "MISSED"} for bar, holds, text in wanted]


def more(parser: argparse.ArgumentParser) -> None:
    """Add our options."""
    parser.add_argument("--plot", metavar="FILE", help="draw the judged run over time (.png, .svg)")
    parser.add_argument(
        "--up", default="", metavar="OPTIONS", help="more options of `mooncake up`, in one argument"
    )
    parser.add_argument("--admit-all", action="store_true", help="no objectives: what a collapse is like")


def main() -> None:
    """See the module's text."""
    args = harness.arguments(__doc__, more)
    is_tiny = args.quick and not args.model
    load = TINY if is_tiny else SMOL
    model = str(make_tiny_llama(tempfile.mkdtemp(prefix="bench-tiny-"))) if is_tiny else ""
    model = model or args.model or resolve_model(None).path_or_name
    slo = [] if args.admit_all else [f"--ttft-slo-s={load.ttft_slo_s}", f"--tbt-slo-s={load.tbt_slo_s}"]
    server = harness.mooncake_up(model, *slo, *MEMORY, *args.up.split())
    with harness.progress(4) as begin, harness.running(begin, server):
        bench = Bench(server, load)
        begin("teach")
        guess = bench.teach()
        begin("ramp")
        steps = bench.ramp(guess)
        peak = max(row["goodput/s"] for row in steps)
        if not peak:
            raise SystemExit("no request kept the objectives: this machine is too slow for them")
        begin("judge")
        stretches = [(BASE * peak, load.base_s), (OVER * peak, load.over_s), (BASE * peak, load.base_s)]
        outcomes, memory = bench.run(stretches, seed=99)
    found = judged(load, outcomes, memory, peak)
    harness.show(f"ramp, TTFT <= {load.ttft_slo_s:g} s, TBT <= {load.tbt_slo_s:g} s", steps)
    harness.show("twice the peak", [{"": key, "found": str(value)} for key, value in found.items()])
    harness.show("bars", bars(found, load))
    if args.plot:
        draw(args.plot, outcomes, memory, (load.ttft_slo_s, load.tbt_slo_s), (load.base_s, load.over_s))
    harness.save(args.json, {"load": load._asdict(), "closed loop/s": guess, "ramp": steps, "judged": found})


if __name__ == "__main__":
    main()
