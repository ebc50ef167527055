"""A small pool in virtual time around the real Node, Directory, EventStream, Placer and Tasks.

Only memory, links, leases of the metadata store and the clients are simulated. Memory is real bytes,
written and read in halves, so that a torn or late write is seen. Links lose, repeat and reorder;
nodes and directories crash and return; pairs are cut off; writers are slow. Whoever does something
that takes time is a generator that yields `Call` or a pause. One `Random(seed)` decides everything.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvstore.directory.directory import Directory
from kvstore.directory.event_stream import Apply, Distrust, EventStream, Reset, SnapshotPages, TakeSnapshot
from kvstore.leader.placement import Placer, Room
from kvstore.leader.task_types import Command, Drop, State
from kvstore.leader.tasks import Tasks
from kvstore.limits import HEARTBEAT_S, NodeLimits
from kvstore.node.contract import id_base
from kvstore.node.events import Snapshots
from kvstore.node.node import Node
from mooncake.core.errors import MooncakeError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import Acquired, Block, SnapshotPage, StoreEvents

PAGE = 4096
SIZE = 64
PAGES = 4  # few, so that blocks are evicted
KEYS = [bytes([n]) * 32 for n in range(1, 9)]
HOT = KEYS[:2]
LIMITS = NodeLimits(write_s=2.0, quarantine_s=3.0, lease_s_max=4.0)
LEASE_S = 1.5
RPC_S = 0.5
META_TTL_S = 2.0
META_S = 0.03
LATE_S_MAX = LIMITS.quarantine_s - 0.1
"""A writer that was given up writes at most this much later: the bound that quarantine promises."""


class Violation(AssertionError):
    """A promise of the pool was broken."""


@dataclass
class Call:
    """`yield Call(...)` gives the answer, a MooncakeError, or None after RPC_S."""

    source: str
    target: str
    what: Callable[[Any], Any]


Steps = Generator[Any, Any, None]


@dataclass
class Life:
    """One start of a node: its memory and everything else ends with it."""

    name: str
    epoch: str
    node: Node
    memory: bytearray
    snapshots: Snapshots
    seq: int = 0
    leased: dict[int, tuple[float, list[Block]]] = field(default_factory=dict)
    corrupt: set[int] = field(default_factory=set)
    commits_s: dict[bytes, float] = field(default_factory=dict)


class SimDirectory:
    """One start of a directory process; the leader also runs the tasks."""

    def __init__(self, world: "World", name: str, leader: bool) -> None:
        self.world, self.name, self.leader = world, name, leader
        self.directory = Directory()
        self.directory.members_known = True
        self.streams: dict[str, EventStream] = {}
        self.placer = Placer()
        self.tasks = Tasks(self.directory, self.placer)
        self.drain_id, self.drained_s = -1, math.inf
        for node, epoch in world.members.items():
            self.member(node, epoch)
        if leader:
            self.tasks.keep_hot(HOT, 2, SIZE)
            if world.draining:
                self.drain(world.draining)

    def drain(self, node: str) -> None:
        self.drain_id = self.tasks.drain(node, SIZE)

    @property
    def alive(self) -> bool:
        return self.world.directories.get(self.name) is self

    def member(self, node: str, epoch: str | None) -> None:
        """The metadata store says: `node` is there, or its lease has ended."""
        world = self.world
        if epoch is not None:
            known = {status.node: status.epoch for status in self.directory.status(0.0)}
            if known.get(node) != epoch:
                self.streams[node] = EventStream(world.now_s)
            self.directory.join(world.now_s, node, epoch)
        elif self.directory.leave(node):
            del self.streams[node]
            self.placer.leave(node)
            self.run(self.tasks.on_leave(world.now_s, node))

    def hear(self, event: StoreEvents, room: Room) -> None:
        stream = self.streams.get(event.node)
        if stream is not None:
            self.placer.update(room)
            self.act(event.node, stream, stream.on_message(self.world.now_s, event))

    def tick(self) -> None:
        world, now_s = self.world, self.world.now_s
        for node, stream in self.streams.items():
            self.act(node, stream, stream.tick(now_s))
        if self.leader:
            self.run(self.tasks.tick(now_s))
            drain = self.tasks.progress(self.drain_id)
            if drain and drain.state is State.DONE and self.drained_s == math.inf:
                there = any(status.node == world.draining for status in self.directory.status(now_s))
                self.drained_s = now_s if there else -math.inf  # it left: then it says nothing of its return

    def act(self, node: str, stream: EventStream, actions: list[Any]) -> None:
        directory, now_s = self.directory, self.world.now_s
        for action in actions:
            match action:
                case TakeSnapshot():
                    self.world.spawn(self.take_snapshot(node, stream))
                case Reset(epoch, pages):
                    self.world.counts["snapshots"] += 1
                    directory.on_snapshot(now_s, node, epoch, pages)
                case Apply(stored, removed):
                    directory.on_events(now_s, node, stored, removed)
                case Distrust(reason):
                    self.world.counts["distrusts"] += 1
                    directory.on_stale(now_s, node, reason)

    def take_snapshot(self, node: str, stream: EventStream) -> Steps:
        pages, cursor, failed = SnapshotPages(), 0, False
        while True:
            answer = yield Call(self.name, node, lambda life, cursor=cursor: self.world.page(life, cursor))
            failed = not isinstance(answer, SnapshotPage)
            if not failed:
                try:
                    cursor = pages.add(answer)
                except MooncakeError:
                    failed = True
            if failed or not cursor:
                break
        if failed:
            yield 0.3
        if self.alive and self.streams.get(node) is stream:
            now_s = self.world.now_s
            self.act(
                node,
                stream,
                stream.on_failed()
                if failed
                else stream.on_snapshot(now_s, pages.epoch, pages.seq, pages.pages),
            )

    def run(self, commands: list[Command]) -> None:
        for command in commands:
            self.world.spawn(self.execute(command))

    def execute(self, command: Command) -> Steps:
        world = self.world
        if isinstance(command, Drop):
            answer = yield Call(self.name, command.node, lambda life: world.drop(life, command.key))
            error = "" if answer == "ok" else "no answer"
        else:
            found: list[bytes] = []
            yield from world.read(self.name, command.source, command.key, found)
            error = "not at the source"
            if found:
                told: list[str] = []
                yield from world.write(self.name, command.target, command.key, found[0], told)
                error = "" if told == ["ok"] else told[0]
        world.counts[f"{type(command).__name__} {error or 'ok'}"] += 1
        if self.alive:
            self.run(self.tasks.on_result(world.now_s, command.command_id, error))


class World:
    """One history. `run` goes on until nothing is left or the time is over."""

    def __init__(self, seed: int, nodes: int = 3, directories: int = 2, limits: NodeLimits = LIMITS) -> None:
        self.seed, self.limits = seed, limits
        self.random = Random(seed)
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self.loss = 0.0
        self.repeat = 0.0
        self.delay_s = 0.02
        self.slow = 0.0  # how often a writer is
        self.cuts: dict[tuple[str, str], float] = {}
        self.counts: Counter[str] = Counter()
        self.lives: dict[str, Life] = {}
        self.members: dict[str, str] = {}
        self.draining = ""
        self.placer = Placer()
        self.values: dict[bytes, list[bytes]] = {key: [] for key in KEYS}  # all that was put under it
        self.committed: set[tuple[str, bytes]] = set()  # (epoch, bytes) that a node made visible
        self.open_ops = 0
        self.verify = True
        self._epochs = itertools.count(1)
        self.directories: dict[str, SimDirectory] = {}
        self.directory_names = [f"d{i}" for i in range(directories)]
        self.node_names = [f"n{i}" for i in range(nodes)]
        for name in self.node_names:
            self.boot(name)
        for name in self.directory_names:
            self.start_directory(name)
        self.tick()

    # ------------------------------------------------------------ time and links

    def at(self, delay_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), what))

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._queue)
            what()
        self.now_s = until_s

    def passes(self, a: str, b: str) -> bool:
        """Whether a message gets through now."""
        return self.cuts.get((min(a, b), max(a, b)), 0.0) <= self.now_s and self.random.random() >= self.loss

    def lag(self) -> float:
        return self.random.uniform(0.001, self.delay_s)

    def spawn(self, steps: Steps, answer: Any = None) -> None:
        """Run `steps` to the next thing that takes time."""
        try:
            wanted = steps.send(answer)
        except StopIteration:
            return
        if not isinstance(wanted, Call):
            self.at(wanted, lambda: self.spawn(steps))
            return
        give_up_s = self.now_s + RPC_S
        if self.passes(wanted.source, wanted.target):
            self.at(self.lag(), lambda: self._serve(wanted, steps, give_up_s))
        else:
            self.at(RPC_S, lambda: self.spawn(steps))

    def _serve(self, call: Call, steps: Steps, give_up_s: float) -> None:
        served = self.lives.get(call.target) or self.directories.get(call.target)
        answer = None
        if served is not None:
            try:
                answer = call.what(served)
            except MooncakeError as error:
                answer = error
            if isinstance(served, Life):
                self.flush(served)
        if answer is None or not self.passes(call.target, call.source):
            self.at(give_up_s - self.now_s, lambda: self.spawn(steps))
        else:
            self.at(self.lag(), lambda: self.spawn(steps, answer))

    def tick(self) -> None:
        for directory in list(self.directories.values()):
            directory.tick()
        self.at(0.5, self.tick)

    # ------------------------------------------------------------ nodes

    def boot(self, name: str) -> None:
        if name in self.lives:
            return
        epoch = f"{name}-{next(self._epochs)}"
        node = Node(PAGES * PAGE, self.limits, first_id=id_base(epoch))
        life = self.lives[name] = Life(
            name, epoch, node, bytearray(PAGES * PAGE), Snapshots(epoch, page_keys=2)
        )
        self.placer.update(self.room(life))
        self.announce(name, epoch)
        self.at(self.random.uniform(0, HEARTBEAT_S), lambda: self.beat(life))

    def crash(self, name: str) -> None:
        life = self.lives.pop(name, None)
        if life is not None:
            self.counts["evictions"] += life.node.shelf.evictions
            self.at(META_TTL_S, lambda: self.lease_ends(life))

    def lease_ends(self, life: Life) -> None:
        if self.members.get(life.name) == life.epoch:
            self.placer.leave(life.name)
            self.announce(life.name, None)

    def blink(self, name: str, length_s: float) -> None:
        """The metadata store loses a node that lives, and finds it again."""
        life = self.lives.get(name)
        if life is not None:
            self.lease_ends(life)
            self.at(length_s, lambda: self.lives.get(name) is life and self.announce(name, life.epoch))

    def announce(self, name: str, epoch: str | None) -> None:
        if epoch is None:
            self.members.pop(name, None)
        else:
            self.members[name] = epoch
        for directory in self.directories.values():
            self.at(META_S, lambda d=directory: d.alive and d.member(name, epoch))

    def room(self, life: Life) -> Room:
        stats = life.node.stats()
        return Room(life.name, stats.capacity_bytes, stats.capacity_bytes - stats.used_bytes)

    def beat(self, life: Life) -> None:
        if self.lives.get(life.name) is not life:
            return
        life.node.tick(self.now_s)
        self.flush(life)
        self.publish(life, b"", b"")
        self.at(HEARTBEAT_S, lambda: self.beat(life))

    def flush(self, life: Life) -> None:
        if life.node.has_events:
            events = life.node.drain_events()
            life.seq += 1
            self.publish(life, b"".join(events.stored), b"".join(events.removed))

    def publish(self, life: Life, stored: bytes, removed: bytes) -> None:
        event, room = StoreEvents(life.name, life.epoch, life.seq, stored, removed), self.room(life)
        self.placer.update(room)
        for directory in self.directories.values():
            times = self.passes(life.name, directory.name) + (self.random.random() < self.repeat)
            for _ in range(times):
                self.at(self.lag(), lambda d=directory: d.alive and d.hear(event, room))

    def page(self, life: Life, cursor: int) -> SnapshotPage:
        self.flush(life)
        return life.snapshots.page(cursor, life.seq, life.node.complete_keys)

    def drop(self, life: Life, key: bytes) -> str:
        life.node.drop(self.now_s, [key])
        return "ok"

    def corrupt(self, name: str) -> None:
        """A bit of some complete block flips."""
        life = self.lives.get(name)
        if life is not None and (keys := life.node.complete_keys()):
            held = life.node.lease_for_check(self.now_s, self.random.choice(keys), 1.0)
            life.memory[held.blocks[0].offset + self.random.randrange(SIZE)] ^= 1
            life.corrupt.add(held.blocks[0].offset)
            life.node.release(self.now_s, held.lease_id)

    # ------------------------------------------------------------ memory

    def store(self, life: Life, offset: int, data: bytes) -> None:
        """A one-sided write lands; nobody may be reading there."""
        self.check_unleased(life, offset, "written")
        life.memory[offset : offset + len(data)] = data

    def check_unleased(self, life: Life, offset: int, what: str) -> None:
        for expires_s, blocks in life.leased.values():
            for block in blocks:
                if expires_s > self.now_s and block.offset // PAGE == offset // PAGE:
                    raise Violation(f"seed {self.seed} at {self.now_s:.3f}: leased memory was {what}")

    def acquire(self, life: Life, key: bytes) -> Acquired:
        got = life.node.acquire(self.now_s, [key], LEASE_S)
        if got.blocks:
            life.leased[got.lease_id] = (self.now_s + LEASE_S, got.blocks)
        return got

    def release(self, life: Life, lease_id: int) -> str:
        life.leased.pop(lease_id, None)
        life.node.release(self.now_s, lease_id)
        return "ok"

    def reserve(self, life: Life, writer: str, key: bytes) -> tuple[Life, int, int]:
        reserved = life.node.reserve(self.now_s, writer, [key], SIZE)
        if reserved.tickets[0]:
            self.check_unleased(life, reserved.offsets[0], "given away")
        return life, reserved.offsets[0], reserved.tickets[0]

    def commit(self, life: Life, ticket: int, key: bytes, value: bytes) -> bool:
        done = life.node.commit(self.now_s, [ticket], [block_checksum(key, value)]).done[0]
        if done:
            self.committed.add((life.epoch, value))
            life.commits_s[key] = self.now_s
        return done

    def report_bad(self, life: Life, key: bytes) -> str:
        """As the service does: hash again under a lease, then drop."""
        held = life.node.lease_for_check(self.now_s, key, 1.0)
        if held.blocks:
            (block,) = held.blocks
            if block_checksum(key, life.memory[block.offset : block.offset + SIZE]) != block.checksum:
                life.node.drop_bad(self.now_s, key, block)
            life.node.release(self.now_s, held.lease_id)
        return "ok"

    # ------------------------------------------------------------ what clients do

    def write(self, who: str, target: str, key: bytes, value: bytes, told: list[str]) -> Steps:
        """Put one replica; `told` gets "ok", or why not: always, and "ok" only for what is there."""
        answer = yield Call(who, target, lambda life: self.reserve(life, who, key))
        if not isinstance(answer, tuple):
            yield Call(who, target, lambda life: life.node.abandon(self.now_s, who, []) or "ok")
            told.append("not reserved")
            return
        life, offset, ticket = answer
        if not ticket:
            found: list[bytes] = []
            yield from self.read(who, target, key, found)
            told.append("ok" if found else "full, or being written")
            return
        if self.random.random() < self.slow:
            # it hangs; what it had sent lands late, and it may have given its ticket up by then
            late_s = self.random.uniform(0.0, LATE_S_MAX)
            lands_s = self.now_s + late_s
            self.at(late_s, lambda: self.lives.get(target) is life and self.store(life, offset, value))
            if self.random.random() < 0.5:
                yield Call(who, target, lambda life: life.node.abandon(self.now_s, who, [ticket]) or "ok")
            yield max(0.0, lands_s - self.now_s) + 0.01
        else:
            half = SIZE // 2
            for start in (0, half):
                yield self.lag()
                if self.lives.get(target) is life:
                    self.store(life, offset + start, value[start : start + half])
        done = yield Call(who, target, lambda life: self.commit(life, ticket, key, value))
        told.append(self.outcome(done))
        if done is True and (life.epoch, value) not in self.committed:
            raise Violation(f"seed {self.seed}: a put was acknowledged that no node has committed")

    def outcome(self, done: object) -> str:
        """What a client is told after its commit."""
        return "ok" if done is True else "not committed, or nobody knows"

    def read(self, who: str, source: str, key: bytes, found: list[bytes]) -> Steps:
        """Read one replica under a lease, in two halves; `found` gets verified bytes only."""
        asked_s = self.now_s
        got = yield Call(who, source, lambda life: (life, self.acquire(life, key)))
        if not isinstance(got, tuple) or not got[1].blocks:
            return
        life, (block,), lease_id = got[0], got[1].blocks, got[1].lease_id
        data, half = b"", SIZE // 2
        for start in (0, half):
            yield self.random.uniform(0.0, LEASE_S / 3)
            if self.lives.get(source) is not life:
                return  # a one-sided read of memory that is gone fails
            data += life.memory[block.offset + start : block.offset + start + half]
        in_time = self.now_s - asked_s < LEASE_S
        if in_time and (not self.verify or block_checksum(key, data) == block.checksum):
            found.append(data)
        elif in_time:
            self.counts["bad bytes"] += 1
            yield Call(who, source, lambda life: self.report_bad(life, key))
        yield Call(who, source, lambda life: self.release(life, lease_id))

    def put(self, who: str, key: bytes, copies: int, preferred: str = "") -> Steps:
        self.open_ops += 1
        value = f"{key[0]} {next(self._order)} ".encode().ljust(SIZE, b".")
        self.values[key].append(value)
        choice = self.placer.choose(key, SIZE, copies, preferred=[preferred])
        told: list[str] = []
        for target in choice.nodes:
            yield from self.write(who, target, key, value, told)
        self.counts.update(f"put {what}" for what in told)
        if len(told) != len(choice.nodes):
            raise Violation(f"seed {self.seed}: a put ended without an answer")
        self.open_ops -= 1

    def get(self, who: str, key: bytes) -> Steps:
        self.open_ops += 1
        names = self.random.sample(self.directory_names, len(self.directory_names))
        holders: Any = None
        for name in names:
            holders = yield Call(who, name, lambda served: served.directory.replicas([key])[0])
            if holders:
                break
        found: list[bytes] = []
        for node in holders or ():
            yield from self.read(who, node, key, found)
            if found:
                break
        self.counts["hit" if found else "miss"] += 1
        if found and found[0] not in self.values[key]:
            raise Violation(f"seed {self.seed}: key {key[0]} gave {found[0]!r}, which was never put there")
        self.open_ops -= 1

    # ------------------------------------------------------------ directories

    def start_directory(self, name: str) -> None:
        if name not in self.directories:
            self.directories[name] = SimDirectory(self, name, leader=name == "d0")

    def kill_directory(self, name: str, back_after_s: float) -> None:
        if self.directories.pop(name, None) is not None:
            self.at(back_after_s, lambda: self.start_directory(name))

    def heal(self) -> None:
        self.loss = self.repeat = self.slow = 0.0
        self.delay_s = 0.02
        self.cuts.clear()
