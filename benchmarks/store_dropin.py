"""`mooncake.store` of ours beside upstream's wheel, by the calls that integrations make.

Everything as in benchmarks.store, whose contenders and rounds these are: put_from, get_into, is_exist, and
batch_* for more than one object, in memory that is registered. The segment is another process's, or, with
"own", the caller's own, as most integrations have it. Ratios are ours to upstream's inside a round, so above
1 is quicker. Our reads are verified by checksum, upstream's are not.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import harness
from benchmarks.store import CALLS, PEERS, POOL_BYTES
from benchmarks.transfer_peers import contest
from benchmarks.transfer_peers.rounds import KIB, MIB, Bar, Cell, Contender, Pace, Sample, ratio, table

LARGE = ((256 * KIB, 32), (MIB, 16), (4 * MIB, 4))
SMALL = ((KIB, 128), (64 * KIB, 64))
CELLS = (
    *(Cell(op, size, n) for op in ("GET", "PUT") for size, batch in (*SMALL, *LARGE) for n in (batch, 1)),
    Cell("EXISTS", KIB, 128),
    Cell("EXISTS", KIB),
)
FULL = Pace(11, 0.12, 3600.0)
QUICK = Pace(3, 0.03, 22.0)
PAIRS = (("dropin", "upstream"), ("dropin own", "upstream own"))
CONTENDERS = (
    Contender("dropin", f"{PEERS}.dropin", "DropIn", CALLS),
    Contender("upstream", f"{PEERS}.upstream", "Upstream", CALLS, foreign=True, exposed=True),
    Contender("dropin own", f"{PEERS}.dropin", "DropInEmbedded", CALLS),
    Contender("upstream own", f"{PEERS}.upstream", "UpstreamEmbedded", CALLS, foreign=True, exposed=True),
)


def _bars() -> tuple[Bar, ...]:
    large = [size for size, _ in LARGE]
    bars = []
    for mine, other in PAIRS:
        where = ", own segment" if "own" in mine else ""
        for op, figure, at_least in (("GET", "gb_s", 4.0), ("PUT", "gb_s", 3.0)):
            big = [cell for cell in CELLS if cell.op == op and cell.size in large]
            small = tuple(cell for cell in CELLS if cell.op == op and cell.size not in large)
            batches = tuple(cell for cell in big if cell.pages > 1)
            single = tuple(cell for cell in big if cell.pages == 1)
            name = op.lower()
            bars += [
                Bar(f"{name}, batches 256K-4M{where}", mine, other, figure, at_least, batches),
                Bar(f"{name}, one 256K-4M{where}", mine, other, figure, at_least, single),
                Bar(f"{name}, 1K and 64K{where}", mine, other, figure, 1.0, small),
            ]
        looks = tuple(cell for cell in CELLS if cell.op == "EXISTS")
        bars.append(Bar(f"exists{where}", mine, other, "us", 1.0, looks))
    return tuple(bars)


def ratios(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return for each cell how many times as quick as upstream's ours is."""
    rows = []
    for cell in CELLS:
        row: dict[str, Any] = {"": str(cell)}
        for mine, other in PAIRS:
            value = ratio(samples, mine, other, cell, "us")
            row[f"{mine} / {other}"] = "-" if value is None else f"{value:.2f}"
        rows.append(row)
    return rows


def main() -> None:
    """See the module's text."""
    args = contest.parser(__doc__).parse_args()
    pace = QUICK if args.quick else FULL
    contenders = contest.wanted(CONTENDERS, args)
    samples, names, skipped = contest.run(contenders, args, CELLS, pace, POOL_BYTES)
    harness.show("microseconds for one go, p50", table(samples, names, CELLS, "us"))
    harness.show("microseconds for one go, p99", table(samples, names, CELLS, "p99_us"))
    harness.show("times upstream's speed, by p50", ratios(samples))
    contest.conclude(args, samples, _bars(), skipped, pool_bytes=POOL_BYTES, pace=asdict(pace))


if __name__ == "__main__":
    main()
