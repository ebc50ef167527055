"""One decision of the Conductor's: name a prompt's blocks, match them, price every instance, plan.

64 nodes hold a million blocks of 128 tokens; the prompt has 128,000, of which 0, 50 or 100 % are known. Ours
also chooses among 64 instances, charges their load and gives it back. The peer is ai-dynamo-runtime, from an
environment of its own: `python3 -m venv DIR && DIR/bin/pip install ai-dynamo-runtime==1.6.1 numpy`, then
--peer-venv DIR. Then, in a process of its own, what each index takes for a block.

    hash    all names of a prompt that nobody has sent before
    match   names to depths of hit
    decide  a prompt whose names were made before, by another request: from a list of tokens to a plan
    first   the same, of a prompt that nobody has sent before
    packed  the same as decide, of tokens that are no list
    churn   the same as decide, after stores have told of 512 blocks that came or went
    score   a prompt without names
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import harness
from benchmarks.decide_peers.base import PROMPT_TOKENS
from benchmarks.transfer_peers import contest
from benchmarks.transfer_peers.rounds import ROOT, Bar, Cell, Contender, Pace, Sample, median_of, table

BLOCKS = 1_000_000
CHURNED = {"ours": 10_000_000, "dynamo": 1_000_000}
QUICK_CHURNED = 500_000
MEMORY_S_MAX = 900.0
BOOT = (  # appended: see benchmarks.transfer_peers.rounds
    f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.decide_peers import memory; memory.main()"
)
PEERS = "benchmarks.decide_peers"


@dataclass(frozen=True)
class Question(Cell):
    """An operation and the known part of the prompt."""

    def __str__(self) -> str:
        """For a table's first column."""
        kind, _, percent = self.op.partition(" ")
        return f"{kind.lower()} {percent} %"


def questions(*kinds: str) -> tuple[Question, ...]:
    """Return these kinds at every depth."""
    return tuple(
        Question(f"{kind} {percent}", 4 * PROMPT_TOKENS) for kind in kinds for percent in (0, 50, 100)
    )


COMMON = questions("HASH", "MATCH", "DECIDE")
OWN = (*questions("FIRST", "PACKED", "CHURN"), Question("SCORE 0", 4 * PROMPT_TOKENS))
CELLS = (*COMMON, *OWN)
FULL = Pace(9, 0.3, 600.0)
QUICK = Pace(3, 0.06, 30.0)


def _ops(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(cell.op for cell in cells)


CONTENDERS = (
    Contender("ours", f"{PEERS}.ours", "Ours", _ops(CELLS)),
    Contender("dynamo", f"{PEERS}.dynamo", "Dynamo", _ops(COMMON), foreign=True),
)


def cpu(samples: Sequence[Sample], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return CPU microseconds, of all threads: on a busy machine they say more than the clock."""
    rows = []
    for cell in CELLS:
        row: dict[str, Any] = {"": str(cell)}
        for name in names:
            per_gb = median_of(samples, name, cell, "cpu_s_gb")
            row[name] = "-" if per_gb is None else f"{per_gb * cell.size / 1e3:.3g}"
        rows.append(row)
    return rows


def memory(contender: Contender, python: str, churned: int, skipped: dict[str, str]) -> dict[str, Any]:
    """Return bytes per block of one contender's index; why not goes to `skipped`."""
    argv = [python, "-P", "-c", BOOT, contender.name, str(BLOCKS), str(churned)]
    folder = tempfile.gettempdir()
    try:
        told = subprocess.run(
            argv, capture_output=True, check=True, text=True, timeout=MEMORY_S_MAX, cwd=folder
        )
    except subprocess.SubprocessError as error:
        skipped[f"{contender.name}, bytes"] = str(error)[-200:]
        return {}
    found = {name: round(value) for name, value in json.loads(told.stdout).items()}
    return {"": contender.name, **found, "blocks that came and went": churned}


def main() -> None:
    """See the module's text."""
    args = contest.parser(__doc__).parse_args()
    pace = QUICK if args.quick else FULL
    samples, names, skipped = contest.run(contest.wanted(CONTENDERS, args), args, CELLS, pace, BLOCKS)
    harness.show("microseconds, p50", table(samples, names, CELLS, "us"))
    harness.show("microseconds, p99", table(samples, names, CELLS, "p99_us"))
    harness.show("microseconds of CPU, p50", cpu(samples, names))
    taken = []
    for contender in CONTENDERS:
        if contender.name in names:
            python = f"{args.peer_venv}/bin/python" if contender.foreign else sys.executable
            churned = QUICK_CHURNED if args.quick else CHURNED[contender.name]
            if row := memory(contender, python, churned, skipped):
                taken.append(row)
    if taken:
        harness.show("resident bytes per block of a million", taken)
    bars = [Bar("decision <= 0.3x", "ours", "dynamo", "us", 1 / 0.3, questions("DECIDE"))]
    contest.conclude(args, samples, bars, skipped, blocks=BLOCKS, memory=taken, pace=asdict(pace))


if __name__ == "__main__":
    main()
