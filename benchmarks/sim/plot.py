"""`mooncake simulate --plot FILE`: all charts of one or several runs in one picture."""

import itertools
import os
from pathlib import Path

from benchmarks.sim.charts import Runs, charts_of, pyplot
from mooncake.core.errors import ConfigError


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
