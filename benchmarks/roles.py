"""Roles on real engines: the load turns from long prompts to long answers and back, and the pools follow.

Two prefill and two decode instances with `--plan-roles` and the planner's usual settings get half of the
prompts that this machine sustains, then answers that fill most of two decode instances; both are measured
first. Every second is noted who has which role and how much to do; at the end: how soon after a shift the
first order came, how many there were, what failed, TTFT and TBT by phase, and whether prompts from before
are still known to instances that were something else then.

Engines take few sequences each (SEQUENCES_MAX), so that a decode instance is full before the two cores are.
"""

import argparse
import asyncio
import contextlib
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import httpx
import msgspec

from benchmarks import harness
from benchmarks.replay.client import Outcome, Target, replay
from benchmarks.replay.prompts import Shape
from benchmarks.sim.charts import COLOURS, pyplot, save
from benchmarks.sim.report import Spread, spread
from benchmarks.sim.shifts import Phase, shifting
from benchmarks.sim.trace import BLOCK_TOKENS
from conductor.planner import MEMORY, PlannerConfig
from mooncake.core.messages import DRAINING
from tests.tiny_model import make_tiny_llama

PROMPTS_SHARE = 0.5
"""Of what the machine sustains."""
ANSWERS_SHARE = 0.85
"""Of what two full decode instances give: too much for two by the planner's margins, enough for three."""
SEQUENCES_MAX = 8
"""Of an engine: what a card's memory does elsewhere."""
CORES = 2
"""Prompts that are computed at once; the calibration computes one alone."""
BLOCK = 32
SHAPE = Shape(scale=BLOCK / BLOCK_TOKENS)
"""Traces name blocks of 512 tokens, these engines have blocks of 32."""
LONG_PROMPT, SHORT_ANSWER = 1536, 8
SHORT_PROMPT, LONG_ANSWER = 64, 256
POOL_SIZE = "4GiB"
"""All that is asked for in one run: what is not found again has been lost, not evicted."""
PROBES = 6
"""Prompts that are asked for again at the end."""
FOLLOWED_S = PlannerConfig().interval_s * (1 + 1 / MEMORY)
"""The forecast's window and one period."""
PRESSURE_MAX = 10.0
"""Shown for more, which may be without end."""
WATCH_S = 1.0
ASK_S = 10.0
GAUGE = re.compile(r'^mooncake_planner_pressure_ratio\{role="(\w+)"\} (\S+)$', re.MULTILINE)


class Look(msgspec.Struct, frozen=True):
    """The cluster at one moment. Loads: requests that wait for a prompt, and that are decoded or will be."""

    at_s: float
    roles: dict[str, str]
    prefill_requests: int
    decode_requests: int
    pressure: dict[str, float]


class Figures(msgspec.Struct, frozen=True):
    """One phase."""

    name: str
    requests: int
    failed: int
    ttft_s: Spread
    tbt_s: Spread
    hit_rate: float
    rate: float


class Change(msgspec.Struct, frozen=True):
    """One change of role: when it was ordered, since the shift before it, and when the new role was there."""

    instance: str
    role: str
    ordered_s: float
    since_shift_s: float
    took_s: float


def scaled(tokens: int) -> int:
    """Return so many tokens in units of a trace."""
    return tokens * BLOCK_TOKENS // BLOCK


def calibrate(server: harness.Server, model: str) -> tuple[float, float]:
    """Return long prompts per second, and tokens per second of full batches, that the machine sustains."""
    alone = [harness.prompt_tokens(LONG_PROMPT, 900_000 + n) for n in range(4)]
    took_s = [answer["total_s"] for answer in harness.run_streams(server.url, model, alone, 1, 1)][1:]
    crowd = [harness.prompt_tokens(SHORT_PROMPT, 910_000 + n) for n in range(2 * SEQUENCES_MAX)]
    answers = harness.run_streams(server.url, model, crowd, 96, len(crowd))
    gap_s = statistics.median(gap for answer in answers for gap in answer["gaps_s"])
    return CORES / statistics.median(took_s), len(crowd) / gap_s


