"""What benchmarks beside peers share, from the command line to the samples and the closing tables."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.transfer_peers.rounds import Bar, Cell, Contender, Pace, Sample, judge, measure, started
from mooncake.core.errors import ConfigError


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all of them have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="short samples: within 60 s")
    options.add_argument("--json", metavar="FILE", help="write the results as JSON")
    options.add_argument("--peers", metavar="LIST", help="only these contenders, by comma")
    venv = os.environ.get("MOONCAKE_BENCH_PEERS")
    options.add_argument("--peer-venv", default=venv, metavar="DIR", help="default: $MOONCAKE_BENCH_PEERS")
    return options


def wanted(contenders: Sequence[Contender], args: argparse.Namespace) -> list[Contender]:
    """Return those that were asked for; all, if none were.

    Raises:
        ConfigError: one is unknown.
    """
    known = [c.name for c in contenders]
    names = args.peers.split(",") if args.peers else known
    if unknown := set(names) - set(known):
        raise ConfigError(f"--peers {','.join(sorted(unknown))}: choose among {', '.join(known)}")
    return [c for c in contenders if c.name in names]


def absent(contender: Contender, peer_python: Path | None, isolated: bool) -> str:
    """Return why a contender cannot run, "" if it may."""
    if contender.foreign and peer_python is None:
        return "no --peer-venv (see benchmarks/transfer_peers/install)"
    if contender.foreign and not (peer_python and peer_python.exists()):
        return f"{peer_python} does not exist"
    if contender.exposed and not isolated:
        return "it listens on every address, and a network of its own needs root, unshare and ip"
    if contender.module.endswith("redis_unix") and not shutil.which("redis-server"):
        return "no redis-server"
    return ""


def run(
    contenders: Sequence[Contender],
    args: argparse.Namespace,
    cells: Sequence[Cell],
    pace: Pace,
    pool_bytes: int,
    where: str | None = None,
) -> tuple[list[Sample], list[str], dict[str, str]]:
    """Start those that can run and measure them in turns.

    Args:
        contenders: of `wanted`.
        args: of `parser`.
        cells: what is measured.
        pace: how often and how long.
        pool_bytes: memory of each.
        where: folder for temporary files; None = the system's.

    Returns:
        The samples, who ran, and why each of the others did not.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    isolated = os.geteuid() == 0 and bool(shutil.which("unshare")) and bool(shutil.which("ip"))
    peer_python = Path(args.peer_venv) / "bin" / "python" if args.peer_venv else None
    skipped = {c.name: why for c in contenders if (why := absent(c, peer_python, isolated))}
    chosen = [
        (c, str(peer_python) if c.foreign else sys.executable) for c in contenders if c.name not in skipped
    ]
    with (
        harness.progress(1 + pace.rounds * len(cells)) as begin,
        tempfile.TemporaryDirectory(prefix="bench-", dir=where) as folder,
    ):
        begin("starting")
        with started(chosen, pool_bytes, folder, isolated, skipped) as workers:
            names = [w.contender.name for w in workers]
            return measure(workers, cells, pace, skipped, begin), names, skipped


def conclude(
    args: argparse.Namespace,
    samples: list[Sample],
    bars: Sequence[Bar],
    skipped: dict[str, str],
    **facts: Any,
) -> None:
    """Print the closing tables; write everything as JSON if that was asked for."""
    rows = [judge(samples, bar) for bar in bars]
    rounds = len({s.round for s in samples})
    harness.show(f"Bars: medians of ratios over {rounds} rounds, the worst cell decides", rows)
    if skipped:
        harness.show("Skipped", [{"contender": n, "why": why} for n, why in skipped.items()])
    result = {**facts, "bars": rows, "skipped": skipped, "samples": [asdict(s) for s in samples]}
    harness.save(args.json, result)
