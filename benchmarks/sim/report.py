"""What a simulated run says of itself: one summary per run, a table, JSON, and a digest for comparison."""

import statistics
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

import msgspec

from benchmarks.sim.nouns import Entry
from benchmarks.sim.world import World
from mooncake.core.errors import ConfigError

SETTLE_S = 120.0
"""An idle cluster fills for so long: both loads rise from nothing together, which hides how they are linked
afterwards (of early rejection -.04 with the first samples, -.33 without)."""
TTFT_SLO_S, TBT_SLO_S = 30.0, 0.1
"""By which requests are judged unless told otherwise: those of the papers."""


class Spread(msgspec.Struct, frozen=True):
    """Of one quantity over requests; all 0 if there are none."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Rates are of all requests, those turned away included; `hit_rate` is by tokens.

    tbt_mean_s, tbt_tail_s: per request the mean, and the mean of its longest tenth of intervals.
    goodput: requests per second, over the time of arrivals, that kept both objectives; attainment: share.
    prefill_imbalance, decode_imbalance: busiest instance's busy time by the mean one's.
    switches: of an instance's role. gaps: in what stores told the index, each followed by a snapshot.
    failures: of engines; hosts: of these, that took the store's blocks along. retries, moves: legs begun
    again before and after the first token; affected: requests with any; twice_tokens: computed again.
    load_correlation: of the two pools' load over time, the first SETTLE_S left out; the see-saw of early
        rejection is negative.
    """

    requests: int
    length_s: float
    simulated_s: float
    ttft_s: Spread
    tbt_mean_s: Spread
    tbt_tail_s: Spread
    ttft_slo_s: float
    tbt_slo_s: float
    attainment: float
    goodput: float
    rejected: dict[str, int]
    hit_rate: float
    prefill_s: float
    wasted_prefill_s: float
    prefill_busy: float
    decode_busy: float
    prefill_imbalance: float
    decode_imbalance: float
    load_correlation: float
    fetches: int
    fetched_bytes: int
    switches: int
    gaps: int
    failures: int
    hosts: int
    affected: int
    retries: int
    moves: int
    twice_tokens: int
    affected_ttft_s: Spread
    failed: dict[str, int]
    digest: str


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and percentiles (nearest rank)."""
    if not values:
        return Spread(0.0, 0.0, 0.0, 0.0)
    ordered = sorted(values)
    last = len(ordered) - 1
    p50, p90, p99 = (ordered[round(share * last)] for share in (0.5, 0.9, 0.99))
    return Spread(statistics.fmean(ordered), p50, p90, p99)


def check_objectives(ttft_slo_s: float, tbt_slo_s: float) -> None:
    """Raises ConfigError: they are not positive."""
    if not (ttft_slo_s > 0 and tbt_slo_s > 0):
        raise ConfigError(f"objectives {ttft_slo_s} s, {tbt_slo_s} s: must be positive")


def within(entry: Entry, ttft_slo_s: float, tbt_slo_s: float) -> bool:
    """Return whether a request was served and kept both objectives."""
    slow = entry.tbt is not None and entry.tbt.tail_s > tbt_slo_s
    return not entry.rejected and not entry.failed and entry.ttft_s <= ttft_slo_s and not slow


def summarize(world: World, ttft_slo_s: float = TTFT_SLO_S, tbt_slo_s: float = TBT_SLO_S) -> Summary:
    """Return what became of a world whose run has ended."""
    entries = world.entries
    prefilled = [entry for entry in entries if entry.ttft_s >= 0]
    served = [entry for entry in prefilled if not entry.rejected and not entry.failed]
    affected = [entry for entry in entries if entry.affected]
    length_s = max(entries[-1].trace.arrival_s - entries[0].trace.arrival_s, 1e-9)
    good = sum(within(entry, ttft_slo_s, tbt_slo_s) for entry in entries)
    asked = sum(entry.trace.input_tokens for entry in prefilled)
    busy = {name: one.engine.busy_s for name, one in world.instances.items()}
    prefills = [busy[name] for name, one in world.instances.items() if one.record.role != "decode"]
    decodes = [busy[name] for name, one in world.instances.items() if one.record.role != "prefill"]
    return Summary(
        requests=len(entries),
        length_s=length_s,
        simulated_s=world.ended_s,
        ttft_s=spread([entry.ttft_s for entry in served]),
        tbt_mean_s=spread([entry.tbt.mean_s for entry in served if entry.tbt is not None]),
        tbt_tail_s=spread([entry.tbt.tail_s for entry in served if entry.tbt is not None]),
        ttft_slo_s=ttft_slo_s,
        tbt_slo_s=tbt_slo_s,
        attainment=good / len(entries),
        goodput=good / length_s,
        rejected=_counted([entry.rejected for entry in entries]),
        hit_rate=sum(entry.hit_tokens for entry in prefilled) / max(1, asked),
        prefill_s=statistics.fmean([entry.prefill_s for entry in prefilled]) if prefilled else 0.0,
        wasted_prefill_s=sum(entry.prefill_s for entry in prefilled if entry.rejected),
        prefill_busy=_share(prefills, world.ended_s),
        decode_busy=_share(decodes, world.ended_s),
        prefill_imbalance=_imbalance(prefills),
        decode_imbalance=_imbalance(decodes),
        load_correlation=_correlation(world),
        fetches=world.fetches,
        fetched_bytes=world.fetched_bytes,
        switches=len(world.switches),
        gaps=sum(one.feed.gaps for one in world.instances.values()),
        failures=len(world.faults.happened),
        hosts=sum(one.host for one in world.faults.happened),
        affected=len(affected),
        retries=sum(entry.retries for entry in affected),
        moves=sum(entry.moves for entry in affected),
        twice_tokens=sum(entry.twice_tokens for entry in entries),
        affected_ttft_s=spread([entry.ttft_s for entry in affected if entry.ttft_s >= 0]),
        failed=_counted([entry.failed for entry in entries]),
        digest=digest(entries),
    )


def _counted(reasons: Sequence[str]) -> dict[str, int]:
    counts = Counter(filter(None, reasons))
    return {reason: counts[reason] for reason in sorted(counts)}


def digest(entries: Sequence[Entry]) -> str:
    """Return what is equal only if every request fared the same to the last bit."""
    lines = (
        f"{e.number} {e.rejected}{e.failed} {e.ttft_s!r} {e.tbt!r} {e.hit_tokens}"
        f" {'' if e.plan is None else (e.plan.prefill, e.plan.decode, e.plan.fetch_node)}"
        f"{f' {e.retries} {e.moves} {e.twice_tokens}' if e.affected else ''}\n"
        for e in entries
    )
    return sha256("".join(lines).encode()).hexdigest()[:16]


def _share(busy_s: Sequence[float], whole_s: float) -> float:
    return statistics.fmean(busy_s) / whole_s if busy_s and whole_s else 0.0


def _imbalance(busy_s: Sequence[float]) -> float:
    mean_s = statistics.fmean(busy_s) if busy_s else 0.0
    return max(busy_s) / mean_s if mean_s else 1.0


def _correlation(world: World) -> float:
    """Return that of both pools' mean load over the time of arrivals; 0 where one of them is constant."""
    end_s = world.entries[-1].trace.arrival_s
    samples = [one for one in world.samples if SETTLE_S <= one.at_s <= end_s and one.queue_s and one.tbt_s]
    if len(samples) < 3:
        return 0.0
    left = [statistics.fmean(one.queue_s) for one in samples]
    right = [statistics.fmean(one.tbt_s) for one in samples]
    if min(left) == max(left) or min(right) == max(right):
        return 0.0
    return statistics.correlation(left, right)


