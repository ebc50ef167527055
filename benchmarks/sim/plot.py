"""`mooncake simulate --plot FILE`: all charts of one or several runs in one picture."""

import itertools

from benchmarks.sim.charts import Runs, charts_of, pyplot, save


def plot(path: str, results: Runs, title: str) -> None:
    """Write the picture (.svg, .png or .pdf).

    Raises:
        ConfigError: matplotlib is not installed, or cannot write such a file.
    """
    plt = pyplot("--plot")
    rows = [
        panels
        for chart in charts_of(results)
        for panels in itertools.zip_longest(chart.panels[::2], chart.panels[1::2])
    ]
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(13, 4.6 * len(rows)), layout="constrained", squeeze=False
    )
    for row, panels in zip(axes, rows, strict=True):
        for one, panel in zip(row, panels, strict=True):
            if panel is None:
                one.set_axis_off()
            else:
                panel(one, results)
    figure.suptitle(title, fontsize=13)
    save(figure, path)
