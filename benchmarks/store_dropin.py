"""`mooncake.store` of ours beside upstream's wheel, by the calls that integrations make.

Everything as in benchmarks.store, whose contenders, cells and rounds these are: put_from, get_into,
is_exist, and batch_* for more than one object, in memory that is registered; the segment is another
process's. Ratios are ours to upstream's inside a round, so above 1 is quicker.
"""

from dataclasses import asdict

from benchmarks import harness
from benchmarks.store import CALLS, CELLS, FULL, LARGE, PEERS, POOL_BYTES, QUICK, SMALL, among
from benchmarks.transfer_peers import contest
from benchmarks.transfer_peers.rounds import Bar, Contender, table

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
    args = contest.parser(__doc__).parse_args()
    pace = QUICK if args.quick else FULL
    contenders = contest.wanted(CONTENDERS, args)
    samples, names, skipped = contest.run(contenders, args, CELLS, pace, POOL_BYTES)
    harness.show("microseconds for one go", table(samples, names, CELLS, "us"))
    contest.conclude(args, samples, BARS, skipped, pool_bytes=POOL_BYTES, pace=asdict(pace))


if __name__ == "__main__":
    main()