Line = tuple[str, list[str]]
"""Of a table: what it is, and one cell per run."""


def _line(name: str, cells: Sequence[str]) -> Line:
    return name, list(cells)


def spread_lines(name: str, spreads: Sequence[Spread], unit: float, digits: int) -> list[Line]:
    """Return the lines of a spread, one for each of its figures."""
    return [
        _line(f"{name} {field}", [f"{getattr(one, field) * unit:.{digits}f}" for one in spreads])
        for field in Spread.__struct_fields__
    ]


def rows(summaries: dict[str, Summary]) -> list[Line]:
    """Return the lines of a table with one column per run."""
    runs = list(summaries.values())

    slo = f"TTFT <= {runs[0].ttft_slo_s:g} s, TBT <= {runs[0].tbt_slo_s:g} s"
    reasons = dict.fromkeys(reason for run in runs for reason in run.rejected)
    return [
        *spread_lines("TTFT, s,", [run.ttft_s for run in runs], 1, 3),
        *spread_lines("TBT, ms,", [run.tbt_mean_s for run in runs], 1000, 1),
        *spread_lines("TBT, longest tenth, ms,", [run.tbt_tail_s for run in runs], 1000, 1),
        _line(f"within {slo}", [f"{run.attainment:.2%}" for run in runs]),
        _line("goodput, requests/s", [f"{run.goodput:.3f}" for run in runs]),
        _line("tokens found in the pool", [f"{run.hit_rate:.2%}" for run in runs]),
        _line("prefill, GPU s a request", [f"{run.prefill_s:.3f}" for run in runs]),
        _line("fetches between hosts", [f"{run.fetches:,}" for run in runs]),
        _line("prefill instances busy", [f"{run.prefill_busy:.1%}" for run in runs]),
        _line("decode instances busy", [f"{run.decode_busy:.1%}" for run in runs]),
        _line("busiest prefill / mean", [f"{run.prefill_imbalance:.2f}" for run in runs]),
        _line("busiest decode / mean", [f"{run.decode_imbalance:.2f}" for run in runs]),
        _line("correlation of both loads", [f"{run.load_correlation:+.2f}" for run in runs]),
        _line("rejected", [f"{sum(run.rejected.values()):,}" for run in runs]),
        *(_line(f"  {why}", [f"{run.rejected.get(why, 0):,}" for run in runs]) for why in reasons),
        _line("prefill wasted, GPU s", [f"{run.wasted_prefill_s:,.0f}" for run in runs]),
        *_failures(runs),
        _line("digest", [run.digest for run in runs]),
    ]


def _failures(runs: Sequence[Summary]) -> list[Line]:
    """Return what became of those whose engine broke down; nothing if none did."""
    if not any(run.failures for run in runs):
        return []
    reasons = dict.fromkeys(reason for run in runs for reason in run.failed)
    return [
        _line("engines broken down", [f"{run.failures:,} ({run.hosts:,} with host)" for run in runs]),
        _line("requests that lost a leg", [f"{run.affected:,}" for run in runs]),
        _line("  legs begun again before the first token", [f"{run.retries:,}" for run in runs]),
        _line("  after it", [f"{run.moves:,}" for run in runs]),
        _line("  tokens computed again", [f"{run.twice_tokens:,}" for run in runs]),
        _line("  their TTFT, s, mean", [f"{run.affected_ttft_s.mean:.3f}" for run in runs]),
        _line("  their TTFT, s, p99", [f"{run.affected_ttft_s.p99:.3f}" for run in runs]),
        _line("failed", [f"{sum(run.failed.values()):,}" for run in runs]),
        *(_line(f"  {why}", [f"{run.failed.get(why, 0):,}" for run in runs]) for why in reasons),
    ]
