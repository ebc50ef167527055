"""`mooncake directory` and `mooncake pool`: the pool's directory process, and what operators ask it.

Imports nothing heavy before a command runs, as mooncake.cli.
"""

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mooncake.cli_settings import settings_command

if TYPE_CHECKING:
    from rich.console import Console

    from mooncake.core.options import DirectoryOptions
    from mooncake.pool_admin import PoolAdmin

REFRESH_S = 0.5
LOST_S_MAX = 30.0
"""How long a progress bar waits for the next leader: lease, exact directory, and then some."""

Metadata = Annotated[
    str, typer.Option(help="Address of the cluster's metadata; finds the directories by it. Or give --url.")
]
Url = Annotated[str, typer.Option(help="Admin address of any directory, e.g. http://127.0.0.1:7710.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with the admin token; or set MOONCAKE_ADMIN_TOKEN, or _FILE.")
]
Wait = Annotated[bool, typer.Option(help="Show progress until it is done; --no-wait only starts it.")]
Keys = Annotated[list[str], typer.Argument(help="Keys in hexadecimal.")]
To = Annotated[str, typer.Option("--to", help="Node that shall have them.")]

pool = typer.Typer(
    name="pool",
    help="Look at the KV pool and move its blocks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def register(app: typer.Typer) -> None:
    """Add our commands to `mooncake`."""
    settings_command(app, "directory", directory)
    app.add_typer(pool)


def directory(options: "DirectoryOptions") -> None:
    """Run a directory of the KV pool: who holds which block. Several may run; one leads."""
    from kvstore.leader.coordinator import CoordinatorConfig
    from mooncake.cli_common import run_role

    options.checked()
    config = CoordinatorConfig(
        name=options.name or f"directory-{socket.gethostname().split('.')[0]}-{os.getpid()}",
        endpoint=f"tcp://{options.address}:{options.port}",
        admin_host=options.admin_host,
        admin_port=options.admin_port,
        admin_token=_token(
            Path(options.admin_token_file) if options.admin_token_file else None, "admin_token_file"
        ),
    )

    def main() -> int:
        import asyncio

        return asyncio.run(_serve(config, options))

    run_role("directory", options, main)


async def _serve(config: Any, options: "DirectoryOptions") -> int:
    import asyncio
    import signal

    from prometheus_client import CollectorRegistry

    from kvstore.leader.coordinator import Coordinator
    from mooncake.core.attend import beside
    from mooncake.core.metadata_metrics import MetadataCollector, metered, process_meter
    from mooncake.core.metadata_open import open_metadata
    from mooncake.core.reload import reloading

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    registry = CollectorRegistry()
    registry.register(MetadataCollector(process_meter()))
    store = metered(open_metadata(options.metadata))
    coordinator = Coordinator(config, store, registry=registry)
    try:
        async with beside("directory", registry), reloading(options, registry, None):
            await coordinator.start()
            await coordinator.run_until(stop)
    finally:
        await coordinator.close()
        await store.close()
    return 0


def _token(path: Path | None, key: str) -> str:
    """Return what the file at `path` says; None: what the environment does. `key`: who named the file."""
    from mooncake.core.config import admin_token
    from mooncake.core.options import read_secret

    return admin_token() if path is None else read_secret(key, str(path))


def _admin(metadata: str, url: str, token_file: Path | None) -> "PoolAdmin":
    from mooncake.pool_admin import PoolAdmin, find_directories

    token = _token(token_file, "token_file")
    return PoolAdmin([url] if url else find_directories(metadata), token)


@pool.command()
def status(metadata: Metadata = "", url: Url = "", token_file: TokenFile = None) -> None:
    """Show every node: bytes, blocks, and whether the directory is in step with it."""
    from mooncake.cli_common import console, errors_told

    with errors_told():
        from rich.markup import escape
        from rich.table import Table

        from mooncake.core.config import format_size

        admin = _admin(metadata, url, token_file)
        health, segments = admin.get("/health"), admin.get("/segments")["segments"]
        table = Table("node", "tier", "capacity", "used", "blocks", "mode", "lag", "remark", box=None)
        for node in segments:
            for tier in node["tiers"]:
                used, capacity = tier["used_bytes"], tier["capacity_bytes"]
                exact = node["mode"] == "exact"
                table.add_row(
                    node["node"],
                    tier["tier"],
                    format_size(capacity),
                    "?" if used is None else f"{format_size(used)} ({used / max(1, capacity):.0%})",
                    "?" if tier["blocks"] is None else f"{tier['blocks']:,}",
                    f"[{'green' if exact else 'yellow'}]{node['mode']}[/]",
                    f"{node['lag_s']:.1f} s",
                    escape(node["reason"]),
                )
        shown = console()
        shown.print(table)
        leader = health["leader"] or "nobody"
        shown.print(f"{health['entries']:,} entries; {leader} leads; asked {admin.url}", markup=False)
        for reason in health["reasons"]:
            shown.print(f"degraded: {reason}", style="yellow", markup=False)


@pool.command()
def tasks(metadata: Metadata = "", url: Url = "", token_file: TokenFile = None) -> None:
    """Show copies, moves and drains: open ones, and those that ended lately."""
    from mooncake.cli_common import console, errors_told

    with errors_told():
        from rich.markup import escape
        from rich.table import Table

        table = Table("task", "kind", "from", "to", "state", "done", "failed", "remark", box=None)
        for task in _admin(metadata, url, token_file).get("/tasks")["tasks"]:
            done = f"{task['done']:,} of {task['total']:,}"
            table.add_row(
                str(task["task_id"]), task["kind"], task["source"], task["target"], task["state"], done,
                f"{task['failed']:,}", escape(task["reason"]),
            )  # fmt: skip
        console().print(table)


@pool.command()
def drain(
    node: Annotated[str, typer.Argument(help="Node to empty.")],
    metadata: Metadata = "",
    url: Url = "",
    token_file: TokenFile = None,
    wait: Wait = True,
) -> None:
    """Move every block of a node to the others; nothing is copied there until `pool undrain`."""
    _run(metadata, url, token_file, "/tasks/drain", {"node": node}, f"draining {node}", wait)


@pool.command()
def undrain(
    node: Annotated[str, typer.Argument(help="Node that may have blocks again.")],
    metadata: Metadata = "",
    url: Url = "",
    token_file: TokenFile = None,
) -> None:
    """Let blocks be copied to a drained node again; ends its drain."""
    from mooncake.cli_common import errors_told

    with errors_told():
        _admin(metadata, url, token_file).post("/tasks/undrain", {"node": node})


@pool.command()
def copy(
    keys: Keys,
    to: To,
    metadata: Metadata = "",
    url: Url = "",
    token_file: TokenFile = None,
    wait: Wait = True,
) -> None:
    """Copy blocks to a node, from wherever they are."""
    _run(metadata, url, token_file, "/tasks/copy", {"keys": keys, "target": to}, f"copying to {to}", wait)


@pool.command()
def move(
    keys: Keys,
    to: To,
    source: Annotated[str, typer.Option("--from", help="Node that shall not have them any more.")],
    metadata: Metadata = "",
    url: Url = "",
    token_file: TokenFile = None,
    wait: Wait = True,
) -> None:
    """Move blocks from one node to another."""
    body = {"keys": keys, "source": source, "target": to}
    _run(metadata, url, token_file, "/tasks/move", body, f"moving to {to}", wait)


@pool.command()
def cancel(
    task: Annotated[int, typer.Argument(help="Number of the task, see `pool tasks`.")],
    metadata: Metadata = "",
    url: Url = "",
    token_file: TokenFile = None,
) -> None:
    """End a task; what was copied stays."""
    from mooncake.cli_common import errors_told

    with errors_told():
        _admin(metadata, url, token_file).delete(f"/tasks/{task}")


def _run(
    metadata: str, url: str, token_file: Path | None, path: str, body: dict[str, Any], what: str, wait: bool
) -> None:
    """Start a task; show it to its end."""
    from mooncake.cli_common import console, errors_told

    with errors_told():
        admin = _admin(metadata, url, token_file)
        task_id = admin.post(path, body)["task_id"]
        shown = console()
        if not wait:
            shown.print(f"task {task_id}")
            return
        end = _follow(admin, task_id, what, shown)
        shown.print(
            f"task {task_id} {end['state']}: {end['done']:,} of {end['total']:,} blocks", markup=False
        )
        if end["state"] != "done":
            if end["reason"]:
                shown.print(end["reason"], style="red", markup=False)
            raise typer.Exit(1)


def _follow(admin: "PoolAdmin", task_id: int, what: str, console: "Console") -> dict[str, Any]:
    """Show a bar until the task has ended; it outlives a change of the leader."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mooncake.core.errors import MooncakeError

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        shown = bar.add_task(what, total=None)
        heard_s = time.monotonic()
        while True:
            try:
                found: dict[str, Any] = admin.get(f"/tasks/{task_id}")
            except MooncakeError:
                # between two leaders nobody knows it
                if time.monotonic() - heard_s > LOST_S_MAX:
                    raise
                time.sleep(REFRESH_S)
                continue
            heard_s = time.monotonic()
            bar.update(shown, completed=found["done"] + found["failed"], total=found["total"] or None)
            if found["state"] != "running":
                return found
            time.sleep(REFRESH_S)
