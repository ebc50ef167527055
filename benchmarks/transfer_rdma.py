"""RDMA in one VM on a software device: ours against ib_write_bw, ib_read_bw and Mooncake's C++ engine.

The VM is tests/rdma/vm.py's (2 vCPUs, MTU 4096; `scripts/rdma-parts` fetches its kernel). In there the
device is the kernel's and the machine is emulated: megabytes a second, but the same kernel for everybody.
Rounds, rotation and ratios as in benchmarks.transfer; upstream needs the same --peer-venv.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.transfer_peers.rounds import (
    KIB,
    MIB,
    Bar,
    Cell,
    Contender,
    Pace,
    Sample,
    judge,
    measure,
    started,
    table,
)

VM_S_MAX = 900.0
QUICK_VM_S_MAX = 480.0
START_S_MAX = 240.0
"""Imports are ten times slower in there."""
POOL_BYTES = 32 * MIB
"""No cache matters at these speeds."""
RESULT = "transfer-rdma-result "
CONTENDERS = (
    Contender("rdma", "ours", "Rdma"),
    Contender("upstream", "upstream", "UpstreamRdma", foreign=True),
    Contender("ib_bw", "perftest", "Perftest"),
)
CELLS = tuple(
    Cell(op, size, pages) for size, pages in ((256 * KIB, 32), (64 * KIB, 64)) for op in ("WRITE", "READ")
)
FULL, QUICK = Pace(7, 0.5, 600.0), Pace(5, 0.2, 240.0)
BARS = (
    Bar("rdma / upstream", "rdma", "upstream", "gb_s", 1.0, CELLS),
    Bar("rdma / ib_write_bw", "rdma", "ib_bw", "gb_s", 0.95, tuple(c for c in CELLS if c.op == "WRITE")),
    Bar("rdma / ib_read_bw", "rdma", "ib_bw", "gb_s", 0.95, tuple(c for c in CELLS if c.op == "READ")),
)


def inside(args: argparse.Namespace) -> None:
    """Measure, in the VM, and print one line of JSON."""
    skipped: dict[str, str] = {}
    peer_python = Path(args.peer_venv or "-") / "bin" / "python"
    chosen = []
    for contender in (c for c in CONTENDERS if c.name in args.peers.split(",")):
        if contender.foreign and not peer_python.exists():
            skipped[contender.name] = "no --peer-venv (see benchmarks/transfer_peers/install)"
        else:
            chosen.append((contender, str(peer_python) if contender.foreign else sys.executable))
    with (
        tempfile.TemporaryDirectory() as folder,
        started(chosen, POOL_BYTES, folder, False, skipped, START_S_MAX) as workers,
    ):
        pace = QUICK if args.quick else FULL
        samples = measure(workers, CELLS, pace, skipped, lambda what: print(what, flush=True))
    print(RESULT + json.dumps({"samples": [asdict(s) for s in samples], "skipped": skipped}))


def in_vm(args: argparse.Namespace) -> dict[str, Any]:
    """Start the VM, run `inside`, return what it printed."""
    from benchmarks import harness
    from tests.rdma import vm

    if why := vm.missing():
        sys.exit(f"no VM: {why}")
    words = [
        sys.executable,
        "-m",
        "benchmarks.transfer_rdma",
        "--inside",
        "--peer-venv",
        args.peer_venv or "-",
    ]
    words += ["--peers", args.peers]
    with harness.progress(1) as begin:
        begin("one VM (minutes)")
        limit_s = QUICK_VM_S_MAX if args.quick else VM_S_MAX
        command = shlex.join([*words, *(["--quick"] if args.quick else [])])
        result = vm.run_guest(command, vcpus=2, memory_mib=2048, timeout_s=limit_s)
    lines = [line for line in result.output.splitlines() if line.startswith(RESULT)]
    if result.rc or not lines:
        sys.exit(f"the VM ended with {result.rc}:\n{result.output[-2000:]}\n{result.console[-1000:]}")
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return answer


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter samples")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    everybody = ",".join(c.name for c in CONTENDERS)
    parser.add_argument("--peers", default=everybody, metavar="LIST", help="only these contenders, by comma")
    venv = os.environ.get("MOONCAKE_BENCH_PEERS")
    parser.add_argument("--peer-venv", default=venv, metavar="DIR", help="default: $MOONCAKE_BENCH_PEERS")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if args.inside:
        inside(args)
        return
    from benchmarks import harness

    got = in_vm(args)
    samples = [Sample(**row) for row in got["samples"]]
    names = [c.name for c in CONTENDERS if any(s.contender == c.name for s in samples)]
    if not names:
        sys.exit(f"nothing measured: {got['skipped']}")
    for figure, title in (
        ("gb_s", "GB/s"),
        ("ratio", f"GB/s, times {names[0]}"),
        ("cpu_s_gb", "CPU s per GB"),
    ):
        harness.show(title, table(samples, names, CELLS, figure))
    bars = [judge(samples, bar) for bar in BARS]
    rounds = len({s.round for s in samples})
    harness.show(f"Bars: medians of ratios over {rounds} rounds, the worst cell decides", bars)
    if got["skipped"]:
        harness.show("Skipped", [{"contender": n, "why": why} for n, why in got["skipped"].items()])
    harness.save(args.json, {"bars": bars, **got})


if __name__ == "__main__":
    main()
