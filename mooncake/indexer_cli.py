"""`mooncake indexer`: upstream's indexer API, for routers that are not ours.

Imports nothing heavy before the command runs, as mooncake.cli.
"""

from typing import Annotated

import typer

from mooncake import cli_common as common


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    app.command()(indexer)


def indexer(
    host: common.Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port; 0 = any.")] = 13333,
    metadata: Annotated[
        str, typer.Option(help="Metadata of a cluster of ours whose stores and engines are indexed too.")
    ] = "",
    publishers: Annotated[
        str, typer.Option(help="Networks that publishers may be in, by commas; empty = loopback, private.")
    ] = "",
    blocks_max: Annotated[
        int, typer.Option(help="Blocks of a context, beyond which the oldest are dropped; 0 = 4,000,000.")
    ] = 0,
    xxh3_seed: Annotated[
        int, typer.Option(help="Seed of the standard's names; 1337 as Dynamo and SMG.")
    ] = 1337,
    api_key: common.ApiKey = "",
    log_level: common.LogLevel = "info",
) -> None:
    """Tell routers which engine has cached how much of a prompt: upstream's indexer API."""
    with common.errors_told():
        from conductor.indexer.run import Settings, check, serve

        settings = check(Settings(host, port, metadata, publishers, blocks_max, xxh3_seed, api_key))
        common.run_role("indexer", log_level, lambda: serve(settings))
