#!/usr/bin/env python3
"""Write docs/cli.md from the commands themselves; --check: say whether it is as it would be written.

.venv/bin/python scripts/docs_reference.py [--check]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import typer
from typer.testing import CliRunner

from mooncake.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
COLUMNS = "100"
HEAD = """# Command line

Made by `scripts/docs_reference.py` from the commands; a test compares. Options that are settings can also
stand in a file or in the environment: [configuration](configuration.md).
"""


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every command, groups before what is in them."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from commands(below, (*path, name))


def page() -> str:
    """Return the whole page."""
    runner = CliRunner(env={"COLUMNS": COLUMNS, "TERM": "dumb", "NO_COLOR": "1"})
    parts = [HEAD]
    for path in commands(typer.main.get_command(app), ()):
        said = runner.invoke(app, [*path, "--help"], prog_name="mooncake")
        if said.exit_code != 0:
            raise SystemExit(f"mooncake {' '.join(path)} --help: {said.output}")
        title = " ".join(("mooncake", *path))
        text = "\n".join(line.rstrip() for line in said.output.strip().splitlines())
        parts.append(f"{'#' * min(2 + len(path[1:]), 3)} {title}\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write, or compare."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.is_file() and PAGE.read_text() == text:
            return 0
        sys.stderr.write(f"{PAGE.name} is not what the commands say: run {sys.argv[0]}\n")
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
