"""What a killed directory and a killed store cost: seconds, wrong reads, lost words, lost blocks, memory.

Real processes on this machine: an embedded metadata server, one directory, three stores with blocks of
4 KiB (the directory does not care how large they are). While readers and a writer are at work through
directory and stores, the directory is killed with SIGKILL and started again at the same port, then a
store is killed. Readers ask the directory where blocks are and, while it is away, a store of their own
choice; every block that is read is compared with its checksum and its key. In the end every block that a
store acknowledged is looked for: what is missing had failed without the client being told.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import structlog

from benchmarks import harness
from kvstore.directory.directory import Mode
from kvstore.directory.messages import (
    DirectoryReply,
    DirectoryStatus,
    DirectoryStatusIs,
    Locate,
    Located,
)
from kvstore.engine.client import PoolClient
from mooncake.core.errors import CapacityError, IntegrityError, MooncakeError, PeerError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata_client import RemoteMetadata
from mooncake.core.rpc import BlockingRpcClient

NODES = ("a", "b", "c")
SIZE = 4 << 10
BLOCKS, QUICK_BLOCKS = 1_000_000, 100_000
TWICE = 10
"""Every tenth block is on two stores: it must survive either."""
HEADROOM = 1.25
"""Capacity for what the writer adds: nothing is evicted, so everything that is missing was lost."""
BATCH = 8_000
LOOKED_UP, WRITTEN = 64, 16
"""Keys of one question of a reader, blocks of one turn of the writer."""
PAUSE_S = 0.002
STEADY_S, QUICK_STEADY_S = 5.0, 1.0
"""Of load before each strike."""
CALL_S = 5.0
WAIT_S = 180.0
METADATA = """
import asyncio
from mooncake.core.metadata_client import MetadataServer

