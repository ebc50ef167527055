"""Verbs without a device, for unit tests: real bytes between ranges of this process, and faults on demand.

Work is carried out when its queue pair is polled, in order, with the checks of a real NIC: keys, ranges,
a connected twin. What was posted but not polled when a queue pair is closed is *in the network*:
`Fabric.deliver_late` lands those writes, unless the twin or the memory is gone by then, which is how a
missing fence shows.
"""

import ctypes
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerGone, RequestError
from transfer.messages import NicInfo, QpInfo
from transfer.model import Opcode
from transfer.verbs.api import Done, Memory, Nic, QueuePair, Work, WorkStatus

DEPTH = 64


class Fabric:
    """The network: every NIC and queue pair of every fake process."""

    def __init__(self) -> None:
        """Empty."""
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)
        self.pairs: dict[int, FakeQueuePair] = {}
        self.cuts: set[frozenset[bytes]] = set()
        self._late: list[tuple[FakeQueuePair, Work]] = []

    def cut(self, one: "FakeNic", other: "FakeNic") -> None:
        """Let nothing pass between two NICs."""
        self.cuts.add(frozenset((one.info.gid, other.info.gid)))

    def in_network(self, pair: "FakeQueuePair", works: Sequence[Work]) -> None:
        """Keep writes whose sender has closed its end."""
        self._late += [(pair, work) for work in works if work.op is Opcode.WRITE]

    def deliver_late(self) -> int:
        """Land the writes that were in the network, where somebody still takes them; return how many."""
        with self.lock:
            late, self._late = self._late, []
            return sum(pair.carry(work) is WorkStatus.DONE for pair, work in late)


class FakeMemory:
    """A registered range."""

    def __init__(self, nic: "FakeNic", address: int, size_bytes: int) -> None:
        """Made by FakeNic.register."""
        self.lkey = next(nic.fabric.numbers)
        self.rkey = next(nic.fabric.numbers) + (1 << 16)
        self._nic = nic
        self._range = range(address, address + size_bytes + 1)

    def holds(self, address: int, size_bytes: int) -> bool:
        """Return whether all of it lies inside."""
        return address in self._range and address + size_bytes in self._range

    def close(self) -> None:
        """See Memory."""
        with self._nic.fabric.lock:
            self._nic.memories.pop(self.lkey, None)
            self._nic.memories.pop(self.rkey, None)


class FakeQueuePair:
    """One end."""

    def __init__(self, nic: "FakeNic", number: int) -> None:
        """Made by FakeNic.queue_pair."""
        self.nic = nic
        self.number = number
        self.remote: QpInfo | None = None
        self.broken = False
        self.kill_after = nic.kill_next
        """Works until it dies, None = never."""
        self._posted: deque[Work] = deque()

    def local(self) -> QpInfo:
        """See QueuePair."""
        info = self.nic.info
        return QpInfo(info.name, info.port, self.number, 0, info.gid, info.lid, info.mtu)

    def connect(self, remote: QpInfo) -> None:
        """See QueuePair."""
        with self.nic.fabric.lock:
            if self.nic.unroutable or frozenset((self.nic.info.gid, remote.gid)) in self.nic.fabric.cuts:
                raise PeerGone(f"{self.nic.info.name}: no route to {remote.nic}")
            self.remote = remote

    def post(self, works: Sequence[Work]) -> None:
        """See QueuePair."""
        with self.nic.fabric.lock:
            if self.number not in self.nic.fabric.pairs:
                raise PeerGone("posted on a closed queue pair")
            assert len(self._posted) + len(works) <= self.nic.depth, "more outstanding than depth"
            self._posted.extend(works)
            self.nic.works_posted += len(works)
        if self.nic.on_post:
            self.nic.on_post(self)

    def poll(self, count_max: int) -> list[Done]:
        """See QueuePair."""
        done: list[Done] = []
        with self.nic.fabric.lock:
            while self._posted and len(done) < min(count_max, self.nic.per_poll) and not self.nic.hold:
                work = self._posted.popleft()
                status = WorkStatus.FLUSHED if self.broken else self.carry(work)
                self.broken |= status is not WorkStatus.DONE
                done.append(Done(work.work_id, status, status.value))
        return done

    def carry(self, work: Work) -> WorkStatus:
        """Move the bytes of `work` if everything is in order."""
        if self.kill_after is not None:
            self.kill_after -= 1
        assert self.remote is not None, "posted before connect"
        twin = self.nic.fabric.pairs.get(self.remote.qpn)
        cut = frozenset((self.nic.info.gid, self.remote.gid)) in self.nic.fabric.cuts
        if twin is None or twin.broken or cut or not (self.nic.up and twin.nic.up):
            return WorkStatus.UNREACHABLE
        if self.kill_after is not None and self.kill_after < 0:
            return WorkStatus.UNREACHABLE
        theirs = twin.nic.memories.get(work.rkey)
        if theirs is None or not theirs.holds(work.remote, work.size_bytes):
            twin.broken = True
            return WorkStatus.REFUSED
        mine = self.nic.memories.get(work.lkey)
        if mine is None or not mine.holds(work.local, work.size_bytes):
            return WorkStatus.FAILED
        source, target = (work.remote, work.local) if work.op is Opcode.READ else (work.local, work.remote)
        ctypes.memmove(target, source, work.size_bytes)
        self.nic.bytes_moved += work.size_bytes
        return WorkStatus.DONE

    def close(self) -> None:
        """See QueuePair."""
        with self.nic.fabric.lock:
            if self.nic.fabric.pairs.pop(self.number, None):
                self.nic.fabric.in_network(self, [] if self.broken else list(self._posted))
            self._posted.clear()


