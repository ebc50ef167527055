"""How fast objects are put and got on one host: our pool, Mooncake's C++ store over TCP, redis.

Every contender is a process of its own with a server process; the others' rounds find it stopped. Every
round visits every cell, each time starting with another contender. Ratios are taken inside a round, where
the machine was as busy for both, and their median is reported. `view` is our pool without the copy: leased,
verified bytes where they lie.

The peers need a virtual environment of their own (`benchmarks/store_peers/install DIR`, then --peer-venv
DIR) and root: upstream's processes listen on every address, so all contenders get an empty network.
Absent peers are skipped by name.
"""

from dataclasses import asdict

from benchmarks import harness
from benchmarks.transfer_peers import contest
from benchmarks.transfer_peers.rounds import (
    KIB,
    MIB,
    Bar,
    Cell,
    Contender,
    Pace,
    table,
)

POOL_BYTES = 128 * MIB
"""Objects of one size: four last-level caches, so that large ones are read cold."""
PEERS = "benchmarks.store_peers"
CALLS = ("PUT", "GET", "EXISTS")
CONTENDERS = (
    Contender("pool", f"{PEERS}.ours", "Ours", CALLS),
    Contender("view", f"{PEERS}.ours", "View", ("GET",)),
    Contender("upstream", f"{PEERS}.upstream", "Upstream", CALLS, foreign=True, exposed=True),
    Contender("redis", f"{PEERS}.redis_unix", "Redis", CALLS, foreign=True),
)
LARGE = ((256 * KIB, 32), (MIB, 16), (4 * MIB, 4))
SMALL = ((KIB, 128), (16 * KIB, 128))
CELLS = (
    *(Cell(op, size, pages) for op in ("GET", "PUT") for size, batch in LARGE for pages in (batch, 1)),
    *(Cell(op, size, pages) for op in ("GET", "PUT") for size, batch in SMALL for pages in (batch, 1)),
    Cell("EXISTS", KIB),
    Cell("EXISTS", KIB, 128),
)
FULL = Pace(9, 0.15, 3600.0)
QUICK = Pace(3, 0.04, 35.0)


def among(op: str, sizes: tuple[tuple[int, int], ...], single: bool | None = None) -> tuple[Cell, ...]:
    """Return the cells of one call and these sizes; `single` None: one object and batches."""
    known = [size for size, _ in sizes]
    return tuple(
        c for c in CELLS if c.op == op and c.size in known and (single is None or (c.pages == 1) is single)
    )


GETS, PUTS = among("GET", LARGE, False), among("PUT", LARGE, False)
BARS = (
    Bar("get / upstream, batches 256K-4M", "pool", "upstream", "gb_s", 4.0, GETS),
    Bar("get / redis, batches 256K-4M", "pool", "redis", "gb_s", 2.0, GETS),
    Bar("put / redis, batches 256K-4M", "pool", "redis", "gb_s", 2.0, PUTS),
    Bar("get / upstream, one 256K-4M", "pool", "upstream", "gb_s", 4.0, among("GET", LARGE, True)),
    Bar("get / redis, one 256K-4M", "pool", "redis", "gb_s", 2.0, among("GET", LARGE, True)),
    Bar("put / redis, one 256K-4M", "pool", "redis", "gb_s", 2.0, among("PUT", LARGE, True)),
    Bar("view / upstream, 256K-4M", "view", "upstream", "gb_s", 4.0, among("GET", LARGE)),
    Bar("view / redis, 256K-4M", "view", "redis", "gb_s", 2.0, among("GET", LARGE)),
    Bar("get / upstream, batches 1-16K", "pool", "upstream", "gb_s", 1.0, among("GET", SMALL, False)),
    Bar("upstream's us / get's, one 1-16K", "pool", "upstream", "us", 1.0, among("GET", SMALL, True)),
    Bar("upstream's us / exists', one", "pool", "upstream", "us", 1.0, among("EXISTS", SMALL, True)),
)
FIGURES = {"us": "microseconds for one go", "gb_s": "GB/s", "cpu_s_gb": "CPU seconds per GB, both processes"}


def main() -> None:
    """See the module's text."""
    args = contest.parser(__doc__).parse_args()
    pace = QUICK if args.quick else FULL
    contenders = contest.wanted(CONTENDERS, args)
    samples, names, skipped = contest.run(contenders, args, CELLS, pace, POOL_BYTES)
    for figure, title in FIGURES.items():
        cells = [c for c in CELLS if figure == "us" or c.op != "EXISTS"]
        harness.show(title, table(samples, names, cells, figure))
    contest.conclude(args, samples, BARS, skipped, pool_bytes=POOL_BYTES, pace=asdict(pace))


if __name__ == "__main__":
    main()