def phases_of(lengths_s: Sequence[float], prompts_s: float, tokens_s: float) -> list[Phase]:
    """Return prompts, answers, prompts, ... of the given lengths."""
    shapes = (
        (PROMPTS_SHARE * prompts_s, LONG_PROMPT, SHORT_ANSWER, 0.25),
        (ANSWERS_SHARE * tokens_s / LONG_ANSWER, SHORT_PROMPT, LONG_ANSWER, 0.0),
    )
    phases = []
    for number, length_s in enumerate(lengths_s):
        rate, prompt, answer, shared = shapes[number % 2]
        phases.append(Phase(length_s, rate, scaled(prompt), scaled(answer), shared))
    return phases


async def watch(url: str, begun_s: float, found: list[Look]) -> None:
    """Look at the cluster every second until cancelled."""
    async with httpx.AsyncClient(timeout=ASK_S) as client:
        while True:
            rows = (await client.get(f"{url}/mooncake/instances")).json()["instances"]
            told = GAUGE.findall((await client.get(f"{url}/metrics")).text)
            found.append(
                Look(
                    time.monotonic() - begun_s,
                    {row["instance_id"]: row["role"] for row in rows},
                    sum(row["load"]["prefill_requests"] for row in rows),
                    sum(row["load"]["decode_requests"] for row in rows),
                    {role: min(float(value), PRESSURE_MAX) for role, value in told},
                )
            )
            await asyncio.sleep(WATCH_S)


async def drive(
    server: harness.Server, model: str, phases: Sequence[Phase]
) -> tuple[list[Outcome], list[Look]]:
    """Send the load; return what became of it, and what was seen."""
    looks: list[Look] = []
    target = Target(url=server.url, model=model, timeout_s=harness.REQUEST_S_MAX)
    watching = asyncio.create_task(watch(server.url, time.monotonic(), looks))
    try:
        outcomes = await replay(shifting(phases, 1), SHAPE, target, lambda _: None, [], asyncio.Event())
        await asyncio.sleep(2 * WATCH_S)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    return outcomes, looks


def changes_of(looks: Sequence[Look], shifts_s: Sequence[float]) -> list[Change]:
    """Return the changes of role that were seen."""
    begun: dict[str, tuple[float, str]] = {}  # since when it drains, and what it was
    found = []
    for before, now in pairwise(looks):
        for name, role in now.roles.items():
            old = before.roles.get(name, role)
            if old not in {role, DRAINING}:
                begun[name] = now.at_s, old
            if role != DRAINING and name in begun:
                at_s, was = begun.pop(name)
                if was != role:
                    shift_s = max((one for one in shifts_s if one <= at_s), default=0.0)
                    found.append(Change(name, role, at_s, at_s - shift_s, now.at_s - at_s))
    return found


def figures_of(outcomes: Sequence[Outcome], phases: Sequence[Phase]) -> list[Figures]:
    """Return one line per phase, by when requests were due."""
    found, begin_s = [], 0.0
    for number, phase in enumerate(phases):
        own = [one for one in outcomes if begin_s <= one.due_s < begin_s + phase.length_s]
        served = [one for one in own if not one.error]
        begin_s += phase.length_s
        found.append(
            Figures(
                "long answers" if number % 2 else "long prompts",
                len(own),
                len(own) - len(served),
                spread([one.ttft_s for one in served]),
                spread([gap_s for one in served for gap_s in one.gaps_s]),
                sum(one.cached_tokens for one in served) / max(1, sum(one.input_tokens for one in served)),
                phase.rate,
            )
        )
    return found


