"""`mooncake config`: what holds and who said so, and whether a settings file is right.

Imports nothing heavy before it runs, as mooncake.cli.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mooncake.cli_common import console, errors_told

if TYPE_CHECKING:
    from mooncake.core.config_file import ConfigFile
    from mooncake.core.options_base import Options

config = typer.Typer(
    name="config",
    help="Look at settings: which hold, and whether a file is right.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Process = Annotated[
    str, typer.Argument(help="up, conductor, gateway, prefill, decode, store, directory or indexer.")
]
File = Annotated[
    str, typer.Option("--config", help="Settings file; empty = as MOONCAKE_CONFIG says, or none.")
]


def register(app: typer.Typer) -> None:
    """Add our commands to `mooncake`."""
    app.add_typer(config)


@config.command()
def show(
    process: Process = "up",
    file: File = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show the settings that a process started here would have, and who said each; secrets are masked."""
    with errors_told():
        import msgspec
        from rich.markup import escape
        from rich.table import Table

        from mooncake.core.options_base import values_of
        from mooncake.core.settings import load, misspelt

        for name, near in misspelt(os.environ).items():
            typer.echo(f"{name}: no such setting; did you mean {near}?", err=True)
        values = values_of(load(_kind(process), {"config": file} if file else {}, is_partial=True))
        if json:
            typer.echo(msgspec.json.format(msgspec.json.encode(values)).decode())
            return
        table = Table("key", "value", "from", box=None)
        for key, one in values.items():
            style = "dim" if one["origin"] == "default" else None
            table.add_row(key, escape(one["value"]), escape(one["origin"]), style=style)
        console().print(table)


@config.command()
def check(
    file: Annotated[Path, typer.Argument(help="Settings file.")],
    process: Annotated[str, typer.Option(help="Whose it is, if it has no sections.")] = "",
) -> None:
    """Say what is wrong with a settings file, and with the file of tenants it names; exit code 2 if so."""
    with errors_told():
        from mooncake.core.config_file import read_config
        from mooncake.core.options_base import told

        found = read_config(str(file))
        if problems := list(dict.fromkeys(_problems(found, process))):
            raise told(problems)
        names = process if found.is_flat else ", ".join(found.sections)
        typer.echo(f"{file}: right, for {names or 'nobody: it is empty'}")


def _problems(file: "ConfigFile", process: str) -> Iterator[str]:
    """Give every line that tells of something wrong."""
    import msgspec

    from mooncake.core.config_file import COMMON
    from mooncake.core.errors import ConfigError
    from mooncake.core.options import SECTIONS
    from mooncake.core.settings import fill

    if file.is_flat and not process:
        yield f"config = {file.path!r}: has no sections: say whose it is by --process"
        return
    yield from map(str, file.problems)
    file = msgspec.structs.replace(file, problems=[])
    sections = [process] if file.is_flat else [name for name in SECTIONS if name in file.sections]
    if COMMON in file.sections and not file.is_flat:
        sections = list(SECTIONS)
    for section in sections:
        try:
            options = fill(_kind(section), {}, file, looks_around=False, is_partial=True)
        except ConfigError as error:
            yield from str(error).splitlines()
            continue
        yield from map(str, options.conflicts())
        yield from _tenants(options)


def _tenants(options: "Options") -> Iterator[str]:
    from conductor.tenants_file import read_tenants
    from mooncake.core.errors import ConfigError

    try:
        read_tenants(getattr(options, "tenants", ""), _AnyKey())
    except ConfigError as error:
        yield str(error)


class _AnyKey(Mapping[str, str]):
    """Has a key under every name: which ones there are is another machine's business."""

    def __getitem__(self, name: str) -> str:
        return f"some key of its own: {name}"

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@config.command()
def schema() -> None:
    """Print a JSON Schema of the settings file, for editors."""
    import msgspec

    from mooncake.settings_schema import schema as made

    typer.echo(msgspec.json.format(msgspec.json.encode(made())).decode())


def _kind(process: str) -> "type[Options]":
    from mooncake.core.config import fail
    from mooncake.core.options import SECTIONS

    if process not in SECTIONS:
        raise fail("process", process, f"must be one of {', '.join(SECTIONS)}")
    return SECTIONS[process]
