"""One picture of one or several runs: distributions, load over time, what was turned away."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.sim.nouns import Sample
from benchmarks.sim.run import Result
from mooncake.core.errors import ConfigError


def plot(path: str, results: dict[str, Result], title: str) -> None:
    """Write the picture (.svg, .png or .pdf).

    Raises:
        ConfigError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'mooncake-serving[bench]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(16, 8.5), layout="constrained")
    first = next(iter(results.values())).summary
    _cdf(panels[0][0], {name: r.ttft_s for name, r in results.items()}, "TTFT (s)", first.ttft_slo_s)
    tails = {name: r.tbt_tail_s for name, r in results.items()}
    _cdf(panels[0][1], tails, "TBT, longest tenth (s)", first.tbt_slo_s)
    _rejected(panels[0][2], results)
    _over_time(panels[1][0], results, lambda s: s.queue_s, "predicted prefill queue (s), mean of instances")
    _over_time(panels[1][1], results, lambda s: s.tbt_s, "decode step (s), mean of instances")
    _bars(panels[1][2], results)
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot {path}: {error}") from None
    finally:
        plt.close(figure)


def _cdf(axes: Any, values: dict[str, list[float]], label: str, objective: float) -> None:
    for name, seconds in values.items():
        ordered = sorted(seconds)
        axes.plot(ordered, [(at + 1) / len(ordered) for at in range(len(ordered))], label=name)
    axes.axvline(objective, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel=label, ylabel="share of requests", xscale="log", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()


def _over_time(
    axes: Any, results: dict[str, Result], of: Callable[[Sample], Sequence[float]], label: str
) -> None:
    for name, result in results.items():
        there = [sample for sample in result.samples if of(sample)]
        means = [statistics.fmean(of(sample)) for sample in there]
        axes.plot([sample.at_s for sample in there], means, label=name, linewidth=1)
    axes.set(xlabel="time (s)", ylabel=label)
    axes.grid(alpha=0.3)


def _rejected(axes: Any, results: dict[str, Result]) -> None:
    reasons = dict.fromkeys(reason for result in results.values() for reason in result.summary.rejected)
    names = list(results)
    below = [0] * len(names)
    for reason in reasons:
        counts = [results[name].summary.rejected.get(reason, 0) for name in names]
        axes.bar(names, counts, bottom=below, label=reason)
        below = [left + right for left, right in zip(below, counts, strict=True)]
    if reasons:
        axes.legend(fontsize="small")
    else:
        axes.bar(names, below)
    axes.set(ylabel="requests turned away")


def _bars(axes: Any, results: dict[str, Result]) -> None:
    names = list(results)
    at = range(len(names))
    axes.bar([x - 0.2 for x in at], [r.summary.hit_rate for r in results.values()], 0.4, label="hit rate")
    kept = [r.summary.attainment for r in results.values()]
    axes.bar([x + 0.2 for x in at], kept, 0.4, label="within objectives")
    axes.set(ylim=(0, 1.02))
    axes.set_xticks(list(at), names)
    axes.legend()
