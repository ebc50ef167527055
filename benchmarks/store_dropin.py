"""`mooncake.store` of ours beside upstream's wheel, by the calls that integrations make.

Everything as in benchmarks.store, whose contenders, cells and rounds these are: put_from, get_into,
is_exist, and batch_* for more than one object, in memory that is registered; the segment is another
process's. Ratios are ours to upstream's inside a round, so above 1 is quicker.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks import harness
from benchmarks.store import CALLS, CELLS, FULL, LARGE, PEERS, POOL_BYTES, QUICK, SMALL, among
from benchmarks.transfer import absent
from benchmarks.transfer_peers.rounds import Bar, Contender, judge, measure, started, table

OURS, UPSTREAM = "dropin", "upstream"
CONTENDERS = (
    Contender(OURS, f"{PEERS}.dropin", "DropIn", CALLS),
    Contender(UPSTREAM, f"{PEERS}.upstream", "Upstream", CALLS, foreign=True, exposed=True),
)
BARS = (
    Bar("get, batches 256K-4M", OURS, UPSTREAM, "gb_s", 4.0, among("GET", LARGE, False)),
    Bar("get, one 256K-4M", OURS, UPSTREAM, "gb_s", 4.0, among("GET", LARGE, True)),
    Bar("put, batches 256K-4M", OURS, UPSTREAM, "gb_s", 3.0, among("PUT", LARGE, False)),
    Bar("put, one 256K-4M", OURS, UPSTREAM, "gb_s", 3.0, among("PUT", LARGE, True)),
    Bar("get, 1-16K", OURS, UPSTREAM, "gb_s", 1.0, among("GET", SMALL)),
    Bar("put, 1-16K", OURS, UPSTREAM, "gb_s", 1.0, among("PUT", SMALL)),
    Bar("exists", OURS, UPSTREAM, "us", 1.0, among("EXISTS", SMALL)),
)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short samples: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    venv = os.environ.get("MOONCAKE_BENCH_PEERS")
    parser.add_argument("--peer-venv", default=venv, metavar="DIR", help="default: $MOONCAKE_BENCH_PEERS")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    pace = QUICK if args.quick else FULL
    isolated = os.geteuid() == 0 and bool(shutil.which("unshare")) and bool(shutil.which("ip"))
    peer_python = Path(args.peer_venv) / "bin" / "python" if args.peer_venv else None
    skipped = {c.name: why for c in CONTENDERS if (why := absent(c, peer_python, isolated))}
    pythons = {True: str(peer_python), False: sys.executable}
    chosen = [(c, pythons[c.foreign]) for c in CONTENDERS if c.name not in skipped]
    with (
        harness.progress(1 + pace.rounds * len(CELLS)) as begin,
        tempfile.TemporaryDirectory(prefix="bench-store-") as folder,
    ):
        begin("starting")
        with started(chosen, POOL_BYTES, folder, isolated, skipped) as workers:
            names = [w.contender.name for w in workers]
            samples = measure(workers, CELLS, pace, skipped, begin)
    harness.show("microseconds for one go", table(samples, names, CELLS, "us"))
    bars = [judge(samples, bar) for bar in BARS]
    harness.show("Bars: medians of ratios, the worst cell decides", bars)
    if skipped:
        harness.show("Skipped", [{"contender": n, "why": why} for n, why in skipped.items()])
    result = {"pool_bytes": POOL_BYTES, "pace": asdict(pace), "bars": bars, "skipped": skipped}
    harness.save(args.json, {**result, "samples": [asdict(s) for s in samples]})


if __name__ == "__main__":
    main()
