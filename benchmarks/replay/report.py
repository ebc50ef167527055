"""What a replay says of an endpoint: one summary per run, the lines of a table, a picture."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from benchmarks.replay.client import BROKEN_OFF, LATE, NOT_SENT, Outcome
from benchmarks.sim.charts import pyplot, save
from benchmarks.sim.report import Line, Spread, spread, spread_lines

LATE_S = 0.1
"""Sent later than this at p99: the figures say something of this machine, not of the endpoint."""
TAIL = 10
"""TBT of a request is judged by the mean of its longest tenth of intervals, as in `mooncake simulate`."""
KINDS_MAX = 8
"""Kinds of errors told one by one."""
BIN_S_MIN = 1.0
BINS = 60


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Shares are of all requests, those turned away included; `hit_rate` is by tokens.

    served: answered to the end. rejected: by status; failed: by what went wrong.
    rejection_s: how long a refusal took; attainment: share within both objectives; goodput: those per second.
    output_s: output tokens per second of the run.
    """

    requests: int
    length_s: float
    ran_s: float
    served: int
    rejected: dict[str, int]
    without_retry_after: int
    failed: dict[str, int]
    ttft_s: Spread
    tbt_s: Spread
    tbt_tail_s: Spread
    end_to_end_s: Spread
    rejection_s: Spread
    late_s: Spread
    ttft_slo_s: float
    tbt_slo_s: float
    attainment: float
    goodput: float
    hit_rate: float
    input_tokens: int
    output_tokens: int
    output_s: float
    in_flight_max: int
    digest: str


