"""Seeded histories of a pool under faults: no wrong read, no lost word, no broken lease, all found again.

A failing history prints its seed; `history(seed)` is the same again to the last event. Histories are
run in batches so that workers share them, most of them only in a full run (marker chaos, though they
kill nothing real); the last tests break a promise on purpose and must be seen.
"""

from collections import Counter

import pytest

from kvstore.directory.directory import Directory, Mode
from kvstore.directory.event_stream import EventStream
from kvstore.leader.task_types import State
from kvstore.limits import NodeLimits
from kvstore.node.node import Node
from mooncake.core.keys import block_checksum
from tests.sim.pool_world import HOT, KEYS, LIMITS, SIZE, Violation, World

SCHEDULES = 2_000
QUICK_SCHEDULES = 500
"""Of `make unit`."""
BATCH = 125
FAULTS_S = 5.0
HORIZON_S = 18.0
PUTS, GETS = 12, 14


def faults(world: World) -> None:
    """Let the seed choose what breaks, and when."""
    pick = world.random
    world.loss = pick.choice([0.0, 0.0, 0.02, 0.2])
    world.repeat = pick.choice([0.0, 0.1])
    world.delay_s = pick.choice([0.01, 0.1, 0.3])
    world.slow = pick.choice([0.0, 0.2, 0.5])
    everybody = [*world.node_names, *world.directory_names, "c0", "c1"]
    for _ in range(pick.randint(0, 4)):
        when_s, length_s = pick.uniform(0.0, FAULTS_S), pick.uniform(0.1, 4.0)
        node = pick.choice(world.node_names)
        match pick.randrange(6):
            case 0:
                back = pick.random() < 0.8
                world.at(when_s, lambda n=node: world.crash(n))
                if back:
                    world.at(when_s + length_s, lambda n=node: world.boot(n))
            case 1:
                name = pick.choice(world.directory_names)
                world.at(when_s, lambda d=name, s=length_s: world.kill_directory(d, s))
            case 2:
                a, b = sorted(pick.sample(everybody, 2))
                world.at(when_s, lambda a=a, b=b, s=length_s: world.cuts.update({(a, b): world.now_s + s}))
            case 3:
                world.at(when_s, lambda n=node, s=length_s: world.blink(n, s))
            case 4:
                world.at(when_s, lambda n=node: world.corrupt(n))
            case 5:
                world.at(when_s, lambda n=node: start_drain(world, n))


def start_drain(world: World, node: str) -> None:
    if not world.draining:
        world.draining = node
        world.placer.drain(node)
        if leader := world.directories.get("d0"):
            leader.drain(node)


def operations(world: World) -> None:
    pick = world.random
    for i in range(PUTS + GETS):
        who, key = f"c{i % 2}", pick.choice(KEYS)
        if i < PUTS:
            preferred, copies = pick.choice(["", *world.node_names]), pick.choice([1, 1, 2])
            steps, first_s = world.put(who, key, copies, preferred), 0.0
        else:
            steps, first_s = world.get(who, key), 1.0
        world.at(pick.uniform(first_s, FAULTS_S), lambda s=steps: world.spawn(s))


def history(seed: int, limits: NodeLimits = LIMITS, **settings: object) -> World:
    """Run one history: faults and work for FAULTS_S, then peace until the horizon."""
    world = World(seed, limits=limits)
    for name, value in settings.items():
        setattr(world, name, value)
    faults(world)
    operations(world)
    world.at(FAULTS_S, world.heal)
    world.run(HORIZON_S)
    return world


def check(world: World) -> None:
    """What must hold when everything has settled."""
    about = f"seed {world.seed}"
    if world.open_ops:
        raise Violation(f"{about}: {world.open_ops} operations without an answer")
    if set(world.directories) != set(world.directory_names):
        raise Violation(f"{about}: a directory did not come back")
    for name, life in world.lives.items():
        world.counts["evictions"] += life.node.shelf.evictions
        life.node.tick(world.now_s + 60)
        stats = life.node.stats()
        if (stats.leases, stats.writing, life.node.writing.quarantined_bytes) != (0, 0, 0):
            raise Violation(f"{about}: {name} still holds {stats}")
    for served in world.directories.values():
        directory = served.directory
        if {status.node for status in directory.status(0.0)} != set(world.lives):
            raise Violation(f"{about}: {served.name} knows other nodes than live")
        if directory.mode() is not Mode.EXACT:
            raise Violation(f"{about}: {served.name} is {directory.status(world.now_s)}")
        for key, holders in zip(KEYS, directory.replicas(KEYS), strict=True):
            truth = [name for name, life in world.lives.items() if key in life.node.complete_keys()]
            if sorted(holders) != sorted(truth):
                raise Violation(f"{about}: {served.name}: key {key[0]} at {holders}, truly at {truth}")
    check_bytes(world)
    check_tasks(world)


