"""The `mooncake` command. Imports nothing heavy before a command runs: --help must be instant."""

import sys
from typing import Annotated

import typer

from mooncake import (
    bench_cli,
    config_cli,
    dashboards_cli,
    drain_cli,
    indexer_cli,
    pool_cli,
    process_cli,
    simulate_cli,
)
from mooncake.cli_common import console, errors_told, resolve

app = typer.Typer(
    name="mooncake",
    help="KVCache-centric, disaggregated LLM serving on vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # coloured help costs 0.3 s of imports
    context_settings={"help_option_names": ["-h", "--help"]},
)


process_cli.register(app)
config_cli.register(app)
drain_cli.register(app)


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="Folder or hub name; nothing = the default.")] = "",
) -> None:
    """Fetch and convert the default model, or check another one; prints its path."""
    with errors_told():
        typer.echo(resolve(name).path_or_name)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
    port: Annotated[int, typer.Option(help="The gateway's port to look at.")] = 8000,
) -> None:
    """Look whether this machine can run Mooncake; exit code 1 if not."""
    import msgspec
    from rich.markup import escape
    from rich.table import Table

    from mooncake.doctor import FAIL, examine

    rows = examine(port)
    if json:
        typer.echo(msgspec.json.encode(rows).decode())
    else:
        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table("check", "state", "found", "what to do", box=None)
        for row in rows:
            state = f"[{styles[row.state]}]{row.state}[/]"
            table.add_row(row.name, state, escape(row.found), escape(row.advice))
        console().print(table)
    raise typer.Exit(any(row.state == FAIL for row in rows))


@app.command()
def top(
    url: Annotated[str, typer.Option(help="The gateway.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="One table, then exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON, then exit.")] = False,
) -> None:
    """Show what a running cluster does: load, latencies, the pool. Ctrl-C ends it."""
    with errors_told():
        from mooncake.top import top as run_top

        raise typer.Exit(run_top(url, console(), once, as_json=as_json))


@app.command()
def version() -> None:
    """Print the version."""
    from mooncake import __version__

    typer.echo(__version__)


pool_cli.register(app)
simulate_cli.register(app)
indexer_cli.register(app)
bench_cli.register(app)
dashboards_cli.register(app)


def main() -> None:
    """Entry of the `mooncake` command."""
    sys.exit(app())
