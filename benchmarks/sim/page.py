"""`mooncake simulate --report DIR`: one HTML page with everything in it, and its pictures as files.

The folder appears as a whole: it is made beside its place and then renamed, so that whoever stops a run finds
the report of before, or none.
"""

import base64
import contextlib
import html
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sim.charts import Chart, Runs, charts_of, pyplot
from benchmarks.sim.report import rows
from mooncake.core.errors import ConfigError

INDEX = "index.html"
DATA = "results.json"
DPI = 110

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c }
body { max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.15em; margin: 2em 0 .3em }
p { margin: .3em 0; color: #444 } img { width: 100%; height: auto }
code { background: #f3f3f3; padding: .1em .3em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: .6em }
th, td { padding: .18em .9em; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left; white-space: pre }
th { border-bottom: 2px solid #999 } .heads { display: flex; flex-wrap: wrap; gap: 1em; margin: 1em 0 }
.head { border: 1px solid #ddd; border-radius: 6px; padding: .6em 1em } .head b { font-size: 1.3em }
"""


def check(folder: Path) -> None:
    """Pass if a report can be written there; called before the run, not after it.

    Raises:
        ConfigError: matplotlib is not installed, or the folder is something else.
    """
    pyplot("--report")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"report {folder}: there is no folder {folder.absolute().parent}")
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise ConfigError(f"report {folder}: is there and is no report; choose another folder")


def write(folder: Path, results: Runs, title: str, command: str, data: bytes) -> None:
    """Write the report; an older one at its place is replaced.

    Args:
        folder: has passed `check`.
        results: by name.
        title: what was run.
        command: by which anybody gets the same again.
        data: the figures, as JSON.

    Raises:
        ConfigError: it cannot be written.
    """
    charts = charts_of(results)
    target = folder.absolute()
    part, old = (target.with_name(f".{target.name}.{kind}{os.getpid()}") for kind in ("part", "old"))
    try:
        part.mkdir()
        pictures = [_picture(chart, results) for chart in charts]
        for chart, picture in zip(charts, pictures, strict=True):
            (part / f"{chart.name}.png").write_bytes(picture)
        (part / INDEX).write_text(page(results, title, command, charts, pictures), encoding="utf-8")
        (part / DATA).write_bytes(data)
        if target.exists():
            target.rename(old)
        part.rename(target)
    except OSError as error:
        raise ConfigError(f"report {folder}: {error.strerror or error}") from None
    finally:
        if old.exists() and not target.exists():
            with contextlib.suppress(OSError):
                old.rename(target)
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


def page(results: Runs, title: str, command: str, charts: Sequence[Chart], pictures: Sequence[bytes]) -> str:
    """Return the page; it needs no other file and no network."""
    shown = "\n".join(_shown(chart, picture) for chart, picture in zip(charts, pictures, strict=True))
    nobody = "" if any(chart.name == "refused" for chart in charts) else "<p>Every request was served.</p>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>mooncake simulate: {html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        "<p>The production Conductor and stores in virtual time; engines, links and failures are simulated."
        f" Again: <code>{html.escape(command)}</code></p>\n"
        f"{_heads(results)}\n{nobody}{shown}\n<h2>All figures</h2>\n{_table(results)}\n"
        "<p>Percentiles are of served requests. GPU s: seconds of a whole instance. The digest is equal only"
        " if every request fared the same to the last bit.</p>\n</body>\n</html>\n"
    )


def _shown(chart: Chart, picture: bytes) -> str:
    title, caption = html.escape(chart.title), html.escape(chart.caption)
    data = base64.b64encode(picture).decode()
    return f'<h2>{title}</h2>\n<p>{caption}</p>\n<img alt="{title}" src="data:image/png;base64,{data}">'


def _heads(results: Runs) -> str:
    """What is asked first, of every run."""
    heads = []
    for name, result in results.items():
        run = result.summary
        heads.append(
            f'<div class="head">{html.escape(name)}<br><b>{run.attainment:.1%}</b> of {run.requests:,} within'
            f" TTFT {run.ttft_slo_s:g} s and TBT {run.tbt_slo_s * 1000:g} ms<br>"
            f"mean TTFT <b>{run.ttft_s.mean:.2f} s</b>, from the pool <b>{run.hit_rate:.1%}</b></div>"
        )
    return f'<div class="heads">{"".join(heads)}</div>'


def _table(results: Runs) -> str:
    lines = rows({name: result.summary for name, result in results.items()})
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *results))
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *cells)) + "</tr>"
        for name, cells in lines
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _picture(chart: Chart, results: Runs) -> bytes:
    plt = pyplot("--report")
    columns = min(2, len(chart.panels))
    lines = -(-len(chart.panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(13.2, 4.4 * lines), layout="constrained", squeeze=False
    )
    places = list(axes.flat)
    for place, panel in zip(places, chart.panels, strict=False):
        panel(place, results)
    for place in places[len(chart.panels) :]:
        place.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    plt.close(figure)
    return content.getvalue()


def _is_ours(folder: Path) -> bool:
    """Whether everything in it is of a report: nothing else is ever deleted."""
    return all(path.name in {INDEX, DATA} or path.suffix == ".png" for path in folder.iterdir())