def check_bytes(world: World) -> None:
    """Every block that is committed can be read, unless we flipped a bit of it."""
    for life in world.lives.values():
        for key in life.node.complete_keys():
            (block,) = life.node.acquire(world.now_s + 60, [key], 1.0).blocks
            data = bytes(life.memory[block.offset : block.offset + SIZE])
            sound = block_checksum(key, data) == block.checksum
            if not sound and block.offset not in life.corrupt:
                raise Violation(f"seed {world.seed}: a committed block of {life.name} is damaged")
            if sound and data not in world.values[key]:
                raise Violation(f"seed {world.seed}: {life.name} holds {data!r} under key {key[0]}")


def check_tasks(world: World) -> None:
    leader = world.directories["d0"]
    able = [name for name in world.lives if name != world.draining]
    hot = leader.tasks.progress(0)
    if not hot.failed and not any(life.corrupt for life in world.lives.values()):
        for key, holders in zip(HOT, leader.directory.replicas(HOT), strict=True):
            if holders and len(holders) < min(2, len({*able, *holders})):
                raise Violation(f"seed {world.seed}: hot key {key[0]} only at {holders}")
    if world.draining:
        progress = leader.tasks.progress(leader.drain_id)
        world.counts[f"drain {progress.state}"] += 1
        life = world.lives.get(world.draining)
        early = (
            [k for k in life.node.complete_keys() if life.commits_s[k] < leader.drained_s - 1] if life else []
        )
        if progress.state is State.DONE and early:
            raise Violation(f"seed {world.seed}: {world.draining} is said to be drained, and is not")


BATCHES = [
    pytest.param(first, marks=() if first < QUICK_SCHEDULES else pytest.mark.chaos)
    for first in range(0, SCHEDULES, BATCH)
]


@pytest.mark.parametrize("first", BATCHES)
def test_a_pool_keeps_its_promises_under_faults(first):
    counts: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        world = history(seed)
        check(world)
        counts += world.counts
    for what in (
        "hit",
        "miss",
        "put ok",
        "snapshots",
        "distrusts",
        "Copy ok",
        "Drop ok",
        "bad bytes",
        "evictions",
    ):
        assert counts[what] > 0, f"no history had a {what!r}: this test proves little ({counts})"


def test_a_seed_is_a_whole_history():
    a, b = history(7), history(7)
    assert a.counts == b.counts
    assert [life.memory for life in a.lives.values()] == [life.memory for life in b.lives.values()]


# ---------------------------------------------------------------- the checker can fail


def violation(seeds: int = 400, **settings: object) -> str:
    """The first violation that the checker finds."""
    for seed in range(seeds):
        try:
            check(history(seed, **settings))
        except Violation as found:
            return str(found)
    return "none"


def test_without_quarantine_late_writers_are_caught():
    assert "leased memory was written" in violation(limits=NodeLimits(write_s=2.0, quarantine_s=1e-9))


def test_without_checksums_damaged_bytes_are_caught():
    assert "never put there" in violation(verify=False)


def test_an_index_that_ignores_gaps_is_caught(monkeypatch):
    take = EventStream._continue

    def skip(self, event):
        self._seq = max(self._seq, event.seq - bool(event.stored or event.removed))
        return take(self, event)

    monkeypatch.setattr(EventStream, "_continue", skip)
    assert "truly at" in violation()


def test_an_index_that_keeps_the_dead_is_caught(monkeypatch):
    monkeypatch.setattr(Directory, "leave", lambda self, node: False)
    assert "knows other nodes" in violation()


def test_a_node_that_ends_leases_early_is_caught(monkeypatch):
    acquire = Node.acquire
    monkeypatch.setattr(Node, "acquire", lambda self, now_s, keys, lease_s: acquire(self, now_s, keys, 0.001))
    assert "leased memory was" in violation()


def test_a_client_that_is_told_ok_too_early_is_caught(monkeypatch):
    monkeypatch.setattr(World, "commit", lambda self, *_: True)
    assert "no node has committed" in violation()
