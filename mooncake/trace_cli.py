"""What `mooncake simulate` and `mooncake bench` share: options of a trace, the table, the file of figures.

Imports nothing heavy before it runs, as mooncake.cli.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

TTFT_SLO_S, TBT_SLO_S = 30.0, 0.1
"""The papers' objectives: benchmarks.sim.report has them too, but importing it loads the whole simulator."""

Trace = Annotated[str, typer.Option(help="Mooncake trace (JSON lines); nothing = a generated one.")]
Requests = Annotated[int, typer.Option(help="Of a generated trace.")]
Rate = Annotated[float, typer.Option(help="Requests per second of a generated trace.")]
Speed = Annotated[float, typer.Option(help="Replay so many times faster.")]
StartS = Annotated[float, typer.Option(help="Begin there in the trace.")]
LengthS = Annotated[float, typer.Option(help="Take so much of the trace; 0 = to its end.")]
Sample = Annotated[float, typer.Option(help="Share of requests to keep.")]
SpreadS = Annotated[float, typer.Option(help="Delay each by a random part of it; undoes rounded stamps.")]
TtftSloS = Annotated[float, typer.Option(help="Objective by which requests are judged.")]
TbtSloS = Annotated[float, typer.Option(help="The same, mean of the longest tenth.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Json = Annotated[Path | None, typer.Option(help="Write the figures there.")]


def show(
    title: str, runs: Iterable[str], lines: Iterable[tuple[str, Sequence[str]]], console: "Console"
) -> None:
    """Print a table with one column per run."""
    from rich.table import Table

    table = Table(title=title, box=None)
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for name, cells in lines:
        table.add_row(name, *cells)
    console.print(table)


def write(path: Path, content: bytes) -> None:
    """Write the figures: whole, or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    from mooncake.core.config import fail

    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise fail("json", str(path), error.strerror or str(error)) from None
    finally:
        part.unlink(missing_ok=True)