def tail_s(outcome: Outcome) -> float:
    """Return the mean of a request's longest tenth of intervals between tokens; 0 without any."""
    if not outcome.gaps_s:
        return 0.0
    longest = sorted(outcome.gaps_s, reverse=True)[: -(-len(outcome.gaps_s) // TAIL)]
    return statistics.fmean(longest)


def within(outcome: Outcome, ttft_slo_s: float, tbt_slo_s: float) -> bool:
    """Return whether a request was answered to its end and kept both objectives."""
    return not outcome.error and 0 <= outcome.ttft_s <= ttft_slo_s and tail_s(outcome) <= tbt_slo_s


def summarize(outcomes: Sequence[Outcome], ttft_slo_s: float, tbt_slo_s: float, digest: str = "") -> Summary:
    """Return what became of the requests of one run."""
    served = [one for one in outcomes if not one.error]
    refused = [one for one in outcomes if one.is_refused]
    failed = Counter(_kind(one) for one in outcomes if one.error and not one.is_refused)
    told = dict(failed.most_common(KINDS_MAX))
    if more := sum(failed.values()) - sum(told.values()):
        told["others"] = more
    length_s = max(outcomes[-1].due_s - outcomes[0].due_s, 1e-9)
    ran_s = max(max(one.end_s for one in outcomes) - outcomes[0].due_s, 1e-9)
    good = sum(within(one, ttft_slo_s, tbt_slo_s) for one in outcomes)
    asked = sum(one.input_tokens for one in served)
    return Summary(
        requests=len(outcomes),
        length_s=length_s,
        ran_s=ran_s,
        served=len(served),
        rejected=dict(sorted(Counter(str(one.status) for one in refused).items())),
        without_retry_after=sum(one.retry_after_s < 0 for one in refused),
        failed=told,
        ttft_s=spread([one.ttft_s for one in served if one.ttft_s >= 0]),
        tbt_s=spread([gap_s for one in served for gap_s in one.gaps_s]),
        tbt_tail_s=spread([tail_s(one) for one in served if one.gaps_s]),
        end_to_end_s=spread([one.end_s - one.due_s - one.late_s for one in served]),
        rejection_s=spread([one.answered_s for one in refused]),
        late_s=spread([one.late_s for one in outcomes if one.late_s >= 0]),
        ttft_slo_s=ttft_slo_s,
        tbt_slo_s=tbt_slo_s,
        attainment=good / len(outcomes),
        goodput=good / max(length_s, ran_s),
        hit_rate=sum(one.cached_tokens for one in served) / max(1, asked),
        input_tokens=asked,
        output_tokens=sum(one.output_tokens for one in served),
        output_s=sum(one.output_tokens for one in served) / ran_s,
        in_flight_max=max((count for _, count in in_flight(outcomes)), default=0),
        digest=digest,
    )


def _kind(outcome: Outcome) -> str:
    if outcome.error in {BROKEN_OFF, NOT_SENT, LATE}:
        return outcome.error
    if outcome.status not in {0, 200}:
        return f"status {outcome.status}: {outcome.error}"
    return outcome.error.partition(":")[0]


def in_flight(outcomes: Sequence[Outcome]) -> list[tuple[float, int]]:
    """Return (time, requests in flight from then on) of every change."""
    changes = [(one.due_s + one.late_s, 1) for one in outcomes if one.late_s >= 0]
    changes += [(one.end_s, -1) for one in outcomes if one.late_s >= 0 and one.end_s >= 0]
    found, count = [], 0
    for at_s, change in sorted(changes):
        count += change
        found.append((at_s, count))
    return found


def rows(summaries: dict[str, Summary]) -> list[Line]:
    """Return the lines of a table with one column per run."""
    runs = list(summaries.values())

    slo = f"TTFT <= {runs[0].ttft_slo_s:g} s, TBT <= {runs[0].tbt_slo_s:g} s"
    statuses = dict.fromkeys(status for run in runs for status in run.rejected)
    errors = dict.fromkeys(error for run in runs for error in run.failed)
    refused = any(run.rejected for run in runs)
    return [
        *spread_lines("TTFT, s,", [run.ttft_s for run in runs], 1, 3),
        *spread_lines("TBT, ms,", [run.tbt_s for run in runs], 1000, 1),
        *spread_lines("TBT, longest tenth, ms,", [run.tbt_tail_s for run in runs], 1000, 1),
        (f"within {slo}", [f"{run.attainment:.2%}" for run in runs]),
        ("goodput, requests/s", [f"{run.goodput:.3f}" for run in runs]),
        ("prompt tokens cached", [f"{run.hit_rate:.2%}" for run in runs]),
        ("tokens in", [f"{run.input_tokens:,}" for run in runs]),
        ("tokens out, per s", [f"{run.output_tokens:,}, {run.output_s:,.1f}" for run in runs]),
        ("answered of sent", [f"{run.served:,} of {run.requests:,}" for run in runs]),
        *(
            (f"rejected, {status}", [f"{run.rejected.get(status, 0):,}" for run in runs])
            for status in statuses
        ),
        *(spread_lines("rejected after, ms,", [run.rejection_s for run in runs], 1000, 1) if refused else ()),
        *((f"failed: {error}", [f"{run.failed.get(error, 0):,}" for run in runs]) for error in errors),
        ("in flight, most", [f"{run.in_flight_max:,}" for run in runs]),
        ("sent late, ms p99", [f"{run.late_s.p99 * 1000:.1f}" for run in runs]),
        ("took, s", [f"{run.ran_s:.1f}" for run in runs]),
        ("requests, digest", [run.digest for run in runs]),
    ]


def warnings(summaries: dict[str, Summary]) -> list[str]:
    """Return what a reader must know before trusting the figures."""
    found = []
    for name, run in summaries.items():
        if run.late_s.p99 > LATE_S:
            found.append(
                f"{name}: one request in a hundred was sent {run.late_s.p99:.2f} s late: this process was"
                " short of CPU, so take a lower --speed or --scale, or another machine"
            )
        if run.without_retry_after:
            found.append(f"{name}: {run.without_retry_after} refusals came without Retry-After")
        if not run.served:
            found.append(f"{name}: nothing was answered; latencies of nothing are shown as 0")
    return found


def plot(path: str, runs: dict[str, Sequence[Outcome]], title: str, slo_s: tuple[float, float]) -> None:
    """Draw distributions and load over time (.svg, .png or .pdf).

    Raises:
        ConfigError: matplotlib is not installed, or cannot write such a file.
    """
    plt = pyplot("--plot")
    figure, panels = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    _cdf(panels[0][0], runs, lambda one: one.ttft_s, "TTFT (s)", slo_s[0])
    _cdf(panels[0][1], runs, tail_s, "TBT, longest tenth (s)", slo_s[1])
    for name, outcomes in runs.items():
        changes = in_flight(outcomes)
        panels[1][0].step(*zip(*changes, strict=True), where="post", label=name, linewidth=1)
    panels[1][0].set(xlabel="time (s)", ylabel="requests in flight")
    panels[1][0].grid(alpha=0.3)
    panels[1][0].legend()
    _ends(panels[1][1], runs, slo_s)
    figure.suptitle(title)
    save(figure, path)


def _cdf(
    axes: Any, runs: dict[str, Sequence[Outcome]], of: Callable[[Outcome], float], label: str, slo_s: float
) -> None:
    for name, outcomes in runs.items():
        values = [0.0 if one.error else of(one) for one in outcomes]
        found = sorted(value for value in values if value > 0)
        # of all that could have such a time: a curve that ends below 1 shows what was not answered
        count = len(found) + sum(bool(one.error) for one in outcomes)
        axes.plot(found, [(at + 1) / count for at in range(len(found))], label=name)
    axes.axvline(slo_s, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel=label, ylabel="share of requests", xscale="log", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()


def _ends(axes: Any, runs: dict[str, Sequence[Outcome]], slo_s: tuple[float, float]) -> None:
    """Requests by when they were due: how many a second, and how many of those were served well."""
    last_s = max(one.due_s for outcomes in runs.values() for one in outcomes)
    width_s = max(BIN_S_MIN, last_s / BINS)
    times = [number * width_s for number in range(int(last_s / width_s) + 1)]
    for number, (name, outcomes) in enumerate(runs.items()):
        counts = {"due": [0] * len(times), "within": [0] * len(times)}
        for one in outcomes:
            at = int(one.due_s / width_s)
            counts["due"][at] += 1
            counts["within"][at] += within(one, *slo_s)
        if not number:
            due = [count / width_s for count in counts["due"]]
            axes.fill_between(times, due, step="post", color="grey", alpha=0.25, label="due")
        served = [count / width_s for count in counts["within"]]
        axes.step(times, served, where="post", label=f"{name}, within objectives", linewidth=1)
    axes.set(xlabel="time due (s)", ylabel="requests per second")
    axes.grid(alpha=0.3)
    axes.legend()
