"""The pictures of one or several runs: distributions, load over time, cache, who was turned away.

Each chart draws on axes that it is given, so that a page shows them one by one, and `--plot` all in one file.
"""

import itertools
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.sim.nouns import Sample
from benchmarks.sim.run import Fate, Result
from mooncake.core.errors import ConfigError
from mooncake.core.messages import DRAINING

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito: told apart by those, too, who see fewer colours; no yellow, which white swallows."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
"""And by those who print without any."""
BINS = 30
"""Of a run's time: what is counted over time is noise in shorter ones."""
ENDINGS_MAX = 6
"""Reasons with a colour of their own; the rest is one."""
NARROW = 300
"""Within such a range there is room for numbers between the powers of ten, too."""
RED = "#B00020"
FEW = 12
"""Marks that get a line each; more would be all that is seen."""

LATENCY = """Share of the served requests below a value. TTFT: time to first token. TBT: time between tokens,
the mean of each request's longest tenth. Who is left of the grey line kept the objective."""
LOAD = """Left: seconds of work that the Conductor has given to a prefill instance. Right: requests that a
decode instance decodes together. Lines are the mean of the instances; of a single run, the shade reaches from
the least to the most loaded one, and thin lines mark changes of roles and failures."""
CACHE = """Left: share of the prompts' tokens that was found in the pool, by time of arrival. Right: of the
whole run."""
REFUSED = """Requests that were not served, by time of arrival and by reason. What was computed for those that
were refused after prefill was wasted."""
ROLES = """Instances that run, by role. Triangles are changes of role, crosses failures of engines, with a
ring where the host and its store went, too."""

Runs = Mapping[str, Result]


class Chart(msgspec.Struct, frozen=True):
    """One picture: its file's name, what it shows, how to read it, its panels from left to right."""

    name: str
    title: str
    caption: str
    panels: tuple[Callable[[Any, Runs], None], ...]


