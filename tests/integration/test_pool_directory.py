"""The pool's directories as processes: whichever of them dies, blocks stay whole and tasks are finished."""

import signal
import subprocess
import time

import pytest

from kvstore.directory.messages import DirectoryReply, Locate
from mooncake.core.messages import StoreRecord
from mooncake.core.rpc import BlockingRpcClient
from tests.integration.etcd_servers import NEEDS_ETCD, running
from tests.integration.pool_processes import MOONCAKE, WAIT_S, PoolProcesses, key, until

pytestmark = pytest.mark.integration

SIZE = 16 << 10
BLOCKS = 3_000
MANY = 200_000


@pytest.fixture(params=["embedded", pytest.param("etcd", marks=NEEDS_ETCD)])
def pool(request, tmp_path):
    """A pool on either metadata store."""
    if request.param == "embedded":
        yield from started(tmp_path, "")
        return
    with running(tmp_path) as servers:
        yield from started(tmp_path, f"etcd://{servers.options().endpoints[0]}/pool")


@pytest.fixture
def embedded(tmp_path):
    yield from started(tmp_path, "")


def started(folder, metadata):
    made = PoolProcesses(folder, metadata)
    try:
        yield made
    finally:
        made.close()


def locate(endpoint: str, keys: list[bytes]) -> dict[bytes, list[str]]:
    client = BlockingRpcClient(endpoint, DirectoryReply)
    try:
        found = client.call(Locate(keys), WAIT_S)
        rows = zip(keys, found.holders, strict=True)
        return {one: [found.nodes[index] for index in row] for one, row in rows}
    finally:
        client.close()


class Draining:
    """Three stores, two directories, and a drain of store a that is under way."""

    def __init__(self, pool: PoolProcesses):
        self.pool = pool
        self.stores = {node: pool.store(node) for node in "abc"}
        self.records = {name: pool.directory(name) for name in ("d1", "d2")}
        self.keys = [key(n) for n in range(BLOCKS)]
        pool.put(self.stores["a"], self.keys, SIZE)
        for name in self.records:
            pool.wait_exact(pool.admin(name), BLOCKS)
        self.leader = until(pool.leader)
        self.survivor = {"d1": "d2", "d2": "d1"}[self.leader]
        self.old, self.new = pool.admin(self.leader), pool.admin(self.survivor)
        self.task_id = self.old.post("/tasks/drain", {"node": "a"})["task_id"]
        until(self._in_the_middle, every_s=0.005)

    def _in_the_middle(self) -> bool:
        task = self.old.get(f"/tasks/{self.task_id}")
        assert task["state"] == "running", "it was over before anybody could disturb it"
        return 0 < task["done"] < task["total"]

    def check_end(self) -> None:
        """The survivor finishes it under its old name; every block is elsewhere, byte for byte."""

        def ended():
            task = self.new.get(f"/tasks/{self.task_id}")
            return task if task["state"] != "running" else None

        task = until(ended)
        assert (task["state"], task["failed"], task["reason"]) == ("done", 0, "")
        self.pool.wait_exact(self.new, BLOCKS)
        where = locate(self.records[self.survivor].endpoint, self.keys)
        assert {node for nodes in where.values() for node in nodes} == {"b", "c"}
        for node in "bc":
            there = [one for one, nodes in where.items() if node in nodes]
            assert self.pool.read(self.stores[node], there, SIZE) == there
        assert all(where.values())
        assert self.pool.read(self.stores["a"], self.keys[::10], SIZE) == []
        assert self.pool.stop(self.survivor) == 0


def test_a_drain_survives_the_death_of_the_leading_directory(pool):
    draining = Draining(pool)
    pool.kill(draining.leader)
    draining.check_end()


def test_a_leader_that_stood_still_finds_another_in_its_place(embedded):
    draining = Draining(embedded)
    embedded.signal(draining.leader, signal.SIGSTOP)
    until(lambda: draining.new.get("/health")["leads"])
    embedded.signal(draining.leader, signal.SIGCONT)
    until(lambda: not draining.old.get("/health")["leads"])
    draining.check_end()
    assert embedded.stop(draining.leader) == 0


