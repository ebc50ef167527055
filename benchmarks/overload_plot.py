"""The picture of `benchmarks.overload`: requests, first tokens, rejections and memory over time."""

from collections.abc import Sequence
from typing import Any

from benchmarks.replay.client import Outcome
from benchmarks.replay.report import within
from benchmarks.sim.charts import COLOURS, RED, pyplot, save

BINS = 40

Pair = tuple[float, float]


def draw(path: str, outcomes: Sequence[Outcome], memory: Any, slo_s: Pair, spans_s: Pair) -> None:
    """Draw one judged run; `spans_s`: how long the usual load was sent, and then twice the peak.

    Raises:
        ConfigError: matplotlib is missing, or cannot write such a file.
    """
    plt = pyplot("--plot")
    figure, panels = plt.subplots(4, 1, figsize=(11, 13), layout="constrained", sharex=True)
    base_s, over_s = spans_s
    _counts(panels[0], outcomes, slo_s, 2 * base_s + over_s)
    served = [one for one in outcomes if not one.error]
    good = [one for one in served if within(one, *slo_s)]
    late = [one for one in served if not within(one, *slo_s)]
    for group, colour, label in ((good, COLOURS[0], "within objectives"), (late, RED, "not")):
        panels[1].scatter([o.due_s for o in group], [o.ttft_s for o in group], s=8, color=colour, label=label)
    panels[1].axhline(slo_s[0], color="grey", linestyle="--", linewidth=1)
    panels[1].set(ylabel="TTFT (s)", yscale="log")
    refused = [one for one in outcomes if one.is_refused]
    panels[2].scatter(
        [o.due_s for o in refused], [o.answered_s * 1e3 for o in refused], s=8, color=RED, label="429, 503"
    )
    panels[2].axhline(50, color="grey", linestyle="--", linewidth=1)
    panels[2].set(ylabel="rejected after (ms)", ylim=(0, None))
    times = [at_s for at_s, _ in memory]
    for colour, name in zip(COLOURS, memory[0][1], strict=False):
        sizes = [(found.get(name, 0) - memory[0][1][name]) / 1e6 for _, found in memory]
        panels[3].plot(times, sizes, color=colour, label=name, linewidth=1)
    panels[3].set(xlabel="time due (s)", ylabel="memory grown (MB)")
    for axes in panels:
        axes.axvspan(base_s, base_s + over_s, color="grey", alpha=0.12)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", fontsize=8)
    figure.suptitle("twice the sustainable load (shaded)")
    save(figure, path)


def _counts(axes: Any, outcomes: Sequence[Outcome], slo_s: Pair, length_s: float) -> None:
    width_s = length_s / BINS
    counts = {"sent": [0] * BINS, "within objectives": [0] * BINS, "rejected": [0] * BINS}
    for one in outcomes:
        at = min(BINS - 1, int(one.due_s / width_s))
        counts["sent"][at] += 1
        counts["rejected"][at] += one.is_refused
        counts["within objectives"][at] += within(one, *slo_s)
    times = [number * width_s for number in range(BINS)]
    for (label, found), colour in zip(counts.items(), ("grey", COLOURS[0], RED), strict=True):
        axes.step(times, [n / width_s for n in found], where="post", label=label, color=colour)
    axes.set(ylabel="requests per second", ylim=(0, None))