class FakeNic:
    """One port. Its plain attributes are the faults a test injects and the counts it looks at."""

    def __init__(self, fabric: Fabric, name: str, port: int) -> None:
        """Made by FakeVerbs.open."""
        number = next(fabric.numbers)
        self.fabric = fabric
        self.info = NicInfo(name, port, number.to_bytes(16, "big"), 1, 0, 4096, "ethernet")
        self.depth = DEPTH
        self.memories: dict[int, FakeMemory] = {}
        self.up = True
        self.unroutable = False
        """No queue pair can be connected."""
        self.hold = False
        """Nothing completes as long as this is set."""
        self.per_poll = DEPTH
        """A slow NIC completes fewer."""
        self.refuses: MooncakeError | None = None
        """Raised by every registration."""
        self.refuses_dmabuf: MooncakeError | None = None
        self.dmabufs: list[tuple[int, int]] = []
        """(fd, offset) of those registered."""
        self.kill_next: int | None = None
        """Queue pairs made from now on die after that many works."""
        self.pairs_max = 1 << 20
        self.on_post: Callable[[FakeQueuePair], None] | None = None
        """Called after every post, without a lock."""
        self.pairs_made = 0
        self.works_posted = 0
        self.bytes_moved = 0

    def is_up(self) -> bool:
        """See Nic."""
        return self.up

    def register(self, address: int, size_bytes: int) -> Memory:
        """See Nic."""
        if self.refuses:
            raise self.refuses
        if address <= 0 or size_bytes <= 0:
            raise RequestError(f"no memory at {address:#x}+{size_bytes}")
        with self.fabric.lock:
            memory = FakeMemory(self, address, size_bytes)
            self.memories[memory.lkey] = self.memories[memory.rkey] = memory
        return memory

    def register_dmabuf(self, fd: int, offset: int, address: int, size_bytes: int) -> Memory:
        """See Nic; any open descriptor will do."""
        os.fstat(fd)
        if self.refuses_dmabuf:
            raise self.refuses_dmabuf
        self.dmabufs.append((fd, offset))
        return self.register(address, size_bytes)

    def queue_pair(self) -> QueuePair:
        """See Nic."""
        with self.fabric.lock:
            if sum(pair.nic is self for pair in self.fabric.pairs.values()) >= self.pairs_max:
                raise CapacityError(f"{self.info.name} has no more queue pairs")
            self.pairs_made += 1
            pair = FakeQueuePair(self, next(self.fabric.numbers))
            self.fabric.pairs[pair.number] = pair
        return pair

    def close(self) -> None:
        """See Nic."""
        assert not self.memories, "memories are still registered"
        assert not any(pair.nic is self for pair in self.fabric.pairs.values()), "queue pairs are still open"


class FakeVerbs:
    """The library as one process sees it."""

    name = "fake"

    def __init__(self, fabric: Fabric, devices: Sequence[str]) -> None:
        """Have `devices`, each with two ports."""
        self._fabric = fabric
        self._devices = list(devices)
        self.nics: dict[str, FakeNic] = {}
        """Opened ones, "name" or "name:2", for tests."""

    def devices(self) -> list[str]:
        """See Verbs."""
        return list(self._devices)

    def open(self, device: str, port: int = 1, gid_index: int | None = None) -> Nic:
        """See Verbs."""
        if device not in self._devices or port not in (1, 2) or gid_index not in (None, 1):
            raise ConfigError(f"no port {port} or GID {gid_index} of {device} among {self._devices}")
        nic = FakeNic(self._fabric, device, port)
        self.nics[device if port == 1 else f"{device}:{port}"] = nic
        return nic