def probe(server: harness.Server, model: str) -> float:
    """Return the share of the probes' prompts that was found."""
    prompts = [harness.prompt_tokens(20 * BLOCK + 5, 920_000 + n) for n in range(PROBES)]
    answers = harness.run_streams(server.url, model, prompts, 2, 1)
    cached = [(one["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for one in answers]
    return sum(cached) / (PROBES * 20 * BLOCK)


def plot(
    path: str, title: str, phases: Sequence[Phase], looks: Sequence[Look], outcomes: Sequence[Outcome]
) -> None:
    """Draw roles, pressures, load and latencies over time."""
    plt = pyplot("--plot")
    figure, axes = plt.subplots(4, 1, figsize=(11, 11), sharex=True, layout="constrained")
    times = [look.at_s for look in looks]
    for role, colour in zip(("prefill", "decode", DRAINING), COLOURS, strict=False):
        counts = [sum(one == role for one in look.roles.values()) for look in looks]
        axes[0].step(times, counts, where="post", label=role, color=colour)
        if role != DRAINING:
            axes[1].step(times, [look.pressure.get(role, 0.0) for look in looks], where="post", color=colour)
    axes[0].set(ylabel="instances", title="roles")
    axes[1].set(ylabel="pressure", title="what the planner expects (1 = just enough)", ylim=(0, 3))
    axes[1].axhline(1, color="grey", linewidth=0.8)
    axes[2].plot(times, [look.prefill_requests for look in looks], color=COLOURS[0], label="wait for prefill")
    axes[2].plot(times, [look.decode_requests for look in looks], color=COLOURS[1], label="are with decode")
    axes[2].set(ylabel="requests", title="load")
    served = [one for one in outcomes if not one.error]
    due_s = [one.due_s for one in served]
    axes[3].scatter(due_s, [one.ttft_s for one in served], s=7, color=COLOURS[2], label="TTFT")
    gaps_s = [(one.due_s, statistics.fmean(one.gaps_s)) for one in served if one.gaps_s]
    axes[3].scatter(*zip(*gaps_s, strict=True), s=7, color=COLOURS[3], label="TBT, mean of an answer")
    axes[3].set(yscale="log", ylabel="s", xlabel="time (s)", title="latency, by arrival")
    shift_s = 0.0
    for phase in phases[:-1]:
        shift_s += phase.length_s
        for one in axes:
            one.axvline(shift_s, color="grey", linestyle="--", linewidth=1)
    for one in (axes[0], axes[2], axes[3]):
        one.legend(loc="upper right")
    figure.suptitle(title)
    save(figure, path)


def options(parser: argparse.ArgumentParser) -> None:
    """Add ours to the common command line."""
    parser.add_argument("--plot", metavar="FILE", help="draw roles and latencies over time")


def main() -> None:
    """See the module's text."""
    args = harness.arguments(__doc__, options)
    if args.plot:
        pyplot("--plot")
    model = args.model or make_tiny_llama(tempfile.mkdtemp(prefix="bench-tiny-"))
    lengths_s = (15.0, 30.0) if args.quick else (60.0, 90.0, 90.0)
    server = harness.mooncake_up(
        str(model), "--prefill", "2", "--decode", "2", "--plan-roles", "--kv-memory", "256MiB",
        "--pool-size", POOL_SIZE,
        "--", "--max-num-seqs", str(SEQUENCES_MAX),
    )  # fmt: skip
    with harness.progress(5) as begin, harness.running(begin, server):
        begin("calibrating")
        name = server.model()
        probe(server, name)
        prompts_s, tokens_s = calibrate(server, name)
        phases = phases_of(lengths_s, prompts_s, tokens_s)
        begin("load")
        outcomes, looks = asyncio.run(drive(server, name, phases))
        begin("asking again")
        known = probe(server, name)
    shifts_s = [sum(lengths_s[:n]) for n in range(1, len(lengths_s))]
    changes, figures = changes_of(looks, shifts_s), figures_of(outcomes, phases)
    title = (
        f"{PROMPTS_SHARE:.0%} of {prompts_s:.1f} prompts/s, {ANSWERS_SHARE:.0%} of {tokens_s:.0f} tokens/s"
    )
    harness.show(title, [_row(one) for one in figures])
    for one in changes:
        print(
            f"{one.instance} -> {one.role}: ordered {one.since_shift_s:.1f} s after the shift"
            f" (window and period: {FOLLOWED_S:.0f} s), there after {one.took_s:.1f} s"
        )
    print(f"{len(changes)} changes; of prompts from before, {known:.0%} found again")
    result = {"phases": figures, "changes": changes, "known": known, "looks": looks, "title": title}
    harness.save(args.json, msgspec.to_builtins(result))
    if args.plot:
        plot(args.plot, title, phases, looks, outcomes)


def _row(one: Figures) -> dict[str, Any]:
    return {
        "phase": one.name,
        "requests/s": one.rate,
        "requests": one.requests,
        "failed": one.failed,
        "TTFT p50, s": one.ttft_s.p50,
        "p90": one.ttft_s.p90,
        "TBT p50, ms": one.tbt_s.p50 * 1000,
        "p90, ms": one.tbt_s.p90 * 1000,
        "cached": one.hit_rate,
    }


if __name__ == "__main__":
    main()
