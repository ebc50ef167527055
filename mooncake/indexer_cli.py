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
    from conductor.indexer.run import Settings, check, serve

    settings = check(
        Settings(
            options.host, options.port, options.metadata, options.publishers, options.blocks_max,
            options.xxh3_seed, options.api_key,
        )
    )  # fmt: skip
    common.run_role("indexer", options, lambda: serve(settings))
