"""Run inside two VMs with two cables: eth0 carries RDMA, eth1 TCP. One end of eth0 is pulled in the middle.

    python guest_engine.py owner 10.0.1.1     |     python guest_engine.py initiator 10.0.1.2 10.0.1.1:PORT

The initiator prints "PASS|FAIL engine check detail"; the owner serves until it is told to stop.
"""

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mooncake.core.errors import MooncakeError
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
from transfer.hugepages import create_segment
from transfer.model import Buffer, Opcode
from transfer.segment import HUGE_PAGE_BYTES

HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
PORT = 7472
SECRET = b"the same on both hosts"
SIZE = 2 << 20
PAGE = 64 << 10
LIFE_S = 200.0


def engine(host: str, port: int = 0) -> TransferEngine:
    return TransferEngine(EngineConfig(host=host, port=port, secret=SECRET, run_dir="/run/transfer"))


def owner(host: str) -> int:
    HUGE_PAGES.write_text(str(SIZE // HUGE_PAGE_BYTES))  # a store's memory is of huge pages where it can be
    with engine(host, PORT) as mine:
        buffer = mine.register(create_segment("owner", SIZE, "require"))
        assert buffer.view is not None
        end_s = time.monotonic() + LIFE_S
        while time.monotonic() < end_s:
            for title, text in mine.notifications():
                if title == "stop":
                    return 0
                mine.notify(text, "sum", hashlib.sha256(buffer.view).hexdigest())
            time.sleep(0.02)
    return 1


class Initiator:
    def __init__(self, host: str, name: str) -> None:
        self.engine = engine(host).start()
        self.name = name
        end_s = time.monotonic() + 60
        while True:
            try:
                buffers = self.engine.peer(name).refresh(5.0).buffers
                if buffers:
                    break
            except MooncakeError:
                if time.monotonic() > end_s:
                    raise
            time.sleep(0.5)
        self.there = buffers[0].address
        self.mine: Buffer = self.engine.register(np.zeros(SIZE, np.uint8))
        self.back: Buffer = self.engine.register(np.zeros(SIZE, np.uint8))
        self.seed = 0

    def write_and_read(self, meanwhile: Callable[[], None] | None = None) -> str:
        """Move random bytes there in pages and back in one piece; return how many went which way."""
        assert self.mine.view is not None
        assert self.back.view is not None
        self.seed += 1
        data = np.random.default_rng(self.seed).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
        self.mine.view[:] = data
        before = self.moved()
        pages = range(0, SIZE, PAGE)
        batch = self.engine.submit(
            Opcode.WRITE,
            self.name,
            [self.mine.address + at for at in pages],
            [self.there + at for at in pages],
            [PAGE] * len(pages),
            deadline_s=60,
        )
        if meanwhile:
            meanwhile()
        assert batch.wait()
        batch.check()
        self.engine.notify(self.name, "sum?", self.engine.name, deadline_s=20)
        assert self.next_note() == hashlib.sha256(data).hexdigest(), "other bytes arrived"
        self.back.view[:] = bytes(SIZE)
        self.engine.transfer(Opcode.READ, self.name, self.back.address, self.there, SIZE, deadline_s=60)
        assert bytes(self.back.view) == data, "other bytes came back"
        after = self.moved()
        return ", ".join(f"{name} {size - before.get(name, 0)}" for name, size in sorted(after.items()))

    def next_note(self) -> str:
        end_s = time.monotonic() + 20
        while time.monotonic() < end_s:
            for _, text in self.engine.notifications():
                return text
            time.sleep(0.01)
        raise AssertionError("the owner does not answer")

    def moved(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for (transport, _, _), size in self.engine.metrics.counts().bytes.items():
            counts[transport] = counts.get(transport, 0) + int(size)
        return counts


def link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "eth0", state], check=True)


def healthy(end: Initiator) -> str:
    way = end.write_and_read()
    assert f"rdma {2 * SIZE}" in way, way
    return way


def pulled_in_the_middle(end: Initiator) -> str:
    timer = threading.Timer(0.05, link, ("down",))
    way = end.write_and_read(timer.start)
    timer.join()
    return way


def while_it_is_down(end: Initiator) -> str:
    way = end.write_and_read()
    assert f"tcp {2 * SIZE}" in way, way
    return way


def failover_is_counted(end: Initiator) -> str:
    counts = end.engine.metrics.counts()
    assert sum(size for (transport, _, _), size in counts.bytes.items() if transport == "tcp") > 0
    text = ", ".join(f"{old}->{new} {int(n)}" for (old, new), n in counts.failovers.items())
    return text + f"; events { ({event: int(n) for (_, event), n in counts.nic_events.items()}) }"


def comes_back(end: Initiator) -> str:
    link("up")
    end_s = time.monotonic() + 60
    rounds = 0
    while time.monotonic() < end_s:
        rounds += 1
        way = end.write_and_read()
        if f"rdma {2 * SIZE}" in way:
            return f"after {rounds} rounds: {way}"
        time.sleep(0.5)
    raise AssertionError(f"not within 60 s, {rounds} rounds, last {way}")


CHECKS = (healthy, pulled_in_the_middle, while_it_is_down, failover_is_counted, comes_back)


def initiator(host: str, name: str) -> int:
    end = Initiator(host, name)
    failed = 0
    for check in CHECKS:
        start_s = time.monotonic()
        try:
            verdict, detail = "PASS", check(end)
        except (AssertionError, MooncakeError) as error:
            verdict, detail = "FAIL", f"{type(error).__name__}: {error}"
            failed += 1
        print(verdict, "engine", check.__name__, f"{time.monotonic() - start_s:.1f} s:", detail, flush=True)
    end.engine.notify(name, "stop", "")
    end.engine.close()
    return failed


if __name__ == "__main__":
    sys.exit(owner(sys.argv[2]) if sys.argv[1] == "owner" else initiator(*sys.argv[2:4]))
