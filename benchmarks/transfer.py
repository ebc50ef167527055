"""How fast bytes move: our transports against memcpy, Mooncake's C++ engine, NIXL, redis and O_DIRECT.

Each contender is a process of its own (two where it has a remote side) that the others' rounds find
stopped. Every round visits every cell, each time starting with another contender. Ratios are taken
inside a round, where the machine was as busy for both, and their median is reported.

The peers need a virtual environment of their own (`benchmarks/transfer_peers/install DIR`, then
--peer-venv DIR) and root: they listen on every address, so all contenders get an empty network.
Absent peers are skipped by name.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

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

POOL_BYTES_MAX = 1 << 30
"""Seventeen pools are in memory at the same time."""
CONTENDERS = (
    Contender("memcpy", "memcpy", "Memcpy"),
    Contender("shm", "ours", "Shm"),
    Contender("tcp", "ours", "Tcp"),
    Contender("verify", "ours", "Verify", ops=("READ",)),
    Contender("upstream", "upstream", "Upstream", foreign=True, exposed=True),
    Contender("nixl", "ucx", "Ucx", foreign=True, exposed=True),
    Contender("redis", "redis_unix", "Redis", foreign=True),
    Contender("file", "disk", "File", ops=("READ",), medium="disk"),
    Contender("O_DIRECT", "disk", "Plain", ops=("READ",), medium="disk"),
)
SINGLES = tuple(n * KIB for n in (4, 64, 256)) + tuple(n * MIB for n in (1, 4, 16, 64))
BATCHES = ((256 * KIB, 128), (64 * KIB, 512))
CELLS = (
    *(Cell(op, size, pages) for size, pages in BATCHES for op in ("WRITE", "READ")),
    *(Cell(op, size) for size in SINGLES for op in ("WRITE", "READ")),
    Cell("READ", 256 * KIB, 128, "disk"),
    Cell("READ", MIB, 32, "disk"),
)
FULL = Pace(7, 0.2, 3600.0)
QUICK = Pace(5, 0.02, 30.0)
QUICK_SIZES = (4 * KIB, 256 * KIB, MIB, 16 * MIB)
POOL_CACHES, QUICK_POOL_CACHES = 8, 4
"""A pool is so many times as big as the last-level cache: what comes round again is cold."""


def among(sizes: Sequence[int], pages: Sequence[int] = (1,), medium: str = "memory") -> tuple[Cell, ...]:
    """Return the cells with these sizes and numbers of pages."""
    return tuple(c for c in CELLS if c.size in sizes and c.pages in pages and c.medium == medium)


BIG = SINGLES[3:]
FROM_64K = among(SINGLES[1:])
PAGES_256K = among([256 * KIB], [128])
ALL_BATCHES = among([64 * KIB, 256 * KIB], [128, 512])
BARS = (
    Bar("shm / memcpy, 1-64 MiB", "shm", "memcpy", "gb_s", 0.90, among(BIG)),
    Bar("shm / NIXL", "shm", "nixl", "gb_s", 1.0, FROM_64K + ALL_BATCHES),
    Bar("shm / upstream", "shm", "upstream", "gb_s", 8.0, FROM_64K + ALL_BATCHES),
    Bar("tcp / memcpy, pages", "tcp", "memcpy", "gb_s", 0.30, PAGES_256K),
    Bar("tcp / upstream, pages", "tcp", "upstream", "gb_s", 2.5, PAGES_256K),
    Bar("upstream's us / tcp's", "tcp", "upstream", "us", 1.0, among([4 * KIB])),
    Bar("verified / memcpy", "verify", "memcpy", "gb_s", 0.60, among(BIG)),
    Bar("SSD / O_DIRECT", "file", "O_DIRECT", "gb_s", 0.90, CELLS[-2:]),
    Bar("NIXL's CPU / shm's", "shm", "nixl", "cpu_s_gb", 1.0, FROM_64K + ALL_BATCHES),
    Bar("upstream's CPU / shm's", "shm", "upstream", "cpu_s_gb", 1.0, FROM_64K + ALL_BATCHES),
    Bar("upstream's CPU / tcp's", "tcp", "upstream", "cpu_s_gb", 1.0, ALL_BATCHES),
)


FIGURES = {
    "gb_s": "GB/s",
    "us": "microseconds for one go",
    "ratio": "GB/s, times {}",
    "cpu_s_gb": "CPU seconds per GB, both processes",
}


def pool_size(caches: int) -> int:
    """Return the size of a pool: a power of two."""
    return 1 << (min(POOL_BYTES_MAX, caches * cache_bytes()) - 1).bit_length()


def cache_bytes() -> int:
    """Return the size of the last-level cache, 32 MiB if the kernel does not tell."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max([32 * MIB, *(int(file.read_text().strip().removesuffix("K")) * KIB for file in files)])


def main() -> None:
    """See the module's text."""
    parser = contest.parser(__doc__)
    parser.add_argument("--dir", metavar="DIR", help="on the disk to measure (default: the temporary folder)")
    args = parser.parse_args()
    contenders = contest.wanted(CONTENDERS, args)
    sizes = QUICK_SIZES if args.quick else SINGLES
    cells = [c for c in CELLS if c.size in sizes and any(c.medium == o.medium for o in contenders)]
    pace = QUICK if args.quick else FULL
    pool_bytes = pool_size(QUICK_POOL_CACHES if args.quick else POOL_CACHES)
    samples, names, skipped = contest.run(contenders, args, cells, pace, pool_bytes, args.dir)
    for medium in ("memory", "disk"):
        here = [c.name for c in CONTENDERS if c.medium == medium and c.name in names]
        shown = [c for c in CELLS if c.medium == medium]
        for figure, title in FIGURES.items() if here else ():
            harness.show(f"{medium}: {title.format(here[0])}", table(samples, here, shown, figure))
    contest.conclude(args, samples, BARS, skipped, pool_bytes=pool_bytes, pace=asdict(pace))


if __name__ == "__main__":
    main()
