"""What Mooncake's papers report of scheduling, by the production Conductor in the cluster simulator.

Every row: what the paper says (FAST'25, or arXiv 2407.00079 v3 where named), what we find, and the bar we
set ourselves where there is one. Conversation and synthetic trace of the FAST'25 release; the stamps of
the first are rounded to 3 s, which is kept unless a row says otherwise. They are not part of this project:
--traces DIR, or MOONCAKE_TRACES, or ../shared/traces.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks import harness
from benchmarks.sim.failures import draw
from benchmarks.sim.nouns import WorldConfig
from benchmarks.sim.profile import DEFAULT, Profile, read_profile
from benchmarks.sim.report import Summary, spread, summarize, within
from benchmarks.sim.trace import (
    BLOCK_TOKENS,
    CROWD_IDS,
    TraceRequest,
    crowd,
    read_trace,
    rescale,
    sessions_of,
)
from benchmarks.sim.world import World
from conductor.admission import MARGIN, AdmissionMode
from conductor.index import PrefixIndex
from conductor.plan import BESIDE_ANSWERS
from conductor.planner import PlannerConfig
from conductor.scheduler import Policy
from mooncake.core.keys import KEY_BYTES

QUICK_S = 420.0
"""Of each trace, with --quick."""
ATTAINED = 0.9
"""Capacity: the fastest replay at which so many requests keep both objectives."""
SPEEDS = (1.0, 3.2)
SPEED_STEP = 0.01
"""Half a percent of the fastest: bars of 1.08 cannot be read off a coarser grid."""
HBM_TOKENS = 1_000_000
"""Of a coupled engine's own prefix cache."""
TBT_SLOS_S = (0.1, 0.2, 0.3)
ORDER = (Policy.RANDOM, Policy.LEAST_LOAD, Policy.CACHE_AWARE, Policy.KVCACHE)

CROWD_SEEDS = (1, 2, 3)
CLASS_MIX = ("premium", "interactive", "interactive", "default", "default", "default", "batch", "batch")
FLOOD = ("calm", *["flood"] * 7)
"""Tenants of eight conversations."""
OVERLOAD_KV_TOKENS = 600_000
"""Room of a decode instance that makes two of them the bottleneck."""
OVERLOAD_SPEEDS = (1.9, 2.0, 2.1)
ADMISSIONS = (
    ("late", AdmissionMode.LATE, None, MARGIN),
    ("early", AdmissionMode.EARLY, None, MARGIN),
    ("predicted, t_d 80 s", AdmissionMode.PREDICTED, 80.0, MARGIN),
    ("predicted, learned", AdmissionMode.PREDICTED, None, MARGIN),
    ("predicted, learned, margin 0", AdmissionMode.PREDICTED, None, 0.0),
    ("predicted, learned, margin 2", AdmissionMode.PREDICTED, None, 2.0),
)
"""Names of ways to admit: mode, t_d, margin (the knob of the frontier)."""

