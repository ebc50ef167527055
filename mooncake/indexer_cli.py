"""`mooncake indexer`: upstream's indexer API, for routers that are not ours.

Imports nothing heavy before the command runs, as mooncake.cli.
"""

from typing import TYPE_CHECKING

import typer

from mooncake import cli_common as common
from mooncake.cli_settings import settings_command

if TYPE_CHECKING:
    from mooncake.core.options import IndexerOptions


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    settings_command(app, "indexer", indexer)


def indexer(options: "IndexerOptions") -> None:
    """Tell routers which engine has cached how much of a prompt: upstream's indexer API."""
    from conductor.indexer.run import check, serve

    check(options)
    common.run_role("indexer", options, lambda: serve(options))
