"""`mooncake dashboards`: the Grafana boards as files, for a Grafana outside Kubernetes.

Imports nothing heavy before the command runs, as mooncake.cli.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mooncake.cli_common import errors_told


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    app.command()(dashboards)


def dashboards(
    out: Annotated[Path, typer.Option(help="Folder to write to, e.g. one that Grafana provisions from.")],
) -> None:
    """Write the Grafana boards as JSON files, to import or to provision."""
    from mooncake.core.errors import ConfigError
    from mooncake.dashboards import board_files

    with errors_told():
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in board_files().values():
                shutil.copyfile(path, out / path.name)
        except OSError as error:
            raise ConfigError(
                f"--out {out}: {error.strerror}: name a folder that can be written to"
            ) from None
        typer.echo(f"{len(board_files())} boards in {out}")
