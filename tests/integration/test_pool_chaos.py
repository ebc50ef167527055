"""A pool of real processes under load while one of them dies, stands still or comes back.

What must hold all the while: a read returns the bytes that were put under its key, or nothing; a put
that says that a store has the block is true as long as that store lives; nobody waits without an end.
"""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.client.model import Outcome, Result
from kvstore.client.pool import Pool
from mooncake.core.messages import StoreRecord
from tests.integration.pool_processes import METADATA, WAIT_S, PoolProcesses, content, key, until
from tests.integration.ports import lasting_port

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

SIZE = 16 << 10
CALL_S = 3.0
"""Deadline of each call of the load."""
FIRST = 150
"""Puts before anything breaks."""
MORE = 200
"""Reads, and a third as many puts, after something broke."""
PUTS_MAX = 4_000
"""One copy or two of each fit into two stores of 64 MiB: nothing is evicted, so nothing may be missing."""
PAUSE_S = 0.005
OUTAGE_S = 5.0
KEPT = (Outcome.DONE, Outcome.EXISTS)


class Processes(PoolProcesses):
    """Also stores with an SSD tier, and a metadata server that comes back at its address."""

    def __init__(self, folder: Path) -> None:
        self._port = lasting_port()
        super().__init__(folder)

    def _own_metadata(self) -> str:
        self.start_metadata()
        return f"tcp://127.0.0.1:{self._port}"

    def start_metadata(self) -> None:
        """An empty one: what it knew is forgotten."""
        program = METADATA.replace("127.0.0.1:*", f"127.0.0.1:{self._port}")
        process = self._spawn("metadata", [sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout
        assert process.stdout.readline()

    def ssd_store(self, node: str, ssd: Path) -> StoreRecord:
        pid = self._mooncake(
            *(node, "store", "--node", node, "--capacity", "16MiB", "--ssd", str(ssd), "--ssd-size", "1GiB"),
            *("--run-dir", str(self.folder / f"run-{node}"), "--admin-port", str(lasting_port())),
        )
        return until(lambda: next((r for r in self.records(StoreRecord) if r.pid == pid), None))

    def nodes(self) -> set[str]:
        """Who is registered."""
        return {record.node for record in self.records(StoreRecord)}


class Load:
    """Readers and a writer until `stop`; `wrong` is what must stay empty."""

    def __init__(self, metadata: str, preferred: list[str], writes: bool = True) -> None:
        self._metadata = metadata
        self._preferred = preferred
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.results: dict[int, Result] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        work: list[Callable[[Pool], None]] = [self._read, self._read, *([self._write] if writes else [])]
        self._threads = [
            threading.Thread(target=self._run, args=(one, seed), daemon=True) for seed, one in enumerate(work)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the load and say what was wrong."""
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a call does not come back"
        assert self.wrong == []

    def kept(self, *nodes: str) -> list[int]:
        """Return what was said to be on one of these nodes (on any)."""
        with self._lock:
            done = [(n, result) for n, result in self.results.items() if result.outcome in KEPT]
        return [n for n, result in done if not nodes or set(nodes) & set(result.nodes)]

    def go_on(self, reads: int = MORE) -> None:
        """Return after so many more reads, and a third as many puts."""
        with self._lock:
            before = self.counts.copy()
        puts = reads // 3 if before["put"] else 0

        def enough() -> bool:
            assert self.wrong == []
            more = self.counts - before
            return more["read"] >= reads and more["put"] >= puts

        until(enough)

    # ------------------------------------------------------------ threads

    def _run(self, work: Callable[[Pool], None], seed: int) -> None:
        try:
            with Pool(self._metadata, writer=f"chaos-{seed}", touch=False) as pool:
                while not self._over.wait(PAUSE_S):
                    work(pool)
        except Exception as error:  # noqa: BLE001 - whatever escapes a call of the pool is what we look for
            self.wrong.append(repr(error))

    def _read(self, pool: Pool) -> None:
        known = self.kept()
        if not known:
            return
        n = random.choice(known)
        (data,) = pool.get([key(n)], deadline_s=CALL_S)
        if data is not None and data != content(key(n), SIZE):
            self.wrong.append(f"block {n} is read as {data[:16].hex()}")
        with self._lock:
            self.counts["read"] += 1
            self.counts["miss" if data is None else "hit"] += 1

    def _write(self, pool: Pool) -> None:
        n = len(self.results)
        if n >= PUTS_MAX:
            with self._lock:
                self.counts["put"] += 1
            return
        preferred = [self._preferred[n % len(self._preferred)]]
        data = content(key(n), SIZE)
        (result,) = pool.put([key(n)], [data], replicas=1 + n % 2, preferred=preferred, deadline_s=CALL_S)
        if result.outcome in KEPT and not result.nodes:
            self.wrong.append(f"block {n} is {result.outcome} at nobody")
        if result.outcome is Outcome.FAILED and not result.reason:
            self.wrong.append(f"block {n} failed without a reason")
        with self._lock:
            self.results[n] = result
            self.counts["put"] += 1
            self.counts[str(result.outcome)] += 1


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def ssd(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test: the tier's file has 1 GiB."""
    yield tmp_path / "ssd"
    shutil.rmtree(tmp_path / "ssd", ignore_errors=True)


@pytest.fixture
def three(processes: Processes) -> Processes:
    for node in "abc":
        processes.store(node)
    return processes


def readable(metadata: str, numbers: list[int]) -> set[int]:
    """Return which blocks a process that has just come reads, after comparing them."""
    found = set()
    with Pool(metadata, touch=False) as pool:
        for n in numbers:
            (data,) = pool.get([key(n)], deadline_s=CALL_S)
            assert data in (None, content(key(n), SIZE))
            if data is not None:
                found.add(n)
    return found


def test_a_killed_store_takes_only_what_it_alone_held(three):
    with Load(three.metadata, ["a", "b", "c"]) as load:
        until(lambda: len(load.kept()) >= FIRST)
        three.kill("b")
        load.go_on()
        until(lambda: three.nodes() == {"a", "c"})  # its lease has ended
        load.go_on()
        late = len(load.results)
        load.go_on()
        load.stop()
    elsewhere = load.kept("a", "c")
    assert readable(three.metadata, elsewhere) == set(elsewhere)
    alone = sorted(set(load.kept()) - set(elsewhere))
    assert alone, "nothing was on the dead store alone: this proves little"
    assert readable(three.metadata, alone) == set()
    # whoever writes after it was noticed is told the truth: all of it is kept by those who live
    assert {n for n in load.kept() if n > late} <= set(elsewhere)
    assert load.counts["hit"] > FIRST


def test_a_store_that_stands_still_is_left_out_and_has_everything_when_it_goes_on(three):
    with Load(three.metadata, ["a", "b", "c"]) as load:
        until(lambda: len(load.kept()) >= FIRST)
        three.signal("b", signal.SIGSTOP)
        load.go_on()
        until(lambda: three.nodes() == {"a", "c"})
        load.go_on()
        three.signal("b", signal.SIGCONT)
        until(lambda: three.nodes() == {"a", "b", "c"})
        load.go_on()
        load.stop()
    kept = load.kept()
    assert readable(three.metadata, kept) == set(kept)


def test_an_outage_of_the_metadata_store_costs_no_read_and_no_write(three):
    with Load(three.metadata, ["a", "b", "c"]) as load:
        until(lambda: len(load.kept()) >= FIRST)
        three.kill("metadata")
        end_s = time.monotonic() + OUTAGE_S
        while time.monotonic() < end_s:
            load.go_on(20)
        three.start_metadata()
        until(lambda: three.nodes() == {"a", "b", "c"})
        load.go_on()
        load.stop()
    assert load.counts["failed"] == 0
    assert load.counts["full"] == 0
    assert load.counts["miss"] == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_store_that_is_started_again_serves_from_its_ssd_what_it_had_copied(processes, ssd, end):
    record = processes.ssd_store("a", ssd)
    with Load(processes.metadata, ["a"]) as load:
        until(lambda: len(load.kept()) >= FIRST)
        load.stop()
    kept = load.kept()
    until(lambda: ssd_objects(record) >= len(kept))
    with Load(processes.metadata, ["a"], writes=False) as readers:
        readers.results = load.results
        readers.go_on(20)
        processes.signal("a", end)
        processes._end("a")
        processes.ssd_store("a", ssd)
        before = readers.counts["hit"]
        until(lambda: readers.counts["hit"] > before + 20)  # they find it by themselves
        readers.stop()
    assert readable(processes.metadata, kept) == set(kept)


def ssd_objects(record: StoreRecord) -> float:
    try:
        with urllib.request.urlopen(record.metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0.0  # not yet
    return sum(float(line.split()[-1]) for line in lines if line.startswith("mooncake_store_ssd_objects"))