async def main():
    server = MetadataServer("tcp://127.0.0.1:*")
    server.start()
    print(server.endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
Row = dict[str, Any]


def lasting_port() -> int:
    """Return a port that nobody gets by accident while the directory is dead.

    The kernel gives those from 32768 on to whoever asks for any.
    """
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def key_of(number: int) -> bytes:
    """Return the name of a block, spread like a digest but cheap to make."""
    return (number * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "little") * 4


def homes_of(number: int) -> tuple[str, ...]:
    """Return where a block of the first filling is."""
    first = number % len(NODES)
    twice = number % TWICE == 0
    return (NODES[first], NODES[(first + 1) % len(NODES)]) if twice else (NODES[first],)


class Processes:
    """The pool's processes; killed as a power cut kills."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        """Start all of them and wait until the stores are registered."""
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._port = lasting_port()
        self._metadata = ""
        try:
            process = self._spawn("metadata", [sys.executable, "-c", METADATA], stdout=subprocess.PIPE)
            assert process.stdout
            self._metadata = process.stdout.readline().decode().strip()
            self.start_directory()
            for node in NODES:
                self._command(node, "store", "--node", node, "--capacity", str(capacity_bytes),
                              "--run-dir", str(folder / node))  # fmt: skip
            until("the stores are registered", lambda: len(self.records()) == len(NODES))
        except BaseException:
            self.close()
            raise

    def start_directory(self) -> None:
        """Start it, also again, at the same address."""
        self._command("directory", "directory", "--name", "d", "--port", str(self._port))

    @property
    def directory(self) -> str:
        """Its address."""
        return f"tcp://127.0.0.1:{self._port}"

    def records(self) -> dict[str, StoreRecord]:
        """Return who is registered."""

        async def ask() -> list[bytes]:
            store = RemoteMetadata(self._metadata)
            try:
                return [entry.value for entry in (await store.get(STORES_PREFIX)).entries]
            finally:
                await store.close()

        found = [msgspec.json.decode(value, type=StoreRecord) for value in asyncio.run(ask())]
        return {record.node: record for record in found}

    def kill(self, name: str) -> None:
        """End one with SIGKILL."""
        process = self._running.pop(name)
        process.kill()
        process.wait(WAIT_S)

    def anonymous_bytes(self, name: str) -> int:
        """Return its resident memory without what it shares: a store's blocks are shared memory."""
        info = psutil.Process(self._running[name].pid).memory_info()
        return int(info.rss - info.shared)

    def cpu_s(self, name: str) -> float:
        """Return the CPU time it has used: it tells more than the clock on a machine that others share."""
        times = psutil.Process(self._running[name].pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """Kill all."""
        for name in list(self._running):
            self.kill(name)

    def _command(self, name: str, *words: str) -> None:
        mooncake = str(Path(sys.executable).parent / "mooncake")
        self._spawn(name, [mooncake, *words, "--metadata", self._metadata, "--log-level", "warning"])

    def _spawn(self, name: str, command: Sequence[str], stdout: Any = None) -> "subprocess.Popen[bytes]":
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, start_new_session=True
            )
        self._running[name] = process
        return process


def until(what: str, condition: Callable[[], bool]) -> float:
    """Wait until `condition`; an error of ours counts as no. Return when it held."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        with contextlib.suppress(MooncakeError):
            if condition():
                return time.monotonic()
        time.sleep(0.01)
    raise SystemExit(f"not within {WAIT_S:g} s: {what}")


def put(pool: PoolClient, keys: Sequence[bytes]) -> list[bool]:
    """Write blocks that begin with their key; return for each whether the store has it."""
    slots = pool.reserve(keys, SIZE, CALL_S)
    mine = [slot for slot in slots if slot is not None]
    for slot in mine:
        slot.view[: len(slot.key)] = slot.key
    sums = [block_checksum(slot.key, slot.view) for slot in mine]
    done = iter(pool.commit([slot.ticket for slot in mine], sums, CALL_S))
    return [slot is not None and next(done) for slot in slots]


def read(pool: PoolClient, keys: Sequence[bytes]) -> int:
    """Return how many leading keys are there.

    Raises:
        IntegrityError: one of them is not what was put under its key.
    """
    lease = pool.acquire(keys, CALL_S, 0.0, CALL_S)
    try:
        for row, key in enumerate(lease.keys):
            if not lease.verify(row) or bytes(lease.views[row][: len(key)]) != key:
                raise IntegrityError(f"store: wrong bytes under {key.hex()}")
        return len(lease)
    finally:
        if lease.lease_id:
            pool.release(lease.lease_id)


class Load:
    """Readers and a writer at work until `stop`."""

    def __init__(self, processes: Processes, filled: int) -> None:
        """`filled`: blocks there are already."""
        self._processes = processes
        self._filled = filled
        self._records = processes.records()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.acknowledged: dict[str, list[int]] = {node: [] for node in NODES}
        self.died: list[str] = []
        work = (self._read, self._read, self._write)
        self._threads = [threading.Thread(target=self._guard, args=(one,), daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End it; a worker that died of anything but what was foreseen makes the run worthless."""
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        if self.died:
            raise SystemExit(f"the load died: {self.died}")

    def _guard(self, work: Callable[[dict[str, PoolClient]], None]) -> None:
        with contextlib.ExitStack() as stack:
            pools = {}
            for node, record in self._records.items():
                pools[node] = PoolClient(record, f"recovery-{id(stack)}", touch=False, deadline_s=CALL_S)
                stack.callback(pools[node].close)
            try:
                work(pools)
            except (MooncakeError, AssertionError, ValueError) as error:
                self.died.append(repr(error))

    def _count(self, **more: int) -> None:
        with self._lock:
            self.counts.update(more)

    def _read(self, pools: dict[str, PoolClient]) -> None:
        directory = BlockingRpcClient(self._processes.directory, DirectoryReply)
        try:
            while not self._over.wait(PAUSE_S):
                numbers = random.sample(range(self._filled), LOOKED_UP)
                keys = [key_of(number) for number in numbers]
                try:
                    found: Located = directory.call(Locate(keys), 0.2)
                    homes = [found.nodes[row[0]] if row else "" for row in found.holders]
                    self._count(lookups=1)
                except PeerError:
                    homes = [homes_of(number)[0] for number in numbers]
                    self._count(lookups_failed=1)
                for key, node in zip(keys, homes, strict=True):
                    if node:
                        self._one(pools[node], key)
        finally:
            directory.close()

    def _one(self, pool: PoolClient, key: bytes) -> None:
        try:
            self._count(**{"reads": 1, ("hits" if read(pool, [key]) else "misses"): 1})
        except IntegrityError:
            self._count(reads=1, wrong=1)
        except (PeerError, CapacityError):
            self._count(reads_refused=1)

    def _write(self, pools: dict[str, PoolClient]) -> None:
        number = 1 << 40
        while not self._over.wait(4 * PAUSE_S):
            node = NODES[number // WRITTEN % len(NODES)]
            numbers = list(range(number, number + WRITTEN))
            number += WRITTEN
            try:
                done = put(pools[node], [key_of(one) for one in numbers])
            except (PeerError, CapacityError):
                self._count(puts_refused=WRITTEN)  # the client was told
                continue
            with self._lock:
                self.acknowledged[node] += [one for one, ok in zip(numbers, done, strict=True) if ok]
            self._count(puts=sum(done), puts_refused=WRITTEN - sum(done))


class Directory:
    """What the directory says, asked anew each time: it may have been started again."""

    def __init__(self, endpoint: str) -> None:
        """See `ask`."""
        self.endpoint = endpoint

    def ask(self) -> DirectoryStatusIs:
        """Return its status; raises PeerError while it is away."""
        client = BlockingRpcClient(self.endpoint, DirectoryReply)
        try:
            status: DirectoryStatusIs = client.call(DirectoryStatus(), 0.5)
            return status
        finally:
            client.close()

    def exact(self, nodes: int, entries: int) -> bool:
        """Return whether it knows so many blocks at least, and all nodes exactly."""
        status = self.ask()
        return status.mode is Mode.EXACT and len(status.nodes) == nodes and status.blocks >= entries


def fill(records: dict[str, StoreRecord], blocks: int) -> float:
    """Put the first blocks; return how many seconds it took."""
    began_s = time.monotonic()
    for node, record in records.items():
        numbers = [number for number in range(blocks) if node in homes_of(number)]
        pool = PoolClient(record, "recovery-fill", touch=False, deadline_s=CALL_S)
        try:
            for at in range(0, len(numbers), BATCH):
                if not all(put(pool, [key_of(number) for number in numbers[at : at + BATCH]])):
                    raise SystemExit(f"store {node} has no room for {len(numbers)} blocks")
        finally:
            pool.close()
    return time.monotonic() - began_s


def missing(pool: PoolClient, numbers: Sequence[int]) -> int:
    """Return how many blocks a store has not, after comparing those that it has."""
    lost, at = 0, 0
    while at < len(numbers):
        some = [key_of(number) for number in numbers[at : at + BATCH]]
        found = read(pool, some)
        at += found
        if found < len(some):
            lost += 1
            at += 1
    return lost


@contextlib.contextmanager
def pool_of(capacity_bytes: int) -> Iterator[Processes]:
    """Give the processes, and end them."""
    with tempfile.TemporaryDirectory(prefix="bench-recovery-") as folder:
        processes = Processes(Path(folder), capacity_bytes)
        try:
            yield processes
        finally:
            processes.close()


def measure(
    processes: Processes, blocks: int, steady_s: float, begin: Callable[[str], None]
) -> dict[str, Row]:
    """Return the rows by their titles."""
    directory = Directory(processes.directory)
    until("the directory is in step", lambda: directory.exact(len(NODES), 0))
    names = [*NODES, "directory"]
    before = {name: processes.anonymous_bytes(name) for name in names}
    records = processes.records()
    begin(f"filling {blocks} blocks")
    fill_s = fill(records, blocks)
    until("the directory has all blocks", lambda: directory.exact(len(NODES), blocks))
    copies = {node: sum(node in homes_of(number) for number in range(blocks)) for node in NODES}
    grown = {name: processes.anonymous_bytes(name) - before[name] for name in names}
    memory: Row = {
        "blocks": blocks,
        "copies": sum(copies.values()),
        "filled in s": fill_s,
        "bytes/block in node": sum(grown[node] for node in NODES) / sum(copies.values()),
        "bytes/block in directory": grown["directory"] / blocks,
    }
    load = Load(processes, blocks)
    begin("the directory is killed")
    time.sleep(steady_s)
    row = strike_directory(processes, directory, load)
    begin("a store is killed")
    time.sleep(steady_s)
    lost = strike_store(processes, directory)
    load.stop()
    begin("looking for every block")
    silent = lost["lost of the others"] = 0
    for node in NODES[:-1]:
        pool = PoolClient(records[node], "recovery-check", touch=False, deadline_s=CALL_S)
        try:
            silent += missing(pool, load.acknowledged[node])
            first = [number for number in range(blocks) if node in homes_of(number)]
            lost["lost of the others"] += missing(pool, first)
        finally:
            pool.close()
    on_it = [number for number in range(blocks) if "c" in homes_of(number)] + load.acknowledged["c"]
    lost["blocks on it"] = len(on_it)
    lost["lost"] = unknown(directory, on_it)
    lost["it alone held"] = sum(number >= blocks or homes_of(number) == ("c",) for number in on_it)
    row |= {"wrong reads": load.counts["wrong"], "silent failures": silent}
    return {"memory": memory, "directory": row, "store": lost, "load": dict(sorted(load.counts.items()))}


def strike_directory(processes: Processes, directory: Directory, load: Load) -> Row:
    """Kill the directory, start it again, wait until it is as full as it was."""
    entries, counts = directory.ask().blocks, load.counts.copy()
    killed_s = time.monotonic()
    processes.kill("directory")
    processes.start_directory()
    answers_s = until("the directory answers", lambda: directory.ask() is not None)
    exact_s = until("the directory is exact", lambda: directory.exact(len(NODES), entries))
    during = load.counts - counts
    return {
        "blocks": entries,
        "answers after s": answers_s - killed_s,
        "exact after s": exact_s - killed_s,
        "its CPU s": processes.cpu_s("directory"),
        "reads meanwhile": during["reads"],
        "puts meanwhile": during["puts"],
    }


def unknown(directory: Directory, numbers: Sequence[int]) -> int:
    """Return how many of these blocks the directory knows nowhere."""
    client = BlockingRpcClient(directory.endpoint, DirectoryReply)
    try:
        nowhere = 0
        for at in range(0, len(numbers), BATCH):
            keys = [key_of(number) for number in numbers[at : at + BATCH]]
            found: Located = client.call(Locate(keys), CALL_S)
            nowhere += sum(not row for row in found.holders)
        return nowhere
    finally:
        client.close()


def strike_store(processes: Processes, directory: Directory) -> Row:
    """Kill store c; wait until nobody names it any more."""
    killed_s = time.monotonic()
    processes.kill("c")
    gone_s = until("c is out of the index", lambda: all(one.node != "c" for one in directory.ask().nodes))
    return {"out of the index after s": gone_s - killed_s}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_BLOCKS} blocks: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    blocks = QUICK_BLOCKS if args.quick else BLOCKS
    capacity = int(blocks / len(NODES) * (1 + 1 / TWICE) * HEADROOM) * SIZE
    with harness.progress(5) as begin:
        begin("starting")
        with pool_of(-(-capacity // (2 << 20)) * (2 << 20)) as processes:
            rows = measure(processes, blocks, QUICK_STEADY_S if args.quick else STEADY_S, begin)
    harness.show(
        "Memory per cached block (private memory; blocks of 4 KiB lie in shared memory)", [rows["memory"]]
    )
    harness.show("A directory killed and started again under load", [rows["directory"]])
    harness.show("A store killed under load", [rows["store"]])
    harness.show("The load", [rows["load"]])
    harness.save(args.json, rows)


if __name__ == "__main__":
    main()