def pyplot(option: str) -> Any:
    """Return matplotlib's, ready to draw without a screen.

    Args:
        option: which asked for it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError(f"{option} needs matplotlib: pip install 'mooncake-serving[bench]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.6,
        }
    )
    return plt


def save(figure: Any, path: str) -> None:
    """Write a picture (.svg, .png or .pdf), whole or not at all, and close it.

    Raises:
        ConfigError: matplotlib cannot write such a file.
    """
    from matplotlib import pyplot as plt

    target = Path(path)
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        figure.savefig(part)
        part.replace(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)


def charts_of(runs: Runs) -> list[Chart]:
    """Return the charts that have something to show."""
    charts = [
        Chart("latency", "How long requests waited", LATENCY, (ttft, tbt)),
        Chart("load", "Load over time, by role", LOAD, (prefill_load, decode_load)),
        Chart("cache", "What the pool saved", CACHE, (hits_over_time, hits)),
    ]
    if any(one.ending for run in runs.values() for one in run.fates):
        charts.append(Chart("refused", "Who was not served, and why", REFUSED, (refused_over_time, refused)))
    if any(run.switches or run.failures for run in runs.values()):
        panels = tuple(_roles(name) for name in runs)
        charts.append(Chart("roles", "Instances over time", ROLES, panels))
    return charts


# ---------------------------------------------------------------- distributions


def ttft(axes: Any, runs: Runs) -> None:
    """Draw the distribution of the time to first token."""
    values = {name: run.ttft_s for name, run in runs.items()}
    _cdf(axes, values, 1.0, "s", _first(runs).ttft_slo_s)
    axes.set(title="Time to first token", xlabel="TTFT, s (log)")


def tbt(axes: Any, runs: Runs) -> None:
    """Draw the distribution of the longest tenths of times between tokens."""
    values = {name: run.tbt_tail_s for name, run in runs.items()}
    _cdf(axes, values, 1000.0, "ms", _first(runs).tbt_slo_s)
    axes.set(title="Time between tokens, longest tenth", xlabel="TBT, ms (log)")


def _cdf(
    axes: Any, values: Mapping[str, Sequence[float]], unit: float, unit_name: str, objective_s: float
) -> None:
    for name, colour, style in _styles(values):
        ordered = sorted(value * unit for value in values[name])
        if not ordered:
            continue
        last = len(ordered) - 1
        half, most = ordered[round(0.5 * last)], ordered[round(0.9 * last)]
        label = f"{name}: p50 {half:.3g} {unit_name}, p90 {most:.3g} {unit_name}"
        shares = [(at + 1) / len(ordered) for at in range(len(ordered))]
        axes.plot(ordered, shares, label=label, color=colour, linestyle=style)
    axes.set(ylabel="share of served requests", xscale="log", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_xlim()
    marked = "235" if high < low * NARROW else ""
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in marked else "")
    axes.tick_params(axis="x", which="minor", labelsize=8, labelcolor="#555555")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    label = f"objective {objective_s * unit:g} {unit_name}"
    axes.axvline(objective_s * unit, color="#777777", linestyle="--", linewidth=1, label=label)
    _legend(axes, 2)


# ---------------------------------------------------------------- over time


def prefill_load(axes: Any, runs: Runs) -> None:
    """Draw the queues of prefill instances."""
    _over_time(axes, runs, lambda sample: sample.queue_s)
    axes.set(title="Prefill: work that waits", ylabel="predicted queue of an instance, s")


def decode_load(axes: Any, runs: Runs) -> None:
    """Draw the batches of decode instances."""
    _over_time(axes, runs, lambda sample: sample.batch)
    axes.set(title="Decode: requests in a batch", ylabel="requests of an instance")


def _over_time(axes: Any, runs: Runs, of: Callable[[Sample], Sequence[float]]) -> None:
    for name, colour, style in _styles(runs):
        there = [sample for sample in runs[name].samples if of(sample)]
        at_s = [sample.at_s for sample in there]
        if len(runs) == 1:
            low, high = [min(of(one)) for one in there], [max(of(one)) for one in there]
            axes.fill_between(at_s, low, high, color=colour, alpha=0.18, linewidth=0)
        means = [statistics.fmean(of(sample)) for sample in there]
        label = "mean" if len(runs) == 1 else name
        axes.plot(at_s, means, label=label, color=colour, linestyle=style)
    _time(axes, runs)
    if len(runs) == 1:
        _marks(axes, _only(runs))
    else:
        _legend(axes, 3)


def _time(axes: Any, runs: Runs, *, arrivals: bool = False) -> None:
    """Share the axis of time of all panels; `arrivals`: until the last of them."""
    ends = [run.fates[-1].arrival_s if arrivals else run.summary.simulated_s for run in runs.values()]
    end_s = max(*ends, 1e-9)
    axes.set(xlabel="time, s", xlim=(0, end_s))
    axes.set_ylim(bottom=0)


def _marks(axes: Any, run: Result) -> None:
    """Mark changes of roles and failures, as long as they are few."""
    marks = {
        "instance to prefill": (
            [at_s for at_s, _, role in run.switches if role == "prefill"],
            COLOURS[2],
            ":",
        ),
        "instance to decode": ([at_s for at_s, _, role in run.switches if role == "decode"], COLOURS[3], ":"),
        "engine failed": ([failure.at_s for failure in run.failures], RED, "-."),
    }
    for label, (moments, colour, style) in marks.items():
        for number, at_s in enumerate(moments if len(moments) <= FEW else ()):
            named = {} if number else {"label": label}
            axes.axvline(at_s, color=colour, linewidth=1.1, linestyle=style, **named)
    _legend(axes, 4)


def hits_over_time(axes: Any, runs: Runs) -> None:
    """Draw the hit rate of the requests that came at about the same time."""
    for name, colour, style in _styles(runs):
        found = []
        for at_s, some in _bins(runs, name):
            begun = [one for one in some if one.ttft_s >= 0]
            if begun:
                tokens = sum(one.input_tokens for one in begun)
                found.append((at_s, sum(one.hit_tokens for one in begun) / tokens))
        if found:
            label = "mean" if len(runs) == 1 else name
            axes.plot(*zip(*found, strict=True), label=label, color=colour, linestyle=style)
    _time(axes, runs, arrivals=True)
    axes.set(title="Tokens found in the pool, over time", ylabel="share of prompts' tokens", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if len(runs) == 1:
        _marks(axes, _only(runs))
    else:
        _legend(axes, 3)


def hits(axes: Any, runs: Runs) -> None:
    """Draw the hit rates, and the shares that kept both objectives."""
    names = list(runs)
    bars = {
        "tokens found in the pool": ([run.summary.hit_rate for run in runs.values()], COLOURS[0], -0.2),
        "within both objectives": ([run.summary.attainment for run in runs.values()], COLOURS[2], 0.2),
    }
    for label, (values, colour, shift) in bars.items():
        drawn = axes.barh([at + shift for at in range(len(names))], values, 0.36, label=label, color=colour)
        axes.bar_label(drawn, [f"{value:.1%}" for value in values], padding=3, fontsize=9)
    _names(axes, names)
    axes.set(title="Over the whole run", xlabel="share", xlim=(0, 1.15))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
    _legend(axes, 2)


# ---------------------------------------------------------------- turned away


def refused_over_time(axes: Any, runs: Runs) -> None:
    """Draw the share of requests that were not served."""
    most = 0.05
    for name, colour, style in _styles(runs):
        found = [
            (at_s, sum(bool(one.ending) for one in some) / len(some)) for at_s, some in _bins(runs, name)
        ]
        most = max(most, *(share for _, share in found))
        axes.plot(*zip(*found, strict=True), label=name, color=colour, linestyle=style)
    _time(axes, runs, arrivals=True)
    axes.set(
        title="Not served, over time", ylabel="share of requests that came", ylim=(0, min(1.02, 1.2 * most))
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if len(runs) > 1:
        _legend(axes, 3)


def refused(axes: Any, runs: Runs) -> None:
    """Draw who was not served, by reason."""
    names = list(runs)
    counts = {name: Counter(one.ending for one in run.fates if one.ending) for name, run in runs.items()}
    total: Counter[str] = Counter()
    for one in counts.values():
        total.update(one)
    # the same order for the same counts
    reasons = sorted(total, key=lambda reason: (-total[reason], reason))
    shown = reasons if len(reasons) <= ENDINGS_MAX else [*reasons[: ENDINGS_MAX - 1], ""]
    left = [0] * len(names)
    for reason, colour in zip(shown, COLOURS, strict=False):
        several = [reason] if reason else reasons[ENDINGS_MAX - 1 :]
        values = [sum(counts[name][one] for one in several) for name in names]
        axes.barh(range(len(names)), values, 0.5, left=left, label=reason or "other", color=colour)
        left = [before + value for before, value in zip(left, values, strict=True)]
    for at, value in enumerate(left):
        share = value / len(runs[names[at]].fates)
        axes.annotate(
            f"{value:,} ({share:.1%})", (value, at), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    _names(axes, names)
    axes.set(title="Not served, by reason", xlabel="requests", xlim=(0, max(*left, 1) * 1.3))
    _legend(axes, 1)


# ---------------------------------------------------------------- roles


def _roles(name: str) -> Callable[[Any, Runs], None]:
    """Return the chart of one run's instances."""

    def draw(axes: Any, runs: Runs) -> None:
        run = runs[name]
        at_s = [sample.at_s for sample in run.samples]
        roles = dict.fromkeys(role for sample in run.samples for role in sample.up)
        highest = 1
        for role, colour in zip(sorted(roles, reverse=True), COLOURS, strict=False):
            counts = [sample.up.get(role, 0) for sample in run.samples]
            highest = max(highest, *counts)
            style = ":" if role == DRAINING else "-"
            axes.step(at_s, counts, where="post", label=role, color=colour, linestyle=style)
        above = highest * 1.12
        for up, marker, label in ((True, "^", "to prefill"), (False, "v", "to decode")):
            moments = [at for at, _, role in run.switches if (role == "prefill") is up]
            if moments:
                axes.plot(
                    moments, [above] * len(moments), marker, color=COLOURS[2 + up], label=label, markersize=7
                )
        if run.failures:
            moments = [one.at_s for one in run.failures]
            axes.plot(moments, [highest * 1.24] * len(moments), "x", color=RED, label="engine failed")
        if hosts := [one.at_s for one in run.failures if one.host]:
            axes.plot(
                hosts, [highest * 1.24] * len(hosts), "o", color=RED, label="with its host",
                markersize=11, fillstyle="none",
            )  # fmt: skip
        _time(axes, {name: run})
        axes.set(title=f"Instances: {name}", ylabel="instances that run", ylim=(0, highest * 1.36))
        axes.yaxis.get_major_locator().set_params(integer=True)
        _legend(axes, 6)

    return draw


# ---------------------------------------------------------------- inside


def _styles(names: Mapping[str, object]) -> Iterator[tuple[str, str, Any]]:
    return zip(names, itertools.cycle(COLOURS), itertools.cycle(STYLES))


def _legend(axes: Any, columns: int) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns)


def _names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 2) - 0.4, -0.6)  # the first one on top
    axes.grid(visible=False, axis="y")


def _first(runs: Runs) -> Any:
    return next(iter(runs.values())).summary


def _only(runs: Runs) -> Result:
    (run,) = runs.values()
    return run


def _bins(runs: Runs, name: str) -> list[tuple[float, list[Fate]]]:
    """Return a run's requests by time of arrival, and the middle of each time."""
    fates = runs[name].fates
    width_s = max(fates[-1].arrival_s / BINS, 1e-9)
    found: dict[int, list[Fate]] = {}
    for one in fates:
        found.setdefault(min(BINS - 1, int(one.arrival_s / width_s)), []).append(one)
    return [((at + 0.5) * width_s, some) for at, some in found.items()]