def test_a_dead_store_leaves_the_index_and_its_hot_blocks_are_copied_again(pool):
    stores = {node: pool.store(node) for node in "abc"}
    directory = pool.directory("d1")
    hot, cold = [key(n) for n in range(50)], [key(n) for n in range(50, 100)]
    pool.put(stores["a"], hot, SIZE)
    pool.put(stores["b"], cold, SIZE)
    admin = pool.admin()
    pool.wait_exact(admin, 100)
    keys = [one.hex() for one in hot]
    until(lambda: all(node["blocks"] is not None for node in admin.get("/segments")["segments"]))
    admin.post("/tasks/hot", {"keys": keys, "copies": 2, "size_bytes": SIZE})
    until(lambda: all(len(nodes) == 2 for nodes in locate(directory.endpoint, hot).values()))
    assert {len(nodes) for nodes in locate(directory.endpoint, cold).values()} == {1}
    pool.kill("b")
    until(lambda: all("b" not in nodes for nodes in locate(directory.endpoint, hot + cold).values()))
    assert set(map(tuple, locate(directory.endpoint, cold).values())) == {()}  # only what b alone held
    until(lambda: all(len(nodes) == 2 for nodes in locate(directory.endpoint, hot).values()))
    for node in "ac":
        assert sorted(pool.read(stores[node], hot, SIZE)) == sorted(hot)
    pool.wait_exact(admin)


def test_a_killed_directory_of_many_blocks_is_full_again_and_another_answers_meanwhile(embedded):
    pool = embedded
    stores = [pool.store(node, "420MiB") for node in "ab"]
    keys = [key(n) for n in range(MANY)]
    put_many(stores[0], keys[: MANY // 2])
    put_many(stores[1], keys[MANY // 2 :])
    d1 = pool.directory("d1")
    d2 = pool.directory("d2")
    for name in ("d1", "d2"):
        pool.wait_exact(pool.admin(name), MANY)
    some = keys[:: MANY // 500]
    before = locate(d1.endpoint, some)
    pool.kill("d1")
    assert locate(d2.endpoint, some) == before
    begun_s = time.monotonic()
    d1 = pool.directory("d1")
    pool.wait_exact(pool.admin("d1"), MANY)
    print(f"full again after {time.monotonic() - begun_s:.1f} s with the start of the process")
    assert locate(d1.endpoint, some) == before
    assert locate(d1.endpoint, [key(MANY + 1)]) == {key(MANY + 1): []}


def put_many(record: StoreRecord, keys: list[bytes], batch: int = 10_000) -> None:
    """Blocks that nobody reads: their bytes do not matter."""
    from mooncake.core.messages import Commit, Reserve, StoreReply

    client = BlockingRpcClient(record.endpoint, StoreReply)
    try:
        for start in range(0, len(keys), batch):
            part = keys[start : start + batch]
            room = client.call(Reserve("filler", part, 4096), WAIT_S)
            done = client.call(Commit(room.tickets, [b"s" * 16] * len(part)), WAIT_S)
            assert all(done.done)
    finally:
        client.close()


def test_operators_use_the_commands(embedded):
    pool = embedded
    pool.store("a")
    pool.put(pool.store("b"), [key(n) for n in range(20)], SIZE)
    pool.directory("d1")
    pool.wait_exact(pool.admin(), 20)

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [MOONCAKE, "pool", *words, "--metadata", pool.metadata],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "done: 20 of 20 blocks" in run("drain", "b")
    assert "d1 leads" in run("status")
    assert "drain" in run("tasks")
    run("undrain", "b")
    assert "done: 2 of 2 blocks" in run("move", key(1).hex(), key(2).hex(), "--from", "a", "--to", "b")
    assert "task" in run("copy", key(3).hex(), "--to", "b", "--no-wait")
    assert "no node 'x'" in run("drain", "x", code=1)
    assert "no open task" in run("cancel", "0", code=1)
    pool.stop("d1")
    assert "no directory is registered" in run("status", code=69)