COUPLED: dict[str, WorldConfig] = {
    "vLLM-like": WorldConfig(both=16, policy=Policy.LEAST_LOAD, host_blocks=0),
    "+ prefix cache": WorldConfig(both=16, policy=Policy.CACHE_AWARE, host_blocks=HBM_TOKENS // BLOCK_TOKENS),
    "+ chunks of 512": WorldConfig(
        both=16, policy=Policy.LEAST_LOAD, host_blocks=0, chunk_tokens=512, mixed=True
    ),
}
PAPER_COUPLED: dict[tuple[str, str], tuple[float, ...]] = {
    ("conversation", "Mooncake 8P8D"): (0.931, 0.999, 1.0),
    ("conversation", "vLLM-like"): (0.153, 0.360, 0.594),
    ("conversation", "+ prefix cache"): (0.143, 0.321, 0.527),
    ("conversation", "+ chunks of 512"): (0.088, 0.261, 0.508),
    ("synthetic", "Mooncake 8P8D"): (0.995, 1.0, 1.0),
    ("synthetic", "vLLM-like"): (0.609, 0.700, 0.771),
    ("synthetic", "+ prefix cache"): (0.602, 0.701, 0.761),
    ("synthetic", "+ chunks of 512"): (0.461, 0.564, 0.678),
}
"""Figures 1 and 7, read off: share within TTFT <= 30 s and TBT <= 100, 200, 300 ms."""


class Row(msgspec.Struct, frozen=True):
    """One thing that is compared; `met` None = no bar."""

    what: str
    paper: str
    ours: str
    bar: str = ""
    met: bool | None = None


class Bench:
    """Runs worlds, remembers what they cost."""

    def __init__(self, begin: Callable[[str], None], profile: Profile, length_s: float) -> None:
        """`length_s` 0 = whole traces."""
        self._begin = begin
        self._length_s = length_s
        self._console = Console(stderr=True)
        self.profile = profile
        self.rows: list[Row] = []
        self.requests = 0
        self.cpu_s = 0.0
        self.simulated_s = 0.0

    def add(self, what: str, paper: str, ours: str, bar: str = "", met: bool | None = None) -> None:
        """Note and tell one comparison; bars are for whole traces."""
        row = Row(what, paper, ours) if self._length_s else Row(what, paper, ours, bar, met)
        self.rows.append(row)
        wanted = {True: f" ({row.bar})", False: f" (MISSED: {row.bar})", None: ""}[row.met]
        self._console.print(f"{what}: {ours}{wanted}", highlight=False, soft_wrap=True)

    def part(
        self, requests: Sequence[TraceRequest], speed: float, spread_s: float = 0.0
    ) -> list[TraceRequest]:
        """Return what is replayed of a trace."""
        return rescale(requests, speed=speed, length_s=self._length_s, spread_s=spread_s)

    def world(self, what: str, requests: Sequence[TraceRequest], config: WorldConfig) -> World:
        """Run one."""
        self._begin(what)
        begun_s = time.process_time()
        world = World(requests, self.profile, config)
        world.run()
        self.cpu_s += time.process_time() - begun_s
        self.requests += len(requests)
        self.simulated_s += world.time.now_s
        return world

    def summary(self, what: str, requests: Sequence[TraceRequest], config: WorldConfig) -> Summary:
        """Run one and return what it says."""
        return summarize(self.world(what, requests, config))


def validate(bench: Bench, trace: str, requests: Sequence[TraceRequest]) -> None:
    """Mean prefill times that depend on the cost model and the trace alone (figures 8 and 10)."""
    paper = {"conversation": (1.659, 1.051), "synthetic": (2.021, 0.733)}[trace]
    index = PrefixIndex()
    none_s = ideal_s = 0.0
    for one in requests:
        keys = [block.to_bytes(KEY_BYTES, "little") for block in one.hash_ids]
        known = min(index.longest_prefix(keys).get("all", 0) * BLOCK_TOKENS, one.input_tokens - 1)
        index.apply("all", b"".join(keys), b"")
        none_s += bench.profile.prefill_s(one.input_tokens, 0) / len(requests)
        ideal_s += bench.profile.prefill_s(one.input_tokens - known, known) / len(requests)
    rows = (("no cache", paper[0], none_s), ("everything cached", paper[1], ideal_s))
    for what, wanted_s, found_s in rows:
        # the paper's synthetic requests without cache take longer than its own Figure 14 allows
        bar = not (trace == "synthetic" and what == "no cache")
        bench.add(
            f"{trace}: prefill GPU s a request, {what}",
            f"{wanted_s:.3f}",
            f"{found_s:.3f}",
            "within 2 %" if bar else "",
            abs(found_s / wanted_s - 1) <= 0.02 if bar else None,
        )


def policies(bench: Bench, requests: Sequence[TraceRequest], speed: float, most_aware: float) -> None:
    """Average TTFT by policy (figure 5)."""
    part = bench.part(requests, speed)
    runs = {p: bench.summary(f"{p}, {speed:g}x", part, WorldConfig(policy=p)) for p in ORDER}
    means = [runs[policy].ttft_s.mean for policy in ORDER]
    paper = "19.65 5.27 3.58 3.07 (6.40 1.72 1.17 1)"
    ratios = " ".join(f"{mean / means[-1]:.2f}" for mean in means)
    bench.add(
        f"conversation {speed:g}x, 8P8D: mean TTFT s of random, load, cache-aware, kvcache",
        paper,
        f"{' '.join(f'{mean:.2f}' for mean in means)} ({ratios})",
        "falling",
        means == sorted(means, reverse=True),
    )
    hits = " ".join(f"{runs[policy].hit_rate:.3f}" for policy in ORDER)
    bench.add("  tokens found in the pool, same order (all: .374)", "-", hits)
    if speed == 1.0:
        load = means[3] / means[1]
        bench.add("  kvcache / load balancing", "0.58", f"{load:.3f}", "<= 0.67", load <= 0.67)
    aware = means[3] / means[2]
    bench.add("  kvcache / cache-aware", "0.86", f"{aware:.3f}", f"<= {most_aware:.2f}", aware <= most_aware)


def spread_stamps(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """What the rounded stamps of the trace cost."""
    part = bench.part(requests, 1.0, spread_s=3.0)
    chosen = (Policy.LEAST_LOAD, Policy.CACHE_AWARE, Policy.KVCACHE)
    means = [bench.summary(f"{p}, stamps spread", part, WorldConfig(policy=p)).ttft_s.mean for p in chosen]
    ratios = f"{means[2] / means[0]:.2f}, {means[2] / means[1]:.2f}"
    ours = f"{' '.join(f'{mean:.2f}' for mean in means)} (kvcache is {ratios} of them)"
    bench.add("conversation 1x, stamps spread over 3 s: load, cache-aware, kvcache", "-", ours)


def capacities(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """The fastest replay that 8P8D serves, by policy."""
    found = {p: capacity(bench, requests, str(p), WorldConfig(policy=p)) for p in ORDER[1:]}
    ours = " ".join(f"{speed:.2f}" for speed in found.values())
    bench.add("conversation, 8P8D: speed with 90 % within 30 s, 0.1 s: load, cache-aware, kvcache", "-", ours)
    load = found[Policy.KVCACHE] / found[Policy.LEAST_LOAD]
    aware = found[Policy.KVCACHE] / found[Policy.CACHE_AWARE]
    bench.add("  kvcache / load balancing", "-", f"{load:.2f}", ">= 1.25", load >= 1.25)
    bench.add("  kvcache / cache-aware", "-", f"{aware:.2f}", ">= 1.08", aware >= 1.08)


def capacity(bench: Bench, requests: Sequence[TraceRequest], name: str, config: WorldConfig) -> float:
    """Bisect on a grid; attainment falls with speed."""
    low, high = 0, round((SPEEDS[1] - SPEEDS[0]) / SPEED_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        speed = SPEEDS[0] + middle * SPEED_STEP
        part = bench.part(requests, speed)
        got = bench.summary(f"{name}, {speed:.2f}x", part, config)
        low, high = (middle, high) if got.attainment >= ATTAINED else (low, middle - 1)
    return SPEEDS[0] + low * SPEED_STEP


def role_switching(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """The planner against the split it starts from; every host has a store in both worlds."""
    blocks = bench.profile.host_kv_tokens // BLOCK_TOKENS
    fixed = WorldConfig(decode_host_blocks=blocks)
    planned = msgspec.structs.replace(fixed, planner=PlannerConfig())
    speeds = {
        name: capacity(bench, requests, name, config)
        for name, config in (("8P8D", fixed), ("roles planned", planned))
    }
    gain = speeds["roles planned"] / speeds["8P8D"]
    ours = f"{speeds['8P8D']:.2f}, {speeds['roles planned']:.2f}: {gain:.2f}"
    bench.add("conversation: speed with 90 %, fixed 8P8D and planned roles", "-", ours, ">= 1.3", gain >= 1.3)
    part = bench.part(requests, speeds["roles planned"])
    world = bench.world("roles planned, at its capacity", part, planned)
    got = summarize(world)
    prefills = sum(one.record.role == "prefill" for one in world.instances.values())
    back = sum(role == "decode" for _, _, role in world.switches)
    split = f"{prefills}P{16 - prefills}D"
    ours = f"{len(world.switches)} switches, {back} back; {split}; {got.tbt_tail_s.p90:.4f} s"
    met = got.tbt_tail_s.p90 <= got.tbt_slo_s and back <= 2
    bench.add("  switches, and TBT of the slowest tenth (p90)", "-", ours, "<= 0.1 s, at most 2 back", met)


def coupled(bench: Bench, trace: str, requests: Sequence[TraceRequest], speed: float) -> None:
    """16 engines that do both against 8P8D (figures 1 and 7: "effective request capacity")."""
    part = bench.part(requests, speed)
    ours: dict[str, list[float]] = {}
    for name, config in {"Mooncake 8P8D": WorldConfig(), **COUPLED}.items():
        entries = bench.world(f"{trace}, {name}", part, config).entries
        ours[name] = [sum(within(e, 30.0, slo) for e in entries) / len(entries) for slo in TBT_SLOS_S]
        paper = PAPER_COUPLED[trace, name]
        near = all(abs(left - right) <= 0.1 for left, right in zip(ours[name], paper, strict=True))
        bar = name == "vLLM-like"
        bench.add(
            f"{trace} {speed:g}x, {name}: within 30 s and 100, 200, 300 ms",
            _shares(paper),
            _shares(ours[name]),
            "+- 10 points" if bar else "",
            near if bar else None,
        )
    gains = [_gain(left, right) for left, right in zip(ours["Mooncake 8P8D"], ours["vLLM-like"], strict=True)]
    paper_gain = {"conversation": "+498 % +157 % +59 %", "synthetic": "+62 % +40 % +28 %"}[trace]
    bench.add(f"{trace} {speed:g}x: Mooncake more than vLLM-like by", paper_gain, " ".join(gains))


def _shares(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1%}" for value in values)


def _gain(ours: float, theirs: float) -> str:
    return f"{ours / theirs - 1:+.0%}" if theirs else "inf"


def ratio(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """The lever the paper leaves: who prefills and who decodes."""
    part = bench.part(requests, 3.0)
    for prefill in (8, 10, 12, 14):
        config = WorldConfig(prefill=prefill, decode=16 - prefill)
        got = bench.summary(f"{prefill}P{16 - prefill}D, 3x", part, config)
        ours = f"{got.attainment:.1%}, mean TTFT {got.ttft_s.mean:.2f} s"
        bench.add(f"conversation 3x, {prefill}P{16 - prefill}D: within 30 s, 0.1 s", "-", ours)


def overload(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """Rejection when decode is the bottleneck (arXiv v3, section 7): what each way wastes and keeps.

    Medians over three speeds, as one burst more or less moves a correlation by a tenth.
    """
    whole = bench.profile
    bench.profile = msgspec.structs.replace(whole, gpu_kv_tokens=OVERLOAD_KV_TOKENS)
    runs = {
        name: [_admitted(bench, requests, speed, *how) for speed in OVERLOAD_SPEEDS]
        for name, *how in ADMISSIONS
    }
    bench.profile = whole
    early = abs(statistics.median(one.load_correlation for one in runs["early"]))
    paper = {"late": "4,183 rejected", "early": "3,771", "predicted, learned": "3,589"}
    for name, found in runs.items():
        pairs = list(zip(found, runs["late"], strict=True))
        wasted = statistics.median(
            one.wasted_prefill_s / max(base.wasted_prefill_s, 1e-9) for one, base in pairs
        )
        good = statistics.median(one.attainment / max(base.attainment, 1e-9) for one, base in pairs)
        linked = statistics.median(one.load_correlation for one in found)
        middle = found[1]
        late = sum(count for why, count in middle.rejected.items() if why.startswith("after"))
        bar = name == "predicted, learned"
        bench.add(
            f"conversation 2x, 6P2D, decode room 0.6 M tokens, {name}",
            paper.get(name, "-"),
            f"{sum(middle.rejected.values()):,} rejected ({late:,} after prefill), wasted"
            f" {middle.wasted_prefill_s:,.0f} GPU s, TTFT {middle.ttft_s.mean:.2f} s; at 1.9-2.1x:"
            f" wasted {wasted:.2f}, goodput {good:.3f}, correlation {linked:+.2f}",
            f"wasted <= 0.5, goodput >= 0.97, |correlation| < {early:.2f}" if bar else "",
            wasted <= 0.5 and good >= 0.97 and abs(linked) < early if bar else None,
        )


def _admitted(
    bench: Bench,
    requests: Sequence[TraceRequest],
    speed: float,
    mode: AdmissionMode,
    decode_s: float | None,
    margin: float,
) -> Summary:
    config = WorldConfig(
        prefill=6, decode=2, admission=mode, decode_s=decode_s, admission_margin=margin,
        reject_ttft_s=30.0, reject_tbt_s=0.1,
    )  # fmt: skip
    name = f"6P2D {speed:g}x, {mode}, t_d {decode_s or 'learned'}, margin {margin:g}"
    return bench.summary(name, bench.part(requests, speed), config)


def classes(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """More than can be served: who is served, when classes wait in the gateway, and what that costs."""
    part = bench.part(requests, 2.4)
    for hold_s in (0.0, 1.0, 4.0):
        config = WorldConfig(hold_s=hold_s, classes=CLASS_MIX, reject_ttft_s=30.0)
        world = bench.world(f"8P8D 2.4x, hold {hold_s:g} s", part, config)
        got = summarize(world)
        shares = {}
        for name in dict.fromkeys(CLASS_MIX):
            own = [entry for entry in world.entries if entry.terms.slo_class.name == name]
            shares[name] = sum(within(entry, 30.0, 0.1) for entry in own) / max(1, len(own))
        told = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        ours = f"{told}; all {got.attainment:.3f}, hit {got.hit_rate:.3f}"
        bar = hold_s == 1.0
        best = min(shares["premium"], shares["interactive"]) >= 0.99
        bench.add(
            f"conversation 2.4x, 8P8D: within 30 s, 0.1 s by class, hold {hold_s:g} s", "-", ours,
            "premium, interactive >= 0.99" if bar else "", best if bar else None,
        )  # fmt: skip


def tenants(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """More than can be served, of which one tenant sends seven times as much as the other."""
    part = bench.part(requests, 2.4)
    whose = [FLOOD[int(session) % len(FLOOD)] for session in sessions_of(part)]
    for names in (("all",), FLOOD):
        config = WorldConfig(hold_s=1.0, reject_ttft_s=30.0, tenants=names)
        apart = names is FLOOD
        what = "told apart" if apart else "taken for one"
        world = bench.world(f"tenants {what}", part, config)
        shares, shown = {}, []
        for tenant in dict.fromkeys(FLOOD):
            own = [entry for entry, who in zip(world.entries, whose, strict=True) if who == tenant]
            ttft_s = spread([entry.ttft_s for entry in own if entry.ttft_s >= 0 and not entry.rejected])
            shares[tenant] = sum(within(entry, 30.0, 0.1) for entry in own) / max(1, len(own))
            shown.append(f"{tenant} {shares[tenant]:.3f} {ttft_s.mean:.2f} {ttft_s.p90:.1f}")
        bench.add(
            f"conversation 2.4x, 8P8D, two tenants {what}: within 30 s, 0.1 s; TTFT s mean, p90", "-",
            f"{', '.join(shown)}; hit {summarize(world).hit_rate:.3f}",
            "calm >= 0.99" if apart else "", shares["calm"] >= 0.99 if apart else None,
        )  # fmt: skip


def inline(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """Short prompts on decode instances, beside their batch; every host has a store in all worlds."""
    base = WorldConfig(decode_host_blocks=bench.profile.host_kv_tokens // BLOCK_TOKENS)
    short = msgspec.structs.replace(base, inline=True, chunk_tokens=8192, mixed=True)
    worlds = {
        "two legs": base,
        "inline, a step up to 3 times as long": short,
        "inline, a step up to 0.3 s": msgspec.structs.replace(short, reject_tbt_s=0.3),
    }
    for speed in (1.0, 2.0):
        part = bench.part(requests, speed)
        first: Summary | None = None
        for name, config in worlds.items():
            world = bench.world(f"{name}, {speed:g}x", part, config)
            got = summarize(world)
            first = first or got
            count = sum(e.plan is not None and e.plan.decision in BESIDE_ANSWERS for e in world.entries)
            met = got.ttft_s.mean < first.ttft_s.mean and got.attainment >= first.attainment - 0.005
            bench.add(
                f"conversation {speed:g}x, 8P8D, {name}: TTFT s mean, p50; tail TBT ms mean, p99; within",
                "-",
                f"{got.ttft_s.mean:.2f} {got.ttft_s.p50:.2f}; {got.tbt_tail_s.mean * 1e3:.1f}"
                f" {got.tbt_tail_s.p99 * 1e3:.1f}; {got.attainment:.1%} ({count:,} inline)",
                "" if got is first else "sooner, within - .5 points",
                None if got is first else met,
            )


def sessions(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """What knowing a session is worth beside an exact index, and without one."""
    part = bench.part(requests, 1.0)
    for what, blind, bonuses in (("exact", False, (0.0, 0.05, 0.5)), ("blind", True, (0.0, 0.05, 0.5, 5.0))):
        runs = [
            bench.summary(
                f"{what}, bonus {bonus_s:g} s", part, WorldConfig(session_bonus_s=bonus_s, blind=blind)
            )
            for bonus_s in bonuses
        ]
        ours = ", ".join(f"{one.ttft_s.mean:.2f} s ({one.hit_rate:.3f})" for one in runs)
        names = ", ".join(f"{bonus_s:g}" for bonus_s in bonuses)
        bench.add(f"conversation 1x, {what} index: TTFT (hit), sessions count {names} s", "-", ours)


def hot_spots(bench: Bench, trace: str, requests: Sequence[TraceRequest]) -> None:
    """What copies made ahead add to those that fetches leave, on a trace as it is."""
    part = bench.part(requests, 1.0)
    told = []
    for copies in (0, 8):
        world = bench.world(f"{trace}, {copies} hot copies", part, WorldConfig(hot_copies=copies))
        got = summarize(world)
        told.append(
            f"{got.ttft_s.mean:.3f} s ({got.hit_rate:.3f}), {world.fetched_bytes / 1e9:,.0f} GB fetched,"
            f" {world.hot.copied_bytes / 1e9:,.0f} copied"
        )
    bench.add(f"{trace} 1x, 8P8D: TTFT (hit) without hot copies, with up to 8", "-", "; ".join(told))


def crowds(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """A system prompt of 32k tokens, known for five minutes; then 200 come in 10 s.

    One token each, so that only fetches and copies use the network.
    """
    fast = bench.profile
    rest = [msgspec.structs.replace(one, output_tokens=1) for one in rescale(requests, length_s=QUICK_S)]
    for gigabytes, lost, most in ((87, False, 1.01), (12.5, False, 0.7), (3, False, 0.3), (12.5, True, 0.3)):
        bench.profile = msgspec.structs.replace(fast, egress_bytes_s=gigabytes * 1e9)
        means = [_crowd_ttft_s(bench, [] if lost else rest, copies, lost) for copies in (0, 8)]
        what = "the only store that has it lost 5 s before" if lost else "beside the conversation trace"
        ratio = means[1] / means[0]
        bench.add(
            f"200 at once behind 32k tokens, {gigabytes} GB/s, {what}: TTFT s with 0, 8 hot copies",
            "-",
            f"{means[0]:.2f} {means[1]:.2f} ({ratio:.2f})",
            f"<= {most:g}",
            ratio <= most,
        )
    bench.profile = fast


def _crowd_ttft_s(bench: Bench, rest: Sequence[TraceRequest], copies: int, lost: bool) -> float:
    """Return the mean over CROWD_SEEDS and those who came at once."""
    found = []
    for seed in CROWD_SEEDS:
        both = sorted([*rest, *crowd(32_768, seed)], key=lambda one: one.arrival_s)
        # alone, all of them run where the first one ran: on the first instance
        restarts = ((295.0, "host-prefill-000"),) if lost else ()
        config = WorldConfig(hot_copies=copies, restarts=restarts)
        world = bench.world(f"crowd, {copies} copies", both, config)
        found += [e.ttft_s for e in world.entries if _in_crowd(e.trace) and e.trace.arrival_s >= 300.0]
    return sum(found) / len(found)


def _in_crowd(one: TraceRequest) -> bool:
    return one.hash_ids[0] == CROWD_IDS


def event_lag(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """What it costs that the Conductor hears of the stores' changes late, or not of all."""
    part = bench.part(requests, 1.0)
    for loss, delays_s in ((0.0, (0.0, 0.01, 1.0, 10.0)), (0.01, (0.01,))):
        runs = [
            bench.summary(
                f"events {delay_s:g} s late, {loss:.0%} lost",
                part,
                WorldConfig(event_delay_s=delay_s, event_loss=loss),
            )
            for delay_s in delays_s
        ]
        names = " ".join(f"{delay_s:g}" for delay_s in delays_s)
        bench.add(
            f"conversation 1x, 8P8D, stores' events {names} s late, {loss:.0%} lost: mean TTFT s (hit rate)",
            "-",
            ", ".join(f"{one.ttft_s.mean:.3f} ({one.hit_rate:.3f})" for one in runs),
        )


def failures(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """Every instance fails once an hour, or once in ten minutes, for a minute, some with their hosts."""
    part = bench.part(requests, 1.0)
    names = [f"{role}-{number:03}" for role in ("prefill", "decode") for number in range(8)]
    blocks = bench.profile.host_kv_tokens // BLOCK_TOKENS
    for mtbf_s in (inf, 3600.0, 600.0):
        broken = [] if mtbf_s == inf else draw(names, part[-1].arrival_s, mtbf_s, 60.0, 1)
        config = WorldConfig(decode_host_blocks=blocks, failures=tuple(broken))
        what = "nothing fails" if mtbf_s == inf else f"an instance fails every {mtbf_s:g} s for 60 s"
        got = bench.summary(what, part, config)
        lost = sum(got.failed.values()) + sum(got.rejected.values())
        bench.add(
            f"conversation 1x, 8P8D, {what}",
            "-",
            f"{got.failures} failures ({got.hosts} hosts), {got.retries} legs retried, {got.moves} streams"
            f" moved, {got.twice_tokens:,} tokens again; TTFT {got.ttft_s.mean:.2f} s, of those hit"
            f" {got.affected_ttft_s.mean:.2f} s; within {got.attainment:.1%}; {lost} lost",
            "none lost",
            lost == 0,
        )


def slow_network(bench: Bench, requests: Sequence[TraceRequest]) -> None:
    """One token each, so that only fetches use the network."""
    part = [msgspec.structs.replace(one, output_tokens=1) for one in bench.part(requests, 1.0)]
    fast = bench.profile
    for gigabytes in (1, 3, 12.5):
        bench.profile = msgspec.structs.replace(fast, egress_bytes_s=gigabytes * 1e9)
        means = [
            bench.summary(f"{p}, {gigabytes} GB/s", part, WorldConfig(policy=p, prefill=6)).ttft_s.mean
            for p in (Policy.CACHE_AWARE, Policy.KVCACHE)
        ]
        bench.add(
            f"conversation 1x, 6P, {gigabytes} GB/s: mean TTFT s of cache-aware, kvcache",
            "-",
            f"{means[0]:.3f} {means[1]:.3f}",
            "never worse" if gigabytes == 1 else "",
            means[1] <= means[0] if gigabytes == 1 else None,
        )
    bench.profile = fast


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seven minutes of the traces, fewer rows")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    default = os.environ.get("MOONCAKE_TRACES", "../shared/traces")
    parser.add_argument("--traces", metavar="DIR", type=Path, default=Path(default))
    return parser.parse_args()


def main() -> int:
    """See the module's text. Returns 1 if a bar is missed on whole traces."""
    args = arguments()
    console = Console(stderr=True)
    traces = {}
    for trace in ("conversation", "synthetic"):
        path = args.traces / f"{trace}_trace.jsonl"
        if path.is_file():
            traces[trace] = read_trace(path)
        else:
            console.print(f"skipped: no {path.name} in {args.traces} (--traces DIR)", highlight=False)
    steps = {"conversation": 16 if args.quick else 119, "synthetic": 6}
    with harness.progress(sum(steps[trace] for trace in traces)) as begin:
        bench = Bench(begin, read_profile(DEFAULT), QUICK_S if args.quick else 0.0)
        begin("prefill times")
        for trace, requests in traces.items():
            validate(bench, trace, requests)
        requests = traces.get("conversation", [])
        if requests:
            policies(bench, requests, 1.0, 0.90)
            policies(bench, requests, 1.5, 0.80)
            coupled(bench, "conversation", requests, 1.5)
        if found := traces.get("synthetic", []):
            coupled(bench, "synthetic", found, 1.0)
            hot_spots(bench, "synthetic", found)
        if requests:
            spread_stamps(bench, requests)
        if requests and not args.quick:
            overload(bench, requests)
            ratio(bench, requests)
            role_switching(bench, requests)
            classes(bench, requests)
            tenants(bench, requests)
            inline(bench, requests)
            sessions(bench, requests)
            event_lag(bench, requests)
            failures(bench, requests)
            hot_spots(bench, "conversation", requests)
            crowds(bench, requests)
            slow_network(bench, requests)
            capacities(bench, requests)
    if not bench.rows:
        return 0
    shown = {True: "yes", False: "NO", None: ""}
    harness.show(
        "seven minutes of each trace, bars left out" if args.quick else "whole traces",
        [msgspec.to_builtins(row) | {"met": shown[row.met]} for row in bench.rows],
    )
    pace = bench.requests / max(bench.cpu_s, 1e-9)
    times = bench.simulated_s / max(bench.cpu_s, 1e-9)
    console.print(
        f"{bench.requests:,} requests in {bench.cpu_s:.0f} s of one core: {pace:,.0f} requests/s,"
        f" {times:,.0f} times real time",
        highlight=False,
    )
    rows = [msgspec.to_builtins(row) for row in bench.rows]
    harness.save(args.json, {"quick": args.quick, "requests_per_s": pace, "times": times, "rows": rows})
    return int(not args.quick and any(row.met is False for row in bench.rows))


if __name__ == "__main__":
    raise SystemExit(main())
